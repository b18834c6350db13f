"""Tensors where they are stored, mapped or made when asked for, and whether they fit a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from l2c_export.build.dit import position_embedding
from l2c_export.build.safe_load import check_file, load_pickle
from l2c_export.core.models import PRESETS, DiTConfig, ModelConfig, Shape
from l2c_export.errors import L2CError

Shapes = dict[str, Shape]

_FLOATS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_SAFETENSORS_TYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file (or to be made): what is known without reading it, and how to read it."""

    shape: Shape
    dtype: str
    load: Callable[[], Tensor]


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by official name, in model order, read or made at each access."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = dict(stored)

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[name].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights, wherever they come from.

    Attributes:
        config: The model that they make. From a diffusers folder it has diffusers' constants,
            whatever the model that was asked for has.
        tensors: Official parameter name -> tensor in the source's own floating-point type, in
            the order of ``config.parameters()``. Reading does not check the values.
        source: For the manifest: ``kind`` ("checkpoint" or "random") and, for files, ``format``,
            ``file``, ``sha256``; a folder's digest covers its ``files`` (name -> sha256).
    """

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    source: dict[str, Any]

    def iter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter as a contiguous float32 CPU tensor, in model order, one at a time.

        Raises:
            L2CError: A tensor holds NaN or Inf.
        """
        for name in self.config.parameters():
            tensor = self.tensors[name].detach().to(torch.float32).contiguous()
            # NaN and Inf survive a sum, which is 15 times faster than asking every element.
            if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
                raise L2CError(
                    f"{self.source.get('file', 'checkpoint')}: tensor {name} holds NaN or Inf; "
                    "the checkpoint is broken, use another"
                )
            yield name, tensor


def scan_pickle(path: Path) -> tuple[dict[str, Stored], str | None]:
    """A state dict, and the part of the file it was under."""
    content = load_pickle(path)
    part = None
    if isinstance(content, Mapping):
        part = next((key for key in ("ema", "model") if isinstance(content.get(key), Mapping)), None)
        content = content[part] if part else content
    if not isinstance(content, Mapping) or not any(isinstance(t, Tensor) for t in content.values()):
        raise L2CError(f"checkpoint {path} holds no state dict of tensors, plain or under ema or model")
    return {str(name): _from_tensor(path, name, value) for name, value in content.items()}, part


def _from_tensor(path: Path, name: object, value: object) -> Stored:
    if not isinstance(value, Tensor):
        raise L2CError(f"checkpoint {path}: {name} is a {type(value).__name__}, not a tensor")
    if value.layout != torch.strided or value.device.type != "cpu":
        raise L2CError(f"checkpoint {path}: {name} is a {value.layout} tensor without plain data")
    return Stored(tuple(value.shape), str(value.dtype).removeprefix("torch."), lambda: value)


def scan_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, mapped."""
    check_file(path, "checkpoint")
    try:
        file: Any = safe_open(path, framework="pt")
        names = file.keys()
        slices = {name: file.get_slice(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise L2CError(f"checkpoint {path} is damaged or no safetensors file: {error}") from None
    return {
        name: Stored(
            tuple(part.get_shape()),
            _SAFETENSORS_TYPES.get(part.get_dtype(), part.get_dtype()),
            partial(file.get_tensor, name),
        )
        for name, part in slices.items()
    }


def check_fit(path: Path, stored: Mapping[str, Stored], expected: Shapes, *, preset_hint: bool) -> None:
    """Refuse tensors that are missing, surplus, of another shape, or not floating point."""
    missing = [name for name in expected if name not in stored]
    surplus = [name for name in stored if name not in expected]
    shapes = [
        f"{name} is {stored[name].shape} where the model has {shape}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    faults = [
        f"{len(names)} {what} ({some(names)})"
        for what, names in (("missing", missing), ("surplus", surplus), ("misshapen", shapes))
        if names
    ]
    if faults:
        hint = _preset_hint(stored) if preset_hint else ""
        raise L2CError(f"checkpoint {path} does not fit the model: {'; '.join(faults)}{hint}")
    for name in expected:
        if stored[name].dtype not in _FLOATS:
            raise L2CError(
                f"checkpoint {path}: tensor {name} is {stored[name].dtype}; "
                f"weights must be one of {', '.join(_FLOATS)}"
            )


def _preset_hint(stored: Mapping[str, Stored]) -> str:
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    fits = [name for name, config in PRESETS.items() if config.parameters() == shapes]
    return f"; this looks like --model {fits[0]}" if fits else ""


def some(names: Sequence[str]) -> str:
    """The first few names, for an error."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def position(config: DiTConfig) -> Stored:
    """The position table that the official checkpoints store, computed."""
    return Stored(config.parameters()["pos_embed"], "float32", partial(position_embedding, config))
