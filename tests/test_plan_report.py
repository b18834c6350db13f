"""What a plan says: table, JSON, picture and the command."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from l2c_export.build.plan_picture import draw_plan
from l2c_export.cli import cli
from l2c_export.core.models import DiTConfig
from l2c_export.core.plan import make_plan
from l2c_export.core.plan_report import plan_json, plan_table
from l2c_export.core.samplers import sampler_table
from l2c_export.core.schedule import Schedule

ROUTERS = Path(__file__).parents[2] / "shared" / "routers"
CONFIG = DiTConfig(2, 32, 2, 2, 8, num_classes=10)
REUSE = np.array([[0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1]], bool)


def plan(reuse=REUSE, config=CONFIG, **options):
    schedule = Schedule(config.slots, reuse, {"kind": "drawn", "routed_calls": 2})
    return make_plan(config, schedule, sampler_table("ddim", len(reuse)), **options)


def run(*arguments):
    return CliRunner().invoke(cli, ["plan", *map(str, arguments)], catch_exceptions=True)


def test_the_table_draws_every_sub_layer():
    text = plan_table(plan())
    rows = [line.split()[-2:] for line in text.splitlines() if re.match(r" +\d ", line)]
    assert rows == [["Wc", "cW"], [".c", "c."], ["Wc", "WW"], [".c", ".."]]
    assert "5/8 of the routed calls' sub-layers (62.50 %), 31.25 % of all" in text


def test_the_table_says_the_sampler_and_what_it_keeps():
    def line(name):
        schedule = Schedule(CONFIG.slots, REUSE)
        table = sampler_table(name, len(REUSE))
        return plan_table(make_plan(CONFIG, schedule, table, sampler=name)).splitlines()[2]

    assert line("ddim") == "sampler   ddim"
    assert line("dpm-solver-2m") == "sampler   dpm-solver-2m, keeps 1 latent between calls"
    assert line("dpm-solver-3s") == "sampler   dpm-solver-3s, keeps 2 latents between calls"
    assert line("ddpm") == "sampler   ddpm, draws noise in its calls"


@pytest.mark.parametrize("name", ["dpm-solver-2s", "dpm-solver-3s"])
def test_times_between_those_of_training_fit_their_column(name):
    reuse = np.zeros((20, 4), bool)
    made = make_plan(CONFIG, Schedule(CONFIG.slots, reuse), sampler_table(name, 20))
    lines = plan_table(made).splitlines()
    heads = next(i for i, line in enumerate(lines) if line.startswith("call"))
    assert len({line.index(" % ") for line in lines[heads + 1 : heads + 21]}) == 1


def test_the_table_shows_what_a_budget_computes_more():
    text = plan_table(plan(max_graphs=2))
    assert "+ computed to share a graph" in text
    assert re.search(r"merged +4 graphs to 2; more sub-layers computed: [1-5],", text)


@pytest.mark.parametrize(("depth", "calls"), [(28, 50), (40, 20), (1, 2)])
def test_the_table_fits_a_terminal(depth, calls):
    config = DiTConfig(depth, 32, 2, 2, 8)
    reuse = np.random.default_rng(0).random((calls, 2 * depth)) < 0.5
    reuse[::2] = False
    text = plan_table(plan(reuse, config), batch=8)
    assert max(map(len, text.splitlines())) <= 100


def test_the_json_adds_up():
    data = json.loads(json.dumps(plan_json(plan(), batch=3)))
    slots = data["schedule"]["slots"]
    assert [c["computed"] + len(c["reads"]) for c in data["calls"]] == [slots] * 4
    assert data["schedule"]["removed"] == sum(len(c["reads"]) for c in data["calls"]) == 5
    assert sum(len(g["calls"]) for g in data["graphs"]) == 4
    totals = data["totals"]
    conditioning = 3 * data["conditioning"]["macs"]
    assert sum(c["macs"] for c in data["calls"]) + conditioning == totals["macs"]
    assert 4 * totals["full_call_macs"] + conditioning == totals["uncached_macs"]
    assert totals["ideal_speedup"] == totals["uncached_macs"] / totals["macs"]
    assert totals["weight_bytes"] <= totals["separate_weight_bytes"]
    assert totals["cache_bytes"] <= totals["one_buffer_per_slot_bytes"]


def test_merging_for_free_is_reported_as_more_writes_only():
    reuse = np.zeros((20, 8), bool)
    reuse[1], reuse[3, :7], reuse[5, :6] = True, True, True
    merge = plan_json(plan(reuse, DiTConfig(4, 256, 4, 2, 8)))["merge"]
    assert merge["computed_more"] == merge["macs_more"] == 0


def test_a_picture_is_the_same_bytes_every_time(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a.png", "b.png"):
        draw_plan(plan(), tmp_path / name)
    first = (tmp_path / "a.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert first == (tmp_path / "b.png").read_bytes()
    assert b"Software" not in first


def test_a_picture_shows_the_states_in_their_colours(tmp_path):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    draw_plan(plan(max_graphs=2), tmp_path / "plan.png")
    with image.open(tmp_path / "plan.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert {(0x9D, 0xB8, 0xCC), (0x1F, 0x5A, 0x85), (0xF6, 0xDF, 0xAE), (0xC2, 0x47, 0x7F)} <= colours


def test_the_command_plans_a_model_file_and_a_router(tiny_files):
    result = run(
        "--model-config", tiny_files / "model.json", "--router", tiny_files / "router.safetensors"
    )
    assert result.exit_code == 0, result.output
    assert "6 calls" in result.output


def test_the_steps_are_the_routers_own(tiny_files):
    result = run(
        *("--model-config", tiny_files / "model.json"),
        *("--router", tiny_files / "router.safetensors"),
        "--json",
    )
    assert json.loads(result.stdout)["schedule"]["calls"] == 6


def test_the_command_draws_a_picture(tiny_files, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    result = run("--model-config", tiny_files / "model.json", "--uncached", "--picture", picture)
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give one of --model NAME and --model-config FILE"),
        (["--model", "dit-s-2", "--model-config", "x.json"], 2, "give one of"),
        (["--model", "dit-zz-2"], 2, "'dit-zz-2' is not one of"),
        (["--model", "dit-s-2", "--uncached", "--router", "r"], 2, "--uncached computes everything"),
        (["--model", "dit-s-2", "--uncached", "--batch", "4-2"], 2, "is not N or LO-HI"),
        (["--model", "dit-s-2", "--uncached", "--batch", "0"], 2, "is not N or LO-HI"),
        (["--model", "dit-s-2", "--uncached", "--steps", "0"], 2, "--steps"),
        (["--model", "dit-s-2", "--uncached", "--steps", "1001"], 1, "between 1 and 1000"),
        (["--model", "dit-s-2", "--uncached", "--sampler", "no"], 1, "unknown sampler 'no'"),
        (
            ["--model", "dit-s-2", "--uncached", "--sampler", "dpm-solver-2s", "--steps", "19"],
            1,
            "19 steps: dpm-solver-2s makes two calls a solver step; use 18 or 20",
        ),
        (
            ["--model", "dit-s-2", "--uncached", "--sampler", "euler"],
            1,
            "'euler' is for models that predict velocity, this one predicts noise; use --sampler ddim",
        ),
        (["--model-config", "missing.json", "--uncached"], 1, "cannot read model configuration"),
        (["--model-config", "{model}"], 1, "no released router for this model"),
        (["--model-config", "{model}", "--router", "missing.pt"], 1, "missing.pt"),
        (["--model-config", "{model}", "--router", "{router}", "--steps", "8"], 1, "use --steps 6"),
        (["--model-config", "{model}", "--router", "{router}", "--threshold", "2"], 1, "outside 0"),
        (["--model", "dit-s-2", "--router", "{router}"], 1, "not for each other"),
        (["--model", "dit-s-2"], 1, "no released router for dit-s-2"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(tiny_files, arguments, code, message):
    files = {"model": tiny_files / "model.json", "router": tiny_files / "router.safetensors"}
    result = run(*(argument.format(**files) for argument in arguments))
    assert result.exit_code == code, result.output
    assert message in result.output
    assert sum(line.startswith("Error") for line in result.output.splitlines()) == 1


def test_planning_needs_no_torch(tiny_files):
    code = (
        "import sys; from l2c_export.cli import cli; "
        f"cli(['plan', '--model-config', {str(tiny_files / 'model.json')!r}, "
        f"'--router', {str(tiny_files / 'router.safetensors')!r}], standalone_mode=False); "
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "onnx", "onnx_ir", "onnxruntime", "matplotlib"}
    assert not heavy & set(out.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("calls", "removed", "routed", "share"), [(20, 248, 560, "44.29"), (50, 664, 1400, "47.43")]
)
def test_the_released_routers_remove_what_the_paper_says(calls, removed, routed, share):
    router = ROUTERS / f"DDIM{calls}_router.pt"
    if not router.exists():
        pytest.skip("the released routers are not part of the project")
    result = run("--model", "dit-xl-2", "--router", router)
    assert result.exit_code == 0, result.output
    assert f"{removed}/{routed} of the routed calls' sub-layers ({share} %)" in result.output
