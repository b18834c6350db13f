"""What this machine can build and run, what is missing, and the line that installs it."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from l2c_export.core.bundle import Bundle
from l2c_export.core.cpu import cpu_target
from l2c_export.core.engine_archive import check_archive
from l2c_export.core.engines import EngineSet, find_engines, misfit, unread_engines
from l2c_export.core.packed import PACKED, PackedWeights, find_packed, packed_misfit
from l2c_export.core.plan_report import size
from l2c_export.engines.gpus import Gpu, find_gpus
from l2c_export.engines.report import scratch_text
from l2c_export.engines.tensorrt_api import builder_targets, builder_version
from l2c_export.errors import L2CError, UnsupportedError


@dataclass(frozen=True)
class Finding:
    """One thing that a machine can or cannot do.

    Attributes:
        what: The thing, in a few words.
        able: Whether it can.
        detail: With what, or why not and what would help.
    """

    what: str
    able: bool
    detail: str


@dataclass(frozen=True)
class Diagnosis:
    """All findings on a machine, and on a bundle if there is one.

    Attributes:
        machine: The machine in a line.
        gpus: Its GPUs.
        findings: In the order of a deployment: building bundles, engines, running.
        engines: Of the bundle's engines: whether they run here.
        packed: Of its packed weights: whether they are used here.
    """

    machine: str
    gpus: tuple[Gpu, ...]
    findings: tuple[Finding, ...]
    engines: tuple[Finding, ...] = field(default=())
    packed: tuple[Finding, ...] = field(default=())

    @property
    def healthy(self) -> bool:
        """Whether this machine can run bundles, and the bundle's engines if it has any."""
        runs = any(finding.able for finding in self.findings if finding.what.startswith("run"))
        return runs and (not self.engines or any(finding.able for finding in self.engines))


def diagnose(bundle: Bundle | None = None) -> Diagnosis:
    """Look at this machine; nothing heavy is imported.

    Args:
        bundle: Whose engines are to be judged too.
    """
    try:
        gpus, no_gpu = find_gpus(), ""
    except UnsupportedError as error:
        gpus, no_gpu = (), str(error)
    networks = _on_gpu(_onnxruntime("CUDAExecutionProvider", "run with ort-cuda", "ort-cuda"), no_gpu)
    engines: list[Finding] = []
    if bundle:
        engines = [_judged(bundle, *found, gpus, networks) for found in find_engines(bundle)]
        engines += [Finding(f"engines {p.name}", False, str(e)) for p, e in unread_engines(bundle)]
    return Diagnosis(
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        gpus,
        (
            _packages("build bundles", ("torch", "onnx", "onnxscript", "onnx_ir"), "build"),
            _builder("rtx", gpus, no_gpu),
            _builder("trt", gpus, no_gpu),
            _packages("look inside engines", ("polygraphy", "onnx_graphsurgeon"), "debug"),
            _onnxruntime("CPUExecutionProvider", "run on the CPU", "ort"),
            networks,
            _on_gpu(_library("rtx"), no_gpu),
            _on_gpu(_library("trt"), no_gpu),
        ),
        tuple(engines),
        tuple(_judged_packed(bundle, packed) for packed in find_packed(bundle)) if bundle else (),
    )


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """A diagnosis for a terminal."""
    lines = [diagnosis.machine]
    for i, gpu in enumerate(diagnosis.gpus):
        lines.append(
            f"GPU {i}: {gpu.name}, {gpu.target}, {size(gpu.free)} of {size(gpu.total)} free, "
            f"driver for CUDA {gpu.driver}"
        )
    if not diagnosis.gpus:
        lines.append("no GPU")
    everything = (*diagnosis.findings, *diagnosis.engines, *diagnosis.packed)
    width = max(len(finding.what) for finding in everything)
    lines += [f"{'yes' if f.able else 'no':3}  {f.what:{width}}  {f.detail}" for f in everything]
    return "\n".join(lines)


def _packages(what: str, names: tuple[str, ...], extra: str) -> Finding:
    versions = {name: _version(name) for name in names}
    if need := _lacks(names, extra):
        return Finding(what, False, need)
    return Finding(what, True, ", ".join(f"{name} {version}" for name, version in versions.items()))


def _lacks(names: tuple[str, ...], extra: str) -> str | None:
    missing = ", ".join(name for name in names if _version(name) is None)
    return f"lacks {missing}; install with: pip install 'l2c-export[{extra}]'" if missing else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return None


def _builder(backend: str, gpus: tuple[Gpu, ...], no_gpu: str) -> Finding:
    what = f"build engines for {backend}"
    try:
        version = builder_version(backend)
    except UnsupportedError as error:
        return Finding(what, False, str(error))
    if need := _lacks(("filelock", "onnx", "onnx_ir"), "engines"):
        return Finding(what, False, need)
    if targets := builder_targets(backend):
        return Finding(what, True, f"{version}, on any machine, for {', '.join(targets)}")
    if not gpus:
        return Finding(what, False, f"{version} builds on the GPU that runs the engines: {no_gpu}")
    return Finding(what, True, f"{version}, for {gpus[0].target}")


def _onnxruntime(provider: str, what: str, extra: str) -> Finding:
    try:
        ort: Any = importlib.import_module("onnxruntime")
    except ImportError as error:
        need = f"{error}; install with: pip install 'l2c-export[{extra}]'"
        return Finding(what, False, need)
    providers = ort.get_available_providers()
    if provider not in providers:
        return Finding(
            what,
            False,
            f"onnxruntime {ort.__version__} has no {provider}; install it with: "
            "pip uninstall onnxruntime; pip install onnxruntime-gpu",
        )
    return Finding(what, True, f"onnxruntime {ort.__version__}")


def _library(backend: str) -> Finding:
    what = f"run with {backend}"
    try:
        return Finding(what, True, builder_version(backend))
    except UnsupportedError as error:
        return Finding(what, False, str(error))


def _on_gpu(finding: Finding, no_gpu: str) -> Finding:
    """A finding that also needs a GPU."""
    return Finding(finding.what, False, no_gpu) if finding.able and no_gpu else finding


def _judged(
    bundle: Bundle, folder: Path, made: EngineSet, gpus: tuple[Gpu, ...], networks: Finding
) -> Finding:
    """Whether a set of engines runs here; ``networks`` says whether those of ort-cuda would."""
    what = f"engines {folder.name}"
    try:
        made.check_bundle(bundle)
        check_archive(folder, made)
        version = made.version if made.backend == "ort" else builder_version(made.backend)
    except L2CError as error:
        return Finding(what, False, str(error))
    if made.backend == "ort" and not networks.able:
        return replace(networks, what=what)
    if not gpus:
        return Finding(what, False, "there is no GPU here")
    reasons = [misfit(made, made.backend, version, gpu.capability) for gpu in gpus]
    if made.backend == "ort" or None in reasons:
        return Finding(what, True, f"{size(made.plan_bytes)} of plans, {scratch_text(made)}")
    return Finding(what, False, str(reasons[0]))


def _judged_packed(bundle: Bundle, packed: PackedWeights) -> Finding:
    """Whether packed weights are used here; without any the bundle runs as it is."""
    misfit = packed_misfit(packed, bundle, _version("onnxruntime") or "none", cpu_target())
    if misfit is None:
        try:
            packed.check_file(bundle, PACKED)
        except L2CError as error:
            misfit = str(error)
    detail = misfit or f"{size(packed.packed_bytes)} for {len(packed.graphs)} graphs"
    return Finding("packed weights", misfit is None, f"{packed.folder}: {detail}")
