import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from l2c_export.build.checkpoint import (
    Checkpoint,
    open_checkpoint,
    random_checkpoint,
)
from l2c_export.build.diffusers_folder import config_from_diffusers
from l2c_export.build.dit import DiT
from l2c_export.core.models import PRESETS, DiTConfig, read_model_config
from l2c_export.errors import L2CError

DATA = Path(__file__).parent / "data" / "dit-ddim20"
TINY = DiTConfig(depth=2, hidden_size=16, num_heads=2, patch_size=2, input_size=4, num_classes=5)
DIFFUSERS_TINY = replace(TINY, frequency_divisor=127, mlp_norm_eps=1e-5)

State = dict[str, Tensor]


def state(config: DiTConfig = TINY, seed: int = 0) -> State:
    return dict(random_checkpoint(config, seed).iter_tensors())


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def assert_same(checkpoint: Checkpoint, expected: State) -> None:
    found = dict(checkpoint.iter_tensors())
    assert list(found) == list(TINY.parameters())
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert torch.equal(tensor, expected[name].float()), name


# Official files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrap", "part"),
    [
        (lambda s: s, None),
        (lambda s: {"ema": s}, "ema"),
        (lambda s: {"model": s, "opt": {"lr": 1}, "args": argparse.Namespace(lr=1)}, "model"),
        (lambda s: {"model": {k: v + 1 for k, v in s.items()}, "ema": s}, "ema"),
    ],
)
def test_official_files_are_read(
    tmp_path: Path, wrap: Callable[[State], object], part: str | None
) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "m.pt", wrap(state())), TINY)
    assert_same(checkpoint, state())
    digest = checkpoint.source.pop("sha256")
    assert len(digest) == 64
    source = {"kind": "checkpoint", "format": "official-pt", "file": "m.pt"}
    assert checkpoint.source == source | ({"part": part} if part else {})


def test_the_reference_checkpoint_is_read() -> None:
    config = read_model_config(DATA / "case.json")
    checkpoint = open_checkpoint(DATA / "model.pt", config)
    expected = torch.load(DATA / "model.pt", weights_only=True)
    for name, tensor in checkpoint.iter_tensors():
        assert torch.equal(tensor, expected[name])


def test_the_old_pickle_format_is_read(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    assert_same(open_checkpoint(tmp_path / "m.pt", TINY), state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_other_float_types_become_float32(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in state().items()}
    path = tmp_path / f"m.{suffix}"
    if suffix == "pt":
        save(path, weights)
    else:
        safetensors.torch.save_file(weights, path)
    checkpoint = open_checkpoint(path, TINY)
    assert checkpoint.tensors["pos_embed"].dtype == dtype
    assert_same(checkpoint, weights)


def test_safetensors_are_read(tmp_path: Path) -> None:
    safetensors.torch.save_file(state(), tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors", TINY)
    assert_same(checkpoint, state())
    assert checkpoint.source["format"] == "safetensors"


def test_tensors_that_are_not_contiguous_are_read(tmp_path: Path) -> None:
    weights = {k: v.t().contiguous().t() if v.ndim == 2 else v for k, v in state().items()}
    assert_same(open_checkpoint(save(tmp_path / "m.pt", weights), TINY), state())


# Refusals ---------------------------------------------------------------------------------------


def refusal(path: Path, config: DiTConfig = TINY) -> str:
    with pytest.raises(L2CError) as caught:
        dict(open_checkpoint(path, config).iter_tensors())
    message = str(caught.value)
    assert "\n" not in message
    return message


def without(*names: str) -> State:
    return {name: tensor for name, tensor in state().items() if name not in names}


NAN = torch.full((16,), torch.nan)
QKV = "blocks.1.attn.qkv.weight"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1], ["no state dict"]),
        ({}, ["no state dict"]),
        ({"ema": {}}, ["no state dict"]),
        ({"epoch": 3}, ["no state dict"]),
        (without(QKV), ["1 missing", QKV]),
        (without("pos_embed"), ["1 missing", "pos_embed"]),
        (without(*list(state())[:9]), ["9 missing", "pos_embed, x_embedder", "…"]),
        (state() | {"head.weight": NAN}, ["1 surplus", "head.weight"]),
        (state() | {"epoch": 3}, ["epoch", "int"]),
        (without("pos_embed") | {"pos": NAN}, ["1 missing (pos_embed)", "1 surplus (pos)"]),
        (state() | {QKV: NAN}, ["1 misshapen", QKV, "(16,)", "(48, 16)"]),
        (state() | {QKV: torch.ones(48, 16, dtype=torch.int8)}, [QKV, "int8", "float16"]),
        (state() | {QKV: torch.ones(48, 16).bool()}, [QKV, "bool"]),
        (state() | {QKV: torch.ones(48, 16).to(torch.float8_e4m3fn)}, [QKV, "float8"]),
        (state() | {QKV: torch.ones(48, 16).to_sparse()}, [QKV, "sparse"]),
        (state() | {QKV: torch.ones(48, 16, device="meta")}, [QKV]),
        (state() | {"x_embedder.proj.bias": NAN}, ["x_embedder.proj.bias", "NaN", "m.pt"]),
        (state() | {"x_embedder.proj.bias": torch.full((16,), torch.inf)}, ["proj.bias", "Inf"]),
        (
            state() | {"x_embedder.proj.bias": torch.full((16,), 1e300, dtype=torch.float64)},
            ["proj.bias", "Inf"],
        ),
    ],
    ids=range(19),
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    tmp_path: Path, content: object, words: list[str]
) -> None:
    message = refusal(save(tmp_path / "m.pt", content))
    assert all(word in message for word in words), message


def test_large_finite_weights_whose_sum_overflows_are_kept(tmp_path: Path) -> None:
    weights = state() | {"x_embedder.proj.bias": torch.full((16,), 3e38)}
    assert_same(open_checkpoint(save(tmp_path / "m.pt", weights), TINY), weights)


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("m.pt", lambda p: None, ["does not exist"]),
        ("m.pt", lambda p: p.touch(), ["empty"]),
        ("m.pt", lambda p: p.write_text("<html>not found</html>"), ["neither"]),
        ("m.pt", lambda p: p.write_bytes(save(p, state()).read_bytes()[:-300]), ["damaged"]),
        ("m.safetensors", lambda p: p.touch(), ["empty"]),
        ("m.safetensors", lambda p: p.write_text("no header here"), ["damaged"]),
        ("m.safetensors", lambda p: save(p, state()), ["damaged"]),
        ("folder", lambda p: p.mkdir(), ["no diffusers folder"]),
    ],
    ids=range(8),
)
def test_a_file_that_cannot_be_read_is_refused(
    tmp_path: Path, name: str, make: Callable[[Path], object], words: list[str]
) -> None:
    make(tmp_path / name)
    message = refusal(tmp_path / name)
    assert all(word in message for word in [*words, name]), message


def test_a_truncated_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(state(), path)
    path.write_bytes(path.read_bytes()[:-8])
    assert "damaged" in refusal(path)


def test_a_checkpoint_that_wants_to_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    for content in ({"ema": state(), "args": Evil()}, state() | {QKV: Evil()}):
        message = refusal(save(tmp_path / "m.pt", content))
        assert "run code (posix.mkdir)" in message or "run code (nt.mkdir)" in message
    assert not (tmp_path / "ran").exists()


def test_another_presets_checkpoint_is_recognised(tmp_path: Path) -> None:
    shapes = PRESETS["dit-s-8-512"].parameters()
    weights = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    message = refusal(save(tmp_path / "m.pt", weights), PRESETS["dit-s-8"])
    assert "1 misshapen (pos_embed is (1, 64, 384) where the model has (1, 16, 384))" in message
    assert "this looks like --model dit-s-8-512" in message


# Diffusers --------------------------------------------------------------------------------------


@pytest.fixture
def diffusers_model() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        out_channels=8,
        num_layers=2,
        sample_size=4,
        num_embeds_ada_norm=5,
    ).eval()
    embedder = model.transformer_blocks[0].norm1.emb
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(embedder.state_dict())
    return model


def predict(checkpoint: Checkpoint, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    model = DiT(checkpoint.config)
    model.load_state_dict(dict(checkpoint.iter_tensors()))
    with torch.no_grad():
        return model(x, t, y)[0]


def call() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([999, 421, 0]), torch.tensor([1, 5, 3])  # 5 is the null label


@pytest.mark.parametrize("kind", ["single", "sharded", "pipeline", "bin"])
def test_a_diffusers_folder_gives_what_diffusers_gives(
    tmp_path: Path, diffusers_model: DiTTransformer2DModel, kind: str
) -> None:
    folder = tmp_path / "transformer"
    limit = "10KB" if kind == "sharded" else "1GB"
    diffusers_model.save_pretrained(folder, max_shard_size=limit)
    assert len(list(folder.glob("*.safetensors"))) > 1 or kind != "sharded"
    if kind == "bin":
        save(folder / "diffusion_pytorch_model.bin", diffusers_model.state_dict())
        (folder / "diffusion_pytorch_model.safetensors").unlink()
    path = tmp_path if kind == "pipeline" else folder
    config = config_from_diffusers(path)
    checkpoint = open_checkpoint(path, config)
    x, t, y = call()
    with torch.no_grad():
        expected = diffusers_model(x, t, y).sample
    found = predict(checkpoint, x, t, y)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert checkpoint.source["format"] == "diffusers"
    assert "config.json" in checkpoint.source["files"]
    assert config == checkpoint.config == DIFFUSERS_TINY


def test_weights_in_a_diffusers_folder_run_with_diffusers_constants(
    tmp_path: Path, diffusers_model: DiTTransformer2DModel
) -> None:
    diffusers_model.save_pretrained(tmp_path)
    assert open_checkpoint(tmp_path, TINY).config == DIFFUSERS_TINY
    edit_config(tmp_path, norm_eps=1e-6)
    assert open_checkpoint(tmp_path, TINY).config.mlp_norm_eps == 1e-6
    edit_config(tmp_path, norm_eps="small")
    assert "mlp_norm_eps is 'small'" in refusal(tmp_path)


def test_half_precision_diffusers_folders_are_read(
    tmp_path: Path, diffusers_model: DiTTransformer2DModel
) -> None:
    diffusers_model.half().save_pretrained(tmp_path)
    tensors = dict(open_checkpoint(tmp_path, TINY).iter_tensors())
    assert tensors[QKV].shape == (48, 16)


def edit_config(folder: Path, **changes: object) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "UNet2DConditionModel"}, ["'UNet2DConditionModel'"]),
        ({"norm_type": "ada_norm_single"}, ["norm_type", "'ada_norm_single'"]),
        ({"activation_fn": "geglu"}, ["activation_fn", "'geglu'"]),
        ({"attention_bias": False}, ["attention_bias", "False"]),
        ({"norm_elementwise_affine": True}, ["norm_elementwise_affine", "True"]),
        ({"num_layers": 3}, ["num_layers is 3", "has 2"]),
        ({"num_layers": "many"}, ["num_layers", "'many'"]),
        ({"num_attention_heads": 4, "attention_head_dim": 4}, ["num_attention_heads is 4"]),
        ({"attention_head_dim": 16}, ["attention_head_dim is 16", "has 8"]),
        ({"sample_size": 8}, ["sample_size is 8", "has 4"]),
        ({"patch_size": 4}, ["patch_size is 4"]),
        ({"in_channels": 8}, ["in_channels is 8"]),
        ({"out_channels": None}, ["out_channels is 4", "has 8"]),
        ({"num_embeds_ada_norm": 10}, ["num_embeds_ada_norm is 10", "has 5"]),
    ],
    ids=range(14),
)
def test_a_diffusers_folder_of_another_model_is_refused_by_field(
    tmp_path: Path,
    diffusers_model: DiTTransformer2DModel,
    changes: dict[str, object],
    words: list[str],
) -> None:
    diffusers_model.save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    message = refusal(tmp_path)
    assert all(word in message for word in words), message


def test_a_presets_diffusers_folder_is_recognised(tmp_path: Path) -> None:
    config = {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero", "out_channels": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    constants = {"frequency_divisor": 127, "mlp_norm_eps": 1e-5}
    assert config_from_diffusers(tmp_path) == replace(PRESETS["dit-xl-2"], **constants)
    assert "this looks like --model dit-xl-2" in refusal(tmp_path)


@pytest.mark.parametrize(("out_channels", "words"), [(5, "out_channels is 5"), (8, None), (None, None)])
def test_output_channels_say_whether_a_variance_is_learnt(
    tmp_path: Path, out_channels: int | None, words: str | None
) -> None:
    data = {"_class_name": "DiTTransformer2DModel", "out_channels": out_channels}
    (tmp_path / "config.json").write_text(json.dumps(data))
    if words:
        with pytest.raises(L2CError, match=words):
            config_from_diffusers(tmp_path)
    else:
        assert config_from_diffusers(tmp_path).learn_sigma == (out_channels == 8)


@pytest.mark.parametrize(
    "name",
    ["timestep_embedder.linear_2.bias", "class_embedder.embedding_table.weight"],
)
def test_embedders_that_differ_between_blocks_are_refused(
    tmp_path: Path, diffusers_model: DiTTransformer2DModel, name: str
) -> None:
    with torch.no_grad():
        diffusers_model.transformer_blocks[1].norm1.emb.get_parameter(name).flatten()[3] += 1e-3
    diffusers_model.save_pretrained(tmp_path)
    assert f"transformer_blocks.1.norm1.emb.{name} differs from block 0" in refusal(tmp_path)


def test_diffusers_tensors_that_do_not_fit_are_named(
    tmp_path: Path, diffusers_model: DiTTransformer2DModel
) -> None:
    diffusers_model.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    del weights["transformer_blocks.1.attn1.to_k.bias"]
    weights["proj_out_3.bias"] = torch.ones(1)
    safetensors.torch.save_file(weights, path)
    message = refusal(tmp_path)
    assert "1 missing (transformer_blocks.1.attn1.to_k.bias)" in message
    assert "1 surplus (proj_out_3.bias)" in message


def test_nan_in_a_diffusers_folder_is_named(
    tmp_path: Path, diffusers_model: DiTTransformer2DModel
) -> None:
    with torch.no_grad():
        for block in diffusers_model.transformer_blocks:
            block.norm1.emb.timestep_embedder.linear_1.bias[0] = torch.nan
    diffusers_model.save_pretrained(tmp_path)
    assert "t_embedder.mlp.0.bias holds NaN" in refusal(tmp_path)


@pytest.mark.parametrize("fits", [True, False])
def test_a_position_table_stored_by_old_diffusers_must_be_the_computed_one(
    tmp_path: Path, diffusers_model: DiTTransformer2DModel, fits: bool
) -> None:
    diffusers_model.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    table = diffusers_model.pos_embed.pos_embed + (0.0 if fits else 0.1)
    safetensors.torch.save_file(weights | {"pos_embed.pos_embed": table}, path)
    if fits:
        assert "pos_embed" in open_checkpoint(tmp_path, TINY).tensors
    else:
        assert "pos_embed.pos_embed is not" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        (None, "no 'weight_map'"),
        ({"a": 1}, "no 'weight_map'"),
        ({"a": "../m.safetensors"}, "beside it"),
        ({"a": "gone.safetensors"}, "does not exist"),
        ({"a": "other.safetensors"}, "does not place b"),
    ],
)
def test_a_broken_index_is_refused(tmp_path: Path, weight_map: object, words: str) -> None:
    data = {"_class_name": "DiTTransformer2DModel", "out_channels": 8}
    (tmp_path / "config.json").write_text(json.dumps(data))
    safetensors.torch.save_file({"b": torch.ones(1)}, tmp_path / "other.safetensors")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert words in refusal(tmp_path, PRESETS["dit-xl-2"])


@pytest.mark.parametrize(
    ("text", "words"), [("{", "not JSON"), ("[]", "JSON object"), ("{}", "is for None")]
)
def test_a_broken_diffusers_config_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert words in refusal(tmp_path)


def test_a_diffusers_folder_without_weights_is_refused(
    tmp_path: Path, diffusers_model: DiTTransformer2DModel
) -> None:
    diffusers_model.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    assert "has no diffusion_pytorch_model.safetensors" in refusal(tmp_path)


# Random weights ---------------------------------------------------------------------------------


def test_random_weights_are_the_same_in_every_process() -> None:
    code = """
import hashlib
from l2c_export.build.checkpoint import random_checkpoint
from l2c_export.core.models import DiTConfig
digest = hashlib.sha256()
for name, tensor in random_checkpoint(DiTConfig(2, 16, 2, 2, 4, num_classes=5), 3).iter_tensors():
    if name != "pos_embed":
        digest.update(tensor.numpy().tobytes())
print(digest.hexdigest())
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "10a93b8d0668f253204871bd6117ef13c62d440f28a77c6b9ad796d78ae06d7f"


def test_random_weights_depend_on_seed_and_name() -> None:
    first, second = state(seed=0), state(seed=1)
    for name, tensor in first.items():
        assert (tensor != 0).any(), name
        assert torch.equal(tensor, second[name]) == (name == "pos_embed"), name
    assert not torch.equal(first["blocks.0.mlp.fc1.weight"], first["blocks.1.mlp.fc1.weight"])
    assert random_checkpoint(TINY, 7).source == {"kind": "random", "seed": 7}


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_outside_the_range_are_refused(seed: int) -> None:
    with pytest.raises(L2CError, match=str(seed)):
        random_checkpoint(TINY, seed)


def test_random_activations_stay_near_one_through_28_blocks_and_every_branch_counts() -> None:
    config = DiTConfig(28, 64, 4, 2, 4)
    checkpoint = random_checkpoint(config, 0)
    model = DiT(config)
    model.load_state_dict(dict(checkpoint.iter_tensors()))
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([631]), torch.tensor([7])
    with torch.no_grad():
        output, branches = model(x, t, y)
        assert 0.3 < output.std() < 3
        for name, branch in branches.items():
            assert 0.1 < branch.std() < 3, name
        for name in ("00.attn", "00.mlp", "13.attn", "13.mlp", "27.attn", "27.mlp"):
            branch = branches[name]
            without, _ = model(x, t, y, {name: torch.zeros_like(branch)})
            assert (without - output).abs().max() > 1e-3, name
