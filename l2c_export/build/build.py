"""From a plan and a checkpoint to a bundle, in steps that a kill cannot spoil.

Every file is keyed by the content of what it is made from. While a bundle is being built a journal
stands in place of the manifest; a build that finds one keeps the files whose key and digest still
hold and makes the others. The manifest comes last, so a folder with a manifest is a whole bundle.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import filelock
import onnx
import onnx_ir as ir
import onnxscript
import torch
from torch import Tensor

from l2c_export import __version__
from l2c_export.build.calibration import input_ranges
from l2c_export.build.export import OPSET, export_full
from l2c_export.build.graphs import Split, cut, interface, split
from l2c_export.build.weights import WeightsLayout, write_weights
from l2c_export.core.bundle import (
    CONDITIONING,
    MANIFEST,
    WEIGHTS,
    Bundle,
    File,
    Graph,
    Guidance,
    Manifest,
    ProgramCall,
    Slots,
    leaves_folder,
    read_bundle,
    write_manifest,
)
from l2c_export.core.calibration import Calibration
from l2c_export.core.files import key_of, remove_partial, replacing, sha256, write_json
from l2c_export.core.models import family_defaults
from l2c_export.core.plan import Plan, StepGraph
from l2c_export.core.plan_report import plan_json
from l2c_export.core.sampler_call import is_stochastic
from l2c_export.errors import L2CError, UnsupportedError

_log = logging.getLogger(__name__)

JOURNAL = ".l2c-journal.json"
_LOCK = ".l2c-lock"
_UNCACHED = StepGraph((), ())

Progress = Callable[[str, int, int], None]
"""Called with what is being made, how much of it is done and how much there is."""


class WeightSource(Protocol):
    """Where weights come from: a checkpoint on disk, or a random one."""

    @property
    def source(self) -> dict[str, Any]:
        """What it is, for the manifest; with the digests that key the weights file."""

    def iter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and contiguous float32 tensor, in the order of the configuration's parameters."""


@dataclass(frozen=True)
class Request:
    """What to build.

    Attributes:
        plan: The compiled schedule.
        weights: Where the weights come from.
        batch: Smallest and largest number of latents in a call; equal ones fix the shapes.
        guidance_scale: The bundle's default scale, in uncond + scale * (cond - uncond); None takes
            that of the model's family.
        preset: Name of the model, if it has one.
        more_graphs: Step graphs that no call of the plan uses, for other programs on this bundle.
        calibration: Of the model, for a precision that wants one.
    """

    plan: Plan
    weights: WeightSource
    batch: tuple[int, int] = (1, 1)
    guidance_scale: float | None = None
    preset: str | None = None
    more_graphs: tuple[StepGraph, ...] = ()
    calibration: Calibration | None = None


def build_bundle(output: Path, request: Request, progress: Progress = lambda *_: None) -> Bundle:
    """Build a bundle, or bring the one in ``output`` up to date.

    Args:
        output: The bundle's folder: new, empty, a bundle, or what a killed build left.
        request: What to build.
        progress: Told what is being made.

    Raises:
        L2CError: The request makes no sense, the folder holds something else, or another build is
            at work in it.
    """
    smallest, largest = request.batch
    if not 1 <= smallest <= largest <= 4096:
        raise L2CError(f"batch {smallest}-{largest}: give 1 <= smallest <= largest <= 4096")
    if request.guidance_scale is not None and not math.isfinite(request.guidance_scale):
        raise L2CError(f"guidance scale {request.guidance_scale}: give a finite number")
    precision = request.plan.precision
    if (request.calibration is None) == precision.calibrated:
        needs = "needs a" if precision.calibrated else "takes no"
        raise L2CError(f"precision {precision.name} {needs} calibration")
    with _own(output):
        return _Build(output, request, progress).run()


@contextlib.contextmanager
def _own(output: Path) -> Iterator[None]:
    """Hold the folder against other builds, after a look at whether it is ours to write to."""
    if output.exists() and not output.is_dir():
        raise L2CError(f"output {output} is a file; give a folder")
    if output.is_dir():
        present = {path.name for path in output.iterdir()}
        theirs = {name for name in present if not name.startswith(".l2c-")}
        if theirs and not present & {MANIFEST, JOURNAL}:
            raise L2CError(f"output {output} is not empty and is not a bundle; give another folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(output / _LOCK, timeout=0)
        with lock:
            try:
                yield
            finally:
                (output / _LOCK).unlink(missing_ok=True)
    except filelock.Timeout:
        raise L2CError(f"another build is at work in {output}; wait for it") from None
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        other = Path(error.filename or output)
        ours = other == output or output in other.parents or other in output.parents
        what = f"cannot write to {output}" if ours else f"cannot use {other}"
        raise L2CError(f"{what}: {error.strerror or error}") from None


class _Build:
    """One build in one folder: makes files, keeps the journal, and ends with the manifest."""

    def __init__(self, output: Path, request: Request, progress: Progress) -> None:
        self.output = output
        self.request = request
        self.plan = request.plan
        self.progress = progress
        self.layout = WeightsLayout(self.plan.config, self.plan.precision)
        self.files: dict[str, File] = {}
        self.kept: dict[str, File] = {}

    def run(self) -> Bundle:
        """Make what is missing or stale, then the manifest, then remove what it does not name."""
        self.kept = self._found()
        if not (self.output / MANIFEST).exists():
            self._journal()  # from here on the folder is known to be ours
        self._make(WEIGHTS, self._weights_key, self._write_weights)
        self._make("full.onnx", self._full_key, lambda path: self._save(self._full, path))
        graphs = {"full": self._interface("full.onnx")}
        steps = (*self.plan.graphs, _UNCACHED, *self.request.more_graphs)
        wanted = {CONDITIONING: None, **{graph.name: graph for graph in steps}}
        for i, (name, step) in enumerate(wanted.items()):
            self.progress("graphs", i, len(wanted))
            self._make(f"{name}.onnx", key_of(self._full_key, name), self._cutter(step))
            graphs[name] = self._interface(f"{name}.onnx")
        self.progress("graphs", len(wanted), len(wanted))
        report = plan_json(self.plan)
        self._make("reports/plan.json", key_of(report), lambda path: write_json(path, report))
        self._make("reports/schedule.png", key_of(report, "picture"), self._draw)
        manifest = self._manifest(graphs)
        if not self._is(manifest):
            for verdict in ("verify", "bench", "against"):  # on another bundle
                (self.output / "reports" / f"{verdict}.json").unlink(missing_ok=True)
            write_manifest(self.output, manifest)
        self._sweep()
        return read_bundle(self.output)

    # -- what is made ---------------------------------------------------------------------------

    @cached_property
    def _weights_key(self) -> str:
        precision = self.plan.precision.name
        return key_of("weights", self.plan.config.to_json(), precision, self._source)

    @cached_property
    def _source(self) -> dict[str, Any]:
        """What the weights file is made from."""
        calibration = self.request.calibration
        made_by = {"calibration": calibration.source} if calibration else {}
        return self.request.weights.source | made_by

    @cached_property
    def _full_key(self) -> str:
        makers = (torch, onnx, onnxscript, ir)
        versions = (__version__, OPSET, *(maker.__version__ for maker in makers))
        plan = self.plan
        request = (plan.config.to_json(), plan.precision.name, plan.guidance, self.request.batch)
        return key_of("full", versions, request)

    @cached_property
    def _full(self) -> ir.Model:
        self.progress("export", 0, 1)
        model = export_full(
            self.plan.config, self.layout, guidance=self.plan.guidance, batch=self.request.batch
        )
        self.progress("export", 1, 1)
        return model

    @cached_property
    def _split(self) -> Split:
        return split(ir.load(self.output / "full.onnx"))

    def _write_weights(self, path: Path) -> None:
        def report(done: int, total: int) -> None:
            self.progress("weights", done, total)

        calibration = self.request.calibration
        ranges = input_ranges(calibration) if calibration else {}
        write_weights(path, self.layout, self.request.weights.iter_tensors(), report, ranges)

    def _cutter(self, step: StepGraph | None) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            self._save(cut(self._split.step, step) if step else self._split.conditioning, path)

        return make

    def _save(self, model: ir.Model, path: Path) -> None:
        with replacing(path) as temporary:
            ir.save(model, temporary)
            onnx.checker.check_model(str(temporary))

    def _draw(self, path: Path) -> None:
        from l2c_export.build.plan_picture import draw_plan

        draw_plan(self.plan, path)

    def _interface(self, file: str) -> Graph:
        return interface(file, ir.load(self.output / file))

    # -- keys, journal, manifest ----------------------------------------------------------------

    def _found(self) -> dict[str, File]:
        """What an earlier build recorded here, finished or not.

        Raises:
            UnsupportedError: A later release made the bundle that is here.
        """
        remove_partial(self.output)
        found: dict[str, File] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
            entries = json.loads((self.output / JOURNAL).read_text(encoding="utf-8"))
            found |= {n: File(**entry) for n, entry in entries.items() if not leaves_folder(n)}
        try:
            found |= read_bundle(self.output).manifest.files
        except UnsupportedError:
            raise
        except L2CError:
            pass  # none, or a damaged one: this build makes it
        return found

    def _holds(self, name: str, key: str) -> bool:
        entry, path = self.kept.get(name), self.output / name
        if entry is None or entry.key != key or not path.is_file():
            return False
        return path.stat().st_size == entry.bytes and sha256(path) == entry.sha256

    def _make(self, name: str, key: str, make: Callable[[Path], None]) -> None:
        path = self.output / name
        if self._holds(name, key):
            self.files[name] = self.kept[name]
            _log.info("kept %s", name)
            return
        start = time.monotonic()
        if (self.output / MANIFEST).exists():
            self._journal()
            (self.output / MANIFEST).unlink()
        make(path)
        self.files[name] = File(path.stat().st_size, sha256(path), key)
        self._journal()
        _log.info("made %s: %d bytes, %.2f s", name, self.files[name].bytes, time.monotonic() - start)

    def _journal(self) -> None:
        entries = {name: asdict(entry) for name, entry in (self.kept | self.files).items()}
        write_json(self.output / JOURNAL, entries)

    def _is(self, manifest: Manifest) -> bool:
        try:
            return read_bundle(self.output).manifest == manifest
        except L2CError:
            return False

    def _sweep(self) -> None:
        """Remove the journal and what earlier builds made that this bundle does not have."""
        for name in set(self.kept) - set(self.files):
            (self.output / name).unlink(missing_ok=True)
        (self.output / JOURNAL).unlink(missing_ok=True)

    def _manifest(self, graphs: dict[str, Graph]) -> Manifest:
        plan, config = self.plan, self.plan.config
        scale = self.request.guidance_scale
        if scale is None:
            scale = family_defaults(config).guidance_scale
        guidance = Guidance(scale, config.guidance_channels, config.null_label)
        return Manifest(
            generator=f"l2c-export {__version__}",
            preset=self.request.preset,
            model=config.to_json(),
            weights=self._source,
            schedule=plan.asked.source
            | {"removed": plan.schedule.removed, "asked": plan.asked.removed},
            sampler=plan.sampler,
            stochastic=is_stochastic([c.call for c in plan.calls]),
            latent=config.latent_shape,
            classes=config.num_classes,
            batch=self.request.batch,
            guidance=guidance if plan.guidance else None,
            precision=plan.precision.name,
            slots=Slots(config.slots, config.slot_shape, plan.precision.slots),
            buffers=plan.buffers,
            full="full",
            uncached=_UNCACHED.name,
            graphs=graphs,
            calls=program(plan),
            files=self.files,
        )


def program(plan: Plan) -> tuple[ProgramCall, ...]:
    """The calls of a plan as a manifest has them."""
    return tuple(
        ProgramCall(c.graph.name, c.call.timestep, c.call.update, c.reads, c.writes) for c in plan.calls
    )
