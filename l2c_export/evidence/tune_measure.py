"""Drift and time of many programs on one set of graphs, in rounds, and nothing measured twice.

A round is a batch of noise: first the uncached program runs on it, then every other one. What a
program's latents differ by from the uncached ones is its drift; its time is taken over the uncached
one's of the same round. The first run of a program in a process is its warm-up: its latents count, its
time does not.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from l2c_export.core.bundle import WEIGHTS, Manifest
from l2c_export.core.files import key_of, write_json
from l2c_export.core.plan import Plan
from l2c_export.errors import L2CError
from l2c_export.evidence.machine import cpu_name
from l2c_export.runtime import Runner, Session
from l2c_export.runtime.backends import LoadedGraph

Floats = NDArray[np.float32]
Progress = Callable[[str, int, int], None]

_PAUSE = 0.05  # seconds before each run, for the threads of the one before to stop spinning
_KEPT_BYTES = 2 << 30  # of cache buffers; the sessions beyond are made anew for each run


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    Attributes:
        samples: Latents that the drift is averaged over, rounded up to whole batches.
        repeats: Timed trajectories of each program; 0 times none.
        batch: Latents in one call.
        seed: Of noise and labels.
        threads: Of the backend.
    """

    samples: int
    repeats: int
    batch: int
    seed: int
    threads: int

    @property
    def rounds(self) -> int:
        """Batches of noise."""
        return math.ceil(self.samples / self.batch)

    @property
    def all_rounds(self) -> int:
        """With those that are for the time alone, in one process without an interruption."""
        return max(self.rounds, self.repeats + 1 if self.repeats else 0)


@dataclass
class Record:
    """What is known of a program.

    Attributes:
        l2: Round to the relative L2 distance from the uncached latent, one a latent.
        largest: Round to max|a - b| / max|b|, b the uncached latent, one a latent.
        times: (seconds, seconds of the uncached trajectory of the same round), one pair a repeat.
    """

    l2: dict[str, list[float]] = field(default_factory=dict)
    largest: dict[str, list[float]] = field(default_factory=dict)
    times: list[list[float]] = field(default_factory=list)

    def lacks(self, number: int, effort: Effort) -> bool:
        """Whether a round has something to add."""
        if number < effort.rounds:
            return str(number) not in self.l2
        return len(self.times) < effort.repeats


class Arena:
    """Where programs are measured; records lie in a folder, so that a later process goes on.

    Args:
        runner: Of a bundle that holds the graphs of all programs.
        folder: For the records.
        effort: How much to measure.
    """

    def __init__(self, runner: Runner, folder: Path, effort: Effort) -> None:
        self._runner = runner
        self._folder = folder
        self._effort = effort
        self._conditions = conditions_key(runner, effort)
        self._sessions: dict[str, Session] = {}
        self._kept_bytes = 0
        self._warm: set[str] = set()

    def measure(
        self, programs: Mapping[str, Plan], progress: Progress = lambda *_: None
    ) -> dict[str, Record]:
        """Measure what is lacking.

        Args:
            programs: Content key to plan.
            progress: Told each trajectory of a round.

        Returns:
            Content key to everything that is known, of earlier processes too.

        Raises:
            L2CError: A trajectory ends in NaN or infinity.
        """
        records = {key: self._read(key) for key in programs}
        number = 0
        while number < self._effort.rounds or any(
            r.lacks(number, self._effort) for r in records.values()
        ):
            todo = [key for key, record in records.items() if record.lacks(number, self._effort)]
            self._round(
                number, {key: programs[key] for key in _turned(todo, number)}, records, progress
            )
            number += 1
        return records

    def _round(
        self,
        number: int,
        programs: Mapping[str, Plan],
        records: Mapping[str, Record],
        progress: Progress,
    ) -> None:
        if not programs:
            return
        what = f"round {number + 1} of {max(self._effort.all_rounds, number + 1)}"
        uncached_is_warm = "" in self._warm
        progress(what, 0, 1 + len(programs))
        uncached_seconds, uncached = self._trajectory("", None, number)
        for done, (key, plan) in enumerate(programs.items(), 1):
            progress(what, done, 1 + len(programs))
            timed = uncached_is_warm and key in self._warm
            seconds, latents = self._trajectory(key, plan, number)
            record = records[key]
            if number < self._effort.rounds:
                record.l2[str(number)], record.largest[str(number)] = drifts(latents, uncached)
            if timed and len(record.times) < self._effort.repeats:
                record.times.append([seconds, uncached_seconds])
            write_json(self._path(key), asdict(record))
        progress(what, 1 + len(programs), 1 + len(programs))

    def _trajectory(self, key: str, plan: Plan | None, number: int) -> tuple[float, Floats]:
        """Seconds and (B, C, H, W) latents of a program; None is the uncached one."""
        effort, session = self._effort, self._session(key, plan)
        classes = self._runner.manifest.classes
        labels = np.random.default_rng([effort.seed, number]).integers(classes, size=effort.batch)
        seed = int(np.random.SeedSequence([effort.seed, number]).generate_state(1)[0])
        time.sleep(_PAUSE)
        start = time.perf_counter()
        session.start(labels, seed=seed)
        for _ in session:
            pass
        seconds = time.perf_counter() - start
        self._warm.add(key)
        if not np.isfinite(session.x).all():
            which = "a cached trajectory" if plan else "the uncached trajectory"
            raise L2CError(f"{which} ends in NaN or infinity; look at the weights and --guidance-scale")
        return seconds, session.x.copy()

    def _session(self, key: str, plan: Plan | None) -> Session:
        if key in self._sessions:
            return self._sessions[key]
        program = _Program(self._runner, plan)
        for name in program.manifest.step_graphs():
            program.graph(name)  # loads it, before the clock runs
        session = Session(program, self._effort.batch)
        bytes_more = plan.costs.buffer_bytes * self._effort.batch if plan else 0
        if self._kept_bytes + bytes_more <= _KEPT_BYTES:
            self._kept_bytes += bytes_more
            self._sessions[key] = session
        return session

    # -- records --------------------------------------------------------------------------------

    def _path(self, key: str) -> Path:
        return self._folder / f"{key_of(self._conditions, key)[:16]}.json"

    def _read(self, key: str) -> Record:
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Record(**json.loads(self._path(key).read_text(encoding="utf-8")))
        return Record()


def conditions_key(runner: Runner, effort: Effort) -> str:
    """Content key of everything beside the program that a measurement depends on."""
    manifest = runner.manifest
    files = [manifest.files[name].sha256 for name in (WEIGHTS, "full.onnx")]
    guidance = manifest.guidance and manifest.guidance.scale
    machine = [cpu_name(), effort.threads, runner.backend.version]
    return key_of(files, guidance, effort.batch, effort.seed, machine)


class _Program:
    """A program over the graphs of a runner, as a session asks for it."""

    def __init__(self, runner: Runner, plan: Plan | None) -> None:
        self.manifest: Manifest = runner.manifest
        if plan is not None:
            from l2c_export.build.build import program

            self.manifest = replace(runner.manifest, calls=program(plan), buffers=plan.buffers)
        self._runner = runner

    def graph(self, name: str) -> LoadedGraph:
        """One of the runner's."""
        return self._runner.graph(name)


def drifts(latents: Floats, uncached: Floats) -> tuple[list[float], list[float]]:
    """Relative L2 and largest distance of each of (B, …) latents from the uncached ones."""
    a = latents.reshape(len(latents), -1).astype(np.float64)
    b = uncached.reshape(len(uncached), -1).astype(np.float64)
    l2 = np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)
    return l2.tolist(), (np.abs(a - b).max(axis=1) / np.abs(b).max(axis=1)).tolist()


def _turned(keys: list[str], by: int) -> list[str]:
    """The same in a circle, beginning elsewhere: none always runs right after the uncached one."""
    at = by % len(keys) if keys else 0
    return keys[at:] + keys[:at]
