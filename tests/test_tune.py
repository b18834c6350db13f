"""Tuning: the thresholds, what is measured and kept, the choice, and the command."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import killing
import numpy as np
import pytest
import tiny
import torch

from l2c_export.build.build_options import build_arguments
from l2c_export.build.router_file import read_router, write_router
from l2c_export.build.schedule_options import ScheduleOptions
from l2c_export.core.bundle import read_bundle
from l2c_export.core.models import UViTConfig
from l2c_export.core.schedule import Router, routed_scores, threshold_router
from l2c_export.errors import L2CError
from l2c_export.evidence import tune_costs, tune_measure
from l2c_export.evidence.demo import ASSETS
from l2c_export.evidence.reference import bundle_reference
from l2c_export.evidence.tune import PICTURE, REPORT, TuneOptions, tune
from l2c_export.evidence.tune_choice import Budget, check_budget, choose, on_front
from l2c_export.evidence.tune_measure import Arena, Record, drifts
from l2c_export.evidence.tune_report import tune_table
from l2c_export.evidence.tune_schedules import make_contest, own_thresholds, shortest_decimal

THRESHOLDS = (0.1, 0.3, 0.95)  # two of which give different programs, and 0.1 no MLP of block 1


@pytest.fixture
def exported(tiny_bundle, monkeypatch) -> None:
    """Builds take the exported graph of the tiny bundle instead of exporting."""
    killing.substitute(tiny_bundle.path / "full.onnx", monkeypatch.setattr)


@pytest.fixture
def options(tiny_files) -> TuneOptions:
    """Two latents a call, as the tiny bundle has them."""
    return TuneOptions(
        ScheduleOptions(model_config=tiny_files / "model.json", batch=(1, 2)),
        (tiny_files / "router.safetensors",),
        random_weights=tiny.SEED,
        samples=4,
        repeats=2,
        threads=1,
    )


@pytest.fixture
def trajectories(monkeypatch) -> list[tuple[str, int]]:
    """Program key ("" is uncached) and round of each trajectory that is run."""
    ran: list[tuple[str, int]] = []
    real = Arena._trajectory

    def counted(self, key, plan, number):
        ran.append((key, number))
        return real(self, key, plan, number)

    monkeypatch.setattr(Arena, "_trajectory", counted)
    return ran


def router_of(scores, calls=None, **fields) -> Router:
    scores = np.array(scores, np.float64)
    logits = np.log(scores / (1 - scores)).astype(np.float32)
    routed = np.arange(len(scores)) % 2 == 1
    return Router(logits, routed, "ddim", {"file": "r"}, **fields)


# -- thresholds ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "number"),
    [(0.05, 0.15, 0.1), (0.1421, 0.1437, 0.143), (0.2, 0.3, 0.2), (0.993, np.inf, 1.0), (0, 1e-9, 0.0)],
)
def test_the_shortest_decimal_lies_between_the_scores(low, high, number):
    assert shortest_decimal(low, high) == number


def test_neighbouring_floats_still_have_a_threshold_between_them():
    low = 0.123456789
    assert shortest_decimal(low, np.nextafter(low, 1)) == low


@pytest.mark.parametrize("points", [1, 2, 5, 12, 1000])
def test_a_routers_own_thresholds_remove_evenly_more_up_to_everything(points):
    rng = np.random.default_rng(0)
    router = router_of(rng.uniform(0.001, 0.999, (10, 40)))
    thresholds = own_thresholds(router, points)
    scores = routed_scores(router)
    removed = [int((scores <= t).sum()) for t in thresholds]
    assert len(thresholds) == min(points, scores.size)
    assert thresholds == sorted(set(thresholds))
    assert removed[-1] == scores.size
    even = np.arange(1, len(removed) + 1) * scores.size / len(removed)
    assert np.abs(np.array(removed) - even).max() <= 0.5
    assert max(len(str(t)) for t in thresholds[:12]) <= 9


def test_a_router_with_few_scores_has_few_thresholds():
    assert own_thresholds(router_of(tiny.SCORES), 50) == [0.1, 0.2, 1.0]
    assert own_thresholds(router_of([[0.5, 0.5]]), 5) == []


def test_thresholds_that_give_one_program_are_one(options):
    contest = make_contest(options.schedule, options.routers, (0.3, 0.16, 0.1, 0.95, 0.3), 12)
    assert [(c.threshold, c.same) for c in contest.contenders] == [
        (0.1, ()),
        (0.16, (0.3,)),
        (0.95, ()),
    ]
    assert contest.uncached.schedule.removed == 0
    assert [c.plan.asked.removed for c in contest.contenders] == [8, 9, 12]


def test_two_routers_of_one_name_are_told_apart(options, tiny_files, tmp_path):
    shutil.copy(tiny_files / "router.safetensors", tmp_path)
    routers = (*options.routers, tmp_path / "router.safetensors")
    contest = make_contest(options.schedule, routers, THRESHOLDS, 12)
    assert [contest.label(i) for i in range(2)] == ["router.safetensors (1)", "router.safetensors (2)"]
    assert len({c.key for c in contest.contenders}) == len(contest.contenders) // 2


def test_routers_for_different_trajectories_are_refused(options, tmp_path):
    other = tmp_path / "other.safetensors"
    made = router_of([[0.5] * 4] * 4)
    write_router(other, made, family="dit", slots=tiny.CONFIG.slots, training={})
    with pytest.raises(
        L2CError, match=r"router.safetensors for 6 calls of ddim, other.safetensors for 4"
    ):
        make_contest(options.schedule, (*options.routers, other), None, 12)


# -- the cost model -----------------------------------------------------------------------------


def test_costs_are_spread_over_sub_layers_by_kind(options, tiny_plan, monkeypatch):
    contest = make_contest(options.schedule, options.routers, THRESHOLDS, 12)
    config = contest.uncached.config
    names = {kind: graph.name for kind, graph in tune_costs.probes(config).items()}
    assert list(names) == ["", "attn", "mlp"]
    uncached = "step-uncached"
    times = {names[""]: 1.0, names["attn"]: 3.0, names["mlp"]: 2.0, uncached: 7.0, "conditioning": 0.5}

    class Runner:
        class manifest:  # noqa: N801
            calls = contest.uncached.calls
            guidance = object()

    Runner.manifest.uncached = uncached
    monkeypatch.setattr(tune_costs, "_runnable", lambda *_: lambda: None)
    monkeypatch.setattr(tune_costs, "_interleaved", lambda runs: {name: times[name] for name in runs})
    costs = tune_costs.measure_costs(Runner, config, 1)
    # 6 s of a full call are above nothing; attention took 2 parts of 3, and there are 2 of each
    assert costs.base == 1.0
    assert costs.seconds(contest.uncached) == pytest.approx(0.5 + 6 * 7.0)
    removed = dict.fromkeys(("attn", "mlp"), 0)
    plan = contest.contenders[0].plan
    for call in plan.calls:
        for slot in call.reads:
            removed[tune_costs.kind_of(slot)] += 1
    assert sum(removed.values()) == 8
    assert costs.seconds(plan) == pytest.approx(42.5 - removed["attn"] * 2.0 - removed["mlp"] * 1.0)


def test_calls_too_short_to_tell_apart_go_by_multiply_accumulates(options, monkeypatch):
    contest = make_contest(options.schedule, options.routers, THRESHOLDS, 12)
    config = contest.uncached.config

    class Runner:
        class manifest:  # noqa: N801
            calls = contest.uncached.calls
            guidance = None
            uncached = "u"

    monkeypatch.setattr(tune_costs, "_runnable", lambda *_: lambda: None)
    monkeypatch.setattr(
        tune_costs, "_interleaved", lambda runs: {name: 2.0 if name == "u" else 1.0 for name in runs}
    )
    costs = tune_costs.measure_costs(Runner, config, 1)
    alike = 1.0 / sum(config.slot_macs().values())
    assert costs.per_mac == pytest.approx({"attn": alike, "mlp": alike})


# -- what is measured, and what is kept -----------------------------------------------------------


def test_the_drift_is_that_of_the_eager_reference(exported, options, tmp_path):
    data = tune(replace(options, thresholds=THRESHOLDS, repeats=0), tmp_path)
    reference = bundle_reference(read_bundle(tmp_path / "work/bundle"))
    contest = make_contest(options.schedule, options.routers, THRESHOLDS, 12)
    manifest = read_bundle(tmp_path / "work/bundle").manifest
    for contender, row in zip(contest.contenders, data["rows"], strict=True):
        found = []
        for number in range(2):
            labels = np.random.default_rng([0, number]).integers(10, size=2)
            seed = int(np.random.SeedSequence([0, number]).generate_state(1)[0])
            noise = np.random.default_rng(seed).standard_normal((2, 4, 8, 8), dtype=np.float32)

            def latents(plan, labels=labels, noise=noise):
                *_, last = reference.trajectory(
                    [call.call for call in plan.calls],
                    [tuple(call.reads) for call in plan.calls],
                    torch.from_numpy(labels),
                    torch.from_numpy(noise),
                    manifest.guidance.scale,
                )
                return last.x_next.numpy()

            found += drifts(latents(contender.plan), latents(contest.uncached))[0]
        assert row["drift"]["mean"] == pytest.approx(np.mean(found), rel=1e-3)
        assert row["drift"]["standard_error"] == pytest.approx(np.std(found, ddof=1) / 2, rel=1e-2)
        assert row["drift"]["mean"] > 1e-3
        assert row["measured"] is None
        assert row["time"] == row["predicted"]


def test_a_stochastic_sampler_draws_the_same_noise_for_all(exported, options, tmp_path):
    routed = read_router(options.routers[0], "dit")
    router = tmp_path / "ddpm.safetensors"
    noisy = replace(routed, sampler="ddpm")
    write_router(router, noisy, family="dit", slots=tiny.CONFIG.slots, training={})
    schedule = replace(options.schedule, sampler="ddpm")
    asked = replace(options, schedule=schedule, routers=(router,), thresholds=(0.0, 0.95), repeats=0)
    nothing, much = tune(asked, tmp_path / "out")["rows"]
    assert (nothing["removed"], nothing["drift"]["mean"]) == (0, 0.0)
    assert 1e-4 < much["drift"]["mean"] < 1


def test_u_vit_is_tuned_with_the_sampler_of_its_routers(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = UViTConfig(2, 16, 2, 2, 4, num_classes=5)
    Path("u.json").write_text(json.dumps(config.to_json()))
    scores = np.full((6, len(config.slots)), 0.5)
    scores[2::2] = np.linspace(0.1, 0.9, len(config.slots))
    router = replace(router_of(scores), sampler="dpm-solver-2s", routed=np.arange(6) % 2 == 0)
    router.routed[0] = False
    write_router(Path("r.safetensors"), router, family="uvit", slots=config.slots, training={"l1": 0.1})
    arguments = ["--model-config", "u.json", "--router", "r.safetensors", "--random-weights", 0]
    arguments += ["--batch", "1-2"]
    code, out, err = command(
        *("tune", *arguments, "--points", 3, "--samples", 2, "--repeats", 1, "--drift-budget", 9)
    )
    assert code == 0, err
    assert "6 calls of dpm-solver-2s" in out
    assert "r.safetensors, λ = 0.1" in out
    data = json.loads(Path("u-tune", REPORT).read_text())
    assert [r["removed"] for r in data["rows"]] == [4, 8, 12]
    drift = [r["drift"]["mean"] for r in data["rows"]]
    assert 0 < drift[0] < drift[-1] < 1
    code, out, err = command(*shlex.split(data["next"])[1:], "--dry-run", "--json")
    assert json.loads(out)["schedule"]["removed"] == data["rows"][data["chosen"]]["removed"]


def test_distances_are_taken_latent_by_latent():
    uncached = np.zeros((2, 1, 2, 2), np.float32)
    uncached[0], uncached[1, 0, 0, 0] = 1, 4
    l2, largest = drifts(uncached + np.float32(1), uncached)
    assert l2 == pytest.approx([1.0, 0.5])
    assert largest == pytest.approx([1.0, 0.25])


def test_every_latent_and_every_time_is_measured_once(exported, options, tmp_path, trajectories):
    data = tune(replace(options, thresholds=THRESHOLDS), tmp_path)
    keys = {key for key, _ in trajectories} - {""}
    assert len(keys) == len(data["rows"]) == 3
    # 4 latents are two rounds; the first has no times, so a third is for the second repeat
    assert sorted(trajectories) == sorted((key, n) for key in ("", *keys) for n in range(3))
    kept = tiny.contents(tmp_path / "work/measured")
    trajectories.clear()
    again = tune(replace(options, thresholds=THRESHOLDS), tmp_path)
    assert trajectories == []
    assert tiny.contents(tmp_path / "work/measured") == kept
    assert again["rows"] == data["rows"]
    assert again["uncached"] == data["uncached"]


def test_more_samples_measure_only_what_is_lacking(exported, options, tmp_path, trajectories):
    few = tune(replace(options, thresholds=(0.1,), repeats=0), tmp_path)
    trajectories.clear()
    more = tune(replace(options, thresholds=(0.1, 0.95), repeats=0, samples=5), tmp_path)
    old, new = (row for row in more["rows"])
    keys = [key for key, number in trajectories if number == 0]
    assert len(keys) == 2  # uncached and the new one
    assert [number for key, number in trajectories if key and key not in keys] == [2]
    assert more["samples"] == 6  # whole batches
    assert old["drift"]["mean"] != few["rows"][0]["drift"]["mean"]
    assert new["threshold"] == 0.95


def test_an_interruption_loses_only_the_trajectory_under_way(
    exported, options, tmp_path, trajectories, monkeypatch, command
):
    schedule = options.schedule
    arguments = ["tune", "--model-config", schedule.model_config, "--router", *options.routers]
    arguments += ["--random-weights", tiny.SEED, "--thresholds", "0.1,0.3,0.95", "--batch", "1-2"]
    arguments += ["--samples", "4", "--repeats", "2", "--threads", "1", "-o", tmp_path]
    real = Arena._trajectory

    def interrupted(self, key, plan, number):
        if len(trajectories) == 6:  # uncached, three, uncached, one
            raise KeyboardInterrupt
        return real(self, key, plan, number)

    with monkeypatch.context() as patch:
        patch.setattr(Arena, "_trajectory", interrupted)
        code, out, err = command(*arguments)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted"
    assert not (tmp_path / REPORT).exists()
    before = list(trajectories)
    trajectories.clear()
    code, _, err = command(*arguments)
    assert code == 0, err
    drifting = [(key, n) for key, n in (*before, *trajectories) if key and n < 2]
    assert len(drifting) == len(set(drifting)) == 6
    records = [json.loads(text) for text in tiny.contents(tmp_path / "work/measured").values()]
    assert [len(record["times"]) for record in records if "times" in record] == [2, 2, 2]


def test_a_damaged_record_is_measured_again(exported, options, tmp_path, trajectories):
    data = tune(replace(options, thresholds=(0.1, 0.95), repeats=0), tmp_path)
    trajectories.clear()
    records = [p for p in (tmp_path / "work/measured").iterdir() if not p.name.startswith("costs-")]
    assert len(records) == 2
    records[0].write_text("{")
    again = tune(replace(options, thresholds=(0.1, 0.95), repeats=0), tmp_path)
    assert len(trajectories) == 4
    assert [row["drift"] for row in again["rows"]] == [row["drift"] for row in data["rows"]]


def test_other_conditions_are_measured_anew(exported, options, tmp_path, trajectories):
    quick = replace(options, thresholds=(0.1,), repeats=0)
    for other in (quick, replace(quick, seed=1), replace(quick, guidance_scale=2.0)):
        trajectories.clear()
        tune(other, tmp_path)
        assert len(trajectories) == 4
    trajectories.clear()
    tune(quick, tmp_path)
    assert trajectories == []


def test_sessions_beyond_the_memory_are_made_anew(exported, options, tmp_path, monkeypatch):
    kept = tune(replace(options, thresholds=THRESHOLDS, repeats=0), tmp_path / "kept")
    monkeypatch.setattr(tune_measure, "_KEPT_BYTES", 0)
    anew = tune(replace(options, thresholds=THRESHOLDS, repeats=0), tmp_path / "anew")
    assert [row["drift"] for row in kept["rows"]] == [row["drift"] for row in anew["rows"]]


def test_latents_that_are_not_finite_are_an_error(exported, options, tmp_path, monkeypatch):
    real = Arena._session

    class Broken:
        x = np.full((2, 4, 8, 8), np.nan, np.float32)

        def start(self, *_, **__):
            pass

        def __iter__(self):
            return iter(())

    monkeypatch.setattr(Arena, "_session", lambda *a: real(*a) if a[2] is None else Broken())
    with pytest.raises(L2CError, match="a cached trajectory ends in NaN or infinity"):
        tune(replace(options, thresholds=(0.1,)), tmp_path)


def test_what_a_record_lacks():
    effort = tune_measure.Effort(samples=5, repeats=1, batch=2, seed=0, threads=1)
    assert (effort.rounds, effort.all_rounds) == (3, 3)
    record = Record({"0": [0.1]}, {"0": [0.1]}, [])
    assert [record.lacks(n, effort) for n in range(4)] == [False, True, True, True]
    record.times.append([1.0, 2.0])
    assert not record.lacks(3, effort)


# -- the choice ---------------------------------------------------------------------------------


def row(share: float, drift: float, ms: float | None = None, threshold: float = 0.5):
    time = {"share": share, "ms": 100 * share if ms is None else ms}
    return {"time": time, "drift": {"mean": drift}, "threshold": threshold, "name": "r.pt"}


ROWS = [row(0.9, 0.1), row(0.8, 0.2), row(0.85, 0.3), row(0.6, 0.4), row(0.6, 0.4)]


def test_the_front_is_what_nothing_else_beats():
    assert [on_front(each, ROWS) for each in ROWS] == [True, True, False, True, True]


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [
        (None, None),
        (Budget("share", 0.95), 0),
        (Budget("share", 0.8), 1),
        (Budget("share", 0.79), 3),
        (Budget("share", 0.5), None),
        (Budget("ms", 80.0), 1),
        (Budget("ms", 59.0), None),
        (Budget("drift", 0.35), 1),
        (Budget("drift", 0.4), 3),
        (Budget("drift", 0.05), None),
    ],
)
def test_a_budget_chooses_the_best_within_it(budget, chosen):
    assert choose(ROWS, budget) == chosen


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            Budget("share", 0.5),
            r"no schedule keeps the budget of 0.5 of the uncached time: the best is "
            r"r.pt at --threshold 0.5, with 0.6 of the uncached time",
        ),
        (Budget("ms", 59.0), "of 59 ms a latent: .* with 60 ms a latent"),
        (Budget("drift", 0.05), "of a drift of 0.05: .* with a drift of 0.1"),
    ],
)
def test_a_budget_that_nothing_keeps_is_said_with_the_best(budget, message):
    data = {"rows": ROWS, "budget": {"kind": budget.kind, "limit": budget.limit}, "chosen": None}
    with pytest.raises(L2CError, match=message):
        check_budget(data)
    check_budget(data | {"chosen": 0})
    check_budget(data | {"budget": None})


# -- the command --------------------------------------------------------------------------------


@pytest.fixture
def arguments(options, tmp_path) -> list[object]:
    return [
        *("tune", "--model-config", options.schedule.model_config, "--router", *options.routers),
        *("--random-weights", tiny.SEED, "--batch", "1-2", "--samples", "2", "--repeats", "1"),
        *("--threads", "1", "-o", tmp_path / "out"),
    ]


def test_the_command_shows_a_table_and_writes_its_files(exported, command, arguments, tmp_path):
    code, out, err = command(*arguments)
    assert code == 0, err
    assert [line.split()[0] for line in err.splitlines()][-1] != "Error:"
    data = json.loads((tmp_path / "out" / REPORT).read_text())
    assert out == tune_table(data) + "\n"
    assert (tmp_path / "out" / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert [r["threshold"] for r in data["rows"]] == [0.1, 0.2, 1.0]
    assert [r["removed"] for r in data["rows"]] == [8, 9, 12]
    assert any(r["front"] for r in data["rows"])
    assert "next: choose with --latency-budget or --drift-budget" in out
    for each in data["rows"]:
        assert 0 < each["macs_share"] < 1
        assert each["predicted"]["ms"] > 0
        low, high = each["measured"]["share"]["p10"], each["measured"]["share"]["p90"]
        assert 0 < low <= each["time"]["share"] <= high


def test_the_table_fits_a_terminal(exported, options, tmp_path):
    data = tune(replace(options, thresholds=THRESHOLDS), tmp_path)
    for each in data["rows"]:
        each["time"]["share"] = each["predicted"]["share"] = 1.0
        each |= {"threshold": 0.91234, "removed": 1304, "routed": 1392, "cache_bytes": 137 << 20}
        each["measured"]["share"] = {"median": 1.005, "p10": 0.987, "p90": 1.123}
    data["uncached"] |= {"ms": {"median": 12345.6}}
    assert max(map(len, tune_table(data).splitlines())) <= 100
    assert "off the predicted ones" not in tune_table(data)
    data["rows"][1]["time"]["share"] = 0.7
    assert "the measured times are up to 30 % off the predicted ones" in tune_table(data)


def test_a_budget_names_the_command_that_builds_the_choice(exported, command, arguments, tmp_path):
    code, out, err = command(*arguments, "--drift-budget", "10", "--json")
    assert code == 0, err
    (line,) = out.splitlines()
    data = json.loads(line)
    assert data == json.loads((tmp_path / "out" / REPORT).read_text())
    chosen = data["rows"][data["chosen"]]
    assert chosen["chosen"]
    assert chosen["time"]["share"] == min(r["time"]["share"] for r in data["rows"])
    program, *words = shlex.split(data["next"])
    assert program == "l2c-export"
    code, out, err = command(*words, "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["schedule"]["removed"] == chosen["removed"]


def test_a_budget_that_nothing_keeps_still_shows_the_table(exported, command, arguments, tmp_path):
    code, out, err = command(*arguments, "--drift-budget", "1e-9")
    assert code == 1
    assert "drift: relative L2" in out
    assert err.splitlines()[-1].startswith("Error: no schedule keeps the budget of a drift of 1e-09: ")
    assert (tmp_path / "out" / REPORT).is_file()


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--thresholds", "0.1,two"], 2, "'0.1,two' is not a list of thresholds"),
        (["--thresholds", "1.5"], 2, "'1.5' is not a list of thresholds in 0 … 1"),
        (["--latency-budget", "fast"], 2, "'fast' is neither a share such as 0.7 nor a time"),
        (["--latency-budget", "80"], 2, "'80' is more than the uncached time; did you mean"),
        (["--latency-budget", "-1"], 2, "'-1' is neither a share"),
        (["--latency-budget", "0.7", "--drift-budget", "1"], 2, "give one of them"),
        (["--drift-budget", "0"], 2, "0.0 is not in the range"),
        (["--checkpoint", "x.pt"], 2, "--checkpoint and --random-weights: give one of them"),
        (["--router", "no.pt"], 1, "router no.pt does not exist"),
        (["--steps", "8"], 1, "trained for 6 calls, not 8; use --steps 6"),
        (["--sampler", "magic"], 1, "trained for the sampler 'ddim', not 'magic'"),
        (["-o", "/proc/tune"], 1, "cannot use /proc/tune"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(command, arguments, more, code, message):
    got, out, err = command(*arguments, *more)
    assert (got, out) == (code, ""), err
    (line,) = err.splitlines()
    assert message in line


def test_another_tuning_in_the_folder_is_said(command, arguments, tmp_path):
    import filelock

    (tmp_path / "out/work").mkdir(parents=True)
    lock = filelock.FileLock(tmp_path / "out/work/lock", thread_local=False, is_singleton=False)
    with lock:
        code, out, err = command(*arguments)
    assert (code, out) == (1, "")
    assert f"another tuning is at work in {tmp_path / 'out'}" in err


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.7", Budget("share", 0.7)),
        ("70%", Budget("share", 0.7)),
        ("250ms", Budget("ms", 250.0)),
        ("1.5 s", Budget("ms", 1500.0)),
        ("1e-2s", Budget("ms", 10.0)),
    ],
)
def test_a_latency_budget_is_a_share_or_a_time(text, budget):
    from l2c_export.cli.tune import _latency

    made = _latency(None, None, text)
    assert (made.kind, made.limit) == (budget.kind, pytest.approx(budget.limit))


def test_the_arguments_of_a_build_leave_out_what_is_the_default():
    options = ScheduleOptions(
        model="dit-xl-2", router=Path("my router.pt"), batch=(1, 4), guidance=False
    )
    assert shlex.join(build_arguments(options, None, 3, None)) == (
        "l2c-export build --model dit-xl-2 --router 'my router.pt' --batch 1-4 --no-guidance "
        "--random-weights 3"
    )
    options = ScheduleOptions(model="dit-xl-2", batch=(4, 4), max_graphs=3)
    assert shlex.join(build_arguments(options, Path("x.pt"), None, 1.5)) == (
        "l2c-export build --model dit-xl-2 --batch 4 --max-graphs 3 --checkpoint x.pt "
        "--guidance-scale 1.5"
    )


@pytest.mark.slow
def test_the_demos_routers_are_tuned_by_the_real_command(tmp_path):
    router = read_router(ASSETS / "router.safetensors", "dit")
    bolder = replace(router, logits=router.logits - 1)
    write_router(tmp_path / "bolder.safetensors", bolder, family="dit", slots=router.slots, training={})
    program = [sys.executable, "-c", "from l2c_export.cli import main; main()"]
    result = subprocess.run(
        [
            *(*program, "tune", "--model-config", ASSETS / "model.json"),
            *("--checkpoint", ASSETS / "model.safetensors", "--router", ASSETS / "router.safetensors"),
            *("--router", tmp_path / "bolder.safetensors", "--points", "6", "--batch", "8"),
            *(
                "--guidance-scale",
                "3",
                "--drift-budget",
                "0.045",
                "--repeats",
                "2",
                "-o",
                tmp_path / "out",
            ),
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    data = json.loads((tmp_path / "out" / REPORT).read_text())
    assert len(data["routers"]) == 2
    for number in range(2):
        rows = [r for r in data["rows"] if r["router"] == number]
        drift, macs = ([r[k] if k == "macs" else r[k]["mean"] for r in rows] for k in ("drift", "macs"))
        assert macs == sorted(macs, reverse=True)
        assert drift[0] < 0.6 * drift[-1]  # removing a sixth moves the latents less than removing all
        assert max(drift) < 0.2
        for each in rows:
            assert each["predicted"]["share"] == pytest.approx(each["macs_share"], abs=0.12)
    chosen = data["rows"][data["chosen"]]
    assert chosen["drift"]["mean"] <= 0.045
    everything = threshold_router(router, router.slots, "ddim", 20, 1.0).removed
    assert max(r["removed"] for r in data["rows"]) == everything == 160
