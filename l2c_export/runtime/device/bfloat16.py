"""bfloat16 in host memory, where numpy has none: read as float32, which holds all its values."""

from __future__ import annotations

from typing import Any

import numpy as np

from l2c_export.runtime.backends import Array
from l2c_export.runtime.session import dtype_of

_NAME = "bfloat16"


def host_type(dtype: str) -> np.dtype[Any]:
    """What a caller gives and gets for a manifest's dtype: float32 for bfloat16, else the same."""
    return np.dtype(np.float32) if dtype == _NAME else dtype_of(dtype)


def stored_type(dtype: str) -> np.dtype[Any]:
    """What is copied from and to the device: the bits of bfloat16 as uint16, else the same."""
    return np.dtype(np.uint16) if dtype == _NAME else dtype_of(dtype)


def from_stored(array: Array, dtype: str) -> Array:
    """What came from the device as a caller gets it; bfloat16 is the upper half of a float32."""
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == _NAME else array


def to_stored(array: Array, dtype: str) -> Array:
    """Finite values as they go to the device; rounded to bfloat16, the even one of two as near."""
    if dtype != _NAME:
        return array
    bits = np.ascontiguousarray(array).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
