"""TensorRT and TensorRT-RTX: engines and contexts, with scratch memory that the runner lends them.

What the releases have in common is used (10.3 to 11.x, RTX 1.x); the rest is looked for, not deduced
from a version number.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

from l2c_export.core.engines import Engine as Record
from l2c_export.core.files import replacing
from l2c_export.core.tensorrt_module import tensorrt_module
from l2c_export.errors import L2CError, UnsupportedError
from l2c_export.runtime.device.protocols import Context

_log = logging.getLogger(__name__)


class TensorRT:
    """Loads engines of one backend.

    Attributes:
        name: Of the library and its version.
        version: Its version alone.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._trt = tensorrt_module(backend)
        self.version: str = self._trt.__version__
        self.name = f"{self._trt.__name__} {self.version}"
        self._log, self._runtime = _runtime(backend)
        self._caches: list[Any] = []
        self._cached = b""

    def engine(self, record: Record, plan: bytes) -> TensorRTEngine:
        """Deserialise an engine.

        Raises:
            UnsupportedError: This machine cannot run it; with TensorRT's own reasons.
        """
        self._check(record, plan)
        self._log.errors.clear()
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise UnsupportedError(
                f"{self.name} cannot load the engine of {record.graph}: {self._said}"
            )
        if getattr(engine, "streamable_weights_size", 0) and getattr(
            engine, "weight_streaming_budget_v2", 0
        ):
            raise UnsupportedError(
                f"the engine of {record.graph} streams its weights, which no graph can hold; "
                "build it without weight streaming"
            )
        return TensorRTEngine(self, record, engine)

    def _check(self, record: Record, plan: bytes) -> None:
        """Ask RTX, which can tell before it loads anything."""
        ask = getattr(self._runtime, "get_engine_validity", None)
        if ask is None:
            return
        verdict, bits = ask(plan)
        if verdict == self._trt.EngineValidity.INVALID:
            kinds = self._trt.EngineInvalidityDiagnostics
            named = [n for n in dir(kinds) if n.isupper() and int(bits) & int(getattr(kinds, n))]
            reasons = ", ".join(name.lower().replace("_", " ") for name in named) or "no reason given"
            raise UnsupportedError(
                f"{self.name} cannot run the engine of {record.graph} here: {reasons}; "
                "build the engines for this machine: l2c-export engines BUNDLE"
            )

    @property
    def _said(self) -> str:
        return "; ".join(self._log.errors) or "it does not say why"

    # -- contexts -------------------------------------------------------------------------------

    def context(self, engine: Any, record: Record) -> Any:
        """A context without scratch memory of its own."""
        managed = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._log.errors.clear()
        if hasattr(self._trt, "IRuntimeCache"):
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(managed)
            # the runner captures; kernels must be there before it does
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.DISABLED
            config.dynamic_shapes_kernel_specialization_strategy = (
                self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            config.set_runtime_cache(self._cache(config))
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(managed)
        if context is None:
            raise L2CError(f"{self.name} makes no context for {record.graph}: {self._said}")
        return context

    def _cache(self, config: Any) -> Any:
        """The kernels that RTX has compiled on this GPU; one cache for all engines."""
        if not self._caches:
            cache = config.create_runtime_cache()
            if self._cached and not cache.deserialize(self._cached):
                _log.info("the runtime cache is of another version or GPU, and is made anew")
            self._caches.append(cache)
        return self._caches[0]

    def read_cache(self, path: Path) -> None:
        """Take what an earlier process has compiled; before the first context."""
        if path.is_file():
            self._cached = path.read_bytes()

    def write_cache(self, path: Path) -> None:
        """Keep what was compiled for the next process, if anything is new."""
        if not self._caches:
            return
        data = bytes(memoryview(self._caches[0].serialize()))
        if data == self._cached:
            return
        try:
            with replacing(path) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            _log.info("cannot keep compiled kernels in %s: %s", path, error.strerror)
        self._cached = data


class TensorRTEngine:
    """An engine; its contexts are TensorRT's own."""

    def __init__(self, owner: TensorRT, record: Record, engine: Any) -> None:
        self._owner, self._record, self._engine = owner, record, engine
        self.scratch = int(engine.device_memory_size_v2)

    def context(self, scratch: int, size: int, stream: int) -> Context:
        """A context in the runner's scratch memory."""
        made = self._owner.context(self._engine, self._record)
        if size:
            made.set_device_memory(scratch, size)
        context: Context = made
        return context


@functools.cache
def _runtime(backend: str) -> tuple[Any, Any]:
    """One logger and runtime for the process: TensorRT ignores every later logger."""
    trt: Any = tensorrt_module(backend)

    class Log(trt.ILogger):  # type: ignore[misc]
        """Passes messages on, and keeps errors for ours."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            text = " ".join(message.split())
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(text)
            _log.debug("%s: %s", trt.__name__, text)

    log = Log()
    return log, trt.Runtime(log)
