"""ONNX Runtime on the CPU: sessions that share one copy of the weights and one arena."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import onnxruntime as ort  # type: ignore[import-untyped]

from l2c_export.core.bundle import Bundle
from l2c_export.core.cpu import cpu_target
from l2c_export.core.packed import PACKED, fitting_packed
from l2c_export.errors import L2CError, UnsupportedError
from l2c_export.runtime.backends import Array
from l2c_export.runtime.session import Graphs, Session

_log = logging.getLogger(__name__)

# It would give each session a float32 copy of all float16 weights; without it they are widened layer
# by layer, in each call.
_WIDEN_WEIGHTS = "FuseFp16InitializerToFp32NodeTransformer"

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class OrtGraph:
    """A graph as an ONNX Runtime session."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        """Tie the session to buffers by address: nothing is copied on the way in or out."""
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return functools.partial(_run, self._session, binding, (*inputs.values(), *outputs.values()))


def _run(session: ort.InferenceSession, binding: ort.IOBinding, _alive: tuple[Array, ...]) -> None:
    try:
        session.run_with_iobinding(binding)
    except Exception as error:  # as in load; most likely there is not enough memory
        raise L2CError(f"onnxruntime {ort.__version__} failed: {_one_line(error)}") from None


class OrtBackend:
    """Sessions over the bundle's mapped weights."""

    streams = False
    disabled_optimizers: tuple[str, ...] = (_WIDEN_WEIGHTS,)

    def __init__(self, bundle: Bundle, threads: int | None, packed: bool = True) -> None:
        """Look for weights that are packed for this CPU.

        Args:
            bundle: The bundle.
            threads: For each call; None is ONNX Runtime's choice.
            packed: False leaves packed weights alone.

        Raises:
            L2CError: There are packed weights, and they are damaged.
            UnsupportedError: This CPU cannot compute in the bundle's precision.
        """
        self.version = f"onnxruntime {ort.__version__}"
        if bundle.manifest.precision == "bfloat16":
            raise UnsupportedError(
                f"{bundle.path} computes in bfloat16, for which {self.version} has no CPU kernels; "
                "build with --precision float32 to run it here"
            )
        self._bundle = bundle
        self.manifest = bundle.manifest
        self._threads = threads
        self._packed = fitting_packed(bundle, ort.__version__, cpu_target()) if packed else None
        if self._packed:
            self._packed.check_file(bundle, PACKED)
            _log.info("weights packed for this CPU: %s", self._packed.folder)
            self.version += ", packed weights"
        _share_arena()

    def load(self, graph: str) -> OrtGraph:
        """Make a session.

        Raises:
            L2CError: ONNX Runtime does not take the graph.
        """
        packed = self._packed if self._packed and graph in self._packed.graphs else None
        path = self._bundle.file(graph)
        if packed:
            path = packed.check_file(self._bundle, packed.graphs[graph])
        began = time.perf_counter()
        try:
            session = self._open(self._source(path, packed is not None), packed is not None)
        except L2CError:
            raise
        except Exception as error:  # ONNX Runtime's own exceptions have no other common class
            raise L2CError(
                f"onnxruntime {ort.__version__} cannot load {path}: {_one_line(error)}"
            ) from None
        _log.info("loaded %s in %.3f s", path, time.perf_counter() - began)
        return OrtGraph(session)

    def session(self, graphs: Graphs, batch: int) -> Session:
        """A session in host memory."""
        return Session(graphs, batch)

    def _source(self, path: Path, packed: bool) -> str | bytes:
        # Paths in a graph begin at its folder, or where it comes as bytes at the one that options say.
        return path.read_bytes() if packed else path.as_posix()

    def _open(self, graph: str | bytes, packed: bool) -> ort.InferenceSession:
        try:
            return self._session(graph, self._options(packed, own_pool=True))
        except RuntimeError as error:
            if "use_per_session_threads" not in str(error):
                raise
            # the host application has made a global thread pool, and all sessions must use it
            return self._session(graph, self._options(packed, own_pool=False))

    def _session(self, graph: str | bytes, options: ort.SessionOptions) -> ort.InferenceSession:
        # The fallback would print to stdout and try the same once more.
        return ort.InferenceSession(
            graph,
            options,
            ["CPUExecutionProvider"],
            disabled_optimizers=[*self.disabled_optimizers],
            enable_fallback=0,
        )

    def _options(self, packed: bool, own_pool: bool) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(_WEIGHTS_FOLDER, self._bundle.path.resolve().as_posix())
        if not packed:  # else they are packed once more, found in the mapped file, and dropped
            # Packed weights would be a private copy in each session; unpacked, all sessions use the
            # pages of the mapped file, and load in a hundredth of the time.
            options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.use_env_allocators", "1")
        # Threads that spin on after a call would take the cores from the next call's, which are
        # another session's. Not to spin at all costs small models 7 % (DiT-S/8, 13 ms a call).
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # A memory pattern is one large block a graph, new to the arena: 220 MB more after a full and
        # an all-reuse call of DiT-XL/2, and 0.25 s of page faults at each graph's second run.
        options.enable_mem_pattern = False
        if own_pool:
            options.intra_op_num_threads = self._threads or 0
        else:
            options.use_per_session_threads = False  # older releases do not have the attribute
        return options


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@functools.cache
def _share_arena() -> None:
    """Let all sessions of the process use one arena, instead of one each."""
    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    grow = ort.OrtArenaCfg({"arena_extend_strategy": 1})  # by what is asked for, not by doubling
    try:
        ort.create_and_register_allocator(memory, grow)
    except Exception as error:  # the host application has one: that is then shared
        _log.info("using the arena that is already registered: %s", error)
