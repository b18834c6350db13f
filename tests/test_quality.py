"""The quality table of ``examples/``: its parts on the smallest task, and its arithmetic."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from l2c_export.build.checkpoint import open_checkpoint, random_checkpoint
from l2c_export.build.router_file import read_router, write_router
from l2c_export.core.models import read_model_config
from l2c_export.core.schedule import Router
from l2c_export.evidence.frechet import Gaussian
from l2c_export.train.recipe import Recipe

pytest.importorskip("PIL")
import judge as judging
import quality
from quality_report import Row, against_fewer_steps, against_table, draw, read_rows, table
from train_demo import DIT

CONFIG = replace(DIT, depth=2, hidden_size=16, num_heads=2, patch_size=12)


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    images = torch.rand(300, 1, 24, 24) * 2 - 1
    classifier = judging.Classifier().eval()
    return judging.Judge(classifier, Gaussian.of(judging.evaluate(classifier, images)[1].numpy()))


# The parts together -----------------------------------------------------------------------------


@pytest.fixture
def family(tmp_path):
    """A model of random weights; its router reuses 00.attn and 01.mlp in call 1, all in call 3."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps(CONFIG.to_json()))
    weights = random_checkpoint(CONFIG, 0)
    save_file(dict(weights.iter_tensors()), folder / "model.safetensors")
    logits = np.ones((4, 4), np.float32)
    logits[1, [0, 3]] = logits[3] = -1
    router = Router(logits, np.arange(4) % 2 == 1, "ddim")
    file = folder / "router.safetensors"
    write_router(file, router, family="dit", slots=CONFIG.slots, training={"made": "up"})
    learned = quality.Learned(file, Recipe(steps=4), (0.5,), (0.5,))
    return quality.Family(
        "dit", folder, "ddim", "tiny", (learned,), calls=4, fewer=(2,), intervals=(2,)
    )


def test_a_table_is_measured_kept_and_drawn(family, judge, tmp_path, monkeypatch):
    options = argparse.Namespace(
        seeds=2,
        samples=20,
        batch=10,
        scale=1.0,
        precision="float32",
        repeats=1,
        work=tmp_path / "work",
        against=None,
    )
    rows = quality.measure(family, options, judge)
    assert [row.method for row in rows] == ["uncached", "uncached", "L2C", "random", "FORA"]
    assert [row.removed for row in rows] == [0, 0, 6, 6, 4]
    reference, fewer, learned, random, fixed = rows
    assert reference.drift == (0, 0)
    assert min(fewer.drift + learned.drift + random.drift + fixed.drift) > 1e-7
    assert fewer.macs < learned.macs == random.macs < fixed.macs < reference.macs == 1
    assert all(len(row.distance) == 2 and min(row.distance) > 0 for row in rows)

    monkeypatch.setattr("cells.Runner.sample", None)  # all is on disk now
    cells = quality.make_cells(family, quality.make_task(family, options))
    again = [cell.verdicts(judge, cells[0]) for cell in cells]
    assert [tuple(v["distance"] for v in verdicts) for verdicts in again] == [r.distance for r in rows]

    draw(rows, tmp_path / "quality.png", {"dit": family.title})
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert table(rows).count("\n") == 6


def test_routers_are_trained_where_the_table_reads_them(family, tmp_path):
    images = tmp_path / "data.npz"
    np.savez(images, images=np.zeros((8, 1, 24, 24), np.float32), labels=np.arange(8))
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    recipe = Recipe(steps=4, iterations=2, batch=4)
    learned = quality.Learned(files[0], recipe, (0.5,), again=files[1])
    for _ in range(2):  # the second finds its checkpoints
        quality.train_routers(family, learned, images, tmp_path / "work")
    assert [read_router(file, "dit").source["training"]["seed"] for file in files] == [0, 1]
    lines = list(quality.overlaps(replace(family, routers=(learned,))))
    assert len(lines) == 1
    assert "of 8 decisions agree" in lines[0]


def test_weights_are_shipped_in_half_and_read_in_full(family, tmp_path):
    quality.ship(family.folder, tmp_path / "shipped")
    sizes = [(at / quality.WEIGHTS).stat().st_size for at in (tmp_path / "shipped", family.folder)]
    assert sizes[0] < 0.6 * sizes[1]
    weights = open_checkpoint(tmp_path / "shipped" / quality.WEIGHTS, CONFIG)
    theirs = dict(random_checkpoint(CONFIG, 0).iter_tensors())
    for name, tensor in weights.iter_tensors():
        torch.testing.assert_close(tensor, theirs[name].half().float(), rtol=0, atol=0)


def test_random_masks_differ_between_seeds(family, tmp_path):
    options = argparse.Namespace(
        seeds=2, samples=20, batch=10, scale=1.0, precision="float32", work=tmp_path
    )
    cells = quality.make_cells(family, quality.make_task(family, options))
    random = next(cell for cell in cells if cell.method == "random")
    assert (random.schedules[0].reuse != random.schedules[1].reuse).any()


# What is shipped --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(quality.FAMILIES))
def test_the_tables_models_and_routers_fit_each_other(name, tmp_path):
    family = quality.FAMILIES[name]
    options = argparse.Namespace(
        seeds=3, samples=2000, batch=20, scale=2.0, precision="float32", work=tmp_path
    )
    cells = quality.make_cells(family, quality.make_task(family, options))
    assert {cell.method for cell in cells} == {"uncached", "L2C", "random", "FORA"}
    assert all(cell.macs < cells[0].macs for cell in cells[1:])
    config = read_model_config(family.folder / "model.json")
    weights = open_checkpoint(family.folder / quality.WEIGHTS, config).source["sha256"]
    for learned in family.routers:
        training = read_router(learned.file, name).source["training"]
        assert training["weights_sha256"] == weights
        for key in ("steps", "iterations", "batch", "lr", "l1", "seed"):
            assert training[key] == getattr(learned.recipe, key)


# The judge --------------------------------------------------------------------------------------


def test_the_shipped_judge_knows_real_digits_from_noise():
    judge = judging.Judge.load(quality.ASSETS)
    noise = np.random.default_rng(0).standard_normal((200, 1, 24, 24), dtype=np.float32)
    verdict = judge(noise, np.arange(200) % 10)
    assert verdict.distance > 20
    assert verdict.accuracy < 0.4


def test_a_judge_is_saved_and_loaded(judge, tmp_path):
    judge.save(tmp_path)
    assert judging.Judge.load(tmp_path).key == judge.key


def test_a_classifier_learns_on_nine_tenths_and_is_asked_about_the_rest(capsys):
    torch.manual_seed(0)
    labels = torch.arange(200) % 2
    images = torch.where(labels[:, None, None, None] > 0, 1.0, -1.0) + 0.1 * torch.randn(200, 1, 24, 24)
    _, accuracy = judging.train_classifier(images, labels, epochs=2, batch=20)
    assert accuracy == 1
    assert "epoch  2/2" in capsys.readouterr().out


def test_distortion_keeps_where_the_digit_is():
    image = torch.full((50, 1, 24, 24), -1.0)
    image[:, :, 8:16, 8:16] = 1
    moved = judging.distort(image, torch.Generator().manual_seed(0))
    assert (moved[:, 0, 11:13, 11:13] > 0.9).all()
    torch.testing.assert_close(moved[:, 0, :3], image[:, 0, :3])
    assert (moved != image).any()


# The arithmetic ---------------------------------------------------------------------------------


def row(method, macs, *distance, family="dit"):
    n = len(distance)
    return Row(family, method, "", 0, macs, (macs,), distance, (1.0,) * n, (0.0,) * n)


def test_the_gap_at_equal_cost_is_taken_seed_by_seed():
    rows = [row("uncached", 1.0, 1.0, 2.0), row("uncached", 0.5, 4.0, 8.0), row("uncached", 0.4, 9, 9)]
    other = row("uncached", 0.75, 100.0, 100.0, family="uvit")
    learned = row("L2C", 0.75, 1.0, 4.0)
    # halfway, on a log scale: 2 and 4
    gaps = np.array([1.0 - 2.0, 4.0 - 4.0])
    for cost in ("macs", "seconds"):
        mean, deviation = against_fewer_steps(learned, [*rows, other, learned], cost)
        assert mean == pytest.approx(gaps.mean())
        assert deviation == pytest.approx(gaps.std(ddof=1))


def test_another_precision_is_compared_seed_by_seed(tmp_path):
    (tmp_path / "results.json").write_text(
        json.dumps([row("uncached", 1.0, 1.0, 2.0).to_json(), row("L2C", 0.7, 3.0, 3.0).to_json()])
    )
    base = read_rows(tmp_path / "results.json")
    assert base["dit L2C "] == row("L2C", 0.7, 3.0, 3.0)
    rows = [row("uncached", 1.0, 1.1, 2.3), row("L2C", 0.7, 3.0, 3.1)]
    _, _, *lines = against_table(rows, base, "int8").splitlines()
    assert "| 1.500 ± 0.707 | 1.700 ± 0.849 | +0.200 ± 0.141 | yes |" in lines[0]
    assert "| 3.000 ± 0.000 | 3.050 ± 0.071 | +0.050 ± 0.071 | no |" in lines[1]


def test_the_command_compares_a_precision_and_measures_no_time(
    family, judge, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(quality, "FAMILIES", {"dit": family})
    monkeypatch.setattr(quality.judge.Judge, "load", lambda folder: judge)
    monkeypatch.setattr(quality, "draw", lambda *_: None)
    options = ["--samples", "20", "--seeds", "2", "--batch", "10", "--scale", "1", "--repeats", "1"]
    options += ["--work", str(tmp_path / "work")]
    results = tmp_path / "work" / "results.json"
    for more in ([], ["--precision", "int8", "--against", str(results)]):
        monkeypatch.setattr("sys.argv", ["quality.py", *options, *more])
        quality.main()
    printed = capsys.readouterr().out
    ours, theirs = read_rows(tmp_path / "work" / "results-int8.json"), read_rows(results)
    assert [row.method for row in ours.values()] == ["uncached", "uncached", "L2C"]
    for name, mine in ours.items():
        assert mine.seconds == () != theirs[name].seconds
        assert 0 < abs(np.subtract(mine.distance, theirs[name].distance)).max() < 1
    assert "| model | method | Fréchet distance, float32 | int8 |" in printed

    monkeypatch.setattr("sys.argv", ["quality.py", *options, "--precision", "int8"])
    with pytest.raises(SystemExit):
        quality.main()
    assert "give it --against results.json" in capsys.readouterr().err


def test_no_gap_is_told_outside_the_curve():
    assert (
        against_fewer_steps(row("FORA", 0.3, 1.0), [row("uncached", 1, 1.0), row("uncached", 0.5, 2.0)])
        is None
    )
    assert against_fewer_steps(row("FORA", 0.3, 1.0), []) is None
