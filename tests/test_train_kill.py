"""A training that is killed with SIGKILL, while it runs, goes on to the bits of one that was not."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file

from l2c_export.build.checkpoint import random_checkpoint
from l2c_export.cli import cli
from l2c_export.core.models import DiTConfig, UViTConfig

DIT = DiTConfig(2, 32, 2, 2, 4, in_channels=2, num_classes=3, guidance_channels=2)
UVIT = UViTConfig(2, 32, 2, 2, 4, in_channels=2, num_classes=3)

KINDS = {
    "DiT, pairs": (DIT, ["--data", "data.npz"]),
    "DiT, without data, every call": (
        DIT,
        ["--no-data", "--schedule", "every", "--reweigh-every", "7", "--steps", "5"],
    ),
    "U-ViT, shifted pairs": (UVIT, ["--data", "data.npz", "--steps", "6"]),
}


def write_files(folder, config):
    rng = np.random.default_rng(0)
    (folder / "model.json").write_text(json.dumps(config.to_json()))
    save_file(dict(random_checkpoint(config, 1).tensors), folder / "model.safetensors")
    latents = rng.standard_normal((10, *config.latent_shape)).astype(np.float32)
    np.savez(folder / "data.npz", latents=latents, labels=np.arange(10) % 3)


def arguments(folder, output, options, iterations):
    common = ["train-router", "--model-config", folder / "model.json", "--device", "cpu"]
    common += ["--checkpoint", folder / "model.safetensors", "--batch", 4, "--lr", 0.05]
    common += ["--threads", 1, "--checkpoint-every", 3, "--iterations", iterations, "-o", output]
    given = [folder / option if option == "data.npz" else option for option in options]
    return [str(argument) for argument in [*common, *given]]


def iterations_of(state):
    with safe_open(state, framework="np") as file:
        return json.loads(file.metadata()["state"])["iteration"]


def train_until_killed(folder, output, options):
    """Kill a training once it has checkpoints; return how many iterations the last of them had."""
    code = "from l2c_export.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments(folder, output, options, 10**6)],
        stderr=subprocess.PIPE,
        text=True,
    )
    state = output.with_name(output.name + ".training")
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        if state.exists() and iterations_of(state) >= 6:
            break
        time.sleep(0.01)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    return iterations_of(state)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_training_goes_on_to_the_same_bits(kind, tmp_path):
    config, options = KINDS[kind]
    write_files(tmp_path, config)
    killed, straight = tmp_path / "killed.safetensors", tmp_path / "straight.safetensors"
    total = train_until_killed(tmp_path, killed, options) + 8
    assert not killed.exists()
    for output, more in ((killed, ["--resume"]), (straight, [])):
        done = CliRunner().invoke(cli, [*arguments(tmp_path, output, options, total), *more])
        assert done.exit_code == 0, done.output
    assert killed.read_bytes() == straight.read_bytes()
