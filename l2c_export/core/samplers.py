"""Samplers as tables: each call's timestep and the coefficients of its update, in float64.

A solver's update is linear in the latent, the model's output, what the solver kept and fresh noise, so
a bundle carries numbers and a runner needs no solver code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from l2c_export.errors import L2CError

Update = dict[str, dict[str, float]]
"""What a call leaves behind: target to the coefficients of its sources.

Targets are ``"x"``, the next latent, and the histories that the call writes; others keep their value.
Sources are ``"x"`` (the latent that the call saw), ``"output"`` (the guided model output), histories,
and ``"noise"`` (fresh standard normal numbers, one draw a call). All are the values before the update.
"""

HISTORIES = ("history", "history2")
"""Latents that a solver keeps between calls, each of the shape of x."""

PREDICTIONS = ("noise", "velocity")
"""What a network's output can be."""


@dataclass(frozen=True)
class Call:
    """One evaluation of the network and the update after it.

    Attributes:
        timestep: What the network is told.
        update: See :data:`Update`.
    """

    timestep: float
    update: Update


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


def update_fault(update: Update, written: Collection[str], stochastic: bool) -> str | None:
    """What is wrong with a call's update, in words; None where a runner can execute it.

    Args:
        update: Of one call.
        written: The histories that earlier calls wrote.
        stochastic: Whether the program may draw noise.
    """
    if "x" not in update:
        return "has no update of x"
    if unknown := sorted(set(update) - {"x", *HISTORIES}):
        return f"updates {unknown}, this release knows x, {', '.join(HISTORIES)}"
    sources = {source for coefficients in update.values() for source in coefficients}
    if unknown := sorted(sources - {"x", "output", "noise", *HISTORIES}):
        return f"updates from {unknown}, this release knows x, output, noise, {', '.join(HISTORIES)}"
    if early := sorted(sources & set(HISTORIES) - set(written)):
        return f"reads {early}, which no call before it wrote"
    if "noise" in sources and not stochastic:
        return "draws noise, though the sampler is not stochastic"
    if not all(update.values()):
        return "has an update from nothing"
    if not all(math.isfinite(number) for terms in update.values() for number in terms.values()):
        return "has an update that is no finite number"
    return None


def is_stochastic(calls: Collection[Call]) -> bool:
    """Whether a program draws noise after its start."""
    return any("noise" in sources for call in calls for sources in call.update.values())


# Noise schedules --------------------------------------------------------------------------------


def linear_alphas_cumprod(train_steps: int = 1000) -> NDArray[np.float64]:
    """(train_steps,) product of 1 - beta, beta linear from 1e-4 to 0.02 (Ho et al. 2020)."""
    betas = np.linspace(1e-4, 0.02, train_steps, dtype=np.float64)
    return np.cumprod(1.0 - betas, dtype=np.float64)


def scaled_linear_alphas_cumprod(train_steps: int = 1000) -> NDArray[np.float64]:
    """(train_steps,) the same with sqrt(beta) linear, beta from 0.00085 to 0.012 (Stable Diffusion)."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, train_steps, dtype=np.float64) ** 2
    return np.cumprod(1.0 - betas, dtype=np.float64)


NOISE_SCHEDULES: dict[str, Callable[[], NDArray[np.float64]]] = {
    "linear": linear_alphas_cumprod,
    "scaled_linear": scaled_linear_alphas_cumprod,
}
"""Name to the (1000,) alphas-bar of training, least noise first."""


def alphas_cumprod(noise_schedule: str) -> NDArray[np.float64]:
    """(1000,) alphas-bar of a named schedule.

    Raises:
        L2CError: There is none of that name.
    """
    if noise_schedule not in NOISE_SCHEDULES:
        raise L2CError(
            f"unknown noise schedule {noise_schedule!r}; known: {', '.join(NOISE_SCHEDULES)}"
        )
    return NOISE_SCHEDULES[noise_schedule]()


# Samplers ---------------------------------------------------------------------------------------


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


class Sampler(Protocol):
    """Makes the table of a sampler."""

    def __call__(self, calls: int, noise_schedule: str, first_timestep: int) -> tuple[Call, ...]:
        """``calls`` calls, noisiest first."""


@dataclass(frozen=True)
class _Entry:
    """A sampler and the prediction that it is for."""

    table: Sampler
    prediction: str = "noise"


SAMPLERS: Mapping[str, _Entry] = {"ddim": _Entry(ddim)}


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
    return _entry(name).table(calls, noise_schedule, first_timestep)


def model_table(name: str, calls: int, model: Model) -> tuple[Call, ...]:
    """The same for a model: with its noise schedule, and its way to count timesteps.

    Raises:
        L2CError: As :func:`sampler_table`, or the sampler is for another kind of prediction.
    """
    wanted = _entry(name).prediction
    if model.prediction != wanted:
        fitting = [other for other, entry in SAMPLERS.items() if entry.prediction == model.prediction]
        raise L2CError(
            f"sampler {name!r} is for models that predict {wanted}, this one predicts "
            f"{model.prediction}; its samplers: {', '.join(fitting)}"
        )
    return sampler_table(name, calls, model.noise_schedule, model.first_timestep)


def _entry(name: str) -> _Entry:
    if name not in SAMPLERS:
        raise L2CError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
