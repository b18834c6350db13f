"""A session on a device: a trajectory on one stream, call by call or as a graph."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from l2c_export.errors import L2CError, UnsupportedError
from l2c_export.runtime.backends import Array
from l2c_export.runtime.device.arrays import Borrowed, DeviceArray, on_device
from l2c_export.runtime.device.bfloat16 import from_stored, host_type, stored_type, to_stored
from l2c_export.runtime.device.calls import Calls, Shared
from l2c_export.runtime.device.memory import Arena, padded
from l2c_export.runtime.inputs import (
    check_floats,
    check_guidance,
    check_labels,
    check_noise,
)
from l2c_export.runtime.noise import NoiseSource, noise_source
from l2c_export.runtime.sampler_state import Floats
from l2c_export.runtime.session import CallResult, uncached_program

_log = logging.getLogger(__name__)

POISON = 0xFF
"""Every byte of what a graph must overwrite; four make a NaN."""

_SAME = 1e-2
"""Largest difference of a replayed graph from the same kernels without one, of the largest value."""


class DeviceSession(Calls):
    """One trajectory at a time, in device memory of its own; for one thread at a time.

    It does what :class:`l2c_export.runtime.Session` does. What differs: arrays that it returns are
    copies in host memory, so what is changed in them goes nowhere; and :meth:`run` enqueues a whole
    trajectory without waiting for it.

    Attributes:
        batch: B, latents of a trajectory.
        stream: Everything of the session runs there, in order.
        graphs: ``"trajectory"``, ``"call"``, ``"engine"`` or ``"none"``: what one launch runs.
        bytes: Purpose to bytes of device memory that this session holds.
    """

    def __init__(self, shared: Shared, batch: int) -> None:
        super().__init__(shared, batch)
        self.graphs = shared.graphs
        self._ready: dict[bool, list[int]] = {}
        self._cached = True
        self._index = 0
        self._held: dict[str, int] = {}
        self._follower: int | None = None

    def close(self) -> None:
        """Give all device memory back; the session is of no use afterwards."""
        with self._device.current():
            if self._bound:
                self._device.synchronize(self.stream)
            for graph in itertools.chain(*self._ready.values()):
                self._device.destroy_graph(graph)
            self._ready.clear()
            self._bound.clear()  # contexts go before the memory that they run in
            self._closing.close()

    def __del__(self) -> None:
        if hasattr(self, "_ready"):
            self.close()

    # -- the trajectory -------------------------------------------------------------------------

    def start(
        self,
        labels: Any,
        noise: Any = None,
        guidance_scale: float | None = None,
        cached: bool = True,
        *,
        seed: int | None = None,
        call_noise: Any = None,
        stream: int | None = None,
    ) -> None:
        """Begin a trajectory, and forget one that is under way.

        Arguments as in :meth:`l2c_export.runtime.Runner.sample`, for exactly ``batch`` labels. Noise
        may lie on the device; it is then not looked at for NaN, since the host would have to wait.
        """
        manifest = self._manifest
        labels = check_labels(manifest, labels)
        if len(labels) != self.batch:
            raise L2CError(f"{len(labels)} labels for a session of batch {self.batch}")
        scale = check_guidance(manifest, guidance_scale)
        draw = noise_source(manifest, self.batch, call_noise, seed)
        with self._device.current():
            self._follower = stream
            if stream is not None:
                self._device.follow(self.stream, stream)
            if on_device(noise, self._device):
                self._take(noise)
            else:
                self._send(check_noise(manifest, self.batch, noise, seed), "start")
            self._send(np.array([scale], np.float32), "guidance_scale")
            if "noise" in self._sources:
                self._send(self._drawn(draw), "noise")
            self._table.upload(self._device, self._arena, labels, self.stream)
        self._cached = cached
        self._program = manifest.calls if cached else uncached_program(manifest)
        self._index, self._chunk, self._held = 0, None, {}

    def run(self) -> None:
        """Enqueue the calls that are left; nothing waits for them but the caller's stream.

        The first whole trajectory runs twice: once as a warm-up, and once as a graph, which must do
        the same.

        Raises:
            L2CError: An engine fails, or a captured graph does something else than its engines.
        """
        with self._device.current():
            if self._index or self.graphs in ("none", "engine"):
                for index in range(self._index, len(self._program)):
                    self._enqueue(index)
            elif self._cached in self._ready:
                for graph in self._ready[self._cached]:
                    self._device.launch(graph, self.stream)
                self._finish()
            else:
                self._prepare()
                self._finish()
            if self._follower is not None:
                self._device.follow(self._follower, self.stream)

    def step(self) -> CallResult:
        """Run the next call and the update of the latent, and wait for it.

        Raises:
            L2CError: No call is left.
        """
        index = self._index
        if index == len(self._program):
            raise L2CError("the trajectory is over; begin another with start()")
        with self._device.current():
            self._enqueue(index)
            output = self._fetched("output", self._shape, np.dtype(np.float32))
        return CallResult(index, self._program[index].timestep, output, self.x)

    def __iter__(self) -> Iterator[CallResult]:
        """Run the calls that are left."""
        while self._index < len(self._program):
            yield self.step()

    @property
    def x(self) -> Floats:
        """(B, C, H, W) a copy of the latent so far, when the stream gets there."""
        with self._device.current():
            return self._fetched(self._latest(), self._shape, np.dtype(np.float32))

    def slot(self, name: str) -> Array:
        """(rows, …) a copy of a stored slot: the rows of the labels, then those of the null label.

        A slot in bfloat16 comes in float32.

        Raises:
            L2CError: Nothing is stored under that name at this point of the trajectory.
        """
        if name not in self._held:
            raise L2CError(f"slot {name!r} is not stored after {self._index} calls")
        with self._device.current():
            buffer, dtype = f"slot.{self._held[name]}", self._manifest.slots.dtype
            return from_stored(self._fetched(buffer, self._slot_shape, stored_type(dtype)), dtype)

    def result(self, out: Any = None) -> Any:
        """The latent in device memory, there when the stream of :meth:`start` gets there.

        Args:
            out: (B, C, H, W) float32 on the device, by ``__dlpack__``; without it, a new array.

        Raises:
            L2CError: ``out`` is something else.
        """
        with self._device.current():
            reader = self.stream if self._follower is None else self._follower
            array, borrowed = out, None
            if out is None:
                array = DeviceArray(self._device, self._shape, np.float32, reader)
            if isinstance(array, DeviceArray):
                address = array.checked(self._shape, np.float32, "out")
            elif on_device(array, self._device):
                borrowed = Borrowed(array, self.stream, self._shape, np.float32, "out")
                address = borrowed.address
            else:
                raise L2CError(f"out is not in the memory of {self._device.name}")
            latest = self._arena[self._latest()]
            self._device.copy(address, latest, self._latent_bytes, self.stream)
            if reader != self.stream:
                self._device.follow(reader, self.stream)
            if borrowed is not None:
                borrowed.close()
        return array

    def run_call(
        self, index: int, x: Any, reads: Mapping[str, Any] | None = None
    ) -> tuple[Floats, dict[str, Array]]:
        """Run one call of the started program on given inputs; the trajectory stays where it is.

        As :meth:`l2c_export.runtime.Session.run_call`; slots in bfloat16 go in and out in float32, and
        what goes in is rounded.
        """
        if not 0 <= index < len(self._program):
            raise L2CError(f"there is no call {index}; the started program has {len(self._program)}")
        call, given = self._program[index], dict(reads or {})
        if set(given) != set(call.reads):
            raise L2CError(f"call {index} reads {sorted(call.reads)}, not {sorted(given)}")
        dtype = self._manifest.slots.dtype
        arrays = {"x": check_floats(x, self._shape, np.dtype(np.float32), "x")}
        for slot, value in given.items():
            checked = check_floats(value, self._slot_shape, host_type(dtype), f"slot {slot}")
            arrays[slot] = to_stored(checked, dtype)
        results: dict[str, Array] = {"output": np.empty(self._shape, np.float32)}
        results |= {slot: np.empty(self._slot_shape, stored_type(dtype)) for slot in call.writes}
        sizes = {name: array.nbytes for name, array in (arrays | results).items()}
        with self._device.current():
            probe = Arena(self._device, "a single call", sizes)
            try:
                for name, array in arrays.items():
                    self._device.upload(probe[name], np.ascontiguousarray(array), self.stream)
                self._condition(index)
                fixed = self._call_inputs(index)
                self._engine(call.graph, fixed | {name: probe[name] for name in sizes})
                for name, array in results.items():
                    self._device.download(array, probe[name], self.stream)
                self._device.synchronize(self.stream)
            finally:
                probe.close()
        return results.pop("output"), {s: from_stored(bits, dtype) for s, bits in results.items()}

    # -- what is enqueued -----------------------------------------------------------------------

    def _enqueue(self, index: int) -> None:
        """The next call of the trajectory, and the update after it."""
        if self.graphs == "call" and self._cached in self._ready:
            if index % self._table.calls:
                self._condition(index)
            self._device.launch(self._ready[self._cached][index], self.stream)
            self._chunk = self._table.chunk_of(index)
        else:
            if index == 0:
                self._begin()
            self._condition(index)
            self._call(index)
        self._index += 1
        written = self._program[index].writes
        self._held = {s: b for s, b in self._held.items() if b not in written.values()} | written

    # -- graphs ---------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Warm every context up with the inputs at hand, then capture, then see what was captured."""
        self._everything()
        expected = self._fetched(self._latest_of(len(self._program)), self._shape, np.dtype(np.float32))
        self._shared.compiled()
        try:
            graphs = self._all_captured()
        except UnsupportedError as error:
            _log.warning("calls are enqueued one by one, since no graph can be captured: %s", error)
            self.graphs = "none"
            return
        self._ready[self._cached] = graphs
        for name in ("x.0", "x.1", "output"):
            self._device.fill(self._arena[name], POISON, self._latent_bytes, self.stream)
        for graph in graphs:
            self._device.launch(graph, self.stream)
        latest = self._latest_of(len(self._program))
        found = self._fetched(latest, self._shape, np.dtype(np.float32))
        if not _alike(found, expected):
            raise L2CError(
                "a captured graph does not compute what its engines compute: it is empty or stale; "
                "run with graphs='none', and report the driver and backend versions"
            )

    def _parts(self) -> list[Callable[[], None]]:
        """What each graph holds."""
        if self.graphs == "trajectory":
            return [self._everything]
        return [self._single(index) for index in range(len(self._program))]

    def _everything(self) -> None:
        for index in range(len(self._program)):
            self._single(index)()

    def _single(self, index: int) -> Callable[[], None]:
        def enqueue() -> None:
            if index == 0:
                self._begin()
            if index % self._table.calls == 0:
                self._chunk = None  # a graph fills the table itself, whatever is in it now
                self._condition(index)
            self._call(index)

        return enqueue

    def _all_captured(self) -> list[int]:
        """A graph of each part; none is left where one of them fails."""
        with contextlib.ExitStack() as undo:
            graphs = []
            for part in self._parts():
                graphs.append(self._captured(part))
                undo.callback(self._device.destroy_graph, graphs[-1])
            undo.pop_all()
        return graphs

    def _captured(self, part: Callable[[], None]) -> int:
        graph, nodes = self._device.capture(self.stream, part)
        if not nodes:
            self._device.destroy_graph(graph)
            raise L2CError(
                "a captured graph is empty: the engines run on another device or stream than the runner"
            )
        return graph

    def _finish(self) -> None:
        """The trajectory is over, as far as the host is concerned."""
        held: dict[str, int] = {}
        for call in self._program:
            held = {s: b for s, b in held.items() if b not in call.writes.values()} | call.writes
        self._index, self._held = len(self._program), held
        self._chunk = self._table.chunk_of(self._index - 1)

    # -- copies ---------------------------------------------------------------------------------

    def _take(self, noise: Any) -> None:
        """Copy noise that is on the device already."""
        borrowed = Borrowed(noise, self.stream, self._shape, np.float32, "noise")
        self._device.copy(self._arena["start"], borrowed.address, self._latent_bytes, self.stream)
        if self._follower is None:
            self._device.synchronize(self.stream)
        else:  # what its owner does with the memory next waits for the copy
            self._device.follow(self._follower, self.stream)
        borrowed.close()

    def _drawn(self, draw: NoiseSource | None) -> Floats:
        """(calls, stride) the noise of all calls, in their order."""
        assert draw is not None
        wide = np.zeros((len(self._manifest.calls), padded(self._latent_bytes) // 4), np.float32)
        one: Floats = np.empty(self._shape, np.float32)
        for index, row in enumerate(wide):
            draw(index, one)
            row[: one.size] = one.ravel()
        return wide

    def _latest(self) -> str:
        return self._latest_of(self._index)


def _alike(found: Floats, expected: Floats) -> bool:
    """Whether a graph did what its engines did, NaN for NaN."""
    known = np.isfinite(expected)
    if not np.array_equal(np.isfinite(found), known):
        return False
    scale = float(np.abs(expected[known]).max(initial=0.0))
    return bool(np.all(np.abs(found[known] - expected[known]) <= _SAME * scale))
