"""Weights packed for this CPU: what is written, that runners find it, and that it stays one copy."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import killing
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny
from click.testing import CliRunner

from l2c_export.build.build import build_bundle
from l2c_export.cli import cli
from l2c_export.core.bundle import WEIGHTS, Bundle, read_bundle
from l2c_export.core.cpu import cpu_target
from l2c_export.core.engines import ENGINES, find_engines
from l2c_export.core.models import DiTConfig
from l2c_export.core.packed import PACKED, PACKED_RECORD, find_packed, write_packed
from l2c_export.engines.doctor import diagnose
from l2c_export.engines.packed import PackedBuild
from l2c_export.errors import L2CError, UnsupportedError
from l2c_export.runtime import Runner
from l2c_export.runtime import ort as ort_backend

WIDE = DiTConfig(
    depth=2, hidden_size=512, num_heads=8, patch_size=2, input_size=8, num_classes=10, mlp_ratio=4.0
)
CLOSE = 1e-4  # of the largest value: packed kernels add up in another order


@pytest.fixture(scope="module")
def made(int8_bundle, tmp_path_factory) -> Bundle:
    """An int8 bundle of several step graphs, with packed weights. Copy it before changing it."""
    return packed_copy(int8_bundle, tmp_path_factory.mktemp("packed"))


def packed_copy(bundle: Bundle, folder: Path) -> Bundle:
    copy = read_bundle(shutil.copytree(bundle.path, folder / "bundle"))
    PackedBuild(copy).run()
    return copy


@pytest.fixture
def bundle(made, tmp_path) -> Bundle:
    return read_bundle(shutil.copytree(made.path, tmp_path / "bundle"))


def home(bundle: Bundle):
    """The folder of the packed weights."""
    (packed,) = find_packed(bundle)
    return bundle.path / ENGINES / packed.folder


def trajectory(runner: Runner, batch: int, cached: bool = True) -> list[np.ndarray]:
    """The latent after each call."""
    latents: list[np.ndarray] = []
    labels = list(range(batch))
    runner.sample(labels, seed=0, cached=cached, callback=lambda i, t, x: latents.append(x.copy()))
    return latents


def assert_same_results(bundle: Bundle) -> None:
    """Packed and unpacked, call by call, cached and not, at every batch."""
    packed, plain = (
        Runner.load(bundle.path, threads=1),
        Runner.load(bundle.path, threads=1, packed=False),
    )
    assert packed.backend.version == f"{plain.backend.version}, packed weights"
    for batch in (1, 2):
        for cached in (True, False):
            pairs = zip(
                trajectory(packed, batch, cached), trajectory(plain, batch, cached), strict=True
            )
            assert max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs) < CLOSE


def test_a_runner_with_packed_weights_computes_what_one_without_does(made):
    assert len(made.manifest.step_graphs()) > 3
    assert_same_results(made)


def test_so_it_does_for_uvit(int8_uvit_bundle, tmp_path):
    assert_same_results(packed_copy(int8_uvit_bundle, tmp_path))


def test_every_step_graph_points_at_one_packed_copy_of_what_onnxruntime_packs(made):
    (packed,) = find_packed(made)
    manifest = made.manifest
    assert set(packed.graphs) == {*manifest.step_graphs(), manifest.uncached}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    products = {f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in layers}
    seen: dict[str, dict[str, str]] = {}
    for graph in packed.graphs:
        model = onnx.load(home(made) / packed.graphs[graph], load_external_data=False).graph
        original = onnx.load(made.file(graph), load_external_data=False).graph
        assert list(model.node) == list(original.node)
        for tensor in model.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if "prepacked_0" in entries:
                assert entries["location"] == f"engines/{packed.folder}/{PACKED}"
                assert seen.setdefault(tensor.name, entries) == entries
            else:
                assert entries.get("location", WEIGHTS) == WEIGHTS
                assert tensor.name not in products
    assert products <= seen.keys()
    parts = {part for entries in seen.values() for part in entries["prepacked_0"].split("|")[1:]}
    offsets = sorted(tuple(map(int, part.split(";")[:2])) for part in parts)
    assert all(offset % 4096 == 0 for offset, _ in offsets)
    assert sum(length for _, length in offsets) == packed.packed_bytes
    ends = [offset + length for offset, length in offsets]
    assert all(end <= begin for end, (begin, _) in zip(ends, offsets[1:], strict=False))


def test_the_weights_beside_the_packed_ones_are_those_of_the_bundle(made):
    (packed,) = find_packed(made)

    def weights(path) -> dict[str, bytes]:
        found = {}
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            where = {entry.key: entry.value for entry in tensor.external_data}
            if where:
                data = (made.path / where["location"]).read_bytes()[int(where["offset"]) :]
                found[tensor.name] = data[: int(where["length"])]
        return found

    for graph in packed.graphs:
        assert weights(home(made) / packed.graphs[graph]) == weights(made.file(graph)) != {}


GROWTH = """
import gc, sys
from l2c_export.runtime import Runner
from l2c_export.evidence.machine import anonymous_memory

def grown(packed):
    runner = Runner.load(sys.argv[1], threads=1, packed=packed)
    runner.sample([1], seed=0)
    name = runner.manifest.uncached
    held = [runner.backend.load(name)]
    before = anonymous_memory()
    held += [runner.backend.load(name) for _ in range(8)]
    return (anonymous_memory() - before) / 8

plain, packed = grown(False), grown(True)
print(plain, packed)
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="memory is read from /proc")
def test_further_sessions_hold_no_packed_copy_of_their_own(tmp_path):
    tiny.write_files(tmp_path, WIDE)
    bundle = build_bundle(
        tmp_path / "bundle", tiny.request(tiny.plan(tmp_path, uncached=True, steps=2, precision="int8"))
    )
    packed = PackedBuild(bundle).run()
    assert packed.packed_bytes > 6e6
    run = [sys.executable, "-c", GROWTH, str(bundle.path)]
    out = subprocess.run(run, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    plain, mapped = map(float, out.stdout.split())
    assert mapped - plain < packed.packed_bytes / 3


def test_two_builds_are_the_same_bytes_and_a_finished_one_is_left_alone(bundle, tmp_path):
    other = shutil.copytree(bundle.path, tmp_path / "other", ignore=shutil.ignore_patterns(ENGINES))
    PackedBuild(read_bundle(other)).run()
    assert tiny.contents(other) == tiny.contents(bundle.path)
    before = {p: p.stat().st_mtime_ns for p in home(bundle).iterdir()}
    assert [PackedBuild(bundle).run()] == find_packed(bundle)
    assert before == {p: p.stat().st_mtime_ns for p in home(bundle).iterdir()}


def test_a_build_that_dies_leaves_nothing_that_a_runner_takes(bundle):
    whole = tiny.contents(bundle.path)
    template = bundle.path.with_name("template")
    shutil.copytree(bundle.path, template, ignore=shutil.ignore_patterns(ENGINES))
    for number in (0, 2, 5, 9):
        folder = bundle.path.with_name("killed")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)
        left = iter(range(number))

        def act(left=left) -> None:
            if next(left, None) is None:
                raise killing.Killed

        with pytest.raises(killing.Killed):
            killing.watched(folder, lambda f=folder: PackedBuild(read_bundle(f)).run(), act)
        assert find_packed(read_bundle(folder)) == []
        assert "packed" not in Runner.load(folder, threads=1).backend.version
        PackedBuild(read_bundle(folder)).run()
        assert tiny.contents(folder) == whole


@pytest.mark.parametrize("name", [PACKED, "step"])
def test_a_damaged_file_is_refused_and_packed_again(bundle, name):
    whole = tiny.contents(bundle.path)
    path = next(p for p in home(bundle).iterdir() if p.name.startswith(name))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        L2CError, match=r"does not match its digest; pack the weights again: l2c-export"
    ):
        Runner.load(bundle.path, threads=1)
    Runner.load(bundle.path, threads=1, packed=False)
    assert CliRunner().invoke(cli, ["inspect", str(bundle.path)]).exit_code == 1
    PackedBuild(bundle).run()
    assert tiny.contents(bundle.path) == whole


@pytest.mark.parametrize("text", [None, "", "[]", "{}", "edited"])
def test_a_record_that_is_not_what_was_written_is_not_taken(bundle, text, caplog):
    record = home(bundle) / PACKED_RECORD
    if text is None:
        record.rename(record.with_suffix(".txt"))
    else:
        edited = record.read_text().replace('"packed_bytes": ', '"packed_bytes": 1')
        record.write_text(edited if text == "edited" else text)
    assert "packed" not in Runner.load(bundle.path, threads=1).backend.version
    assert ("is damaged or of another release" in caplog.text) == (text is not None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "0.1"}, "packed by onnxruntime 0.1, this machine has"),
        ({"cpu": "x86_64+mmx"}, "packed for x86_64+mmx, this CPU is"),
        ({"source": "0" * 64}, "packed from another bundle; pack again: l2c-export engines"),
    ],
)
def test_weights_packed_elsewhere_are_left_alone_and_doctor_says_why(bundle, changes, reason, caplog):
    (packed,) = find_packed(bundle)
    other = replace(packed, **changes)
    folder = home(bundle).rename(home(bundle).with_name(other.folder))
    write_packed(folder, other)
    caplog.set_level("INFO", "l2c_export")
    assert "packed" not in Runner.load(bundle.path, threads=1).backend.version
    assert reason in caplog.text
    (finding,) = diagnose(bundle).packed
    assert (finding.able, reason in finding.detail) == (False, True)
    assert diagnose(bundle).healthy, "it runs without"


def test_another_schedule_or_other_weights_want_new_packed_weights(bundle, tiny_files):
    for threshold, seed in ((0.2, tiny.SEED), (0.2, 99)):
        plan = tiny.plan(tiny_files, threshold=threshold, precision="int8")
        changed = build_bundle(bundle.path, tiny.request(plan, seed))
        assert "packed" not in Runner.load(changed.path, threads=1).backend.version
        PackedBuild(changed).run()
        assert "packed" in Runner.load(changed.path, threads=1).backend.version
        files = {path.name for path in home(changed).iterdir()}
        assert files == {PACKED_RECORD, *find_packed(changed)[0].files}


def test_a_float32_bundle_has_nothing_to_gain(tiny_bundle):
    with pytest.raises(UnsupportedError, match="is float32: a CPU gains nothing from packing"):
        PackedBuild(tiny_bundle)


def test_a_kernel_that_packs_nothing_is_said(bundle, monkeypatch):
    real = ort.SessionOptions.add_session_config_entry

    def deaf(self, key, value):
        if "prepacked" not in key:
            real(self, key, value)

    monkeypatch.setattr(ort.SessionOptions, "add_session_config_entry", deaf)
    shutil.rmtree(bundle.path / ENGINES)
    with pytest.raises(UnsupportedError, match="packs no weights on"):
        PackedBuild(bundle).run()
    assert find_packed(bundle) == []


# -- the command ------------------------------------------------------------------------------------


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_the_command_shows_the_price_packs_and_reports(bundle):
    (expected,) = find_packed(bundle)
    shutil.rmtree(bundle.path / ENGINES)
    command = ("engines", bundle.path, "--backend", "ort")
    price = json.loads(run(*command, "--dry-run", "--json"))
    assert not (bundle.path / ENGINES).exists()
    assert 0.6 < price["packed_bytes"] / expected.packed_bytes <= 1  # sums and padding; more if tiny
    assert "once for all" in run(*command)
    assert find_packed(bundle) == [expected]
    assert find_engines(bundle) == []
    (report,) = json.loads(run("engines", bundle.path, "--report", "--json"))
    assert (report["folder"], report["bytes"]) == (expected.folder, expected.bytes)
    assert expected.folder in run("inspect", bundle.path)
    assert run("engines", bundle.path, "--report") in run(*command)
    assert "packed weights" in run(
        "run", bundle.path, "--labels", 1, "-o", bundle.path.with_name("x.npy")
    )
    (held,) = diagnose(bundle).packed
    assert (held.able, expected.folder in held.detail) == (True, True)
    with (home(bundle) / PACKED).open("r+b") as file:
        file.write(b"another!")
    (damaged,) = diagnose(bundle).packed
    assert (damaged.able, "does not match its digest" in damaged.detail) == (False, True)


def test_options_of_engines_are_refused(bundle):
    arguments = ["engines", str(bundle.path), "--backend", "ort", "--target", "sm86"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert "takes no options of engines" in result.stderr


# -- the CPU ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "features"),
    [
        (
            "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512vl avx512_vnni\n",
            "+avx2+avx512vl+avx512_vnni",
        ),
        ("processor\t: 0\nFeatures\t: fp asimd i8mm asimddp\n", "+asimddp+i8mm"),
        ("processor\t: 0\nflags\t: avx2\n\nprocessor\t: 1\nflags\t: amx_int8\n", "+avx2"),
        ("hart\t: 0\n", ""),
    ],
)
def test_a_cpu_is_named_by_what_chooses_kernels(tmp_path, text, features):
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    assert cpu_target(path) == platform.machine() + features


def test_a_system_without_cpuinfo_has_its_architecture(tmp_path):
    assert cpu_target(tmp_path / "none") == platform.machine()


def test_another_cpu_takes_no_packed_weights(bundle, monkeypatch):
    monkeypatch.setattr(ort_backend, "cpu_target", lambda: "x86_64+avx2")
    assert "packed" not in Runner.load(bundle.path, threads=1).backend.version
