"""Cells of the quality table: one method at one setting, sampled through a real bundle and judged.

Samples are cached on disk, keyed by all that they depend on, so a table that was interrupted, or that
has got another row, is finished without sampling anything twice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from judge import Judge
from numpy.typing import NDArray

from l2c_export.build.build import Request, build_bundle
from l2c_export.build.checkpoint import Checkpoint
from l2c_export.core.files import key_of, replacing, write_json
from l2c_export.core.models import ModelConfig
from l2c_export.core.plan import Plan, make_plan
from l2c_export.core.precision import Precision
from l2c_export.core.samplers import Call, model_table
from l2c_export.core.schedule import Schedule
from l2c_export.runtime import Runner

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Task:
    """What every cell of a family shares.

    Attributes:
        config: The model.
        weights: Its checkpoint.
        model: Digest of the files that the two were read from.
        sampler: Name of the sampler.
        seeds: Of the noise; each seed is one independent measurement of the Fréchet distance.
        samples: Images for each seed, the classes in turn.
        batch: Latents in a call.
        guidance_scale: None samples without guidance.
        precision: Of the bundles.
        work: Folder for bundles and samples.
    """

    config: ModelConfig
    weights: Checkpoint
    model: str
    sampler: str
    seeds: tuple[int, ...]
    samples: int
    batch: int
    guidance_scale: float | None
    precision: Precision
    work: Path

    @property
    def labels(self) -> NDArray[np.int64]:
        """(samples,) classes, the same for all methods."""
        return np.arange(self.samples) % self.config.num_classes

    def noise(self, seed: int) -> Floats:
        """(samples, C, S, S), the same for all methods."""
        shape = (self.samples, *self.config.latent_shape)
        return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Attributes:
        task: What it shares with others.
        method: ``uncached``, ``L2C``, ``random`` or ``FORA``.
        setting: The rest of its name.
        schedules: One for each seed; all of the same cost.
    """

    task: Task
    method: str
    setting: str
    schedules: tuple[Schedule, ...]

    @property
    def name(self) -> str:
        """Of the row."""
        return f"{self.task.config.family} {self.method} {self.setting}"

    def plan(self, i: int = 0) -> Plan:
        """Of one seed's schedule."""
        task = self.task
        return make_plan(
            task.config,
            self.schedules[i],
            self._calls,
            guidance=task.guidance_scale is not None,
            precision=task.precision,
            sampler=task.sampler,
        )

    @cached_property
    def _calls(self) -> tuple[Call, ...]:
        return model_table(self.task.sampler, self.schedules[0].calls, self.task.config)

    @cached_property
    def macs(self) -> int:
        """Of one image."""
        return self.plan().costs.total_macs

    @property
    def removed(self) -> int:
        """Sub-layer evaluations reused in one trajectory."""
        return self.schedules[0].removed

    def _program(self, i: int) -> dict[str, Any]:
        """All that the samples of a schedule depend on, but for the noise."""
        task, reuse = self.task, self.schedules[i].reuse
        return {
            "model": task.model,
            "calls": [(call.timestep, call.update) for call in self._calls],
            "guidance": task.guidance_scale,
            "precision": task.precision.name,
            "reuse": ["".join("01"[int(reused)] for reused in row) for row in reuse],
        }

    def runner(self, i: int = 0) -> Runner:
        """Of the bundle of one seed's schedule, built if it is not there; one thread."""
        task = self.task
        path = task.work / "bundles" / key_of(self._program(i), task.batch)[:16]
        batch, scale = (task.batch, task.batch), task.guidance_scale
        request = Request(self.plan(i), task.weights, batch=batch, guidance_scale=scale)
        return Runner.load(build_bundle(path, request).path, threads=1)

    def samples(self, i: int) -> Floats:
        """(samples, C, S, S) latents of one seed, from the cache or made now."""
        task = self.task
        key = key_of("samples", self._program(i), task.seeds[i], task.samples)
        path = task.work / "samples" / f"{key}.npy"
        if not path.exists():
            latents = self.runner(i).sample(task.labels, noise=task.noise(task.seeds[i]))
            with replacing(path) as temporary:
                np.save(temporary, latents)
        return np.load(path)

    def verdicts(self, judge: Judge, reference: Cell) -> list[dict[str, float]]:
        """For each seed: Fréchet distance, class accuracy, and drift from the reference's samples.

        The drift is the root mean square of the difference over that of the reference's samples.
        """
        task, found = self.task, []
        for i, seed in enumerate(task.seeds):
            key = key_of(
                "verdict", self._program(i), reference._program(i), seed, task.samples, judge.key
            )
            path = task.work / "verdicts" / f"{key}.json"
            if not path.exists():
                mine, theirs = self.samples(i), reference.samples(i)
                verdict = judge(mine, task.labels)
                drift = float(np.sqrt(np.square(mine - theirs).mean() / np.square(theirs).mean()))
                data = {"distance": verdict.distance, "accuracy": verdict.accuracy, "drift": drift}
                write_json(path, data)
            found.append(json.loads(path.read_text(encoding="utf-8")))
        return found


def time_cells(cells: Sequence[Cell], reference: Cell, repeats: int) -> dict[str, list[float]]:
    """Time of each cell over the reference's, by name: one ratio for each repeat.

    A repeat runs one batch of every cell, one after the other, so that what slows the machine slows
    all; the clock is this process's processor time on one thread, so other processes do not count.
    """
    runners = {cell.name: cell.runner() for cell in [reference, *cells]}
    task = reference.task
    labels, noise = task.labels[: task.batch], task.noise(task.seeds[0])[: task.batch]
    ratios: dict[str, list[float]] = {cell.name: [] for cell in cells}
    for repeat in range(-1, repeats):  # the first is a warm-up
        seconds = {name: _seconds(runner, labels, noise) for name, runner in runners.items()}
        if repeat >= 0:
            for name, all_ratios in ratios.items():
                all_ratios.append(seconds[name] / seconds[reference.name])
    return ratios


def _seconds(runner: Runner, labels: NDArray[np.int64], noise: Floats) -> float:
    began = time.process_time()
    runner.sample(labels, noise=noise)
    return time.process_time() - began
