"""ONNX Runtime on the CPU: all graphs share one copy of the weights, one arena and one thread pool."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping

import onnxruntime as ort  # type: ignore[import-untyped]

from l2c_export.core.bundle import Bundle
from l2c_export.errors import L2CError
from l2c_export.runtime.backends import Array

_log = logging.getLogger(__name__)


class OrtGraph:
    """A graph as an ONNX Runtime session."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        """Tie the session to buffers by address; nothing is copied on the way in or out."""
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return functools.partial(_run, self._session, binding, (*inputs.values(), *outputs.values()))


def _run(session: ort.InferenceSession, binding: ort.IOBinding, _alive: tuple[Array, ...]) -> None:
    session.run_with_iobinding(binding)


class OrtBackend:
    """Sessions over the bundle's mapped weights.

    The first backend of a process sizes the thread pool that all share; one that asks for another
    number of threads later has pools of its own.
    """

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        self.version = f"onnxruntime {ort.__version__}"
        self._bundle = bundle
        self._threads = threads
        _share_arena()
        self._shared_pool = _share_pool(threads)

    def load(self, graph: str) -> OrtGraph:
        """Make a session.

        Raises:
            L2CError: ONNX Runtime does not take the graph.
        """
        path = self._bundle.file(graph)
        try:
            session = ort.InferenceSession(
                str(path), self._options(), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's exceptions have no common class but this one
            reason = " ".join(str(error).split())
            raise L2CError(f"{self.version} cannot load {path}: {reason}") from None
        return OrtGraph(session)

    def _options(self) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Packed weights would be a private copy for each session; without packing the pages of the
        # mapped file are used as they are, by all sessions.
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.use_env_allocators", "1")
        if self._shared_pool:
            options.use_per_session_threads = False
        else:
            options.intra_op_num_threads = self._threads or 0
            # Sessions run in turn: idle pools that spin would take the cores from the busy one.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return options


_lock = threading.Lock()
_pool_threads: int | None = None  # of the shared pool once it exists; 0 is ONNX Runtime's choice


@functools.cache
def _share_arena() -> None:
    """One arena for all sessions, instead of one that grows to the largest call for each of them."""
    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    config = ort.OrtArenaCfg({"arena_extend_strategy": 1})  # 1: as much as was asked for
    try:
        ort.create_and_register_allocator(memory, config)
    except Exception as error:  # the host application has registered one: sessions use that
        _log.info("sharing the arena that is already registered (%s)", error)


def _share_pool(threads: int | None) -> bool:
    """Make the process's thread pool, or say that it has another size than ``threads``."""
    global _pool_threads
    with _lock:
        if _pool_threads is None:
            try:
                ort.set_global_thread_pool_sizes(threads or 0, 1)
                _pool_threads = threads or 0
            except Exception as error:  # the host application has made it, in a size not known
                _log.info("using the thread pool that already exists (%s)", error)
                _pool_threads = -1
        return threads is None or threads == _pool_threads
