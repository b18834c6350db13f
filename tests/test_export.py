"""What is exported and cut: the same numbers as PyTorch, in the form that every engine takes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
import tiny
from exported import (
    TOLERANCE,
    UNWANTED,
    assert_close,
    conditioned,
    count,
    eager,
    files,
    inputs_of,
    macs,
    run,
)

from l2c_export.build.build import build_bundle
from l2c_export.build.checkpoint import random_checkpoint
from l2c_export.core.bundle import CONDITIONING, WEIGHTS, Bundle
from l2c_export.core.models import DiTConfig

SMALL = DiTConfig(
    depth=1, hidden_size=16, num_heads=2, patch_size=2, input_size=4, num_classes=5, guidance_channels=4
)


@pytest.fixture(scope="module")
def models(tiny_bundle) -> dict[str, onnx.ModelProto]:
    return files(tiny_bundle)


@pytest.fixture(scope="module")
def small_files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    tiny.write_files(folder, SMALL)
    return folder


# -- the numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_the_full_graph_gives_what_pytorch_gives(tiny_bundle, tiny_config, batch):
    inputs = inputs_of(tiny_bundle, batch)
    found = run(tiny_bundle, "full", inputs)
    assert list(found) == ["output", *tiny_config.slots]
    assert_close(found, eager(tiny_config, inputs))


@pytest.mark.parametrize("batch", [1, 2])
def test_conditioning_and_step_together_are_the_full_graph(tiny_bundle, batch):
    inputs = inputs_of(tiny_bundle, batch)
    found = run(tiny_bundle, tiny_bundle.manifest.uncached, conditioned(tiny_bundle, inputs))
    assert_close(found, run(tiny_bundle, "full", inputs))


def test_a_step_graph_that_is_given_what_it_would_compute_is_the_full_graph(tiny_bundle):
    inputs = inputs_of(tiny_bundle, 2)
    full = run(tiny_bundle, "full", inputs)
    for name in tiny_bundle.manifest.step_graphs():
        assert_close(run(tiny_bundle, name, full | conditioned(tiny_bundle, inputs)), full)


def test_a_step_graph_uses_what_it_is_given(tiny_bundle):
    inputs = inputs_of(tiny_bundle, 1)
    full = run(tiny_bundle, "full", inputs)
    given = full | conditioned(tiny_bundle, inputs)
    for name in tiny_bundle.manifest.step_graphs():
        reads = [v.name for v in tiny_bundle.manifest.graphs[name].inputs if v.name in full]
        for slot in reads:
            moved = run(tiny_bundle, name, given | {slot: given[slot] + 1})["output"]
            assert np.abs(moved - full["output"]).max() > 100 * TOLERANCE, (name, slot)


def test_one_conditioning_serves_rows_of_different_timesteps_and_labels(tiny_bundle):
    rng = np.random.default_rng(0)
    many = {
        "timestep": rng.integers(1000, size=7).astype(np.float32),
        "label": rng.integers(11, size=7),
    }
    together = run(tiny_bundle, CONDITIONING, many)[CONDITIONING]
    for i in range(7):
        alone = run(tiny_bundle, CONDITIONING, {name: v[i : i + 1] for name, v in many.items()})
        assert_close(alone, {CONDITIONING: together[i : i + 1]})


def test_the_rows_of_a_batch_do_not_meet(tiny_bundle):
    inputs = inputs_of(tiny_bundle, 2)
    both = run(tiny_bundle, "full", inputs)
    for i in range(2):
        part = {"x": inputs["x"][i : i + 1], "label": inputs["label"][i::2]}
        part |= {"timestep": inputs["timestep"][:2], "guidance_scale": inputs["guidance_scale"]}
        alone = run(tiny_bundle, "full", part)
        expected = {"output": both["output"][i : i + 1]}
        expected |= {slot: both[slot][i::2] for slot in alone if slot != "output"}
        assert_close(alone, expected)


def test_guidance_moves_three_channels_of_four_and_keeps_the_fourth(tiny_bundle):
    weak, strong = (
        run(tiny_bundle, "full", inputs_of(tiny_bundle, 1, scale))["output"] for scale in (1, 7.5)
    )
    moved = np.abs(weak - strong).max(axis=(0, 2, 3))
    assert (moved[:3] > 1e-3).all()
    assert moved[3] == 0


@pytest.fixture(scope="module")
def fixed(small_files, tmp_path_factory) -> Bundle:
    """All channels guided, a batch of exactly two."""
    plan = tiny.plan(small_files, uncached=True, steps=2)
    folder = tmp_path_factory.mktemp("fixed") / "bundle"
    return build_bundle(folder, tiny.request(plan, batch=(2, 2)))


def test_guidance_of_all_channels_gives_what_pytorch_gives(fixed):
    inputs = inputs_of(fixed, 2, scale=7.5)
    assert_close(run(fixed, "full", inputs), eager(SMALL, inputs))
    weak = run(fixed, "full", inputs_of(fixed, 2, scale=1))["output"]
    moved = np.abs(weak - run(fixed, "full", inputs)["output"]).max(axis=(0, 2, 3))
    assert (moved > 1e-3).all()


def test_a_fixed_batch_is_in_every_shape(fixed):
    for name, graph in fixed.manifest.graphs.items():
        shapes = [v.shape for v in (*graph.inputs, *graph.outputs)]
        if name == CONDITIONING:
            assert {shape[0] for shape in shapes} == {"n"}
        else:
            assert all(isinstance(size, int) for shape in shapes for size in shape), name
    inputs = inputs_of(fixed, 2)
    step = run(fixed, fixed.manifest.uncached, conditioned(fixed, inputs))
    assert_close(step, eager(SMALL, inputs))


def test_a_range_of_batches_is_named_in_every_shape(tiny_bundle, tiny_config):
    for name, graph in tiny_bundle.manifest.graphs.items():
        for value in (*graph.inputs, *graph.outputs):
            if name == CONDITIONING:
                assert value.shape[0] == "n"
            elif value.name in ("x", "output"):
                assert value.shape == ("batch", *tiny_config.latent_shape)
            elif value.name in tiny_config.slots:
                assert value.shape == ("rows", *tiny_config.slot_shape)


def test_a_bundle_without_guidance_has_one_row_a_latent(small_files, tmp_path):
    plan = tiny.plan(small_files, uncached=True, steps=2, guidance=False)
    bundle = build_bundle(tmp_path / "plain", tiny.request(plan, batch=(1, 3)))
    assert bundle.manifest.guidance is None
    assert "guidance_scale" not in {v.name for v in bundle.manifest.graphs["full"].inputs}
    for batch in (1, 3):
        inputs = inputs_of(bundle, batch)
        expected = eager(SMALL, inputs, guidance=False)
        found = run(bundle, "full", inputs)
        assert found["00.attn"].shape == (batch, *SMALL.slot_shape)
        assert_close(found, expected)
        step = run(bundle, bundle.manifest.uncached, conditioned(bundle, inputs))
        assert_close(step, expected)


# -- the form -----------------------------------------------------------------------------------


def test_every_graph_passes_the_checker_as_a_file(tiny_bundle):
    for graph in tiny_bundle.manifest.graphs.values():
        onnx.checker.check_model(tiny_bundle.path / graph.file, full_check=True)


def test_every_linear_is_a_gemm_with_pytorchs_weight_and_a_bias_row(models):
    for name, model in models.items():
        weights = {t.name: t for t in model.graph.initializer}
        gemms = [node for node in model.graph.node if node.op_type == "Gemm"]
        assert gemms or name != "full"
        for node in gemms:
            x, weight, bias = node.input
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert attributes == {"alpha": 1, "beta": 1, "transA": 0, "transB": 1}
            assert x not in weights
            out, _ = weights[weight].dims
            assert list(weights[bias].dims) == [1, out], (name, bias)
            for tensor in (weights[weight], weights[bias]):
                assert tensor.data_location == onnx.TensorProto.EXTERNAL
        for node in model.graph.node:
            if node.op_type == "MatMul":
                assert not set(node.input) & set(weights), (name, node.name)


def test_no_graph_computes_shapes_or_branches(models):
    for name, model in models.items():
        assert not {node.op_type for node in model.graph.node} & UNWANTED, name
        assert {opset.domain for opset in model.opset_import} == {""}
        assert not model.functions


def test_nothing_in_a_graph_is_unused(models):
    for name, model in models.items():
        graph = model.graph
        used = {value for node in graph.node for value in node.input}
        outputs = {value.name for value in graph.output}
        made = {value for node in graph.node for value in node.output}
        assert outputs <= made, name
        assert made <= used | outputs, name
        assert {tensor.name for tensor in graph.initializer} <= used, name
        assert {value.name for value in graph.input} <= used | {CONDITIONING}, name


def test_every_cache_input_has_a_consumer(models, tiny_plan):
    for step in tiny_plan.graphs:
        used = {value for node in models[step.name].graph.node for value in node.input}
        assert set(step.reads) <= used


def test_weights_are_in_one_file_and_in_no_graph(tiny_bundle, models, tiny_config):
    with (tiny_bundle.path / WEIGHTS).open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    assert header % 4096 == 0  # the data can be mapped
    for name, model in models.items():
        inside = outside = 0
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                entries = {entry.key: entry.value for entry in tensor.external_data}
                assert entries["location"] == WEIGHTS
                assert int(entries["offset"]) >= header
                assert int(entries["length"]) == 4 * math.prod(tensor.dims)
                outside += 1
            else:
                inside += tensor.ByteSize()
        assert outside
        assert inside < 4096, name
    external = {t.name for t in models["full"].graph.initializer if t.external_data}
    assert external == set(tiny_config.parameters())


def test_the_weights_file_is_safetensors_with_the_checkpoints_tensors(tiny_bundle, tiny_config):
    tensors = safetensors.numpy.load_file(tiny_bundle.path / WEIGHTS)
    expected = dict(random_checkpoint(tiny_config, tiny.SEED).iter_tensors())
    assert set(tensors) == set(expected)
    for name, tensor in expected.items():
        assert np.array_equal(tensors[name], tensor.numpy()), name


def test_random_weights_are_said_in_the_manifest(tiny_bundle):
    assert tiny_bundle.manifest.weights == {"kind": "random", "seed": tiny.SEED}
    assert tiny_bundle.manifest.random_weights


# -- what it costs ------------------------------------------------------------------------------


def test_a_step_graph_computes_what_the_plan_computes_and_no_more(models, tiny_plan, tiny_config):
    for step in tiny_plan.graphs:
        computed = Counter(name[3:] for name in tiny_config.slots if name not in step.reads)
        found = count(models[step.name])
        assert found["Gemm"] == 2 * computed["attn"] + 2 * computed["mlp"] + 1, step
        assert found["MatMul"] == 2 * computed["attn"]
        assert found["Softmax"] == computed["attn"]
        assert (found["Conv"], found["Gather"]) == (1, 0)


def test_the_conditioning_has_the_embedders_and_every_modulation(models, tiny_config):
    found = count(models[CONDITIONING])
    assert (found["Gemm"], found["MatMul"]) == (2 + tiny_config.depth + 1, 0)
    whole, step = count(models["full"]), count(models["step-" + _uncached_key(models)])
    for op in ("Gemm", "MatMul", "Softmax", "Conv"):
        assert whole[op] == found[op] + step[op], op


def _uncached_key(models: Mapping[str, onnx.ModelProto]) -> str:
    inputs = {n: {v.name for v in m.graph.input} for n, m in models.items() if n.startswith("step-")}
    outputs = {n: [v.name for v in models[n].graph.output] for n in inputs}
    (name,) = (n for n in inputs if outputs[n] == ["output"] and not any("." in v for v in inputs[n]))
    return name.removeprefix("step-")


def test_the_plans_macs_are_those_of_the_graphs(models, tiny_plan, tiny_config, tiny_bundle):
    one = {"batch": 1, "rows": 2, "n": 2}
    costs = tiny_plan.costs
    found = {name: macs(model, one) for name, model in models.items()}
    assert [found[call.graph.name] for call in tiny_plan.calls] == list(costs.call_macs)
    assert found[tiny_bundle.manifest.uncached] == costs.full_macs
    assert found[CONDITIONING] == 2 * tiny_config.conditioning_macs()
    assert found["full"] == costs.full_macs + found[CONDITIONING]
    assert len(tiny_plan.calls) * found[CONDITIONING] == costs.conditioning_macs


def test_the_plans_macs_hold_without_guidance_and_for_all_geometries(fixed):
    manifest = fixed.manifest
    found = {name: macs(model, {"n": 4}) for name, model in files(fixed).items()}
    expected = 4 * (sum(SMALL.slot_macs().values()) + SMALL.fixed_macs())
    assert found[manifest.uncached] == expected
    assert found[CONDITIONING] == 4 * SMALL.conditioning_macs()
    assert replace(SMALL, mlp_ratio=2.0).slot_macs()["00.mlp"] * 2 == SMALL.slot_macs()["00.mlp"]
