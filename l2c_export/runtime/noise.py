"""The noise that calls of a stochastic sampler draw: from a seed, or the caller's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from l2c_export.core.bundle import Manifest
from l2c_export.errors import L2CError
from l2c_export.runtime.inputs import check_floats, check_seed

Floats = NDArray[np.float32]

NoiseSource = Callable[[int, Floats], None]
"""Takes the index of a call and the (B, C, H, W) array to fill for it; calls come in order."""


def seeded_noise(seed: int | None, latents: Sequence[int]) -> NoiseSource:
    """Standard normal noise in which every latent has a stream of its own.

    So a latent gets the same noise whatever batch it is in.

    Args:
        seed: None is another every time.
        latents: Which streams to take, one a latent of the batch.

    Raises:
        L2CError: The seed is no whole number.
    """
    check_seed(seed)
    streams = [np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(i,))) for i in latents]

    def fill(index: int, out: Floats) -> None:
        for stream, latent in zip(streams, out, strict=True):
            stream.standard_normal(dtype=np.float32, out=latent)

    return fill


def given_noise(noise: Floats) -> NoiseSource:
    """The noise of each call from an array.

    Args:
        noise: (calls, B, C, H, W), as :func:`check_call_noise` returns it.
    """

    def fill(index: int, out: Floats) -> None:
        np.copyto(out, noise[index])

    return fill


def noise_source(
    manifest: Manifest, batch: int, call_noise: Any, seed: int | None
) -> NoiseSource | None:
    """The noise of the calls: the caller's, or from the seed; None where they draw none.

    Args:
        manifest: Of the bundle.
        batch: B.
        call_noise: (calls, B, C, H, W) float32, a :data:`NoiseSource`, or None.
        seed: Of the noise where none is given.

    Raises:
        L2CError: The noise or the seed is unfit.
    """
    if call_noise is None:
        return seeded_noise(seed, range(batch)) if manifest.stochastic else None
    if callable(call_noise):
        return cast(NoiseSource, call_noise)
    return given_noise(check_call_noise(manifest, batch, call_noise))


def check_call_noise(manifest: Manifest, batch: int, noise: Any) -> Floats:
    """(calls, B, C, H, W) float32 noise of every call; what the last call does not use counts too.

    Raises:
        L2CError: It is something else, or the bundle's sampler draws no noise.
    """
    if not manifest.stochastic:
        raise L2CError(
            f"call_noise: the sampler of this bundle, {manifest.sampler}, draws no noise; leave it out"
        )
    shape = (len(manifest.calls), batch, *manifest.latent)
    return check_floats(noise, shape, np.dtype(np.float32), "call_noise")
