"""U-ViT exported and cut: PyTorch's numbers, its long skips in every graph, and the plan's costs."""

from collections import Counter

import numpy as np
import onnx
import pytest
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
from l2c_export.core.bundle import CONDITIONING
from l2c_export.core.models import UViTConfig
from l2c_export.core.plan import make_plan
from l2c_export.core.samplers import sampler_table
from l2c_export.core.schedule import Schedule

PLAIN = UViTConfig(2, 16, 2, 2, 4, num_classes=5)
OTHER = UViTConfig(
    2, 16, 4, 2, 4, 3, 5, 2.0, qkv_bias=True, mlp_time_embed=True, conv=False, skip=False
)
MASKS = ("......", "rr.r..", "......", "rrrrrr")  # calls x slots; r reuses


@pytest.fixture(scope="module", params=[PLAIN, OTHER], ids=["plain", "other"])
def plan(request):
    reuse = np.array([[sign == "r" for sign in mask] for mask in MASKS])
    schedule = Schedule(request.param.slots, reuse)
    return make_plan(request.param, schedule, sampler_table("ddim", len(MASKS)))


@pytest.fixture(scope="module")
def bundle(plan, tmp_path_factory):
    return build_bundle(tmp_path_factory.mktemp("uvit") / "bundle", tiny.request(plan))


@pytest.fixture(scope="module")
def models(bundle):
    return files(bundle)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_full_graph_gives_what_pytorch_gives(bundle, plan, batch):
    inputs = inputs_of(bundle, batch, timestep=321.25)
    found = run(bundle, "full", inputs)
    assert list(found) == ["output", *plan.config.slots]
    assert_close(found, eager(plan.config, inputs))


def test_a_step_graph_that_is_given_what_it_would_compute_is_the_full_graph(bundle):
    inputs = inputs_of(bundle, 2)
    full = run(bundle, "full", inputs)
    for name in (bundle.manifest.uncached, *bundle.manifest.step_graphs()):
        assert_close(run(bundle, name, full | conditioned(bundle, inputs)), full)


def test_a_step_graph_uses_what_it_is_given(bundle):
    inputs = inputs_of(bundle, 1)
    full = run(bundle, "full", inputs)
    given = full | conditioned(bundle, inputs)
    for name in bundle.manifest.step_graphs():
        for slot in [v.name for v in bundle.manifest.graphs[name].inputs if v.name in full]:
            bent = given[slot] * np.linspace(0.5, 1.5, given[slot].shape[-1], dtype=np.float32)
            moved = run(bundle, name, given | {slot: bent})["output"]
            assert np.abs(moved - full["output"]).max() > 100 * TOLERANCE, (name, slot)


def test_one_conditioning_serves_rows_of_different_timesteps_and_labels(bundle):
    rng = np.random.default_rng(0)
    many = {
        "timestep": rng.uniform(0, 1000, size=5).astype(np.float32),
        "label": rng.integers(6, size=5),
    }
    together = run(bundle, CONDITIONING, many)[CONDITIONING]
    assert together.shape == (5, 2 * 16)  # the label's token and the time's
    for i in range(5):
        alone = run(bundle, CONDITIONING, {name: v[i : i + 1] for name, v in many.items()})
        assert_close(alone, {CONDITIONING: together[i : i + 1]})


def test_guidance_moves_all_channels(bundle):
    weak, strong = (run(bundle, "full", inputs_of(bundle, 1, scale))["output"] for scale in (1, 7.5))
    assert (np.abs(weak - strong).max(axis=(0, 2, 3)) > 1e-3).all()


def test_every_graph_has_the_form_of_the_others(bundle, models):
    for name, model in models.items():
        onnx.checker.check_model(bundle.path / bundle.manifest.graphs[name].file, full_check=True)
        assert not {node.op_type for node in model.graph.node} & UNWANTED, name
        inside = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        assert sum(tensor.ByteSize() for tensor in inside) < 4096, name


def test_all_parameters_are_in_the_full_graph(models, plan):
    external = {t.name for t in models["full"].graph.initializer if t.external_data}
    assert external == set(plan.config.parameters())


def test_a_step_graph_computes_what_the_plan_computes_and_every_long_skip(models, plan):
    config = plan.config
    for step in plan.graphs:
        computed = Counter(name[3:] for name in config.slots if name not in step.reads)
        found = count(models[step.name])
        skips = config.depth // 2 if config.skip else 0
        assert found["Gemm"] == 2 * computed["attn"] + 2 * computed["mlp"] + skips + 1, step
        assert found["LayerNormalization"] == computed["attn"] + computed["mlp"] + 1
        assert found["MatMul"] == 2 * computed["attn"]
        assert found["Softmax"] == computed["attn"]
        assert (found["Conv"], found["Gather"]) == (1 + config.conv, 0)
    assert count(models[CONDITIONING])["Gemm"] == (2 if config.mlp_time_embed else 0)


def test_the_plans_macs_are_those_of_the_graphs(models, plan, bundle):
    found = {name: macs(model, {"batch": 1, "rows": 2, "n": 2}) for name, model in models.items()}
    assert [found[call.graph.name] for call in plan.calls] == list(plan.costs.call_macs)
    assert found[bundle.manifest.uncached] == plan.costs.full_macs
    assert found[CONDITIONING] == 2 * plan.config.conditioning_macs()
