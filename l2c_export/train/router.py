"""Train a Learning-to-Cache router: the weights of the model stay, one score a sub-layer moves.

The scores of a routed call are trained so that a student, whose branches are mixed with cached ones,
gives what its teacher gives, with a penalty on computing: error + l1 * sum(scores) (L2C, arXiv
2406.01733, equation 9). Which calls are routed is the recipe's shape; where the student comes from,
the objective's.

All randomness is a function of (seed, rank, iteration): a resumed training is the same training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from l2c_export.build.models import Model
from l2c_export.core.samplers import model_table
from l2c_export.core.schedule import Router
from l2c_export.errors import L2CError
from l2c_export.train.data import Dataset
from l2c_export.train.objective import Objective
from l2c_export.train.state import Run, read_state, write_state
from l2c_export.train.student import branch_weights
from l2c_export.train.with_data import WithData
from l2c_export.train.without_data import WithoutData
from l2c_export.train.workers import Workers

Progress = Callable[[int, int, float], None]
"""Called with iterations done, iterations in all, and the last loss."""


class Trainer:
    """The router's logits, their optimizer, and how often it has stepped.

    Each routed call has its own parameter: one that no process drew is left alone by the optimizer,
    its momentum included, as in the authors' code.

    Args:
        model: On its device; frozen by this.
        data: Labelled latents; None for a recipe without data.
        run: Recipe, model and data of this training.
        workers: The processes that share it.
    """

    def __init__(self, model: Model, data: Dataset | None, run: Run, workers: Workers) -> None:
        recipe = run.recipe
        if recipe.batch % workers.count:
            raise L2CError(
                f"--batch {recipe.batch} cannot be shared by {workers.count} processes; "
                "use a multiple of them"
            )
        self.model = model.eval().requires_grad_(False)
        self.run, self.workers, self.iteration = run, workers, 0
        self.calls = model_table(recipe.sampler, recipe.steps, run.config)
        if data is None:
            self.objective: Objective = WithoutData(model, self.calls, recipe, workers)
        else:
            self.objective = WithData(model, self.calls, recipe, data, workers)
        device = next(model.parameters()).device
        chance = torch.Generator().manual_seed(recipe.seed)
        start = torch.randn(len(recipe.shape.routed), len(run.config.slots), generator=chance)
        self.logits = [nn.Parameter(row.clone().to(device)) for row in start]
        self._clamp()
        self.optimizer = torch.optim.AdamW(self.logits, lr=recipe.lr, weight_decay=0.0)

    def step(self) -> float:
        """Make one iteration; return the loss of a routed call, averaged over the processes."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for row, error in self.objective.errors(self.iteration, self._weights):
            penalty = self.run.recipe.l1 * self.logits[row].sigmoid().sum()
            loss = float(self.objective.importance[row]) * error + penalty
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        value = self.workers.average(self.logits, torch.stack(losses).mean())
        if not np.isfinite(value):
            raise L2CError(
                f"the loss is {value} in iteration {self.iteration + 1}; the checkpoint, the data or "
                "their scale is broken"
            )
        self.optimizer.step()
        self._clamp()
        self.iteration += 1
        return value

    def _weights(self, row: int) -> Tensor:
        return branch_weights(self.logits[row], self.run.recipe.ste_threshold)

    @torch.no_grad()
    def _clamp(self) -> None:
        if (limit := self.run.recipe.clamp) is not None:
            for row in self.logits:
                row.clamp_(-limit, limit)

    def router(self) -> Router:
        """The router as it is now, in call order."""
        recipe = self.run.recipe
        routed = np.isin(np.arange(recipe.steps), recipe.shape.routed)
        logits = np.zeros((recipe.steps, len(self.run.config.slots)), np.float32)
        logits[routed] = torch.stack([row.detach() for row in self.logits]).cpu().numpy()
        return Router(logits, routed, recipe.sampler, {"training": self.run.facts()})

    def save(self, path: Path) -> None:
        """Write a checkpoint; only the first process does."""
        if self.workers.rank == 0:
            write_state(
                path, self.run, self.iteration, self.logits, self.optimizer, self.objective.importance
            )

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint of the same training.

        Raises:
            L2CError: There is none, it is damaged, or it is of another training.
        """
        self.iteration, self.objective.importance = read_state(
            path, self.run, self.logits, self.optimizer
        )


def train(
    trainer: Trainer,
    checkpoint: Path,
    checkpoint_every: int = 1000,
    progress: Progress = lambda done, total, loss: None,
) -> list[float]:
    """Train up to the recipe's iterations, with a checkpoint now and then and at the end.

    Returns:
        The losses of the iterations made here.
    """
    losses: list[float] = []
    total = trainer.run.recipe.iterations
    while trainer.iteration < total:
        losses.append(trainer.step())
        progress(trainer.iteration, total, losses[-1])
        if trainer.iteration % checkpoint_every == 0 or trainer.iteration == total:
            trainer.save(checkpoint)
    return losses


def first_and_last(losses: Sequence[float], count: int = 100) -> tuple[float, float] | None:
    """Means of the first and of the last losses, up to half of all each; None if there are none."""
    if not losses:
        return None
    count = max(1, min(count, len(losses) // 2))
    return float(np.mean(losses[:count])), float(np.mean(losses[-count:]))
