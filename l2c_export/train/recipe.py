"""How a router is trained; no torch, so that the command line can check it at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from l2c_export.core.models import ModelConfig, family_defaults
from l2c_export.errors import L2CError
from l2c_export.train.shape import Shape, make_shape

LATENT_SCALE = 0.18215
"""What the official models multiply the latents of Stable Diffusion's VAE with."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "dit": {"iterations": 20000, "error": "mean", "l1": 5e-6, "clamp": 5.0},
    "uvit": {"iterations": 40000, "error": "sum", "l1": 0.1, "clamp": None},
}
"""What the recipes of L2C's code have for each model family, with data."""

WITHOUT_DATA: dict[str, Any] = {"iterations": 2000, "lr": 0.01, "clamp": 5.0, "label_dropout": None}
"""What differs without data, where an iteration is a whole trajectory."""


@dataclass(frozen=True)
class Recipe:
    """How a router is trained; the defaults are those of L2C for DiT with 20 calls.

    Attributes:
        steps: Calls of a trajectory.
        iterations: Optimizer steps.
        batch: Latents an iteration, over all processes.
        lr: Constant learning rate of AdamW (no weight decay).
        l1: Weight of the sum of scores, which pushes towards reuse.
        ste_threshold: If given, branches are computed or reused outright, where the score is above it
            or not, and gradients pass straight through; None mixes softly.
        label_dropout: Probability of the null label; None without data, where guidance has both.
        clamp: Logits stay in -clamp … clamp; None leaves them free.
        seed: Of the initial logits, the order of the data, the noise and the dropped labels.
        sampler: Whose trajectories.
        schedule: ``pairs`` or ``every``; see :func:`~l2c_export.train.shape.make_shape`.
        error: ``mean`` or ``sum`` of the squared errors of a latent.
        no_data: Train on the student's own trajectories from noise.
        guidance_scale: Of those trajectories; None with data, which is trained without guidance.
        reweigh_every: Without data, if given: each so many iterations the calls are weighed by what
            their caching does to the final latent.
    """

    steps: int = 20
    iterations: int = 20000
    batch: int = 64
    lr: float = 1e-3
    l1: float = 5e-6
    ste_threshold: float | None = None
    label_dropout: float | None = 0.1
    clamp: float | None = 5.0
    seed: int = 0
    sampler: str = "ddim"
    schedule: str = "pairs"
    error: str = "mean"
    no_data: bool = False
    guidance_scale: float | None = None
    reweigh_every: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        self._check_numbers()
        if self.error not in ("mean", "sum"):
            raise L2CError(f"--error {self.error!r} is unknown; use mean or sum")
        shape = self.shape
        if self.no_data:
            self._check_without_data()
        else:
            self._check_with_data(shape)

    def _check_numbers(self) -> None:
        limits = {
            "steps": (1, 1000),
            "iterations": (1, 10**9),
            "batch": (1, 10**6),
            "lr": (0, 10),
            "l1": (0, 1e6),
            "ste_threshold": (0, 1),
            "label_dropout": (0, 1),
            "clamp": (1e-3, 80),
            "seed": (0, 2**63 - 1),
            "guidance_scale": (-100, 100),
            "reweigh_every": (1, 10**9),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise L2CError(f"--{name.replace('_', '-')} {value} is outside {low} … {high}")

    def _check_without_data(self) -> None:
        if self.guidance_scale is None:
            raise L2CError("training without data needs a guidance scale; 1 is the bare model")
        if self.label_dropout is not None:
            raise L2CError("--label-dropout is for training with data; --no-data drops no labels")

    def _check_with_data(self, shape: Shape) -> None:
        for name in ("guidance_scale", "reweigh_every"):
            if getattr(self, name) is not None:
                raise L2CError(
                    f"--{name.replace('_', '-')} is for training without data: add --no-data"
                )
        if self.label_dropout is None:
            raise L2CError("training with data needs a label dropout; 0 drops none")
        if self.schedule == "every":
            raise L2CError(
                "--schedule every needs the caches of a whole trajectory, which data do not give: "
                "add --no-data"
            )
        if shape.origins is None:
            raise L2CError(
                f"{self.sampler} keeps a history that data do not give: train it with --no-data"
            )

    @property
    def shape(self) -> Shape:
        """The calls that the router decides."""
        return make_shape(self.schedule, self.sampler, self.steps)


def make_recipe(config: ModelConfig, **given: Any) -> Recipe:
    """The recipe of a model's family, with what a user gives in place of its defaults.

    Args:
        config: The model.
        given: Fields of :class:`Recipe`; None takes the default.

    Raises:
        L2CError: It cannot be trained.
    """
    family = family_defaults(config)
    values = DEFAULTS[config.family] | {"sampler": family.sampler}
    if given.get("no_data"):
        values |= WITHOUT_DATA | {"guidance_scale": family.guidance_scale}
    return Recipe(**values | {name: value for name, value in given.items() if value is not None})
