"""Measurements. Nothing here is installed; run from a clone: python -m benchmarks.speed."""
