"""The networks that engines are built from: a bundle's graphs with their weights as network inputs.

A backend shares no weights between engines. A network that takes them as inputs has none inside: all
engines of a bundle are bound to one copy of ``weights.safetensors`` on the device, and TensorRT fuses
bias and activation into a Gemm with the weight in PyTorch's layout, transB = 1 and a (1, out) bias, as
it does with constants. These very files also run in plain ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_ir as ir

from l2c_export.core.bundle import Bundle, Manifest, Value
from l2c_export.core.engines import update_terms
from l2c_export.core.models import config_from_json
from l2c_export.core.precision import in_block_linear, precision_of, stored_tensors

OPSET = 20

INLINED = 2 << 20
"""Bytes up to which a parameter that no matrix product reads stays inside the engine as a constant:
convolutions, position embeddings, norms. What kernels read piece by piece is better known to them."""


@dataclass(frozen=True)
class Network:
    """An ONNX network and its interface.

    Attributes:
        model: Serialised ``ModelProto``.
        inputs: What a call binds, in order; dimensions as in the manifest.
        weights: Parameters that are inputs after those, under their names in ``weights.safetensors``
            and with the shape that the network wants: a bias of a Gemm has a leading 1.
        outputs: In order.
        constants: Parameters that are constants of the model, under their names and with their shapes.
    """

    model: bytes
    inputs: tuple[Value, ...]
    weights: tuple[Value, ...]
    outputs: tuple[Value, ...]
    constants: tuple[Value, ...] = ()


def engine_network(bundle: Bundle, graph: str, constant: bool = False) -> Network:
    """A graph of a bundle with its large weights as inputs.

    Every operand of a matrix product becomes an input, with its scales, ranges and bias, as do other
    parameters of more than :data:`INLINED` bytes; the rest become constants of the model.

    Args:
        bundle: A bundle; its weights file is read only for the constants.
        graph: Name of one of its graphs.
        constant: Make all parameters constants, and leave them where they are: external data in the
            folder of the bundle.
    """
    model = ir.load(bundle.file(graph))
    inputs, outputs = values_of(model.graph.inputs), values_of(model.graph.outputs)
    outside = input_rule(bundle.manifest)
    weights, constants = [], []
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape)
        if not constant and outside(value):
            del model.graph.initializers[name]
            value.const_value = None
            model.graph.inputs.append(value)
            weights.append(value)
            continue
        if not constant:
            value.const_value = ir.tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=name)
        constants.append(value)
    return Network(model_bytes(model), inputs, values_of(weights), outputs, values_of(constants))


def narrow_products(network: Network) -> Network:
    """Compute the products that are left in float32 in float16, for devices that have no others.

    Turing has none in TensorRT-RTX. In a float16 bundle they are few and small: the timestep's
    embedding and the final layer. Inputs and outputs stay what they are; operands are cast at each run.
    """
    model = ir.from_proto(onnx.load_from_string(network.model))
    for node in list(model.graph):
        wide = [v for v in node.inputs if v is not None and v.dtype == ir.DataType.FLOAT]
        if node.op_type != "Gemm" or len(wide) != len(node.inputs):
            continue
        for i, value in enumerate(wide):
            narrow = _cast(value, ir.DataType.FLOAT16, f"{node.name}.narrow.{i}")
            model.graph.insert_before(node, narrow)
            node.replace_input_with(i, narrow.outputs[0])
        (out,) = node.outputs
        uses, shape = list(out.uses()), out.shape
        widen = _cast(out, ir.DataType.FLOAT, f"{node.name}.widen")
        widen.outputs[0].shape = shape
        out.type = ir.TensorType(ir.DataType.FLOAT16)
        model.graph.insert_after(node, widen)
        for use in uses:
            use.node.replace_input_with(use.idx, widen.outputs[0])
    return replace(network, model=model_bytes(model))


def _cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    made = ir.node("Cast", [value], {"to": int(to)}, name=name)
    made.outputs[0].name, made.outputs[0].type = name, ir.TensorType(to)
    return made


def update_network(manifest: Manifest) -> Network:
    """The sampler's update of the latent as a network; one serves all calls.

    Inputs: the sources of :func:`l2c_export.core.engines.update_terms` under their names, each
    (batch, C, H, W) float32, then ``coefficients`` (targets, sources) float32. Outputs: each target
    with ``.next`` after its name: sum over sources of coefficient times source, in that order. A
    coefficient of 0 multiplies its source all the same, so a source must never hold NaN or infinity.
    """
    targets, sources = update_terms(manifest)
    low, high = manifest.batch
    shape = ir.Shape([low if low == high else "batch", *manifest.latent])
    kind = ir.TensorType(ir.DataType.FLOAT)
    held = {name: ir.Value(name=name, type=kind, shape=shape) for name in sources}
    table = ir.Value(name="coefficients", type=kind, shape=ir.Shape([len(targets), len(sources)]))
    shape_of_all = _integers("flat", [-1])
    flat = ir.node("Reshape", [table, shape_of_all], name="flatten")
    count = len(targets) * len(sources)
    split = {"axis": 0, "num_outputs": count}
    parts = ir.node("Split", [flat.outputs[0]], split, num_outputs=count, name="split")
    nodes, outputs = [flat, parts], []
    coefficients = iter(parts.outputs)
    for target in targets:
        terms = [
            ir.node("Mul", [held[source], next(coefficients)], name=f"{target}.{source}")
            for source in sources
        ]
        nodes += terms
        total = terms[0].outputs[0]
        for i, term in enumerate(terms[1:]):
            nodes.append(ir.node("Add", [total, term.outputs[0]], name=f"{target}.sum.{i}"))
            total = nodes[-1].outputs[0]
        total.name, total.type, total.shape = f"{target}.next", kind, shape
        outputs.append(total)
    graph = ir.Graph(
        [*held.values(), table],
        outputs,
        nodes=nodes,
        initializers=[shape_of_all],
        opset_imports={"": OPSET},
        name="update",
    )
    model = ir.Model(graph, ir_version=10, producer_name="l2c-export")
    return Network(model_bytes(model), values_of(graph.inputs), (), values_of(outputs))


def input_rule(manifest: Manifest) -> Callable[[ir.Value], bool]:
    """Whether a stored parameter of a step graph becomes an input of its network."""
    linears = _block_linears(manifest)

    def outside(value: ir.Value) -> bool:
        tensor = value.const_value
        large = tensor is not None and tensor.nbytes > INLINED
        return large or value.name in linears or _multiplied(value)

    return outside


def _block_linears(manifest: Manifest) -> set[str]:
    """What is stored of the blocks' linear layers, where products do not read all of it."""
    precision = precision_of(manifest.precision)
    if not precision.scaled:
        return set()
    config = config_from_json(manifest.model, "model")
    shapes, stored = config.parameters(), stored_tensors(config, precision)
    return {name for name, held in stored.items() if in_block_linear(held.parameter, shapes)}


def _multiplied(value: ir.Value) -> bool:
    """Whether a matrix product reads it, as weight or bias."""
    return any(use.node.op_type in ("Gemm", "MatMul") for use in value.uses())


def _integers(name: str, values: list[int]) -> ir.Value:
    tensor = ir.tensor(np.array(values, np.int64), name=name)
    return ir.Value(
        name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape([len(values)])
    )


def model_bytes(model: ir.Model) -> bytes:
    """A model serialised: the same bytes for the same model."""
    return ir.to_proto(model).SerializeToString(deterministic=True)


def values_of(of: Iterable[ir.Value]) -> tuple[Value, ...]:
    """Values of a graph as manifests and records have them."""
    return tuple(map(Value.of, of))
