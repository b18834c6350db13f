"""One graph of a bundle at a time: run, compared with PyTorch, and counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime as ort
import tiny
import torch

from l2c_export.build.checkpoint import random_checkpoint
from l2c_export.core.bundle import CONDITIONING, Bundle
from l2c_export.core.models import ModelConfig
from l2c_export.evidence.reference import Reference

TOLERANCE = 1e-5
UNWANTED = {"Shape", "Size", "Range", "If", "Loop", "Scan", "NonZero", "ConstantOfShape", "Identity"}
Arrays = dict[str, np.ndarray]


def files(bundle: Bundle) -> dict[str, onnx.ModelProto]:
    """Every graph of a bundle, without its weights."""
    graphs = bundle.manifest.graphs
    return {n: onnx.load(bundle.path / g.file, load_external_data=False) for n, g in graphs.items()}


def run(bundle: Bundle, name: str, inputs: Mapping[str, np.ndarray]) -> Arrays:
    """One graph in plain ONNX Runtime, with its default options."""
    session = ort.InferenceSession(bundle.file(name), providers=["CPUExecutionProvider"])
    wanted = {v.name: inputs[v.name] for v in bundle.manifest.graphs[name].inputs}
    assert [i.name for i in session.get_inputs()] == list(wanted)
    names = [v.name for v in bundle.manifest.graphs[name].outputs]
    return dict(zip(names, session.run(names, wanted), strict=True))


def inputs_of(bundle: Bundle, batch: int, scale: float = 2.5, timestep: float = 321) -> Arrays:
    """What the full graph takes, from a seed."""
    manifest = bundle.manifest
    rng = np.random.default_rng(batch)
    labels = rng.integers(manifest.classes, size=batch)
    if manifest.guidance:
        labels = np.concatenate([labels, np.full(batch, manifest.guidance.null_label)])
    return {
        "x": rng.standard_normal((batch, *manifest.latent), dtype=np.float32),
        "timestep": np.full(len(labels), timestep, np.float32),
        "label": labels,
        "guidance_scale": np.array([scale], np.float32),
    }


def eager(config: ModelConfig, inputs: Arrays, *, guidance: bool = True) -> Arrays:
    """The same call in PyTorch."""
    state = dict(random_checkpoint(config, tiny.SEED).iter_tensors())
    x, labels = torch.from_numpy(inputs["x"]), torch.from_numpy(inputs["label"])[: len(inputs["x"])]
    output, branches = Reference(config, state, guidance).call(
        x, float(inputs["timestep"][0]), labels, float(inputs["guidance_scale"][0])
    )
    return {"output": output.numpy()} | {name: value.numpy() for name, value in branches.items()}


def assert_close(found: Arrays, expected: Arrays) -> None:
    assert found
    for name, value in found.items():
        assert value.dtype == np.float32
        assert np.abs(value - expected[name]).max() <= TOLERANCE * np.abs(expected[name]).max(), name


def conditioned(bundle: Bundle, inputs: Arrays) -> Arrays:
    """The inputs, and what the conditioning graph makes of them."""
    return inputs | run(bundle, CONDITIONING, inputs)


def count(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def macs(model: onnx.ModelProto, sizes: Mapping[str, int]) -> int:
    """Multiply-accumulates of a graph, from its own shapes, with sizes for the named dimensions."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = sizes[dim.dim_param]
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    shapes |= {t.name: list(t.dims) for t in model.graph.initializer}
    total = 0
    for node in model.graph.node:
        if node.op_type in ("Gemm", "MatMul", "Conv"):
            weight = shapes[node.input[1]]
            inner = {"Gemm": weight[1:], "MatMul": weight[-2:-1], "Conv": weight[1:]}[node.op_type]
            cost = math.prod(shapes[node.output[0]]) * math.prod(inner)
            assert cost, (node.name, shapes[node.output[0]], weight)
            total += cost
    return total
