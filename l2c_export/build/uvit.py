"""U-ViT in PyTorch: eager reference, export source and training model in one file.

Parameter names are those of the official checkpoints. Shapes in comments: R rows (latents, times two
with guidance), N tokens, D width, H heads, C channels, P patch side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2c_export.core.models import UViTConfig, slot

Branches = dict[str, Tensor]

EXTRAS = 2
"""Tokens before the patches: the label, then the time."""


def timestep_embedding(t: Tensor, size: int) -> Tensor:
    """Sinusoidal embedding: (R,) timesteps, also between whole ones, to (R, size), cosines first."""
    half = size // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * exponents)[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention over (R, N, D)."""

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.heads = config.num_heads
        self.qkv = nn.Linear(d, 3 * d, bias=config.qkv_bias)
        self.proj = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the N tokens."""
        r, n, d = x.shape
        qkv = self.qkv(x).reshape(r, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # (R, H, N, D/H); one copy, not three, in engines
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(r, n, d))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU."""

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_size)
        self.fc2 = nn.Linear(config.mlp_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(R, N, D) to (R, N, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Two branches without gates; either can be given instead of computed."""

    def __init__(self, config: UViTConfig, skip: bool = False) -> None:
        super().__init__()
        d = config.hidden_size
        self.norm1 = nn.LayerNorm(d)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(d)
        self.mlp = Mlp(config)
        self.skip_linear = nn.Linear(2 * d, d) if skip else None

    def forward(
        self, x: Tensor, skip: Tensor | None, attn: Tensor | None, mlp: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the residual stream and both branch outputs, (R, N, D) each.

        A long skip is joined whatever is reused, and a reused branch is added to the *current*
        stream (the released code of Learning-to-Cache; the paper's alpha = 0 would keep the old).
        """
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        if attn is None:
            attn = self.attn(self.norm1(x))
        x = x + attn
        if mlp is None:
            mlp = self.mlp(self.norm2(x))
        return x + mlp, attn, mlp


class PatchEmbed(nn.Module):
    """(R, C, S, S) latents to (R, N-2, D) tokens."""

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, p, stride=p)

    def forward(self, x: Tensor) -> Tensor:
        """Cut into patches, row by row."""
        return self.proj(x).flatten(2).transpose(1, 2)


class UViT(nn.Module):
    """The whole network."""

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        self.config = config
        d, c, half = config.hidden_size, config.in_channels, config.depth // 2
        self.pos_embed = nn.Parameter(torch.zeros(1, *config.slot_shape))
        self.patch_embed = PatchEmbed(config)
        self.time_embed = nn.Sequential(nn.Linear(d, 4 * d), nn.SiLU(), nn.Linear(4 * d, d))
        if not config.mlp_time_embed:
            self.time_embed = nn.Sequential()
        self.label_emb = nn.Embedding(config.num_classes + 1, d)  # the last row: the null label
        self.in_blocks = nn.ModuleList(Block(config) for _ in range(half))
        self.mid_block = Block(config)
        self.out_blocks = nn.ModuleList(Block(config, config.skip) for _ in range(half))
        self.norm = nn.LayerNorm(d)
        self.decoder_pred = nn.Linear(d, config.patch_size**2 * c)
        self.final_layer = nn.Conv2d(c, c, 3, padding=1) if config.conv else nn.Identity()

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, reuse: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Branches]:
        """Predict noise, and return every branch output that this call used.

        Args:
            x: (R, C, S, S) latents.
            t: (R,) timesteps.
            y: (R,) int64 labels.
            reuse: (R, N, D) branch outputs, by slot, to use instead of computing them.

        Returns:
            (R, C, S, S) prediction, and slot -> (R, N, D) branch output.
        """
        reuse = reuse or {}
        label = self.label_emb(y)[:, None]  # (R, 1, D)
        time = self.time_embed(timestep_embedding(t, self.config.hidden_size))[:, None]
        x = torch.cat([label, time, self.patch_embed(x)], dim=1) + self.pos_embed  # (R, N, D)
        branches: Branches = {}
        skips: list[Tensor] = []
        half = self.config.depth // 2
        for i, block in enumerate(self.blocks()):
            a, m = slot(i, "attn"), slot(i, "mlp")
            skip = skips.pop() if i > half else None
            x, branches[a], branches[m] = block(x, skip, reuse.get(a), reuse.get(m))
            if i < half:
                skips.append(x)
        x = self.decoder_pred(self.norm(x[:, EXTRAS:]))  # (R, N-2, P*P*C)
        return self.final_layer(self.unpatchify(x)), branches

    def blocks(self) -> list[nn.Module]:
        """In execution order: the in-blocks, the one in the middle, the out-blocks."""
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def branch_modules(self) -> dict[str, nn.Module]:
        """Slot to the module whose output it is, in execution order."""
        return {
            slot(i, part): getattr(block, part)
            for i, block in enumerate(self.blocks())
            for part in ("attn", "mlp")
        }

    def unpatchify(self, x: Tensor) -> Tensor:
        """(R, N-2, P*P*C) to (R, C, S, S)."""
        p, side = self.config.patch_size, self.config.input_size // self.config.patch_size
        x = x.reshape(x.shape[0], side, side, p, p, self.config.in_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, side * p, side * p)
