"""Training of U-ViT routers: shifted pairs of the singlestep solver, sums of squares, no clamp."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from l2c_export.build.build import Request, build_bundle
from l2c_export.build.checkpoint import random_checkpoint
from l2c_export.build.router_file import read_router, write_router
from l2c_export.core.models import UViTConfig
from l2c_export.core.noise_schedule import scaled_linear_alphas_cumprod
from l2c_export.core.plan import make_plan
from l2c_export.core.samplers import model_table
from l2c_export.core.schedule import threshold_router
from l2c_export.evidence.reference import Reference
from l2c_export.evidence.verify import Settings, verify
from l2c_export.runtime import Runner
from l2c_export.train.data import read_dataset
from l2c_export.train.job import load_model
from l2c_export.train.recipe import make_recipe
from l2c_export.train.router import Trainer, train
from l2c_export.train.state import Run
from l2c_export.train.with_data import add_noise, routed_error
from l2c_export.train.workers import Workers

CONFIG = UViTConfig(2, 32, 2, 2, 4, in_channels=2, num_classes=3)
STEPS = 8
SAMPLER = "dpm-solver-2s"
CALLS = model_table(SAMPLER, STEPS, CONFIG)
SLOTS = len(CONFIG.slots)


@pytest.fixture(scope="module")
def weights():
    return dict(random_checkpoint(CONFIG, 1).tensors)


@pytest.fixture
def model():
    return load_model(random_checkpoint(CONFIG, 1)).eval().requires_grad_(False)


@pytest.fixture
def trainer(model, tmp_path):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((10, *CONFIG.latent_shape)).astype(np.float32)
    np.savez(tmp_path / "data.npz", latents=latents, labels=np.arange(10) % 3)

    def make(**changes):
        given = {"steps": STEPS, "iterations": 6, "batch": 4, "lr": 0.05} | changes
        recipe = make_recipe(CONFIG, **given)
        data = None if recipe.no_data else read_dataset(tmp_path / "data.npz", CONFIG)
        run = Run(recipe, CONFIG, "weights", data and data.digest)
        return Trainer(model, data, run, Workers())

    return make


def batch(rows=3):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, *CONFIG.latent_shape, generator=generator), torch.arange(rows)


def test_the_start_of_a_step_reuses_the_midpoint_before_it(model, weights):
    noisy, labels = batch()
    start, midpoint, routed = CALLS[2:5]
    reference = Reference(CONFIG, weights, guidance=False)
    reused = [[], [], CONFIG.slots]
    first, middle, student = reference.trajectory((start, midpoint, routed), reused, labels, noisy, 1.0)
    teacher, _ = reference.call(student.x, routed.timestep, labels, 1.0)
    unshifted, _ = reference.call(student.x, routed.timestep, labels, 1.0, first.branches)
    assert middle.branches["00.mlp"] is not first.branches["00.mlp"]

    def sums(output):
        return (output - teacher).square().sum(dim=(1, 2, 3)).mean().item()

    error = routed_error(model, CALLS[2:5], noisy, labels, torch.zeros(SLOTS), "sum").item()
    assert error == pytest.approx(sums(student.output), rel=1e-4)
    assert sums(unshifted) != pytest.approx(error, rel=0.05)
    mean = routed_error(model, CALLS[2:5], noisy, labels, torch.zeros(SLOTS), "mean").item()
    assert error == pytest.approx(mean * np.prod(CONFIG.latent_shape), rel=1e-4)


def test_a_student_that_computes_everything_is_the_teacher(model):
    assert routed_error(model, CALLS[:3], *batch(), torch.ones(SLOTS), "sum").item() == 0


def test_noise_is_added_for_the_time_of_the_solver():
    x0, noise = torch.ones(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)
    alphas = scaled_linear_alphas_cumprod()
    assert add_noise(x0, CALLS[0], noise, CONFIG).mean().item() == pytest.approx(alphas[999] ** 0.5)
    # 1 - 0.999/4 = 0.75025 is a quarter of the way from the 750th to the 751st step of training
    between = np.exp(0.75 * np.log(alphas[749]) + 0.25 * np.log(alphas[750])) ** 0.5
    assert add_noise(x0, CALLS[2], noise, CONFIG).mean().item() == pytest.approx(between, rel=1e-6)


def test_a_latent_of_a_velocity_model_lies_on_a_line():
    flow = replace(CONFIG, prediction="velocity")
    x0, noise = torch.ones(1, 2, 4, 4), torch.full((1, 2, 4, 4), 3.0)
    calls = model_table("euler", 4, flow)
    assert [add_noise(x0, call, noise, flow).mean().item() for call in calls] == [3, 2.5, 2, 1.5]


def test_the_trainer_walks_one_step_of_the_solver(trainer, monkeypatch):
    learner, seen = trainer(), []

    def record(model, calls, noisy, labels, weights, kind, chance):
        seen.append((calls, kind))
        return routed_error(model, calls, noisy, labels, weights, kind, chance)

    monkeypatch.setattr("l2c_export.train.with_data.routed_error", record)
    for _ in range(6):
        before = learner.router().logits
        learner.step()
        moved = np.flatnonzero((learner.router().logits != before).any(axis=1))
        calls, kind = seen.pop()
        assert (calls, kind) == (CALLS[moved[0] - 2 : moved[0] + 1], "sum")
        assert moved[0] in (2, 4, 6)


def test_logits_are_not_clamped(trainer, tmp_path):
    learner = trainer(iterations=20, l1=10.0, lr=9.0)
    train(learner, tmp_path / "state")
    assert max(row.abs().max().item() for row in learner.logits) > 20


def test_without_a_penalty_the_student_learns_to_compute(trainer, tmp_path):
    learner = trainer(iterations=60, l1=0.0, lr=0.1)
    losses = train(learner, tmp_path / "state")
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:20])


@pytest.mark.parametrize("sampler", ["dpm-solver-2s", "dpm-solver-2m", "dpm-solver-3s", "ddpm"])
def test_any_sampler_can_be_trained_without_data(trainer, tmp_path, sampler):
    learner = trainer(sampler=sampler, no_data=True, steps=8, iterations=20, l1=0.0, lr=0.1)
    losses = train(learner, tmp_path / "state")
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize("schedule", ["pairs", "every"])
def test_a_trained_router_becomes_a_bundle(trainer, tmp_path, schedule):
    learner = trainer(no_data=True, schedule=schedule, iterations=2)
    train(learner, tmp_path / "state")
    file = tmp_path / "router.safetensors"
    write_router(file, learner.router(), family="uvit", slots=CONFIG.slots, training={})
    router = read_router(file, "uvit")
    wanted = [call > 0 and (schedule == "every" or call % 2 == 0) for call in range(STEPS)]
    assert router.routed.tolist() == wanted
    hard = threshold_router(router, CONFIG.slots, SAMPLER, STEPS, 0.6)
    assert hard.removed
    plan = make_plan(CONFIG, hard, CALLS, sampler=SAMPLER)
    bundle = build_bundle(tmp_path / "bundle", Request(plan, random_checkpoint(CONFIG, 1)))
    verify(Runner.load(bundle.path), Settings()).check()
