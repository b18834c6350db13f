"""One training from files to a router file: what ``l2c-export train-router`` does."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from l2c_export.build.checkpoint import Checkpoint, open_checkpoint
from l2c_export.build.download import find_checkpoint
from l2c_export.build.models import Model, build_model
from l2c_export.build.router_file import read_router, write_router
from l2c_export.core.models import ModelConfig
from l2c_export.core.overlap import check_comparable
from l2c_export.core.schedule import Router
from l2c_export.errors import L2CError
from l2c_export.train.data import Dataset, read_dataset
from l2c_export.train.recipe import LATENT_SCALE, Recipe
from l2c_export.train.router import Progress, Trainer, first_and_last, train
from l2c_export.train.state import Run
from l2c_export.train.sweep import SweepRow, sweep
from l2c_export.train.workers import workers


@dataclass(frozen=True)
class Job:
    """What to train, with what, and where to.

    Attributes:
        config: The model.
        recipe: How.
        data: An ``.npz`` or a folder; see :func:`~l2c_export.train.data.read_dataset`. None for a
            recipe without data.
        output: The router file; the training's own checkpoint is beside it, with ``.training`` added.
        checkpoint: The model's weights; None takes the official ones of the preset.
        preset: The model's name, if it has one.
        latent_scale: Factor of latents; None is 0.18215 for presets and 1 for others.
        device: ``cpu``, ``cuda`` or ``cuda:N``; None takes a GPU if there is one.
        threads: On the CPU; None leaves PyTorch's choice.
        compare: Another router, to say how much they agree.
        resume: Continue from the training's checkpoint; without this there must be none.
        checkpoint_every: Iterations between checkpoints; None is 1000, and 50 without data, where each
            is a trajectory.
    """

    config: ModelConfig
    recipe: Recipe
    data: Path | None
    output: Path
    checkpoint: Path | None = None
    preset: str | None = None
    latent_scale: float | None = None
    device: str | None = None
    threads: int | None = None
    compare: Path | None = None
    resume: bool = False
    checkpoint_every: int | None = None

    @property
    def state(self) -> Path:
        """The training's checkpoint."""
        return self.output.with_name(self.output.name + ".training")


@dataclass(frozen=True)
class Result:
    """What came of a training.

    Attributes:
        output: The router file.
        iterations: Made in all, those before a resume included.
        losses: Means of the first and of the last iterations made here, 100 or half of all; None if
            there were none.
        seconds: Of training, without reading files.
        sweep: What each threshold buys.
    """

    output: Path
    iterations: int
    losses: tuple[float, float] | None
    seconds: float
    sweep: list[SweepRow]

    def facts(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self) | {"output": str(self.output)}


def _silent(done: int, total: int, loss: float) -> None:
    """Show no progress."""


def train_router(job: Job, progress: Progress = _silent) -> Result | None:
    """Train a router and write it.

    Returns:
        The result; None in all but the first of several processes.

    Raises:
        L2CError: Something does not fit, is broken or is missing.
    """
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    if not job.output.absolute().parent.is_dir():
        raise L2CError(f"cannot write {job.output}: there is no folder {job.output.absolute().parent}")
    if job.output.is_dir():
        raise L2CError(f"cannot write {job.output}: it is a folder; give a file in it with -o")
    if job.state.exists() and not job.resume:
        raise L2CError(
            f"there is a training checkpoint {job.state}; continue it with --resume, or remove it"
        )
    other = _open_other(job)
    data, scale = _open_data(job)
    weights = _open_weights(job)
    with workers(job.device) as (group, device):
        digest = str(weights.source["sha256"])
        run = Run(
            job.recipe, job.config, digest, None if data is None else data.digest, group.count, scale
        )
        trainer = Trainer(load_model(weights).to(device), data, run, group)
        if job.resume:
            trainer.restore(job.state)
        start = time.monotonic()
        every = job.checkpoint_every or (50 if job.recipe.no_data else 1000)
        losses = train(trainer, job.state, every, _silent if group.rank else progress)
        if group.rank:
            return None
        seconds, router = time.monotonic() - start, trainer.router()
        write_router(
            job.output, router, family=job.config.family, slots=job.config.slots, training=run.facts()
        )
        rows = sweep(router, job.config, other=other)
        return Result(job.output, trainer.iteration, first_and_last(losses), seconds, rows)


def _open_other(job: Job) -> Router | None:
    """The router to compare with, checked before the training rather than after it."""
    if job.compare is None:
        return None
    recipe, config = job.recipe, job.config
    other = read_router(job.compare, config.family)
    blank = np.zeros((recipe.steps, len(config.slots)), np.float32)
    ours = Router(blank, np.zeros(recipe.steps, bool), recipe.sampler, slots=config.slots)
    try:
        check_comparable(ours, other)
    except L2CError as error:
        raise L2CError(f"--compare {job.compare}: {error}") from None
    return other


def _open_data(job: Job) -> tuple[Dataset | None, float | None]:
    """The data and the factor of their latents; nothing for a recipe without data."""
    if job.recipe.no_data:
        if job.data is not None:
            raise L2CError(f"--no-data trains without data; leave out --data {job.data}")
        if job.latent_scale is not None:
            raise L2CError("--latent-scale is a factor of data; leave it out with --no-data")
        return None, None
    if job.data is None:
        raise L2CError("give training data with --data PATH, or train from noise with --no-data")
    scale = job.latent_scale
    if scale is None:
        scale = 1.0 if job.preset is None else LATENT_SCALE
    return read_dataset(job.data, job.config, scale), scale


def load_model(weights: Checkpoint) -> Model:
    """The eager model with a checkpoint's weights in float32."""
    with torch.device("meta"):
        model = build_model(weights.config)
    model.load_state_dict(dict(weights.iter_tensors()), assign=True)
    return model


def _open_weights(job: Job) -> Checkpoint:
    if job.checkpoint is not None:
        return open_checkpoint(job.checkpoint, job.config)
    if job.preset is None:
        raise L2CError("a model from --model-config needs --checkpoint FILE")
    return open_checkpoint(find_checkpoint(job.preset), job.config)
