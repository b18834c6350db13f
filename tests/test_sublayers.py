"""Engines for each kind of sub-layer: how a step graph is cut, and schedules decided when it runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import handmade
import killing
import numpy as np
import onnx
import pytest
import tiny
from click.testing import CliRunner

from l2c_export.build.build import build_bundle
from l2c_export.build.schedule_options import ScheduleOptions, plan_from_options
from l2c_export.cli import cli
from l2c_export.core.bundle import CONDITIONING, Bundle, Value, read_bundle
from l2c_export.core.engines import ENGINES, UPDATE, find_engines
from l2c_export.core.models import UViTConfig
from l2c_export.core.plan import Plan, make_plan
from l2c_export.core.samplers import sampler_table
from l2c_export.core.schedule import Schedule
from l2c_export.core.sublayers import scheduled
from l2c_export.engines.build import EngineBuild
from l2c_export.engines.request import EngineRequest
from l2c_export.engines.sublayers import Sublayers, cut_sublayers
from l2c_export.errors import L2CError, UnsupportedError
from l2c_export.runtime import Runner
from l2c_export.runtime.device.host import HostDevice

CALLS = 6
SUBLAYER = "ort-opset20-portable-sublayer"
UVIT = UViTConfig(
    depth=2, hidden_size=32, num_heads=2, patch_size=2, input_size=8, num_classes=10, mlp_ratio=2.0
)
MODELS = {"dit": (tiny.CONFIG, "ddim"), "uvit": (UVIT, "dpm-solver-2s")}


def late(slots: tuple[str, ...], seed: int = 0) -> np.ndarray:
    """A schedule that nobody planned: values live over any number of calls."""
    reuse = np.random.default_rng(seed).random((CALLS, len(slots))) < 0.6
    reuse[0] = False
    return reuse


def plan_of(name: str, reuse: np.ndarray) -> Plan:
    config, sampler = MODELS[name]
    table = sampler_table(sampler, CALLS)
    return make_plan(config, Schedule(config.slots, reuse), table, sampler=sampler)


@pytest.fixture(scope="module")
def bundles(tiny_bundle, tmp_path_factory) -> dict[str, tuple[Bundle, Bundle]]:
    """Of each model a bundle that reuses every other call, and one with the late schedule."""
    made = {}
    exports = {"dit": tiny_bundle.path / "full.onnx"}
    for name, (config, _) in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        fora = np.zeros((CALLS, len(config.slots)), bool)
        fora[1::2] = True
        with pytest.MonkeyPatch.context() as patch:
            if name in exports:
                killing.substitute(exports[name], patch.setattr)
            plain = build_bundle(folder / "plain", tiny.request(plan_of(name, fora)))
            if name not in exports:
                killing.substitute(plain.path / "full.onnx", patch.setattr)
            other = build_bundle(folder / "late", tiny.request(plan_of(name, late(config.slots))))
        for bundle in (plain, other):
            EngineBuild(bundle, EngineRequest("ort")).run()
        EngineBuild(plain, EngineRequest("ort", per="sublayer")).run()
        made[name] = plain, other
    return made


@pytest.fixture(scope="module", params=list(MODELS))
def pair(request, bundles) -> tuple[Bundle, Bundle]:
    return bundles[request.param]


@pytest.fixture(scope="module")
def dit(bundles) -> Bundle:
    return bundles["dit"][0]


def load(bundle: Bundle, per: str, **options) -> Runner:
    return Runner.load(bundle.path, "lookalike", 1, per=per, **options)


# -- the cut ------------------------------------------------------------------------------------


def kinds(cut: Sublayers) -> list[tuple[str, str, str]]:
    return [(s.slot, s.compute.engine, s.advance.engine if s.advance else "") for s in cut.stages]


def test_blocks_share_networks_and_only_the_ends_have_their_own(dit):
    assert kinds(cut_sublayers(dit)) == [
        ("00.attn", "compute-00.attn", "advance-00.attn"),
        ("00.mlp", "compute-00.mlp", "advance-00.mlp"),
        ("01.attn", "compute-01.attn", "advance-00.mlp"),
        ("01.mlp", "compute-00.mlp", "advance-00.mlp"),
        ("", "compute-output", ""),
    ]


def test_long_skips_are_handed_over_many_stages_in_buffers_of_their_own(bundles):
    cut = cut_sublayers(bundles["uvit"][0])
    networks = {engine for _, *engines in kinds(cut) for engine in engines if engine}
    assert networks == {
        *("compute-00.attn", "compute-00.mlp", "compute-01.attn", "compute-02.attn", "compute-output"),
        *("advance-00.attn", "advance-00.mlp", "advance-02.attn"),
    }
    skips = [
        {v for v in s.compute.values.values() if v.startswith("carried.")}
        for s in cut.stages
        if s.compute.engine == "compute-02.attn"
    ]
    assert [len(buffers) for buffers in skips] == [3], "what goes in, the skip, and what comes out"


def test_networks_are_valid_and_say_positions_alone(pair):
    bundle, _ = pair
    for name, network in cut_sublayers(bundle).networks.items():
        onnx.checker.check_model(network.model, full_check=True)
        if name != CONDITIONING:
            graph = onnx.load_from_string(network.model).graph
            held = {value.name for value in (*graph.input, *graph.output)}
            assert all(word.split(".")[0] in ("in", "weight", "out") for word in held)


def test_every_parameter_of_the_step_graph_is_bound_or_a_constant_at_the_ends(pair):
    bundle, _ = pair
    cut = cut_sublayers(bundle)
    bound = {v for stage in cut.stages for piece in stage.pieces for v in piece.values.values()}
    held = {value.name for network in cut.networks.values() for value in network.constants}
    graph = onnx.load(bundle.file(bundle.manifest.uncached), load_external_data=False).graph
    stored = {t.name for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert stored <= bound | held
    ends = {"in_blocks.0.norm1.weight", "in_blocks.0.norm1.bias"}
    assert {name for name in stored if "blocks" in name} - bound <= ends


def test_no_stage_writes_the_buffer_that_it_reads(pair):
    for stage in cut_sublayers(pair[0]).stages:
        for piece in stage.pieces:
            given = {there for ours, there in piece.values.items() if ours.startswith("out")}
            taken = {there for ours, there in piece.values.items() if ours.startswith("in")}
            assert not given & taken


def test_a_bundle_whose_conditioning_is_no_row_of_parts_has_none(tmp_path):
    bundle = read_bundle(handmade.write_bundle(tmp_path / "bundle"))
    with pytest.raises(UnsupportedError, match="no engines for each kind of sub-layer of this bundle"):
        EngineBuild(bundle, EngineRequest("ort", per="sublayer"))
    assert EngineBuild(bundle, EngineRequest("ort")).other is None


def test_engines_that_serve_many_sub_layers_hold_no_weights(dit):
    with pytest.raises(L2CError, match="holds no weights: give no --weights"):
        EngineBuild(dit, EngineRequest("ort", constant=True, per="sublayer"))


# -- what is stored -----------------------------------------------------------------------------


def test_both_kinds_lie_beside_each_other(dit):
    found = {made.folder: made for _, made in find_engines(dit)}
    assert set(found) == {"ort-opset20-portable", SUBLAYER}
    made = found[SUBLAYER]
    assert made.stages == cut_sublayers(dit).stages
    assert [engine.graph for engine in made.engines][-1] == UPDATE
    assert len(made.engines) == 8
    made.check_bundle(dit)


def test_a_price_has_a_buffer_for_every_slot_and_is_shown_with_the_other_choice(dit):
    whole = EngineBuild(dit, EngineRequest("ort"))
    parts = EngineBuild(dit, EngineRequest("ort", per="sublayer"))
    assert (parts.price, parts.other) == (whole.other, whole.price)
    assert parts.price.weights == whole.price.weights
    rows, slots = 4, dit.manifest.slots
    slot = 4 * rows * int(np.prod(slots.shape))
    assert parts.price.caches == len(slots.names) * slot
    assert parts.price.state == whole.price.state + 2 * slot  # the residual stream, twice
    assert (whole.price.runs, parts.price.runs) == (2, len(slots.names) + 2)
    memory = load(dit, "sublayer").session(2).bytes["buffers"]
    assert memory >= parts.price.caches + 2 * slot


# -- what runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("graphs", ["trajectory", "call", "none"])
def test_trajectories_are_those_of_the_step_graphs_bit_for_bit(pair, graphs):
    bundle, other = pair
    whole, parts = (load(bundle, per, graphs=graphs) for per in ("graph", "sublayer"))
    chosen = parts.with_schedule(late(bundle.manifest.slots.names))
    planned = load(other, "graph", graphs=graphs)
    for labels, seed in (([3, 7], 0), ([3, 7], 1), ([5], 2)):
        for cached in (True, False):
            wanted = whole.sample(labels, seed=seed, cached=cached)
            assert np.array_equal(parts.sample(labels, seed=seed, cached=cached), wanted)
        late_latents = chosen.sample(labels, seed=seed)
        assert np.array_equal(late_latents, planned.sample(labels, seed=seed))
        assert not np.array_equal(late_latents, parts.sample(labels, seed=seed))


def test_calls_can_be_run_one_by_one_and_alone(pair):
    bundle, other = pair
    session = load(bundle, "sublayer").with_schedule(late(bundle.manifest.slots.names)).session(2)
    planned = load(other, "graph").session(2)
    for one in (session, planned):
        one.start([3, 7], seed=0)
    for wanted, call in zip(planned, session, strict=True):
        assert np.array_equal(call.x, wanted.x)
        for slot in planned._program[call.index].writes:
            assert np.array_equal(session.slot(slot), planned.slot(slot))
        program = session._program[call.index]
        reads = {slot: session.slot(slot) for slot in program.reads}
        output, slots = session.run_call(call.index, call.x, reads)
        wanted_output, wanted_slots = planned.run_call(call.index, call.x, reads)
        assert np.array_equal(output, wanted_output)
        assert set(slots) == set(bundle.manifest.slots.names) - set(reads)
        assert all(np.array_equal(slots[name], value) for name, value in wanted_slots.items())


def test_runners_of_all_schedules_share_engines_and_weights(dit):
    runner = load(dit, "sublayer")
    device: HostDevice = runner.backend.device
    for seed in range(3):
        runner.with_schedule(late(dit.manifest.slots.names, seed)).sample([1], seed=0)
    assert device.asked.count(("allocate", "the weights")) == 1
    other = runner.with_schedule(late(dit.manifest.slots.names))
    del runner  # whose weights stay
    other.sample([1], seed=0)
    assert other.manifest.schedule["removed"] == late(dit.manifest.slots.names).sum()


def test_no_engine_writes_what_it_reads_and_every_address_is_aligned(pair):
    bundle, _ = pair
    runner = load(bundle, "sublayer").with_schedule(late(bundle.manifest.slots.names))
    runner.sample([3, 7], seed=0)
    runs = [work for work in runner.backend.device.done if work.kind == "run"]
    assert {work.what for work in runs} > {"advance-00.mlp", "compute-00.mlp", UPDATE, CONDITIONING}
    for work in runs:
        for i, (at, size) in enumerate(work.writes):
            assert at % 256 == 0
            others = (*work.reads, *work.writes[i + 1 :])
            assert not any(at < a + n and a < at + size for a, n in others), work.what


def test_a_call_runs_an_engine_for_each_stage_and_the_update(dit):
    runner = load(dit, "sublayer", graphs="none")
    runner.sample([3, 7], seed=0)
    runs = [work.what for work in runner.backend.device.done if work.kind == "run"]
    names = dit.manifest.slots.names
    assert runs[0] == CONDITIONING
    assert len(runs) == 1 + CALLS * (len(names) + 2)
    reusing = runs[1 + len(names) + 2 :][: len(names) + 2]
    assert all(name.startswith("advance") for name in reusing[: len(names)])
    assert reusing[len(names) :] == ["compute-output", UPDATE]


def test_one_batch_without_guidance_and_weights_in_8_bits(tmp_path):
    """Rows of the conditioning that do not end at an aligned address are copied to one that does."""
    (tmp_path / "model.json").write_text(json.dumps(tiny.CONFIG.to_json()))
    options = {"policy": "fora:2", "steps": 4, "guidance": False, "precision": "int8-weights"}
    plan = plan_from_options(ScheduleOptions(model_config=tmp_path / "model.json", **options))
    bundle = build_bundle(tmp_path / "bundle", tiny.request(plan, batch=(3, 3)))
    for per in ("graph", "sublayer"):
        EngineBuild(bundle, EngineRequest("ort", per=per)).run()
    whole, parts = (load(bundle, per) for per in ("graph", "sublayer"))
    assert "conditioning.0.packed" in parts.session(3)._arena.sizes
    assert np.array_equal(parts.sample([1, 2, 3], seed=0), whole.sample([1, 2, 3], seed=0))


# -- what is refused ----------------------------------------------------------------------------


def test_a_schedule_that_does_not_fit_is_refused(dit):
    runner = load(dit, "sublayer")
    good = late(dit.manifest.slots.names)
    with pytest.raises(L2CError, match=r"is bool \(6, 3\); this bundle needs bool \(6, 4\)"):
        runner.with_schedule(good[:, :3])
    with pytest.raises(L2CError, match=r"is float64 \(6, 4\)"):
        runner.with_schedule(good * 1.0)
    with pytest.raises(L2CError, match=r"the schedule makes no bool array of \(6, 4\): "):
        runner.with_schedule([[True, False], [True]])
    with pytest.raises(L2CError, match=r"reuses slot 00.mlp in the first call, before it was computed"):
        runner.with_schedule(np.array([[False, True, False, False], *good[1:]]))


def test_engines_of_step_graphs_take_no_other_schedule(dit):
    reuse = late(dit.manifest.slots.names)
    with pytest.raises(UnsupportedError, match="schedule of the bundle alone; build some") as refused:
        load(dit, "graph").with_schedule(reuse)
    assert str(refused.value).endswith(f"{dit.path} --backend ort-cuda --per sublayer")
    with pytest.raises(UnsupportedError, match=r"onnxruntime .* runs the bundle's own schedule alone"):
        Runner.load(dit.path, threads=1).with_schedule(reuse)


def test_a_kind_of_engines_is_chosen_by_name_and_step_graphs_come_first(dit, tmp_path):
    assert Runner.load(dit.path, "lookalike").backend.folder.name == "ort-opset20-portable"
    with pytest.raises(L2CError, match="per is 'call'; it must be one of: graph, sublayer"):
        load(dit, "call")
    shutil.copytree(dit.path, tmp_path / "bundle")
    folder = tmp_path / "bundle" / ENGINES
    shutil.rmtree(folder / "ort-opset20-portable")
    assert Runner.load(tmp_path / "bundle", "lookalike").backend.folder.name == SUBLAYER
    shutil.rmtree(folder)
    with pytest.raises(UnsupportedError, match=r"build them: .* --per sublayer"):
        load(read_bundle(tmp_path / "bundle"), "sublayer")


def test_a_bundles_own_program_keeps_its_schedule(dit):
    program = scheduled(dit.manifest)
    assert [set(c.reads) for c in program.calls] == [set(c.reads) for c in dit.manifest.calls]
    assert program.schedule == dit.manifest.schedule
    assert program.buffers == len(dit.manifest.slots.names)


def test_sizes_may_be_multiples():
    value = Value("v", "float32", ("batch*2", "rows", 3, "n*16"))
    assert value.sized({"batch": 3, "rows": 5, "n": 2}) == (6, 5, 3, 32)


# -- commands -----------------------------------------------------------------------------------


def invoke(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def schedule(dit, tmp_path) -> Path:
    np.save(tmp_path / "late.npy", late(dit.manifest.slots.names))
    return tmp_path / "late.npy"


def test_verify_and_run_follow_a_schedule_from_a_file(dit, bundles, schedule, tmp_path):
    device = ("--backend", "lookalike", "--threads", 1, "--schedule", schedule)
    report, latents = tmp_path / "verify.json", tmp_path / "latents.npy"
    invoke("verify", dit.path, *device, "--report", report)
    found = json.loads(report.read_text())
    assert found["passed"]
    assert 0 < found["worst"] < 1e-5
    assert found["inputs"]["schedule"]["kind"] == "given at run time"
    invoke("run", dit.path, *device, "--labels", "3,7", "--seed", 0, "-o", latents)
    planned = load(bundles["dit"][1], "graph").sample([3, 7], seed=0)
    assert np.array_equal(np.load(latents), planned)


def test_a_schedule_and_a_run_that_follows_none_are_refused(dit, schedule, tmp_path):
    run = ("run", dit.path, "-o", tmp_path / "out.npy", "--backend", "lookalike")
    said = invoke(*run, "--schedule", schedule, "--uncached", code=2)
    assert "--uncached computes everything in every call, and takes no --schedule" in said
    assert not (tmp_path / "out.npy").exists()


def test_a_schedule_file_that_is_none_is_one_line(dit, tmp_path, schedule):
    (tmp_path / "bad.npy").write_bytes(b"no numbers")
    run = ("run", dit.path, "-o", tmp_path / "out.npy", "--backend", "lookalike", "--schedule")
    assert "bad.npy is not a .npy file of bools" in invoke(*run, tmp_path / "bad.npy", code=1)
    assert "cannot read the schedule" in invoke(*run, tmp_path / "none.npy", code=1)
    output = invoke("run", dit.path, "--schedule", schedule, code=4)
    assert "runs the bundle's own schedule alone" in output
    assert "--per sublayer, and run with --backend rtx, trt or ort-cuda" in output


def test_engines_shows_both_prices_and_builds_what_is_asked_for(dit, tmp_path):
    shutil.copytree(dit.path, tmp_path / "bundle", ignore=shutil.ignore_patterns(ENGINES))
    command = ("engines", tmp_path / "bundle", "--backend", "ort-cuda")
    assert "--per sublayer: 8 engines" in invoke(*command, "--dry-run")
    (tmp_path / "late.toml").write_text('description = "schedules at run time"\nper = "sublayer"\n')
    output = invoke(*command, "--profile", tmp_path / "late.toml")
    assert "they serve every schedule" in output
    assert [p.name for p in (tmp_path / "bundle" / ENGINES).iterdir()] == [SUBLAYER]
    assert json.loads(invoke("engines", tmp_path / "bundle", "--report", "--json"))[0]["stages"]
