"""U-ViT: its geometry, its names, and its eager model against the official code's own calls."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from l2c_export.build.checkpoint import open_checkpoint, random_checkpoint
from l2c_export.build.models import build_model, guide
from l2c_export.build.schedule_options import ScheduleOptions, plan_from_options
from l2c_export.core.models import PRESETS, UViTConfig, config_from_json, preset
from l2c_export.errors import L2CError

DATA = Path(__file__).parent / "data" / "uvit-dpm20"
ROUTERS = Path(__file__).resolve().parents[2] / "shared" / "routers"
GOLDEN = UViTConfig(28, 48, 4, 2, 8, num_classes=10, conv=False)
SMALL = UViTConfig(4, 16, 2, 2, 4, num_classes=3)


def parameter_count(config):
    return sum(math.prod(shape) for shape in config.parameters().values())


def eager(config, tensors):
    model = build_model(config)
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def golden():
    return eager(GOLDEN, dict(open_checkpoint(DATA / "model.pth", GOLDEN).iter_tensors()))


# Geometry -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions"),  # Bao et al. 2022, Table 1
    [("s-2", 44), ("s-2-deep", 58), ("m-2", 131), ("l-2", 287), ("h-2", 501)],
)
def test_the_presets_have_the_published_sizes(name, millions):
    assert parameter_count(preset(f"uvit-{name}")) / 1e6 == pytest.approx(millions, abs=0.8)


def test_a_call_of_uvit_h_costs_what_the_paper_says():
    """Learning-to-Cache, Table 2: 6.44 T for 50 calls of one row, as its own counter counts."""
    assert 50 * preset("uvit-h-2").call_macs() == pytest.approx(6.44e12, rel=0.04)


def test_the_512_pixel_presets_have_as_many_tokens():
    assert preset("uvit-h-4-512").tokens == preset("uvit-h-2").tokens == 258


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        GOLDEN,
        UViTConfig(2, 8, 2, 2, 4, qkv_bias=True, mlp_time_embed=True, skip=False, in_channels=3),
    ],
)
def test_parameters_are_those_of_the_model_in_its_order(config):
    state = build_model(config).state_dict()
    assert list(state) == list(config.parameters())
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == config.parameters()


def test_every_parameter_has_an_owner():
    owners = {name: GOLDEN.parameter_owner(name) for name in GOLDEN.parameters()}
    assert set(owners.values()) == {*GOLDEN.slots, "fixed", "conditioning"}
    assert owners["mid_block.norm1.bias"] == "14.attn"
    assert owners["out_blocks.0.mlp.fc2.weight"] == "15.mlp"
    assert owners["out_blocks.13.skip_linear.weight"] == "fixed"
    assert owners["in_blocks.13.norm2.weight"] == "13.mlp"


def test_a_configuration_survives_json():
    for config in (*PRESETS.values(), SMALL):
        assert config_from_json(json.loads(json.dumps(config.to_json())), "here") == config


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"depth": 5}, "depth 5 is odd"),
        ({"hidden_size": 15, "num_heads": 3}, "hidden_size 15 is odd"),
        ({"conv": 1}, "conv is 1"),
        ({"noise_schedule": "cosine"}, "must be one of: linear, scaled_linear"),
        ({"family": "unet"}, "'unet' is not supported; this release has: dit, uvit"),
        ({"learn_sigma": True}, "unknown model key.*learn_sigma"),
    ],
)
def test_a_wrong_configuration_is_one_clear_error(changed, message):
    with pytest.raises(L2CError, match=message):
        config_from_json(SMALL.to_json() | changed, "here")


@pytest.mark.parametrize(
    ("steps", "removed", "routed", "speedup"), [(20, 333, 522, 1.370), (50, 1304, 1392, 1.718)]
)
def test_the_preset_alone_names_sampler_threshold_and_router(
    steps, removed, routed, speedup, tmp_path, monkeypatch
):
    """Learning-to-Cache, Table 4: 63.79 % and 93.68 % of the routed calls' sub-layers."""
    router = ROUTERS / f"dpm{steps}_router.pth"
    if not router.is_file():
        pytest.skip(f"the released routers are not part of the project; {router} is missing")
    monkeypatch.setenv("L2C_EXPORT_CACHE", str(tmp_path))
    (tmp_path / router.name).write_bytes(router.read_bytes())
    options = ScheduleOptions(model="uvit-h-2", steps=steps)
    assert options.sampler_name == "dpm-solver-2s"
    plan = plan_from_options(options)
    assert (plan.schedule.removed, plan.schedule.source["threshold"]) == (removed, 0.9)
    assert plan.schedule.source["routed_calls"] * len(plan.config.slots) == routed
    assert plan.costs.speedup == pytest.approx(speedup, abs=5e-4)


# The eager model ------------------------------------------------------------------------------


def log_alpha(t):
    """Half the log of alpha-bar at time t in 0 … 1000, between whole times on a line."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return float(np.interp(t, np.arange(1, 1001), 0.5 * np.log(1 - betas).cumsum()))


def test_the_first_call_is_that_of_the_official_code(golden):
    """The latent at the midpoint of the first solver step is linear in the first call's output."""
    expected = np.load(DATA / "expected.npz")
    times, inputs = expected["eval_times"], torch.from_numpy(expected["eval_inputs_cached"])
    x, labels = inputs[0], torch.from_numpy(expected["labels"])
    nulls = torch.full_like(labels, GOLDEN.null_label)
    out, _ = golden(torch.cat([x, x]), torch.full((4,), times[0]), torch.cat([labels, nulls]))
    noise = guide(out, 1.4, GOLDEN)
    (alpha, sigma), (alpha1, sigma1) = (
        (math.exp(a), math.sqrt(1 - math.exp(2 * a))) for a in map(log_alpha, times[:2])
    )
    x0 = (x - sigma * noise) / alpha
    ratio = sigma1 / sigma  # DPM-Solver++ of the first order (Lu et al. 2022, arXiv 2211.01095)
    midpoint = ratio * x + (alpha1 - ratio * alpha) * x0
    assert (midpoint - inputs[1]).abs().max() / inputs[1].abs().max() < 1e-5


def test_official_and_bundle_guidance_are_one_formula():
    torch.manual_seed(0)
    prediction = torch.randn(4, *GOLDEN.latent_shape)
    cond, uncond = prediction.chunk(2)
    torch.testing.assert_close(guide(prediction, 1.4, GOLDEN), cond + 0.4 * (cond - uncond))


def test_what_is_reused_is_taken_as_it_is_and_skips_are_computed():
    torch.manual_seed(0)
    model = eager(SMALL, dict(random_checkpoint(SMALL, 0).iter_tensors()))
    x, t, y = torch.randn(2, *SMALL.latent_shape), torch.tensor([500.5, 3.0]), torch.tensor([0, 3])
    prediction, branches = model(x, t, y)
    again, used = model(x, t, y, branches)
    assert list(used) == list(SMALL.slots)
    torch.testing.assert_close(again, prediction)
    zeros = {name: torch.zeros_like(value) for name, value in branches.items()}
    emptied, used = model(x, t, y, zeros)
    assert all(used[name] is zeros[name] for name in SMALL.slots)
    tokens = torch.cat([model.label_emb(y)[:, None], time_token(t), model.patch_embed(x)], 1)
    stream = tokens + model.pos_embed
    joined = torch.cat([stream, stream], -1)  # nothing is added in the in-blocks: all skips are equal
    for block in model.out_blocks:
        after = block.skip_linear(joined)
        joined = torch.cat([after, stream], -1)
    pixels = model.decoder_pred(model.norm(after[:, 2:]))
    torch.testing.assert_close(emptied, model.final_layer(model.unpatchify(pixels)))


def time_token(t):
    frequencies = 10000 ** -(torch.arange(8) / 8)
    angles = t[:, None, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


@pytest.mark.parametrize("config", [SMALL, preset("dit-s-8")], ids=["uvit", "dit"])
def test_branch_modules_make_the_branches(config):
    model, seen = build_model(config).eval(), {}
    for name, module in model.branch_modules().items():
        module.register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
    x = torch.randn(1, *config.latent_shape)
    _, branches = model(x, torch.tensor([7.0]), torch.tensor([1]))
    assert list(seen) == list(branches) == list(config.slots)
    assert all(seen[name] is branches[name] for name in seen)


def test_no_branch_of_random_weights_is_idle_or_explodes():
    checkpoint = random_checkpoint(preset("uvit-s-2"), 0)
    model = eager(checkpoint.config, dict(checkpoint.iter_tensors()))
    x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    prediction, branches = model(x, torch.tensor([300.0]), torch.tensor([3]))
    assert 0.3 < prediction.std() < 3
    assert all(0.03 < branch.std() < 1 for branch in branches.values())
