"""A bundle against the eager reference with the same schedule: what to compare, and the verdict.

The schedule is what the runner follows: the manifest's reads, whatever router they came of, or what
``Runner.with_schedule`` was given. Timesteps and updates are computed anew from the sampler's name; the
weights are the bundle's or a checkpoint's.

An error is max|a - b| / max|b|, b the reference; NaN and Inf fail. Where a bundle quantises
activations, the root mean square of a - b takes the place of its largest value, and the bundle's own
graphs run once more without rounding, on the CPU and by the bundle's own schedule, whatever the runner
has: :mod:`l2c_export.evidence.unrounded`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from l2c_export.core.bundle import Bundle, Manifest
from l2c_export.core.precision import precision_of
from l2c_export.errors import L2CError, UnsupportedError, VerificationError
from l2c_export.evidence.compare import CallErrors, Comparison, Tolerance, rank
from l2c_export.runtime.backends import load_backend

if TYPE_CHECKING:
    from l2c_export.evidence.reference import Reference
    from l2c_export.runtime import Runner

TOLERANCES = {
    "float32": Tolerance(1e-4, 1e-4, 1e-4),
    "float16": Tolerance(1.2e-2, 2.5e-2, 3e-2),
    "int8": Tolerance(0.05, 0.2, 0.06, rms=True),
    "int8-weights": Tolerance(1.2e-2, 4e-2, 5e-2),
    "float8-weights": Tolerance(1.2e-2, 4e-2, 5e-2),
    "int8-static": Tolerance(0.06, 0.2, 0.15, rms=True),
}
"""The largest errors allowed, by the precision of the bundle, unless the user says otherwise.

Each is 1.5 to 5 times the worst error of five small models with several seeds, cached and uncached,
float32's more; ``python examples/tolerances.py`` prints both, and fails where that is no longer so.

int8 is loose where a network predicts little: in the demo's last call the noise is small beside what it
is the difference of. What tells a wrong int8 graph from a rounded one is its run without rounding, held
against float32's tolerance, int8-static's against float16's. Nothing stands here for bfloat16, which
this backend cannot run.

Beside the bundle's own weights int8-weights and float8-weights are float16, for the reference widens
the same numbers. Only a checkpoint shows what rounding the weights did: :data:`ROUNDED`.
"""

ROUNDED = {
    "int8-weights": Tolerance(0.04, 0.06, 0.06, rms=True),
    "float8-weights": Tolerance(0.15, 0.3, 0.25, rms=True),
}
"""The same beside a checkpoint, where it differs."""

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
        inputs: What was compared: labels, seed, guidance scale, schedule, source of the weights.
        cached: One entry a call of the program.
        uncached: The same for the graph that computes everything.
        delta: For each call, how far caching moves the bundle's latent. It is not an error.
        unrounded: Where activations are quantised: the same without that, of the bundle's step graphs
            and schedule, beside the bundle's weights.
    """

    tolerance: Tolerance
    inputs: dict[str, Any]
    cached: list[CallErrors] = field(default_factory=list)
    uncached: list[CallErrors] = field(default_factory=list)
    delta: list[float] = field(default_factory=list)
    unrounded: Report | None = None

    @property
    def failure(self) -> str | None:
        """The first thing that is wrong, in words; None where all is well."""
        if self.unrounded and (found := self.unrounded.failure):
            return f"{found}, without rounding activations"
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


def verify(
    runner: Runner,
    settings: Settings,
    progress: Progress = lambda *_: None,
    *,
    threads: int | None = None,
) -> Report:
    """Compare a loaded bundle with the reference.

    Args:
        runner: The bundle.
        settings: What to compare.
        progress: Told how far things are.
        threads: For the graphs that are run once more without rounding; None is one for each core.

    Raises:
        UnsupportedError: PyTorch is not installed, or no tolerance is known for the dtype.
        L2CError: The settings do not fit the bundle.
    """
    report = _compare(runner, settings, _tolerance(runner.manifest, settings), progress)
    precision = precision_of(runner.manifest.precision)
    if precision.dynamic or precision.calibrated:
        from l2c_export.evidence.unrounded import unrounded

        def tell(what: str, done: int, total: int) -> None:
            progress(f"{what}, unrounded", done, total)

        settings = replace(settings, checkpoint=None)
        exact = unrounded(runner.bundle, threads)
        report.unrounded = _compare(exact, settings, TOLERANCES[precision.slots], tell)
    return report


def _compare(runner: Runner, settings: Settings, tolerance: Tolerance, progress: Progress) -> Report:
    manifest = runner.manifest
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
        "schedule": manifest.schedule,
        "reference_weights": str(settings.checkpoint or "the bundle's"),
    }
    report = Report(tolerance, inputs)
    draws = draw_call_noise(manifest, len(labels), settings.seed)
    branches = functools.partial(full_branches, runner, labels, scale)
    pair = Comparison(
        reference, session, manifest, labels, noise, scale, count, tolerance, branches, draws
    )
    latents = []
    for errors, latent in pair.cached():
        report.cached.append(errors)
        latents.append(latent)
        progress("cached", len(latents), count)
    if settings.uncached:
        for errors, latent in pair.uncached():
            report.uncached.append(errors)
            report.delta.append(tolerance.error(latents[errors.index], latent))
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
    stated = TOLERANCES.get(manifest.precision)
    if settings.checkpoint:
        stated = ROUNDED.get(manifest.precision, stated)
    if (given := settings.tolerance) is not None:
        return Tolerance(given, given, given, rms=stated is not None and stated.rms)
    if stated is None:
        raise UnsupportedError(
            f"there is no default tolerance for {manifest.precision}; choose one with --tolerance"
        )
    return stated
