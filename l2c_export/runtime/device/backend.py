"""Device backends: engines of a bundle, its weights in device memory, and sessions on them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from l2c_export.core.bundle import CONDITIONING, WEIGHTS, Bundle
from l2c_export.core.engines import UPDATE, EngineSet, find_engines, misfit, unpack_plans
from l2c_export.core.engines import Engine as Record
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
        self.version = f"{name} on {device.name}"
        self.device = device
        self.manifest = bundle.manifest
        self.folder, self.engines = found
        self.graphs = graphs
        self.compiled = compiled
        self._load = load
        self._lock = threading.RLock()
        self._loaded: dict[str, Engine] = {}
        with device.current():
            self._load_all({CONDITIONING, UPDATE, *self.manifest.step_graphs()})
            wanted = [value for record in self.engines.engines for value in record.weights]
            self.weights = DeviceWeights(device, bundle.path / WEIGHTS, wanted)

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

    def load(self, graph: str) -> Engine:
        """The engine of a graph."""
        with self.device.current():
            return self.engine(graph)

    def session(self, graphs: Any, batch: int) -> DeviceSession:
        """A session on this device; it takes its engines from here."""
        return DeviceSession(self, batch)

    def __del__(self) -> None:
        if hasattr(self, "weights"):
            with self.device.current():
                self.weights.close()


def check_graphs(graphs: str) -> str:
    """Refuse what no session captures."""
    if graphs not in GRAPHS:
        raise L2CError(f"graphs is {graphs!r}; it must be one of: {', '.join(GRAPHS)}")
    return graphs


def choose_engines(
    bundle: Bundle, backend: str, version: str, capability: tuple[int, int] | None
) -> tuple[Path, EngineSet]:
    """The folder of engines that fits this machine and this very bundle.

    Raises:
        UnsupportedError: There is none; says of each why not, and how to build them.
    """
    reasons = []
    for folder, engines in find_engines(bundle):
        reason = misfit(engines, backend, version, capability)
        if reason is None:
            engines.check_bundle(bundle)
            return folder, engines
        if engines.backend == backend:
            reasons.append(f"{folder.name} was {reason}")
    target = f" --target sm{capability[0]}{capability[1]}" if capability else ""
    raise UnsupportedError(
        f"{bundle.path} has no engines for {backend} {version} on this device"
        + (f" ({'; '.join(reasons)})" if reasons else "")
        + f"; build them: l2c-export engines {bundle.path} --backend {backend}{target}"
    )


def lookalike(bundle: Bundle, threads: int | None, *, graphs: str = "trajectory") -> DeviceBackend:
    """The device runner over host memory: slow, strict, and needs no GPU."""
    from l2c_export.runtime.device import ort_engine
    from l2c_export.runtime.device.host import HostDevice

    device = HostDevice()
    found = choose_engines(bundle, "ort", ort_engine.NETWORKS, None)

    def load(record: Record, plan: bytes) -> Engine:
        return ort_engine.HostEngine(record, plan, bundle.path, device, threads)

    name = f"look-alike of a device runner over onnxruntime {ort_engine.VERSION}"
    return DeviceBackend(bundle, device, found, load, name=name, graphs=check_graphs(graphs))


def ort_cuda(
    bundle: Bundle, threads: int | None, *, graphs: str = "call", device: int = 0
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
    found = choose_engines(bundle, "ort", ort_engine.NETWORKS, None)

    def load(record: Record, plan: bytes) -> Engine:
        return ort_engine.CudaEngine(record, plan, bundle.path, device, graphs == "call")

    name = f"onnxruntime-gpu {ort_engine.VERSION}"
    kept = "engine" if graphs == "call" else "none"
    return DeviceBackend(bundle, gpu, found, load, name=name, graphs=kept)


def rtx(
    bundle: Bundle, threads: int | None, *, graphs: str = "trajectory", device: int = 0
) -> DeviceBackend:
    """TensorRT-RTX."""
    return _tensorrt("rtx", bundle, graphs, device)


def trt(
    bundle: Bundle, threads: int | None, *, graphs: str = "trajectory", device: int = 0
) -> DeviceBackend:
    """TensorRT."""
    return _tensorrt("trt", bundle, graphs, device)


def _tensorrt(backend: str, bundle: Bundle, graphs: str, device: int) -> DeviceBackend:
    from l2c_export.runtime.device.cuda import CudaDevice
    from l2c_export.runtime.device.tensorrt import TensorRT

    check_graphs(graphs)
    library = TensorRT(backend)
    gpu = CudaDevice(device)
    found = choose_engines(bundle, backend, library.version, gpu.capability)
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
