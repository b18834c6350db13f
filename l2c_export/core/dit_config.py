"""Geometry of DiT (Peebles & Xie 2022, arXiv 2212.09748): adaLN-Zero blocks."""

from __future__ import annotations

from dataclasses import dataclass

from l2c_export.core.geometry import Geometry, Shape, linear, slot
from l2c_export.errors import L2CError


@dataclass(frozen=True)
class DiTConfig(Geometry):
    """A diffusion transformer with adaLN-Zero blocks; ``depth`` is the number of its blocks.

    Attributes:
        learn_sigma: The network also predicts a variance: 2C output channels, of which a
            deterministic sampler uses the first C.
        guidance_channels: Leading channels to which classifier-free guidance applies; the others
            keep the conditional prediction. The official ``forward_with_cfg`` guides 3 of 4.
        frequency_divisor: Frequency i of the timestep embedding is 10000 ** (-i / divisor): 128 in
            the official model; 127 in diffusers, whatever model its weights come from.
        mlp_norm_eps: Epsilon of the norm before each MLP: 1e-6 in the official model; diffusers
            has 1e-5 unless ``norm_eps`` says otherwise. The other norms have 1e-6 in both.
    """

    learn_sigma: bool = True
    guidance_channels: int = 3
    frequency_divisor: int = 128
    mlp_norm_eps: float = 1e-6
    family: str = "dit"

    def __post_init__(self) -> None:
        """Refuse a geometry that cannot exist."""
        super().__post_init__()
        self._check_choice("family", ("dit",))
        if self.guidance_channels > self.in_channels:
            raise L2CError(
                f"model guidance_channels {self.guidance_channels} is more than its in_channels, "
                f"{self.in_channels}"
            )
        if self.hidden_size % 4:
            raise L2CError(
                f"model hidden_size {self.hidden_size} is not divisible by 4 (the position table is)"
            )

    @property
    def tokens(self) -> int:
        """Tokens N that the blocks see: the patches."""
        return self.patches

    @property
    def first_timestep(self) -> int:
        """What the network is told for the least noise: training counts its steps from 0."""
        return 0

    @property
    def blocks(self) -> int:
        """Blocks that are run, one after the other."""
        return self.depth

    @property
    def out_channels(self) -> int:
        """Channels that the network itself predicts."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    def fixed_macs(self) -> int:
        """Multiply-accumulates of one row that every call computes: patch embedding, final layer."""
        p2, n, d = self.patch_size**2, self.tokens, self.hidden_size
        return n * d * p2 * (self.in_channels + self.out_channels)

    def conditioning_macs(self) -> int:
        """Multiply-accumulates of one row that depend on timestep and label alone."""
        d = self.hidden_size
        return 256 * d + d * d + (6 * self.depth + 2) * d * d

    def parameters(self) -> dict[str, Shape]:
        """Parameter names of the official checkpoints and their shapes, in model order."""
        d, p, m = self.hidden_size, self.patch_size, self.mlp_size
        shapes: dict[str, Shape] = {
            "pos_embed": (1, self.tokens, d),
            "x_embedder.proj.weight": (d, self.in_channels, p, p),
            "x_embedder.proj.bias": (d,),
            **linear("t_embedder.mlp.0", d, 256),
            **linear("t_embedder.mlp.2", d, d),
            "y_embedder.embedding_table.weight": (self.num_classes + 1, d),
        }
        for b in range(self.depth):
            shapes |= linear(f"blocks.{b}.attn.qkv", 3 * d, d)
            shapes |= linear(f"blocks.{b}.attn.proj", d, d)
            shapes |= linear(f"blocks.{b}.mlp.fc1", m, d)
            shapes |= linear(f"blocks.{b}.mlp.fc2", d, m)
            shapes |= linear(f"blocks.{b}.adaLN_modulation.1", 6 * d, d)
        shapes |= linear("final_layer.linear", p * p * self.out_channels, d)
        shapes |= linear("final_layer.adaLN_modulation.1", 2 * d, d)
        return shapes

    def parameter_owner(self, name: str) -> str:
        """What a parameter serves: a slot, ``"conditioning"`` or ``"fixed"`` (every call)."""
        if "adaLN_modulation" in name or name.startswith(("t_embedder.", "y_embedder.")):
            return "conditioning"
        if name.startswith("blocks."):
            _, block, part, *_ = name.split(".")
            return slot(int(block), part)
        return "fixed"


_SIZES = {"xl": (28, 1152, 16), "l": (24, 1024, 16), "b": (12, 768, 12), "s": (12, 384, 6)}

DIT_PRESETS = {
    f"dit-{size}-{patch}{suffix}": DiTConfig(depth, width, heads, patch, side)
    for size, (depth, width, heads) in _SIZES.items()
    for patch in (2, 4, 8)
    for suffix, side in (("", 32), ("-512", 64))
}
"""The official DiT configurations by name; 256 x 256 pixels without a suffix."""
