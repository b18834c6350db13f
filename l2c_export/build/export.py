"""Export a model once: PyTorch to one ONNX graph in which every slot is a named output.

The model is traced on the meta device, so no weight is in memory: graphs are code, weights are data.
The initializers are references into ``weights.safetensors``, by the parameter names and in the layout
of the official checkpoints.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnxscript import opset20 as op
from torch import Tensor, nn

from l2c_export.build.models import build_model, guide
from l2c_export.build.precision import cast_model
from l2c_export.build.quantize import quantize_graph
from l2c_export.build.weights import WeightsLayout
from l2c_export.core.models import ModelConfig
from l2c_export.core.precision import FLOAT32, Precision

OPSET = 20


class Guided(nn.Module):
    """One call as the sampler sees it: guidance inside, every branch an output."""

    def __init__(self, config: ModelConfig, guidance: bool, precision: Precision = FLOAT32) -> None:
        super().__init__()
        self.model = build_model(config)
        cast_model(self.model, config, precision)
        self.guidance = guidance

    def forward(
        self, x: Tensor, timestep: Tensor, label: Tensor, guidance_scale: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Predict noise for (B, C, S, S) latents; timestep and label have a value for each row."""
        config = self.model.config
        rows = torch.cat([x, x]) if self.guidance else x
        out, branches = self.model(rows, timestep, label)
        if guidance_scale is None:
            return out[:, : config.in_channels], *branches.values()
        return guide(out, guidance_scale, config), *branches.values()


def export_full(
    config: ModelConfig, layout: WeightsLayout, *, guidance: bool, batch: tuple[int, int]
) -> ir.Model:
    """Export the whole network.

    Args:
        config: The model.
        layout: Where each parameter lies in the weights file, and in which precision.
        guidance: Whether conditional and unconditional rows are batched inside.
        batch: Smallest and largest number of latents; equal ones fix the shape.

    Returns:
        Graph ``full``: inputs ``x`` (batch, C, S, S), ``timestep`` (rows,) float32, ``label``
        (rows,) int64 and, with guidance, ``guidance_scale`` (1,); outputs ``output``
        (batch, C, S, S) and one (rows, N, D) for each slot, under the slot's name and in the
        precision's dtype. The others are float32 in every precision.
    """
    program = _trace(config, guidance, layout.precision)
    model = program.model
    for value in model.graph.initializers.values():
        if isinstance(raw := getattr(value.const_value, "raw", None), Tensor) and raw.is_meta:
            value.const_value = None  # a parameter: data that the optimizer must not look for
    with _quiet():
        onnxscript.optimizer.optimize(model)
    _reference_weights(model.graph, layout)
    quantize_graph(model.graph, layout.tensors, layout.precision)
    _clean(model, {"rows": 2, "batch": 1} if guidance else {"batch": 1}, batch)
    return model


def _trace(config: ModelConfig, guidance: bool, precision: Precision) -> torch.onnx.ONNXProgram:
    with torch.device("meta"):
        module = Guided(config, guidance, precision).eval()
        batch = torch.export.Dim("batch", min=1, max=4096)
        rows: Any = 2 * batch if guidance else batch
        r = 4 if guidance else 2  # an example of 2 latents; 0 and 1 would be specialised
        inputs = [
            torch.zeros(2, *config.latent_shape),
            torch.zeros(r),
            torch.zeros(r, dtype=torch.int64),
        ]
        shapes: list[Any] = [{0: batch}, {0: rows}, {0: rows}]
        if guidance:
            inputs.append(torch.zeros(1))
            shapes.append(None)
        names = ["x", "timestep", "label", "guidance_scale"][: len(inputs)]
        with _quiet(), torch.no_grad():
            traced = torch.export.export(module, tuple(inputs), dynamic_shapes=tuple(shapes))
            program = torch.onnx.export(
                traced,
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                output_names=["output", *config.slots],
                optimize=False,
                verbose=False,
                custom_translation_table={
                    torch.ops.aten.linear.default: _linear,
                    torch.ops.aten.scaled_dot_product_attention.default: _attention,
                },
            )
    assert program is not None
    return program


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Linear as a flat Gemm with the weight in PyTorch's own layout.

    TensorRT fuses bias and activation into this form even where the weight is a network input;
    ONNX Runtime on a CPU is as fast as with MatMul.
    """
    size, width = (int(n) for n in weight.shape)
    if len(x.shape) == 2:
        return op.Gemm(x, weight, bias, transB=1)
    flat = _reshape(x, [-1, width])
    inner = [int(n) for n in x.shape[1:-1]]
    return _reshape(op.Gemm(flat, weight, bias, transB=1), [-1, *inner, size])


def _reshape(x: Any, shape: list[int]) -> Any:
    target: Any = op.Constant(value_ints=shape)
    return op.Reshape(x, target)


def _attention(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
    """Attention without a mask, free of shape arithmetic."""
    if args or kwargs:
        raise AssertionError(f"only plain attention is translated, not {args} {kwargs}")
    dtype: ir.DataType = q.dtype
    scale = np.array(int(q.shape[-1]) ** -0.5, dtype.numpy())
    constant: Any = ir.tensor(scale)
    scaled = op.Mul(q, op.Constant(value=constant))
    scores = op.MatMul(scaled, op.Transpose(k, perm=[0, 1, 3, 2]))
    if dtype == ir.DataType.FLOAT:
        return op.MatMul(op.Softmax(scores, axis=-1), v)
    wide: Any = op.Cast(scores, to=ir.DataType.FLOAT)
    weights: Any = op.Softmax(wide, axis=-1)
    return op.MatMul(op.Cast(weights, to=dtype), v)


def _reference_weights(graph: ir.Graph, layout: WeightsLayout) -> None:
    """Point every parameter at its bytes in the weights file; Gemm biases become (1, out)."""
    for name, value in list(graph.initializers.items()):
        if not name.startswith("model."):
            continue
        shape = layout.tensors[name.removeprefix("model.")].shape
        if any(use.node.op_type == "Gemm" and use.idx == 2 for use in value.uses()):
            shape = (1, *shape)
        graph.initializers.pop(name)
        value.name = name.removeprefix("model.")
        value.const_value = layout.reference(value.name, shape)
        value.shape, value.dtype = ir.Shape(shape), value.const_value.dtype
        graph.initializers[value.name] = value
    for name, stored in layout.tensors.items():
        if name != stored.parameter:
            held = layout.reference(name, stored.shape)
            scale = ir.Value(name=name, const_value=held, type=ir.TensorType(held.dtype))
            scale.shape = ir.Shape(stored.shape)
            graph.register_initializer(scale)


def _clean(model: ir.Model, axes: dict[str, int], batch: tuple[int, int]) -> None:
    """Drop the exporter's notes, and name or fix the symbolic dimensions."""
    symbol = str(model.graph.inputs[0].shape[0])  # type: ignore[index]
    names = {(symbol if factor == 1 else f"{factor}*{symbol}"): name for name, factor in axes.items()}
    fixed = {name: axes[name] * batch[0] for name in axes} if batch[0] == batch[1] else {}
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    for value in values:
        value.metadata_props.clear()
        value.meta.clear()
        if value.shape is None:
            continue
        dims: list[int | str | None] = []
        for dim in value.shape:
            name = names.get(str(dim)) if not isinstance(dim, int) else None
            dims.append(dim if isinstance(dim, int) else fixed.get(name, name) if name else None)
        value.shape = ir.Shape(dims)
    for node in model.graph:
        node.metadata_props.clear()
        node.meta.clear()
        node.doc_string = None
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.name = "full"
    model.producer_name, model.producer_version = "l2c-export", None
    model.functions.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's advice to its own developers off the user's screen."""
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript", "onnx_ir")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
