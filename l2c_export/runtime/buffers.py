"""Memory that every backend can bind."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from l2c_export.runtime.backends import Array

_ALIGNMENT = 256  # bytes; what the strictest backend asks of an address


def aligned(shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
    """An uninitialised array whose address suits every backend."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    skip = -memory.ctypes.data % _ALIGNMENT
    return memory[skip : skip + size].view(dtype).reshape(shape)
