"""What the geometries of all model families share: the names of slots, fields, and their checks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from typing import Any

from l2c_export.core.samplers import NOISE_SCHEDULES, PREDICTIONS
from l2c_export.errors import L2CError

Shape = tuple[int, ...]

_LARGEST_MLP = 1 << 20


def slot(block: int, part: str) -> str:
    """Name of a cache slot, the same in graphs, manifests, buffers and reports; sorts in order."""
    return f"{block:02d}.{part}"


def linear(name: str, out: int, inp: int, bias: bool = True) -> dict[str, Shape]:
    """Parameters of a linear layer."""
    return {f"{name}.weight": (out, inp)} | ({f"{name}.bias": (out,)} if bias else {})


@dataclass(frozen=True)
class Geometry(ABC):
    """A transformer over the patches of a square latent, whose blocks have two branches each.

    Attributes:
        depth: Number of blocks, as the family counts them.
        hidden_size: Width D of a token.
        num_heads: Attention heads; divides ``hidden_size``.
        patch_size: Side of a patch, in latent pixels.
        input_size: Side of the (square) latent, in latent pixels.
        in_channels: Latent channels C.
        num_classes: Labels 0 … num_classes-1; ``num_classes`` itself is the null label of guidance.
        mlp_ratio: Width of the MLP's hidden layer over ``hidden_size``.
        noise_schedule: The betas it was trained with: ``linear`` (1e-4 to 0.02, Ho et al. 2020) or
            ``scaled_linear`` (the square roots are linear, 0.00085 to 0.012, Stable Diffusion).
        prediction: What the network predicts: ``noise``, or ``velocity`` for flow matching.
    """

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int
    input_size: int
    in_channels: int = 4
    num_classes: int = 1000
    mlp_ratio: float = 4.0
    noise_schedule: str = "linear"
    prediction: str = "noise"
    family: str = ""

    def __post_init__(self) -> None:
        """Refuse a geometry that cannot exist."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not _of_kind(str(field.type), value):
                raise L2CError(
                    f"model {field.name} is {value!r}; it must be a positive number of its kind"
                )
        self._check_choice("noise_schedule", NOISE_SCHEDULES)
        self._check_choice("prediction", PREDICTIONS)
        if self.hidden_size % self.num_heads:
            raise L2CError(
                f"model hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}"
            )
        if self.input_size % self.patch_size:
            raise L2CError(
                f"model input_size {self.input_size} is not divisible by patch_size {self.patch_size}"
            )
        if not 1 <= self.mlp_size <= _LARGEST_MLP:
            raise L2CError(
                f"model mlp_ratio is {self.mlp_ratio!r}, which makes the MLP {self.mlp_size:.6g} wide; "
                f"it must be 1 to {_LARGEST_MLP}"
            )

    def _check_choice(self, name: str, known: Collection[str]) -> None:
        if getattr(self, name) not in known:
            raise L2CError(
                f"model {name} is {getattr(self, name)!r}; it must be one of: {', '.join(known)}"
            )

    @property
    def patches(self) -> int:
        """Patches of one latent."""
        return (self.input_size // self.patch_size) ** 2

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens N that the blocks see."""

    @property
    @abstractmethod
    def blocks(self) -> int:
        """Blocks that are run, one after the other."""

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
        return tuple(slot(b, part) for b in range(self.blocks) for part in ("attn", "mlp"))

    @property
    def slot_shape(self) -> Shape:
        """(N, D): one row of a cached branch output, before its gate if it has one."""
        return (self.tokens, self.hidden_size)

    def slot_macs(self) -> dict[str, int]:
        """Multiply-accumulates of each slot for one row."""
        n, d, m = self.tokens, self.hidden_size, self.mlp_size
        cost = {"attn": 4 * n * d * d + 2 * n * n * d, "mlp": 2 * n * d * m}
        return {name: cost[name[3:]] for name in self.slots}

    @abstractmethod
    def fixed_macs(self) -> int:
        """Multiply-accumulates of one row that every call computes, whatever it reuses."""

    def call_macs(self, reads: Collection[str] = ()) -> int:
        """Multiply-accumulates of one row of a call that reads these slots and computes the others."""
        return self.fixed_macs() + sum(n for name, n in self.slot_macs().items() if name not in reads)

    @abstractmethod
    def conditioning_macs(self) -> int:
        """Multiply-accumulates of one row that depend on timestep and label alone."""

    @abstractmethod
    def parameters(self) -> dict[str, Shape]:
        """Parameter names of the official checkpoints and their shapes, in model order."""

    @abstractmethod
    def parameter_owner(self, name: str) -> str:
        """What a parameter serves: a slot, ``"conditioning"`` or ``"fixed"`` (every call)."""

    def to_json(self) -> dict[str, Any]:
        """The ``model`` object of a manifest or a configuration file."""
        data = asdict(self)
        return {"family": data.pop("family"), **data}


def _of_kind(kind: str, value: object) -> bool:
    """Whether a value fits a field's annotation: bool, int, float or str."""
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "str":
        return isinstance(value, str)
    if isinstance(value, bool):
        return False
    if kind == "float":
        return isinstance(value, (int, float)) and math.isfinite(value) and value > 0
    return isinstance(value, int) and 0 < value <= 65536
