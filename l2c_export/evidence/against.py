"""Two bundles of one model beside each other: how much faster one is, and how far its latents move.

Full calls and whole trajectories alternate between the two in one process, from the same noise, and
ratios are taken within a repeat, as in :mod:`l2c_export.evidence.bench`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2c_export.core.bundle import WEIGHTS, Manifest
from l2c_export.errors import L2CError
from l2c_export.evidence.bench import PAUSE, spread
from l2c_export.evidence.compare import relative_error
from l2c_export.evidence.machine import machine_json, usable_cores
from l2c_export.runtime import Runner

Progress = Callable[[str, int, int], None]
_SAME = ("model", "latent", "classes")


def bench_against(
    path: Path,
    other: Path,
    *,
    batch: int = 1,
    repeats: int = 5,
    threads: int | None = None,
    backend: str = "ort",
    engines: str | None = None,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Measure a bundle against another one of the same model.

    Args:
        path: The bundle.
        other: What it is measured against, such as the same model in float32.
        batch: Latents in one call.
        repeats: Runs of each kind that are counted, after a warm-up.
        threads: None is one for each core.
        backend: Name of the backend.
        engines: Name of a folder of engines in both bundles; None for the best that fits.
        progress: Told how far things are.

    Returns:
        The report, ready for JSON: seconds, ratios of the other's time over the bundle's, and errors
        max|a - b| / max|b| of the bundle's outputs and latents, b the other's.

    Raises:
        L2CError: One is broken or does not take this batch, or they are of different models.
    """
    threads = threads or usable_cores()
    sides = [
        _Side(Runner.load(folder, backend, threads, engines=engines), batch) for folder in (path, other)
    ]
    ours, theirs = (side.manifest for side in sides)
    for name in _SAME:
        if getattr(ours, name) != getattr(theirs, name):
            raise L2CError(f"{path} and {other} are of different models: their {name} differs")
    for i in range(-1, repeats):  # the first is the warm-up
        progress("repeat", max(i, 0), repeats)
        for side in sides:
            side.run(counted=i >= 0)
    return {
        "bundle": _facts(sides[0]),
        "against": _facts(sides[1]),
        "batch": batch,
        "repeats": repeats,
        "threads": threads,
        "ratio": {
            "full_call": _ratio(sides[1].calls, sides[0].calls),
            "trajectory": _ratio(sides[1].trajectories, sides[0].trajectories),
            "weight_bytes": _weights(ours) / _weights(theirs),
        },
        "error": {
            "output": relative_error(sides[0].output, sides[1].output),
            "latent": relative_error(sides[0].latent, sides[1].latent),
        },
        "machine": machine_json(sides[0].runner.backend.version, threads),
    }


@dataclass
class _Side:
    """One of the two: its times, and what it computed.

    Attributes:
        calls: Seconds of the first call of the uncached program, its conditioning apart.
        trajectories: Seconds of the program, conditioning included.
        output: (B, C, H, W) of that first call.
        latent: (B, C, H, W) the program's result.
    """

    runner: Runner
    batch: int
    calls: list[float] = field(default_factory=list)
    trajectories: list[float] = field(default_factory=list)
    output: NDArray[np.float32] = field(init=False)
    latent: NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        self.session = self.runner.session(self.batch)

    @property
    def manifest(self) -> Manifest:
        return self.runner.manifest

    def run(self, *, counted: bool) -> None:
        labels = [i % self.manifest.classes for i in range(self.batch)]
        self.session.start(labels, cached=False, seed=0)
        x = self.session.x.copy()
        self.session.run_call(0, x)  # with the conditioning
        time.sleep(PAUSE)
        began = time.perf_counter()
        self.output, _ = self.session.run_call(0, x)
        call = time.perf_counter() - began
        time.sleep(PAUSE)
        began = time.perf_counter()
        self.session.start(labels, seed=0)
        for _ in self.session:
            pass
        trajectory = time.perf_counter() - began
        self.latent = self.session.x.copy()
        if counted:
            self.calls.append(call)
            self.trajectories.append(trajectory)


def _facts(side: _Side) -> dict[str, Any]:
    manifest = side.manifest
    return {
        "name": side.runner.bundle.path.resolve().name,
        "precision": manifest.precision,
        "weight_bytes": _weights(manifest),
        "calls": len(manifest.calls),
        "random_weights": manifest.random_weights,
        "full_call_seconds": spread(side.calls),
        "trajectory_seconds": spread(side.trajectories),
    }


def _weights(manifest: Manifest) -> int:
    return manifest.files[WEIGHTS].bytes


def _ratio(above: list[float], below: list[float]) -> dict[str, float]:
    return spread(np.divide(above, below).tolist())


def against_table(data: dict[str, Any]) -> str:
    """The report of :func:`bench_against` for a terminal."""
    ratio, error, machine = data["ratio"], data["error"], data["machine"]
    lines = [
        f"batch {data['batch']}; median (p10 … p90) of {data['repeats']} interleaved repeats",
        f"{machine['cpu']}, {data['threads']} threads, {machine['backend']}, {machine['system']}",
        "",
        f"{'':28}  {'precision':9}  {'weights MB':>10}  {'full call s':>24}  {'trajectory s':>24}",
    ]
    lines += [
        f"{side['name']:28}  {side['precision']:9}  {side['weight_bytes'] / 1e6:10.1f}  "
        f"{_spread(side['full_call_seconds']):>24}  {_spread(side['trajectory_seconds']):>24}"
        for side in (data["bundle"], data["against"])
    ]
    lines += [
        f"times faster: full call {_spread(ratio['full_call'])}, "
        f"trajectory {_spread(ratio['trajectory'])}; weights {ratio['weight_bytes']:.3f} x",
        f"error of the largest value: first output {error['output']:.2e}, "
        f"final latent {error['latent']:.2e}",
    ]
    return "\n".join(lines)


def _spread(values: dict[str, float]) -> str:
    return f"{values['median']:.3f} ({values['p10']:.3f} … {values['p90']:.3f})"
