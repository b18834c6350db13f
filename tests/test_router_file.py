import argparse
import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from l2c_export.build.router_file import read_router, write_router
from l2c_export.core.schedule import Router
from l2c_export.errors import L2CError

SLOTS = ("00.attn", "00.mlp", "01.attn")
METADATA = {
    "format": "l2c-router",
    "version": "1",
    "family": "dit",
    "sampler": "ddim",
    "slots": json.dumps(SLOTS),
    "training": "{}",
}


def rows(calls: int = 4, width: int = 3) -> dict[str, Any]:
    """Row r of a made-up released router holds r, r + 0.1 …"""
    return {f"{r}.prob": torch.arange(width) / 10 + r for r in range(calls)}


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def safe(path: Path, metadata: dict[str, str] | None = None, **tensors: Any) -> Path:
    """Our format with something changed."""
    given = {"logits": np.ones((2, 3), np.float32), "routed": np.array([0, 1], np.uint8)} | tensors
    kept = {name: array for name, array in given.items() if array is not None}
    path.write_bytes(safetensors.numpy.save(kept, METADATA | (metadata or {})))
    return path


class Evil:
    """Unpickled by Python's own pickle, this makes a folder."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.reduced = (call, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


# Reading ----------------------------------------------------------------------------------------


def test_dit_rows_are_reversed_and_odd_ones_dropped(tmp_path: Path) -> None:
    content = {"routers": OrderedDict(rows()), "args": argparse.Namespace(l1=5e-6)}
    router = read_router(save(tmp_path / "r.pt", content), "dit")
    assert router.routed.tolist() == [False, True, False, True]
    assert router.logits[:, 0].tolist() == [0, 2, 0, 0]  # rows 3 (dropped), 2, 1 (dropped), 0
    assert router.logits[1].tolist() == pytest.approx([2, 2.1, 2.2])
    assert (router.sampler, router.calls, router.logits.dtype) == ("ddim", 4, np.float32)


def test_uvit_row_i_becomes_call_2i(tmp_path: Path) -> None:
    router = read_router(save(tmp_path / "r.pth", rows(8)), "uvit")
    assert np.flatnonzero(router.routed).tolist() == [2, 4, 6]
    assert router.logits[:, 0].tolist() == [0, 0, 1, 0, 2, 0, 3, 0]
    assert router.sampler == "dpm-solver-2s"


def test_noise_in_untrained_rows_may_be_anything(tmp_path: Path) -> None:
    content = rows() | {"1.prob": torch.full((3,), torch.nan), "3.prob": torch.full((3,), torch.inf)}
    assert np.isfinite(read_router(save(tmp_path / "r.pt", content), "dit").logits).all()
    content = rows(4) | {"0.prob": torch.full((3,), torch.nan)}
    assert np.isfinite(read_router(save(tmp_path / "r.pt", content), "uvit").logits).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_and_parameters_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    content = {key: torch.nn.Parameter(row.to(dtype)) for key, row in rows().items()}
    router = read_router(save(tmp_path / "r.pt", content), "dit")
    assert router.logits[1].tolist() == pytest.approx([2, 2.1, 2.2], rel=1e-2)


def test_the_old_pickle_format_is_read(tmp_path: Path) -> None:
    torch.save(rows(), tmp_path / "r.pt", _use_new_zipfile_serialization=False)
    assert read_router(tmp_path / "r.pt", "dit").calls == 4


def test_the_source_names_the_file_its_digest_and_plain_training_options(tmp_path: Path) -> None:
    options = argparse.Namespace(model="DiT-XL/2", l1=5e-6, wandb=True, ckpt=None, epochs=1)
    options.bad, options.worse, options.long = float("nan"), [1], "x" * 1000
    path = save(tmp_path / "r.pt", {"routers": rows(), "args": options, "opt": {}})
    source = read_router(path, "dit").source
    assert len(source.pop("sha256")) == 64
    assert source == {
        "file": "r.pt",
        "format": "l2c-released-dit",
        "training": {"model": "DiT-XL/2", "l1": 5e-6, "epochs": 1},
    }
    assert read_router(save(tmp_path / "u.pth", rows()), "uvit").source["training"] == {}


# The safe format --------------------------------------------------------------------------------


def test_a_written_router_reads_back_the_same(tmp_path: Path) -> None:
    original = read_router(save(tmp_path / "r.pt", rows()), "dit")
    path = tmp_path / "r.safetensors"
    write_router(path, original, family="dit", slots=SLOTS, training={"l1": 1e-6, "steps": 7})
    back = read_router(path, "dit")
    assert (back.logits == original.logits).all()
    assert (back.routed == original.routed).all()
    assert back.sampler == "ddim"
    assert back.source["format"] == "l2c-router"
    assert back.source["training"] == {"l1": 1e-6, "steps": 7}
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix == ".part"] == []


def test_the_same_router_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    code = """
import sys, pathlib, numpy as np
from l2c_export.build.router_file import write_router
from l2c_export.core.schedule import Router
router = Router(np.ones((2, 3), np.float32), np.array([False, True]), "ddim")
path = pathlib.Path(sys.argv[1])
write_router(path, router, family="dit", slots=["a", "b", "c"], training={"z": 1, "y": 2})
assert "torch" not in sys.modules
from l2c_export.build.router_file import read_router
assert read_router(path, "dit").calls == 2
assert "torch" not in sys.modules
"""
    for name in "ab":
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_noise_of_calls_that_are_not_routed_is_not_written(tmp_path: Path) -> None:
    router = Router(np.full((2, 3), 7, np.float32), np.array([False, True]), "ddim")
    write_router(tmp_path / "r", router, family="dit", slots=SLOTS, training={})
    assert read_router(tmp_path / "r", "dit").logits.tolist() == [[0, 0, 0], [7, 7, 7]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logits": np.full((2, 3), np.nan, np.float32)}, ["finite", "call 1"]),
        ({"routed": np.array([True, True])}, ["first call"]),
        ({"routed": np.array([True])}, ["(2, 3)", "(1,)"]),
        ({"logits": np.ones((2, 2), np.float32)}, ["2 scores", "3 slots"]),
    ],
)
def test_what_is_no_router_is_not_written(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    router = Router(np.ones((2, 3), np.float32), np.array([False, True]), "ddim")
    with pytest.raises(L2CError) as caught:
        write_router(tmp_path / "r", replace(router, **changes), family="dit", slots=SLOTS, training={})
    assert all(word in str(caught.value) for word in words), caught.value
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    router = Router(np.ones((2, 3), np.float32), np.array([False, True]), "ddim")
    with pytest.raises(L2CError, match=r"cannot write router .*none"):
        write_router(tmp_path / "none" / "r", router, family="dit", slots=SLOTS, training={})


# Refusals ---------------------------------------------------------------------------------------


def refusal(path: Path, family: str = "dit") -> str:
    with pytest.raises(L2CError) as caught:
        read_router(path, family)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, ["no rows"]),
        ({"routers": {}}, ["no rows"]),
        ([1, 2], ["list"]),
        (torch.ones(3), ["Tensor"]),
        ({"routers": [torch.ones(3)]}, ["list"]),
        (rows(5), ["5 rows", "even"]),
        ({"0.prob": torch.ones(3), "2.prob": torch.ones(3)}, ["lacks", "'1.prob'", "2 rows"]),
        ({f"{r}.prob": torch.ones(3) for r in range(1, 5)}, ["lacks", "'0.prob'"]),
        (rows() | {"epoch": torch.ones(3)}, ["'epoch'"]),
        (rows() | {"01.prob": torch.ones(3)}, ["'01.prob'"]),
        (rows() | {-1: torch.ones(3)}, ["'-1'"]),
        (rows() | {"2.prob": torch.ones(4)}, ["'2.prob'", "(4,)", "(3,)"]),
        (rows() | {"0.prob": torch.ones(1, 3)}, ["'0.prob'", "(1, 3)"]),
        (rows() | {"0.prob": torch.ones(())}, ["'0.prob'", "()"]),
        (rows() | {"0.prob": torch.ones(0)}, ["'0.prob'", "(0,)"]),
        (rows() | {"2.prob": torch.ones(3, dtype=torch.int64)}, ["'2.prob'", "torch.int64"]),
        (rows() | {"2.prob": torch.ones(3, dtype=torch.complex64)}, ["'2.prob'", "complex64"]),
        (rows() | {"2.prob": [0.1, 0.2, 0.3]}, ["'2.prob'", "list"]),
        (rows() | {"2.prob": torch.ones(3).to_sparse()}, ["'2.prob'"]),
        (rows() | {"2.prob": torch.ones(3, device="meta")}, ["'2.prob'"]),
        (rows() | {"0.prob": torch.ones(1).expand(1 << 40)}, ["'0.prob'", "1099511627776"]),
        (rows() | {"2.prob": torch.tensor([0, torch.nan, 0])}, ["finite", "call 1"]),
        (rows() | {"0.prob": torch.tensor([0, torch.inf, 0])}, ["finite", "call 3"]),
        ({"x_embedder.proj.weight": torch.ones(2, 2)}, ["not a router", "'x_embedder.proj.weight'"]),
    ],
    ids=range(24),
)
def test_a_broken_released_router_is_refused(tmp_path: Path, content: object, words: list[str]) -> None:
    message = refusal(save(tmp_path / "r.pt", content))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, ["does not exist"]),
        (lambda p: p.mkdir(), ["folder"]),
        (lambda p: p.touch(), ["empty"]),
        (lambda p: p.write_bytes(b"hello, router"), ["neither"]),
        (lambda p: p.write_bytes(b"PK\x03\x04 and no more"), ["damaged"]),
        (lambda p: p.write_bytes(b"\x80\x02 and no more"), ["damaged"]),
        (lambda p: (save(p, rows()), p.write_bytes(p.read_bytes()[:-200])), ["damaged"]),
        (lambda p: (safe(p), p.write_bytes(p.read_bytes()[:-5])), ["damaged"]),
        (lambda p: p.write_bytes(b"\xff" * 8 + b"{}"), ["damaged"]),
        (lambda p: (p.touch(), os.truncate(p, 65 << 20)), ["64 MiB"]),
    ],
    ids=range(10),
)
def test_a_file_that_cannot_be_read_is_refused(
    tmp_path: Path, make: Callable[[Path], object], words: list[str]
) -> None:
    make(tmp_path / "r.pt")
    message = refusal(tmp_path / "r.pt")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metadata": {"format": "pt"}}, ["not a router", "'pt'"]),
        ({"metadata": {"version": "2"}}, ["version '2'", "'1'"]),
        ({"metadata": {"family": "uvit"}}, ["'uvit'", "'dit'"]),
        ({"metadata": {"slots": "[1"}}, ["JSON"]),
        ({"metadata": {"slots": '["a"]'}}, ["1 slots", "3 scores"]),
        ({"metadata": {"slots": "{}"}}, ["'slots'"]),
        ({"metadata": {"training": "[]"}}, ["'training'"]),
        ({"logits": np.ones((2, 3))}, ["'logits'", "float64"]),
        ({"logits": np.ones(3, np.float32)}, ["(3,)"]),
        ({"logits": np.zeros((0, 3), np.float32), "routed": np.zeros(0, np.uint8)}, ["(0, 3)"]),
        ({"logits": np.full((2, 3), np.inf, np.float32)}, ["finite", "call 1"]),
        ({"routed": np.array([0, 2], np.uint8)}, ["'routed'"]),
        ({"routed": np.array([0, 1])}, ["'routed'"]),
        ({"routed": np.array([1, 1], np.uint8)}, ["first call"]),
        ({"routed": np.array([0, 1, 0], np.uint8)}, ["(3,)"]),
        ({"routed": None}, ["'logits'", "'routed'"]),
        ({"extra": np.ones(1)}, ["'extra'"]),
    ],
    ids=range(17),
)
def test_a_broken_safe_router_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    message = refusal(safe(tmp_path / "r.safetensors", **changes))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("key", ["format", "version", "family", "sampler", "slots", "training"])
def test_metadata_must_be_complete(tmp_path: Path, key: str) -> None:
    path = safe(tmp_path / "r.safetensors")
    metadata = {name: text for name, text in METADATA.items() if name != key}
    path.write_bytes(safetensors.numpy.save(safetensors.numpy.load(path.read_bytes()), metadata))
    assert key in refusal(path)


def test_a_router_of_another_family_is_refused(tmp_path: Path) -> None:
    content = {"routers": rows(), "args": argparse.Namespace(model="DiT-XL/2")}
    assert "'DiT-XL/2'" in refusal(save(tmp_path / "r.pt", content), "uvit")
    assert "even" in refusal(save(tmp_path / "u.pth", rows(5)), "uvit")
    with pytest.raises(L2CError, match=r"'flux'.*dit, uvit"):
        read_router(save(tmp_path / "r.pt", rows()), "flux")


@pytest.mark.parametrize("old", [False, True], ids=["zip", "bare pickle"])
@pytest.mark.parametrize("call", ["posix.system", "builtins.exec", "os.mkdir", "subprocess.Popen"])
def test_a_router_that_wants_to_run_code_is_refused_and_runs_none(
    tmp_path: Path, call: str, old: bool
) -> None:
    trap = str(tmp_path / "ran")
    evil = {
        "posix.system": Evil(os.system, f"mkdir {trap}"),
        "builtins.exec": Evil(exec, f"import os; os.mkdir({trap!r})"),
        "os.mkdir": Evil(os.mkdir, trap),
        "subprocess.Popen": Evil(subprocess.Popen, ["mkdir", trap]),
    }[call]
    path = tmp_path / "r.pt"
    torch.save(rows() | {"2.prob": evil}, path, _use_new_zipfile_serialization=not old)
    message = refusal(path)
    assert "run code" in message
    assert call.partition(".")[2] in message
    assert not Path(trap).exists()


def test_a_plain_pickle_that_wants_to_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    (tmp_path / "r.pt").write_bytes(pickle.dumps(Evil(os.mkdir, str(tmp_path / "ran"))))
    refusal(tmp_path / "r.pt")
    assert not (tmp_path / "ran").exists()


def test_only_a_namespace_is_allowed_and_only_while_reading(tmp_path: Path) -> None:
    allowed = set(torch.serialization.get_safe_globals())
    options = argparse.Namespace(trap=argparse.ArgumentParser)
    message = refusal(save(tmp_path / "r.pt", {"routers": rows(), "args": options}))
    assert "argparse.ArgumentParser" in message
    assert set(torch.serialization.get_safe_globals()) == allowed
