"""Training with data, as in L2C (arXiv 2406.01733, section 3.3) and its authors' code.

An iteration draws one routed call. Data are noised to where the calls before it start; those compute
everything, by one step of the solver without guidance. At the routed call teacher and student see the
same latent. A U-ViT is told the solver's own times; the authors' training rounds them to whole steps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l2c_export.build.models import Model
from l2c_export.core.models import ModelConfig
from l2c_export.core.noise_schedule import TRAIN_STEPS, ContinuousSchedule
from l2c_export.core.samplers import Call
from l2c_export.train.data import Dataset
from l2c_export.train.objective import Weights, generator
from l2c_export.train.recipe import Recipe
from l2c_export.train.student import advance, mixing, squared_error, times
from l2c_export.train.workers import Workers


class WithData:
    """The errors of one routed call an iteration.

    Args:
        model: Frozen, on its device.
        calls: The sampler's table.
        recipe: How it is trained.
        data: Labelled latents.
        workers: The processes that share the batch.

    Attributes:
        importance: (rows,) of ones.
    """

    def __init__(
        self, model: Model, calls: Sequence[Call], recipe: Recipe, data: Dataset, workers: Workers
    ) -> None:
        self.model, self.calls, self.recipe = model, calls, recipe
        self.data, self.workers = data, workers
        self.shape = recipe.shape
        self.importance = torch.ones(len(self.shape.routed))
        self.device = next(model.parameters()).device

    def errors(self, iteration: int, weights: Weights) -> Iterator[tuple[int, Tensor]]:
        """Yield the row that was drawn and its error."""
        shape = self.shape
        draw = self._draw(iteration)
        routed = shape.routed[draw.row]
        assert shape.origins is not None  # the recipe has seen to it
        calls = self.calls[shape.origins[draw.row] : routed + 1]
        x0, labels = (part.to(self.device) for part in self.data.read(draw.places.tolist()))
        null = torch.full_like(labels, self.model.config.null_label)
        labels = torch.where(draw.dropped.to(self.device), null, labels)
        noisy = add_noise(x0, calls[0], draw.noise.to(self.device), self.model.config)
        error = routed_error(
            self.model, calls, noisy, labels, weights(draw.row), self.recipe.error, draw.chance
        )
        yield draw.row, error

    def _draw(self, iteration: int) -> _Draw:
        recipe, per_process = self.recipe, self.recipe.batch // self.workers.count
        first = iteration * recipe.batch + self.workers.rank * per_process
        places = np.arange(first, first + per_process)
        rows = len(self.data)
        orders = {int(e): _order(recipe.seed, int(e), rows) for e in np.unique(places // rows)}
        taken = np.array([orders[int(place) // rows][place % rows] for place in places])
        chance = generator(recipe.seed, 1 + self.workers.rank, iteration)
        assert recipe.label_dropout is not None  # the recipe has seen to it
        return _Draw(
            row=int(torch.randint(len(self.shape.routed), (), generator=chance)),
            places=taken,
            dropped=torch.rand(per_process, generator=chance) < recipe.label_dropout,
            noise=torch.randn(per_process, *self.model.config.latent_shape, generator=chance),
            chance=chance,
        )


@dataclass(frozen=True)
class _Draw:
    """What chance decides in one iteration of one process."""

    row: int  # of the router; one for the whole batch of a process
    places: NDArray[np.int64]  # (R,) in the data
    dropped: Tensor  # (R,) bool
    noise: Tensor  # (R, C, S, S)
    chance: torch.Generator  # of what a stochastic sampler draws after this


@functools.lru_cache(maxsize=2)  # an iteration may end one epoch and begin the next
def _order(seed: int, epoch: int, rows: int) -> NDArray[np.int64]:
    """(rows,) the data's order in an epoch; shared, so not to be changed."""
    return np.random.default_rng((seed, epoch)).permutation(rows)


def routed_error(
    model: Model,
    calls: Sequence[Call],
    noisy: Tensor,
    labels: Tensor,
    weights: Tensor,
    kind: str = "mean",
    chance: torch.Generator | None = None,
) -> Tensor:
    """Squared error of the student against the teacher, over all output channels.

    Args:
        model: Frozen.
        calls: Those that compute everything, and the routed one after them.
        noisy: (R, C, S, S) latents at the timestep of the first call.
        labels: (R,) labels, some of them null; all passes share them.
        weights: (slots,) the student's weights of fresh branches.
        kind: ``mean`` or ``sum`` over a latent.
        chance: Of the noise of a stochastic sampler; None is PyTorch's own.
    """
    *leading, routed = calls
    latents = {"x": noisy}
    with torch.no_grad():
        for call in leading:  # the last one's branches stay
            out, cached = model(latents["x"], times(call, noisy), labels)
            latents = advance(latents, call, out[:, : model.config.in_channels], chance)
        x = latents["x"]
        teacher, _ = model(x, times(routed, x), labels)
    with mixing(model, cached, weights):
        student, _ = model(x, times(routed, x), labels)
    return squared_error(student, teacher, kind)


def add_noise(x0: Tensor, call: Call, noise: Tensor, config: ModelConfig) -> Tensor:
    """Diffuse clean latents to the timestep of a call (Ho et al. 2020, eq. 4).

    Between two timesteps of the model's training it is where DPM-Solver is. The latents of models that
    predict velocities lie on straight lines.
    """
    if config.prediction == "velocity":
        sigma = call.timestep / TRAIN_STEPS
        return (1 - sigma) * x0 + sigma * noise
    time = (call.timestep + 1 - config.first_timestep) / TRAIN_STEPS
    level = ContinuousSchedule(config.noise_schedule).level(time)
    return level.alpha * x0 + level.sigma * noise
