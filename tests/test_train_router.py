import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from l2c_export.build.checkpoint import random_checkpoint
from l2c_export.build.router_file import read_router
from l2c_export.cli import cli
from l2c_export.core.models import DiTConfig
from l2c_export.core.samplers import ddim, linear_alphas_cumprod
from l2c_export.core.schedule import threshold_router
from l2c_export.errors import L2CError
from l2c_export.train.data import read_dataset
from l2c_export.train.job import Job, load_model, train_router
from l2c_export.train.recipe import Recipe
from l2c_export.train.router import Trainer, train
from l2c_export.train.state import Run
from l2c_export.train.student import branch_weights, mixing
from l2c_export.train.with_data import add_noise, routed_error
from l2c_export.train.workers import Workers, workers

CONFIG = DiTConfig(2, 32, 2, 2, 4, in_channels=2, num_classes=3, guidance_channels=2)
RECIPE = Recipe(steps=4, iterations=6, batch=4, lr=0.05)
PAIR = ddim(4)[2:]


@pytest.fixture(scope="module")
def model():
    return load_model(random_checkpoint(CONFIG, 1)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with ``model.json``, ``model.safetensors`` and ``data.npz``."""
    folder = tmp_path_factory.mktemp("training")
    rng = np.random.default_rng(0)
    (folder / "model.json").write_text(json.dumps(CONFIG.to_json()))
    save_file(dict(random_checkpoint(CONFIG, 1).tensors), folder / "model.safetensors")
    latents = rng.standard_normal((10, *CONFIG.latent_shape)).astype(np.float32)
    np.savez(folder / "data.npz", latents=latents, labels=np.arange(10) % 3)
    return folder


@pytest.fixture
def job(folder, tmp_path):
    return Job(
        CONFIG,
        RECIPE,
        folder / "data.npz",
        tmp_path / "router.safetensors",
        checkpoint=folder / "model.safetensors",
        device="cpu",
    )


@pytest.fixture
def trainer(model, folder):
    def make(workers=Workers(), **changes):  # noqa: B008
        data = read_dataset(folder / "data.npz", CONFIG)
        run = Run(replace(RECIPE, **changes), CONFIG, "weights", data.digest, workers.count)
        return Trainer(model, data, run, workers)

    return make


def batch(rows=3):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, *CONFIG.latent_shape, generator=generator), torch.arange(rows)


def times(call, rows=3):
    return torch.full((rows,), call.timestep)


def by_hand(model, reuse_of):
    """The student that reuses everything, from the branches of call ``reuse_of`` of the pair."""
    noisy, labels = batch()
    full, reusing = PAIR
    out, branches = model(noisy, times(full), labels)
    alpha, alpha_next = linear_alphas_cumprod()[[int(full.timestep), int(reusing.timestep)]]
    eps = out[:, : CONFIG.in_channels]
    x0 = (noisy - (1 - alpha) ** 0.5 * eps) / alpha**0.5
    x = alpha_next**0.5 * x0 + (1 - alpha_next) ** 0.5 * eps
    teacher, fresh = model(x, times(reusing), labels)
    student, _ = model(x, times(reusing), labels, branches if reuse_of == 0 else fresh)
    return (student - teacher).square().mean().item()


# The loss ---------------------------------------------------------------------------------------


def test_a_student_that_computes_everything_is_the_teacher(model):
    assert routed_error(model, PAIR, *batch(), torch.ones(4)).item() == 0


def test_a_student_that_reuses_everything_uses_the_noisier_call(model):
    loss = routed_error(model, PAIR, *batch(), torch.zeros(4)).item()
    assert by_hand(model, reuse_of=1) == pytest.approx(0, abs=1e-9)
    assert loss > 1e-4
    assert loss == pytest.approx(by_hand(model, reuse_of=0), rel=1e-4)


def test_all_output_channels_count(model):
    # The variance half is no part of the DDIM update, but of the loss.
    noisy, labels = batch()
    deaf = load_model(random_checkpoint(CONFIG, 1)).eval().requires_grad_(False)
    rows = deaf.final_layer.linear.weight.view(4, CONFIG.out_channels, -1)
    rows[:, CONFIG.in_channels :] = 0
    all_channels = routed_error(model, PAIR, noisy, labels, torch.zeros(4))
    half = routed_error(deaf, PAIR, noisy, labels, torch.zeros(4))
    assert half < 0.9 * all_channels


def test_a_branch_is_mixed_before_its_gate(model):
    noisy, labels = batch()
    weights = torch.tensor([0.25, 1, 1, 1])
    _, cached = model(noisy, times(PAIR[0]), labels)
    _, fresh = model(noisy, times(PAIR[1]), labels)
    with mixing(model, cached, weights):
        _, mixed = model(noisy, times(PAIR[1]), labels)
    wanted = 0.75 * cached["00.attn"] + 0.25 * fresh["00.attn"]
    torch.testing.assert_close(mixed["00.attn"], wanted)
    assert not model.blocks[0].attn._forward_hooks


def test_the_gradient_is_the_slope(model):
    logits = torch.tensor([0.3, -0.5, 1.0, 0.1], requires_grad=True)
    routed_error(model, PAIR, *batch(), logits.sigmoid()).backward()
    for i in range(4):
        step = torch.zeros(4)
        step[i] = 0.05
        up, down = (routed_error(model, PAIR, *batch(), (logits + s).sigmoid()) for s in (step, -step))
        assert logits.grad[i].item() == pytest.approx((up - down).item() / 0.1, rel=0.02, abs=1e-7)


def test_hard_decisions_let_gradients_through():
    logits = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    hard = branch_weights(logits, 0.6)
    assert hard.tolist() == [0, 0, 1]
    hard.sum().backward()
    scores = logits.detach().sigmoid()
    torch.testing.assert_close(logits.grad, scores * (1 - scores))


def test_noise_is_added_for_the_timestep_of_the_full_call():
    x0, noise = torch.ones(1, 2, 4, 4), torch.full((1, 2, 4, 4), 2.0)
    assert add_noise(x0, ddim(4)[3], noise, CONFIG).mean().item() == pytest.approx(
        1.0, abs=0.03
    )  # t = 0
    assert add_noise(x0, ddim(4)[0], noise, CONFIG).mean().item() == pytest.approx(
        2.0, abs=0.03
    )  # t = 999


# Training ---------------------------------------------------------------------------------------


def test_without_a_penalty_the_student_learns_to_compute(trainer, tmp_path):
    learner = trainer(iterations=60, l1=0.0, lr=0.1)
    start = torch.stack([row.detach().clone() for row in learner.logits])
    losses = train(learner, tmp_path / "state")
    end = torch.stack([row.detach() for row in learner.logits])
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:20])
    assert end.sigmoid().mean() > start.sigmoid().mean() + 0.1


def test_a_large_penalty_removes_everything(trainer, tmp_path):
    learner = trainer(iterations=60, l1=10.0, lr=0.5)
    train(learner, tmp_path / "state")
    schedule = threshold_router(learner.router(), CONFIG.slots, "ddim", 4, 0.1)
    assert schedule.reuse.tolist() == [[False] * 4, [True] * 4] * 2


def test_logits_stay_within_the_clamp(trainer, tmp_path):
    learner = trainer(iterations=20, l1=10.0, lr=9.0, clamp=2.0)
    train(learner, tmp_path / "state")
    assert max(row.abs().max().item() for row in learner.logits) == 2.0


def test_only_the_drawn_pair_moves(trainer):
    learner = trainer()
    before = [row.detach().clone() for row in learner.logits]
    learner.step()
    assert sum(not torch.equal(a, b) for a, b in zip(before, learner.logits, strict=True)) == 1


def test_a_row_of_the_router_is_the_call_it_was_trained_on(trainer, monkeypatch):
    learner = trainer(l1=10.0)
    before, pairs = learner.router().logits, []

    def record(model, pair, noisy, labels, weights, kind, chance):
        pairs.append(pair)
        return routed_error(model, pair, noisy, labels, weights, kind, chance)

    monkeypatch.setattr("l2c_export.train.with_data.routed_error", record)
    learner.step()
    moved = (learner.router().logits != before).any(axis=1)
    assert moved.sum() == 1
    assert pairs[0][1] == ddim(4)[int(np.argmax(moved))]
    assert pairs[0][0] == ddim(4)[int(np.argmax(moved)) - 1]


def test_dropped_labels_are_null_in_all_passes(trainer, monkeypatch):
    learner, seen = trainer(label_dropout=1.0), []
    learner.model.y_embedder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    learner.step()
    learner.model.y_embedder._forward_pre_hooks.clear()
    assert torch.stack(seen).tolist() == [[CONFIG.null_label] * 4] * 3


def test_an_epoch_shows_every_row_once_to_one_process(trainer, monkeypatch):
    seen = []
    for rank in range(2):
        learner = trainer(Workers(rank, 2), batch=2)
        monkeypatch.setattr(Workers, "average", lambda self, parameters, loss: float(loss))
        data = learner.objective.data
        read = data.read
        monkeypatch.setattr(
            type(data), "read", lambda self, rows, read=read: seen.extend(rows) or read(rows)
        )
        for _ in range(5):
            learner.step()
        monkeypatch.undo()
    assert sorted(seen) == list(range(10))


def test_a_resumed_training_is_the_same_to_the_bit(trainer, tmp_path):
    straight = trainer()
    train(straight, tmp_path / "straight")
    half = trainer(iterations=3)
    train(half, tmp_path / "half")
    resumed = trainer()
    resumed.restore(tmp_path / "half")
    assert resumed.iteration == 3
    train(resumed, tmp_path / "half")
    np.testing.assert_array_equal(resumed.router().logits, straight.router().logits)
    assert (tmp_path / "half").stat().st_size > 0
    torch.testing.assert_close(
        resumed.optimizer.state_dict()["state"],
        straight.optimizer.state_dict()["state"],
        rtol=0,
        atol=0,
    )


PROCESS = """
import os, sys, torch
from pathlib import Path
from l2c_export.train import job as jobs
from l2c_export.train.recipe import Recipe
from l2c_export.core.models import read_model_config
torch.set_num_threads(1)
folder, out, no_data = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "True"
without = {"no_data": True, "guidance_scale": 2.0, "label_dropout": None} if no_data else {}
kept = []
save = jobs.Trainer.save
jobs.Trainer.save = lambda self, path: (kept.append(self.router().logits), save(self, path))
result = jobs.train_router(jobs.Job(read_model_config(folder / "model.json"),
    Recipe(steps=4, iterations=6, batch=4, lr=0.05, **without),
    None if no_data else folder / "data.npz", out / "router.safetensors",
    checkpoint=folder / "model.safetensors", device="cpu"))
print(result is None, kept[-1].tobytes().hex(), flush=True)
os._exit(0)  # what PyTorch's threads do while the interpreter ends is not asked here
"""


@pytest.mark.parametrize("no_data", [False, True])
def test_two_processes_train_one_router(folder, tmp_path, no_data):
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29000 + os.getpid() % 9000)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROCESS, str(folder), str(tmp_path), str(no_data)],
            env=env | {"RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    (first, logits), (second, same) = (out.split() for out, _ in outputs)
    assert (first, second) == ("False", "True")  # one of them reports
    assert logits == same
    written = read_router(tmp_path / "router.safetensors", "dit").logits
    assert written.tobytes().hex() == logits


def test_a_gradient_of_one_process_counts_for_all(monkeypatch):
    # The other process drew the second parameter, with gradient 3 and loss 5.
    first, second, third = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    first.grad = torch.ones(1)
    other = torch.tensor([0.0, 1, 0, 5, 0, 3, 0])
    monkeypatch.setattr("torch.distributed.all_reduce", lambda flat: flat.add_(other))
    assert Workers(0, 2).average([first, second, third], torch.tensor(1.0)) == 3
    assert (first.grad.item(), second.grad.item(), third.grad) == (0.5, 1.5, None)


# From files to a file ---------------------------------------------------------------------------


def test_the_command_writes_a_router_that_the_rest_can_read(folder, tmp_path):
    output = tmp_path / "router.safetensors"
    arguments = ["train-router", "--model-config", folder / "model.json", "--data", folder / "data.npz"]
    arguments += ["--checkpoint", folder / "model.safetensors", "--steps", "4", "--iterations", "4"]
    arguments += ["--batch", "2", "--lambda", "1e-5", "-o", output, "--device", "cpu"]
    done = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    assert "threshold   removed of routed" in done.stdout
    assert re.search(r" 4 iterations in \d+ s  loss \S+ -> \S+\n$", done.stdout)
    assert not done.stderr
    router = read_router(output, "dit")
    assert router.routed.tolist() == [False, True, False, True]
    assert router.source["training"]["l1"] == 1e-5
    done = CliRunner().invoke(cli, [str(a) for a in [*arguments, "--resume", "--json"]])
    facts = json.loads(done.stdout)
    assert (facts["iterations"], facts["losses"]) == (4, None)
    assert [row["routed"] for row in facts["sweep"]] == [8] * 10


def test_more_iterations_continue_a_training(job):
    train_router(job)
    longer = replace(job, recipe=replace(RECIPE, iterations=8), resume=True)
    assert train_router(longer).iterations == 8


def test_fewer_iterations_than_were_made_are_refused(job):
    train_router(job)
    shorter = replace(job, recipe=replace(RECIPE, iterations=2), resume=True)
    with pytest.raises(L2CError, match=f"has {RECIPE.iterations} iterations already"):
        train_router(shorter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 5}, "--steps 5: .* must be even; use 6"),
        ({"steps": 0}, "--steps 0 is outside"),
        ({"lr": float("nan")}, "--lr nan is outside"),
        ({"lr": -1.0}, "--lr -1.0 is outside"),
        ({"label_dropout": 1.5}, "--label-dropout 1.5 is outside"),
        ({"ste_threshold": 2.0}, "--ste-threshold 2.0 is outside"),
        ({"batch": 0}, "--batch 0 is outside"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(changes, message):
    with pytest.raises(L2CError, match=message):
        Recipe(**changes)


def test_a_batch_that_cannot_be_shared_is_refused(trainer):
    with pytest.raises(L2CError, match="--batch 4 cannot be shared by 3 processes"):
        trainer(Workers(0, 3))


def test_a_checkpoint_of_another_model_is_refused(job):
    other = replace(CONFIG, depth=3)
    with pytest.raises(L2CError, match="does not fit the model"):
        train_router(replace(job, config=other))


def test_a_broken_model_stops_the_training(trainer, tmp_path):
    learner = trainer()
    learner.objective.model = load_model(random_checkpoint(CONFIG, 1)).requires_grad_(False)
    learner.objective.model.final_layer.linear.bias.data.fill_(float("nan"))
    with pytest.raises(L2CError, match="the loss is nan in iteration 1"):
        train(learner, tmp_path / "state")


def test_a_model_without_a_checkpoint_is_refused(job):
    with pytest.raises(L2CError, match="needs --checkpoint"):
        train_router(replace(job, checkpoint=None))


def test_an_output_without_a_folder_is_refused_before_training(job, tmp_path):
    with pytest.raises(L2CError, match="there is no folder"):
        train_router(replace(job, output=tmp_path / "none" / "router.safetensors"))


def test_an_output_that_is_a_folder_is_refused_before_training(job, tmp_path):
    with pytest.raises(L2CError, match="it is a folder"):
        train_router(replace(job, output=tmp_path))


def test_another_training_does_not_overwrite_a_checkpoint(job):
    train_router(job)
    kept = job.state.read_bytes()
    with pytest.raises(L2CError, match="continue it with --resume, or remove it"):
        train_router(job)
    assert job.state.read_bytes() == kept
    job.state.unlink()
    assert train_router(job).iterations == RECIPE.iterations


@pytest.mark.parametrize(("device", "index"), [("cuda", 1), (None, 1), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_gpu_that_is_named_is_used(device, index, monkeypatch):
    chosen = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with workers(device) as (_, used):
        assert [used] == chosen == [torch.device("cuda", index)]


def test_one_gpu_for_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(L2CError, match=r"--device cuda:0: .*; use cuda"), workers("cuda:0"):
        pass


def test_a_device_that_is_not_here_is_refused(job):
    with pytest.raises(L2CError, match="--device 'gpu' is no device"):
        train_router(replace(job, device="gpu"))


def test_resuming_needs_the_same_training(job):
    with pytest.raises(L2CError, match="nothing to resume"):
        train_router(replace(job, resume=True))
    train_router(job)
    resumed = replace(job, resume=True)
    with pytest.raises(L2CError, match=r"lr was 0\.05, is 0\.1"):
        train_router(replace(resumed, recipe=replace(RECIPE, lr=0.1)))
    with pytest.raises(L2CError, match=r"latent_scale was 1\.0, is 2\.0"):
        train_router(replace(resumed, latent_scale=2.0))
    whole = job.state.read_bytes()
    job.state.write_bytes(whole[:-8])
    with pytest.raises(L2CError, match="is damaged"):
        train_router(resumed)
    save_file({"logits": torch.zeros(1)}, job.state)
    with pytest.raises(L2CError, match="no training checkpoint of this release"):
        train_router(resumed)
