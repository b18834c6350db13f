"""Networks that serve every schedule: one for each kind of sub-layer, bound to the weights of each.

The step graph in which nothing is reused falls into stages by data dependency: stage k is what depends
on slot k - 1 but not on slot k. It adds a slot to the residual stream, and goes on to its own slot
where a call computes that. So each stage has a network that computes its slot, and one that only
advances what later stages read. With weights and conditioning as inputs, under names that say positions
alone, the stages of most blocks have the same networks, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from l2c_export.core.bundle import CONDITIONING, Bundle
from l2c_export.core.sublayers import CARRIED, Piece, Stage
from l2c_export.engines.network import Network, engine_network, input_rule, model_bytes, values_of
from l2c_export.engines.trace import Trace
from l2c_export.errors import UnsupportedError

_NONE = "there are no engines for each kind of sub-layer of this bundle"


@dataclass(frozen=True)
class Sublayers:
    """A bundle's networks for every schedule.

    Attributes:
        networks: Name to network: the conditioning, whose parts are outputs of their own, and then
            those of the stages.
        stages: In the order of a call.
    """

    networks: dict[str, Network]
    stages: tuple[Stage, ...]


def cut_sublayers(bundle: Bundle) -> Sublayers:
    """Cut the uncached step graph of a bundle into stages.

    Raises:
        UnsupportedError: A slot does not depend on the one before it, or the conditioning is not
            taken in slices.
    """
    manifest = bundle.manifest
    graph = ir.load(bundle.file(manifest.uncached)).graph
    cuts = _cuts(graph, manifest.slots.names, input_rule(manifest))
    buffers = _buffers(cuts)
    networks = {CONDITIONING: _conditioning(bundle, cuts)}
    names: dict[bytes, str] = {}

    def piece(trace: Trace, name: str) -> Piece:
        network = trace.network(manifest.rows)
        name = names.setdefault(network.model, name)
        networks.setdefault(name, network)
        return Piece(name, {ours: buffers.get(theirs, theirs) for ours, theirs in trace.names.items()})

    stages = []
    for slot, cut in zip((*manifest.slots.names, ""), cuts, strict=True):
        compute = piece(cut.compute, f"compute-{slot or 'output'}")
        advance = piece(cut.advance, f"advance-{slot}") if cut.advance is not None else None
        stages.append(Stage(slot, compute, advance))
    return Sublayers(networks, tuple(stages))


@dataclass(frozen=True)
class _Cut:
    """A stage of the step graph.

    Attributes:
        compute: What gives its slot, and what it hands on.
        advance: What gives only the latter; None where there is nothing.
        carried: Values that it hands on.
    """

    compute: Trace
    advance: Trace | None
    carried: list[ir.Value]


def _stages(graph: ir.Graph, slots: tuple[str, ...]) -> dict[ir.Value, int]:
    """Value to how many slots come before it; what does not depend on x is not among them."""
    found = {graph.inputs[0]: 0}
    for node in graph:  # in topological order
        before = [found[v] + (v.name in slots) for v in node.inputs if v is not None and v in found]
        if before:
            found |= dict.fromkeys(node.outputs, max(before))
    at = {value.name: stage for value, stage in found.items()}
    if [at.get(name) for name in slots] != list(range(len(slots))):
        raise UnsupportedError(f"{_NONE}: a slot does not depend on the one before it")
    return found


def _cuts(graph: ir.Graph, slots: tuple[str, ...], outside: Callable[[ir.Value], bool]) -> list[_Cut]:
    """The stages, found from the last to the first, as a stage hands on what later ones read.

    No parameter is inside of a stage that others may share a network with.
    """
    stage_of = _stages(graph, slots)
    by_name = {value.name: value for value in stage_of}
    ends = [*(by_name[slot] for slot in slots), graph.outputs[0]]
    read: set[ir.Value] = set()
    cuts = []
    for stage in reversed(range(len(ends))):
        on = [v for v in stage_of if v in read and stage_of[v] == stage]
        rule = _always if 0 < stage < len(slots) else outside
        compute = Trace(stage_of, stage, rule, [ends[stage], *on])
        cuts.append(_Cut(compute, Trace(stage_of, stage, rule, on) if on else None, on))
        read |= {v for v in compute.read if v.name not in slots and v.producer() is not None}
    return cuts[::-1]


def _always(_: ir.Value) -> bool:
    return True


def _buffers(cuts: list[_Cut]) -> dict[str, str]:
    """Value that is handed on to its buffer, which is free again after the last stage that reads it."""
    last = {value: stage for stage, cut in enumerate(cuts) for value in cut.compute.read}
    held: dict[str, str] = {}
    free: dict[str, list[str]] = {}
    ends: dict[int, list[tuple[str, str]]] = {}
    for stage, cut in enumerate(cuts):
        for value in cut.carried:
            kind = f"{value.dtype}{value.shape}"
            waiting = free.setdefault(kind, [])
            buffer = waiting.pop() if waiting else f"{CARRIED}{len(set(held.values()))}"
            held[str(value.name)] = buffer
            ends.setdefault(last[value], []).append((kind, buffer))
        for kind, buffer in ends.pop(stage, []):
            free[kind].append(buffer)
    return held


def _conditioning(bundle: Bundle, cuts: list[_Cut]) -> Network:
    """The conditioning with each part as an output (n, size), instead of side by side in one.

    The rows that one part has in one call are then together, as a stage wants them.
    """
    parts = {name: size for cut in cuts for name, size in cut.compute.parts}
    whole = engine_network(bundle, CONDITIONING)
    model = ir.from_proto(onnx.load_from_string(whole.model))
    joined = model.graph.outputs[0].producer()
    order = sorted(parts, key=lambda name: int(name.rpartition(".")[2]))
    if joined is None or joined.op_type != "Concat" or len(joined.inputs) != len(order):
        raise UnsupportedError(f"{_NONE}: the conditioning is not made of the parts that are taken")
    outputs = [value for value in joined.inputs if value is not None]
    model.graph.outputs[:] = outputs
    model.graph.remove(joined, safe=True)
    for value, name in zip(outputs, order, strict=True):
        value.name = name
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", parts[name]])
    return Network(model_bytes(model), whole.inputs, whole.weights, values_of(outputs), whole.constants)
