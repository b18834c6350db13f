"""U-ViT from checkpoint and router files to latents, against what the official code computes.

The same comparison then fails for each wrong reading of the method that was ever at hand.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from l2c_export.build import uvit
from l2c_export.build.build import Request, build_bundle
from l2c_export.build.checkpoint import open_checkpoint
from l2c_export.build.router_file import read_router
from l2c_export.build.schedule_options import ScheduleOptions, plan_from_options
from l2c_export.core.models import UViTConfig
from l2c_export.core.samplers import model_table
from l2c_export.core.schedule import Schedule, threshold_router, uncached
from l2c_export.evidence import reference
from l2c_export.evidence.reference import Reference
from l2c_export.evidence.verify import Settings, verify
from l2c_export.runtime import Runner

FOLDER = Path(__file__).parent / "data" / "uvit-dpm20"
CASE = json.loads((FOLDER / "case.json").read_text())
CONFIG = UViTConfig(28, 48, 4, 2, 8, num_classes=10, conv=False)
SCALE = 1 + CASE["cfg_scale"]  # uncond + 1.4 * (cond - uncond) is cond + 0.4 * (cond - uncond)
TOLERANCE = 1e-5  # of the largest value; float32 against float64 of the official code differs by 7e-7


def error(latents, expected):
    return np.abs(latents - expected).max() / np.abs(expected).max()


# The whole path -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected():
    return np.load(FOLDER / "expected.npz")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Sampler, threshold and guidance scale are the family's own."""
    folder = tmp_path_factory.mktemp("uvit-golden")
    (folder / "model.json").write_text(json.dumps(CONFIG.to_json()))
    options = ScheduleOptions(
        model_config=folder / "model.json", router=FOLDER / "router.pth", batch=(2, 2)
    )
    weights = open_checkpoint(FOLDER / "model.pth", CONFIG)
    request = Request(plan_from_options(options), weights, batch=(2, 2))
    return build_bundle(folder / "bundle", request)


@pytest.fixture(scope="module")
def runner(bundle):
    return Runner.load(bundle.path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cached", "uncached"])
def test_the_final_latent_is_that_of_the_official_code(runner, expected, kind):
    latents = runner.sample(expected["labels"], noise=expected["noise"], cached=kind == "cached")
    assert error(latents, expected[kind]) < TOLERANCE


@pytest.mark.slow
def test_every_call_sees_what_the_official_codes_call_sees(runner, bundle, expected):
    session = runner.session(batch=2)
    session.start(expected["labels"], noise=expected["noise"])
    times = [call.timestep for call in bundle.manifest.calls]
    seen = [session.x.copy() for _ in session]
    np.testing.assert_allclose(times, expected["eval_times"], atol=1e-3)
    for ours, official in zip(seen[:-1], expected["eval_inputs_cached"][1:], strict=True):
        assert error(ours, official) < TOLERANCE


@pytest.mark.slow
def test_a_second_sample_of_a_session_owes_nothing_to_the_first(runner, expected):
    session = runner.session(batch=2)
    results = []
    for labels in ([7, 1], expected["labels"]):
        session.start(labels, noise=expected["noise"])
        for _ in session:
            pass
        results.append(session.x.copy())
    assert error(results[1], expected["cached"]) < TOLERANCE
    assert error(results[0], expected["cached"]) > 100 * TOLERANCE


@pytest.mark.slow
def test_the_bundle_passes_verification(runner):
    assert verify(runner, Settings(batch=2)).failure is None


# The eager reference and its mutations ----------------------------------------------------------


class Golden:
    """The case in eager PyTorch."""

    def __init__(self, expected):
        self.expected = expected
        self.router = read_router(FOLDER / "router.pth", "uvit")
        self.table = model_table("dpm-solver-2s", CASE["nfe"], CONFIG)
        self.state = dict(open_checkpoint(FOLDER / "model.pth", CONFIG).iter_tensors())

    def schedule(self):
        calls, slots = len(self.table), CONFIG.slots
        return threshold_router(self.router, slots, "dpm-solver-2s", calls, CASE["threshold"])

    def final(self, schedule, scale=SCALE):
        slots = np.array(schedule.slots)
        reused = [slots[row] for row in schedule.reuse]
        noise, labels = (torch.from_numpy(self.expected[name]) for name in ("noise", "labels"))
        *_, last = Reference(CONFIG, self.state).trajectory(self.table, reused, labels, noise, scale)
        return last.x_next.numpy()


@pytest.fixture(scope="module")
def golden(expected):
    return Golden(expected)


def test_the_reference_is_the_official_code(golden):
    everything = uncached(CONFIG.slots, len(golden.table))
    assert error(golden.final(golden.schedule()), golden.expected["cached"]) < TOLERANCE
    assert error(golden.final(everything), golden.expected["uncached"]) < TOLERANCE


def swapped_halves(monkeypatch, golden):
    """The conditional rows reuse the unconditional rows' values and the other way round."""
    _bend_reuse(monkeypatch, lambda value: value.roll(len(value) // 2, 0))
    return golden.final(golden.schedule())


def dropped_reset(monkeypatch, golden):
    """The first cached call reads what the sample before it left in the caches."""
    trajectories, call = [], Reference.call

    def stale(self, x, timestep, labels, guidance_scale, reuse=None):
        if timestep == golden.table[0].timestep:
            trajectories.append([])
        if reuse and timestep == golden.table[2].timestep and len(trajectories) > 1:
            reuse = {name: trajectories[0][-1][name] for name in reuse}
        output, branches = call(self, x, timestep, labels, guidance_scale, reuse)
        trajectories[-1].append(branches)
        return output, branches

    monkeypatch.setattr(Reference, "call", stale)
    golden.final(golden.schedule())
    return golden.final(golden.schedule())


def _bend_reuse(monkeypatch, bend):
    call = Reference.call

    def bent(self, x, timestep, labels, guidance_scale, reuse=None):
        reuse = {name: bend(value) for name, value in (reuse or {}).items()}
        return call(self, x, timestep, labels, guidance_scale, reuse)

    monkeypatch.setattr(Reference, "call", bent)


def unshifted_cache(monkeypatch, golden):
    """The midpoint of a solver step reuses its start, instead of the start the midpoint before."""
    reuse = np.roll(golden.schedule().reuse, 1, axis=0)
    return golden.final(Schedule(CONFIG.slots, reuse))


def flipped_threshold(monkeypatch, golden):
    """The paper's Algorithm 2 as printed: a score above the threshold reuses."""
    routed = golden.router.routed[:, None]
    return golden.final(Schedule(CONFIG.slots, ~golden.schedule().reuse & routed))


def reversed_rows(monkeypatch, golden):
    """The router's rows in ascending timesteps, as those of DiT are."""
    reuse, routed = golden.schedule().reuse.copy(), golden.router.routed
    reuse[routed] = reuse[routed][::-1]
    return golden.final(Schedule(CONFIG.slots, reuse))


def old_residual(monkeypatch, golden):
    """The paper's alpha = 0: a reused branch is added to the residual stream of the earlier call."""
    kept = {}

    def forward(self, x, skip, attn, mlp):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        if attn is None:
            kept[self, "attn"] = x
            attn = self.attn(self.norm1(x))
        x = kept[self, "attn"] + attn
        if mlp is None:
            kept[self, "mlp"] = x
            mlp = self.mlp(self.norm2(x))
        return kept[self, "mlp"] + mlp, attn, mlp

    monkeypatch.setattr(uvit.Block, "forward", forward)
    return golden.final(golden.schedule())


def old_skips(monkeypatch, golden):
    """Where a block's branches are both reused, so is what its long skip made of its input."""
    kept = {}

    def forward(self, x, skip, attn, mlp):
        if self.skip_linear is not None:
            if attn is None or mlp is None:
                kept[self] = self.skip_linear(torch.cat([x, skip], dim=-1))
            x = kept[self]
        attn = self.attn(self.norm1(x)) if attn is None else attn
        x = x + attn
        mlp = self.mlp(self.norm2(x)) if mlp is None else mlp
        return x + mlp, attn, mlp

    monkeypatch.setattr(uvit.Block, "forward", forward)
    return golden.final(golden.schedule())


def three_guided_channels(monkeypatch, golden):
    """Guidance applies to three channels of four, as in DiT."""

    def guide(prediction, scale, config):
        cond, uncond = prediction.chunk(2)
        guided = uncond + scale * (cond - uncond)
        return torch.cat([guided[:, :3], cond[:, 3:]], dim=1)

    monkeypatch.setattr(reference, "guide", guide)
    return golden.final(golden.schedule())


def official_scale_unconverted(monkeypatch, golden):
    """0.4 is taken for the scale of uncond + s * (cond - uncond)."""
    return golden.final(golden.schedule(), CASE["cfg_scale"])


def label_after_time(monkeypatch, golden):
    """The first two tokens change places."""
    table = golden.state["pos_embed"]
    monkeypatch.setitem(golden.state, "pos_embed", table[:, [1, 0, *range(2, table.shape[1])]])
    return golden.final(golden.schedule())


@pytest.mark.parametrize(
    "mutation",
    [
        swapped_halves,
        dropped_reset,
        unshifted_cache,
        flipped_threshold,
        reversed_rows,
        old_residual,
        old_skips,
        three_guided_channels,
        official_scale_unconverted,
        label_after_time,
    ],
)
def test_a_wrong_reading_of_the_method_is_told_from_the_right_one(mutation, monkeypatch, golden):
    found = error(mutation(monkeypatch, golden), golden.expected["cached"])
    assert np.isfinite(found)
    assert found > 100 * TOLERANCE
