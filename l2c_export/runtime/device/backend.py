"""Device backends: engines of a bundle, its weights in device memory, and sessions on them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from l2c_export.core.bundle import WEIGHTS, Bundle
from l2c_export.core.engine_archive import unpack_plans
from l2c_export.core.engines import (
    CONSTANTS,
    PER,
    PORTABLE,
    EngineSet,
    build_command,
    command_name,
    find_engines,
    misfit,
    unread_engines,
)
from l2c_export.core.engines import Engine as Record
from l2c_export.core.sublayers import scheduled
from l2c_export.errors import L2CError, UnsupportedError
from l2c_export.runtime.device.protocols import Device, Engine
from l2c_export.runtime.device.session import DeviceSession
from l2c_export.runtime.device.weights import DeviceWeights

GRAPHS = ("trajectory", "call", "none")
"""What one launch runs: a whole trajectory, one call, or as many kernels as there are."""

Loader = Callable[[Record, bytes], Engine]
"""Makes a plan runnable."""


class DeviceBackend:
    """One copy of the weights on a device, and the engines that share it.

    Attributes:
        version: Backend, engines and device, as reports print them.
        folder: Of the engines.
        graphs: What sessions capture.
    """

    streams = True

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        found: tuple[Path, EngineSet],
        load: Loader,
        *,
        name: str,
        graphs: str = "trajectory",
        compiled: Callable[[], None] = lambda: None,
    ) -> None:
        self.device = device
        self.folder, self.engines = found
        self.version = f"{name}, engines {self.folder.name}, on {device.name}"
        self._bundle = bundle
        self.manifest = scheduled(bundle.manifest) if self.engines.stages else bundle.manifest
        self.graphs = graphs
        self.compiled = compiled
        self._load = load
        self._lock = threading.RLock()
        self._loaded: dict[str, Engine] = {}
        with device.current():
            self._load_all(self.engines.program(self.manifest))
            self.weights = DeviceWeights(device, bundle.path / WEIGHTS, self.engines.parameters())

    def engine(self, graph: str) -> Engine:
        """A loaded engine; loaded when it is first asked for.

        Raises:
            L2CError: There is none for this graph, or it does not load here.
        """
        with self._lock:
            if graph not in self._loaded:
                self.engines.engine(graph)  # says that there is none
                self._load_all({graph})
            return self._loaded[graph]

    def _load_all(self, graphs: Container[str]) -> None:
        """Load engines while plans are read: together, with weights inside, they may be enormous."""
        for record, plan in unpack_plans(self.folder, self.engines):
            if record.graph in graphs:
                self._loaded[record.graph] = self._load(record, plan)

    def with_schedule(self, reuse: Any) -> DeviceBackend:
        """The same engines and weights for another schedule.

        Raises:
            UnsupportedError: Every engine is for one step graph, and so for the bundle's schedule.
            L2CError: The schedule does not fit, see :func:`l2c_export.core.sublayers.scheduled`.
        """
        if not self.engines.stages:
            raise UnsupportedError(
                f"engines {self.folder.name} are for the schedule of the bundle alone; build some that "
                f"serve any: {build_command(self._bundle, self.engines.backend)} --per sublayer"
            )
        other = copy.copy(self)
        other.manifest = scheduled(self.manifest, reuse)
        return other

    def load(self, graph: str) -> Engine | None:
        """The engine of a graph; None where its parts are loaded already."""
        if self.engines.stages and graph == self.manifest.uncached:
            return None
        with self.device.current():
            return self.engine(graph)

    def session(self, graphs: Any, batch: int) -> DeviceSession:
        """A session on this device; it takes its engines from here."""
        return DeviceSession(self, batch)


def check_graphs(graphs: str) -> str:
    """Refuse what no session captures."""
    if graphs not in GRAPHS:
        raise L2CError(f"graphs is {graphs!r}; it must be one of: {', '.join(GRAPHS)}")
    return graphs


def choose_engines(
    bundle: Bundle,
    backend: str,
    version: str,
    capability: tuple[int, int] | None,
    name: str | None = None,
    per: str | None = None,
) -> tuple[Path, EngineSet]:
    """The folder of engines that fits this machine and this very bundle.

    Where several do, engines of step graphs go before those of sub-layers, those for named targets
    before portable ones, and those that take their weights as inputs before those that hold them.

    Args:
        bundle: The bundle.
        backend: What is to run them.
        version: Its version.
        capability: The device's compute capability; None where it is not known.
        name: Of the folder that is to be taken; None for whichever fits.
        per: What is to have an engine, one of :data:`l2c_export.core.engines.PER`; None for either.

    Raises:
        L2CError: There is no folder of that name.
        UnsupportedError: There is none that fits; says of each why not, and how to build them.
    """
    if per not in (None, *PER):
        raise L2CError(f"per is {per!r}; it must be one of: {', '.join(PER)}")
    found, unread = find_engines(bundle), unread_engines(bundle)
    if name is not None:
        if name not in (there := [folder.name for folder, _ in (*found, *unread)]):
            has = ", ".join(there) or "none"
            raise L2CError(f"{bundle.path} has no engines {name!r}; it has: {has}")
        found = [each for each in found if each[0].name == name]
        unread = [each for each in unread if each[0].name == name]
    reasons = []
    for folder, engines in sorted(found, key=_preference):
        reason = misfit(engines, backend, version, capability) or engines.stale(bundle)
        if reason is None and per not in (None, PER[bool(engines.stages)]):
            reason = f"built for each {PER[bool(engines.stages)]}"
        if reason is None:
            return folder, engines
        if engines.backend == backend or name is not None:
            reasons.append(f"{folder.name} was {reason}")
    reasons += [str(error) for _, error in unread]
    kind = f" --per {per}" if per else ""
    target = f" --target sm{capability[0]}{capability[1]}" if capability else ""
    raise UnsupportedError(
        f"{bundle.path} has no engines for {command_name(backend)} {version} on this device"
        + (f" ({'; '.join(reasons)})" if reasons else "")
        + f"; build them: {build_command(bundle, backend)}{target}{kind}"
    )


def _preference(found: tuple[Path, EngineSet]) -> tuple[bool, bool, bool]:
    _, engines = found
    return (
        bool(engines.stages),
        engines.targets == (PORTABLE,),
        engines.options.get("weights") == CONSTANTS,
    )


def lookalike(
    bundle: Bundle,
    threads: int | None,
    *,
    graphs: str = "trajectory",
    engines: str | None = None,
    per: str | None = None,
) -> DeviceBackend:
    """The device runner over host memory: slow, strict, and needs no GPU."""
    from l2c_export.runtime.device import ort_engine
    from l2c_export.runtime.device.host import HostDevice

    device = HostDevice()
    found = choose_engines(bundle, "ort", ort_engine.NETWORKS, None, engines, per)

    def load(record: Record, plan: bytes) -> Engine:
        return ort_engine.HostEngine(record, plan, bundle.path, device, threads)

    name = f"look-alike of a device runner over onnxruntime {ort_engine.VERSION}"
    return DeviceBackend(bundle, device, found, load, name=name, graphs=check_graphs(graphs))


def ort_cuda(
    bundle: Bundle,
    threads: int | None,
    *,
    graphs: str = "call",
    device: int = 0,
    engines: str | None = None,
    per: str | None = None,
) -> DeviceBackend:
    """ONNX Runtime on a GPU, which keeps a CUDA graph of every call by itself."""
    from l2c_export.runtime.device import ort_engine
    from l2c_export.runtime.device.cuda import CudaDevice

    ort_engine.check_cuda()
    if check_graphs(graphs) == "trajectory":
        raise UnsupportedError(
            "onnxruntime cannot be captured in a graph of a trajectory; use graphs='call'"
        )
    gpu = CudaDevice(device)
    found = choose_engines(bundle, "ort", ort_engine.NETWORKS, None, engines, per)

    def load(record: Record, plan: bytes) -> Engine:
        return ort_engine.CudaEngine(record, plan, bundle.path, device, graphs == "call")

    name = f"onnxruntime-gpu {ort_engine.VERSION}"
    kept = "engine" if graphs == "call" else "none"
    return DeviceBackend(bundle, gpu, found, load, name=name, graphs=kept)


def rtx(
    bundle: Bundle,
    threads: int | None,
    *,
    graphs: str = "trajectory",
    device: int = 0,
    engines: str | None = None,
    per: str | None = None,
) -> DeviceBackend:
    """TensorRT-RTX."""
    return _tensorrt("rtx", bundle, graphs, device, engines, per)


def trt(
    bundle: Bundle,
    threads: int | None,
    *,
    graphs: str = "trajectory",
    device: int = 0,
    engines: str | None = None,
    per: str | None = None,
) -> DeviceBackend:
    """TensorRT."""
    return _tensorrt("trt", bundle, graphs, device, engines, per)


def _tensorrt(
    backend: str, bundle: Bundle, graphs: str, device: int, engines: str | None, per: str | None
) -> DeviceBackend:
    from l2c_export.runtime.device.cuda import CudaDevice
    from l2c_export.runtime.device.tensorrt import TensorRT

    check_graphs(graphs)
    library = TensorRT(backend)
    gpu = CudaDevice(device)
    found = choose_engines(bundle, backend, library.version, gpu.capability, engines, per)
    capability = "sm{}{}".format(*(gpu.capability or (0, 0)))
    cache = found[0] / f"kernels-{capability}.cache"
    library.read_cache(cache)
    return DeviceBackend(
        bundle,
        gpu,
        found,
        library.engine,
        name=library.name,
        graphs=graphs,
        compiled=lambda: library.write_cache(cache),
    )
