"""Geometry of U-ViT (Bao et al. 2022, arXiv 2209.12152): all inputs are tokens, with long skips."""

from __future__ import annotations

from dataclasses import dataclass, replace

from l2c_export.core.geometry import Geometry, Shape, linear, slot
from l2c_export.errors import L2CError


@dataclass(frozen=True)
class UViTConfig(Geometry):
    """A U-ViT with class labels: depth/2 in-blocks, one in the middle, depth/2 out-blocks.

    The tokens are the label, the time, then the patches. In-block i hands its output to out-block
    depth/2-1-i, which joins it to its input with one linear layer; these long skips belong to no
    slot and are always computed.

    Attributes:
        qkv_bias: The layers that make queries, keys and values have a bias.
        mlp_time_embed: The time token goes through two linear layers.
        conv: A 3 x 3 convolution follows the decoder.
        skip: The long skips; without them the out-blocks are as the in-blocks.
    """

    noise_schedule: str = "scaled_linear"
    qkv_bias: bool = False
    mlp_time_embed: bool = False
    conv: bool = True
    skip: bool = True
    family: str = "uvit"

    def __post_init__(self) -> None:
        """Refuse a geometry that cannot exist."""
        super().__post_init__()
        self._check_choice("family", ("uvit",))
        for name in ("depth", "hidden_size"):
            if getattr(self, name) % 2:
                raise L2CError(f"model {name} {getattr(self, name)} is odd; in a U-ViT it is even")

    @property
    def tokens(self) -> int:
        """Tokens N that the blocks see: label, time, patches."""
        return self.patches + 2

    @property
    def first_timestep(self) -> int:
        """What the network is told for the least noise: training counts its steps from 1."""
        return 1

    @property
    def blocks(self) -> int:
        """Blocks that are run, one after the other."""
        return self.depth + 1

    @property
    def out_channels(self) -> int:
        """Channels that the network itself predicts."""
        return self.in_channels

    @property
    def guidance_channels(self) -> int:
        """Leading channels to which classifier-free guidance applies: all."""
        return self.in_channels

    def fixed_macs(self) -> int:
        """Of one row, in every call: patch embedding, long skips, decoder, final convolution."""
        d, c = self.hidden_size, self.in_channels
        ends = 2 * self.patches * d * self.patch_size**2 * c
        skips = self.depth // 2 * self.tokens * 2 * d * d if self.skip else 0
        return ends + skips + (9 * c * c * self.input_size**2 if self.conv else 0)

    def conditioning_macs(self) -> int:
        """Multiply-accumulates of one row that depend on timestep and label alone."""
        return 8 * self.hidden_size**2 if self.mlp_time_embed else 0

    def parameters(self) -> dict[str, Shape]:
        """Parameter names of the official checkpoints and their shapes, in model order."""
        d, p, c = self.hidden_size, self.patch_size, self.in_channels
        shapes: dict[str, Shape] = {
            "pos_embed": (1, self.tokens, d),
            "patch_embed.proj.weight": (d, c, p, p),
            "patch_embed.proj.bias": (d,),
        }
        if self.mlp_time_embed:
            shapes |= linear("time_embed.0", 4 * d, d) | linear("time_embed.2", d, 4 * d)
        shapes["label_emb.weight"] = (self.num_classes + 1, d)
        for block in self._block_names():
            shapes |= self._block_parameters(block)
        shapes |= _norm("norm", d) | linear("decoder_pred", p * p * c, d)
        if self.conv:
            shapes |= {"final_layer.weight": (c, c, 3, 3), "final_layer.bias": (c,)}
        return shapes

    def parameter_owner(self, name: str) -> str:
        """What a parameter serves: a slot, ``"conditioning"`` or ``"fixed"`` (every call)."""
        if name.startswith(("time_embed.", "label_emb.")):
            return "conditioning"
        for i, block in enumerate(self._block_names()):
            if name.startswith(f"{block}.") and not name.startswith(f"{block}.skip_linear."):
                first = name.startswith((f"{block}.norm1.", f"{block}.attn."))
                return slot(i, "attn" if first else "mlp")
        return "fixed"

    def _block_names(self) -> list[str]:
        """The official names of the blocks, in execution order."""
        half = range(self.depth // 2)
        return [*(f"in_blocks.{i}" for i in half), "mid_block", *(f"out_blocks.{i}" for i in half)]

    def _block_parameters(self, name: str) -> dict[str, Shape]:
        d, m = self.hidden_size, self.mlp_size
        return (
            _norm(f"{name}.norm1", d)
            | linear(f"{name}.attn.qkv", 3 * d, d, self.qkv_bias)
            | linear(f"{name}.attn.proj", d, d)
            | _norm(f"{name}.norm2", d)
            | linear(f"{name}.mlp.fc1", m, d)
            | linear(f"{name}.mlp.fc2", d, m)
            | (linear(f"{name}.skip_linear", d, 2 * d) if self._joins(name) else {})
        )

    def _joins(self, block: str) -> bool:
        return self.skip and block.startswith("out_blocks.")


def _norm(name: str, size: int) -> dict[str, Shape]:
    """Parameters of a layer norm."""
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


# Depth, width and heads from the paper's Table 1. The released H models have no final convolution;
# the released L models were trained with the linear schedule in continuous time.
_H = UViTConfig(28, 1152, 16, 2, 32, conv=False)
_L = UViTConfig(20, 1024, 16, 2, 32, noise_schedule="linear")

UVIT_PRESETS = {
    "uvit-h-2": _H,
    "uvit-h-4-512": replace(_H, patch_size=4, input_size=64),
    "uvit-l-2": _L,
    "uvit-l-4-512": replace(_L, patch_size=4, input_size=64),
    "uvit-m-2": UViTConfig(16, 768, 12, 2, 32),
    "uvit-s-2-deep": UViTConfig(16, 512, 8, 2, 32),
    "uvit-s-2": UViTConfig(12, 512, 8, 2, 32),
}
"""The official U-ViT configurations by name, for the latents of ImageNet at 256 and 512 pixels."""
