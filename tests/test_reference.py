"""The eager reference against trajectories of the official code, and mutations that must fail."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from l2c_export.build import dit
from l2c_export.build.checkpoint import open_checkpoint
from l2c_export.build.router_file import read_router
from l2c_export.core.models import read_model_config
from l2c_export.core.samplers import sampler_table
from l2c_export.core.schedule import Schedule, threshold_router, uncached
from l2c_export.evidence import reference
from l2c_export.evidence.reference import Reference

DATA = Path(__file__).parent / "data"
SHARED = Path(__file__).parents[2] / "shared"
ROUTERS = SHARED / "routers"
TOLERANCE = 1e-5  # see tests/data: float32 noise of the official code is below 1e-6


def official_router_case():
    return pytest.param(
        SHARED / "golden" / "dit-ddim20-official-router",
        id="official-router",
        marks=pytest.mark.skipif(
            not (SHARED / "golden").is_dir(), reason="the released router is not part of the project"
        ),
    )


CASES = [pytest.param(DATA / "dit-ddim20", id="dit-ddim20"), official_router_case()]


class Golden:
    """One case: its model, its schedule, and what the official code computed."""

    def __init__(self, folder):
        case = json.loads((folder / "case.json").read_text())
        self.config = read_model_config(folder / "case.json")
        self.scale, self.threshold = case["cfg_scale"], case["threshold"]
        router = folder / case["router"]
        self.router = read_router(router if router.exists() else ROUTERS / router.name, "dit")
        self.table = sampler_table(case["sampler"], case["steps"])
        self.state = dict(open_checkpoint(folder / "model.pt", self.config).iter_tensors())
        self.expected = np.load(folder / "expected.npz")

    def schedule(self, threshold=None):
        threshold = self.threshold if threshold is None else threshold
        return threshold_router(self.router, self.config.slots, "ddim", len(self.table), threshold)

    def latents(self, schedule, config=None):
        """(calls, B, C, S, S): the latent after each call."""
        slots = np.array(schedule.slots)
        model = Reference(config or self.config, self.state)
        noise, labels = (torch.from_numpy(self.expected[name]) for name in ("noise", "labels"))
        records = model.trajectory(
            self.table, [slots[row] for row in schedule.reuse], labels, noise, self.scale
        )
        return np.stack([record.x_next.numpy() for record in records])

    def error(self, latents, kind):
        """The largest relative error of any latent."""
        pairs = zip(latents, self.expected[kind], strict=True)
        return max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)


@pytest.fixture(scope="module")
def golden():
    return Golden(DATA / "dit-ddim20")


@pytest.mark.parametrize("folder", CASES)
def test_every_latent_is_that_of_the_official_code(folder):
    golden = Golden(folder)
    everything = uncached(golden.config.slots, len(golden.table))
    assert golden.error(golden.latents(golden.schedule()), "cached") < TOLERANCE
    assert golden.error(golden.latents(everything), "uncached") < TOLERANCE


def test_a_second_trajectory_starts_without_caches(golden):
    first = golden.latents(golden.schedule())
    np.testing.assert_array_equal(golden.latents(golden.schedule()), first)


def old_gate(monkeypatch, golden):
    """A reused branch is multiplied by the gate of the call that computed it: cache gate * branch."""

    def forward(self, x, c, attn, mlp):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        if attn is None:
            attn = gate_a[:, None] * self.attn(dit.modulate(self.norm(x), shift_a, scale_a))
        x = x + attn
        if mlp is None:
            mlp = gate_m[:, None] * self.mlp(dit.modulate(self.norm(x), shift_m, scale_m))
        return x + mlp, attn, mlp

    monkeypatch.setattr(dit.Block, "forward", forward)
    return golden.latents(golden.schedule())


def old_residual(monkeypatch, golden):
    """The paper's alpha = 0: a reused branch is added to the residual stream of the earlier call."""
    kept = {}

    def forward(self, x, c, attn, mlp):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        if attn is None:
            kept[self, "attn"] = x
            attn = self.attn(dit.modulate(self.norm(x), shift_a, scale_a))
        x = kept[self, "attn"] + gate_a[:, None] * attn
        if mlp is None:
            kept[self, "mlp"] = x
            mlp = self.mlp(dit.modulate(self.norm(x), shift_m, scale_m))
        return kept[self, "mlp"] + gate_m[:, None] * mlp, attn, mlp

    monkeypatch.setattr(dit.Block, "forward", forward)
    return golden.latents(golden.schedule())


def flipped_threshold(monkeypatch, golden):
    """The paper's Algorithm 2 as printed: a score above the threshold reuses."""
    schedule = golden.schedule()
    routed = golden.router.routed[:, None]
    return golden.latents(Schedule(schedule.slots, ~schedule.reuse & routed))


def reversed_rows(monkeypatch, golden):
    """The router's cache rows in the order of execution instead of ascending timesteps."""
    schedule = golden.schedule()
    reuse, routed = schedule.reuse.copy(), golden.router.routed
    reuse[routed] = reuse[routed][::-1]
    return golden.latents(Schedule(schedule.slots, reuse))


def swapped_halves(monkeypatch, golden):
    """The conditional rows reuse the unconditional rows' values and the other way round."""
    call = Reference.call

    def swapped(self, x, timestep, labels, guidance_scale, reuse=None):
        reuse = {name: value.roll(len(value) // 2, 0) for name, value in (reuse or {}).items()}
        return call(self, x, timestep, labels, guidance_scale, reuse)

    monkeypatch.setattr(Reference, "call", swapped)
    return golden.latents(golden.schedule())


def four_guided_channels(monkeypatch, golden):
    """Guidance applies to all four channels; the official code guides three."""

    def guide(prediction, scale, config):
        cond, uncond = prediction[:, : config.in_channels].chunk(2)
        return uncond + scale * (cond - uncond)

    monkeypatch.setattr(reference, "guide", guide)
    return golden.latents(golden.schedule())


@pytest.mark.parametrize(
    "mutation",
    [
        old_gate,
        old_residual,
        flipped_threshold,
        reversed_rows,
        swapped_halves,
        four_guided_channels,
    ],
)
def test_a_wrong_reading_of_the_method_is_told_from_the_right_one(mutation, monkeypatch, golden):
    error = golden.error(mutation(monkeypatch, golden), "cached")
    assert np.isfinite(error)
    assert error > 100 * TOLERANCE
