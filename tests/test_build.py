"""Builds: the same bytes every time, no work twice, and nothing that a kill could spoil."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import killing
import pytest
import tiny

from l2c_export.build.build import JOURNAL, build_bundle
from l2c_export.core.bundle import MANIFEST, WEIGHTS, read_bundle
from l2c_export.core.plan import StepGraph
from l2c_export.errors import L2CError, UnsupportedError

CLI = [sys.executable, "-c", "from l2c_export.cli import main; main()"]


@pytest.fixture
def exported(tiny_bundle, monkeypatch) -> None:
    """Builds take the exported graph of the tiny bundle instead of exporting."""
    killing.substitute(tiny_bundle.path / "full.onnx", monkeypatch.setattr)


@pytest.fixture
def copy(tiny_bundle, tmp_path) -> Path:
    return shutil.copytree(tiny_bundle.path, tmp_path / "bundle")


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Name to inode and time: the same as long as nobody has written the file again."""
    return {
        name: ((folder / name).stat().st_ino, (folder / name).stat().st_mtime_ns)
        for name in tiny.contents(folder)
    }


def command_line(files: Path, output: Path) -> list[str]:
    """The command line that builds the tiny bundle."""
    router = files / "router.safetensors"
    arguments = ["build", "--model-config", files / "model.json", "--router", router, "-o", output]
    return [*CLI, *map(str, arguments), "--random-weights", str(tiny.SEED), "--batch", "1-2"]


# -- the same bytes -----------------------------------------------------------------------------


def test_two_builds_of_one_request_are_the_same_bytes(exported_anew, tiny_bundle, tiny_plan, tmp_path):
    again = build_bundle(tmp_path / "elsewhere" / "again", tiny.request(tiny_plan))
    assert tiny.contents(again.path) == tiny.contents(tiny_bundle.path)


def test_a_bundle_holds_what_its_manifest_lists_and_nothing_else(tiny_bundle):
    assert set(tiny.contents(tiny_bundle.path)) == {MANIFEST, *tiny_bundle.manifest.files}


def test_progress_goes_from_nothing_to_everything(exported, tiny_plan, tmp_path):
    told = []
    build_bundle(tmp_path / "b", tiny.request(tiny_plan), lambda *at: told.append(at))
    weights = [(done, total) for what, done, total in told if what == "weights"]
    graphs = [(done, total) for what, done, total in told if what == "graphs"]
    assert weights == sorted(weights)
    assert weights[-1][0] == weights[-1][1] == (tmp_path / "b" / WEIGHTS).stat().st_size
    assert graphs == [(i, len(graphs) - 1) for i in range(len(graphs))]


# -- no work twice ------------------------------------------------------------------------------


def test_a_finished_bundle_is_left_alone(exported, copy, tiny_plan):
    before = stamps(copy)
    build_bundle(copy, tiny.request(tiny_plan))
    assert stamps(copy) == before


def test_another_threshold_keeps_weights_and_export_and_removes_stale_graphs(
    exported, copy, tiny_files, tiny_plan, tmp_path
):
    before = stamps(copy)
    changed = tiny.plan(tiny_files, threshold=0.5)
    build_bundle(copy, tiny.request(changed))
    after = stamps(copy)
    kept = {name for name in before if before[name] == after.get(name)}
    assert {WEIGHTS, "full.onnx", "conditioning.onnx"} <= kept
    old, new = ({f"{g.name}.onnx" for g in p.graphs} for p in (tiny_plan, changed))
    assert old - new
    assert not (old - new) & set(after)
    fresh = build_bundle(tmp_path / "fresh", tiny.request(changed))
    assert tiny.contents(copy) == tiny.contents(fresh.path)


def test_other_weights_keep_every_graph(exported, copy, tiny_plan):
    before = stamps(copy)
    build_bundle(copy, tiny.request(tiny_plan, seed=99))
    after = stamps(copy)
    assert {name for name in before if before[name] != after[name]} == {WEIGHTS, MANIFEST}


def test_another_default_of_the_guidance_scale_writes_only_the_manifest(exported, copy, tiny_plan):
    before = stamps(copy)
    build_bundle(copy, tiny.request(tiny_plan, guidance_scale=1.5))
    after = stamps(copy)
    assert {name for name in before if before[name] != after[name]} == {MANIFEST}
    assert read_bundle(copy).manifest.guidance.scale == 1.5


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_files_and_only_they_are_made_again(exported, copy, tiny_plan, tiny_bundle, damage):
    before = stamps(copy)
    broken = [WEIGHTS, "conditioning.onnx", "reports/plan.json"]
    for name in broken:
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        if damage == "delete":
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(data if damage == "flip" else data[:-1])
    build_bundle(copy, tiny.request(tiny_plan))
    assert tiny.contents(copy) == tiny.contents(tiny_bundle.path)
    after = stamps(copy)
    assert {name for name in before if before[name] != after[name]} == {*broken, MANIFEST}


def test_a_damaged_manifest_costs_its_rebuild_but_never_a_wrong_bundle(
    exported, copy, tiny_plan, tiny_bundle
):
    (copy / MANIFEST).write_bytes((copy / MANIFEST).read_bytes()[:-100])
    build_bundle(copy, tiny.request(tiny_plan))
    assert tiny.contents(copy) == tiny.contents(tiny_bundle.path)


# -- folders that are not ours ------------------------------------------------------------------


def test_a_bundle_of_a_later_release_is_refused_and_stays(exported, copy, tiny_plan):
    later = (copy / MANIFEST).read_bytes().replace(b'"version": 2', b'"version": 3', 1)
    (copy / MANIFEST).write_bytes(later)
    with pytest.raises(UnsupportedError, match="manifest version 3"):
        build_bundle(copy, tiny.request(tiny_plan))
    assert (copy / MANIFEST).read_bytes() == later


def test_a_verdict_on_another_bundle_does_not_stay(exported, copy, tiny_plan):
    verdict = copy / "reports" / "verify.json"
    verdict.write_text("{}")
    build_bundle(copy, tiny.request(tiny_plan))
    assert verdict.exists()
    build_bundle(copy, tiny.request(tiny_plan, seed=99))
    assert not verdict.exists()


def test_a_folder_with_other_files_is_refused_and_stays(tiny_plan, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / WEIGHTS).write_text("somebody's weights")
    before = tiny.contents(tmp_path)
    with pytest.raises(L2CError, match=r"is not empty and is not a bundle; give another folder"):
        build_bundle(tmp_path, tiny.request(tiny_plan))
    assert tiny.contents(tmp_path) == before


def test_a_file_in_the_place_of_the_folder_is_refused_and_stays(tiny_plan, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(L2CError, match=r"out is a file; give a folder"):
        build_bundle(tmp_path / "out", tiny.request(tiny_plan))
    with pytest.raises(L2CError, match=r"cannot write to .*out/deeper: Not a directory"):
        build_bundle(tmp_path / "out" / "deeper", tiny.request(tiny_plan))
    assert (tmp_path / "out").read_text() == "a file"


def test_a_folder_in_which_another_build_is_at_work_is_refused(tiny_plan, copy):
    before = tiny.contents(copy)
    other = filelock.FileLock(copy / ".l2c-lock", thread_local=False, is_singleton=False)
    with other, pytest.raises(L2CError, match=r"another build is at work in .*bundle"):
        build_bundle(copy, tiny.request(tiny_plan))
    assert {k: v for k, v in tiny.contents(copy).items() if k != ".l2c-lock"} == before


def test_a_users_own_files_beside_a_bundle_stay(exported, copy, tiny_files):
    (copy / "notes.txt").write_text("mine")
    build_bundle(copy, tiny.request(tiny.plan(tiny_files, threshold=0.5)))
    assert (copy / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["../precious.txt", "/absolute/precious.txt", "a/../../precious.txt"])
def test_a_journal_from_elsewhere_cannot_reach_out_of_its_folder(exported, tiny_plan, tmp_path, name):
    folder, precious = tmp_path / "bundle", tmp_path / "precious.txt"
    folder.mkdir()
    precious.write_text("mine")
    name = name.replace("/absolute", str(tmp_path))
    entry = {"bytes": 4, "sha256": "0" * 64, "key": "k"}
    (folder / JOURNAL).write_text(json.dumps({name: entry}))
    build_bundle(folder, tiny.request(tiny_plan))
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"a": 1}', '{"a": {"bytes": 1}}', "[" * 9999])
def test_a_broken_journal_is_no_journal(exported, tiny_bundle, tiny_plan, tmp_path, text):
    (tmp_path / JOURNAL).write_text(text)
    build_bundle(tmp_path, tiny.request(tiny_plan))
    assert tiny.contents(tmp_path) == tiny.contents(tiny_bundle.path)


# -- what is asked for --------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(0, 1), (2, 1), (1, 5000)])
def test_a_batch_that_cannot_be_is_refused(tiny_plan, tmp_path, batch):
    with pytest.raises(L2CError, match=rf"batch {batch[0]}-{batch[1]}: give 1 <= smallest"):
        build_bundle(tmp_path / "b", tiny.request(tiny_plan, batch=batch))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_guidance_scale_that_is_no_number_is_refused(tiny_plan, tmp_path, scale):
    with pytest.raises(L2CError, match=rf"guidance scale {scale}"):
        build_bundle(tmp_path / "b", tiny.request(tiny_plan, guidance_scale=scale))
    assert not (tmp_path / "b").exists()


# -- kills --------------------------------------------------------------------------------------


def test_a_build_that_dies_before_any_of_its_operations_can_be_finished(exported, tiny_files, tmp_path):
    plan = tiny.plan(tiny_files, max_graphs=2)
    seen = killing.scenario(tmp_path, None, tiny.request(plan), killing.play_death)
    assert seen["operations"] > 80
    assert seen["states"] > 40


def test_a_rebuild_that_dies_leaves_the_old_bundle_the_new_one_or_none(exported, tiny_files, tmp_path):
    before, after = (tiny.plan(tiny_files, threshold=t, max_graphs=3) for t in (0.1, 0.5))
    seen = killing.scenario(
        tmp_path, tiny.request(before), tiny.request(after, seed=4), killing.play_death
    )
    assert seen["operations"] > 40
    assert 2 <= seen["whole"] < seen["states"]


def test_ctrl_c_exits_130_and_keeps_what_was_made(
    exported, tiny_files, tiny_plan, tiny_bundle, tmp_path
):
    output = tmp_path / "bundle"
    with subprocess.Popen(
        command_line(tiny_files, output),
        stderr=subprocess.PIPE,
        text=True,
        # a shell starts background jobs, and so perhaps this test, with SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as build:
        lines = []
        for line in build.stderr:
            lines.append(line)
            if "weights done" in line:
                while WEIGHTS not in (output / JOURNAL).read_text():
                    time.sleep(0.01)
                build.send_signal(signal.SIGINT)
    assert build.returncode == 130
    assert [line.strip() for line in lines if line.strip()][-1] == "interrupted"
    assert "Traceback" not in "".join(lines)
    assert not (output / MANIFEST).exists()
    weights = (output / WEIGHTS).stat()
    build_bundle(output, tiny.request(tiny_plan))
    assert (output / WEIGHTS).stat().st_mtime_ns == weights.st_mtime_ns
    assert tiny.contents(output) == tiny.contents(tiny_bundle.path)


@pytest.mark.slow
def test_children_that_are_killed_at_every_operation_and_in_writes(tiny_bundle, tiny_files, tmp_path):
    arguments = [tiny_files, tiny_bundle.path, tmp_path]
    done = subprocess.run(
        [sys.executable, killing.__file__, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    sys.stdout.write(done.stdout)
    assert all(result["operations"] > 60 for result in json.loads(done.stdout).values())


@pytest.mark.slow
def test_the_command_killed_at_random_moments(tiny_bundle, tiny_files, tmp_path):
    """Killed builds of new folders, and of one folder that is to become another bundle each time."""
    rng = random.Random(20)
    start = time.monotonic()
    wanted = finish(tiny_files, tmp_path / "undisturbed")
    whole = time.monotonic() - start
    assert wanted == tiny.contents(tiny_bundle.path)  # another process, the same bytes
    kills, found, turn = 0, 0, -1
    while kills < 24:
        turn += 1
        assert turn < 100
        folder = tmp_path / ("again" if turn % 2 else "fresh")
        options = ["--threshold", "0.5"] if turn % 4 == 1 else []
        line = [*command_line(tiny_files, folder), *options]
        with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as build:
            wait = rng.uniform(0, whole)
            if turn % 3 == 2:  # a third of them when the graphs are cut, which is fast
                wait = rng.uniform(0, 1)
                next((line for line in build.stderr if "export done" in line), None)
            try:
                build.wait(wait)
            except subprocess.TimeoutExpired:
                build.kill()
                kills += 1
        if (folder / MANIFEST).exists():
            read_bundle(folder).check_files()
            found += 1
        if turn % 2 == 0:
            assert finish(tiny_files, folder) == wanted
            shutil.rmtree(folder)
    assert finish(tiny_files, tmp_path / "again") == wanted
    sys.stdout.write(f"{turn + 1} builds, {kills} killed, {found} folders with a manifest\n")


def finish(files: Path, folder: Path) -> dict[str, bytes]:
    """Run the command to its end; return what lies in the folder."""
    subprocess.run(command_line(files, folder), check=True, capture_output=True)
    return tiny.contents(folder)


def test_graphs_beside_the_plans_own_are_cut_too(copy, tiny_plan, tiny_bundle):
    more = StepGraph(("00.attn",), ("01.mlp",))
    made = build_bundle(copy, tiny.request(tiny_plan, more_graphs=(more,))).manifest
    assert set(made.graphs) - set(tiny_bundle.manifest.graphs) == {more.name}
    assert {value.name for value in made.graphs[more.name].inputs} >= {"x", "00.attn"}
    assert [value.name for value in made.graphs[more.name].outputs] == ["output", "01.mlp"]
    assert made.calls == tiny_bundle.manifest.calls
    build_bundle(copy, tiny.request(tiny_plan))
    assert tiny.contents(copy) == tiny.contents(tiny_bundle.path)
