"""The manifest and the digests: nothing that differs from what was built is ever run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from l2c_export.core.bundle import (
    CONDITIONING,
    MANIFEST,
    WEIGHTS,
    Bundle,
    File,
    ProgramCall,
    leaves_folder,
    read_bundle,
    write_manifest,
)
from l2c_export.errors import L2CError
from l2c_export.runtime import Runner


@pytest.fixture
def copy(tiny_bundle, tmp_path) -> Path:
    return shutil.copytree(tiny_bundle.path, tmp_path / "bundle")


@pytest.fixture
def manifest(tiny_bundle):
    return tiny_bundle.manifest


def flip(path: Path, position: int, bits: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= bits
    path.write_bytes(data)


# -- files --------------------------------------------------------------------------------------


def test_a_bundle_that_is_whole_is_read_and_checked(tiny_bundle):
    again = read_bundle(tiny_bundle.path)
    again.check_files()
    assert again.manifest == tiny_bundle.manifest


def test_a_flipped_bit_in_any_file_is_refused_with_its_name(copy, manifest):
    assert WEIGHTS in manifest.files
    assert len(manifest.files) > 8
    for name in manifest.files:
        whole = (copy / name).read_bytes()
        for position in (0, len(whole) // 3, len(whole) - 1):
            flip(copy / name, position, bits=1 << position % 8)
            with pytest.raises(L2CError, match=rf"bundle: {name} does not match its digest; copy or"):
                read_bundle(copy).check_files()
            if position == len(whole) - 1:
                with pytest.raises(L2CError, match=rf"bundle: {name} does not match its digest"):
                    Runner.load(copy)
            (copy / name).write_bytes(whole)
    Runner.load(copy)


@pytest.mark.parametrize("size", [0, 1, -1])
def test_a_file_of_another_length_is_refused_with_its_name(copy, manifest, size):
    for name in manifest.files:
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole + b"\0" if size == 1 else whole[:size])
        with pytest.raises(L2CError, match=rf"bundle: {name} has \d+ bytes, the manifest says"):
            read_bundle(copy).check_files()
        (copy / name).write_bytes(whole)


def test_a_missing_file_is_named_and_so_is_a_folder_in_its_place(copy):
    (copy / WEIGHTS).unlink()
    with pytest.raises(L2CError, match=r"cannot read weights.safetensors: No such file"):
        Runner.load(copy)
    (copy / WEIGHTS).mkdir()
    with pytest.raises(L2CError, match=r"weights.safetensors"):
        Runner.load(copy)


def test_files_can_be_checked_one_by_one(copy):
    flip(copy / WEIGHTS, 5000)
    read_bundle(copy).check_files(["full.onnx"])
    with pytest.raises(L2CError, match=WEIGHTS):
        read_bundle(copy).check_files(["full.onnx", WEIGHTS])


# -- the manifest's own bytes -------------------------------------------------------------------


def test_a_flipped_bit_anywhere_in_the_manifest_is_refused(copy):
    path = copy / MANIFEST
    whole = path.read_bytes()
    spaces = [i for i, byte in enumerate(whole) if byte in b" \n"]
    positions = {0, 1, len(whole) - 1, *range(0, len(whole), 97), *spaces[:: len(spaces) // 40]}
    for position in sorted(positions):
        for bits in (1, 0x20, 0x80):
            flip(path, position, bits)
            with pytest.raises(L2CError, match=MANIFEST):
                read_bundle(copy)
            path.write_bytes(whole)
    read_bundle(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "\n",
        lambda text: text.rstrip("\n"),
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: json.dumps(json.loads(text)),
        lambda text: text.replace('"sampler"', '"sampler" '),
        lambda text: text.replace('"sampler": "ddim"', '"sampler": "ddim", "extra": 1'),
        lambda text: text.replace('"sampler": "ddim"', '"sampler": "euler", "sampler": "ddim"'),
        lambda text: text.replace('"sampler": "ddim",', ""),
        lambda text: text.replace("0.", "0.0", 1),
        lambda text: text[: len(text) // 2],
        lambda text: "",
    ],
)
def test_a_manifest_that_says_the_same_in_other_bytes_is_refused_too(copy, change):
    path = copy / MANIFEST
    changed = change(path.read_text())
    assert changed != path.read_text()
    path.write_bytes(changed.encode())
    with pytest.raises(L2CError, match=MANIFEST):
        read_bundle(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b"9" * 5000, "is damaged"),
        (b"[]", "is not an l2c-export manifest"),
        (b"{}", "is not an l2c-export manifest"),
        (b'{"format": "l2c-bundle"}', "manifest version None, this release reads 2"),
        (b'{"format": "l2c-bundle", "version": 1}', "manifest version 1, this release reads 2"),
        (b'{"format": "l2c-bundle", "version": "1"}', "manifest version '1'"),
        (b'{"format": "l2c-bundle", "version": 2}', "is damaged"),
        (b'{"format": "l2c-bundle", "version": 2, "slots": 3, "guidance": 1}', "is damaged"),
    ],
)
def test_what_is_no_manifest_of_this_release_is_refused(tmp_path, content, message):
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(L2CError, match=message):
        read_bundle(tmp_path)


def test_a_newer_manifest_is_refused_even_where_its_digest_fits(copy, monkeypatch, manifest):
    monkeypatch.setattr("l2c_export.core.bundle.VERSION", 3)
    write_manifest(copy, manifest)
    monkeypatch.undo()
    with pytest.raises(
        L2CError, match=r"manifest version 3.*build the bundle again or install a matching"
    ):
        Runner.load(copy)


def test_no_folder_an_empty_one_and_a_file_are_no_bundles(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(L2CError, match=r"is not a bundle: there is no .*; make one with"):
            read_bundle(path)


# -- programs that cannot run, in manifests whose digest fits -----------------------------------


def with_call(manifest, index: int, **changes):
    calls = list(manifest.calls)
    calls[index] = replace(calls[index], **changes)
    return replace(manifest, calls=tuple(calls))


def with_file(manifest, name: str):
    return replace(manifest, files=manifest.files | {name: File(1, "0" * 64)})


def swapped(values: dict[str, int]) -> dict[str, int]:
    return dict(zip(values, reversed(values.values()), strict=True))


# Call 4 writes all four slots, and call 5 reads them.
PROGRAMS = {
    "parent": (lambda m: with_file(m, "../x"), r"file name '../x' leaves the bundle"),
    "deep parent": (lambda m: with_file(m, "a/../../x"), r"leaves the bundle"),
    "absolute": (lambda m: with_file(m, "/etc/passwd"), r"file name '/etc/passwd' leaves"),
    "drive": (lambda m: with_file(m, "C:x"), r"file name 'C:x' leaves"),
    "backslash": (lambda m: with_file(m, "..\\x"), r"leaves the bundle"),
    "no name": (lambda m: with_file(m, ""), r"file name '' leaves"),
    "NUL": (lambda m: with_file(m, "a\0b"), r"leaves the bundle"),
    "unlisted": (
        lambda m: replace(
            m, files={k: v for k, v in m.files.items() if k != m.graphs[m.uncached].file}
        ),
        r"graph step-\w+ names the unlisted file",
    ),
    "no conditioning": (
        lambda m: replace(m, graphs={k: v for k, v in m.graphs.items() if k != CONDITIONING}),
        r"there is no graph 'conditioning'",
    ),
    "no full": (lambda m: replace(m, full="nothing"), r"there is no graph 'nothing'"),
    "no uncached": (lambda m: replace(m, uncached="step-0"), r"there is no graph 'step-0'"),
    "no step": (lambda m: with_call(m, 2, graph="step-1"), r"there is no graph 'step-1'"),
    "no calls": (lambda m: replace(m, calls=()), r"the program has no calls"),
    "no batch": (lambda m: replace(m, batch=(0, 1)), r"batch \(0, 1\) is no range"),
    "backward batch": (lambda m: replace(m, batch=(2, 1)), r"batch \(2, 1\) is no range"),
    "one batch": (lambda m: replace(m, batch=(2,)), r"batch \(2,\) is no range"),
    "no update": (
        lambda m: with_call(m, 1, update={"history": {"x": 1.0}}),
        r"call 1 has no update of x",
    ),
    "target": (
        lambda m: with_call(m, 1, update={"x": {"x": 1.0}, "past": {"x": 1.0}}),
        r"call 1 updates \['past'\], this release knows x, history, history2",
    ),
    "source": (
        lambda m: with_call(m, 1, update={"x": {"x": 1.0, "past": 1.0}}),
        r"call 1 updates from \['past'\], this release knows x, output, noise, history, history2",
    ),
    "unwritten history": (
        lambda m: with_call(m, 0, update={"x": {"history": 1.0}, "history": {"x": 1.0}}),
        r"call 0 reads \['history'\], which no call before it wrote",
    ),
    "noise": (
        lambda m: with_call(m, 1, update={"x": {"x": 1.0, "noise": 0.1}}),
        r"call 1 draws noise, though the sampler is not stochastic",
    ),
    "empty update": (lambda m: with_call(m, 1, update={"x": {}}), r"call 1 has an update from nothing"),
    "NaN update": (
        lambda m: with_call(m, 1, update={"x": {"x": 1.0, "output": float("nan")}}),
        r"call 1 has an update that is no finite number",
    ),
    "flat update": (lambda m: with_call(m, 1, update={"x": 1.0}), r"is damaged \(TypeError"),
    "endless time": (lambda m: with_call(m, 3, timestep=float("inf")), r"call 3 has a timestep"),
    "slot": (lambda m: with_call(m, 0, writes={"02.attn": 0}), r"unknown slots \['02.attn'\]"),
    "high buffer": (
        lambda m: with_call(m, 4, writes=m.calls[4].writes | {"00.attn": m.buffers}),
        r"call 4 names a buffer that does not exist",
    ),
    "low buffer": (
        lambda m: with_call(m, 4, writes=m.calls[4].writes | {"00.attn": -1}),
        r"call 4 names a buffer that does not exist",
    ),
    "fewer buffers": (lambda m: replace(m, buffers=1), r"names a buffer that does not exist"),
    "in place": (
        lambda m: with_call(m, 5, writes={"00.attn": m.calls[5].reads["00.attn"]}),
        r"call 5 reads and writes one buffer",
    ),
    "one for two": (
        lambda m: with_call(m, 4, writes=dict.fromkeys(m.calls[4].writes, 0)),
        r"call 4 writes two slots into one buffer",
    ),
    "read first": (
        lambda m: replace(m, calls=m.calls[5:] + m.calls[:5]),
        r"call 0 reads slot 00.attn from buffer \d, which does not hold it",
    ),
    "never written": (
        lambda m: with_call(m, 4, writes={}, graph=m.uncached),
        r"call 5 reads slot .* which does not hold it",
    ),
    "crossed": (
        lambda m: with_call(m, 5, reads=swapped(m.calls[5].reads)),
        r"call 5 reads slot .* which does not hold it",
    ),
    "another graph": (
        lambda m: with_call(m, 5, graph=m.uncached),
        r"call 5 binds \['00.attn', .*\], which are not the slots of step-",
    ),
    "unbound output": (
        lambda m: with_call(m, 4, writes={}),
        r"call 4 binds \[\], which are not the slots of step-",
    ),
    "buffers are text": (lambda m: replace(m, buffers="4"), r"is damaged \(TypeError"),
    "buffer is text": (lambda m: with_call(m, 4, writes={"00.attn": "0"}), r"is damaged \(TypeError"),
    "writes are a list": (lambda m: with_call(m, 4, writes=["00.attn"]), r"is damaged"),
    "calls are text": (lambda m: replace(m, calls=({"graph": "x"},)), r"is damaged"),
    "batch is text": (lambda m: replace(m, batch=("1", "2")), r"is damaged \(TypeError"),
    "time is text": (lambda m: with_call(m, 0, timestep="999"), r"is damaged \(TypeError"),
    "no slots": (lambda m: replace(m, slots=None), r"is damaged"),
    "graph is text": (lambda m: replace(m, graphs={"full": "full.onnx"}), r"is damaged"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_cannot_run_is_refused_though_its_digest_fits(manifest, tmp_path, name):
    change, message = PROGRAMS[name]
    write_manifest(tmp_path, change(manifest))
    with pytest.raises(L2CError, match=message) as error:
        read_bundle(tmp_path)
    assert "\n" not in str(error.value)
    assert MANIFEST in str(error.value)


def test_a_slot_whose_buffer_was_given_away_is_gone(manifest, tmp_path):
    """Buffer 0 holds 00.attn until another slot is written there."""
    every = next(c for c in manifest.calls if not c.reads and len(c.writes) == 4)
    reader = next(c for c in manifest.calls if len(c.reads) == 4)
    one = next(c for c in manifest.calls if list(c.writes) == ["00.attn"])
    thief = replace(one, writes={"00.attn": every.writes["01.mlp"]})
    write_manifest(tmp_path, replace(manifest, calls=(every, thief, reader)))
    with pytest.raises(L2CError, match=r"call 2 reads slot 00.attn from buffer 0, which does not"):
        read_bundle(tmp_path)


def test_names_that_leave_a_folder_are_told_from_those_that_stay():
    for name in ("a", "a.b", "a/b", "..a", "a..b/c", ".hidden", "a b"):
        assert not leaves_folder(name), name
    for name in ("", ".", "..", "/a", "a/", "a//b", "../a", "a/..", "a/./b", "a\\b", "C:a", "a\0"):
        assert leaves_folder(name), name


def test_a_manifest_survives_a_round_trip_with_every_kind_of_value(manifest, tmp_path):
    changed = replace(manifest, preset="dit — x", guidance=None, weights={"kind": "random", "seed": 1})
    write_manifest(tmp_path, changed)
    again = read_bundle(tmp_path)
    assert again == Bundle(tmp_path, changed)
    assert again.manifest.rows == 1
    assert again.manifest.random_weights
    assert isinstance(again.manifest.calls[0], ProgramCall)
