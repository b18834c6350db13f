"""Checkpoints of the supported models, all under the official parameter names; no file's code is run.

Four kinds of source give the same interface: the official ``.pt``, safetensors with the official
names, a diffusers folder, and random weights. Tensors are mapped or made when they are asked for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from l2c_export.build.diffusers_folder import open_diffusers
from l2c_export.build.safe_load import check_file
from l2c_export.build.stored import (
    Checkpoint,
    LazyTensors,
    Stored,
    check_fit,
    position,
    scan_pickle,
    scan_safetensors,
)
from l2c_export.core.files import sha256
from l2c_export.core.models import DiTConfig, ModelConfig, Shape, UViTConfig
from l2c_export.errors import L2CError

__all__ = ["Checkpoint", "open_checkpoint", "random_checkpoint"]


def open_checkpoint(path: Path, config: ModelConfig) -> Checkpoint:
    """Open the weights of a model.

    Args:
        path: An official ``.pt`` or ``.pth`` (plain, or under ``ema`` or ``model``; ``ema`` is
            preferred), a ``.safetensors`` with official names, or for DiT a diffusers folder (or a
            pipeline with one under ``transformer/``).
        config: The model that they must fit.

    Raises:
        L2CError: The source is damaged, asks for code, or does not fit the model.
    """
    if path.is_dir():
        if not isinstance(config, DiTConfig):
            raise L2CError(
                f"{path} is a folder; a {config.family} model takes an official .pth or a .safetensors"
            )
        return open_diffusers(path, config)
    check_file(path, "checkpoint")
    safe = path.suffix == ".safetensors"
    stored, part = (scan_safetensors(path), None) if safe else scan_pickle(path)
    check_fit(path, stored, config.parameters(), preset_hint=True)
    source = {
        "kind": "checkpoint",
        "format": "safetensors" if safe else "official-pt",
        "file": path.name,
    }
    source |= {"sha256": sha256(path)} | ({"part": part} if part else {})
    return Checkpoint(config, _in_order(stored, config), source)


def _in_order(stored: Mapping[str, Stored], config: ModelConfig) -> LazyTensors:
    return LazyTensors({name: stored[name] for name in config.parameters()})


# Made, not read ---------------------------------------------------------------------------------


def random_checkpoint(config: ModelConfig, seed: int) -> Checkpoint:
    """Weights for planning and benchmarks: the same for the same seed, in every process.

    No branch is idle (an untrained DiT starts with adaLN and final layer at zero, where every
    schedule gives the same result), and activations stay near 1 through many blocks.
    """
    if not 0 <= seed < 2**63:
        raise L2CError(f"random weights seed {seed} is outside 0 … 2**63-1")
    spread = _uvit_spread if isinstance(config, UViTConfig) else _dit_spread
    entries = {
        name: Stored(shape, "float32", partial(_random_tensor, seed, name, shape, spread(name, shape)))
        for name, shape in config.parameters().items()
    }
    if isinstance(config, DiTConfig):
        entries["pos_embed"] = position(config)
    return Checkpoint(config, LazyTensors(entries), {"kind": "random", "seed": seed})


def _random_tensor(seed: int, name: str, shape: Shape, spread: float) -> Tensor:
    """Uniform numbers, scaled afterwards: unlike normal ones they have the same bits on any CPU."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    tensor = torch.empty(shape).uniform_(-0.5, 0.5, generator=generator).mul_(math.sqrt(12) * spread)
    return tensor.add_(1) if _is_norm_scale(name, shape) else tensor


def _is_norm_scale(name: str, shape: Shape) -> bool:
    return len(shape) == 1 and name.endswith(".weight")


def _dit_spread(name: str, shape: Shape) -> float:
    """Standard deviation of a random parameter."""
    if name.endswith(".bias"):
        return 0.02
    if name.startswith("y_embedder."):
        return 0.5
    fan_in = math.prod(shape[1:])
    # Half as strong: gates, shifts and scales near 0.2, so that 56 branches add up to about 1.
    return (0.5 if "adaLN_modulation" in name else 1.0) / math.sqrt(fan_in)


def _uvit_spread(name: str, shape: Shape) -> float:
    """Standard deviation of a random parameter."""
    if len(shape) == 1:
        return 0.02
    if name in ("pos_embed", "label_emb.weight"):
        return 0.5
    # There are no gates: weaker branches, so that 58 of them add up to about 1.
    weak = name.endswith(("attn.proj.weight", "mlp.fc2.weight"))
    return (0.4 if weak else 1.0) / math.sqrt(math.prod(shape[1:]))
