"""Every precision from a build to a verdict: what is stored, what is cast, and how near it comes."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import safetensors.torch
import tiny
import torch

from l2c_export.build.build import build_bundle
from l2c_export.build.checkpoint import random_checkpoint
from l2c_export.build.models import build_model
from l2c_export.build.precision import cast_model
from l2c_export.core.bundle import WEIGHTS, read_bundle
from l2c_export.core.models import UViTConfig
from l2c_export.core.precision import PRECISIONS, precision_of, stored_tensors
from l2c_export.errors import L2CError, UnsupportedError
from l2c_export.evidence.verify import ROUNDED, TOLERANCES, Settings, verify
from l2c_export.runtime import Runner

UVIT = UViTConfig(
    depth=4, hidden_size=32, num_heads=2, patch_size=2, input_size=8, num_classes=10, mlp_ratio=2.0
)
HALVES = ["float16", "bfloat16"]
EIGHTS = ["int8-weights", "float8-weights"]


@pytest.fixture(scope="module")
def bundle(tiny_files, tiny_calibration, tmp_path_factory):
    """Build the tiny model at a precision, once each."""
    built = {}

    def get(name):
        if name not in built:
            folder = tmp_path_factory.mktemp("precision") / name
            plan = tiny.plan(tiny_files, precision=name)
            given = tiny_calibration if plan.precision.calibrated else None
            built[name] = build_bundle(folder, tiny.request(plan, calibration=given))
        return built[name]

    return get


def test_an_unknown_precision_names_the_known_ones():
    with pytest.raises(L2CError, match="unknown precision 'float8'; known: float32, float16"):
        precision_of("float8")


@pytest.mark.parametrize("name", PRECISIONS)
def test_the_weights_file_is_what_the_plan_counts(bundle, tiny_files, name):
    made, plan = bundle(name), tiny.plan(tiny_files, precision=name)
    size = made.manifest.files[WEIGHTS].bytes
    head = int.from_bytes((made.path / WEIGHTS).read_bytes()[:8], "little") + 8
    assert size - head == plan.costs.weight_bytes
    assert (
        plan.costs.slot_bytes
        == 2 * 16 * 32 * np.dtype(precision_of(name).slots.replace("b", "")).itemsize
    )
    stored = safetensors.torch.load_file(made.path / WEIGHTS)
    expected = stored_tensors(tiny.CONFIG, precision_of(name))
    assert {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in stored.items()} == {
        n: (t.dtype, t.shape) for n, t in expected.items()
    }


@pytest.mark.parametrize("config", [tiny.CONFIG, UVIT], ids=["dit", "uvit"])
@pytest.mark.parametrize("name", HALVES)
def test_a_cast_model_keeps_its_islands_in_float32(config, name):
    model = build_model(config)
    cast_model(model, config, precision_of(name))
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    half = getattr(torch, name)
    assert {n for n, dtype in dtypes.items() if dtype == half} == {
        n for n, t in stored_tensors(config, precision_of(name)).items() if t.dtype == name
    }
    assert all("norm" not in n and "embed" not in n for n, dtype in dtypes.items() if dtype == half)
    labels = torch.zeros(2, dtype=torch.int64)
    out, branches = model(torch.randn(2, *config.latent_shape), torch.full((2,), 500.0), labels)
    assert out.dtype == torch.float32
    assert {b.dtype for b in branches.values()} == {half}


@pytest.mark.parametrize("name", HALVES)
def test_a_graph_computes_its_matrix_products_in_half_and_the_rest_in_float32(bundle, name):
    made = bundle(name)
    graph = ir.load(made.file("full")).graph
    half = ir.DataType[name.upper()]
    products = [
        n for n in graph if n.op_type in ("Gemm", "MatMul") and "final" not in str(n.inputs[1].name)
    ]
    embedders = [n for n in products if str(n.inputs[1].name).startswith("t_embedder")]
    assert {n.outputs[0].dtype for n in products if n not in embedders and n.outputs[0].dtype} == {half}
    assert {n.op_type for n in graph if n.outputs[0].dtype == half} <= {
        "Gemm", "MatMul", "Cast", "Reshape", "Transpose", "Split", "Squeeze", "Mul", "Gelu", "Slice"
    }  # fmt: skip
    for norm in (n for n in graph if n.op_type in ("LayerNormalization", "Softmax")):
        assert norm.outputs[0].dtype == ir.DataType.FLOAT
    interface = made.manifest.graphs[made.manifest.uncached]
    assert {v.dtype for v in (*interface.inputs, *interface.outputs)} == {"float32"}
    assert made.manifest.slots.dtype == name


@pytest.mark.parametrize("name", ["float16", "int8", "int8-static", *EIGHTS])
def test_the_bundle_passes_at_its_tolerance_and_not_at_float32s(bundle, name):
    report = verify(Runner.load(bundle(name).path, threads=1), Settings())
    assert report.failure is None
    assert report.tolerance == TOLERANCES[name]
    assert TOLERANCES["float32"].latent < report.worst < TOLERANCES[name].latent


@pytest.mark.parametrize("name", EIGHTS)
def test_a_checkpoint_shows_what_rounding_the_weights_did(bundle, tmp_path, name):
    path = tmp_path / "weights.safetensors"
    original = dict(random_checkpoint(tiny.CONFIG, tiny.SEED).iter_tensors())
    safetensors.torch.save_file(original, path)
    runner = Runner.load(bundle(name).path, threads=1)
    report, own = verify(runner, Settings(checkpoint=path)), verify(runner, Settings())
    assert report.failure is None
    assert report.tolerance == ROUNDED[name]
    assert report.cached[0].worst_slot[1] > own.cached[0].worst_slot[1] > 0  # though that is no mean


def test_bfloat16_does_not_run_on_a_cpu_and_says_so_in_a_line(bundle):
    with pytest.raises(UnsupportedError, match=r"computes in bfloat16, for which onnxruntime .* CPU"):
        Runner.load(bundle("bfloat16").path)


@pytest.mark.parametrize("name", ["float16", *EIGHTS])
def test_a_weight_beyond_float16_is_named(tiny_files, tmp_path, name):
    checkpoint = random_checkpoint(tiny.CONFIG, 0)
    tensors = dict(checkpoint.tensors)
    tensors["blocks.1.mlp.fc2.weight"] = tensors["blocks.1.mlp.fc2.weight"] * 1e7
    request = tiny.request(tiny.plan(tiny_files, precision=name))
    request = replace(request, weights=replace(checkpoint, tensors=tensors))
    with pytest.raises(L2CError, match=r"blocks.1.mlp.fc2.weight has values up to .* beyond float16"):
        build_bundle(tmp_path / "b", request)


def test_another_precision_in_the_same_folder_makes_the_files_anew(tiny_files, tmp_path):
    for name in ("float32", "float16", "float32"):
        build_bundle(tmp_path / "b", tiny.request(tiny.plan(tiny_files, precision=name)))
        assert read_bundle(tmp_path / "b").manifest.precision == name
        Runner.load(tmp_path / "b")
