"""Train a Learning-to-Cache router for DiT: the weights of the model stay, one score a sub-layer moves.

One iteration is two neighbouring calls of the trajectory (L2C, arXiv 2406.01733, section 3.3, with the
authors' code where it differs from the text). The noisier call computes everything; the next may reuse
what it computed. There the model runs twice: as teacher, computing everything, and as student, in
which every branch is (1 - w) * cached + w * fresh with w = sigmoid(logit). The loss is the mean
squared error between the two plus l1 * sum(w).

All randomness is a function of (seed, rank, iteration): a resumed training is the same training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from l2c_export.build.models import Branches, Model
from l2c_export.core.samplers import Call, linear_alphas_cumprod, sampler_table
from l2c_export.core.schedule import Router
from l2c_export.errors import L2CError
from l2c_export.train.data import Dataset
from l2c_export.train.state import Run, read_state, write_state
from l2c_export.train.workers import Workers

Progress = Callable[[int, int, float], None]
"""Called with iterations done, iterations in all, and the last loss."""


# One iteration ----------------------------------------------------------------------------------


@contextmanager
def mixing(model: Model, cached: Branches, weights: Tensor) -> Iterator[None]:
    """Within this block every branch of the model gives (1 - w) * cached + w * fresh.

    Args:
        model: The model; its own forward runs, so that a student can differ in nothing else.
        cached: Slot to (R, N, D) branch output of the call before.
        weights: (slots,) w in 0 … 1, in the order of ``config.slots``.
    """

    def mix(reused: Tensor, w: Tensor) -> Callable[[nn.Module, object, Tensor], Tensor]:
        return lambda module, args, fresh: (1 - w) * reused + w * fresh

    handles = []
    for (name, module), w in zip(model.branch_modules().items(), weights, strict=True):
        handles.append(module.register_forward_hook(mix(cached[name], w)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pair_loss(
    model: Model, pair: tuple[Call, Call], noisy: Tensor, labels: Tensor, weights: Tensor
) -> Tensor:
    """Mean squared error of the student against the teacher, over rows and all output channels.

    Args:
        model: Frozen.
        pair: The full call and the one after it, which may reuse.
        noisy: (R, C, S, S) latents at the timestep of the full call.
        labels: (R,) labels, some of them null; the three passes share them.
        weights: (slots,) the student's weights of fresh branches.
    """
    full, reusing = pair
    with torch.no_grad():
        out, cached = model(noisy, _times(full, noisy), labels)
        step = full.update["x"]
        x = step["x"] * noisy + step["output"] * out[:, : model.config.in_channels]
        teacher, _ = model(x, _times(reusing, x), labels)
    with mixing(model, cached, weights):
        student, _ = model(x, _times(reusing, x), labels)
    return (student - teacher).square().mean()


def branch_weights(logits: Tensor, ste_threshold: float | None) -> Tensor:
    """(slots,) weights of fresh branches: the scores, or with a threshold 0 and 1 in their place."""
    scores = logits.sigmoid()
    if ste_threshold is None:
        return scores
    return (scores > ste_threshold).to(scores) + scores - scores.detach()


def add_noise(x0: Tensor, call: Call, noise: Tensor) -> Tensor:
    """Diffuse clean latents to the timestep of a call (Ho et al. 2020, eq. 4)."""
    alpha = float(linear_alphas_cumprod()[int(call.timestep)])
    return alpha**0.5 * x0 + (1 - alpha) ** 0.5 * noise


def _times(call: Call, x: Tensor) -> Tensor:
    return torch.full((len(x),), call.timestep, device=x.device)


# The draw of an iteration -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Draw:
    """What chance decides in one iteration of one process."""

    pair: int  # 0 is the noisiest pair of calls; one for the whole batch of a process
    rows: NDArray[np.int64]  # (R,) of the data
    dropped: Tensor  # (R,) bool
    noise: Tensor  # (R, C, S, S)


def _draw(run: Run, workers: Workers, rows: int, iteration: int) -> _Draw:
    recipe, per_process = run.recipe, run.recipe.batch // workers.count
    first = iteration * recipe.batch + workers.rank * per_process
    places = np.arange(first, first + per_process)
    orders = {int(epoch): _order(recipe.seed, int(epoch), rows) for epoch in np.unique(places // rows)}
    taken = np.array([orders[int(place) // rows][place % rows] for place in places])
    entropy = np.random.SeedSequence((recipe.seed, 1 + workers.rank, iteration))
    generator = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]) >> 1)
    return _Draw(
        pair=int(torch.randint(recipe.steps // 2, (), generator=generator)),
        rows=taken,
        dropped=torch.rand(per_process, generator=generator) < recipe.label_dropout,
        noise=torch.randn(per_process, *run.config.latent_shape, generator=generator),
    )


@functools.lru_cache(maxsize=2)  # an iteration may end one epoch and begin the next
def _order(seed: int, epoch: int, rows: int) -> NDArray[np.int64]:
    """(rows,) the data's order in an epoch; shared, so not to be changed."""
    return np.random.default_rng((seed, epoch)).permutation(rows)


# Training ---------------------------------------------------------------------------------------


class Trainer:
    """The router's logits, their optimizer, and how often it has stepped.

    Each pair of calls has its own parameter: one that no process drew is left alone by the optimizer,
    its momentum included, as in the authors' code.

    Args:
        model: On its device; frozen by this.
        data: Labelled latents.
        run: Recipe, model and data of this training.
        workers: The processes that share it.
    """

    def __init__(self, model: Model, data: Dataset, run: Run, workers: Workers) -> None:
        if run.recipe.batch % workers.count:
            raise L2CError(
                f"--batch {run.recipe.batch} cannot be shared by {workers.count} processes; "
                "use a multiple of them"
            )
        self.model = model.eval().requires_grad_(False)
        self.data, self.run, self.workers = data, run, workers
        self.calls = sampler_table("ddim", run.recipe.steps)
        self.device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(run.recipe.seed)
        shape = run.recipe.steps // 2, len(run.config.slots)
        start = torch.randn(shape, generator=generator).clamp(-run.recipe.clamp, run.recipe.clamp)
        self.logits = [nn.Parameter(row.clone().to(self.device)) for row in start]
        self.optimizer = torch.optim.AdamW(self.logits, lr=run.recipe.lr, weight_decay=0.0)
        self.iteration = 0

    def step(self) -> float:
        """Make one iteration; return the loss, averaged over the processes."""
        recipe, draw = self.run.recipe, _draw(self.run, self.workers, len(self.data), self.iteration)
        pair = self.calls[2 * draw.pair], self.calls[2 * draw.pair + 1]
        x0, labels = (part.to(self.device) for part in self.data.read(draw.rows.tolist()))
        null = torch.full_like(labels, self.run.config.null_label)
        labels = torch.where(draw.dropped.to(self.device), null, labels)
        noisy = add_noise(x0, pair[0], draw.noise.to(self.device))
        logits = self.logits[draw.pair]
        weights = branch_weights(logits, recipe.ste_threshold)
        error = pair_loss(self.model, pair, noisy, labels, weights)
        loss = error + recipe.l1 * logits.sigmoid().sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        value = self.workers.average(self.logits, loss.detach())
        if not np.isfinite(value):
            raise L2CError(
                f"the loss is {value} in iteration {self.iteration + 1}; the checkpoint, the data or "
                "their scale is broken"
            )
        self.optimizer.step()
        with torch.no_grad():
            for row in self.logits:
                row.clamp_(-recipe.clamp, recipe.clamp)
        self.iteration += 1
        return value

    def router(self) -> Router:
        """The router as it is now, in call order."""
        logits = np.zeros((self.run.recipe.steps, len(self.run.config.slots)), np.float32)
        logits[1::2] = torch.stack([row.detach() for row in self.logits]).cpu().numpy()
        return Router(logits, np.arange(len(logits)) % 2 == 1, "ddim", {"training": self.run.facts()})

    def save(self, path: Path) -> None:
        """Write a checkpoint; only the first process does."""
        if self.workers.rank == 0:
            write_state(path, self.run, self.iteration, self.logits, self.optimizer)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint of the same training.

        Raises:
            L2CError: There is none, it is damaged, or it is of another training.
        """
        self.iteration = read_state(path, self.run, self.logits, self.optimizer)


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


def mean_loss(losses: Sequence[float], last: int = 100) -> float | None:
    """Mean of the last losses; None if there are none."""
    return float(np.mean(losses[-last:])) if losses else None
