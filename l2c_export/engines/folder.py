"""One folder of engines: for one backend, version and set of targets.

An engine is kept by the content of what it is made from, never by its name: its network with the
constants inside, the builder's options, the backend's version and the targets. Every file appears whole
or not at all. A journal lists what is built until the record does, so a build that was killed goes on
where it was, and an earlier build's engines serve until the new ones are all there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import lzma
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import onnx

from l2c_export.core.bundle import WEIGHTS, Bundle, File
from l2c_export.core.engine_archive import check_archive, pack_plans, unpack_plans
from l2c_export.core.engines import (
    ENGINES,
    PORTABLE,
    RECORD,
    Engine,
    EngineSet,
    engine_from_json,
    folder_name,
    read_record,
    source_of,
    write_record,
)
from l2c_export.core.files import key_of, remove_partial, replacing, sha256, write_json
from l2c_export.core.sublayers import Stage
from l2c_export.engines.compile import compile_network, way_out
from l2c_export.engines.inspection import Fusion, Inspection, check_interface, fusion, read_log
from l2c_export.engines.network import Network
from l2c_export.engines.polygraphy import INSTALL, reduce_command
from l2c_export.engines.price import largest_sizes
from l2c_export.engines.request import EngineRequest
from l2c_export.engines.tensorrt_api import BuildOptions
from l2c_export.errors import L2CError, UnsupportedError

_log = logging.getLogger(__name__)

JOURNAL = ".l2c-journal.json"

Progress = Callable[[str, int, int], None]
"""Called several times a second with what is built, how many engines are done, and how many to do."""

CheckMemory = Callable[[int, int], None]
"""Called with the bytes of scratch and of plans that the engines built so far need; may raise."""


class EngineFolder:
    """Makes plans, keeps the journal, and ends with the record."""

    def __init__(
        self,
        bundle: Bundle,
        networks: Mapping[str, Network],
        request: EngineRequest,
        version: str,
        targets: tuple[str, ...],
        check_memory: CheckMemory = lambda *_: None,
        stages: tuple[Stage, ...] = (),
    ) -> None:
        self.bundle, self.networks, self.request, self.stages = bundle, networks, request, stages
        self.version, self.targets, self.check_memory = version, targets, check_memory
        self.constant = request.constant
        name = folder_name(request.backend, version, targets, request.options)
        self.path = bundle.path / ENGINES / name
        self.archive = "plans.bin" if self.constant else "plans.xz"  # weights do not compress
        self.held: dict[str, Engine] = {}
        low, best = bundle.manifest.batch[0], largest_sizes(bundle.manifest)
        smallest = {"batch": low, "rows": low * bundle.manifest.rows, "n": 1}
        self.ranges = {name: (smallest[name], size, size) for name, size in best.items()}

    def run(self, progress: Progress = lambda *_: None) -> EngineSet:
        """Build what is missing or stale; see :meth:`l2c_export.engines.build.EngineBuild.run`."""
        self.path.mkdir(parents=True, exist_ok=True)
        remove_partial(self.path)
        total = len(self.networks)
        old = self._old()
        if old is None or not self._serves(old):
            self._recover(old)
            for i, (graph, network) in enumerate(self.networks.items()):
                if graph not in self.held:
                    tick = functools.partial(progress, graph, i, total)
                    self.held[graph] = self._make(graph, network, tick)
                    self._journal()
                self._check_memory()
            archive = self.archive, self._pack()
        else:
            _log.info("kept all engines of %s", self.path.name)
            self.held = {engine.graph: engine for engine in old.engines}
            self._check_memory()
            archive = old.archive
        made = EngineSet(
            self.request.backend,
            self.version,
            self.targets,
            self.request.options,
            self.ranges,
            archive,
            tuple(self._described(graph) for graph in self.networks),
            self.stages,
        )
        if made != old:
            write_record(self.path, made)
        self._tidy(made, kept=old is not None and made.archive == old.archive)
        progress("engines", total, total)
        return made

    # -- what is there --------------------------------------------------------------------------

    def _old(self) -> EngineSet | None:
        with contextlib.suppress(L2CError):
            return read_record(self.path)
        return None

    def _serves(self, old: EngineSet) -> bool:
        """Whether an earlier build's archive is what this one would make."""
        wanted = [(graph, self._key(network)) for graph, network in self.networks.items()]
        if [(engine.graph, engine.key) for engine in old.engines] != wanted:
            return False
        with contextlib.suppress(L2CError):
            check_archive(self.path, old)
            return old.archive[0] == self.archive
        return False

    def _recover(self, old: EngineSet | None) -> None:
        """Take what an earlier build, finished or not, made of these very networks."""
        found: dict[str, Engine] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            entries = json.loads((self.path / JOURNAL).read_text(encoding="utf-8"))
            found = {engine.graph: engine for engine in map(engine_from_json, entries.values())}
        if old is not None:
            with contextlib.suppress(L2CError):
                for engine, plan in unpack_plans(self.path, old):
                    if self._wants(engine):
                        with replacing(self._plan(engine.graph)) as temporary:
                            temporary.write_bytes(plan)
                        found[engine.graph] = engine
        for graph, engine in found.items():
            path = self._plan(graph)
            if self._wants(engine) and path.is_file() and sha256(path) == engine.sha256:
                self.held[graph] = engine
                _log.info("kept the engine of %s", graph)
        self._journal()

    def _wants(self, engine: Engine) -> bool:
        network = self.networks.get(engine.graph)
        return network is not None and engine.key == self._key(network)

    def _journal(self) -> None:
        write_json(self.path / JOURNAL, {graph: asdict(e) for graph, e in self.held.items()})

    def _tidy(self, made: EngineSet, kept: bool) -> None:
        """Remove the journal, loose plans, and what earlier builds left; a runner's cache stays."""
        names = {RECORD, made.archive[0], *(self.log(graph).name for graph in self.networks)}
        for path in self.path.iterdir():
            if path.name not in names and not (kept and path.suffix == ".cache"):
                path.unlink()

    # -- what is made ---------------------------------------------------------------------------

    def _check_memory(self) -> None:
        self.check_memory(
            max(engine.scratch or 0 for engine in self.held.values()),
            sum(engine.bytes for engine in self.held.values()),
        )

    def _pack(self) -> File:
        """Replace the archive; the old one, with its record, serves until the new one is written."""
        with replacing(self.path / self.archive) as temporary:
            entry = pack_plans(temporary, (self._plan(graph).read_bytes() for graph in self.networks))
            (self.path / RECORD).unlink(missing_ok=True)
        return entry

    def _key(self, network: Network) -> str:
        digests = [hashlib.sha256(network.model).hexdigest()]
        if self.constant and network.constants:
            digests.append(self.bundle.manifest.files[WEIGHTS].sha256)
        options = self.request.options, self._options(network).ranges
        return key_of(digests, self.request.backend, self.version, self.targets, *options)

    def _options(self, network: Network) -> BuildOptions:
        ranges = {
            value.name: tuple(
                value.sized({name: sizes[i] for name, sizes in self.ranges.items()}) for i in range(3)
            )
            for value in network.inputs
            if not all(isinstance(size, int) for size in value.shape)
        }
        ahead = self.request.backend == "rtx" and self.targets != (PORTABLE,)
        cache = self.path.parent / f"timing-{self.path.name}.cache"
        return BuildOptions(
            self.targets if ahead else (),
            ranges,  # type: ignore[arg-type]
            self.request.optimization_level,
            self.request.workspace,
            self.request.tf32,
            None if self.request.backend == "rtx" else str(cache),
        )

    def _plan(self, graph: str) -> Path:
        return self.path / f"{graph}.plan"

    def log(self, graph: str) -> Path:
        """The builder's log of one engine, xz-compressed."""
        return self.path / f"{graph}.log.xz"

    def _make(self, graph: str, network: Network, tick: Callable[[], None]) -> Engine:
        made = Engine(graph, self._key(network), "", 0, "", network.inputs, network.weights, ())
        with replacing(self._plan(graph)) as plan:
            if self.request.backend == "ort":
                plan.write_bytes(network.model)
            else:
                seconds = self._compile(graph, network, plan, tick)
                _log.info("built %s in %.2f s", graph, seconds)
                made = self._inspected(made, network)
            return replace(made, bytes=plan.stat().st_size, sha256=sha256(plan))

    def _compile(self, graph: str, network: Network, plan: Path, tick: Callable[[], None]) -> float:
        log, beside = self.log(graph), self.bundle.path / WEIGHTS
        try:
            return compile_network(
                self.request.backend, network.model, beside, self._options(network), plan, log, tick
            )
        except L2CError as error:
            kept = self.path / f"{graph}.onnx"
            kept.write_bytes(network.model)
            said = f"engine of {graph}: {error} (network: {kept}, log: {log})"
            if not isinstance(error, UnsupportedError) and way_out(str(error)) is None:
                beside_it = self.bundle.path if self.constant else None
                command = reduce_command(
                    self.request.backend, kept, self._options(network).targets, beside_it
                )
                said += f"; to find the nodes that fail: {INSTALL}; {command}"
            raise type(error)(said) from None

    def _inspected(self, made: Engine, network: Network) -> Engine:
        inspection = inspect_log(self.log(made.graph))
        if inspection is None:
            return made
        check_interface(inspection, (*network.inputs, *network.weights), network.outputs)
        judged = judge(inspection, network)
        return replace(made, scratch=inspection.scratch, fusion=asdict(judged))

    def _described(self, graph: str) -> Engine:
        """An engine with the names of this bundle, whose weights may have changed around it."""
        network = self.networks[graph]
        return replace(
            self.held[graph],
            source=source_of(self.bundle.manifest, graph, bool(network.constants)),
            outputs=network.outputs,
            constants=tuple(value.name for value in network.constants),
        )


def inspect_log(path: Path) -> Inspection | None:
    """Read a builder's log; None where it does not list kernels, as TensorRT's own may not."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        text = file.read()
    with contextlib.suppress(L2CError):
        return read_log(text)
    return None


def judge(inspection: Inspection, network: Network) -> Fusion:
    """How well an engine was fused, beside the network that it was built from."""
    nodes = onnx.load_from_string(network.model).graph.node
    biases = {value.name for value in network.weights if len(value.shape) == 2 and value.shape[0] == 1}
    return fusion(inspection, {node.name: node.op_type for node in nodes}, biases)
