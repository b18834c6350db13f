"""A DiT in a diffusers folder: its configuration, and its weights under the official names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2c_export.build.dit import position_embedding
from l2c_export.build.stored import (
    Checkpoint,
    LazyTensors,
    Shapes,
    Stored,
    check_fit,
    position,
    scan_pickle,
    scan_safetensors,
    some,
)
from l2c_export.core.files import sha256
from l2c_export.core.models import PRESETS, DiTConfig
from l2c_export.errors import L2CError

_DIFFUSERS_NAME = "diffusion_pytorch_model"
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


def open_diffusers(path: Path, config: DiTConfig) -> Checkpoint:
    """Open the weights in a diffusers folder; the model gets diffusers' constants.

    Raises:
        L2CError: The folder is damaged, or does not fit the model.
    """
    folder = _transformer_folder(path)
    _check_diffusers_config(folder, config)
    config = replace(config, **_diffusers_constants(folder))
    files, stored = _scan_diffusers(folder)
    table = stored.pop("pos_embed.pos_embed", None)  # old releases of diffusers stored it
    check_fit(folder, stored, _diffusers_shapes(config), preset_hint=False)
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


def _scan_diffusers(folder: Path) -> tuple[list[Path], dict[str, Stored]]:
    """The files that make the model, and all their tensors."""
    config, single = folder / "config.json", folder / f"{_DIFFUSERS_NAME}.safetensors"
    index = folder / f"{_DIFFUSERS_NAME}.safetensors.index.json"
    if single.is_file():
        return [config, single], scan_safetensors(single)
    if index.is_file():
        return _scan_shards(config, index)
    pickled = folder / f"{_DIFFUSERS_NAME}.bin"
    if pickled.is_file():
        return [config, pickled], scan_pickle(pickled)[0]
    raise L2CError(f"{folder} has no {single.name}, {index.name} or {pickled.name}")


def _scan_shards(config: Path, index: Path) -> tuple[list[Path], dict[str, Stored]]:
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise L2CError(f"{index} has no 'weight_map' from tensors to files")
    stored: dict[str, Stored] = {}
    shards = sorted(set(names.values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise L2CError(f"{index} names {shard!r}; shards must lie beside it")
        found = scan_safetensors(index.parent / shard)
        if wrong := [name for name in found if names.get(name) != shard]:
            raise L2CError(f"{index} does not place {some(wrong)} in {shard}")
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


def _from_diffusers(stored: Mapping[str, Stored], config: DiTConfig) -> dict[str, Stored]:
    names = _diffusers_names(config)
    entries = {"pos_embed": position(config)}
    for parameter, shape in config.parameters().items():
        if parameter in names:
            parts = [stored[name] for name in names[parameter]]
            entries[parameter] = Stored(shape, parts[0].dtype, partial(_stack, parts))
    return entries


def _stack(parts: Sequence[Stored]) -> Tensor:
    return parts[0].load() if len(parts) == 1 else torch.cat([part.load() for part in parts])


def _check_table(folder: Path, table: Stored | None, config: DiTConfig) -> None:
    """Today's diffusers computes the position table; an old file must agree, in half precision too."""
    if table is None:
        return
    expected = position_embedding(config)
    if table.shape != expected.shape or not torch.allclose(table.load().float(), expected, atol=2e-3):
        raise L2CError(f"{folder}: pos_embed.pos_embed is not the sine-cosine table of this model")


def _check_embedders(folder: Path, stored: Mapping[str, Stored], config: DiTConfig) -> None:
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
