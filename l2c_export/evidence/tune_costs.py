"""What calls cost on this machine, from the time of a few step graphs: a prediction for any schedule.

Of each kind of sub-layer (``attn``, ``mlp``) a graph that computes only it is timed, beside one that
computes nothing and one that computes everything. What a kind takes above the one that computes nothing
is spread over its sub-layers by their multiply-accumulates, and scaled so that the full call comes out
as it was measured. Writing a cache is not in it: a branch is computed into the buffer that keeps it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from l2c_export.core.bundle import CONDITIONING, Value
from l2c_export.core.models import ModelConfig
from l2c_export.core.plan import Plan, StepGraph
from l2c_export.runtime.session import dtype_of

if TYPE_CHECKING:
    from l2c_export.runtime import Runner

_REPEATS = 5
_ROWS_AT_ONCE = 64  # of conditioning; more are extrapolated


@dataclass(frozen=True)
class CostModel:
    """Seconds on this machine, for one batch.

    Attributes:
        conditioning: Of all calls of a trajectory together.
        base: Of a call that reuses everything.
        per_mac: Kind of sub-layer (``attn``, ``mlp``) to seconds for a multiply-accumulate of one row.
    """

    conditioning: float
    base: float
    per_mac: dict[str, float]

    def seconds(self, plan: Plan) -> float:
        """Of a trajectory."""
        macs = plan.config.slot_macs()
        slots = {name: self.per_mac[kind_of(name)] * count for name, count in macs.items()}
        computed = sum(
            slots[name] for call in plan.calls for name in plan.config.slots if name not in call.reads
        )
        return self.conditioning + len(plan.calls) * self.base + computed


def kind_of(slot: str) -> str:
    """``attn`` of ``07.attn``."""
    return slot.partition(".")[2]


def probes(config: ModelConfig) -> dict[str, StepGraph]:
    """The graphs to time: what they compute (a kind of sub-layer, or ``""``: nothing) and the graph."""
    kinds = dict.fromkeys(kind_of(slot) for slot in config.slots)
    return {
        kind: StepGraph(tuple(slot for slot in config.slots if kind_of(slot) != kind), ())
        for kind in ("", *kinds)
    }


def measure_costs(runner: Runner, config: ModelConfig, batch: int) -> CostModel:
    """Time the probes, the full call and the conditioning of a bundle that holds them.

    Args:
        runner: Of a bundle with the graphs of :func:`probes`.
        config: Its model.
        batch: Latents in one call.
    """
    manifest = runner.manifest
    graphs = {kind: graph.name for kind, graph in probes(config).items()}
    needed = len(manifest.calls) * (batch + (manifest.guidance is not None))
    rows = min(needed, _ROWS_AT_ONCE)
    seconds = _interleaved(
        {name: _runnable(runner, name, batch, rows) for name in (*graphs.values(), manifest.uncached)}
        | {CONDITIONING: _runnable(runner, CONDITIONING, batch, rows)}
    )
    base, full = seconds[graphs.pop("")], seconds[manifest.uncached]
    macs: dict[str, int] = {}
    for slot, count in config.slot_macs().items():
        macs[kind_of(slot)] = macs.get(kind_of(slot), 0) + count
    above = {kind: max(seconds[name] - base, 0.0) for kind, name in graphs.items()}
    if not any(above.values()):  # calls too short to tell apart
        above = dict(macs)
    scale = max(full - base, 0.0) / sum(above.values())
    per_mac = {kind: scale * above[kind] / macs[kind] for kind in above}
    return CostModel(seconds[CONDITIONING] * needed / rows, base, per_mac)


def _interleaved(runs: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median seconds of each, after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(1 + _REPEATS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: median(measured) for name, measured in times.items()}


def _runnable(runner: Runner, name: str, batch: int, conditions: int) -> Callable[[], None]:
    """A graph on random inputs of its own."""
    graph, rng = runner.manifest.graphs[name], np.random.default_rng(0)
    sizes = {"batch": batch, "rows": batch * runner.manifest.rows, "n": conditions}

    def shape(value: Value) -> tuple[int, ...]:
        return tuple(sizes[size] if isinstance(size, str) else size for size in value.shape)

    def filled(value: Value) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
        dtype = dtype_of(value.dtype)
        if dtype.kind == "i":
            return np.zeros(shape(value), dtype)
        return rng.standard_normal(shape(value), np.float32).astype(dtype)

    return runner.graph(name).bind(
        {value.name: filled(value) for value in graph.inputs},
        {value.name: np.empty(shape(value), dtype_of(value.dtype)) for value in graph.outputs},
    )
