"""Measurements. Nothing here is installed; run from a clone: python -m benchmarks.speed."""

import redrafter_mlx  # noqa: F401  before anything imports mlx: it loads a fast BLAS
