"""The command line as a user meets it: what works, and one clear line for everything that cannot."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import safetensors.torch
import tiny
import torch

import l2c_export
from l2c_export.build.checkpoint import random_checkpoint
from l2c_export.cli import COMMANDS
from l2c_export.core.bundle import MANIFEST, WEIGHTS

Result = tuple[int, str, str]
Command = Callable[..., Result]


@pytest.fixture
def world(tiny_files, tmp_path, monkeypatch) -> Path:
    """The current folder: a model, its router, no network and an empty cache."""
    for name in ("model.json", "router.safetensors"):
        shutil.copy(tiny_files / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("L2C_EXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("L2C_EXPORT_OFFLINE", "1")
    return tmp_path


# -- what works ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["-v", "build"], ["build", "-v"]])
def test_v_before_or_after_the_command_tells_what_is_made(arguments, world, command):
    code, _, err = command(*arguments, *BUILD, "--batch", "1-2", "-o", "out")
    assert code == 0
    assert "l2c_export.build.build: made weights.safetensors: " in err


@pytest.mark.parametrize(
    ("arguments", "policy"),
    [(["--steps", "6"], "fora:2:end"), (["--router", "router.safetensors"], "random:1:trajectory")],
)
def test_a_policy_plans_a_schedule_made_by_hand(arguments, policy, world, command):
    code, out, _ = command("plan", *MODEL, *arguments, "--policy", policy)
    assert code == 0
    assert f"schedule  {policy}, 6 calls" in out


def test_a_missing_package_is_one_line_with_the_way_out(world, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    for name in [name for name in sys.modules if name.startswith("l2c_export.build.")]:
        monkeypatch.delitem(sys.modules, name)
    code, _, err = command("build", *BUILD, "-o", "out")
    assert code == 4
    assert err.splitlines()[-1] == (
        "Error: this needs onnx_ir; install it with: pip install 'l2c-export[all]'"
    )


def test_engines_need_no_pytorch_to_be_installed(world, command, tiny_bundle, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("l2c_export.engines.")]:
        monkeypatch.delitem(sys.modules, name)
    for missing in ("onnx", "filelock"):
        monkeypatch.setitem(sys.modules, missing, None)
    code, out, _ = command("engines", tiny_bundle.path, "--report")
    assert (code, "has no engines" in out) == (0, True)
    code, _, err = command("engines", tiny_bundle.path, "--dry-run")
    assert code == 4
    assert err.splitlines()[-1].endswith("install it with: pip install 'l2c-export[engines]'")


MODEL = ["--model-config", "model.json"]
PLAN = [*MODEL, "--router", "router.safetensors"]
BUILD = [*PLAN, "--random-weights", "3"]


def test_the_version_is_the_packages(command):
    assert command("--version") == (0, f"l2c-export, version {l2c_export.__version__}\n", "")


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_every_command_says_what_it_is_for(command, name, flag):
    code, out, err = command(*([name] if name else []), flag)
    assert (code, err) == (0, "")
    assert out.startswith("Usage: l2c-export")
    if name is None:
        for other in COMMANDS:
            assert f"\n  {other} " in out


def test_no_command_shows_the_help(command):
    code, out, err = command()
    assert code in (0, 2)  # as click's release has it
    assert (out + err).startswith("Usage: l2c-export [OPTIONS] COMMAND")


def test_plan_shows_a_table_and_prints_json(command, world):
    code, out, err = command("plan", *PLAN)
    assert (code, err) == (0, "")
    assert "00.attn" in out or "attn" in out
    code, out, err = command("plan", *PLAN, "--json", "--batch", "2")
    assert (code, err) == (0, "")
    assert isinstance(json.loads(out), dict)


def test_plan_draws_a_picture(command, world):
    code, _, err = command("plan", *PLAN, "--picture", "plan.png")
    assert code == 0
    assert "plan.png" in err
    assert (world / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_dry_run_builds_nothing_and_needs_no_weights(command, world):
    code, out, _ = command("build", *PLAN, "--dry-run", "-o", "bundle")
    assert code == 0
    assert out
    code, out, err = command("build", *PLAN, "--dry-run", "--json")
    assert (code, err) == (0, "")
    assert isinstance(json.loads(out), dict)
    assert sorted(p.name for p in world.iterdir()) == ["model.json", "router.safetensors"]


def test_build_says_that_weights_are_random_and_what_comes_next(command, world, tiny_bundle):
    shutil.copytree(tiny_bundle.path, world / "bundle")  # so that there is nothing left to do
    code, out, err = command("build", *BUILD, "--batch", "1-2", "-o", "bundle")
    assert code == 0
    assert err.splitlines()[0].startswith("warning: random weights")
    assert out.splitlines()[-1] == "next: l2c-export verify bundle"
    code, out, err = command("build", *BUILD, "--batch", "1-2", "-o", "bundle", "--json")
    (line,) = out.splitlines()
    facts = json.loads(line)
    assert (facts["bundle"], facts["calls"], facts["removed"]) == ("bundle", 6, 8)
    assert tiny.contents(world / "bundle") == tiny.contents(tiny_bundle.path)


def test_plan_run_and_inspect_start_without_a_terminal_as_a_program(world, tiny_bundle):
    script = [sys.executable, "-c", "from l2c_export.cli import main; main()"]
    done = subprocess.run(
        [*script, "run", tiny_bundle.path, "--labels", "1", "-o", "s.npy"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, np.load("s.npy").shape) == (0, (1, 4, 8, 8)), done.stderr
    done = subprocess.run([*script, "inspect", "nothing"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: nothing is not a bundle: there is no nothing/l2c.json; ")
    assert len(done.stderr.splitlines()) == 1


# -- what cannot be -----------------------------------------------------------------------------


class Bad:
    """A way to be wrong: what to put into the current folder, what to type, what is said."""

    def __init__(
        self, arguments: list[str], message: str, code: int = 1, make: Callable[[], Any] | None = None
    ) -> None:
        self.arguments, self.message, self.code, self.make = arguments, message, code, make


class Evil:
    """Unpickled by Python's own pickle, this makes a folder."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


def text(name: str, content: str) -> Callable[[], Any]:
    return lambda: Path(name).write_text(content)


def saved(name: str, content: Callable[[], object]) -> Callable[[], Any]:
    return lambda: torch.save(content(), name)


def model(**changes: object) -> Callable[[], Any]:
    data = tiny.CONFIG.to_json() | changes
    kept = {name: value for name, value in data.items() if value is not ...}
    return text("bad.json", json.dumps(kept))


def state(**changes: object) -> dict[str, Any]:
    tensors = dict(random_checkpoint(tiny.CONFIG, 0).iter_tensors())
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in tensors.items() if value is not ...}


def rows(calls: int = 6, width: int = 4, value: float = 0.0) -> dict[str, torch.Tensor]:
    return {f"{r}.prob": torch.full((width,), value) for r in range(calls)}


def safe_router(change: Callable[[dict[str, Any], dict[str, str]], object]) -> Callable[[], Any]:
    """Our own format with something changed in tensors or metadata."""

    def make() -> None:
        tensors = safetensors.torch.load_file("router.safetensors")
        with safetensors.safe_open("router.safetensors", "pt") as file:
            metadata = file.metadata()
        change(tensors, metadata)
        safetensors.torch.save_file(tensors, "bad.safetensors", metadata)

    return make


def cut_router() -> None:
    Path("bad.safetensors").write_bytes(Path("router.safetensors").read_bytes()[:-8])


def folder_with_work() -> None:
    Path("work").mkdir()
    Path("work/thesis.txt").write_text("years")


BIAS = "final_layer.linear.bias"

ROUTER = ["plan", *MODEL, "--router"]
ROUTERS = {
    "missing": Bad([*ROUTER, "no.pt"], "router no.pt does not exist"),
    "a folder": Bad([*ROUTER, "."], r"router \. is a folder, not a file"),
    "empty": Bad([*ROUTER, "bad.pt"], "router bad.pt is empty", make=text("bad.pt", "")),
    "text": Bad([*ROUTER, "bad.pt"], "bad.pt is neither a PyTorch file nor", make=text("bad.pt", "hi")),
    "cut off": Bad([*ROUTER, "bad.safetensors"], "bad.safetensors is damaged", make=cut_router),
    "code": Bad(
        [*ROUTER, "bad.pt"],
        r"bad.pt wants to run code \(.*mkdir\).* is refused",
        make=saved("bad.pt", Evil),
    ),
    "bare code": Bad(
        [*ROUTER, "bad.pt"],
        r"bad.pt ",
        make=lambda: Path("bad.pt").write_bytes(pickle.dumps(Evil())),
    ),
    "a list": Bad([*ROUTER, "bad.pt"], "bad.pt is not a router", make=saved("bad.pt", lambda: [1])),
    "a checkpoint": Bad([*ROUTER, "bad.pt"], "bad.pt is not a router", make=saved("bad.pt", state)),
    "odd calls": Bad([*ROUTER, "bad.pt"], "bad.pt has 5 rows", make=saved("bad.pt", lambda: rows(5))),
    "too narrow": Bad(
        [*ROUTER, "bad.pt"],
        "bad.pt has 3 scores a call, the model has 4 sub-layers",
        make=saved("bad.pt", lambda: rows(width=3)),
    ),
    "a missing row": Bad(
        [*ROUTER, "bad.pt"],
        "bad.pt lacks '1.prob' of 5 rows",
        make=saved("bad.pt", lambda: {k: v for k, v in rows().items() if k != "1.prob"}),
    ),
    "NaN": Bad(
        [*ROUTER, "bad.pt"],
        "bad.pt has scores that are not finite in routed call 1",
        make=saved("bad.pt", lambda: rows(value=float("nan"))),
    ),
    "integers": Bad(
        [*ROUTER, "bad.pt"],
        "'0.prob' is torch.int64",
        make=saved("bad.pt", lambda: {k: v.long() for k, v in rows().items()}),
    ),
    "first call": Bad(
        [*ROUTER, "bad.safetensors"],
        "routes the first call, which has nothing to reuse",
        make=safe_router(lambda tensors, _: tensors["routed"].fill_(1)),
    ),
    "version": Bad(
        [*ROUTER, "bad.safetensors"],
        "version '2', this release reads '1'",
        make=safe_router(lambda _, metadata: metadata.update(version="2")),
    ),
    "family": Bad(
        [*ROUTER, "bad.safetensors"],
        "is for 'uvit' models, not 'dit'",
        make=safe_router(lambda _, metadata: metadata.update(family="uvit")),
    ),
    "sampler": Bad(
        [*ROUTER, "bad.safetensors"],
        "trained for the sampler 'euler', not 'ddim'",
        make=safe_router(lambda _, metadata: metadata.update(sampler="euler")),
    ),
    "other safetensors": Bad(
        [*ROUTER, "bad.safetensors"],
        "is safetensors but not a router of ours",
        make=lambda: safetensors.torch.save_file({"x": torch.ones(1)}, "bad.safetensors"),
    ),
    "steps": Bad(["plan", *PLAN, "--steps", "8"], "trained for 6 calls, not 8; use --steps 6"),
    "none released": Bad(["plan", *MODEL], "no released router for this model; use --router FILE"),
    "offline": Bad(
        ["plan", "--model", "dit-xl-2"], "DDIM20_router.pt is not on this machine .*give --router FILE"
    ),
}

WEIGHTED = ["build", *PLAN, "-o", "bundle", "--checkpoint"]
CHECKPOINTS = {
    "missing": Bad([*WEIGHTED, "no.pt"], "checkpoint no.pt does not exist"),
    "empty": Bad([*WEIGHTED, "bad.pt"], "checkpoint bad.pt is empty", make=text("bad.pt", "")),
    "text": Bad(
        [*WEIGHTED, "bad.pt"], "bad.pt is neither a PyTorch file nor", make=text("bad.pt", "x")
    ),
    "code": Bad([*WEIGHTED, "bad.pt"], "bad.pt wants to run code", make=saved("bad.pt", Evil)),
    "no state": Bad(
        [*WEIGHTED, "bad.pt"], "bad.pt holds no state dict", make=saved("bad.pt", lambda: {"lr": 1})
    ),
    "router": Bad([*WEIGHTED, "router.safetensors"], r"router.safetensors.*\d+ missing"),
    "lacking": Bad(
        [*WEIGHTED, "bad.pt"],
        f"bad.pt.*1 missing.*{BIAS}",
        make=saved("bad.pt", lambda: state(**{BIAS: ...})),
    ),
    "surplus": Bad(
        [*WEIGHTED, "bad.pt"],
        "bad.pt.*1 surplus.*extra.bias",
        make=saved("bad.pt", lambda: state(extra__bias=torch.ones(1))),
    ),
    "misshapen": Bad(
        [*WEIGHTED, "bad.pt"],
        rf"bad.pt.*{BIAS} is \(3,\) where the model has \(32,\)",
        make=saved("bad.pt", lambda: state(**{BIAS: torch.ones(3)})),
    ),
    "integers": Bad(
        [*WEIGHTED, "bad.pt"],
        f"bad.pt.*{BIAS}.*int32",
        make=saved("bad.pt", lambda: state(**{BIAS: torch.ones(32, dtype=torch.int32)})),
    ),
    "NaN": Bad(
        [*WEIGHTED, "bad.pt"],
        f"bad.pt: tensor {BIAS} holds NaN or Inf",
        make=saved("bad.pt", lambda: state(**{BIAS: torch.full((32,), float("nan"))})),
    ),
    "no diffusers": Bad(
        [*WEIGHTED, "empty"], "empty is no diffusers folder", make=lambda: os.mkdir("empty")
    ),
    "none": Bad(["build", *PLAN], "give the weights: --checkpoint FILE, or --random-weights SEED"),
    "unpublished": Bad(
        ["build", "--model", "dit-s-8", "--uncached"], "dit-s-8 has no checkpoint to download"
    ),
    "offline": Bad(
        ["build", "--model", "dit-xl-2", "--uncached"],
        "DiT-XL-2-256x256.pt is not on this machine.*get https://.* put it at .*--checkpoint",
    ),
    "both": Bad(["build", *BUILD, "--checkpoint", "x.pt"], "give one of them", code=2),
    "huge seed": Bad(["build", *PLAN, "--random-weights", str(2**63)], "seed 9223372036854775808"),
}

CONFIG = ["plan", "--uncached", "--model-config", "bad.json"]
CONFIGS = {
    "missing": Bad(CONFIG, "bad.json: No such file"),
    "text": Bad(CONFIG, "bad.json is not JSON", make=text("bad.json", "depth: 2")),
    "binary": Bad(
        CONFIG, "bad.json is not JSON", make=lambda: Path("bad.json").write_bytes(b"\xff\x00")
    ),
    "deep": Bad(CONFIG, "bad.json is not JSON", make=text("bad.json", "[" * 100_000)),
    "endless number": Bad(CONFIG, "bad.json is not JSON", make=text("bad.json", "9" * 5000)),
    "list": Bad(CONFIG, "must be a JSON object", make=text("bad.json", "[1]")),
    "unknown key": Bad(CONFIG, r"bad.json: unknown model key\(s\) colour", make=model(colour=1)),
    "missing key": Bad(CONFIG, "bad.json: the model configuration lacks.*depth", make=model(depth=...)),
    "too many guided channels": Bad(
        CONFIG, "bad.json: model guidance_channels 9 is more than", make=model(guidance_channels=9)
    ),
    "no family": Bad(
        CONFIG, "bad.json: the model configuration has no 'family'", make=model(family=...)
    ),
    "family": Bad(CONFIG, "bad.json: model family 'unet' is not supported", make=model(family="unet")),
    "zero": Bad(CONFIG, "bad.json: model depth is 0", make=model(depth=0)),
    "fraction": Bad(CONFIG, "bad.json: model depth is 1.5", make=model(depth=1.5)),
    "text number": Bad(CONFIG, "bad.json: model depth is '2'", make=model(depth="2")),
    "NaN": Bad(CONFIG, "bad.json: model mlp_ratio is nan", make=model(mlp_ratio=float("nan"))),
    "no MLP": Bad(CONFIG, "bad.json: model mlp_ratio is 1e-09", make=model(mlp_ratio=1e-9)),
    "huge MLP": Bad(CONFIG, r"bad.json: model mlp_ratio is 1e\+300", make=model(mlp_ratio=1e300)),
    "heads": Bad(
        CONFIG,
        "bad.json: model hidden_size 32 is not divisible by num_heads 3",
        make=model(num_heads=3),
    ),
    "patches": Bad(
        CONFIG,
        "bad.json: model input_size 8 is not divisible by patch_size 3",
        make=model(patch_size=3),
    ),
    "width": Bad(CONFIG, "bad.json: model hidden_size 34", make=model(hidden_size=34)),
}

OPTIONS = {
    "no model": Bad(["plan", "--uncached"], "give one of --model NAME and --model-config FILE", 2),
    "two models": Bad(["plan", *MODEL, "--model", "dit-s-2"], "give one of --model NAME", 2),
    "unknown model": Bad(["plan", "--model", "dit-xxl"], "'dit-xxl' is not one of: dit-xl-2", 2),
    "policy unused": Bad(["plan", *MODEL, "--uncached", "--policy", "fora:2"], "takes no --policy", 2),
    "policy and router": Bad(["plan", *PLAN, "--policy", "fora:2"], "fora:2 needs no router", 2),
    "policy": Bad(["plan", *MODEL, "--policy", "magic"], "policy 'magic' is unknown; known: fora:N"),
    "policy's number": Bad(["plan", *MODEL, "--policy", "fora:21"], "interval 21: with 20 calls"),
    "router unused": Bad(["plan", *PLAN, "--uncached"], "--uncached .* takes no --router", 2),
    "threshold": Bad(["plan", *PLAN, "--threshold", "1.5"], "threshold 1.5 is outside 0 … 1"),
    "NaN threshold": Bad(["plan", *PLAN, "--threshold", "nan"], "threshold nan is outside"),
    "text threshold": Bad(["plan", *PLAN, "--threshold", "low"], "'low' is not a valid float", 2),
    "sampler": Bad(["plan", *MODEL, "--uncached", "--sampler", "magic"], "unknown sampler 'magic'"),
    "no steps": Bad(["plan", *MODEL, "--uncached", "--steps", "0"], "0 is not in the range", 2),
    "many steps": Bad(["plan", *MODEL, "--uncached", "--steps", "1001"], "1001 steps: .* 1 and 1000"),
    "no batch": Bad(["plan", *PLAN, "--batch", "0"], "'0' is not N or LO-HI", 2),
    "backward batch": Bad(["plan", *PLAN, "--batch", "4-2"], "'4-2' is not N or LO-HI", 2),
    "text batch": Bad(["plan", *PLAN, "--batch", "two"], "'two' is not N or LO-HI", 2),
    "no graphs": Bad(["plan", *PLAN, "--max-graphs", "0"], "0 is not in the range", 2),
    "seed": Bad(["build", *PLAN, "--random-weights", "-1"], "-1 is not in the range", 2),
    "guidance": Bad(["build", *BUILD, "--guidance-scale", "nan"], "guidance scale nan"),
    "backend": Bad(["build", *BUILD, "--backend", "abacus"], "'abacus' is not", 2),
    "option": Bad(["plan", *PLAN, "--fast"], "No such option.*--fast", 2),
    "argument": Bad(["plan", *PLAN, "more"], r"unexpected extra argument \(more\)", 2),
    "command": Bad(["compile"], "No such command 'compile'", 2),
    "value": Bad(["plan", "--model"], "'--model' requires an argument", 2),
    "profile": Bad(
        ["build", *BUILD, "--profile", "toaster"], "'toaster' is neither a file nor one of", 2
    ),
    "no data": Bad(
        ["train-router", *MODEL], "give training data with --data PATH, or train from noise"
    ),
}

OUTPUTS = {
    "a file": Bad(["build", *BUILD, "-o", "model.json"], "output model.json is a file"),
    "below a file": Bad(
        ["build", *BUILD, "-o", "model.json/b"], "cannot write to model.json/b: Not a dir"
    ),
    "foreign": Bad(
        ["build", *BUILD, "-o", "work"],
        "output work is not empty and is not a bundle",
        make=folder_with_work,
    ),
    "here": Bad(["build", *BUILD, "-o", "."], r"output \. is not empty and is not a bundle"),
    "forbidden": Bad(
        ["build", *BUILD, "-o", "/proc/bundle"], "cannot write to /proc/bundle: No such file"
    ),
    "a picture": Bad(["plan", *PLAN, "--picture", "/proc/no/p.png"], "cannot write /proc/no/p.png"),
    "a picture's folder": Bad(["plan", *PLAN, "--picture", "."], r"cannot write \."),
}

BAD = {
    f"{kind}: {name}": bad
    for kind, group in {
        "router": ROUTERS,
        "checkpoint": CHECKPOINTS,
        "config": CONFIGS,
        "option": OPTIONS,
        "output": OUTPUTS,
    }.items()
    for name, bad in group.items()
}


def assert_refused(result: Result, code: int, message: str) -> None:
    """One line on stderr (after the warning of random weights), nothing on stdout."""
    got, out, err = result
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert (got, out) == (code, ""), err
    assert len(lines) == 1, err
    assert lines[0].startswith("Error: ")
    assert re.search(message, lines[0]), lines[0]


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(command, world, name):
    bad = BAD[name]
    if bad.make is not None:
        bad.make()
    before = tiny.contents(world)
    assert_refused(command(*bad.arguments), bad.code, bad.message)
    after = tiny.contents(world)
    resumable = {n: d for n, d in after.items() if not n.startswith("bundle/.l2c-")}
    assert resumable == before
    assert not (world / "evil").exists()


@pytest.mark.parametrize("name", ["inspect", "run", "verify", "bench"])
def test_what_is_no_bundle_is_said_by_every_command(command, world, tiny_bundle, name):
    assert_refused(command(name, "nothing"), 1, "nothing is not a bundle: there is no nothing/l2c.json")
    assert_refused(command(name, "."), 1, r"\. is not a bundle")
    assert_refused(command(name, "model.json"), 1, "model.json is not a bundle")
    assert_refused(command(name), 2, "Missing argument 'BUNDLE'")
    shutil.copytree(tiny_bundle.path, world / "bundle")
    whole = (world / "bundle" / MANIFEST).read_bytes()
    (world / "bundle" / MANIFEST).write_bytes(whole.replace(b"ddim", b"dpmm", 1))
    assert_refused(command(name, "bundle"), 1, "l2c.json does not match its own digest")
    (world / "bundle" / MANIFEST).write_bytes(whole.replace(b'"version": 2', b'"version": 9', 1))
    assert_refused(command(name, "bundle"), 4, "manifest version 9, this release reads 2")
    (world / "bundle" / MANIFEST).write_bytes(whole[:-9])
    assert_refused(command(name, "bundle"), 1, "l2c.json is damaged")
    (world / "bundle" / MANIFEST).write_bytes(whole)
    data = bytearray((world / "bundle" / WEIGHTS).read_bytes())
    data[-1] ^= 4
    (world / "bundle" / WEIGHTS).write_bytes(data)
    assert_refused(command(name, "bundle"), 1, "weights.safetensors does not match its digest")
    (world / "bundle" / WEIGHTS).unlink()
    assert_refused(command(name, "bundle"), 1, "cannot read weights.safetensors: No such file")


def test_a_folder_with_another_build_in_it_is_said(command, world):
    (world / "bundle").mkdir()
    lock = filelock.FileLock(world / "bundle" / ".l2c-lock", thread_local=False, is_singleton=False)
    with lock:
        result = command("build", *BUILD, "-o", "bundle")
    assert_refused(result, 1, "another build is at work in bundle; wait for it")


def test_more_than_thirty_kinds_of_bad_input_are_tried():
    assert len(BAD) >= 80
