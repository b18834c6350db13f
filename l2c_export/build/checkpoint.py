"""Checkpoints of the supported models, all under the official parameter names; no file's code is run.

Four kinds of source give the same interface: the official ``.pt``, safetensors with the official
names, a diffusers folder, and random weights. Tensors are mapped or made when they are asked for.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from l2c_export.build.dit import position_embedding
from l2c_export.build.safe_load import check_file, load_pickle
from l2c_export.core.files import sha256
from l2c_export.core.models import PRESETS, DiTConfig, ModelConfig, Shape, UViTConfig
from l2c_export.errors import L2CError

Shapes = dict[str, Shape]

_FLOATS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_SAFETENSORS_TYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_DIFFUSERS_NAME = "diffusion_pytorch_model"


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file (or to be made): what is known without reading it, and how to read it."""

    shape: Shape
    dtype: str
    load: Callable[[], Tensor]


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by official name, in model order, read or made at each access."""

    def __init__(self, stored: Mapping[str, _Stored]) -> None:
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
        return _open_diffusers(path, config)
    check_file(path, "checkpoint")
    safe = path.suffix == ".safetensors"
    stored, part = (_scan_safetensors(path), None) if safe else _scan_pickle(path)
    _check_fit(path, stored, config.parameters(), preset_hint=True)
    source = {
        "kind": "checkpoint",
        "format": "safetensors" if safe else "official-pt",
        "file": path.name,
    }
    source |= {"sha256": sha256(path)} | ({"part": part} if part else {})
    return Checkpoint(config, _in_order(stored, config), source)


def _in_order(stored: Mapping[str, _Stored], config: ModelConfig) -> LazyTensors:
    return LazyTensors({name: stored[name] for name in config.parameters()})


# Files ------------------------------------------------------------------------------------------


def _scan_pickle(path: Path) -> tuple[dict[str, _Stored], str | None]:
    """A state dict, and the part of the file it was under."""
    content = load_pickle(path)
    part = None
    if isinstance(content, Mapping):
        part = next((key for key in ("ema", "model") if isinstance(content.get(key), Mapping)), None)
        content = content[part] if part else content
    if not isinstance(content, Mapping) or not any(isinstance(t, Tensor) for t in content.values()):
        raise L2CError(f"checkpoint {path} holds no state dict of tensors, plain or under ema or model")
    return {str(name): _from_tensor(path, name, value) for name, value in content.items()}, part


def _from_tensor(path: Path, name: object, value: object) -> _Stored:
    if not isinstance(value, Tensor):
        raise L2CError(f"checkpoint {path}: {name} is a {type(value).__name__}, not a tensor")
    if value.layout != torch.strided or value.device.type != "cpu":
        raise L2CError(f"checkpoint {path}: {name} is a {value.layout} tensor without plain data")
    return _Stored(tuple(value.shape), str(value.dtype).removeprefix("torch."), lambda: value)


def _scan_safetensors(path: Path) -> dict[str, _Stored]:
    check_file(path, "checkpoint")
    try:
        file: Any = safe_open(path, framework="pt")
        names = file.keys()
        slices = {name: file.get_slice(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise L2CError(f"checkpoint {path} is damaged or no safetensors file: {error}") from None
    return {
        name: _Stored(
            tuple(part.get_shape()),
            _SAFETENSORS_TYPES.get(part.get_dtype(), part.get_dtype()),
            partial(file.get_tensor, name),
        )
        for name, part in slices.items()
    }


def _check_fit(
    path: Path, stored: Mapping[str, _Stored], expected: Shapes, *, preset_hint: bool
) -> None:
    """Refuse tensors that are missing, surplus, of another shape, or not floating point."""
    missing = [name for name in expected if name not in stored]
    surplus = [name for name in stored if name not in expected]
    shapes = [
        f"{name} is {stored[name].shape} where the model has {shape}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    faults = [
        f"{len(names)} {what} ({_some(names)})"
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


def _preset_hint(stored: Mapping[str, _Stored]) -> str:
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    fits = [name for name, config in PRESETS.items() if config.parameters() == shapes]
    return f"; this looks like --model {fits[0]}" if fits else ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


# Diffusers --------------------------------------------------------------------------------------

_EMBEDDER = "transformer_blocks.{}.norm1.emb."
_EMBEDDER_NAMES = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
_BLOCK_NAMES = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm1.linear",),
}
_OUTER_NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_DIFFUSERS_DEFAULTS = {
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": None,
    "num_embeds_ada_norm": 1000,
}
_DIFFUSERS_FIXED = {
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
}


def config_from_diffusers(folder: Path) -> DiTConfig:
    """The model of a diffusers folder, so that it needs no name.

    Raises:
        L2CError: The folder holds another kind of model.
    """
    folder = _transformer_folder(folder)
    where, data = folder / "config.json", _read_diffusers_config(folder)
    if data["out_channels"] not in (data["in_channels"], 2 * data["in_channels"]):
        raise L2CError(
            f"{where}: out_channels is {data['out_channels']}; it must be in_channels or twice that"
        )
    try:
        return DiTConfig(
            depth=data["num_layers"],
            hidden_size=data["num_attention_heads"] * data["attention_head_dim"],
            num_heads=data["num_attention_heads"],
            patch_size=data["patch_size"],
            input_size=data["sample_size"],
            in_channels=data["in_channels"],
            num_classes=data["num_embeds_ada_norm"],
            learn_sigma=data["out_channels"] != data["in_channels"],
            guidance_channels=min(3, data["in_channels"]),
            **_diffusers_constants(folder),
        )
    except L2CError as error:
        raise L2CError(f"{where}: {error}") from None


def _diffusers_constants(folder: Path) -> dict[str, Any]:
    """Where diffusers computes something else than the official model, from the same weights."""
    eps = _read_json(folder / "config.json").get("norm_eps", 1e-5)
    return {"frequency_divisor": 127, "mlp_norm_eps": eps}


def _open_diffusers(path: Path, config: DiTConfig) -> Checkpoint:
    folder = _transformer_folder(path)
    _check_diffusers_config(folder, config)
    config = replace(config, **_diffusers_constants(folder))
    files, stored = _scan_diffusers(folder)
    table = stored.pop("pos_embed.pos_embed", None)  # old releases of diffusers stored it
    _check_fit(folder, stored, _diffusers_shapes(config), preset_hint=False)
    _check_table(folder, table, config)
    _check_embedders(folder, stored, config)
    digests = {file.name: sha256(file) for file in files}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    source: dict[str, Any] = {"kind": "checkpoint", "format": "diffusers"}
    source |= {
        "file": path.resolve().name,
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "files": digests,
    }
    return Checkpoint(config, LazyTensors(_from_diffusers(stored, config)), source)


def _transformer_folder(path: Path) -> Path:
    """The folder of the transformer, given it or its pipeline."""
    for folder in (path, path / "transformer"):
        if (folder / "config.json").is_file():
            return folder
    raise L2CError(f"{path} is no diffusers folder: neither it nor its transformer/ has a config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise L2CError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise L2CError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise L2CError(f"{path} must hold a JSON object")
    return data


def _read_diffusers_config(folder: Path) -> dict[str, Any]:
    """The geometry in config.json, with diffusers' defaults, as positive integers."""
    where, data = folder / "config.json", _read_json(folder / "config.json")
    # Until 0.30, diffusers called this model Transformer2DModel; norm_type tells it from others.
    if (name := data.get("_class_name")) not in ("DiTTransformer2DModel", "Transformer2DModel"):
        raise L2CError(f"{where} is for {name!r}; only DiTTransformer2DModel can be read")
    for key, needed in _DIFFUSERS_FIXED.items():
        if (value := data.get(key, needed)) != needed:
            raise L2CError(f"{where}: {key} is {value!r}; only {needed!r} is supported")
    geometry = {key: data.get(key, default) for key, default in _DIFFUSERS_DEFAULTS.items()}
    if geometry["out_channels"] is None:
        geometry["out_channels"] = geometry["in_channels"]
    for key, value in geometry.items():
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise L2CError(f"{where}: {key} is {value!r}; it must be a positive whole number")
    return geometry


def _check_diffusers_config(folder: Path, config: DiTConfig) -> None:
    """Name the first field in which the folder is for another model."""
    data = _read_diffusers_config(folder)
    wanted = {
        "num_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "sample_size": config.input_size,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_embeds_ada_norm": config.num_classes,
    }
    for key, value in wanted.items():
        if data[key] != value:
            hint = _diffusers_preset(folder)
            raise L2CError(
                f"{folder / 'config.json'}: {key} is {data[key]}, the model has {value}{hint}"
            )


def _diffusers_preset(folder: Path) -> str:
    try:
        found = config_from_diffusers(folder)
    except L2CError:
        return ""
    found = replace(found, frequency_divisor=128, mlp_norm_eps=1e-6)
    name = next((name for name, config in PRESETS.items() if config == found), None)
    return f"; this looks like --model {name}" if name else ""


def _scan_diffusers(folder: Path) -> tuple[list[Path], dict[str, _Stored]]:
    """The files that make the model, and all their tensors."""
    config, single = folder / "config.json", folder / f"{_DIFFUSERS_NAME}.safetensors"
    index = folder / f"{_DIFFUSERS_NAME}.safetensors.index.json"
    if single.is_file():
        return [config, single], _scan_safetensors(single)
    if index.is_file():
        return _scan_shards(config, index)
    pickled = folder / f"{_DIFFUSERS_NAME}.bin"
    if pickled.is_file():
        return [config, pickled], _scan_pickle(pickled)[0]
    raise L2CError(f"{folder} has no {single.name}, {index.name} or {pickled.name}")


def _scan_shards(config: Path, index: Path) -> tuple[list[Path], dict[str, _Stored]]:
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise L2CError(f"{index} has no 'weight_map' from tensors to files")
    stored: dict[str, _Stored] = {}
    shards = sorted(set(names.values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise L2CError(f"{index} names {shard!r}; shards must lie beside it")
        found = _scan_safetensors(index.parent / shard)
        if wrong := [name for name in found if names.get(name) != shard]:
            raise L2CError(f"{index} does not place {_some(wrong)} in {shard}")
        stored |= found
    return [config, index, *(index.parent / shard for shard in shards)], stored


def _diffusers_names(config: DiTConfig) -> dict[str, tuple[str, ...]]:
    """Official parameter -> the diffusers tensors that make it, stacked along the first axis."""
    modules: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in _OUTER_NAMES.items()}
    modules |= {ours: (_EMBEDDER.format(0) + theirs,) for ours, theirs in _EMBEDDER_NAMES.items()}
    for b in range(config.depth):
        for ours, theirs in _BLOCK_NAMES.items():
            modules[f"blocks.{b}.{ours}"] = tuple(f"transformer_blocks.{b}.{name}" for name in theirs)
    names: dict[str, tuple[str, ...]] = {}
    for parameter in config.parameters():
        module, _, kind = parameter.rpartition(".")
        if module:  # all but the table pos_embed, which diffusers computes
            names[parameter] = tuple(f"{name}.{kind}" for name in modules[module])
    return names


def _diffusers_shapes(config: DiTConfig) -> Shapes:
    """What a diffusers folder of this model holds; each block has its own copy of the embedders."""
    ours, shapes = config.parameters(), Shapes()
    for parameter, names in _diffusers_names(config).items():
        rows, *rest = ours[parameter]
        shapes |= {name: (rows // len(names), *rest) for name in names}
    copied = {name: shape for name, shape in shapes.items() if name.startswith(_EMBEDDER.format(0))}
    for b in range(1, config.depth):
        shapes |= {name.replace(".0.", f".{b}.", 1): shape for name, shape in copied.items()}
    return shapes


def _from_diffusers(stored: Mapping[str, _Stored], config: DiTConfig) -> dict[str, _Stored]:
    names = _diffusers_names(config)
    entries = {"pos_embed": _position(config)}
    for parameter, shape in config.parameters().items():
        if parameter in names:
            parts = [stored[name] for name in names[parameter]]
            entries[parameter] = _Stored(shape, parts[0].dtype, partial(_stack, parts))
    return entries


def _stack(parts: Sequence[_Stored]) -> Tensor:
    return parts[0].load() if len(parts) == 1 else torch.cat([part.load() for part in parts])


def _check_table(folder: Path, table: _Stored | None, config: DiTConfig) -> None:
    """Today's diffusers computes the position table; an old file must agree, in half precision too."""
    if table is None:
        return
    expected = position_embedding(config)
    if table.shape != expected.shape or not torch.allclose(table.load().float(), expected, atol=2e-3):
        raise L2CError(f"{folder}: pos_embed.pos_embed is not the sine-cosine table of this model")


def _check_embedders(folder: Path, stored: Mapping[str, _Stored], config: DiTConfig) -> None:
    """The model has one timestep and label embedder; diffusers' copies must be equal."""
    prefix = _EMBEDDER.format(0)
    for name in [name for name in stored if name.startswith(prefix)]:
        first = stored[name].load()
        for b in range(1, config.depth):
            copy = name.replace(".0.", f".{b}.", 1)
            if not torch.allclose(stored[copy].load(), first, rtol=0, atol=0, equal_nan=True):
                raise L2CError(
                    f"{folder}: {copy} differs from block 0; this model has one timestep and label "
                    "embedder for all blocks"
                )


# Made, not read ---------------------------------------------------------------------------------


def _position(config: DiTConfig) -> _Stored:
    return _Stored(config.parameters()["pos_embed"], "float32", partial(position_embedding, config))


def random_checkpoint(config: ModelConfig, seed: int) -> Checkpoint:
    """Weights for planning and benchmarks: the same for the same seed, in every process.

    No branch is idle (an untrained DiT starts with adaLN and final layer at zero, where every
    schedule gives the same result), and activations stay near 1 through many blocks.
    """
    if not 0 <= seed < 2**63:
        raise L2CError(f"random weights seed {seed} is outside 0 … 2**63-1")
    spread = _uvit_spread if isinstance(config, UViTConfig) else _dit_spread
    entries = {
        name: _Stored(shape, "float32", partial(_random_tensor, seed, name, shape, spread(name, shape)))
        for name, shape in config.parameters().items()
    }
    if isinstance(config, DiTConfig):
        entries["pos_embed"] = _position(config)
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
