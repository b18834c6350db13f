"""Graphs of a session's calls: warmed up, captured, and held against what was captured."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from l2c_export.errors import L2CError
from l2c_export.runtime.device.calls import GIVEN, Calls, Shared
from l2c_export.runtime.sampler_state import Floats

_log = logging.getLogger(__name__)

POISON = 0xFF
"""Every byte of what a graph must overwrite; four make a NaN."""

_SAME = 1e-2
"""Largest difference of a replayed graph from the same kernels without one, of the largest value."""

_COPY = "a copy or fill"

_WAY_OUT = "run with graphs='none', and report the driver and backend versions"


class _Captured(NamedTuple):
    """A graph, ready to launch, its nodes, and the engines and copies that were to be in it."""

    graph: int
    nodes: int
    works: tuple[str, ...]


class GraphedCalls(Calls):
    """Makes graphs of a whole trajectory, or of each call of it.

    Attributes:
        graphs: ``"trajectory"``, ``"call"``, ``"engine"`` or ``"none"``: what one launch runs.
    """

    def __init__(self, shared: Shared, batch: int) -> None:
        super().__init__(shared, batch)
        self.graphs = shared.graphs
        self._ready: dict[bool, list[int]] = {}
        self._cached = True
        self._noted: list[str] | None = None

    def _prepare(self) -> None:
        """Warm every context up with the inputs at hand, then capture, then see what was captured.

        Where nothing can be captured, the warm-up was the trajectory.

        Raises:
            L2CError: A graph lacks something, or does something else than its engines.
        """
        self._everything()
        expected = self._fetched(self._latest_of(len(self._program)), self._shape, np.dtype(np.float32))
        with contextlib.ExitStack() as undo:
            try:
                alone = {_COPY: 1} | {name: self._nodes_of(name) for name in self._bound}
                captured = [self._captured(part, undo) for part in self._parts()]
            except L2CError as error:
                _log.warning("calls are enqueued one by one, since no graph can be captured: %s", error)
                self.graphs = "none"
                return
            _check_nodes(captured, alone)
            graphs = [one.graph for one in captured]
            self._check_result(graphs, expected)
            self._ready[self._cached] = graphs
            undo.pop_all()

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

    def _nodes_of(self, name: str) -> int:
        """How many nodes an engine adds to a graph."""
        bound = self._bound[name]
        graph, nodes = self._device.capture(self.stream, lambda: bound.repeat(self.stream))
        self._device.destroy_graph(graph)
        return nodes

    def _captured(self, part: Callable[[], None], undo: contextlib.ExitStack) -> _Captured:
        """A graph of a part, which does not outlive an error."""
        noted: list[str] = []
        self._noted = noted
        try:
            graph, nodes = self._device.capture(self.stream, part)
        finally:
            self._noted = None
        undo.callback(self._device.destroy_graph, graph)
        return _Captured(graph, nodes, tuple(noted))

    def _engine(self, graph: str, addresses: dict[str, int]) -> None:
        super()._engine(graph, addresses)
        self._note(graph)

    def _copy(self, target: int, source: int, size: int) -> None:
        super()._copy(target, source, size)
        self._note(_COPY)

    def _fill(self, target: int, byte: int, size: int) -> None:
        super()._fill(target, byte, size)
        self._note(_COPY)

    def _note(self, work: str) -> None:
        """Remember what ought to be in the graph that is being captured."""
        if self._noted is not None:
            self._noted.append(work)

    def _check_result(self, graphs: Iterable[int], expected: Floats) -> None:
        """See that graphs compute what was computed without them, from the inputs alone."""
        for name in self._arena.sizes.keys() - GIVEN:
            self._device.fill(self._arena[name], POISON, self._arena.sizes[name], self.stream)
        for graph in graphs:
            self._device.launch(graph, self.stream)
        latest = self._latest_of(len(self._program))
        if not _alike(self._fetched(latest, self._shape, np.dtype(np.float32)), expected):
            raise L2CError(
                f"a captured graph does not compute what its engines compute: it is stale; {_WAY_OUT}"
            )


def _check_nodes(captured: Iterable[_Captured], alone: Mapping[str, int]) -> None:
    """See that everything is in its graph, as often as it was enqueued."""
    empty = [name for name, nodes in alone.items() if not nodes]
    if empty:
        raise L2CError(
            f"a captured graph of the engine of {empty[0]} is empty: the engine runs on another device "
            "or stream than the runner"
        )
    for _, nodes, works in captured:
        least = sum(alone[name] for name in works)
        if nodes < least:
            raise L2CError(
                f"a captured graph has {nodes} nodes where its engines and copies are {least}: it "
                f"lacks some of them; {_WAY_OUT}"
            )


def _alike(found: Floats, expected: Floats) -> bool:
    """Whether a graph did what its engines did, NaN for NaN."""
    known = np.isfinite(expected)
    if not np.array_equal(np.isfinite(found), known):
        return False
    scale = float(np.abs(expected[known]).max(initial=0.0))
    return bool(np.all(np.abs(found[known] - expected[known]) <= _SAME * scale))
