"""Geometry of the supported models: slots, multiply-accumulates, parameter shapes. No weights.

A configuration knows everything that planning needs, so a plan can be made for a model that is not
on this machine. The PyTorch module of the same configuration lives in ``l2c_export.build``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from l2c_export.errors import L2CError

Shape = tuple[int, ...]

_LARGEST_MLP = 1 << 20


def slot(block: int, part: str) -> str:
    """Name of a cache slot, the same in graphs, manifests, buffers and reports; sorts in order."""
    return f"{block:02d}.{part}"


@dataclass(frozen=True)
class DiTConfig:
    """A diffusion transformer with adaLN-Zero blocks (Peebles & Xie 2022, arXiv 2212.09748).

    Attributes:
        depth: Blocks; each has two slots, ``NN.attn`` and ``NN.mlp``.
        hidden_size: Width D of a token.
        num_heads: Attention heads; divides ``hidden_size``.
        patch_size: Side of a patch, in latent pixels.
        input_size: Side of the (square) latent, in latent pixels.
        in_channels: Latent channels C.
        num_classes: Labels 0 … num_classes-1; ``num_classes`` itself is the null label of guidance.
        learn_sigma: The network also predicts a variance: 2C output channels, of which a
            deterministic sampler uses the first C.
        mlp_ratio: Width of the MLP's hidden layer over ``hidden_size``.
        guidance_channels: Leading channels to which classifier-free guidance applies; the others
            keep the conditional prediction. The official ``forward_with_cfg`` guides 3 of 4.
        frequency_divisor: Frequency i of the timestep embedding is 10000 ** (-i / divisor): 128 in
            the official model; 127 in diffusers, whatever model its weights come from.
        mlp_norm_eps: Epsilon of the norm before each MLP: 1e-6 in the official model; diffusers
            has 1e-5 unless ``norm_eps`` says otherwise. The other norms have 1e-6 in both.
    """

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int
    input_size: int
    in_channels: int = 4
    num_classes: int = 1000
    learn_sigma: bool = True
    mlp_ratio: float = 4.0
    guidance_channels: int = 3
    frequency_divisor: int = 128
    mlp_norm_eps: float = 1e-6
    family: str = "dit"

    def __post_init__(self) -> None:
        """Refuse a geometry that cannot exist."""
        if self.family != "dit":
            raise L2CError(f"model family {self.family!r} is not supported; this release has: dit")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "family":
                continue
            if field.name == "learn_sigma":
                ok = isinstance(value, bool)
            elif field.name in ("mlp_ratio", "mlp_norm_eps"):
                ok = isinstance(value, (int, float)) and math.isfinite(value) and value > 0
            else:
                ok = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 65536
            if not ok:
                raise L2CError(
                    f"model {field.name} is {value!r}; it must be a positive number of its kind"
                )
        if self.hidden_size % self.num_heads:
            raise L2CError(
                f"model hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}"
            )
        if self.input_size % self.patch_size:
            raise L2CError(
                f"model input_size {self.input_size} is not divisible by patch_size {self.patch_size}"
            )
        if self.guidance_channels > self.in_channels:
            raise L2CError(
                f"model guidance_channels {self.guidance_channels} is more than its in_channels, "
                f"{self.in_channels}"
            )
        if self.hidden_size % 4:
            raise L2CError(
                f"model hidden_size {self.hidden_size} is not divisible by 4 (the position table is)"
            )
        if not 1 <= self.mlp_size <= _LARGEST_MLP:
            raise L2CError(
                f"model mlp_ratio is {self.mlp_ratio!r}, which makes the MLP {self.mlp_size:.6g} wide; "
                f"it must be 1 to {_LARGEST_MLP}"
            )

    @property
    def tokens(self) -> int:
        """Tokens N of one latent."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def out_channels(self) -> int:
        """Channels that the network itself predicts."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def mlp_size(self) -> int:
        """Width of the MLP's hidden layer."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def null_label(self) -> int:
        """The label of the unconditional rows."""
        return self.num_classes

    @property
    def latent_shape(self) -> Shape:
        """(C, H, W) of one latent."""
        return (self.in_channels, self.input_size, self.input_size)

    @property
    def slots(self) -> tuple[str, ...]:
        """Cache slots in execution order: ``00.attn``, ``00.mlp``, ``01.attn`` and so on."""
        return tuple(slot(b, part) for b in range(self.depth) for part in ("attn", "mlp"))

    @property
    def slot_shape(self) -> Shape:
        """(N, D): one row of a cached branch output, before its gate."""
        return (self.tokens, self.hidden_size)

    def slot_macs(self) -> dict[str, int]:
        """Multiply-accumulates of each slot for one row."""
        n, d, m = self.tokens, self.hidden_size, self.mlp_size
        cost = {"attn": 4 * n * d * d + 2 * n * n * d, "mlp": 2 * n * d * m}
        return {name: cost[name[3:]] for name in self.slots}

    def fixed_macs(self) -> int:
        """Multiply-accumulates of one row that every call computes: patch embedding, final layer."""
        p2, n, d = self.patch_size**2, self.tokens, self.hidden_size
        return n * d * p2 * (self.in_channels + self.out_channels)

    def call_macs(self, reads: Collection[str] = ()) -> int:
        """Multiply-accumulates of one row of a call that reads these slots and computes the others."""
        return self.fixed_macs() + sum(n for name, n in self.slot_macs().items() if name not in reads)

    def conditioning_macs(self) -> int:
        """Multiply-accumulates of one row that depend on timestep and label alone."""
        d = self.hidden_size
        return 256 * d + d * d + (6 * self.depth + 2) * d * d

    def parameters(self) -> dict[str, Shape]:
        """Parameter names of the official checkpoints and their shapes, in model order."""
        d, p, m = self.hidden_size, self.patch_size, self.mlp_size

        def linear(name: str, out: int, inp: int) -> dict[str, Shape]:
            return {f"{name}.weight": (out, inp), f"{name}.bias": (out,)}

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

    def to_json(self) -> dict[str, Any]:
        """The ``model`` object of a manifest or a configuration file."""
        data = asdict(self)
        return {"family": data.pop("family"), **data}


_DIT_SIZES = {"xl": (28, 1152, 16), "l": (24, 1024, 16), "b": (12, 768, 12), "s": (12, 384, 6)}

PRESETS: dict[str, DiTConfig] = {
    f"dit-{size}-{patch}{suffix}": DiTConfig(depth, width, heads, patch, side)
    for size, (depth, width, heads) in _DIT_SIZES.items()
    for patch in (2, 4, 8)
    for suffix, side in (("", 32), ("-512", 64))
}
"""The official DiT configurations by name; 256 x 256 pixels without a suffix."""


def preset(name: str) -> DiTConfig:
    """The configuration of a named model.

    Raises:
        L2CError: There is no model of that name.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise L2CError(f"unknown model {name!r}; known: {', '.join(PRESETS)}") from None


def config_from_json(data: object, where: str) -> DiTConfig:
    """Make a configuration from the ``model`` object of a manifest or a file, refusing unknown keys."""
    if not isinstance(data, Mapping):
        raise L2CError(f"{where}: the model configuration must be a JSON object")
    known = [field.name for field in fields(DiTConfig)]
    if "family" not in data:
        raise L2CError(f"{where}: the model configuration has no 'family'; this release has: dit")
    if data["family"] != "dit":
        raise L2CError(
            f"{where}: model family {data['family']!r} is not supported; this release has: dit"
        )
    if unknown := sorted(set(data) - set(known)):
        raise L2CError(f"{where}: unknown model key(s) {', '.join(unknown)}; known: {', '.join(known)}")
    channels = data.get("in_channels", DiTConfig.in_channels)
    default = {"guidance_channels": min(3, channels) if isinstance(channels, int) else 3}
    try:
        return DiTConfig(**default | dict(data))
    except TypeError as error:
        missing = str(error).partition("argument")[2].lstrip("s:") or str(error)
        raise L2CError(f"{where}: the model configuration lacks {missing.strip()}") from None
    except L2CError as error:
        raise L2CError(f"{where}: {error}") from None


def read_model_config(path: Path) -> DiTConfig:
    """Read ``--model-config``: a JSON file with a model object, or with one under ``"model"``."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise L2CError(f"cannot read model configuration {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise L2CError(f"{path} is not JSON: {error}") from None
    if isinstance(data, dict) and isinstance(data.get("model"), dict):
        data = data["model"]
    return config_from_json(data, str(path))
