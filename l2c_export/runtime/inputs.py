"""What a caller hands to a bundle: checked before anything runs, with the way out in the error."""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2c_export.core.bundle import Manifest
from l2c_export.errors import L2CError
from l2c_export.runtime.backends import Array


def as_array(value: Any, what: str) -> Array:
    """A numpy array of a list, a numpy array or anything with ``__dlpack__``; shared where possible."""
    if isinstance(value, np.ndarray):
        return value
    try:
        return np.from_dlpack(value) if hasattr(value, "__dlpack__") else np.asarray(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise L2CError(f"{what} cannot be read as an array in CPU memory: {reason}") from None


def check_labels(manifest: Manifest, labels: Any) -> NDArray[np.int64]:
    """(B,) labels of the model's classes.

    Raises:
        L2CError: They are not a row of integers, or one is not a class.
    """
    array = as_array(labels, "labels")
    if array.ndim != 1 or not array.size:
        raise L2CError(f"labels have shape {array.shape}; they must be a row: one integer per image")
    if array.dtype.kind not in "iu":
        raise L2CError(f"labels are {array.dtype}; they must be integers")
    outside = array[(array < 0) | (array >= manifest.classes)]
    if outside.size:
        raise L2CError(
            f"label {outside[0]} is not a class of this model; it has 0 to {manifest.classes - 1}"
        )
    return array.astype(np.int64)


def check_batch(manifest: Manifest, batch: int) -> None:
    """Refuse a number of latents that the graphs were not built for."""
    low, high = manifest.batch
    if not low <= batch <= high:
        built = f"batch {low}" if low == high else f"batches of {low} to {high}"
        raise L2CError(
            f"{batch} images in one batch; this bundle was built for {built}: "
            "build with another --batch, or let Runner.sample() make batches of any number"
        )


def check_noise(
    manifest: Manifest, batch: int, noise: Any = None, seed: int | None = None
) -> NDArray[np.float32]:
    """(B, C, H, W) float32 to start from: the caller's, or standard normal from a seed.

    Raises:
        L2CError: Noise and seed are both given where calls draw no noise, or one is unfit.
    """
    shape = (batch, *manifest.latent)
    check_seed(seed)
    if noise is None:
        return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    if seed is not None and not manifest.stochastic:
        raise L2CError("noise and seed are both given; the seed is only for making noise")
    return check_floats(noise, shape, np.dtype(np.float32), "noise")


def check_seed(seed: int | None) -> None:
    """Refuse a seed that numpy would not take.

    Raises:
        L2CError: It is neither None nor a whole number from 0.
    """
    if seed is not None and not (isinstance(seed, numbers.Integral) and seed >= 0):
        raise L2CError(f"seed is {seed!r}; it must be a whole number, 0 or more")


def check_floats(value: Any, shape: tuple[int, ...], dtype: np.dtype[Any], what: str) -> Array:
    """An array of exactly this shape and dtype, without NaN and infinity.

    Raises:
        L2CError: It is something else.
    """
    array = as_array(value, what)
    if array.shape != shape:
        raise L2CError(f"{what} has shape {array.shape}; this bundle needs {shape}")
    if array.dtype != dtype:
        raise L2CError(f"{what} is {array.dtype}; this bundle needs {dtype}: cast it first")
    if not np.isfinite(array).all():
        raise L2CError(f"{what} has values that are NaN or infinite")
    return array


def check_guidance(manifest: Manifest, scale: float | None) -> float:
    """The guidance scale to use: the caller's or the bundle's.

    Raises:
        L2CError: It is no finite float32, or the bundle has no guidance.
    """
    if manifest.guidance is None:
        if scale is not None:
            raise L2CError(
                f"guidance_scale {scale!r}: this bundle was built without guidance; leave it out, "
                "or build without --no-guidance"
            )
        return 1.0
    if scale is None:
        return manifest.guidance.scale
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not _fits_float32(scale):
        raise L2CError(f"guidance_scale is {scale!r}; it must be a finite number, in float32 too")
    return float(scale)


def _fits_float32(number: numbers.Real) -> bool:
    try:
        return abs(float(number)) <= float(np.finfo(np.float32).max)  # which NaN is not
    except OverflowError:  # an integer beyond float64
        return False


def batches(count: int, limits: tuple[int, int]) -> Iterator[tuple[NDArray[np.intp], int]]:
    """Split ``count`` images into batches within limits.

    Yields:
        The images of a batch, and how many of them are new: the last batch is filled up with
        images that were there before where it would be too small.
    """
    low, high = limits
    for first in range(0, count, high):
        fresh = min(high, count - first)
        yield np.arange(first, first + max(low, fresh)) % count, fresh
