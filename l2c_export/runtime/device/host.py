"""Host memory that stands in for a device, so that the runner can be run and watched without one.

It is strict where CUDA is undefined: memory starts out poisoned, every access is checked against what
is allocated, and a stream does nothing before somebody waits for it, so a missing wait shows. What a
driver may wait for is waited for: a stream where a copy from memory that is not pinned is enqueued, and
all of them where memory is given back. What was enqueued and what ran is recorded.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2c_export.errors import UnsupportedError
from l2c_export.runtime.device.protocols import ALIGNMENT, Bytes, Memory

POISON = 0xFF
"""Every byte of new memory; four make a NaN."""

Range = tuple[int, int]
"""Address and size in bytes."""


@dataclass(frozen=True)
class Work:
    """Something that a stream does.

    Attributes:
        kind: ``"copy"``, ``"upload"``, ``"download"``, ``"fill"``, ``"run"``, ``"launch"`` …
        what: Name of the engine that runs; empty for the rest.
        reads: Device memory that it reads.
        writes: Device memory that it fills.
        run: Does it.
    """

    kind: str
    what: str
    reads: tuple[Range, ...]
    writes: tuple[Range, ...]
    run: Callable[[], None]


class HostDevice:
    """A device in host memory; may be used by several threads at once.

    Attributes:
        asked: (kind, what) of everything that was asked of the device, in order.
        done: The work that ran, in order.
        limit: Bytes that it pretends to have.
    """

    name = "host memory in place of a device"
    dlpack = (1, 0)
    capability: tuple[int, int] | None = None

    def __init__(self, limit: int = 1 << 40) -> None:
        self.asked: list[tuple[str, str]] = []
        self.done: list[Work] = []
        self.limit = limit
        self._held: dict[int, tuple[Bytes, int]] = {}
        self._addresses: list[int] = []
        self._pinned: list[weakref.ref[Bytes]] = []
        self._streams: dict[int, deque[Work]] = {}
        self._capturing: dict[int, list[Work]] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._handles = itertools.count(1)
        self._lock = threading.RLock()

    def current(self) -> AbstractContextManager[None]:
        """Nothing to do."""
        return contextlib.nullcontext()

    # -- memory ---------------------------------------------------------------------------------

    def memory(self) -> Memory:
        """What is left of the limit."""
        with self._lock:
            return Memory(self.limit - sum(size for _, size in self._held.values()), self.limit)

    def allocate(self, size: int, purpose: str) -> int:
        """Poisoned memory."""
        with self._lock:
            self._ask("allocate", purpose)
            free = self.memory().free
            if size > free:
                raise UnsupportedError(
                    f"{size} bytes for {purpose} do not fit: {self.name} has {free} free"
                )
            memory = np.full(size + ALIGNMENT, POISON, np.uint8)
            address = memory.ctypes.data + -memory.ctypes.data % ALIGNMENT
            self._held[address] = (memory, size)
            bisect.insort(self._addresses, address)
            return address

    def free(self, address: int) -> None:
        """Forget an allocation; using it later is an error."""
        with self._lock:
            self._ask("free", "")
            for stream in self._streams:
                self._run(stream)
            memory, _ = self._held.pop(address)
            self._addresses.remove(address)
            memory[:] = POISON

    def view(self, address: int, size: int) -> Bytes:
        """(size,) bytes at an address.

        Raises:
            AssertionError: They are not inside one allocation.
        """
        with self._lock:
            at = bisect.bisect_right(self._addresses, address) - 1
            start = self._addresses[at] if at >= 0 else 0
            memory, held = self._held.get(start, (np.empty(0, np.uint8), 0))
            if at < 0 or address + size > start + held:
                raise AssertionError(f"{size} bytes at {address:#x} are not in one live allocation")
            skip = address - memory.ctypes.data
            return memory[skip : skip + size]

    def pinned(self, size: int) -> Bytes:
        """Host memory whose copies read it late."""
        memory = np.empty(size, np.uint8)
        with self._lock:
            self._pinned = [ref for ref in self._pinned if ref() is not None]
            self._pinned.append(weakref.ref(memory))
        return memory

    def _is_pinned(self, array: Bytes) -> bool:
        with self._lock:
            return any(
                np.shares_memory(array, held) for ref in self._pinned if (held := ref()) is not None
            )

    def upload(self, target: int, source: NDArray[Any], stream: int) -> None:
        """Copy what the array holds now; of a pinned one, what it holds when the stream gets there."""
        flat = source.reshape(-1).view(np.uint8)
        if not self._is_pinned(flat):
            self.synchronize(stream)
            flat = flat.copy()
        if flat.size:
            to = (target, flat.size)
            self.submit(stream, Work("upload", "", (), (to,), lambda: np.copyto(self.view(*to), flat)))

    def download(self, target: NDArray[Any], source: int, stream: int) -> None:
        """Copy when the stream gets there."""
        flat, there = target.reshape(-1).view(np.uint8), (source, target.nbytes)
        assert np.shares_memory(flat, target), "the target must be contiguous"
        self.submit(
            stream, Work("download", "", (there,), (), lambda: np.copyto(flat, self.view(*there)))
        )

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy when the stream gets there."""
        to, there = (target, size), (source, size)

        def run() -> None:
            np.copyto(self.view(*to), self.view(*there))

        self.submit(stream, Work("copy", "", (there,), (to,), run))

    def fill(self, target: int, byte: int, size: int, stream: int) -> None:
        """Fill when the stream gets there."""
        to = (target, size)
        self.submit(stream, Work("fill", "", (), (to,), lambda: self.view(*to).fill(byte)))

    # -- streams --------------------------------------------------------------------------------

    def create_stream(self) -> int:
        """A stream; work on it waits until somebody waits for it."""
        with self._lock:
            stream = next(self._handles)
            self._streams[stream] = deque()
            return stream

    def destroy_stream(self, stream: int) -> None:
        """Run what is left on it."""
        with self._lock:
            self._run(stream)
            del self._streams[stream]

    def submit(self, stream: int, work: Work) -> None:
        """Enqueue work, or record it where the stream is being captured."""
        with self._lock:
            self._ask(work.kind, work.what)
            if stream in self._capturing:
                self._capturing[stream].append(work)
            else:
                self._streams[stream].append(work)

    def synchronize(self, stream: int) -> None:
        """Run everything on a stream."""
        with self._lock:
            self._ask("synchronize", "")
            if stream in self._capturing:
                raise UnsupportedError("a stream that is being captured cannot be waited for")
            self._run(stream)

    def follow(self, stream: int, other: int) -> None:
        """Run the other stream up to here before the next work of this one."""
        with self._lock:
            mark = Work("mark", "", (), (), lambda: None)
            self.submit(other, mark)
            self.submit(stream, Work("wait", "", (), (), lambda: self._run(other, mark)))

    def _run(self, stream: int, until: Work | None = None) -> None:
        queue = self._streams[stream]
        if until is not None and not any(work is until for work in queue):
            return  # it ran before
        while queue:
            work = queue.popleft()
            work.run()
            self.done.append(work)
            if work is until:
                return

    # -- graphs ---------------------------------------------------------------------------------

    def capture(self, stream: int, enqueue: Callable[[], None]) -> tuple[int, int]:
        """Record the work that a function enqueues."""
        self.begin_capture(stream)
        try:
            enqueue()
        finally:
            works = self.end_capture(stream)
        return self.keep(works), len(works)

    def begin_capture(self, stream: int) -> None:
        """Record from here on, instead of enqueuing."""
        with self._lock:
            self._ask("begin capture", "")
            self._capturing[stream] = []

    def end_capture(self, stream: int) -> list[Work]:
        """What was recorded."""
        with self._lock:
            self._ask("end capture", "")
            return self._capturing.pop(stream)

    def keep(self, works: list[Work]) -> int:
        """Make a graph of work."""
        with self._lock:
            graph = next(self._handles)
            self._graphs[graph] = works
            return graph

    def launch(self, graph: int, stream: int) -> None:
        """Enqueue the recorded work."""
        works = self._graphs[graph]
        self.submit(stream, Work("launch", "", (), (), lambda: self._replay(works)))

    def _replay(self, works: Sequence[Work]) -> None:
        for work in works:
            work.run()
            self.done.append(work)

    def destroy_graph(self, graph: int) -> None:
        """Forget a graph."""
        with self._lock:
            del self._graphs[graph]

    def _ask(self, kind: str, what: str) -> None:
        self.asked.append((kind, what))
