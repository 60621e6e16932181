"""The one place where the host waits for the device."""

from __future__ import annotations

import mlx.core as mx
import numpy as np


def read(*arrays: mx.array) -> tuple[np.ndarray, ...]:
    """Evaluate `arrays` together and hand them to numpy: one synchronisation, however many.

    On unified memory nothing is copied: the result is a view that keeps its array alive.
    bfloat16 has no numpy type: cast before reading.
    """
    mx.eval(arrays)
    return tuple(np.array(array, copy=False) for array in arrays)
