"""``cuda.bindings.runtime`` and ``tensorrt_rtx`` over host memory: the code for GPUs runs without one.

Only what the package uses is here; ``test_device_surface.py`` holds it against the real modules.
"""

# ruff: noqa: N802, N815 - the names are CUDA's

from __future__ import annotations

import enum
import types
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from l2c_export.errors import UnsupportedError
from l2c_export.runtime.device.host import HostDevice, Work
from l2c_export.runtime.device.ort_engine import HostEngine


class Error(enum.Enum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorStreamCaptureIsolation = 905
    cudaErrorUnknown = 999


OK = Error.cudaSuccess


class FakeRuntime:
    """Functions return (error, *results), as the real ones do.

    ``fails`` maps a function's name to the error that it returns; ``calls`` has the names in order.
    """

    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2
    cudaMemcpyKind = types.SimpleNamespace(
        cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down", cudaMemcpyDeviceToDevice="copy"
    )
    cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread local")

    def __init__(self, limit: int = 1 << 40) -> None:
        self.host = HostDevice(limit)
        self.calls: list[str] = []
        self.modes: list[str] = []
        self.fails: dict[str, Error] = {}
        self.current = 3  # of the application around us
        self._events: dict[int, int] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._pinned: dict[int, np.ndarray] = {}
        self.broken = OK  # what is said at the end of a capture
        self.last = OK

    def __getattribute__(self, name: str):
        value = object.__getattribute__(self, name)
        if not name.startswith("cuda") or not callable(value) or name.startswith("cudaGetError"):
            return value
        self.calls.append(name)
        if name in self.fails:
            self.last = self.fails[name]
            return lambda *_: (self.fails[name], None)
        return value

    def cudaGetErrorString(self, error):
        return OK, f"words for {error.value}".encode()

    def cudaGetLastError(self):
        last, self.last = self.last, OK
        return (last,)

    def cudaGetDevice(self):
        return OK, self.current

    def cudaSetDevice(self, index):
        self.current = index
        return (OK,)

    def cudaGetDeviceProperties(self, index):
        return OK, types.SimpleNamespace(name=b"Fake GPU\0\0", major=8, minor=9)

    def cudaMemGetInfo(self):
        return OK, *self.host.memory()

    def cudaMalloc(self, size):
        assert self.current == 0
        try:
            return OK, self.host.allocate(size, "a test")
        except UnsupportedError:
            return Error.cudaErrorMemoryAllocation, None

    def cudaFree(self, address):
        self.host.free(address)
        return (OK,)

    def cudaMallocHost(self, size):
        memory = self.host.pinned(size)
        self._pinned[memory.ctypes.data] = memory
        return OK, memory.ctypes.data

    def cudaFreeHost(self, address):
        del self._pinned[address]
        return (OK,)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        if kind == "copy":
            self.host.copy(target, source, size, int(stream))
        elif kind == "up":
            self.host.upload(target, _memory(source, size), int(stream))
        else:
            self.host.download(_memory(target, size), source, int(stream))
        return (OK,)

    def cudaMemsetAsync(self, target, byte, size, stream):
        self.host.fill(target, byte, size, int(stream))
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags):
        assert flags == self.cudaStreamNonBlocking
        return OK, self.host.create_stream()

    def cudaStreamDestroy(self, stream):
        self.host.destroy_stream(stream)
        return (OK,)

    def cudaStreamSynchronize(self, stream):
        self.host.synchronize(stream)
        return (OK,)

    def cudaEventCreateWithFlags(self, flags):
        event = 1000 + len(self._events)
        self._events[event] = 0
        return OK, event

    def cudaEventRecord(self, event, stream):
        self._events[event] = stream
        return (OK,)

    def cudaStreamWaitEvent(self, stream, event, flags):
        self.host.follow(stream, self._events[event])
        return (OK,)

    def cudaEventDestroy(self, event):
        return (OK,)

    def cudaStreamBeginCapture(self, stream, mode):
        self.modes.append(mode)
        self.host.begin_capture(stream)
        return (OK,)

    def cudaStreamEndCapture(self, stream):
        works = self.host.end_capture(stream)
        if self.broken is not OK:
            self.last = self.broken
            return self.broken, None
        graph = 5000 + len(self._graphs)
        self._graphs[graph] = works
        return OK, graph

    def cudaGraphGetNodes(self, graph, number):
        return OK, None, len(self._graphs[graph])

    def cudaGraphInstantiate(self, graph, flags):
        return OK, self.host.keep(self._graphs[graph])

    def cudaGraphUpload(self, graph, stream):
        return (OK,)

    def cudaGraphLaunch(self, graph, stream):
        self.host.launch(graph, stream)
        return (OK,)

    def cudaGraphDestroy(self, graph):
        return (OK,)

    def cudaGraphExecDestroy(self, graph):
        self.host.destroy_graph(graph)
        return (OK,)


def _memory(address: int, size: int) -> np.ndarray:
    import ctypes

    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


# -- TensorRT-RTX ---------------------------------------------------------------------------------


class Validity(enum.Enum):
    VALID = 0
    INVALID = 1


class Reasons(enum.IntFlag):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4


@dataclass
class FakeConfig:
    """``IRuntimeConfig``."""

    strategy: object = None
    cuda_graph_strategy: object = None
    dynamic_shapes_kernel_specialization_strategy: object = None
    cache: object = None

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        return FakeCache()

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True


@dataclass
class FakeCache:
    """``IRuntimeCache``."""

    data: bytes = b""

    def serialize(self):
        return np.frombuffer(self.data + b"compiled", np.uint8)

    def deserialize(self, data):
        self.data = bytes(data)
        return True


@dataclass
class FakeTensorRT:
    """The module; engines are :class:`HostEngine` of the networks that their plans are."""

    runtime: FakeRuntime
    records: dict[bytes, object]
    __name__ = "fake_rtx"
    __version__ = "1.7.1"
    reasons: int = 0
    loads: bool = True
    configs: list[FakeConfig] = field(default_factory=list)
    memories: list[tuple[int, int]] = field(default_factory=list)

    EngineValidity = Validity
    EngineInvalidityDiagnostics = Reasons
    ExecutionContextAllocationStrategy = types.SimpleNamespace(USER_MANAGED="managed")
    CudaGraphStrategy = types.SimpleNamespace(DISABLED="disabled")
    DynamicShapesKernelSpecializationStrategy = types.SimpleNamespace(EAGER="eager")
    IRuntimeCache = FakeCache

    class ILogger:
        ERROR, INTERNAL_ERROR, INFO = "error", "internal", "info"

        def __init__(self):
            pass

    def Runtime(self, logger):
        return _FakeRuntimeOfEngines(self, logger)


@dataclass
class _FakeRuntimeOfEngines:
    trt: FakeTensorRT
    logger: object

    def get_engine_validity(self, plan):
        return (Validity.INVALID if self.trt.reasons else Validity.VALID), self.trt.reasons

    def deserialize_cuda_engine(self, plan):
        if not self.trt.loads:
            self.logger.log("error", "the engine cannot run\non this GPU")
            return None
        engine = HostEngine(self.trt.records[plan], plan, Path(), self.trt.runtime.host, 1)
        return _FakeEngine(self.trt, engine)


@dataclass
class _FakeEngine:
    trt: FakeTensorRT
    engine: HostEngine
    device_memory_size_v2: int = 4096
    streamable_weights_size: int = 0

    def create_runtime_config(self):
        self.trt.configs.append(FakeConfig())
        return self.trt.configs[-1]

    def create_execution_context(self, config):
        assert getattr(config, "strategy", config) == "managed"
        return _FakeContext(self)


class _FakeContext:
    def __init__(self, engine):
        self._engine = engine
        self._context = None
        self._told = []

    def set_input_shape(self, *told):
        self._told.append(("set_input_shape", told))
        return True

    def set_tensor_address(self, *told):
        self._told.append(("set_tensor_address", told))
        return True

    def set_device_memory(self, address, size):
        self._engine.trt.memories.append((address, size))
        self._memory = (address, size)

    def execute_async_v3(self, stream):
        if self._context is None:
            self._context = self._engine.engine.context(*self._memory, stream)
        done = all(getattr(self._context, name)(*told) for name, told in self._told)
        self._told.clear()
        return done and self._context.execute_async_v3(stream)
