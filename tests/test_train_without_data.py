"""Training from noise: the student's own trajectory, with caches that live as in the hard schedule."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from l2c_export.build.build import Request, build_bundle
from l2c_export.build.checkpoint import open_checkpoint, random_checkpoint
from l2c_export.build.models import guide
from l2c_export.build.router_file import read_router
from l2c_export.build.schedule_options import ScheduleOptions, plan_from_options
from l2c_export.cli import cli
from l2c_export.core.models import DiTConfig
from l2c_export.core.samplers import ddim
from l2c_export.core.schedule import threshold_router
from l2c_export.evidence.reference import Reference
from l2c_export.evidence.verify import Settings, verify
from l2c_export.runtime import Runner
from l2c_export.train.job import load_model
from l2c_export.train.recipe import make_recipe
from l2c_export.train.router import Trainer, train
from l2c_export.train.state import Run
from l2c_export.train.without_data import WithoutData, _Walk
from l2c_export.train.workers import Workers

CONFIG = DiTConfig(2, 32, 2, 2, 4, in_channels=2, num_classes=3, guidance_channels=2)
CALLS = 5
RECIPE = make_recipe(
    CONFIG, no_data=True, steps=CALLS, schedule="every", iterations=6, batch=4, guidance_scale=2.0
)


@pytest.fixture(scope="module")
def weights():
    return dict(random_checkpoint(CONFIG, 1).tensors)


@pytest.fixture
def model(weights):
    return load_model(random_checkpoint(CONFIG, 1)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, weights):
    folder = tmp_path_factory.mktemp("training")
    (folder / "model.json").write_text(json.dumps(CONFIG.to_json()))
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def trainer(model):
    def make(workers=Workers(), **changes):  # noqa: B008
        run = Run(replace(RECIPE, **changes), CONFIG, "weights", None, workers.count, None)
        return Trainer(model, None, run, workers)

    return make


def objective(model, **changes):
    return WithoutData(model, ddim(CALLS), replace(RECIPE, **changes), Workers())


def hard(reuse):
    """Weights of a hard schedule, as its objective asks for them, with a gradient to be had."""
    table = torch.tensor(1.0 - np.array(reuse, np.float32), requires_grad=True)
    return lambda row: table[row]


def draw(model, **changes):
    walk = objective(model, **changes)._start(1, 0)
    return walk.noise["x"], walk.labels


REUSE = [[1, 0, 0, 1], [1, 1, 0, 1], [0, 1, 0, 1], [1, 1, 1, 1]]
"""What the calls 1 … 4 reuse; the last slot lives over four of them."""


def test_the_student_walks_the_trajectory_of_the_hard_schedule(model, weights):
    # With weights of 0 and 1 the latents that the calls see must be those of cached sampling.
    seen = []
    model.x_embedder.register_forward_pre_hook(lambda module, args: seen.append(args[0][:4].clone()))
    errors = [error.item() for _, error in objective(model).errors(0, hard(REUSE))]
    x, labels = draw(model)
    reference = Reference(CONFIG, weights)
    reused = [[], *([s for s, r in zip(CONFIG.slots, row, strict=True) if r] for row in REUSE)]
    wanted = list(reference.trajectory(ddim(CALLS), reused, labels[:4], x, 2.0))
    for student, record in zip(seen[2::2], wanted[1:], strict=True):  # after the teacher, each call
        torch.testing.assert_close(student, record.x)
    for error, record, call in zip(errors, wanted[1:], ddim(CALLS)[1:], strict=True):
        full, _ = reference.call(record.x, call.timestep, labels[:4], 2.0)
        assert error == pytest.approx((record.output - full).square().mean().item(), rel=1e-4)
    assert min(errors) > 1e-6


def test_a_student_that_computes_everything_makes_no_error(model):
    errors = list(objective(model).errors(0, hard(np.zeros((4, 4)))))
    assert [(row, error.item()) for row, error in errors] == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_a_half_mixed_value_is_what_is_stored(model, monkeypatch):
    # Call 1 stores half of call 0 and half of its own; call 2 reuses that, not what call 1 computed.
    table = torch.ones(4, 4)
    table[0, 0], table[1, 0] = 0.5, 0.0
    used = []
    model.blocks[0].attn.proj.register_forward_hook(lambda module, args, out: used.append(out))
    stored = []
    step = objective(model)
    output = _Walk.output
    monkeypatch.setattr(_Walk, "output", lambda *args: stored.append(output(*args)) or stored[-1])
    list(step.errors(0, lambda row: table[row]))
    first, _, mixed, _, reused = (branches["00.attn"] for _, branches in stored[:5])
    torch.testing.assert_close(mixed, 0.5 * first + 0.5 * used[2])
    torch.testing.assert_close(reused, mixed)


def test_pairs_compute_everything_in_every_second_call(model):
    step = objective(model, schedule="pairs", steps=4)
    assert [row for row, _ in step.errors(0, hard(REUSE))] == [0, 1]


def test_no_gradient_passes_from_call_to_call(trainer):
    learner = trainer()
    for row, error in learner.objective.errors(0, learner._weights):
        error.backward()
        given = [parameter.grad is not None for parameter in learner.logits]
        assert given == [i <= row for i in range(4)]


def test_the_guided_output_counts(model):
    x, labels = draw(model)
    t = torch.full((8,), ddim(CALLS)[0].timestep)
    wanted = guide(model(torch.cat([x, x]), t, labels)[0], 2.0, CONFIG)
    output, _ = objective(model)._start(1, 0).output(0, {"x": x})
    torch.testing.assert_close(output, wanted)
    assert labels[4:].tolist() == [CONFIG.null_label] * 4


def test_processes_draw_different_noise_and_weigh_the_same(model):
    starts = [
        WithoutData(model, ddim(CALLS), RECIPE, Workers(rank, 2))._start(1 + rank, 0).noise["x"]
        for rank in range(2)
    ]
    assert starts[0].shape == (2, *CONFIG.latent_shape)
    assert not torch.equal(*starts)
    one, other = (
        WithoutData(model, ddim(CALLS), RECIPE, Workers(rank, 2))._weigh(0, hard(REUSE))
        for rank in range(2)
    )
    assert torch.equal(one, other)


def test_calls_are_weighed_by_what_caching_does_to_the_final_latent(model, weights):
    step = objective(model, reweigh_every=1)
    importance = step._weigh(0, hard(REUSE))
    walk = step._start(0, 0)
    reference = Reference(CONFIG, weights)

    def final(reuse):
        reused = [[], *([s for s, r in zip(CONFIG.slots, row, strict=True) if r] for row in reuse)]
        records = reference.trajectory(ddim(CALLS), reused, walk.labels[:4], walk.noise["x"], 2.0)
        return list(records)[-1].x_next

    moved = []
    for call in range(4):
        reuse = [row if i != call else [0] * 4 for i, row in enumerate(REUSE)]
        moved.append((final(reuse) - final(REUSE)).square().mean().item())
    np.testing.assert_allclose(importance, np.array(moved) / np.mean(moved), rtol=1e-3)
    assert importance.std() > 0.1
    assert step._weigh(0, hard(np.zeros((4, 4)))).tolist() == [1.0] * 4  # nothing moves: all alike


# Training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["pairs", "every"])
def test_without_a_penalty_the_student_learns_to_compute(trainer, tmp_path, schedule):
    learner = trainer(schedule=schedule, steps=4, iterations=40, l1=0.0, lr=0.1)
    losses = train(learner, tmp_path / "state")
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])


def test_a_large_penalty_removes_everything_after_the_first_call(trainer, tmp_path):
    learner = trainer(iterations=40, l1=10.0, lr=0.5)
    train(learner, tmp_path / "state")
    schedule = threshold_router(learner.router(), CONFIG.slots, "ddim", CALLS, 0.1)
    assert schedule.reuse.tolist() == [[False] * 4] + [[True] * 4] * 4


def test_an_important_call_keeps_more(trainer):
    learner = trainer(l1=1e-4)
    learner.objective.importance = torch.tensor([0.0, 1.0, 1.0, 1e6])
    before = [row.detach().clone() for row in learner.logits]
    for _ in range(5):
        learner.step()
    moves = [(now.detach() - was).mean() for now, was in zip(learner.logits, before, strict=True)]
    assert moves[0] < 0 < moves[3]


def test_a_resumed_training_is_the_same_to_the_bit(trainer, tmp_path):
    straight = trainer(reweigh_every=4)
    train(straight, tmp_path / "straight")
    half = trainer(reweigh_every=4, iterations=5)  # the weights of iteration 4 still count in 5
    train(half, tmp_path / "half")
    resumed = trainer(reweigh_every=4)
    resumed.restore(tmp_path / "half")
    train(resumed, tmp_path / "half")
    assert torch.equal(resumed.objective.importance, straight.objective.importance)
    assert not torch.equal(resumed.objective.importance, torch.ones(4))
    np.testing.assert_array_equal(resumed.router().logits, straight.router().logits)


# From noise to a bundle -------------------------------------------------------------------------


def command(folder, output, *more):
    options = ["train-router", "--model-config", folder / "model.json", "--device", "cpu"]
    options += ["--checkpoint", folder / "model.safetensors", "--no-data", "--steps", CALLS]
    options += ["--iterations", 3, "--batch", 2, "-o", output, *more]
    return CliRunner().invoke(cli, [str(option) for option in options])


def test_a_router_for_every_call_goes_the_whole_way(folder, tmp_path):
    output = tmp_path / "router.safetensors"
    done = command(folder, output, "--schedule", "every")
    assert done.exit_code == 0, done.output
    router = read_router(output, "dit")
    assert router.routed.tolist() == [False] + [True] * 4
    training = router.source["training"]
    assert (training["no_data"], training["data_sha256"], training["schedule"]) == (True, None, "every")
    # The released routers' parity must not be asked of it: values live over several calls.
    plan = plan_from_options(
        ScheduleOptions(model_config=folder / "model.json", router=output, threshold=0.6)
    )
    reuse = plan.schedule.reuse
    assert (reuse[1:-1] & reuse[2:]).any()
    checkpoint = open_checkpoint(folder / "model.safetensors", CONFIG)
    bundle = build_bundle(tmp_path / "bundle", Request(plan, checkpoint, batch=(1, 2)))
    runner = Runner.load(bundle.path)
    verify(runner, Settings()).check()
    pair = [runner.sample([0, 1], seed=0, cached=cached) for cached in (True, False)]
    assert np.abs(pair[0] - pair[1]).max() > 1e-4


def test_the_command_says_how_much_two_seeds_agree(folder, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    assert command(folder, first, "--schedule", "every").exit_code == 0
    done = command(folder, second, "--schedule", "every", "--seed", 1, "--compare", first)
    assert done.stdout.startswith("threshold   removed of routed   share    MACs   graphs   in both")
    done = command(folder, second, "--schedule", "every", "--resume", "--seed", 1, "--json")
    assert json.loads(done.stdout)["sweep"][0]["overlap"] is None
    again = tmp_path / "again.safetensors"
    done = command(folder, again, "--schedule", "every", "--compare", first, "--json")
    rows = json.loads(done.stdout)["sweep"]
    assert [(row["overlap"], row["agreement"]) for row in rows] == [(1.0, 1.0)] * 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "data.npz"], "--no-data trains without data; leave out --data data.npz"),
        (["--latent-scale", 0.5], "--latent-scale is a factor of data; leave it out"),
        (["--label-dropout", 0.5], "--label-dropout is for training with data"),
        (["--compare", "none.safetensors"], "none.safetensors"),
    ],
)
def test_options_that_do_not_fit_are_one_line(folder, tmp_path, options, message):
    done = command(folder, tmp_path / "router.safetensors", "--schedule", "every", *options)
    assert done.exit_code == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "router.safetensors.training").exists()


def test_data_or_none_must_be_chosen(folder, tmp_path):
    options = ["train-router", "--model-config", folder / "model.json"]
    done = CliRunner().invoke(cli, [str(option) for option in options])
    assert "give training data with --data PATH, or train from noise with --no-data" in done.stderr


def test_a_router_of_another_trajectory_is_refused_before_training(folder, tmp_path):
    first = tmp_path / "first.safetensors"
    assert command(folder, first, "--schedule", "every").exit_code == 0
    done = command(folder, tmp_path / "second.safetensors", "--steps", 4, "--compare", first)
    assert "different calls (4 and 5)" in done.stderr
    assert not (tmp_path / "second.safetensors.training").exists()
