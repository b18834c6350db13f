"""The PyTorch model of a configuration, and what all families share: guidance, and names of types."""

from __future__ import annotations

import torch
from torch import Tensor

from l2c_export.build.dit import Branches, DiT
from l2c_export.build.uvit import UViT
from l2c_export.core.models import DiTConfig, ModelConfig

__all__ = ["Branches", "Model", "build_model", "guide"]

Model = DiT | UViT
"""Called as ``model(x, t, y, reuse)``; returns the prediction and slot -> branch output."""


def build_model(config: ModelConfig) -> Model:
    """A model with PyTorch's own initialisation, on the current device."""
    return DiT(config) if isinstance(config, DiTConfig) else UViT(config)


def guide(prediction: Tensor, scale: Tensor | float, config: ModelConfig) -> Tensor:
    """Classifier-free guidance of a batched call (Ho & Salimans 2022, arXiv 2207.12598).

    Args:
        prediction: (2B, C or 2C, S, S), conditional rows first.
        scale: s in uncond + s * (cond - uncond); 1 is the conditional prediction. U-ViT's official
            w in cond + w * (cond - uncond) is s - 1.
        config: Says how many leading channels are guided; the rest keep the conditional half.

    Returns:
        (B, C, S, S) guided prediction.
    """
    pair = prediction[:, : config.in_channels].reshape(2, -1, *config.latent_shape)
    cond, uncond = pair.unbind(0)
    g = config.guidance_channels
    guided = uncond[:, :g] + scale * (cond[:, :g] - uncond[:, :g])
    return torch.cat([guided, cond[:, g:]], dim=1) if g < config.in_channels else guided
