"""What the device runner asks of a device, of an engine and of an execution context.

A device is CUDA, or host memory that stands in for it; an engine is TensorRT's or an ONNX Runtime
session. The runner sees neither: it allocates, binds addresses and enqueues.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 256
"""Bytes; what TensorRT asks of every tensor's address."""

Bytes = NDArray[np.uint8]


class Memory(NamedTuple):
    """How much device memory there is, in bytes."""

    free: int
    total: int


class Device(Protocol):
    """Memory, streams and graphs. Streams are handles as CUDA has them; 0 is none of ours."""

    name: str
    """As reports print it."""

    dlpack: tuple[int, int]
    """DLPack's type and number of the device."""

    capability: tuple[int, int] | None
    """Compute capability, such as (8, 9); None where there is no such thing."""

    def current(self) -> AbstractContextManager[None]:
        """Make it the thread's device meanwhile. All methods below are called inside of this."""

    def memory(self) -> Memory:
        """Free and total memory now."""

    def allocate(self, size: int, purpose: str) -> int:
        """Address of ``size`` new bytes, aligned to :data:`ALIGNMENT`.

        Raises:
            UnsupportedError: There is not enough; says what was asked for what, and what is free.
        """

    def free(self, address: int) -> None:
        """Give an allocation back; what was enqueued to use it is waited for."""

    def pinned(self, size: int) -> Bytes:
        """(size,) host memory that copies to the device read while they run."""

    def upload(self, target: int, source: NDArray[Any], stream: int) -> None:
        """Copy a contiguous host array to the device.

        One that is not pinned may change at once, but the host may wait for what is on the stream.
        """

    def download(self, target: NDArray[Any], source: int, stream: int) -> None:
        """Copy from the device into a contiguous host array; there after :meth:`synchronize`."""

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy within the device."""

    def fill(self, target: int, byte: int, size: int, stream: int) -> None:
        """Set every byte."""

    def create_stream(self) -> int:
        """A stream that waits for no other, the default stream least of all."""

    def destroy_stream(self, stream: int) -> None:
        """Give a stream back after waiting for it."""

    def synchronize(self, stream: int) -> None:
        """Wait until everything on a stream is done."""

    def follow(self, stream: int, other: int) -> None:
        """Let what comes next on a stream wait for what is on another one now; the host waits not."""

    def capture(self, stream: int, enqueue: Callable[[], None]) -> tuple[int, int]:
        """Record what a function enqueues on a stream, instead of running it.

        Returns:
            The graph, ready to launch, and its number of nodes.

        Raises:
            UnsupportedError: Something in it cannot be captured.
        """

    def launch(self, graph: int, stream: int) -> None:
        """Enqueue a whole graph."""

    def destroy_graph(self, graph: int) -> None:
        """Give a graph back."""


class Context(Protocol):
    """The part of TensorRT's ``IExecutionContext`` that the runner uses; its methods return success."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Fix the shape of an input."""

    def set_tensor_address(self, name: str, address: int) -> bool:
        """Bind an input or output."""

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Enqueue one run."""


@runtime_checkable
class KeepingContext(Context, Protocol):
    """A context that keeps a graph of each set of addresses by itself."""

    def execute_once(self, stream_handle: int) -> bool:
        """Enqueue one run with addresses that do not come again: keep nothing of it."""


class Engine(Protocol):
    """A loaded engine; makes contexts for any number of sessions."""

    scratch: int
    """Bytes of scratch memory that a run needs."""

    def context(self, scratch: int, size: int, stream: int) -> Context:
        """A new context that runs on a stream in scratch memory at an address."""
