"""The benchmark: that it runs, and that its numbers fit each other."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from l2c_export.cli import cli
from l2c_export.core.bundle import WEIGHTS
from l2c_export.errors import L2CError, UnsupportedError
from l2c_export.evidence import bench as module
from l2c_export.evidence.bench import bench, spread
from l2c_export.evidence.bench_report import bench_table
from l2c_export.evidence.child import Child
from l2c_export.evidence.program_costs import cache_bytes, program_costs


@pytest.fixture(scope="module")
def data(tiny_bundle):
    return bench(tiny_bundle.path, repeats=2, threads=1, peer="torch")


def ordered(values):
    return 0 < values["p10"] <= values["median"] <= values["p90"]


def test_the_ceiling_is_the_plans(tiny_bundle, tiny_plan):
    costs = program_costs(tiny_bundle.manifest)
    assert costs.calls == tiny_plan.costs.call_macs
    assert costs.full == tiny_plan.costs.full_macs
    assert costs.conditioning == tiny_plan.costs.conditioning_macs
    assert costs.ideal == tiny_plan.costs.speedup
    assert cache_bytes(tiny_bundle.manifest, 2) == 2 * tiny_plan.costs.buffer_bytes


def test_every_number_has_a_spread(data):
    speed = data["speed"]
    spreads = [speed["measured"], speed["cached_seconds"], speed["uncached_seconds"]]
    rows = [*data["calls"], *data["graphs"]]
    spreads += [row[key] for row in rows for key in ("ms", "measured_share")]
    spreads += [data["peer"]["seconds"], data["peer"]["ratio"], data["all_reuse"]["share"]]
    assert all(map(ordered, spreads))
    assert speed["of_ideal"] == speed["measured"]["median"] / speed["ideal"]


def test_every_call_is_in_one_graphs_row(data, tiny_bundle):
    calls = sorted(i for g in data["graphs"] for i in g["calls"])
    assert calls == list(range(len(tiny_bundle.manifest.calls)))
    assert max(g["ideal_share"] for g in data["graphs"]) == 1
    shares = {g["graph"]: g["ideal_share"] for g in data["graphs"]}
    assert [(c["call"], c["timestep"], c["graph"]) for c in data["calls"]] == [
        (i, call.timestep, call.graph) for i, call in enumerate(tiny_bundle.manifest.calls)
    ]
    assert [c["ideal_share"] for c in data["calls"]] == [shares[c["graph"]] for c in data["calls"]]
    assert data["all_reuse"]["calls"] == [5]


def test_the_peer_says_what_it_is(data):
    assert data["peer"]["name"].startswith("PyTorch")
    assert data["peer"]["name"].endswith("1 thread")


def test_memory_is_beside_its_floor(data, tiny_bundle):
    memory = data["memory"]
    assert memory["weight_bytes"] == tiny_bundle.manifest.files[WEIGHTS].bytes
    assert memory["floor_bytes"] == memory["weight_bytes"] + memory["cache_bytes"]
    assert memory["bundle_bytes"] > memory["weight_bytes"]
    assert memory["load_seconds"] > 0
    if sys.platform == "linux":
        assert memory["floor_bytes"] < memory["pss_bytes"]
        assert memory["cache_bytes"] < memory["anonymous_bytes"] < memory["pss_bytes"]


def test_memory_that_cannot_be_measured_is_said(tiny_bundle, monkeypatch):
    monkeypatch.setattr(module, "proportional_set_size", lambda: None)
    data = bench(tiny_bundle.path, repeats=1, threads=1)
    assert "only Linux" in data["memory"]["skipped"]
    assert "of_weights" not in data["memory"]
    assert "not measured" in bench_table(data)


def test_the_table_fits_a_terminal_and_ends_with_json(data):
    *lines, last = bench_table(data).splitlines()
    assert max(map(len, lines)) <= 100
    assert json.loads(last)["speed"] == data["speed"]
    assert "calls" not in json.loads(last)


def test_the_table_has_a_line_a_call_and_one_a_shared_graph(data):
    first, *others = [g | {"calls": g["calls"][:1]} for g in data["graphs"]]
    for calls in ([0], [0, 2]):
        table = bench_table(data | {"graphs": [first | {"calls": calls}, *others]})
        head, rest = table.split("\ncall      t  graph")[1].split("the time of call 0")
        assert [int(line.split()[0]) for line in head.splitlines()[1:]] == list(range(6))
        shared = [line.split()[0] for line in rest.splitlines() if line.startswith(("graph ", "step-"))]
        assert shared == (["graph", first["graph"]] if len(calls) > 1 else [])


def test_a_spread_is_median_and_percentiles():
    assert spread([3.0]) == {"median": 3.0, "p10": 3.0, "p90": 3.0}
    assert spread(range(11)) == {"median": 5.0, "p10": 1.0, "p90": 9.0}


def test_the_command_writes_its_report(tiny_bundle, tmp_path):
    result = CliRunner().invoke(
        cli,
        [
            *("bench", str(tiny_bundle.path), "--repeats", "1", "--threads", "1", "--no-memory"),
            *("--batch", "2", "--report", str(tmp_path / "bench.json")),
        ],
    )
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["batch"] == 2
    assert data["peer"] is None
    assert json.loads(result.stdout.splitlines()[-1])["speed"] == data["speed"]


def test_the_command_prints_one_line_of_json(tiny_bundle, tmp_path):
    arguments = ["--repeats", "1", "--threads", "1", "--no-memory", "--json"]
    arguments += ["--report", str(tmp_path / "bench.json")]
    result = CliRunner().invoke(cli, ["bench", str(tiny_bundle.path), *arguments])
    [line] = result.stdout.splitlines()
    assert json.loads(line) == json.loads((tmp_path / "bench.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--batch", "9"], 1, "9 images in one batch"),
        (["--repeats", "0"], 2, "--repeats"),
        (["--peer", "other"], 2, "--peer"),
        (["--backend", "other"], 2, "--backend"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(tiny_bundle, arguments, code, message):
    result = CliRunner().invoke(cli, ["bench", str(tiny_bundle.path), *arguments])
    assert result.exit_code == code, result.output
    assert message in result.output


def test_a_peer_that_is_not_installed_is_said(tiny_bundle, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="pip install"):
        bench(tiny_bundle.path, peer="torch")


def test_a_child_that_fails_says_why(tmp_path):
    arguments = {"bundle": str(tmp_path), "batch": 1, "threads": 1}
    with Child("torch", arguments) as child, pytest.raises(L2CError, match="is not a bundle"):
        child.answer()


def test_a_child_that_is_gone_says_why(tiny_bundle):
    arguments = {"bundle": str(tiny_bundle.path), "batch": 1, "threads": 1}
    with Child("torch", arguments) as child:
        child.answer()
        child._process.kill()
        child._process.wait()
        with pytest.raises(L2CError, match="the torch process failed: it said nothing"):
            child.ask()


def test_a_child_may_say_more_than_a_pipe_holds(monkeypatch, tmp_path):
    talk = tmp_path / "talk.py"
    talk.write_text("import sys; sys.stderr.write('x\\n' * 2**17 + 'at last'); sys.exit(1)")
    real = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **options: real([sys.executable, str(talk)], **options)
    )
    with Child("torch", {}) as child, pytest.raises(L2CError, match="failed: at last"):
        child.answer()
