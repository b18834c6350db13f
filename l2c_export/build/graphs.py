"""Split the full graph by what depends on x, and cut one step graph for each distinct call.

Neither looks at names or operators: the split follows data dependency, a cut is a choice of inputs
and outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from l2c_export.core.bundle import CONDITIONING, Graph, Value
from l2c_export.core.plan import StepGraph

_CONDITIONS = ("timestep", "label")


@dataclass(frozen=True)
class Split:
    """The two halves of a full graph.

    Attributes:
        conditioning: Inputs ``timestep`` (n,) float32 and ``label`` (n,) int64; output
            ``conditioning`` (n, K): everything that depends on them alone and that x meets.
        step: The rest, with ``conditioning`` (rows, K) as an input; every slot is an output.
    """

    conditioning: ir.Model
    step: ir.Model


def split(full: ir.Model) -> Split:
    """Split off what does not depend on x.

    Each row of the conditioning depends on that row's timestep and label only, so one run in a
    batch serves all calls of a trajectory, and its weights are read once.
    """
    model = full.clone()
    graph = model.graph
    on_x = _dependents(graph, [v for v in graph.inputs if v.name not in _CONDITIONS])
    on_condition = _dependents(graph, [v for v in graph.inputs if v.name in _CONDITIONS])
    frontier = [
        value
        for node in graph
        for value in node.outputs
        if value in on_condition
        and value not in on_x
        and any(use.node.outputs[0] in on_x for use in value.uses())
    ]
    sizes = [_row_size(value) for value in frontier]
    conditioning = _conditioning_graph(full, [_name(v) for v in frontier], sizes)
    rows = frontier[0].shape[0]  # type: ignore[index]
    packed = ir.Value(
        name=CONDITIONING,
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([rows, sum(sizes)]),
    )
    ends = np.cumsum(sizes).tolist()
    axis, first = _constant(graph, "conditioning.axis", [1]), graph[0]
    for value, begin, end in zip(frontier, [0, *ends], ends, strict=False):
        bounds = [_constant(graph, f"conditioning.{at}", [at]) for at in (begin, end)]
        shape = [-1, *value.shape[1:]]  # type: ignore[index]
        part = ir.node("Slice", [packed, *bounds, axis])
        whole = ir.node("Reshape", [part.outputs[0], _constant(graph, f"shape.{shape[1:]}", shape)])
        part.outputs[0].name, whole.outputs[0].name = f"{value.name}.row", f"{value.name}.part"
        whole.outputs[0].shape, whole.outputs[0].type = value.shape, value.type
        graph.insert_before(first, [part, whole])
        for use in list(value.uses()):
            if use.node.outputs[0] in on_x:
                use.node.replace_input_with(use.idx, whole.outputs[0])
    kept = [v for v in graph.inputs if v.name not in _CONDITIONS]
    graph.inputs[:] = [kept[0], packed, *kept[1:]]
    return Split(
        conditioning,
        _subgraph(model, [_name(v) for v in graph.inputs], [_name(v) for v in graph.outputs]),
    )


def cut(split_model: ir.Model, step: StepGraph) -> ir.Model:
    """Cut one step graph: slots it reads become inputs, slots it writes outputs, the rest goes."""
    inputs = [_name(v) for v in split_model.graph.inputs]
    model = _subgraph(split_model, [*inputs, *step.reads], ["output", *step.writes])
    model.graph.name = step.name
    dead = [v.name for v in model.graph.inputs if not v.uses()]
    if set(dead) & set(step.reads):
        raise AssertionError(f"cache inputs {dead} have no consumer: the full graph's cuts are wrong")
    return model


def interface(file: str, model: ir.Model) -> Graph:
    """A graph's inputs and outputs for the manifest."""
    inputs, outputs = (
        tuple(map(Value.of, values)) for values in (model.graph.inputs, model.graph.outputs)
    )
    return Graph(file, inputs, outputs)


def _conditioning_graph(full: ir.Model, frontier: list[str], sizes: list[int]) -> ir.Model:
    model = _subgraph(full, list(_CONDITIONS), frontier)
    graph = model.graph
    graph.name = CONDITIONING
    parts = []
    for value, size in zip(list(graph.outputs), sizes, strict=True):
        flat = ir.node("Reshape", [value, _constant(graph, f"shape.{size}", [-1, size])])
        flat.outputs[0].name = f"{value.name}.row"
        graph.append(flat)
        parts.append(flat.outputs[0])
    joined = ir.node("Concat", parts, {"axis": 1})
    joined.outputs[0].name = CONDITIONING
    graph.append(joined)
    graph.outputs[:] = [joined.outputs[0]]
    joined.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    joined.outputs[0].shape = ir.Shape(["n", sum(sizes)])
    for value in graph.inputs:
        value.shape = ir.Shape(["n"])
    for node in graph:  # shapes said "rows"; here any number of rows may come
        for value in node.outputs:
            if value is not joined.outputs[0]:
                value.shape = None
    return model


def _subgraph(model: ir.Model, inputs: list[str], outputs: list[str]) -> ir.Model:
    graph = ir.convenience.extract(model.graph, inputs, outputs)
    graph.opset_imports.update(model.graph.opset_imports)
    held = dict(graph.initializers)  # in the order of a set of objects: another in every process
    graph.initializers.clear()
    graph.initializers.update({name: held[name] for name in model.graph.initializers if name in held})
    return ir.Model(graph, ir_version=model.ir_version, producer_name=model.producer_name)


def _dependents(graph: ir.Graph, roots: list[ir.Value]) -> set[ir.Value]:
    found = set(roots)
    for node in graph:  # in topological order
        if any(value in found for value in node.inputs):
            found |= set(node.outputs)
    return found


def _row_size(value: ir.Value) -> int:
    sizes = list(value.shape or ())[1:]
    fixed = [d for d in sizes if isinstance(d, int)]
    if value.shape is None or len(fixed) != len(sizes):
        raise AssertionError(f"{value.name} meets x with the shape {value.shape}, not (rows, sizes)")
    return math.prod(fixed)


def _constant(graph: ir.Graph, name: str, values: list[int]) -> ir.Value:
    """An int64 initializer, made once for each name."""
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(values, np.int64), name=name)
        made = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype))
        made.shape = ir.Shape([len(values)])
        graph.register_initializer(made)
    return graph.initializers[name]


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name
