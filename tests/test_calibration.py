"""Calibration: what is watched, the ranges made of it, the file, and the bundles that use it."""

import json
import shlex
from dataclasses import replace

import onnx
import onnx_ir as ir
import pytest
import safetensors.torch
import tiny
import torch
from click.testing import CliRunner

from l2c_export.build.build import build_bundle
from l2c_export.build.calibration import input_ranges
from l2c_export.build.checkpoint import random_checkpoint
from l2c_export.build.quantize import dequantize, quantize
from l2c_export.cli import cli
from l2c_export.core.bundle import CONDITIONING, WEIGHTS, read_bundle
from l2c_export.core.calibration import Calibration, read_calibration, write_calibration
from l2c_export.core.models import UViTConfig
from l2c_export.core.precision import branch_weights, range_name
from l2c_export.core.samplers import model_table
from l2c_export.engines.network import engine_network
from l2c_export.errors import L2CError
from l2c_export.evidence.calibrate import calibrate
from l2c_export.evidence.reference import bundle_reference
from l2c_export.evidence.verify import Settings, draw_inputs, verify
from l2c_export.runtime import Runner

QKV = "blocks.0.attn.qkv.weight"
UVIT = UViTConfig(
    depth=2, hidden_size=32, num_heads=2, patch_size=2, input_size=8, num_classes=10, mlp_ratio=2.0
)


def only(given: Calibration, *maxima: float) -> torch.Tensor:
    """Ranges of a layer with these maxima."""
    return input_ranges(replace(given, layers={"layer": maxima}))["layer"]


def test_no_channel_is_clipped_and_a_small_one_gets_a_range_between_its_own_and_the_layers(
    tiny_calibration,
):
    maxima = (16.0, 4.0, 1.0, 0.25)
    ranges = only(tiny_calibration, *maxima) * 127 / 128
    assert ranges[0] == pytest.approx(16.0)
    for found, own in zip(ranges[1:].tolist(), maxima[1:], strict=True):
        assert own < found < 16
    assert (ranges.diff() < 0).all()


def test_channels_that_only_held_zeros_get_a_range_all_the_same(tiny_calibration):
    ranges = only(tiny_calibration, 8.0, 0.0)
    assert ranges[1] == pytest.approx(8e-3)
    assert (only(tiny_calibration, 0.0, 0.0) == 2.0**-14).all()


def test_channels_of_unlike_size_lose_less_than_by_one_range_for_all(tiny_calibration):
    torch.manual_seed(0)
    sizes = torch.logspace(-1.5, 1, 64)
    x, weight = torch.randn(500, 64) * sizes, torch.randn(32, 64)
    unlike = only(tiny_calibration, *x.abs().amax(0).tolist())
    alike = torch.full((64,), float(x.abs().max()) * 128 / 127)

    def error(ranges: torch.Tensor) -> float:
        parts = (x / ranges * 128).round().clamp(-128, 127) / 128
        assert parts.abs().max() <= 127 / 128 + 1e-6
        stored = dequantize(*quantize(weight * ranges, "int8", "float16"))
        exact = x @ weight.T
        return float((parts @ stored.T - exact).norm() / exact.norm())

    assert error(unlike) < 0.7 * error(alike)


def test_every_branch_layer_is_watched_over_whole_uncached_trajectories(tiny_bundle):
    made = calibrate(tiny_bundle, 5, 1)
    assert tuple(made.layers) == branch_weights(tiny.CONFIG)
    assert len(made.layers) == 4 * tiny.CONFIG.depth
    assert (made.calls, made.samples, made.sampler) == (6, 5, "ddim")
    assert made == calibrate(tiny_bundle, 5, 1) != calibrate(tiny_bundle, 5, 2)
    seen = []
    reference = bundle_reference(tiny_bundle)
    reference.model.blocks[1].mlp.fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    labels, noise = (torch.from_numpy(drawn) for drawn in draw_inputs(tiny_bundle.manifest, None, 5, 1))
    table = model_table("ddim", 6, tiny.CONFIG)
    assert len([*reference.trajectory(table, [()] * 6, labels, noise, 4.0)]) == len(seen) == 6
    expected = torch.cat(seen).flatten(0, 1).abs().amax(0)
    assert made.layers["blocks.1.mlp.fc2.weight"] == pytest.approx(expected.tolist(), rel=1e-3)


def test_schedule_and_precision_of_the_bundle_do_not_matter(tiny_bundle, tiny_files, tmp_path):
    plan = tiny.plan(tiny_files, uncached=True, steps=6)
    uncached = build_bundle(tmp_path / "uncached", tiny.request(plan))
    half = build_bundle(tmp_path / "half", tiny.request(tiny.plan(tiny_files, precision="float16")))
    made = calibrate(tiny_bundle, 2, 0)
    assert calibrate(uncached, 2, 0) == made
    other = calibrate(half, 2, 0)
    assert other.weights == made.weights
    for name, maxima in other.layers.items():
        assert maxima == pytest.approx(made.layers[name], rel=0.1), name


def test_a_stochastic_sampler_without_guidance_is_sampled_too(tiny_files, tmp_path):
    plan = tiny.plan(tiny_files, uncached=True, steps=3, sampler="ddpm", guidance=False)
    made = calibrate(build_bundle(tmp_path / "b", tiny.request(plan)), 5, 0)
    assert (made.sampler, made.guidance_scale) == ("ddpm", None)
    assert all(max(maxima) > 0 for maxima in made.layers.values())


def test_what_is_not_finite_is_named(tiny_files, tmp_path):
    checkpoint = random_checkpoint(tiny.CONFIG, tiny.SEED)
    tensors = dict(checkpoint.tensors)
    tensors["blocks.0.mlp.fc1.bias"] = torch.full_like(tensors["blocks.0.mlp.fc1.bias"], 3e38)
    tensors["blocks.0.mlp.fc2.weight"] = torch.full_like(tensors["blocks.0.mlp.fc2.weight"], 1e3)
    request = replace(tiny.request(tiny.plan(tiny_files)), weights=replace(checkpoint, tensors=tensors))
    with pytest.raises(L2CError, match=r"the input of blocks\.1\.attn\.qkv\.weight holds NaN or Inf"):
        calibrate(build_bundle(tmp_path / "b", request), 1, 0)


def scaled(given: Calibration, factor: float) -> Calibration:
    layers = {name: tuple(factor * v for v in maxima) for name, maxima in given.layers.items()}
    return replace(given, layers=layers)


# -- bundles ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tiny_files, tiny_calibration, tmp_path_factory):
    plan = tiny.plan(tiny_files, precision="int8-static")
    folder = tmp_path_factory.mktemp("static") / "bundle"
    return build_bundle(folder, tiny.request(plan, calibration=tiny_calibration))


def test_branches_multiply_int8_by_int8_in_constant_steps_and_nothing_else_does(bundle):
    full = ir.load(bundle.file("full")).graph
    products = {}
    for node in full:
        if node.op_type == "Gemm" and all(v.producer() for v in node.inputs[:2]):
            sides = [v.producer() for v in node.inputs[:2]]
            if {side.op_type for side in sides} == {"DequantizeLinear"}:
                products[sides[1].inputs[0].name] = sides
    assert set(products) == set(branch_weights(tiny.CONFIG))
    for x, weight in products.values():
        assert x.inputs[0].producer().op_type == "QuantizeLinear"
        steps = {float(side.inputs[1].const_value.numpy()) for side in (x, weight)}
        assert steps == {1 / 128}
    widened = {n.inputs[0].name for n in full if n.op_type == "DequantizeLinear"} - set(products)
    assert {n for n in widened if "adaLN" in n} == {
        f"blocks.{i}.adaLN_modulation.1.weight" for i in (0, 1)
    }
    conditioning = ir.load(bundle.file(CONDITIONING)).graph
    assert "QuantizeLinear" not in {n.op_type for n in conditioning}
    for graph in bundle.manifest.graphs:
        onnx.checker.check_model(str(bundle.file(graph)), full_check=True)


def test_the_ranges_lie_in_the_weights_file_and_the_manifest_names_the_calibration(
    bundle, tiny_calibration
):
    stored = safetensors.torch.load_file(bundle.path / WEIGHTS)
    for name, value in input_ranges(tiny_calibration).items():
        assert torch.equal(stored[range_name(name)], value)
    facts = bundle.manifest.weights["calibration"]
    assert facts["digest"] == tiny_calibration.digest
    assert facts["samples"] == 2


def test_another_calibration_changes_the_weights_file_alone(
    bundle, tiny_files, tiny_calibration, tmp_path
):
    other = scaled(tiny_calibration, 1 / 2)
    plan = tiny.plan(tiny_files, precision="int8-static")
    made = build_bundle(tmp_path / "b", tiny.request(plan, calibration=other))
    before, after = bundle.manifest.files, made.manifest.files
    assert {name for name in before if before[name] != after[name]} == {WEIGHTS}
    graph = bundle.manifest.uncached
    assert engine_network(bundle, graph) == engine_network(made, graph)
    networks = engine_network(bundle, graph)
    assert {range_name(name) for name in branch_weights(tiny.CONFIG)} <= {
        value.name for value in networks.weights
    }


def test_a_narrow_range_clips(bundle, tiny_files, tiny_calibration, tmp_path):
    plan = tiny.plan(tiny_files, precision="int8-static")
    request = tiny.request(plan, calibration=scaled(tiny_calibration, 1 / 20))
    clipped = build_bundle(tmp_path / "b", request)
    good, bad = (
        verify(Runner.load(b.path, threads=1), Settings(calls=1, uncached=False, tolerance=1e9)).worst
        for b in (bundle, clipped)
    )
    assert bad > 5 * good


def test_a_uvit_runs_with_its_long_skips_in_float16(tmp_path):
    given = tiny.calibration(tmp_path, UVIT)
    assert not [name for name in given.layers if "skip" in name]
    tiny.write_files(tmp_path, UVIT)
    plan = tiny.plan(tmp_path, uncached=True, steps=4, precision="int8-static")
    made = build_bundle(tmp_path / "b", tiny.request(plan, calibration=given))
    assert verify(Runner.load(made.path, threads=1), Settings()).failure is None


# -- the command line ---------------------------------------------------------------------------------


def invoke(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output if code == 0 else result.stderr


def build(tiny_files, *arguments: object, code: int = 0) -> str:
    model = ("--model-config", tiny_files / "model.json", "--router", tiny_files / "router.safetensors")
    return invoke("build", *model, "--random-weights", tiny.SEED, *arguments, code=code)


def test_the_commands_in_turn(tiny_bundle, tiny_files, tmp_path):
    path, made = tmp_path / "calibration.json", tmp_path / "b"
    printed = invoke("calibrate", tiny_bundle.path, "-o", path, "--samples", 2)
    assert "8 layers, 2 trajectories of 6 calls" in printed
    words = shlex.split(printed.splitlines()[-1].removeprefix("next: ").removesuffix(" …"))
    assert words == ["l2c-export", "build", "--precision", "int8-static", "--calibration", str(path)]
    build(tiny_files, *words[2:], "-o", made)
    assert read_bundle(made).manifest.weights["calibration"]["digest"] == read_calibration(path).digest
    assert "PASSED" in invoke("verify", made)
    facts = json.loads(
        invoke("calibrate", tiny_bundle.path, "-o", path, "--samples", 2, "--json").splitlines()[-1]
    )
    source = read_calibration(path).source
    assert facts == {"calibration": str(path), "layers": 8, **source}
    printed = invoke("calibrate", tiny_bundle.path, "-o", path, "--samples", 1)
    assert "8 layers, 1 trajectory of 6 calls" in printed


def test_a_profile_may_name_the_calibration(tiny_files, tiny_calibration, tmp_path):
    write_calibration(tmp_path / "c.json", tiny_calibration)
    profile = tmp_path / "target.toml"
    lines = ['description = "a target"', 'precision = "int8-static"']
    profile.write_text("\n".join([*lines, f'calibration = "{tmp_path / "c.json"}"']))
    build(tiny_files, "--profile", profile, "-o", tmp_path / "b")
    assert read_bundle(tmp_path / "b").manifest.precision == "int8-static"


def test_a_plan_needs_no_calibration_but_a_build_does_even_a_dry_one(
    tiny_files, tiny_calibration, tmp_path
):
    model = ("--model-config", tiny_files / "model.json", "--router", tiny_files / "router.safetensors")
    invoke("plan", *model, "--precision", "int8-static")
    static = ("--precision", "int8-static", "-o", tmp_path / "b")
    for dry in ((), ("--dry-run",)):
        assert "needs --calibration FILE" in build(tiny_files, *static, *dry, code=1)
    write_calibration(tmp_path / "c.json", tiny_calibration)
    build(tiny_files, *static, "--calibration", tmp_path / "c.json", "--dry-run")
    assert not (tmp_path / "b").exists()


def test_a_calibration_of_another_sampler_is_taken_with_a_warning(
    tiny_files, tiny_calibration, tmp_path
):
    path = tmp_path / "c.json"
    said = f"warning: calibration {path} was made with sampler ddpm, and this build is for ddim"
    model = ("--model-config", tiny_files / "model.json", "--uncached", "--steps", 2)
    model += ("--random-weights", tiny.SEED, "--precision", "int8-static", "--calibration", path)
    for sampler, warned in (("ddpm", True), ("ddim", False)):
        write_calibration(path, replace(tiny_calibration, sampler=sampler))
        printed = invoke("build", *model, "-o", tmp_path / sampler)
        assert (said in printed) == warned


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda d: d["model"].update(depth=3), "of another model (depth differ)"),
        (lambda d: d.update(weights="0" * 64), "of other weights than these"),
        (lambda d: d["layers"].pop(QKV), "has other layers than the model"),
        (lambda d: d["layers"].update({QKV: "1 2"}), "has other layers than the model"),
        (lambda d: d["layers"].update({QKV: "-1 2"}), f"is damaged ({QKV} has other values"),
        (lambda d: d["layers"].update({QKV: "1 x"}), "is damaged (could not convert"),
        (lambda d: d["layers"].update({QKV: "1e9 " * 32}), "beyond float16's"),
        (lambda d: d.pop("layers"), "is damaged ('layers')"),
        (lambda d: d.pop("format"), "is no calibration; make one with"),
        (lambda d: d.update(more=1), "is damaged"),
    ],
)
def test_a_calibration_that_does_not_fit_is_an_error_in_a_line(
    tiny_files, tiny_calibration, tmp_path, spoil, expected
):
    path = tmp_path / "c.json"
    write_calibration(path, tiny_calibration)
    data = json.loads(path.read_text())
    spoil(data)
    path.write_text(json.dumps(data))
    arguments = ("--precision", "int8-static", "--calibration", path, "-o", tmp_path / "b")
    error = build(tiny_files, *arguments, code=1)
    assert expected in error
    assert len([line for line in error.splitlines() if "warning: random" not in line]) == 1


def test_other_files_and_precisions_are_errors_in_a_line(tiny_files, tmp_path):
    path = tmp_path / "c.json"
    given = ("--calibration", path, "-o", tmp_path / "b")
    assert "No such file" in build(tiny_files, "--precision", "int8-static", *given, code=1)
    path.write_text("{")
    assert "is not JSON" in build(tiny_files, "--precision", "int8-static", *given, code=1)
    assert "precision float16 takes none" in build(tiny_files, "--precision", "float16", *given, code=1)
    path.write_text('{"format": "l2c-calibration", "version": 2}')
    assert "is of version 2" in build(tiny_files, "--precision", "int8-static", *given, code=4)


def test_a_build_in_python_without_a_calibration_says_so(tiny_files, tiny_calibration, tmp_path):
    plan = tiny.plan(tiny_files, precision="int8-static")
    with pytest.raises(L2CError, match="precision int8-static needs a calibration"):
        build_bundle(tmp_path / "b", tiny.request(plan))
    with pytest.raises(L2CError, match="precision float32 takes no calibration"):
        build_bundle(tmp_path / "b", tiny.request(tiny.plan(tiny_files), calibration=tiny_calibration))
