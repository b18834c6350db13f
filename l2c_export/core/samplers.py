"""Samplers as tables: each call's timestep and the coefficients of its update, in float64.

A deterministic solver's update is linear in the latent and the model's output, so a bundle carries
numbers and a runner needs no solver code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2c_export.errors import L2CError


@dataclass(frozen=True)
class Call:
    """One evaluation of the network and the update after it.

    Attributes:
        timestep: What the network is told.
        update: Coefficients of the next latent over the names ``"x"`` (the latent that the call
            saw) and ``"output"`` (the guided model output).
    """

    timestep: float
    update: dict[str, float]


def linear_alphas_cumprod(train_steps: int = 1000) -> NDArray[np.float64]:
    """(train_steps,) product of 1 - beta, beta linear from 1e-4 to 0.02 (Ho et al. 2020)."""
    betas = np.linspace(1e-4, 0.02, train_steps, dtype=np.float64)
    return np.cumprod(1.0 - betas, dtype=np.float64)


def spaced_timesteps(calls: int, train_steps: int = 1000) -> NDArray[np.int64]:
    """(calls,) ascending timesteps of the official DiT: round(i * 999 / (calls - 1)).

    This is not the strided "ddimN" spacing; released routers are tied to it.
    """
    if not 1 <= calls <= train_steps:
        raise L2CError(f"{calls} steps: the number of steps must be between 1 and {train_steps}")
    if calls == 1:
        return np.zeros(1, np.int64)
    stride = (train_steps - 1) / (calls - 1)
    steps, at = [], 0.0
    for _ in range(calls):  # the official code accumulates, and so rounds, in this way
        steps.append(round(at))
        at += stride
    return np.array(steps, np.int64)


def ddim(calls: int) -> tuple[Call, ...]:
    """Deterministic DDIM for a network that predicts noise (Song et al. 2021, eq. 12, eta = 0)."""
    steps = spaced_timesteps(calls)
    alphas = linear_alphas_cumprod()[steps]
    previous = np.concatenate([[1.0], alphas[:-1]])
    x = np.sqrt(previous / alphas)
    output = np.sqrt(1 - previous) - x * np.sqrt(1 - alphas)
    return tuple(
        Call(float(t), {"x": float(a), "output": float(b)})
        for t, a, b in zip(steps[::-1], x[::-1], output[::-1], strict=True)
    )


SAMPLERS: dict[str, Callable[[int], tuple[Call, ...]]] = {"ddim": ddim}


def sampler_table(name: str, calls: int) -> tuple[Call, ...]:
    """The calls of one trajectory, noisiest first.

    Raises:
        L2CError: There is no sampler of that name, or it cannot make that many calls.
    """
    if name not in SAMPLERS:
        raise L2CError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    return SAMPLERS[name](calls)
