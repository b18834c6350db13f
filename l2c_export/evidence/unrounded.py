"""An int8 bundle with activations that are not rounded, so that little is left that may differ.

Rounding to 8 bits hides wrong graphs: two caches taken for each other, or an update that is off by
1 %, move the results less than it does. The same graphs without it, in the same session with the same
buffers and updates, must come as near to the reference as a float32 bundle, or a float16 one where
that is what they compute in.
"""

from __future__ import annotations

from pathlib import Path

from l2c_export.core.bundle import Bundle
from l2c_export.errors import UnsupportedError
from l2c_export.runtime import Runner
from l2c_export.runtime.ort import OrtBackend

_ROUNDING = {"DynamicQuantizeLinear", "QuantizeLinear", "ConvInteger", "QLinearConv", "QLinearMatMul"}


def unrounded(bundle: Bundle, threads: int | None = None) -> Runner:
    """A runner of the bundle whose products take activations as they are, and weights as stored.

    Args:
        bundle: Of a precision that quantises activations when it runs; its files have been checked.
        threads: For each call; None is one for each core.
    """
    return Runner(bundle, _Unrounded(bundle, threads))


class _Unrounded(OrtBackend):
    """ONNX Runtime on the CPU, with graphs that were changed as they were read."""

    # folding constants would keep every weight in float32
    disabled_optimizers = (*OrtBackend.disabled_optimizers, "ConstantFolding")

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        super().__init__(bundle, threads, packed=False)
        self.version += ", activations unrounded"

    def _source(self, path: Path, packed: bool) -> bytes:
        return _without_rounding(path)


def _without_rounding(path: Path) -> bytes:
    """A graph that quantises no activation; everything else stays as it is."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    model = ir.load(path)
    graph = model.graph
    one = ir.node("Constant", [], {"value_float": 1.0})
    graph.insert_before(graph[0], one)
    for node in list(graph):
        if node.op_type == "DynamicQuantizeLinear":
            x, (values, scale, _) = node.inputs[0], node.outputs
            if x is not None:
                ir.convenience.replace_all_uses_with([values, scale], [x, one.outputs[0]])
        elif node.op_type == "MatMulInteger":
            x, weight, *_ = node.inputs  # what is left is the zero point of the rounding
            wide = ir.node("Cast", [weight], {"to": ir.DataType.FLOAT})
            product = ir.node("MatMul", [x, wide.outputs[0]])
            graph.insert_before(node, [wide, product])
            ir.convenience.replace_all_uses_with(node.outputs[0], product.outputs[0])
        elif node.op_type == "DequantizeLinear" and node.inputs[0] is not None:
            maker = node.inputs[0].producer()
            if maker is not None and maker.op_type == "QuantizeLinear" and maker.inputs[0] is not None:
                ir.convenience.replace_all_uses_with(node.outputs[0], maker.inputs[0])
    RemoveUnusedNodesPass()(model)
    if left := sorted({node.op_type for node in graph} & _ROUNDING):
        raise UnsupportedError(f"this release cannot take the rounding out of {left} in {path.name}")
    return ir.to_proto(model).SerializeToString()
