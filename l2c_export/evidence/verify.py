"""A bundle against the eager reference with the same schedule: what to compare, and the verdict.

The schedule is the bundle's own, the manifest's reads: a bundle of another router passes. Timesteps and
updates are computed anew from the sampler's name; the weights are the bundle's or a checkpoint's.

An error is max|a - b| / max|b|, b the reference; NaN and Inf fail.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from l2c_export.core.bundle import MANIFEST, Bundle, Manifest
from l2c_export.core.files import sha256
from l2c_export.errors import L2CError, UnsupportedError, VerificationError
from l2c_export.evidence.compare import CallErrors, Comparison, Tolerance, rank, relative_error
from l2c_export.evidence.machine import machine_json, package_version
from l2c_export.runtime.backends import load_backend

if TYPE_CHECKING:
    from l2c_export.evidence.reference import Reference
    from l2c_export.runtime import Runner

TOLERANCES = {
    "float32": Tolerance(1e-4, 1e-4, 1e-4),
    "float16": Tolerance(5e-3, 2.5e-2, 5e-2),
    "int8": Tolerance(0.12, 0.6, 0.8),
    "int8-weights": Tolerance(5e-3, 2.5e-2, 5e-2),
    "float8-weights": Tolerance(5e-3, 2.5e-2, 5e-2),
    "int8-static": Tolerance(0.2, 0.9, 2.4),
}
"""The largest errors allowed, by the precision of the bundle, unless the user says otherwise.

Each is about twice the worst of a 2-block DiT of random weights (6 calls) and of the trained demo (20
calls, guidance 3), cached and uncached, three seeds, with the bundle's and the checkpoint's weights:

==============  =======  =======  =======
precision       slots    output   latent
==============  =======  =======  =======
float16         1.7e-3   8.7e-3   2.0e-2
int8            5.7e-2   4.6e-1   6.1e-1
int8-weights    1.7e-3   7.7e-3   1.3e-2
float8-weights  1.8e-3   1.0e-2   7.1e-3
int8-static     9.0e-2   4.4e-1   1.2e+0
==============  =======  =======  =======

The errors are those of the worst value. In the demo's last calls the predicted noise is small beside
what it is the difference of, and guidance and caching move single pixels by as much as int8 does: its
final latent is off by 2 % in the root mean square. For int8 and int8-static (calibrated on 8 samples)
it is therefore the slots that tell a wrong graph from a rounded one. Nothing stands here for bfloat16,
which this backend cannot run.

Beside the bundle's own weights int8-weights and float8-weights are float16, for the reference widens
the same numbers. Only a checkpoint shows what rounding the weights did: :data:`ROUNDED`.
"""

ROUNDED = {
    "int8-weights": Tolerance(5e-2, 0.25, 0.55),
    "float8-weights": Tolerance(0.2, 0.55, 0.95),
}
"""The same beside a checkpoint; the worst were 2.6e-2, 1.1e-1, 2.6e-1 and 9.3e-2, 2.6e-1, 4.6e-1."""

Progress = Callable[[str, int, int], None]
"""Called with what is compared, how many calls are done and how many there are."""


@dataclass(frozen=True)
class Settings:
    """What to compare.

    Attributes:
        labels: (B,) classes; None draws B = ``batch`` of them from ``seed``.
        batch: Latents; None is 2, or what the bundle has that is nearest to it.
        seed: Of the noise and, without labels, of the labels.
        guidance_scale: None is the bundle's own.
        tolerance: One for everything; None takes those of the bundle's precision.
        calls: Compare only the first so many calls.
        checkpoint: The reference takes its weights from here instead of from the bundle.
        uncached: Also compare the uncached trajectory, and cached with uncached.
    """

    labels: tuple[int, ...] | None = None
    batch: int | None = None
    seed: int = 0
    guidance_scale: float | None = None
    tolerance: float | None = None
    calls: int | None = None
    checkpoint: Path | None = None
    uncached: bool = True


@dataclass
class Report:
    """The outcome of a verification.

    Attributes:
        tolerance: The largest errors allowed.
        inputs: What was compared: labels, seed, guidance scale, source of the weights.
        cached: One entry a call of the program.
        uncached: The same for the graph that computes everything.
        delta: For each call, how far caching moves the bundle's latent. It is not an error.
    """

    tolerance: Tolerance
    inputs: dict[str, Any]
    cached: list[CallErrors] = field(default_factory=list)
    uncached: list[CallErrors] = field(default_factory=list)
    delta: list[float] = field(default_factory=list)

    @property
    def failure(self) -> str | None:
        """The first thing that is wrong, in words; None where all is well."""
        for kind, calls in (("", self.cached), ("uncached ", self.uncached)):
            for call in calls:
                if fault := call.fault(self.tolerance):
                    return f"{kind}call {call.index} (t = {call.timestep:g}, {call.graph}): {fault}"
        return None

    @property
    def worst(self) -> float:
        """The largest error of all."""
        return max((e for call in (*self.cached, *self.uncached) for e in call.errors), key=rank)

    def check(self) -> None:
        """Raise where something is wrong.

        Raises:
            VerificationError: Names the first bad call and slot, the value and the tolerance.
        """
        if failure := self.failure:
            raise VerificationError(f"verification FAILED in {failure}")


def verify(runner: Runner, settings: Settings, progress: Progress = lambda *_: None) -> Report:
    """Compare a loaded bundle with the reference.

    Raises:
        UnsupportedError: PyTorch is not installed, or no tolerance is known for the dtype.
        L2CError: The settings do not fit the bundle.
    """
    manifest = runner.manifest
    tolerance = _tolerance(manifest, settings)
    reference = _load_reference(runner.bundle, settings.checkpoint)
    labels, noise = draw_inputs(manifest, settings.labels, settings.batch, settings.seed)
    session = runner.session(len(labels))
    session.start(labels, noise, settings.guidance_scale)  # refuses what does not fit the bundle
    scale = settings.guidance_scale
    if scale is None:
        scale = manifest.guidance.scale if manifest.guidance else 1.0
    count = min(settings.calls or len(manifest.calls), len(manifest.calls))
    inputs = {
        "labels": labels.tolist(),
        "seed": settings.seed,
        "guidance_scale": scale if manifest.guidance else None,
        "calls": count,
        "reference_weights": str(settings.checkpoint or "the bundle's"),
    }
    report = Report(tolerance, inputs)
    draws = draw_call_noise(manifest, len(labels), settings.seed)
    branches = functools.partial(full_branches, runner, labels, scale)
    pair = Comparison(reference, session, manifest, labels, noise, scale, count, branches, draws)
    latents = []
    for errors, latent in pair.cached(tolerance):
        report.cached.append(errors)
        latents.append(latent)
        progress("cached", len(latents), count)
    if settings.uncached:
        for errors, latent in pair.uncached():
            report.uncached.append(errors)
            report.delta.append(relative_error(latents[errors.index], latent))
            progress("uncached", len(report.delta), count)
    return report


def full_branches(
    runner: Runner, labels: NDArray[np.int64], scale: float, x: NDArray[np.float32], timestep: float
) -> dict[str, NDArray[Any]]:
    """Every slot's (rows, …) value in one call of the bundle's uncut graph, which reuses nothing.

    Engines are built of no uncut graph, so beside a device it runs on the CPU; none where that cannot.
    """
    manifest = runner.manifest
    try:
        engines = hasattr(runner.backend, "engines")
        backend = load_backend("ort", runner.bundle) if engines else runner.backend
        full = backend.load(manifest.full)
    except UnsupportedError:
        return {}
    graph, rows = manifest.graphs[manifest.full], len(labels) * manifest.rows
    if manifest.guidance:
        labels = np.concatenate([labels, np.full_like(labels, manifest.guidance.null_label)])
    inputs: dict[str, NDArray[Any]] = {
        "x": np.ascontiguousarray(x),
        "timestep": np.full(rows, timestep, np.float32),
        "label": labels,
        "guidance_scale": np.array([scale], np.float32),
    }
    shape = (rows, *manifest.slots.shape)
    slots = {name: np.empty(shape, manifest.slots.dtype) for name in manifest.slots.names}
    taken = {value.name: inputs[value.name] for value in graph.inputs}
    full.bind(taken, {"output": np.empty_like(x), **slots})()
    return slots


def draw_inputs(
    manifest: Manifest, labels: tuple[int, ...] | None, batch: int | None, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(B,) labels and (B, C, H, W) noise; without labels or batch, two latents if the bundle can."""
    low, high = manifest.batch
    random = np.random.default_rng(seed)
    if labels is None:
        size = min(max(2, low), high) if batch is None else batch
        chosen = random.integers(manifest.classes, size=size)
    elif batch in (None, len(labels)):
        chosen = np.array(labels, np.int64)
    else:
        raise L2CError(f"{len(labels)} labels do not make a batch of {batch}")
    return chosen, random.standard_normal((len(chosen), *manifest.latent), np.float32)


def draw_call_noise(manifest: Manifest, batch: int, seed: int) -> NDArray[np.float32] | None:
    """(calls, B, C, H, W) noise for a stochastic sampler, as ``run`` draws it; None for others."""
    if not manifest.stochastic:
        return None
    from l2c_export.runtime.noise import seeded_noise

    drawn = np.empty((len(manifest.calls), batch, *manifest.latent), np.float32)
    fill = seeded_noise(seed, range(batch))
    for index, call in enumerate(drawn):
        fill(index, call)
    return drawn


def _load_reference(bundle: Bundle, checkpoint: Path | None) -> Reference:
    try:
        from l2c_export.evidence.reference import bundle_reference, checkpoint_reference
    except ImportError as error:
        raise UnsupportedError(
            f"the reference needs {error.name}; install it with: pip install 'l2c-export[build]'"
        ) from None
    return checkpoint_reference(bundle, checkpoint) if checkpoint else bundle_reference(bundle)


def _tolerance(manifest: Manifest, settings: Settings) -> Tolerance:
    if (given := settings.tolerance) is not None:
        return Tolerance(given, given, given)
    if manifest.precision not in TOLERANCES:
        raise UnsupportedError(
            f"there is no default tolerance for {manifest.precision}; choose one with --tolerance"
        )
    stated = TOLERANCES[manifest.precision]
    return ROUNDED.get(manifest.precision, stated) if settings.checkpoint else stated


def report_json(report: Report, runner: Runner) -> dict[str, Any]:
    """The report for ``reports/verify.json``; errors that are not finite are strings."""

    def number(value: float) -> float | str:
        return value if math.isfinite(value) else str(value)

    def entry(call: CallErrors) -> dict[str, Any]:
        return {
            "call": call.index,
            "timestep": call.timestep,
            "graph": call.graph,
            "output": number(call.output),
            "slots": {name: number(error) for name, error in call.slots.items()},
            "latent": number(call.latent),
        }

    return {
        "passed": report.failure is None,
        "failure": report.failure,
        "tolerance": asdict(report.tolerance),
        "worst": number(report.worst),
        "inputs": report.inputs,
        "manifest_sha256": sha256(runner.bundle.path / MANIFEST),
        "calls": [entry(call) for call in report.cached],
        "uncached": [entry(call) for call in report.uncached],
        "cached_from_uncached": [number(delta) for delta in report.delta],
        "machine": machine_json(runner.backend.version) | {"torch": package_version("torch")},
    }


def report_table(report: Report) -> str:
    """The report for a terminal of 100 columns: one line a call, and the verdict."""
    lines = [
        f"{'':25}{' teacher forcing, by call ':-^31}   {' free running, latent ':-^34}",
        f"call     t  {'graph':13} {'output':>8} {'slots':>5} {'worst slot':>16}   "
        f"{'cached':>9} {'uncached':>9} {'caching moves':>14}",
    ]
    for i, call in enumerate(report.cached):
        name, error = call.worst_slot
        slot = f"{name} {error:.1e}" if name else "-"
        line = f"{call.index:4} {call.timestep:5.4g}  {call.graph:13} {call.output:8.1e} "
        line += f"{len(call.slots):5} {slot:>16}   {call.latent:9.1e}"
        if i < len(report.uncached):
            line += f" {report.uncached[i].latent:9.1e} {report.delta[i]:14.1e}"
        lines.append(line + ("  <- bad" if _bad(report, i) else ""))
    if report.failure:
        lines.append(f"FAILED  {report.failure}")
    else:
        allowed = report.tolerance
        limits = (
            f"slots {allowed.slots:.1e}, outputs {allowed.output:.1e}, latents {allowed.latent:.1e}"
        )
        lines.append(f"PASSED  worst error {report.worst:.1e}; allowed: {limits}")
    return "\n".join(lines)


def _bad(report: Report, i: int) -> bool:
    calls = [report.cached[i], *report.uncached[i : i + 1]]
    return any(call.fault(report.tolerance) for call in calls)
