"""Engines that TensorRT-RTX builds ahead of time, judged by its own log; no GPU is needed."""

from __future__ import annotations

import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import tiny

from l2c_export.build.build import build_bundle
from l2c_export.build.schedule_options import ScheduleOptions, plan_from_options
from l2c_export.core.bundle import CONDITIONING, WEIGHTS, Bundle, read_bundle
from l2c_export.core.engine_archive import unpack_plans
from l2c_export.core.engines import ENGINES, RECORD, UPDATE, EngineSet
from l2c_export.core.precision import branch_weights, range_name, scale_name
from l2c_export.core.uvit_config import UViTConfig
from l2c_export.engines.build import EngineBuild
from l2c_export.engines.compile import compile_network
from l2c_export.engines.folder import JOURNAL, inspect_log, judge
from l2c_export.engines.inspection import Fusion, check_interface
from l2c_export.engines.network import Network, engine_network, narrow_products
from l2c_export.engines.price import value_bytes
from l2c_export.engines.request import EngineRequest
from l2c_export.engines.sublayers import cut_sublayers
from l2c_export.engines.tensorrt_api import BuildOptions
from l2c_export.errors import L2CError, UnsupportedError

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")

CONFIG = replace(tiny.CONFIG, hidden_size=128, num_heads=2, input_size=16, mlp_ratio=4.0)
UVIT = UViTConfig(4, 128, 2, 2, 16, num_classes=10)
AMPERE_AND_LATER = ("sm80", "sm86", "sm89", "sm120", "sm121")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    """Two blocks in float16, large enough for the kernels that a real model gets."""
    folder = tmp_path_factory.mktemp("rtx")
    tiny.write_files(folder, CONFIG)
    plan = tiny.plan(folder, precision="float16")
    return build_bundle(folder / "bundle", tiny.request(plan, batch=(1, 1)))


@pytest.fixture(scope="module")
def engines(bundle) -> tuple[EngineSet, ...]:
    return EngineBuild(bundle, EngineRequest("rtx", AMPERE_AND_LATER)).run()


def built(network: Network, folder, *targets: str, **options) -> Fusion:
    """Build one network and judge it by its log."""
    log = folder / "log.xz"
    given = BuildOptions(targets=targets, **options)
    compile_network("rtx", network.model, folder, given, folder / "plan", log)
    inspection = inspect_log(log)
    check_interface(inspection, (*network.inputs, *network.weights), network.outputs)
    return judge(inspection, network)


def test_one_folder_serves_every_gpu_from_ampere_on(bundle, engines):
    (made,) = engines
    assert made.targets == AMPERE_AND_LATER
    manifest = bundle.manifest
    steps = (*manifest.step_graphs(), manifest.uncached)
    assert [e.graph for e in made.engines] == [CONDITIONING, *dict.fromkeys(steps), UPDATE]
    folder = bundle.path / ENGINES / made.folder
    plans = {engine.graph: plan for engine, plan in unpack_plans(folder, made)}
    assert all(plan[:4] == b"vtrt" for plan in plans.values())
    assert made.archive[1].bytes < made.plan_bytes / 20  # plans have nearly all kernels in common


def test_every_computed_attention_is_one_kernel_and_products_take_bias_and_gelu_along(engines):
    (made,) = engines
    steps = [engine.fusion for engine in made.engines if engine.graph.startswith("step-")]
    assert {fusion["attentions"] for fusion in steps} == {0, 1, 2}
    for fusion in steps:
        assert fusion["fused_attentions"] == fusion["attentions"]
        assert fusion["loose_biases"] == fusion["loose_activations"] == 0
    assert made.engine(UPDATE).fusion["kernels"] == 1


def test_a_block_is_eleven_kernels_or_fewer(bundle, engines):
    (made,) = engines
    full = [e.fusion for e in made.engines if e.fusion["attentions"] == CONFIG.depth]
    assert full
    assert all(fusion["kernels"] / CONFIG.depth <= 11 for fusion in full)


def test_emitting_caches_adds_no_kernel(bundle, tmp_path):
    manifest = bundle.manifest
    emitting = max(manifest.step_graphs(), key=lambda name: len(manifest.graphs[name].outputs))
    assert len(manifest.graphs[emitting].outputs) == 1 + len(manifest.slots.names)
    assert len(manifest.graphs[manifest.uncached].outputs) == 1
    emits, none = (
        built(engine_network(bundle, graph), tmp_path, "sm89")
        for graph in (emitting, manifest.uncached)
    )
    assert emits.kernels == none.kernels


def test_engines_take_and_give_what_the_manifest_says(bundle, engines, tmp_path):
    (made,) = engines
    for graph in (CONDITIONING, *bundle.manifest.step_graphs()):
        inspection = inspect_log(bundle.path / ENGINES / made.folder / f"{graph}.log.xz")
        network = engine_network(bundle, graph)
        entry = bundle.manifest.graphs[graph]
        check_interface(inspection, (*entry.inputs, *network.weights), entry.outputs)
        other = replace(entry.outputs[0], dtype="bfloat16")
        with pytest.raises(L2CError, match=r"the engine has .* where the network has .*bfloat16"):
            check_interface(inspection, (*entry.inputs, *network.weights), (other,))
        with pytest.raises(L2CError, match="which the network has not"):
            check_interface(inspection, entry.inputs, entry.outputs)


def test_scratch_is_known_and_no_large_weight_is_inside(bundle, engines):
    (made,) = engines
    assert made.scratch > 0
    for engine in made.engines[1:-1]:
        folder = bundle.path / ENGINES / made.folder
        inspection = inspect_log(folder / f"{engine.graph}.log.xz")
        assert inspection.weights < 200_000  # position embedding, patch convolution, class table


def test_two_builds_are_the_same_bytes(bundle, engines, tmp_path):
    (made,) = engines
    shutil.copytree(bundle.path, tmp_path / "other", ignore=shutil.ignore_patterns(ENGINES))
    EngineBuild(read_bundle(tmp_path / "other"), EngineRequest("rtx", AMPERE_AND_LATER)).run()
    for name in (RECORD, made.archive[0]):
        mine, theirs = (p / ENGINES / made.folder / name for p in (bundle.path, tmp_path / "other"))
        assert mine.read_bytes() == theirs.read_bytes()


@pytest.fixture(scope="module")
def sublayers(bundle) -> EngineSet:
    (made,) = EngineBuild(bundle, EngineRequest("rtx", AMPERE_AND_LATER, per="sublayer")).run()
    return made


def test_engines_of_sub_layers_are_few_and_fused_as_those_of_step_graphs(engines, sublayers):
    assert len(sublayers.engines) == 8
    fusions = {engine.graph: engine.fusion for engine in sublayers.engines}
    assert {name for name, fusion in fusions.items() if fusion["attentions"]} == {
        "compute-00.attn",
        "compute-01.attn",
    }
    for fusion in fusions.values():
        assert fusion["fused_attentions"] == fusion["attentions"]
        assert fusion["loose_biases"] == fusion["loose_activations"] == 0
    assert sublayers.plan_bytes < engines[0].plan_bytes / 2
    assert sublayers.archive[1].bytes < engines[0].archive[1].bytes


def test_a_sub_layer_that_is_reused_is_one_kernel_and_a_block_eleven_or_fewer(sublayers):
    kernels = {engine.graph: engine.fusion["kernels"] for engine in sublayers.engines}
    assert kernels["advance-00.mlp"] == 1
    assert kernels["compute-00.mlp"] + kernels["compute-01.attn"] <= 11


def test_engines_of_sub_layers_serve_a_range_of_batches(tmp_path):
    tiny.write_files(tmp_path, CONFIG)
    plan = tiny.plan(tmp_path, precision="float16", uncached=True, steps=2)
    ranged = build_bundle(tmp_path / "bundle", tiny.request(plan, batch=(1, 4)))
    (made,) = EngineBuild(ranged, EngineRequest("rtx", ("sm89",), per="sublayer")).run()
    assert made.engine("compute-01.attn").fusion["fused_attentions"] == 1
    assert not any(engine.fusion["loose_biases"] for engine in made.engines)


def test_turing_builds_and_is_fused_less(bundle, tmp_path):
    network = engine_network(bundle, bundle.manifest.uncached)
    with pytest.raises(L2CError, match="sm75 multiplies matrices in float16 alone"):
        built(network, tmp_path, "sm75")  # the final layer is in float32
    fusion = built(narrow_products(network), tmp_path, "sm75")
    assert fusion.fused_attentions == 2
    assert fusion.loose_biases > 0
    assert fusion.loose_activations == 2


@pytest.mark.parametrize(
    ("precision", "stored", "targets"),
    [
        ("int8-weights", "int8", AMPERE_AND_LATER),
        ("float8-weights", "float8_e4m3fn", ("sm89", "sm120", "sm121")),
    ],
)
def test_weights_in_8_bits_are_widened_inside_the_products(tmp_path, precision, stored, targets):
    tiny.write_files(tmp_path, CONFIG)
    plan = tiny.plan(tmp_path, precision=precision)
    bundle = build_bundle(tmp_path / "bundle", tiny.request(plan, batch=(1, 1)))
    network = engine_network(bundle, bundle.manifest.uncached)
    eights = {value.name for value in network.weights if value.dtype == stored}
    assert len(eights) == 4 * CONFIG.depth
    fusion = built(network, tmp_path, *targets)
    assert fusion.fused_attentions == CONFIG.depth
    assert fusion.loose_activations == CONFIG.depth, "fc1's bias goes with the GELU, after the product"
    kernels = inspect_log(tmp_path / "log.xz").kernels
    readers = [kernel for kernel in kernels if eights & set(kernel.inputs)]
    assert len(readers) == len(eights)
    for kernel in readers:
        (weight,) = eights & set(kernel.inputs)
        assert scale_name(weight) in kernel.inputs
        assert kernel.kind == "runtime_fusion"
        product, widening = kernel.nodes[::-1] if "CastMulCastFc" in kernel.name else ("", "")
        assert product.rpartition(".")[0] == widening.rpartition(".")[0] != ""


@pytest.mark.parametrize("targets", [AMPERE_AND_LATER, ("sm75",)], ids=["ampere", "turing"])
@pytest.mark.parametrize("config", [CONFIG, UVIT], ids=["dit", "uvit"])
def test_calibrated_branches_multiply_int8_by_int8(tmp_path, config, targets):
    given = tiny.calibration(tmp_path, config)
    tiny.write_files(tmp_path, config)
    plan = tiny.plan(tmp_path, precision="int8-static", uncached=True, steps=2)
    bundle = build_bundle(tmp_path / "b", tiny.request(plan, batch=(1, 1), calibration=given))
    network = engine_network(bundle, bundle.manifest.uncached)
    fusion = built(network if targets != ("sm75",) else narrow_products(network), tmp_path, *targets)
    blocks = len(config.slots) // 2
    assert fusion.fused_attentions == fusion.attentions == blocks
    kernels = inspect_log(tmp_path / "log.xz").kernels
    for name in branch_weights(config):
        (product,) = [kernel for kernel in kernels if name in kernel.inputs]
        assert product.kind == "gemm"  # and no runtime_fusion, which would widen the weights
        assert scale_name(name) not in product.inputs
        assert dtype_of(product.inputs[0], tmp_path) == "Int8"
        for around in (range_name(name), scale_name(name)):
            (kernel,) = [kernel for kernel in kernels if around in kernel.inputs]
            assert kernel.kind == "kgen"
    if targets == AMPERE_AND_LATER:
        assert fusion.kernels <= 11 * blocks + 8


def dtype_of(tensor: str, folder) -> str:
    """Of what a kernel makes for another, by the log."""
    text = lzma.decompress((folder / "log.xz").read_bytes()).decode()
    (found,) = set(re.findall(rf"Name: {re.escape(tensor)}, [^}}]*?Datatype: (\w+)", text))
    return found


def test_a_range_of_batches_is_one_engine(tmp_path):
    tiny.write_files(tmp_path, CONFIG)
    plan = tiny.plan(tmp_path, precision="float16", uncached=True, steps=2)
    ranged = build_bundle(tmp_path / "bundle", tiny.request(plan, batch=(1, 4)))
    (made,) = EngineBuild(ranged, EngineRequest("rtx", ("sm89",))).run()
    fusion = made.engine(ranged.manifest.uncached).fusion
    assert fusion["fused_attentions"] == 2
    assert fusion["loose_biases"] == fusion["loose_activations"] == 0
    assert made.ranges["batch"] == (1, 4, 4)


def test_engines_may_hold_their_weights(bundle, tmp_path):
    network = engine_network(bundle, bundle.manifest.uncached, constant=True)
    log, beside = tmp_path / "log.xz", bundle.path / WEIGHTS
    options = BuildOptions(targets=("sm89",))
    compile_network("rtx", network.model, beside, options, tmp_path / "plan", log)
    inspection = inspect_log(log)
    check_interface(inspection, network.inputs, network.outputs)
    assert inspection.weights > 0.9 * sum(value_bytes(value, {}) for value in network.constants)
    assert judge(inspection, network).fused_attentions == 2


def test_a_network_that_the_parser_does_not_take_is_an_error_with_its_reasons(tmp_path):
    with pytest.raises(L2CError, match="does not take the network"):
        compile_network(
            "rtx", b"no network", tmp_path, BuildOptions(), tmp_path / "plan", tmp_path / "log.xz"
        )
    assert not (tmp_path / "plan").exists()


def test_float8_on_an_older_gpu_is_explained(tmp_path):
    tiny.write_files(tmp_path, CONFIG)
    plan = tiny.plan(tmp_path, precision="float8-weights", uncached=True, steps=2)
    bundle = build_bundle(tmp_path / "bundle", tiny.request(plan, batch=(1, 1)))
    with pytest.raises(L2CError, match="float8 needs sm89 or later: build the bundle with"):
        built(engine_network(bundle, bundle.manifest.uncached), tmp_path, "sm86")


def test_what_failed_stays_for_a_closer_look(bundle, tmp_path):
    shutil.copytree(bundle.path, tmp_path / "bundle", ignore=shutil.ignore_patterns(ENGINES))
    build = EngineBuild(read_bundle(tmp_path / "bundle"), EngineRequest("rtx", ("sm89",)))
    good = build.networks[CONDITIONING]
    build.networks[CONDITIONING] = replace(good, model=b"no network")
    kept, command = (
        r"network: \S*/conditioning.onnx, log: ",
        r"polygraphy debug reduce \S*/conditioning.onnx ",
    )
    with pytest.raises(
        L2CError, match=f"engine of conditioning: .*{kept}.*nodes that fail: .*{command}.* 8.9$"
    ):
        build.run()
    folder = tmp_path / "bundle" / ENGINES / f"rtx-{build.version}-sm89"
    assert (folder / "conditioning.onnx").read_bytes() == b"no network"
    assert (folder / "conditioning.log.xz").exists()
    build.networks[CONDITIONING] = good
    build.run()
    assert not (folder / "conditioning.onnx").exists()


def test_a_builder_that_is_killed_is_explained(bundle, tmp_path):
    network = engine_network(bundle, bundle.manifest.uncached)

    def kill() -> None:
        for child in _children():
            os.kill(child, signal.SIGKILL)

    with pytest.raises(UnsupportedError, match="killed by the system, most likely for want of memory"):
        compile_network(
            "rtx",
            network.model,
            tmp_path,
            BuildOptions(),
            tmp_path / "plan",
            tmp_path / "log.xz",
            kill,
        )


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(word) for word in file.read().split()]


def test_ctrl_c_exits_130_and_the_build_goes_on_where_it_was(bundle, engines, tmp_path):
    (made,) = engines
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.path, folder, ignore=shutil.ignore_patterns(ENGINES))
    code = "from l2c_export.cli import main; main()"
    targets = ",".join(AMPERE_AND_LATER)
    command = [sys.executable, "-c", code, "engines", str(folder), "--target", targets]
    engines_folder = folder / ENGINES / made.folder
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as build:
        while not _journal(engines_folder):
            assert build.poll() is None
            time.sleep(0.01)
        build.send_signal(signal.SIGINT)
        errors = build.communicate()[1]
    assert build.returncode == 130
    assert errors.strip().splitlines()[-1] == "interrupted"
    assert "Traceback" not in errors
    assert not (engines_folder / RECORD).exists()
    done = set(_journal(engines_folder))
    assert 0 < len(done) < len(made.engines)
    stamps = {name: (engines_folder / f"{name}.plan").stat().st_mtime_ns for name in done}
    again = _watch_compiles(folder)
    assert again == [engine.graph for engine in made.engines if engine.graph not in stamps]
    assert (engines_folder / RECORD).read_bytes() == (
        bundle.path / ENGINES / made.folder / RECORD
    ).read_bytes()


def _journal(folder) -> dict:
    try:
        return json.loads((folder / JOURNAL).read_text())
    except (OSError, ValueError):
        return {}


def _watch_compiles(folder) -> list[str]:
    """Build the engines that are missing, and say which those were."""
    told: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        if done < total and what not in told:
            told.append(what)

    EngineBuild(read_bundle(folder), EngineRequest("rtx", AMPERE_AND_LATER)).run(progress)
    return told


def test_uvit_is_fused_too_and_emitting_its_caches_adds_no_kernel(tmp_path):
    config = UVIT
    (tmp_path / "model.json").write_text(json.dumps(config.to_json()))
    options = {"policy": "fora:2", "steps": 4, "precision": "float16"}
    plan = plan_from_options(ScheduleOptions(model_config=tmp_path / "model.json", **options))
    bundle = build_bundle(tmp_path / "bundle", tiny.request(plan, batch=(1, 1)))
    manifest = bundle.manifest
    emitting = max(manifest.step_graphs(), key=lambda name: len(manifest.graphs[name].outputs))
    assert len(manifest.graphs[emitting].outputs) == 1 + len(manifest.slots.names)
    emits, none = (
        built(engine_network(bundle, graph), tmp_path, "sm89")
        for graph in (emitting, manifest.uncached)
    )
    assert emits.kernels <= none.kernels <= 11 * config.blocks
    for fusion in (emits, none):
        assert fusion.fused_attentions == fusion.attentions == config.blocks
        assert fusion.loose_activations == 0
    assert emits.loose_biases == 0  # else attention's is added where the residual is normed
    for name, network in cut_sublayers(bundle).networks.items():  # with norms as inputs too
        if name.startswith("compute"):
            fusion = built(network, tmp_path, "sm89")
            assert fusion.fused_attentions == fusion.attentions == int(name.endswith("attn"))
            assert fusion.loose_activations == 0
