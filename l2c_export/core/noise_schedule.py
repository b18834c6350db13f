"""Noise schedules of training: how much signal and noise a latent has at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2c_export.errors import L2CError

TRAIN_STEPS = 1000


def linear_alphas_cumprod(train_steps: int = TRAIN_STEPS) -> NDArray[np.float64]:
    """(train_steps,) product of 1 - beta, beta linear from 1e-4 to 0.02 (Ho et al. 2020)."""
    betas = np.linspace(1e-4, 0.02, train_steps, dtype=np.float64)
    return np.cumprod(1.0 - betas, dtype=np.float64)


def scaled_linear_alphas_cumprod(train_steps: int = TRAIN_STEPS) -> NDArray[np.float64]:
    """(train_steps,) the same with sqrt(beta) linear, beta from 0.00085 to 0.012 (Stable Diffusion)."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, train_steps, dtype=np.float64) ** 2
    return np.cumprod(1.0 - betas, dtype=np.float64)


NOISE_SCHEDULES: dict[str, Callable[[], NDArray[np.float64]]] = {
    "linear": linear_alphas_cumprod,
    "scaled_linear": scaled_linear_alphas_cumprod,
}
"""Name to the alphas-bar of the 1000 steps of training, least noise first."""


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


@dataclass(frozen=True)
class Level:
    """How noisy a latent is: x = alpha * x0 + sigma * noise.

    Attributes:
        alpha: Of the signal.
        sigma: Of the noise; alpha^2 + sigma^2 = 1.
    """

    alpha: float
    sigma: float

    @classmethod
    def of(cls, alpha_bar: float) -> Level:
        """The level of an alpha-bar, which is alpha^2."""
        return cls(float(alpha_bar) ** 0.5, (1.0 - float(alpha_bar)) ** 0.5)

    @property
    def half_log_snr(self) -> float:
        """Lambda = log(alpha / sigma), in which the DPM solvers step."""
        return float(np.log(self.alpha) - np.log(self.sigma))


class ContinuousSchedule:
    """A schedule in continuous time: between the steps of training log alpha is linear.

    That is how DPM-Solver (Lu et al. 2022, arXiv 2206.00927) treats such
    models. Time runs from 1/1000, the least noise of training, to 1.
    """

    def __init__(self, noise_schedule: str) -> None:
        self._log_alpha = 0.5 * np.log(alphas_cumprod(noise_schedule))
        self._time = np.arange(1, TRAIN_STEPS + 1) / TRAIN_STEPS

    def level(self, time: float) -> Level:
        """The level at a time."""
        return Level.of(np.exp(2 * np.interp(time, self._time, self._log_alpha)))

    def time(self, half_log_snr: float) -> float:
        """The time at which log(alpha / sigma) has a value."""
        log_alpha = -0.5 * np.logaddexp(0.0, -2.0 * half_log_snr)
        return float(np.interp(log_alpha, self._log_alpha[::-1], self._time[::-1]))
