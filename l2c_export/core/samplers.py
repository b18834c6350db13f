"""Samplers as tables: each call's timestep and the coefficients of its update, in float64.

A solver's update is linear in the latent, the model's output, what the solver kept and fresh noise, so
a bundle carries numbers and a runner needs no solver code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from l2c_export.core.dpm_solver import clean, dpm_solver_2m, dpm_solver_2s, dpm_solver_3s
from l2c_export.core.noise_schedule import (
    NOISE_SCHEDULES,
    TRAIN_STEPS,
    Level,
    alphas_cumprod,
    linear_alphas_cumprod,
)
from l2c_export.core.sampler_call import Call, Update, combine
from l2c_export.errors import L2CError

__all__ = [
    "NOISE_SCHEDULES",
    "PREDICTIONS",
    "SAMPLERS",
    "Call",
    "Update",
    "ddim",
    "linear_alphas_cumprod",
    "model_table",
    "sampler_table",
    "spaced_timesteps",
]

PREDICTIONS = ("noise", "velocity")
"""What a network's output can be."""


class Model(Protocol):
    """What a sampler needs to know of a model; its configuration will do."""

    @property
    def noise_schedule(self) -> str:
        """A name from :data:`NOISE_SCHEDULES`."""

    @property
    def prediction(self) -> str:
        """One of :data:`PREDICTIONS`."""

    @property
    def first_timestep(self) -> int:
        """What the network is told for the least noise: 0 where training counts steps from 0."""


def spaced_timesteps(calls: int, train_steps: int = TRAIN_STEPS) -> NDArray[np.int64]:
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


def ddim(calls: int, noise_schedule: str = "linear", first_timestep: int = 0) -> tuple[Call, ...]:
    """Deterministic DDIM for a network that predicts noise (Song et al. 2021, eq. 12, eta = 0)."""
    steps = spaced_timesteps(calls)
    alphas = alphas_cumprod(noise_schedule)[steps]
    previous = np.concatenate([[1.0], alphas[:-1]])
    x = np.sqrt(previous / alphas)
    output = np.sqrt(1 - previous) - x * np.sqrt(1 - alphas)
    return tuple(
        Call(float(t + first_timestep), {"x": {"x": float(a), "output": float(b)}})
        for t, a, b in zip(steps[::-1], x[::-1], output[::-1], strict=True)
    )


def ddpm(calls: int, noise_schedule: str, first_timestep: int) -> tuple[Call, ...]:
    """Ancestral sampling on DDIM's timesteps (Ho et al. 2020, eq. 7): the variance is beta-tilde."""
    steps = spaced_timesteps(calls)
    alphas = alphas_cumprod(noise_schedule)[steps]
    table = []
    for i in reversed(range(calls)):
        now, after = float(alphas[i]), float(alphas[i - 1]) if i else 1.0
        beta = 1 - now / after
        update = combine(
            (after**0.5 * beta / (1 - now), clean(Level.of(now))),
            ((now / after) ** 0.5 * (1 - after) / (1 - now), {"x": 1.0}),
            (((1 - after) / (1 - now) * beta) ** 0.5, {"noise": 1.0}),
        )
        table.append(Call(float(steps[i] + first_timestep), {"x": update}))
    return tuple(table)


def euler(calls: int, noise_schedule: str = "", first_timestep: int = 0) -> tuple[Call, ...]:
    """Euler steps along a rectified flow (Liu et al. 2022, algorithm 1), uniform in sigma.

    A latent is (1 - sigma) x0 + sigma noise, the network predicts noise - x0 and is told 1000 sigma,
    as in Stable Diffusion 3. It has no use for a noise schedule and a first timestep.
    """
    if not 1 <= calls <= TRAIN_STEPS:
        raise L2CError(f"{calls} steps: the number of steps must be between 1 and {TRAIN_STEPS}")
    sigmas = np.linspace(1.0, 0.0, calls + 1)
    return tuple(
        Call(float(TRAIN_STEPS * sigma), {"x": {"x": 1.0, "output": float(after - sigma)}})
        for sigma, after in pairwise(sigmas)
    )


class Table(Protocol):
    """Makes the calls of a sampler."""

    def __call__(self, calls: int, noise_schedule: str, first_timestep: int) -> tuple[Call, ...]:
        """``calls`` calls, noisiest first."""


@dataclass(frozen=True)
class Sampler:
    """A sampler.

    Attributes:
        table: Makes its calls.
        calls_per_step: Evaluations in one step of the solver.
        prediction: What the network must predict.
    """

    table: Table
    calls_per_step: int = 1
    prediction: str = "noise"


SAMPLERS: Mapping[str, Sampler] = {
    "ddim": Sampler(ddim),
    "dpm-solver-2s": Sampler(dpm_solver_2s, 2),
    "dpm-solver-3s": Sampler(dpm_solver_3s, 3),
    "dpm-solver-2m": Sampler(dpm_solver_2m),
    "euler": Sampler(euler, prediction="velocity"),
    "ddpm": Sampler(ddpm),
}


def sampler_table(
    name: str, calls: int, noise_schedule: str = "linear", first_timestep: int = 0
) -> tuple[Call, ...]:
    """The calls of one trajectory, noisiest first.

    Args:
        name: One of :data:`SAMPLERS`.
        calls: Evaluations of the network.
        noise_schedule: One of :data:`NOISE_SCHEDULES`; a sampler for velocities needs none.
        first_timestep: What the network is told for the least noise of its training.

    Raises:
        L2CError: There is no sampler or schedule of that name, or it cannot make that many calls.
    """
    return _sampler(name).table(calls, noise_schedule, first_timestep)


def model_table(name: str, calls: int, model: Model) -> tuple[Call, ...]:
    """The same for a model: with its noise schedule, and its way to count timesteps.

    Raises:
        L2CError: As :func:`sampler_table`, or the sampler is for another kind of prediction.
    """
    wanted = _sampler(name).prediction
    if model.prediction != wanted:
        fitting = [other for other, its in SAMPLERS.items() if its.prediction == model.prediction]
        raise L2CError(
            f"sampler {name!r} is for models that predict {wanted}, this one predicts "
            f"{model.prediction}; use --sampler {' or '.join(fitting)}"
        )
    return sampler_table(name, calls, model.noise_schedule, model.first_timestep)


def _sampler(name: str) -> Sampler:
    if name not in SAMPLERS:
        raise L2CError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
