"""DiT in PyTorch: eager reference, export source and training model in one file.

Parameter names are those of the official checkpoints. Shapes in comments: R rows (latents, times two
with guidance), N tokens, D width, H heads, C channels, P patch side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2c_export.core.models import DiTConfig, slot

Branches = dict[str, Tensor]


def timestep_embedding(t: Tensor, divisor: int = 128) -> Tensor:
    """Sinusoidal embedding: (R,) timesteps to (R, 256), cosines first."""
    exponents = torch.arange(128, dtype=torch.float32, device=t.device) / divisor
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * exponents)[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def position_embedding(config: DiTConfig) -> Tensor:
    """The fixed 2-D sine-cosine table (1, N, D) that the official checkpoints store."""
    side, quarter = config.input_size // config.patch_size, config.hidden_size // 4
    omega = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    position = torch.arange(side, dtype=torch.float64)[:, None] * omega[None]
    table = torch.cat([position.sin(), position.cos()], dim=1)  # (side, D/2)
    columns = table[None].expand(side, side, -1)  # first half: the column
    rows = table[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, side * side, -1).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: (R, N, D) scaled and shifted by (R, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class TimestepEmbedder(nn.Module):
    """(R,) timesteps to (R, D)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.divisor = config.frequency_divisor
        self.mlp = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))

    def forward(self, t: Tensor) -> Tensor:
        """Embed timesteps in 0 … 999."""
        return self.mlp(timestep_embedding(t, self.divisor))


class LabelEmbedder(nn.Module):
    """(R,) labels to (R, D); the last row of the table is the null label."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """Look labels up."""
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention over (R, N, D)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.heads = config.num_heads
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the N tokens."""
        r, n, d = x.shape
        qkv = self.qkv(x).reshape(r, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # (R, H, N, D/H); one copy, not three, in engines
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(r, n, d))


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_size)
        self.fc2 = nn.Linear(config.mlp_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(R, N, D) to (R, N, D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """One adaLN-Zero block; either branch can be given instead of computed."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.size, self.mlp_eps = config.hidden_size, config.mlp_norm_eps
        self.attn = Attention(config)
        self.mlp = Mlp(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(self.size, 6 * self.size))

    def forward(
        self, x: Tensor, c: Tensor, attn: Tensor | None, mlp: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the residual stream and both branch outputs before their gates, (R, N, D) each.

        A reused branch is multiplied by the *current* gate and added to the *current* stream
        (the released code; the paper's alpha = 0 would keep the old stream).
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        if attn is None:
            attn = self.attn(modulate(self.norm(x), shift_a, scale_a))
        x = x + gate_a[:, None] * attn
        if mlp is None:
            mlp = self.mlp(modulate(self.norm(x, self.mlp_eps), shift_m, scale_m))
        return x + gate_m[:, None] * mlp, attn, mlp

    def norm(self, x: Tensor, eps: float = 1e-6) -> Tensor:
        """LayerNorm without parameters."""
        return F.layer_norm(x, (self.size,), eps=eps)


class PatchEmbed(nn.Module):
    """(R, C, S, S) latents to (R, N, D) tokens."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, p, stride=p)

    def forward(self, x: Tensor) -> Tensor:
        """Cut into patches, row by row."""
        return self.proj(x).flatten(2).transpose(1, 2)


class FinalLayer(nn.Module):
    """(R, N, D) tokens to (R, N, P*P*C) pixels."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.size = d = config.hidden_size
        self.linear = nn.Linear(d, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Modulate and project."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(F.layer_norm(x, (self.size,), eps=1e-6), shift, scale))


class DiT(nn.Module):
    """The whole network."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config)
        self.y_embedder = LabelEmbedder(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, *config.slot_shape), requires_grad=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

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
            (R, C or 2C, S, S) prediction, and slot -> (R, N, D) branch output before its gate.
        """
        reuse = reuse or {}
        x = self.x_embedder(x) + self.pos_embed  # (R, N, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (R, D)
        branches: Branches = {}
        for i, block in enumerate(self.blocks):
            a, m = slot(i, "attn"), slot(i, "mlp")
            x, branches[a], branches[m] = block(x, c, reuse.get(a), reuse.get(m))
        return self.unpatchify(self.final_layer(x, c)), branches

    def branch_modules(self) -> dict[str, nn.Module]:
        """Slot to the module whose output it is, in execution order."""
        return {
            slot(i, part): getattr(block, part)
            for i, block in enumerate(self.blocks)
            for part in ("attn", "mlp")
        }

    def unpatchify(self, x: Tensor) -> Tensor:
        """(R, N, P*P*C) to (R, C, S, S)."""
        p, side = self.config.patch_size, self.config.input_size // self.config.patch_size
        x = x.reshape(x.shape[0], side, side, p, p, self.config.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, side * p, side * p)
