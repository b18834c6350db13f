"""``inspect`` and ``run`` as a user meets them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import handmade
import numpy as np
import pytest
from click.testing import CliRunner

from l2c_export.cli import cli
from l2c_export.core.bundle import read_bundle, write_manifest
from l2c_export.errors import UnsupportedError
from l2c_export.evidence.images import image_grid
from l2c_export.evidence.samples import SampleOptions, default_labels, sample_to_files
from l2c_export.runtime import Runner


@pytest.fixture(scope="session")
def bundle(tmp_path_factory) -> Path:
    return handmade.write_bundle(tmp_path_factory.mktemp("handmade") / "bundle")


def run(*arguments: object):
    """Exit code, stdout and stderr of a command."""
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def noisy(tmp_path) -> Path:
    """A bundle whose calls draw noise."""
    folder = handmade.write_bundle(tmp_path / "noisy")
    manifest = read_bundle(folder).manifest
    update = {"x": {"x": 0.5, "output": 0.25, "noise": 0.5}}
    calls = tuple(replace(call, update=update) for call in manifest.calls)
    write_manifest(folder, replace(manifest, calls=calls, stochastic=True, sampler="ddpm"))
    return folder


def test_run_draws_the_noise_of_calls_from_the_seed(noisy, tmp_path):
    def latents(*options):
        code, _, err = run("run", noisy, "--labels", "1,2", "-o", tmp_path / "s.npy", *options)
        assert code == 0, err
        return np.load(tmp_path / "s.npy")

    start = tmp_path / "start.npy"
    np.save(start, np.zeros((2, *handmade.LATENT), np.float32))
    assert np.array_equal(latents("--seed", 3), latents("--seed", 3))
    assert not np.allclose(latents("--seed", 3), latents("--seed", 4))
    given = latents("--noise", start)
    assert np.array_equal(given, latents("--noise", start, "--seed", 0))
    assert not np.allclose(given, latents("--noise", start, "--seed", 1))
    assert "sampler   ddpm, draws noise in its calls; 6 calls" in run("inspect", noisy)[1]


# -- inspect ------------------------------------------------------------------------------------


def test_inspect_shows_the_program(bundle):
    code, out, err = run("inspect", bundle)
    assert (code, err) == (0, "")
    for text in (
        "digests   every file is what was built",
        "weights   RANDOM (seed 0)",
        "schedule  handmade; 6 of 24 sub-layers reused",
        "caches    4 buffers, 4.0 KiB at batch 4",
        "guidance  scale 1.5 on 3 of 3 channels",
        "conditioning",
        "call 3",
    ):
        assert text in out
    assert all(len(line) <= 100 for line in out.splitlines()[1:])
    last = out.splitlines()[-1].split()
    assert last[:6] == ["5", "499", "step-ccrc", "3", "1", "0"]


def test_inspect_prints_json(bundle):
    code, out, _ = run("inspect", bundle, "--json", "--no-check")
    data = json.loads(out)
    assert (code, data["checked"], data["cache_bytes"]) == (0, False, 4096)
    assert data["graph_calls"]["step-cccc"] == [3]
    assert data["calls"][2]["reads"] == handmade.PROGRAM[2][0]
    assert data["bytes"] == sum(f["bytes"] for f in data["files"].values())


def test_inspect_names_a_damaged_file(tmp_path):
    bundle = handmade.write_bundle(tmp_path / "bundle")
    with (bundle / "conditioning.onnx").open("r+b") as file:
        file.write(b"\x00")
    code, out, err = run("inspect", bundle)
    assert (code, out) == (1, "")
    assert "conditioning.onnx does not match its digest" in err
    assert "not checked" in run("inspect", bundle, "--no-check")[1]


def test_inspect_refuses_what_is_no_bundle(tmp_path):
    code, _, err = run("inspect", tmp_path)
    assert code == 1
    assert "is not a bundle" in err
    assert len(err.splitlines()) == 1


# -- run ----------------------------------------------------------------------------------------


def test_run_writes_everything_and_a_picture(bundle, tmp_path):
    code, out, err = run("run", bundle, "--labels", "1,2,3,4,5", "--seed", 7, "-o", tmp_path / "s.npz")
    assert code == 0
    assert err.strip() == "warning: the weights are random, and so are the results"  # and no bar
    assert "5 images, cached, in 2 trajectories of 6 calls" in out
    with np.load(tmp_path / "s.npz") as data:
        assert data["labels"].tolist() == [1, 2, 3, 4, 5]
        again = Runner.load(bundle).sample(data["labels"], noise=data["noise"])
        assert np.array_equal(again, data["latents"])
        facts = json.loads(str(data["facts"]))
    assert (facts["seed"], facts["guidance_scale"], facts["schedule"]["kind"]) == (7, 1.5, "handmade")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.npz", "s.png"]


def test_run_prints_one_line_of_json(bundle, tmp_path):
    code, out, _ = run("run", bundle, "--json", "--uncached", "-o", tmp_path / "s.npy")
    (line,) = out.splitlines()
    facts = json.loads(line)
    assert (code, facts["cached"], facts["outputs"]) == (0, False, [str(tmp_path / "s.npy")])
    assert facts["labels"] == [0, 2, 5, 7]
    latents = Runner.load(bundle).sample([0, 2, 5, 7], seed=0, cached=False)
    assert np.array_equal(np.load(tmp_path / "s.npy"), latents)


def test_run_starts_from_a_file_of_noise(bundle, tmp_path):
    noise = np.random.default_rng(3).standard_normal((2, *handmade.LATENT), dtype=np.float32)
    np.save(tmp_path / "noise.npy", noise)
    code, _, _ = run("run", bundle, "--noise", tmp_path / "noise.npy", "-o", tmp_path / "s.npy")
    assert code == 0
    latents = Runner.load(bundle).sample([0, 5], noise=noise)
    assert np.array_equal(np.load(tmp_path / "s.npy"), latents)


def test_a_seed_gives_the_same_images_whatever_the_batches(tmp_path):
    outs = []
    for high in (2, 4):
        made = handmade.write_bundle(tmp_path / f"b{high}", batch=(1, high))
        options = SampleOptions(labels=(1, 2, 3, 4, 5), seed=1)
        sample_to_files(made, options, tmp_path / f"{high}.npy")
        outs.append(np.load(tmp_path / f"{high}.npy"))
    assert np.abs(outs[0] - outs[1]).max() <= 1e-5 * np.abs(outs[1]).max()


def test_progress_is_told_for_each_call(bundle, tmp_path):
    seen = []
    options = SampleOptions(labels=(1, 2, 3, 4, 5))
    sample_to_files(bundle, options, tmp_path / "s.npy", lambda *at: seen.append(at))
    assert seen == [*((i, 12) for i in range(13)), (12, 12)]  # beginning and end are told by themselves


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--labels", "1,x"], 2, "is not a list of class labels"),
        (["--labels", "10"], 1, "label 10 is not a class of this model; it has 0 to 9"),
        (["--seed", "-1"], 2, "-1 is not in the range"),
        (["--seed", "1", "--noise", "x.npy"], 2, "the seed is only for making noise"),
        (["--noise", "missing.npy"], 1, "cannot read noise missing.npy: No such file"),
        (["--noise", __file__], 1, "is not a .npy file of numbers"),
        (["--guidance-scale", "nan"], 1, "guidance_scale is nan"),
        (["--guidance-scale", "1e300"], 1, "guidance_scale is 1e+300"),
        (["--backend", "cuda"], 2, "'cuda' is not one of 'ort'"),
        (["--threads", "0"], 2, "0 is not in the range"),
        (["-o", "samples.jpg"], 1, "give a name that ends in .npz, .npy, .png"),
        (["-o", f"{'x' * 300}.npz"], 1, "File name too long"),
        (["-o", "/proc/none/samples.npz"], 1, "cannot write output /proc/none/samples.npz"),
    ],
)
def test_run_refuses_in_one_line(bundle, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    got, out, err = run("run", bundle, *arguments)
    assert (got, out) == (code, "")
    assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["s.npz", "s.npy", "s.png"])
def test_a_full_disk_is_one_line(bundle, tmp_path, name):
    """A limit on the size of files stands for it."""
    code = f"""
import resource, sys
from l2c_export.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
sys.argv = ["l2c-export", "run", {str(bundle)!r}, "-o", {name!r}]
main()
"""
    command = [sys.executable, "-B", "-c", code]  # nor may it cut off .pyc files
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (out.returncode, out.stdout) == (1, "")
    _, error = out.stderr.splitlines()  # after the warning of random weights
    assert f"cannot write output {name}: " in error
    assert not list(tmp_path.iterdir())


def test_an_output_that_becomes_a_folder_is_one_line(bundle, tmp_path):
    (tmp_path / "s.png").mkdir()
    code, _, err = run("run", bundle, "-o", tmp_path / "s.npz")
    assert code == 1
    assert f"cannot write output {tmp_path / 's.png'}: Is a directory" in err


def test_run_says_which_files_it_writes():
    text = " ".join(run("run", "--help")[1].split())
    assert "A .npz then gets its .png beside it, if Pillow is installed." in text


def test_a_latent_has_no_picture(bundle, tmp_path):
    """Nothing but the manifest makes the difference."""
    copy = tmp_path / "bundle"
    copy.mkdir()
    manifest = read_bundle(bundle).manifest
    for path in bundle.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    write_manifest(copy, replace(manifest, latent=(4, 3, 4)))
    code, _, err = run("run", copy, "-o", tmp_path / "s.png")
    assert code == 4
    assert "latents of 4 channels need the model's VAE to become pictures; write .npz or .npy" in err


def test_default_labels_are_spread_over_the_classes(bundle):
    manifest = read_bundle(bundle).manifest
    assert default_labels(manifest) == (0, 2, 5, 7)
    assert default_labels(replace(manifest, classes=1000, batch=(1, 64)))[-1] == 900
    assert default_labels(replace(manifest, classes=2, batch=(4, 4))) == (0, 0, 1, 1)


# -- pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_black_grey_and_white(channels):
    images = np.stack([np.full((channels, 4, 4), v, np.float32) for v in (-1, 0, 1, -5, np.nan)])
    grid = image_grid(images, columns=3, side=8)
    assert grid.shape == (2 * 8 + 2, 3 * 8 + 2 * 2, 3)
    assert [grid[0, 0, 0], grid[0, 10, 0], grid[0, 20, 0]] == [0, 128, 255]
    assert [grid[10, 0, 1], grid[10, 10, 1], grid[10, 20, 1]] == [0, 0, 255]  # the last is empty
    assert (grid[:, 8:10] == 255).all()


def test_a_grid_refuses_latents():
    with pytest.raises(ValueError, match="4 channels are not an image"):
        image_grid(np.zeros((1, 4, 2, 2)))


def test_a_missing_pillow_is_said_before_the_work(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(Runner, "sample", lambda *a, **k: pytest.fail("it ran"))
    with pytest.raises(UnsupportedError, match=r"a PNG needs Pillow; .*l2c-export\[report\]"):
        sample_to_files(bundle, SampleOptions(), tmp_path / "s.png")
