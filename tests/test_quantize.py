"""int8: the numbers that are stored, the form of the graphs, and what it does to a model."""

import json
import shutil

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny
import torch
from click.testing import CliRunner
from test_verify import consistent

from l2c_export.build.build import build_bundle
from l2c_export.build.checkpoint import random_checkpoint
from l2c_export.build.quantize import LARGEST, dequantize, quantize
from l2c_export.cli import cli
from l2c_export.core.bundle import CONDITIONING, WEIGHTS
from l2c_export.engines.build import EngineBuild, EngineRequest
from l2c_export.errors import UnsupportedError
from l2c_export.evidence.reference import bundle_reference
from l2c_export.evidence.verify import Settings, verify
from l2c_export.runtime import Runner


def test_a_weight_is_off_by_half_a_step_of_its_output_at_most():
    weight = torch.randn(6, 16) * torch.tensor([1e-6, 0.1, 1.0, 10.0, 1e6, 0.0])[:, None]
    stored, scale = quantize(weight)
    assert (stored.dtype, stored.shape, scale.shape) == (torch.int8, (16, 6), (6,))
    assert stored.abs().amax(dim=0).tolist() == [127] * 5 + [0]
    error = (dequantize(stored, scale) - weight).abs().amax(dim=1)
    assert (error <= scale * 0.5001).all()


@pytest.mark.parametrize(("dtype", "half_step"), [("int8", 0.5 / 127), ("float8_e4m3fn", 1 / 16)])
def test_a_weight_with_half_scales_is_off_by_half_a_step_at_most(dtype, half_step):
    weight = torch.randn(6, 16) * torch.tensor([1e-9, 1e-3, 0.1, 1.0, 1e3, 0.0])[:, None]
    stored, scale = quantize(weight, dtype, "float16")
    assert (stored.dtype, stored.shape, scale.dtype) == (getattr(torch, dtype), (16, 6), torch.float16)
    assert torch.isfinite(stored.float()).all()
    error = (dequantize(stored, scale) - weight).abs().amax(dim=1)
    largest = weight.abs().amax(dim=1)
    normal = largest / LARGEST[dtype] > 6.2e-5  # float16's, below which scales lose digits
    assert (error <= largest * half_step * 1.1)[normal].all()
    assert normal.tolist() == [False, False, True, True, True, False]
    assert (error[1] / largest[1]) < half_step * 1.2
    assert error[0] < 1e-8, "too small for a scale"


def test_layers_that_meet_x_multiply_in_int8_and_the_modulation_does_not(int8_bundle):
    full = ir.load(int8_bundle.file("full")).graph
    weights = {str(n.inputs[1].name) for n in full if n.op_type == "MatMulInteger"}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert weights == {f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in layers}
    widened = {str(n.inputs[0].name) for n in full if n.op_type == "DequantizeLinear"}
    assert widened == {f"blocks.{i}.adaLN_modulation.1.weight" for i in (0, 1)}
    step = ir.load(int8_bundle.file(int8_bundle.manifest.uncached)).graph
    assert "DequantizeLinear" not in {n.op_type for n in step}
    assert "MatMulInteger" not in {n.op_type for n in ir.load(int8_bundle.file(CONDITIONING)).graph}


def test_onnxruntime_makes_one_kernel_of_each_layer(int8_bundle, tmp_path):
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    path = int8_bundle.file(int8_bundle.manifest.uncached)
    ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    kinds = [node.op_type for node in nodes]
    assert kinds.count("DynamicQuantizeMatMul") == 8
    assert not {"MatMulInteger", "DynamicQuantizeLinear"} & set(kinds)
    fused = [node for node in nodes if node.op_type == "DynamicQuantizeMatMul"]
    assert all(len(node.input) == 5 and node.input[4] for node in fused), "biases are in the kernel"


def test_the_reference_has_the_weights_that_were_stored(int8_bundle):
    made = dict(bundle_reference(int8_bundle).model.named_parameters())
    original = dict(random_checkpoint(tiny.CONFIG, tiny.SEED).iter_tensors())
    for name, tensor in original.items():
        stored, scale = quantize(tensor) if tensor.ndim == 2 else (None, None)
        exact = "blocks" not in name or tensor.ndim == 1
        expected = tensor if exact else dequantize(stored, scale)
        assert torch.equal(made[name], expected), name


@pytest.mark.parametrize("name", ["int8-weights", "float8-weights"])
def test_weights_in_8_bits_are_widened_to_float16_for_every_layer_of_the_blocks(
    tiny_files, tmp_path, name
):
    made = build_bundle(tmp_path / "b", tiny.request(tiny.plan(tiny_files, precision=name)))
    full = ir.load(made.file("full")).graph
    widened = {str(n.outputs[0].name): n for n in full if n.op_type == "DequantizeLinear"}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    weights = {f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in layers}
    assert {str(n.inputs[0].name) for n in widened.values()} == weights
    assert {str(n.inputs[0].const_value.dtype) for n in widened.values()} == {
        {"int8-weights": "INT8", "float8-weights": "FLOAT8E4M3FN"}[name]
    }
    assert {str(n.inputs[1].const_value.dtype) for n in widened.values()} == {"FLOAT16"}
    read = {str(v.name) for n in full if n.op_type == "Gemm" for v in n.inputs}
    assert widened.keys() <= read
    for path in (made.file(graph) for graph in made.manifest.graphs):
        onnx.checker.check_model(str(path), full_check=True)


def test_a_uvit_runs_in_int8_with_its_long_skips(int8_uvit_bundle):
    full = ir.load(int8_uvit_bundle.file("full")).graph
    weights = {str(n.inputs[1].name) for n in full if n.op_type == "MatMulInteger"}
    assert weights
    assert not {n for n in weights if "skip" in n}
    widened = {str(n.inputs[0].name) for n in full if n.op_type == "DequantizeLinear"}
    assert widened == {"out_blocks.0.skip_linear.weight"}
    report = verify(Runner.load(int8_uvit_bundle.path, threads=1), Settings())
    assert report.failure is None


def test_a_damaged_scale_fails_and_is_named(int8_bundle, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(int8_bundle.path, copy)
    data = bytearray((copy / WEIGHTS).read_bytes())
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    begin, end = head["blocks.0.attn.proj.weight_scale"]["data_offsets"]
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + begin : start + end] = np.full((end - begin) // 4, np.nan, np.float32).tobytes()
    (copy / WEIGHTS).write_bytes(data)
    consistent(copy)
    report = verify(Runner.load(copy, threads=1), Settings())
    assert report.failure.startswith("call 0 ")
    assert "holds NaN or Inf" in report.failure
    assert "00.attn" in report.failure


def test_no_engine_is_made_of_a_graph_for_cpus(int8_bundle):
    with pytest.raises(UnsupportedError, match=r"which rtx does not take: build it with --precision"):
        EngineBuild(int8_bundle, EngineRequest("rtx"))
    for backend in ("rtx", "ort-cuda"):
        result = CliRunner().invoke(cli, ["engines", str(int8_bundle.path), "--backend", backend])
        assert result.exit_code == 4
        assert f"on a CPU, which {backend} does not take: build it with" in result.stderr


def test_bench_against_compares_two_precisions(int8_bundle, tiny_bundle, tmp_path):
    arguments = [
        "bench",
        int8_bundle.path,
        "--against",
        tiny_bundle.path,
        "--repeats",
        2,
        "--threads",
        1,
    ]
    result = CliRunner().invoke(cli, [*map(str, arguments), "--report", str(tmp_path / "r.json")])
    assert result.exit_code == 0, result.output
    assert "times faster: full call" in result.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["bundle"]["precision"], report["against"]["precision"]) == ("int8", "float32")
    sizes = [b.manifest.files[WEIGHTS].bytes for b in (int8_bundle, tiny_bundle)]
    assert report["ratio"]["weight_bytes"] == sizes[0] / sizes[1]
    assert 1e-4 < report["error"]["output"] < 0.1
    assert report["ratio"]["full_call"]["median"] > 0


def test_bench_against_refuses_another_model(int8_bundle, int8_uvit_bundle):
    result = CliRunner().invoke(
        cli, ["bench", str(int8_bundle.path), "--against", str(int8_uvit_bundle.path)]
    )
    assert result.exit_code == 1
    assert "different models: their model differs" in result.stderr
