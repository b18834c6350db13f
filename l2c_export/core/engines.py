"""Engines of a bundle: the record beside them, what a call runs of them, and which fit a device.

``bundle/engines/<backend>-<version>-<targets>/`` holds ``engines.json`` and one compressed archive of
all plans, which have almost all kernels in common. The record says everything that a runner must know
to bind them; it is keyed by the digests of the graphs, so it cannot serve another bundle.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2c_export.core.bundle import (
    CONDITIONING,
    WEIGHTS,
    Bundle,
    File,
    Manifest,
    ProgramCall,
    Value,
    digested,
    leaves_folder,
    parse_values,
)
from l2c_export.core.files import key_of, replacing
from l2c_export.core.sublayers import Stage, parameters, stages_from_json
from l2c_export.errors import L2CError, UnsupportedError

ENGINES = "engines"
"""The folder in a bundle that holds a folder for each backend, version and set of targets."""

RECORD = "engines.json"
FORMAT, VERSION = "l2c-engines", 2

UPDATE = "update"
"""Name of the engine that computes the sampler's update; others are named as what they compute."""

PORTABLE = "portable"
"""The target of TensorRT-RTX engines that are made for no compute capability in particular."""

PORTABLE_TARGETS = ("sm80", "sm86", "sm89", "sm120", "sm121")
"""What those name in their header (TensorRT-RTX 1.7): Ampere and later that the library serves."""

CONSTANTS = "constants"
"""The option ``weights`` of engines that hold all their weights."""

PER = ("graph", "sublayer")
"""The option ``per``: one engine for each step graph, or for each kind of sub-layer."""

_SOURCES = ("x", "output", "noise")


def update_terms(manifest: Manifest) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Targets and sources of the sampler's updates, over all calls, in the order of the update engine.

    Returns:
        Targets: ``x``, then the histories that any call writes. Sources: of ``x``, ``output``,
        ``noise`` and the histories those that any update reads.
    """
    updates = [_terms(call) for call in manifest.calls]
    written = {target for update in updates for target in update}
    read = {source for update in updates for terms in update.values() for source in terms}
    histories = sorted((written | read) - set(_SOURCES))  # a target keeps its value where unwritten
    return ("x", *histories), (*(s for s in _SOURCES if s in read | {"x"}), *histories)


def update_coefficients(manifest: Manifest) -> NDArray[np.float32]:
    """(calls, targets, sources) what the update engine is given at each call.

    A target that a call does not write keeps its value: the row has a 1 at the target itself.
    """
    targets, sources = update_terms(manifest)
    table = np.zeros((len(manifest.calls), len(targets), len(sources)), np.float32)
    for row, call in zip(table, manifest.calls, strict=True):
        update = _terms(call)
        for i, target in enumerate(targets):
            for source, value in update.get(target, {target: 1.0}).items():
                row[i, sources.index(source)] = value
    return table


def _terms(call: ProgramCall) -> Mapping[str, Mapping[str, float]]:
    return call.update


@dataclass(frozen=True)
class Engine:
    """One compiled graph, or part of one.

    Attributes:
        graph: Name of a graph in the manifest or of a part of the uncached one, such as
            ``compute-00.attn``, or :data:`UPDATE`.
        key: Content key: network, options, backend, version and targets.
        source: Digest of what the network was made from; see :func:`source_of`.
        bytes: Of the plan, which begins where the plan before it ends.
        sha256: Of the plan.
        inputs: What a call binds, in order, as in the manifest.
        weights: Parameters of ``weights.safetensors`` that are inputs too, as the engine takes them: a
            bias has a leading 1. An engine for many sub-layers names them ``weight.0`` …, and
            :attr:`EngineSet.stages` say which they are.
        outputs: In order.
        constants: Parameters that the engine holds.
        scratch: Bytes of device memory while it runs; engines that run one after the other share it.
            None where only the device can tell.
        fusion: How well it was fused, by the builder's own log: ``kernels`` and more; empty where the
            log does not say.
    """

    graph: str
    key: str
    source: str
    bytes: int
    sha256: str
    inputs: tuple[Value, ...]
    weights: tuple[Value, ...]
    outputs: tuple[Value, ...]
    constants: tuple[str, ...] = ()
    scratch: int | None = None
    fusion: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineSet:
    """All engines of a bundle for one backend, version and set of targets.

    Attributes:
        backend: ``"rtx"``, ``"trt"`` or ``"ort"``.
        version: Of the backend; engines run on the very version that they were built with.
        targets: ``"sm89"`` … in ascending order, or :data:`PORTABLE` alone.
        options: Builder options, as given.
        ranges: Dimension to its smallest, best and largest size: ``"batch"``, ``"rows"`` and, of the
            conditioning, ``"n"``.
        archive: Name of the file of all plans, compressed, and what it must be.
        engines: In the order of the archive.
        stages: How a call runs engines that are for each kind of sub-layer; empty where every step
            graph has its own.
    """

    backend: str
    version: str
    targets: tuple[str, ...]
    options: dict[str, Any]
    ranges: dict[str, tuple[int, int, int]]
    archive: tuple[str, File]
    engines: tuple[Engine, ...]
    stages: tuple[Stage, ...] = ()

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return folder_name(self.backend, self.version, self.targets, self.options)

    @property
    def plan_bytes(self) -> int:
        """Bytes of all plans, as they are loaded."""
        return sum(engine.bytes for engine in self.engines)

    @property
    def scratch(self) -> int:
        """Bytes of the scratch that all engines can share, as far as it is known."""
        return max((engine.scratch or 0 for engine in self.engines), default=0)

    def engine(self, graph: str) -> Engine:
        """The engine of a graph.

        Raises:
            L2CError: There is none.
        """
        for engine in self.engines:
            if engine.graph == graph:
                return engine
        raise L2CError(f"engines {self.folder} have none for {graph}; build them again")

    def program(self, manifest: Manifest) -> tuple[str, ...]:
        """The graphs whose engines a session needs to run the calls of a manifest."""
        if self.stages:
            return tuple(engine.graph for engine in self.engines)
        return (*manifest.step_graphs(), CONDITIONING, UPDATE)

    def runs(self, call: ProgramCall) -> tuple[str, ...]:
        """The graphs whose engines a call runs, in order."""
        if not self.stages:
            return call.graph, UPDATE
        pieces = (stage.piece(stage.slot in call.reads) for stage in self.stages)
        return (*(piece.engine for piece in pieces if piece is not None), UPDATE)

    def parameters(self) -> list[Value]:
        """What engines take of ``weights.safetensors``, in their shapes; some several times."""
        return parameters({engine.graph: engine.weights for engine in self.engines}, self.stages)

    def stale(self, bundle: Bundle) -> str | None:
        """Why these engines are not of this very bundle; None where they are."""
        manifest = bundle.manifest
        held = {engine.graph: engine for engine in self.engines}
        for graph in self.program(manifest):
            if graph not in held:
                return f"built for another schedule, without {graph}"
            if held[graph].source != source_of(manifest, graph, bool(held[graph].constants)):
                return f"built from another {graph} than the bundle's"
        return None

    def check_bundle(self, bundle: Bundle) -> None:
        """See that these engines were built from this very bundle.

        Raises:
            L2CError: They were not.
        """
        if reason := self.stale(bundle):
            raise L2CError(
                f"engines {self.folder} were {reason}; build them again: "
                f"{build_command(bundle, self.backend)}"
            )


def build_command(bundle: Bundle, backend: str) -> str:
    """What builds engines for a backend."""
    return f"l2c-export engines {bundle.path} --backend {command_name(backend)}"


def command_name(backend: str) -> str:
    """What commands call the backend of engines: networks of ``"ort"`` are for ``ort-cuda``."""
    return "ort-cuda" if backend == "ort" else backend


def folder_name(backend: str, version: str, targets: Iterable[str], options: Mapping[str, Any]) -> str:
    """Name of the folder for a backend, its version and targets, and the kind of engines."""
    kind = "-constants" * (options.get("weights") == CONSTANTS)
    kind += "-sublayer" * (options.get("per") == "sublayer")
    return f"{backend}-{version}-{'+'.join(targets)}{kind}"


def source_of(manifest: Manifest, graph: str, holds_weights: bool) -> str:
    """Digest of what an engine is made from: its graph, and the weights where it holds some.

    An engine that is no graph of the manifest is a part of the uncached step graph.
    """
    parts: list[Any]
    if graph == UPDATE:
        parts = [UPDATE, manifest.latent, manifest.batch, *update_terms(manifest)]
    else:
        whole = manifest.graphs.get(graph, manifest.graphs[manifest.uncached])
        parts = [manifest.files[whole.file].sha256]
        if holds_weights:
            parts.append(manifest.files[WEIGHTS].sha256)
    return key_of(parts)


def write_record(folder: Path, engines: EngineSet) -> None:
    """Write ``engines.json``; the last act of a build."""
    with replacing(folder / RECORD, durable=True) as temporary:
        temporary.write_text(_serialise(engines), encoding="utf-8")


def _serialise(engines: EngineSet) -> str:
    return digested({"format": FORMAT, "version": VERSION, "engines": asdict(engines)})


def read_record(folder: Path) -> EngineSet:
    """Read a folder's ``engines.json``.

    Raises:
        L2CError: There is none, or it was damaged or edited.
        UnsupportedError: Its version is not this release's.
    """
    path = folder / RECORD
    again = "build the engines again: l2c-export engines BUNDLE"
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise L2CError(f"{path} is not a record of engines (format {FORMAT!r}); {again}")
        if data.get("version") != VERSION:
            raise UnsupportedError(
                f"{path}: version {data.get('version')!r}, this release reads {VERSION}; {again}"
            )
        engines = _parse(data["engines"])
    except OSError as error:
        raise L2CError(f"cannot read {path}: {error.strerror}; {again}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise L2CError(f"{path} is damaged ({error!r}); {again}") from None
    if _serialise(engines) != text or leaves_folder(engines.archive[0]):
        raise L2CError(f"{path} does not match its own digest; {again}")
    return engines


def engine_from_json(entry: Mapping[str, Any]) -> Engine:
    """What ``dataclasses.asdict`` made of an engine, read back.

    Raises:
        KeyError, TypeError: It is something else.
    """
    interface = {key: parse_values(entry[key]) for key in ("inputs", "weights", "outputs")}
    return Engine(**{**entry, **interface, "constants": tuple(entry["constants"])})


def _parse(data: Mapping[str, Any]) -> EngineSet:
    name, entry = data["archive"]
    return EngineSet(
        **{
            **data,
            "targets": tuple(data["targets"]),
            "ranges": {key: tuple(sizes) for key, sizes in data["ranges"].items()},
            "archive": (name, File(**entry)),
            "engines": tuple(map(engine_from_json, data["engines"])),
            "stages": stages_from_json(data["stages"]),
        }
    )


def find_engines(bundle: Bundle) -> list[tuple[Path, EngineSet]]:
    """Folders of engines in a bundle and their records, by name; see also :func:`unread_engines`."""
    return [(path, made) for path, made in _records(bundle) if isinstance(made, EngineSet)]


def unread_engines(bundle: Bundle) -> list[tuple[Path, L2CError]]:
    """Folders whose records are damaged or of another release, and what to do about each."""
    return [(path, error) for path, error in _records(bundle) if isinstance(error, L2CError)]


def _records(bundle: Bundle) -> Iterator[tuple[Path, EngineSet | L2CError]]:
    for path in sorted((bundle.path / ENGINES).glob(f"*/{RECORD}")):
        yield path.parent, _record_or_error(path.parent)


def _record_or_error(folder: Path) -> EngineSet | L2CError:
    try:
        return read_record(folder)
    except L2CError as error:
        return error


def misfit(
    engines: EngineSet, backend: str, version: str, capability: tuple[int, int] | None
) -> str | None:
    """Why engines cannot run, before a driver says it in its own words; None where they should.

    Args:
        engines: The engines.
        backend: Backend that is to run them.
        version: Its version.
        capability: The device's compute capability, such as (8, 9); None where it is not known.
    """
    if engines.backend != backend:
        return f"built for the backend {command_name(engines.backend)}, not {command_name(backend)}"
    if engines.version != version:
        return f"built with {command_name(backend)} {engines.version}, this machine has {version}"
    if capability is None:
        return None
    target = f"sm{capability[0]}{capability[1]}"
    targets = PORTABLE_TARGETS if engines.targets == (PORTABLE,) else engines.targets
    if target not in targets:
        return f"built for {', '.join(targets)}, this device is {target}"
    return None
