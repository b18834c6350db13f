"""Linear layers with weights in 8 bits: the tensors that are stored, and the graphs that use them.

Weights are symmetric, with one scale for each output; stored as (in, out), the layout in which int8
matrix products take them, and in which TensorRT widens them inside of the product, without a transpose.

Where weights alone are in 8 bits, every layer widens them to float16 when it runs. In precision int8,
for CPUs, of the layers that meet x the activations are quantised as well, asymmetric to uint8 with one
scale for the tensor, chosen from the tensor itself at run time (``DynamicQuantizeLinear``). That needs
no calibration, and ONNX Runtime makes one kernel of it. Layers of that precision
that are no part of a branch compute in float32, their weights widened when they run: the modulation,
which meets a row and not its tokens, and the long skips, whose input is the residual stream itself,
where one scale for all values costs most accuracy.

In precision int8-static, for engines, the same layers of the branches quantise x symmetrically to int8
by ranges that were calibrated, one for each input channel; the weights are stored multiplied by them.
TensorRT makes an int8 product of QuantizeLinear, DequantizeLinear and Gemm only where their scales are
constants. So they are, all of them 1/128: x is divided by its ranges before, and the product multiplied
by the weights' scales after, in the kernels that run there anyway. Ranges and scales stay data, engines
serve every calibration, and what the product puts out, in float16, is below the number of its inputs
and cannot overflow.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from l2c_export.core.precision import Precision, StoredTensor, in_branch, range_name, scale_name

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""The dtypes that are stored with scales, and the largest magnitude that each is used for."""


def quantize(weight: Tensor, dtype: str = "int8", scales: str = "float32") -> tuple[Tensor, Tensor]:
    """Round a weight to 8 bits.

    Args:
        weight: (out, in) float32.
        dtype: A key of :data:`LARGEST`.
        scales: Dtype of the scales; values are rounded to steps of what this has left of them.

    Returns:
        (in, out) in ``dtype``, and the (out,) scale of each output.
    """
    largest = LARGEST[dtype]
    scale = (weight.abs().amax(dim=1) / largest).to(getattr(torch, scales))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    steps = (weight / scale.float()[:, None]).clamp_(-largest, largest)
    narrow = steps.round_() if dtype == "int8" else steps
    return narrow.to(getattr(torch, dtype)).T.contiguous(), scale


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """(in, out) in 8 bits and (out,) scales to (out, in) float32."""
    return (weight.float() * scale.float()).T.contiguous()


def quantize_graph(graph: ir.Graph, tensors: Mapping[str, StoredTensor], precision: Precision) -> None:
    """Rewrite every Gemm whose weight is stored in 8 bits; outputs keep their names.

    Args:
        graph: Initializers are named and typed as they are stored, scales among them.
        tensors: What the weights file holds.
        precision: Of the file.
    """
    for node in list(graph):
        if node.op_type != "Gemm":
            continue
        _, weight, *_ = node.inputs
        name = str(weight.name) if weight is not None else ""
        if name not in tensors or tensors[name].dtype not in LARGEST:
            continue
        scale = graph.initializers[scale_name(name)]
        if precision.dynamic and in_branch(name):
            made = _dynamic(node, scale)
        elif precision.calibrated and in_branch(name):
            made = _calibrated(graph, node, scale, graph.initializers[range_name(name)])
        else:
            made = _weight_only(node, scale)
        out, last = node.outputs[0], made[-1].outputs[0]
        last.name, last.shape, last.type = out.name, out.shape, out.type
        graph.insert_before(node, made)
        ir.convenience.replace_all_uses_with(out, last, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _weight_only(node: ir.Node, scale: ir.Value) -> list[ir.Node]:
    x, weight, *bias = node.inputs
    wide = ir.node("DequantizeLinear", [weight, scale], {"axis": 1})
    return _named(node, [wide, ir.node("Gemm", [x, wide.outputs[0], *bias])])


def _dynamic(node: ir.Node, scale: ir.Value) -> list[ir.Node]:
    """Quantise x to uint8, multiply in int8, and go back; ONNX Runtime makes one kernel of it."""
    x, weight, *bias = node.inputs
    narrow = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
    values, x_scale, zero = narrow.outputs
    product = ir.node("MatMulInteger", [values, weight, zero])
    wide = ir.node("Cast", [product.outputs[0]], {"to": ir.DataType.FLOAT})
    scales = ir.node("Mul", [x_scale, scale])
    made = [narrow, product, wide, scales, ir.node("Mul", [wide.outputs[0], scales.outputs[0]])]
    if bias:
        made.append(ir.node("Add", [made[-1].outputs[0], *bias]))
    return _named(node, made)


def _calibrated(graph: ir.Graph, node: ir.Node, scale: ir.Value, ranges: ir.Value) -> list[ir.Node]:
    """Divide x by its ranges, quantise and multiply in 128ths, and go back."""
    x, weight, *bias = node.inputs
    step, steps = (_constant(graph, f"int8.{n}", np.float16(n)) for n in (1 / 128, 128))
    zero = _constant(graph, "int8.zero", np.int8(0))
    limits = ir.node("Cast", [ranges], {"to": ir.DataType.FLOAT16})
    part = ir.node("Div", [x, limits.outputs[0]])
    narrow = ir.node("QuantizeLinear", [part.outputs[0], step, zero])
    parts = ir.node("DequantizeLinear", [narrow.outputs[0], step, zero])
    weights = ir.node("DequantizeLinear", [weight, step, zero])
    product = ir.node("Gemm", [parts.outputs[0], weights.outputs[0]])
    scales = ir.node("Mul", [scale, steps])
    wide = ir.node("Mul", [product.outputs[0], scales.outputs[0]])
    made = [limits, part, narrow, parts, weights, product, scales, wide]
    if bias:
        made.append(ir.node("Add", [wide.outputs[0], *bias]))
    return _named(node, made)


def _constant(graph: ir.Graph, name: str, number: np.generic) -> ir.Value:
    """A scalar initializer, made once."""
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(number), name=name)
        made = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype))
        made.shape = ir.Shape([])
        graph.register_initializer(made)
    return graph.initializers[name]


def _named(node: ir.Node, made: list[ir.Node]) -> list[ir.Node]:
    """Names that are the same in every build."""
    for i, new in enumerate(made):
        new.name = f"{node.name}.{i}"
        for k, value in enumerate(new.outputs):
            value.name = f"{new.name}.{k}"
    return made
