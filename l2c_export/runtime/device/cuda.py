"""A CUDA device through ``cuda.bindings``: memory, streams and graphs, every error explained."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2c_export.errors import L2CError, UnsupportedError
from l2c_export.runtime.device.protocols import Bytes, Memory

_HINTS = {
    "cudaErrorNoDevice": "there is no NVIDIA GPU that this process may use (see nvidia-smi and "
    "CUDA_VISIBLE_DEVICES)",
    "cudaErrorInsufficientDriver": "there is no NVIDIA driver, or one older than this CUDA runtime "
    "(install a newer one, or the cuda-bindings of the CUDA version that nvidia-smi shows)",
    "cudaErrorInvalidDevice": "there is no GPU of that number (see nvidia-smi -L)",
    "cudaErrorNoKernelImageForDevice": "the engines were built for other GPUs (build them here)",
    "cudaErrorIllegalAddress": "a kernel used memory that is not its own (restart the process)",
    **dict.fromkeys(
        (
            "cudaErrorStreamCaptureUnsupported",
            "cudaErrorStreamCaptureInvalidated",
            "cudaErrorStreamCaptureMerge",
            "cudaErrorStreamCaptureUnmatched",
            "cudaErrorStreamCaptureUnjoined",
            "cudaErrorStreamCaptureIsolation",
            "cudaErrorStreamCaptureImplicit",
            "cudaErrorStreamCaptureWrongThread",
            "cudaErrorCapturedEvent",
        ),
        "what was enqueued cannot be part of a CUDA graph",
    ),
}


class CudaDevice:
    """One GPU.

    Raises:
        UnsupportedError: ``cuda.bindings``, the driver or the device is missing.
    """

    def __init__(self, index: int = 0) -> None:
        self._rt = _bindings()
        self.index = index
        self.dlpack = (2, index)
        properties = self._call("cudaGetDeviceProperties", index)
        self.capability: tuple[int, int] | None = (int(properties.major), int(properties.minor))
        model = bytes(properties.name).split(b"\0")[0].decode(errors="replace").strip()
        self.name = f"{model}, compute capability {properties.major}.{properties.minor}"

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make this the thread's device, and leave the thread with the device that it had."""
        before = self._call("cudaGetDevice")
        self._call("cudaSetDevice", self.index)
        try:
            yield
        except BaseException:
            self._rt.cudaSetDevice(before)  # what went wrong first is what to tell
            raise
        self._call("cudaSetDevice", before)

    # -- memory ---------------------------------------------------------------------------------

    def memory(self) -> Memory:
        """As the driver says; other processes count."""
        return Memory(*map(int, self._call("cudaMemGetInfo")))

    def allocate(self, size: int, purpose: str) -> int:
        """Device memory; the driver aligns it to 256 bytes or more."""
        error, address = self._rt.cudaMalloc(max(size, 1))
        if self._name(error) == "cudaErrorMemoryAllocation":
            self._rt.cudaGetLastError()  # as in _check
            free, total = self.memory()
            raise UnsupportedError(
                f"{_mib(size)} for {purpose} do not fit: {self.name}, has {_mib(free)} "
                f"of {_mib(total)} free; take a smaller batch or precision, or end what else runs here"
            )
        self._check("cudaMalloc", error)
        return int(address)

    def free(self, address: int) -> None:
        """Give memory back; the driver waits for what uses it."""
        self._call("cudaFree", address)

    def pinned(self, size: int) -> Bytes:
        """Page-locked memory, given back with the array."""
        address = int(self._call("cudaMallocHost", size))
        owner = _Pinned(self._rt, address)
        memory = (ctypes.c_uint8 * size).from_address(address)
        memory.owner = owner  # type: ignore[attr-defined]
        return np.ctypeslib.as_array(memory)

    def upload(self, target: int, source: NDArray[Any], stream: int) -> None:
        """Copy; the driver has taken what is not pinned when this returns, and may wait before."""
        if source.nbytes:
            assert source.flags.c_contiguous
            self._copy(target, source.ctypes.data, source.nbytes, "cudaMemcpyHostToDevice", stream)

    def download(self, target: NDArray[Any], source: int, stream: int) -> None:
        """Copy; wait for the stream before reading it."""
        assert target.flags.c_contiguous
        self._copy(target.ctypes.data, source, target.nbytes, "cudaMemcpyDeviceToHost", stream)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy within the device."""
        self._copy(target, source, size, "cudaMemcpyDeviceToDevice", stream)

    def _copy(self, target: int, source: int, size: int, kind: str, stream: int) -> None:
        kinds = self._rt.cudaMemcpyKind
        self._call("cudaMemcpyAsync", target, source, size, getattr(kinds, kind), stream)

    def fill(self, target: int, byte: int, size: int, stream: int) -> None:
        """Set every byte."""
        self._call("cudaMemsetAsync", target, byte, size, stream)

    # -- streams --------------------------------------------------------------------------------

    def create_stream(self) -> int:
        """A non-blocking stream: a capture on it does not disturb the default stream, nor it that."""
        return int(self._call("cudaStreamCreateWithFlags", self._rt.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        """Give a stream back after waiting for it."""
        self.synchronize(stream)
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Wait; errors of what ran before show here."""
        self._call("cudaStreamSynchronize", stream)

    def follow(self, stream: int, other: int) -> None:
        """By an event, which lives on in the driver until it is reached."""
        event = self._call("cudaEventCreateWithFlags", self._rt.cudaEventDisableTiming)
        try:
            self._call("cudaEventRecord", event, other)
            self._call("cudaStreamWaitEvent", stream, event, 0)
        finally:
            self._call("cudaEventDestroy", event)

    # -- graphs ---------------------------------------------------------------------------------

    def capture(self, stream: int, enqueue: Callable[[], None]) -> tuple[int, int]:
        """Capture in thread-local mode: other threads may allocate and load meanwhile."""
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        try:
            enqueue()
        except BaseException:
            with contextlib.suppress(L2CError):  # or the stream would stay in capture for ever
                self._destroy(self._call("cudaStreamEndCapture", stream))
            raise
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            nodes = int(self._call("cudaGraphGetNodes", graph, 0)[-1])
            ready = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._destroy(graph)
        try:
            self._call("cudaGraphUpload", ready, stream)
        except L2CError:
            self._call("cudaGraphExecDestroy", ready)
            raise
        return int(ready), nodes

    def _destroy(self, graph: Any) -> None:
        if int(graph):
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: int, stream: int) -> None:
        """Enqueue a whole graph."""
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """Give a graph back; the driver waits for a launch that is under way."""
        self._call("cudaGraphExecDestroy", graph)

    # -- errors ---------------------------------------------------------------------------------

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call the runtime; return its result, or a tuple of them."""
        error, *results = getattr(self._rt, function)(*arguments)
        self._check(function, error)
        return results[0] if len(results) == 1 else tuple(results)

    def _check(self, function: str, error: Any) -> None:
        name = self._name(error)
        if name == "cudaSuccess":
            return
        self._rt.cudaGetLastError()  # else the next call of anybody reports it once more
        text = self._rt.cudaGetErrorString(error)[1]
        said = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
        hint = _HINTS.get(name)
        kind = UnsupportedError if hint else L2CError
        raise kind(f"{hint}: " * bool(hint) + f"{function} failed with {name} ({said})")

    @staticmethod
    def _name(error: Any) -> str:
        return str(getattr(error, "name", error))


class _Pinned:
    """Gives page-locked memory back when nothing refers to it any more."""

    def __init__(self, rt: Any, address: int) -> None:
        self._rt, self._address = rt, address

    def __del__(self) -> None:
        self._rt.cudaFreeHost(self._address)


def _bindings() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except (ImportError, RuntimeError, OSError) as error:
        raise UnsupportedError(
            f"this backend needs cuda.bindings ({_one_line(error)}); install it with: "
            "pip install cuda-bindings"
        ) from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
