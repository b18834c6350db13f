"""Engines of a bundle: what is built, kept and refused. Plain networks stand in for plans."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import filelock
import killing
import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from l2c_export.build.build import build_bundle
from l2c_export.cli import cli
from l2c_export.core.bundle import CONDITIONING, WEIGHTS, Bundle, read_bundle
from l2c_export.core.engine_archive import unpack_plans
from l2c_export.core.engines import (
    CONSTANTS,
    ENGINES,
    RECORD,
    UPDATE,
    find_engines,
    read_record,
    write_record,
)
from l2c_export.core.plan import StepGraph
from l2c_export.core.precision import precision_of
from l2c_export.engines import build as build_module
from l2c_export.engines.build import EngineBuild
from l2c_export.engines.compile import explain
from l2c_export.engines.folder import JOURNAL, EngineFolder
from l2c_export.engines.gpus import Gpu
from l2c_export.engines.network import engine_network, update_network
from l2c_export.engines.polygraphy import reduce_command
from l2c_export.engines.price import largest_sizes
from l2c_export.engines.request import EngineRequest, parse_targets
from l2c_export.errors import L2CError, UnsupportedError
from l2c_export.runtime import Runner
from l2c_export.runtime.device.backend import choose_engines

FOLDER = "ort-opset20-portable"


@pytest.fixture
def bundle(tiny_bundle, tmp_path) -> Bundle:
    """A copy of the tiny bundle, to build engines in."""
    shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    return read_bundle(tmp_path / "bundle")


@pytest.fixture(autouse=True)
def exported(tiny_bundle, monkeypatch) -> None:
    """Bundles are built from the exported graph of the tiny bundle."""
    killing.substitute(tiny_bundle.path / "full.onnx", monkeypatch.setattr)


@pytest.fixture
def built(monkeypatch) -> list[str]:
    """The engines that are really built, from now on."""
    graphs: list[str] = []
    make = EngineFolder._make

    def watched(self, graph, network, tick):
        graphs.append(graph)
        return make(self, graph, network, tick)

    monkeypatch.setattr(EngineFolder, "_make", watched)
    return graphs


def build(bundle: Bundle, **request):
    (made,) = EngineBuild(bundle, EngineRequest("ort", **request)).run()
    return made


def everything(bundle: Bundle) -> list[str]:
    manifest = bundle.manifest
    return [*dict.fromkeys((CONDITIONING, *manifest.step_graphs(), manifest.uncached)), UPDATE]


def test_a_bundle_gets_an_engine_for_every_graph_of_its_program_and_one_for_the_update(bundle):
    made = build(bundle)
    assert [engine.graph for engine in made.engines] == everything(bundle)
    made.check_bundle(bundle)
    assert find_engines(bundle) == [(bundle.path / ENGINES / FOLDER, made)]
    assert {p.name for p in (bundle.path / ENGINES / FOLDER).iterdir()} == {RECORD, "plans.xz"}


def test_an_engine_is_what_its_network_says(bundle):
    made = build(bundle)
    plans = {engine.graph: plan for engine, plan in unpack_plans(bundle.path / ENGINES / FOLDER, made)}
    for engine in made.engines:
        network = (
            update_network(bundle.manifest)
            if engine.graph == UPDATE
            else engine_network(bundle, engine.graph)
        )
        assert plans[engine.graph] == network.model
        assert (engine.inputs, engine.outputs) == (network.inputs, network.outputs)
        assert engine.weights == network.weights


def test_ranges_say_the_sizes_that_engines_are_built_for(bundle):
    made = build(bundle)
    calls = len(bundle.manifest.calls)
    assert made.ranges == {"batch": (1, 2, 2), "rows": (2, 4, 4), "n": (1, 4 * calls, 4 * calls)}
    long = replace(bundle.manifest, calls=bundle.manifest.calls * 10_000)
    row = 4 * 448  # bytes of the tiny model's conditioning
    assert largest_sizes(long)["n"] * row <= 64 << 20 < (largest_sizes(long)["n"] + 4) * row


def test_two_builds_are_the_same_bytes(bundle, tmp_path):
    build(bundle)
    shutil.copytree(bundle.path, tmp_path / "other", ignore=shutil.ignore_patterns(ENGINES))
    build(read_bundle(tmp_path / "other"))
    assert tiny.contents(bundle.path) == tiny.contents(tmp_path / "other")


def test_finished_engines_are_left_alone(bundle, built):
    build(bundle)
    built.clear()
    before = {p: p.stat().st_mtime_ns for p in (bundle.path / ENGINES / FOLDER).iterdir()}
    build(bundle)
    assert built == []
    assert before == {p: p.stat().st_mtime_ns for p in (bundle.path / ENGINES / FOLDER).iterdir()}


def test_a_kernel_cache_of_a_runner_stays_with_the_engines_that_it_is_of(bundle, tiny_files):
    build(bundle)
    cache = bundle.path / ENGINES / FOLDER / "kernels-sm89.cache"
    cache.write_bytes(b"kernels")
    build(bundle)
    assert cache.exists()
    build(build_bundle(bundle.path, tiny.request(tiny.plan(tiny_files, threshold=0.95))))
    assert not cache.exists()


def test_another_schedule_builds_only_the_engines_that_it_lacks(bundle, built, tiny_files):
    made = build(bundle)
    changed = build_bundle(bundle.path, tiny.request(tiny.plan(tiny_files, threshold=0.2)))
    built.clear()
    with pytest.raises(L2CError, match="were built for another schedule, without"):
        made.check_bundle(changed)
    again = build(changed)
    again.check_bundle(changed)
    kept = {engine.key for engine in made.engines} & {engine.key for engine in again.engines}
    assert kept
    assert len(built) == len(again.engines) - len(kept)


def test_other_weights_build_the_engines_again_that_hold_some(bundle, built, tiny_plan):
    old = build(bundle)
    changed = build_bundle(bundle.path, tiny.request(tiny_plan, seed=99))
    with pytest.raises(L2CError, match="were built from another"):
        old.check_bundle(changed)
    built.clear()
    build(changed).check_bundle(changed)
    assert built == everything(changed)[:-1]  # position embedding or class table; not the update


@pytest.mark.parametrize("damage", [b"", b"other bytes"])
def test_a_damaged_archive_is_built_again(bundle, built, damage):
    made = build(bundle)
    (bundle.path / ENGINES / FOLDER / "plans.xz").write_bytes(damage)
    built.clear()
    assert build(bundle) == made
    assert built == everything(bundle)
    assert list(unpack_plans(bundle.path / ENGINES / FOLDER, made))


def test_a_build_that_dies_goes_on_where_it_was(bundle, built, tmp_path):
    request = EngineRequest("ort")
    template = tmp_path / "template"
    shutil.copytree(bundle.path, template)
    whole = tiny.contents(bundle.path) | {
        name: data for name, data in _built(bundle).items() if name.startswith(ENGINES)
    }
    counts = set()
    for number in itertools.count(1, 9):
        folder = tmp_path / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)
        left = iter(range(number))

        def act(left=left) -> None:
            if next(left, None) is None:
                raise killing.Killed

        try:
            killing.watched(folder, lambda f=folder: EngineBuild(read_bundle(f), request).run(), act)
        except killing.Killed:
            record = folder / ENGINES / FOLDER / RECORD
            if record.exists():
                read_record(record.parent).check_bundle(read_bundle(folder))
            built.clear()
            EngineBuild(read_bundle(folder), request).run()
            counts.add(len(built))
            assert {n: d for n, d in tiny.contents(folder).items() if n in whole} == whole
            assert not list(folder.rglob(".l2c-partial-*"))
        else:
            break
    assert len(counts) > 3  # engines were left to build


def _built(bundle: Bundle) -> dict[str, bytes]:
    build(bundle)
    return tiny.contents(bundle.path)


@pytest.mark.parametrize("text", ["{", "[]", '{"step-1": {}}', '{"update": {"graph": "../../x"}}'])
def test_a_broken_journal_is_no_journal(bundle, built, text):
    folder = bundle.path / ENGINES / FOLDER
    folder.mkdir(parents=True)
    (folder / JOURNAL).write_text(text)
    build(bundle)
    assert built == everything(bundle)
    assert not (folder / JOURNAL).exists()


@pytest.mark.parametrize("options", [{"tf32": True}, {"optimization_level": 3}])
def test_engines_serve_until_those_of_other_options_are_all_there(bundle, built, options, monkeypatch):
    old = build(bundle)
    built.clear()
    make = EngineFolder._make

    def interrupted(self, graph, *rest):
        if graph == UPDATE:
            raise KeyboardInterrupt
        return make(self, graph, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(EngineFolder, "_make", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(bundle, **options)
    folder = bundle.path / ENGINES / FOLDER
    assert read_record(folder) == old
    assert len(list(unpack_plans(folder, old))) == len(everything(bundle))
    assert not (bundle.path / ".l2c-lock").exists()
    built.clear()
    assert build(bundle, **options).options == old.options | options
    assert built == [UPDATE]


def test_a_record_is_never_beside_another_archive_than_its_own(bundle, tmp_path):
    build(bundle)
    shutil.copytree(bundle.path, tmp_path / "template")
    whole = 0
    for number in itertools.count(0, 5):
        folder = tmp_path / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "template", folder)
        left = iter(range(number))

        def act(left=left) -> None:
            if next(left, None) is None:
                raise killing.Killed

        request = EngineRequest("ort", tf32=True)
        try:
            killing.watched(
                folder, lambda f=folder, r=request: EngineBuild(read_bundle(f), r).run(), act
            )
        except killing.Killed:
            for path, made in find_engines(read_bundle(folder)):
                assert list(unpack_plans(path, made))
                whole += 1
        else:
            break
    assert whole > 3


def test_another_build_in_the_bundle_is_waited_for_by_the_user(bundle):
    with (
        filelock.FileLock(bundle.path / ".l2c-lock"),
        pytest.raises(L2CError, match="another build is at work"),
    ):
        build(bundle)


def test_a_bundle_that_nobody_may_write_to_says_what_to_do(bundle, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied", str(bundle.path / ".l2c-lock"))

    monkeypatch.setattr(filelock.FileLock, "acquire", refused)
    with pytest.raises(L2CError) as error:
        build(bundle)
    assert str(error.value) == (
        f"cannot write to {bundle.path}: Permission denied; copy the bundle to where you may write"
    )


def test_a_bundle_that_is_not_what_was_built_gets_no_engines(bundle):
    path = bundle.path / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(L2CError, match=f"{WEIGHTS} does not match its digest"):
        build(bundle)


def test_engines_that_hold_their_weights_have_a_folder_of_their_own(bundle):
    inputs, constants = build(bundle), build(bundle, constant=True)
    assert {path.name for path, _ in find_engines(bundle)} == {FOLDER, f"{FOLDER}-constants"}
    assert all(engine.weights for engine in inputs.engines if engine.graph != UPDATE)
    assert not any(engine.weights for engine in constants.engines)
    assert "blocks.0.attn.qkv.weight" in constants.engine(bundle.manifest.calls[0].graph).constants
    assert constants.archive[0] == "plans.bin"


def test_the_device_runner_runs_what_was_built(bundle):
    build(bundle)
    ours, theirs = (
        Runner.load(bundle.path, backend).sample([1, 2], seed=0) for backend in ("lookalike", "ort")
    )
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def rewritten(bundle: Bundle, made, **changes) -> str:
    """Engines once more, in a folder that their changed record names."""
    other = replace(made, **changes)
    folder = bundle.path / ENGINES / other.folder
    shutil.copytree(bundle.path / ENGINES / made.folder, folder)
    write_record(folder, other)
    return other.folder


def test_engines_for_named_targets_go_before_portable_ones_and_inputs_before_constants(bundle):
    made = build(bundle)
    for options in (made.options, made.options | {"weights": CONSTANTS}):
        rewritten(bundle, made, backend="rtx", version="1.7", options=options)
        for targets in (("sm86",), ("sm89",)):
            rewritten(bundle, made, backend="rtx", version="1.7", targets=targets, options=options)
    order = []
    for _ in range(4):
        folder, _ = choose_engines(bundle, "rtx", "1.7", (8, 9))
        order.append(folder.name)
        shutil.rmtree(folder)
    names = ["sm89", "sm89-constants", "portable", "portable-constants"]
    assert order == [f"rtx-1.7-{name}" for name in names]


def test_stale_and_damaged_engines_do_not_hide_good_ones(bundle):
    made = build(bundle)
    stale = replace(made.engines[0], source="of another")
    rewritten(bundle, made, backend="rtx", version="1", engines=(stale, *made.engines[1:]))
    rewritten(bundle, made, backend="rtx", version="1", options={"weights": CONSTANTS})
    damaged = bundle.path / ENGINES / "rtx-1-sm89"
    damaged.mkdir()
    (damaged / RECORD).write_text("{")
    assert choose_engines(bundle, "rtx", "1", (8, 9))[0].name == "rtx-1-portable-constants"
    shutil.rmtree(bundle.path / ENGINES / "rtx-1-portable-constants")
    with pytest.raises(UnsupportedError) as refused:
        choose_engines(bundle, "rtx", "1", (8, 9))
    said = str(refused.value)
    assert "rtx-1-portable was built from another conditioning than the bundle's" in said
    assert f"{damaged / RECORD} is damaged" in said
    assert said.endswith(f"l2c-export engines {bundle.path} --backend rtx --target sm89")


def test_the_user_chooses_among_engines_that_fit(bundle):
    build(bundle)
    build(bundle, constant=True)
    chosen = {
        name: Runner.load(bundle.path, "lookalike", 1, engines=name).backend.folder.name
        for name in (None, FOLDER, f"{FOLDER}-constants")
    }
    assert chosen == {None: FOLDER, FOLDER: FOLDER, f"{FOLDER}-constants": f"{FOLDER}-constants"}
    with pytest.raises(L2CError, match=f"no engines 'other'; it has: {FOLDER}, {FOLDER}-constants"):
        Runner.load(bundle.path, "lookalike", 1, engines="other")
    with pytest.raises(L2CError, match="backend 'ort' has no option 'engines'"):
        Runner.load(bundle.path, engines=FOLDER)


@pytest.mark.parametrize("command", ["run", "verify", "bench"])
def test_engines_are_for_backends_that_run_them(bundle, command):
    result = CliRunner().invoke(cli, [command, str(bundle.path), "--engines", FOLDER])
    assert result.exit_code == 2
    assert "--engines needs a --backend that runs engines: one of ort-cuda, rtx, trt" in result.stderr


@pytest.mark.parametrize("command", ["run", "verify", "bench"])
def test_commands_take_the_engines_that_they_are_told(bundle, command, tmp_path):
    build(bundle)
    build(bundle, constant=True)
    (bundle.path / ENGINES / FOLDER / "plans.xz").unlink()  # those that would be the default
    arguments = {
        "run": ["--labels", "1", "-o", tmp_path / "x.npy"],
        "verify": ["--calls", "1", "--no-uncached", "--batch", "1"],
        "bench": ["--repeats", "1"],
    }[command]
    options = ["--backend", "lookalike", "--threads", "1", "--json"]
    call = [command, bundle.path, *options, *arguments]
    refused = CliRunner().invoke(cli, [*map(str, call)])
    assert (refused.exit_code, "plans.xz" in refused.stderr) == (1, True)
    chosen = CliRunner().invoke(cli, [*map(str, call), "--engines", f"{FOLDER}-constants"])
    assert chosen.exit_code == 0, chosen.stderr


# -- prices -----------------------------------------------------------------------------------------


def test_the_price_counts_shared_weights_once_and_separate_ones_for_each_engine(bundle):
    prices = {c: EngineBuild(bundle, EngineRequest("ort", constant=c)).price for c in (False, True)}
    parameters = bundle.manifest.files[WEIGHTS].bytes
    assert 0.9 * parameters - 4096 < prices[False].weights < parameters
    assert (prices[True].weights, prices[True].constants) == (0, prices[False].separate)
    assert prices[True].total > prices[False].total
    rows, tokens, width = 4, 16, 32
    assert prices[False].caches == bundle.manifest.buffers * rows * tokens * width * 4


def test_a_session_that_needs_more_than_the_limit_is_refused_with_the_numbers(bundle):
    price = EngineBuild(bundle, EngineRequest("ort")).price
    EngineBuild(bundle, EngineRequest("ort", max_vram=price.total))
    with pytest.raises(UnsupportedError, match=r"KiB weights \+ .* caches \+ .* the limit is"):
        EngineBuild(bundle, EngineRequest("ort", max_vram=price.total - 1))
    with pytest.raises(UnsupportedError, match=r"KiB code"):  # known when engines are there
        EngineBuild(bundle, EngineRequest("ort", max_vram=price.total)).run()
    build(bundle)
    with pytest.raises(UnsupportedError, match=r"KiB code"):  # kept ones need no less than fresh ones
        EngineBuild(bundle, EngineRequest("ort", max_vram=price.total)).run()


@pytest.mark.parametrize(
    ("precision", "batch", "constant", "way"),
    [
        ("float32", (1, 1), False, "build the bundle with --precision float16"),
        ("float16", (1, 1), False, "build the bundle with --precision int8-weights"),
        (
            "bfloat16",
            (1, 4),
            False,
            "build the bundle with a smaller --batch or --precision int8-weights",
        ),
        ("int8-weights", (4, 4), False, "build the bundle with a smaller --batch"),
        ("int8-weights", (1, 1), True, "build the engines without --weights constants"),
        ("float8-weights", (1, 1), False, "it has no smaller form; raise --max-vram"),
    ],
)
def test_what_is_over_the_limit_is_told_what_would_be_smaller(bundle, precision, batch, constant, way):
    over = EngineBuild(bundle, EngineRequest("ort", constant=constant, max_vram=1 << 40))
    over.bundle = replace(bundle, manifest=replace(bundle.manifest, precision=precision, batch=batch))
    with pytest.raises(UnsupportedError) as refused:
        over.check_memory(scratch=2 << 40)
    assert str(refused.value).endswith(way)


# -- targets ----------------------------------------------------------------------------------------


def test_targets_are_compute_capabilities_in_ascending_order():
    assert parse_targets("sm120, SM86,sm89,sm86") == ("sm86", "sm89", "sm120")
    for text in ("", "86", "sm", "sm8x", "sm86,,sm89", "hopper"):
        with pytest.raises(L2CError, match="is not a compute capability such as sm89"):
            parse_targets(text)


def request_families(backend, *targets, precision="float16"):
    return build_module.target_families(EngineRequest(backend, targets), precision_of(precision))


@pytest.fixture
def rtx_targets(monkeypatch):
    known = ("sm75", "sm80", "sm86", "sm89", "sm120")
    monkeypatch.setattr(build_module, "builder_targets", lambda backend: known)


@pytest.mark.usefixtures("rtx_targets")
def test_turing_gets_engines_of_its_own():
    assert request_families("rtx") == (("portable",),)
    assert request_families("rtx", "sm86", "sm89") == (("sm86", "sm89"),)
    assert request_families("rtx", "sm75", "sm86") == (("sm75",), ("sm86",))
    assert request_families("rtx", "sm75") == (("sm75",),)
    with pytest.raises(UnsupportedError, match="float16 alone on sm75"):
        request_families("rtx", "sm75", precision="float32")


@pytest.mark.usefixtures("rtx_targets")
def test_float8_is_for_targets_that_have_it():
    families = request_families("rtx", "sm89", "sm120", precision="float8-weights")
    assert families == (("sm89", "sm120"),)
    with pytest.raises(UnsupportedError, match=r"needs sm89 or later, not sm75, sm86: .*int8-weights"):
        request_families("rtx", "sm75", "sm86", "sm89", precision="float8-weights")
    with pytest.raises(
        UnsupportedError, match=r"not sm80, sm86 of portable .* give --target sm89,sm120,sm121"
    ):
        request_families("rtx", precision="float8-weights")
    assert request_families("rtx", "sm75", "sm86", precision="int8-weights") == (("sm75",), ("sm86",))


@pytest.mark.usefixtures("rtx_targets")
def test_a_target_that_the_backend_does_not_know_is_refused_with_those_it_knows():
    with pytest.raises(
        UnsupportedError, match=r"does not build for sm90, only for sm75, .*--backend trt"
    ):
        request_families("rtx", "sm86", "sm90")
    with pytest.raises(UnsupportedError, match="give no --target"):
        request_families("ort", "sm86")


def test_tensorrt_builds_for_the_gpu_that_is_there(monkeypatch):
    orin = Gpu("Orin", (8, 7), 8 << 30, 4 << 30, "12.6")
    monkeypatch.setattr(build_module, "find_gpus", lambda: (orin,))
    assert request_families("trt") == (("sm87",),)
    assert request_families("trt", "sm87") == (("sm87",),)
    with pytest.raises(UnsupportedError, match=r"which is sm87 \(Orin\), not for sm89"):
        request_families("trt", "sm89")


def test_tensorrt_needs_a_gpu_and_says_what_does_not(monkeypatch):
    def none():
        raise UnsupportedError("there is no GPU that CUDA can use")

    monkeypatch.setattr(build_module, "find_gpus", none)
    with pytest.raises(UnsupportedError, match=r"there is no GPU that CUDA can use; .*--backend rtx"):
        request_families("trt")


@pytest.mark.parametrize(
    ("error", "way_out"),
    [
        ("CUDA initialization failure with error: 35", "finds none or an old driver"),
        ("Cannot compile operation 'x' for Turing (SM75): FP32", "build the bundle with --precision"),
        ("Requested amount of GPU memory; out of memory.", "too little free memory"),
    ],
)
def test_what_a_user_can_do_comes_before_the_builders_own_words(error, way_out):
    said = explain(error)
    assert way_out in said
    assert said.endswith(f"the builder says: {error}")
    assert explain("something new") == "something new"


def test_polygraphy_is_told_what_the_builder_was_told():
    network = Path("a b") / "step-1.onnx"
    common = (
        "polygraphy debug reduce 'a b/step-1.onnx' -o 'a b/step-1.reduced.onnx'{} --check polygraphy "
        "convert polygraphy_debug.onnx --convert-to trt -o reduced.plan "
    )
    assert reduce_command("trt", network) == common.format("") + "--strongly-typed"
    assert reduce_command("rtx", network, ("sm75", "sm120"), Path("b")) == (
        "POLYGRAPHY_USE_TENSORRT_RTX=1 "
        + common.format(" --external-data-dir b")
        + "--compute-capabilities 7.5 12.0"
    )


# -- the command ------------------------------------------------------------------------------------


def run(*arguments) -> str:
    result = CliRunner().invoke(cli, ["engines", *map(str, arguments)])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_the_command_shows_the_price_builds_and_reports(bundle):
    dry = json.loads(run(bundle.path, "--backend", "ort-cuda", "--dry-run", "--json"))
    assert (dry["engines"], dry["backend"]) == (len(everything(bundle)), "ort")
    assert not (bundle.path / ENGINES).exists()
    shown = run(bundle.path, "--backend", "ort-cuda")
    assert "if each engine had its own (" in shown
    assert f"{FOLDER}: {len(everything(bundle))} engines" in shown
    (report,) = json.loads(run(bundle.path, "--report", "--json"))
    assert report["folder"] == FOLDER
    assert run(bundle.path, "--report") in shown
    assert f"{len(everything(bundle))} engines for ort-cuda opset20, targets" in shown
    assert "of the weights), scratch unknown until it runs" in shown
    assert "(no list of kernels: networks, not compiled)" in shown


def test_a_dry_run_counts_the_engines_of_all_families_and_says_the_limit(
    tiny_files, monkeypatch, tmp_path
):
    monkeypatch.setattr(build_module, "builder_targets", lambda backend: ("sm75", "sm86"))
    monkeypatch.setattr(build_module, "builder_version", lambda backend: "1.7")
    made = build_bundle(tmp_path / "b", tiny.request(tiny.plan(tiny_files, precision="float16")))
    options = ["--target", "sm75,sm86", "--max-vram", "1G", "--dry-run"]
    twice = 2 * len(everything(made))
    assert f"{twice} engines for rtx 1.7, targets sm75; sm86" in run(made.path, *options)
    dry = json.loads(run(made.path, *options, "--json"))
    assert (dry["engines"], dry["families"]) == (twice, [["sm75"], ["sm86"]])
    assert dry["max_vram"] == 1 << 30


def test_a_profile_that_is_for_another_bundle_is_warned_of(bundle, tmp_path):
    profile = tmp_path / "p.toml"
    base = 'description = "x"\nbackend = "ort-cuda"\n'
    for wanted, said in (
        ('precision = "float16"\nbatch = "1-2"', ["precision float32, the profile asks for float16"]),
        ('precision = "float32"\nbatch = "4"', ["batch 1-2, the profile asks for 4: build the bundle"]),
        ('precision = "float32"\nbatch = "1-2"', []),
    ):
        profile.write_text(base + wanted)
        call = ["engines", str(bundle.path), "--profile", str(profile), "--dry-run"]
        result = CliRunner().invoke(cli, call)
        assert result.exit_code == 0
        assert result.stderr.count("warning: ") == len(said)
        assert all(text in result.stderr for text in said)


BUILD_REFUSED = [
    (
        ["--precision", "int8", "--backend", "rtx"],
        4,
        "does not take: build it with --precision float16",
    ),
    (
        ["--precision", "int8", "--backend", "ort-cuda"],
        4,
        "which ort-cuda does not take: build it with --precision float16",
    ),
    (
        ["--backend", "rtx", "--per", "sublayer", "--weights", "constants"],
        1,
        "holds no weights: give no --weights",
    ),
    (["--backend", "rtx", "--max-vram", "1K"], 4, "KiB weights + "),
    (
        ["--backend", "rtx", "--per", "sublayer", "--max-vram", "1K"],
        4,
        ": build the engines with --per graph, or build the bundle with",
    ),
    (["--backend", "rtx", "--target", "sm86,sm99"], 4, "does not build for sm99"),
    (["--target", "sm86"], 2, "--target is for engines, and --backend ort builds none"),
    (["--profile", "l4", "--backend", "ort", "--max-vram", "1G"], 2, "--max-vram is for engines, and"),
]


@pytest.mark.usefixtures("rtx_targets")
@pytest.mark.parametrize(("options", "code", "message"), BUILD_REFUSED)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_what_engines_cannot_be_is_refused_before_the_bundle_is_built(
    tiny_files, tmp_path, options, code, message, dry
):
    files = ["--model-config", tiny_files / "model.json", "--router", tiny_files / "router.safetensors"]
    call = ["build", *files, "--random-weights", 3, "-o", tmp_path / "b", *options, *dry]
    result = CliRunner().invoke(cli, [*map(str, call)])
    assert result.exit_code == code
    assert message in result.stderr
    assert not (tmp_path / "b").exists()


@pytest.mark.usefixtures("rtx_targets")
def test_a_dry_build_shows_its_engines(tiny_files):
    files = ["--model-config", tiny_files / "model.json", "--router", tiny_files / "router.safetensors"]
    call = [*map(str, ["build", *files, "--backend", "rtx", "--precision", "float16", "--dry-run"])]
    call += ["--target", "sm75,sm86", "--max-vram", "1G"]
    result = CliRunner().invoke(cli, call)
    assert result.exit_code == 0, result.stderr
    assert "for rtx, targets sm75; sm86: " in result.stdout
    assert "for weights and caches, the limit is 1.00 GiB; beside them latents, " in result.stdout
    dry = json.loads(CliRunner().invoke(cli, [*call, "--json"]).stdout)["engines"]
    plan = tiny.plan(tiny_files, precision="float16")
    graphs = {*(graph.name for graph in plan.graphs), StepGraph((), ()).name}
    assert dry["engines"] == 2 * (len(graphs) + 2)
    assert dry["weights"] == plan.costs.weight_bytes
    parts = json.loads(CliRunner().invoke(cli, [*call, "--per", "sublayer", "--json"]).stdout)[
        "engines"
    ]
    assert parts["engines"] is None
    assert parts["caches"] == len(plan.config.slots) * plan.costs.slot_bytes
    later = ["build", *map(str, files), "--profile", "l4", "--backend", "ort", "--dry-run"]
    assert CliRunner().invoke(cli, later).exit_code == 0  # the engines are built on the target


def test_damaged_engines_are_reported_and_inspected(bundle):
    folder = bundle.path / ENGINES / build(bundle).folder
    record = (folder / RECORD).read_text()
    (folder / RECORD).write_text(record.replace('"version": 2', '"version": 99'))
    assert "version 99, this release reads" in run(bundle.path, "--report")
    (entry,) = json.loads(run(bundle.path, "--report", "--json"))
    assert entry["folder"] == FOLDER
    assert "version 99" in entry["error"]
    shown = CliRunner().invoke(cli, ["inspect", str(bundle.path)])
    assert (shown.exit_code, "version 99" in shown.stdout) == (0, True)
    (folder / RECORD).write_text(record[:-9])
    assert "is damaged" in run(bundle.path, "--report")
    broken = CliRunner().invoke(cli, ["inspect", str(bundle.path)])
    assert (broken.exit_code, "is damaged" in broken.stderr) == (1, True)


def test_a_bundle_without_engines_says_so(bundle):
    assert run(bundle.path, "--report") == f"{bundle.path} has no engines\n"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--max-vram", "lots"], 2, "'lots' is not an amount of memory"),
        (["--target", "blue"], 1, "'blue' is not a compute capability"),
        (["--backend", "ort-cuda", "--max-vram", "100K"], 4, "the limit is 100.0 KiB"),
        (["--backend", "ort-cuda", "--target", "sm86"], 4, "give no --target"),
    ],
)
def test_a_mistake_is_one_line_with_its_exit_code(bundle, options, code, message):
    result = CliRunner().invoke(cli, ["engines", str(bundle.path), *options])
    assert result.exit_code == code
    assert message in result.stderr


def test_a_build_makes_engines_too_and_inspect_shows_them(tiny_files, tmp_path, monkeypatch):
    folder = tmp_path / "bundle"
    files = ["--model-config", tiny_files / "model.json", "--router", tiny_files / "router.safetensors"]
    options = ["--batch", "1-2", "--random-weights", 3, "--backend", "ort-cuda", "-o", folder, "--json"]
    result = CliRunner().invoke(cli, ["build", *map(str, files + options)])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["engines"] == [FOLDER]
    shown = CliRunner().invoke(cli, ["inspect", str(folder)])
    assert f"engines   {FOLDER}: {len(everything(read_bundle(folder)))} engines" in shown.stdout
    (folder / ENGINES / FOLDER / "plans.xz").write_bytes(b"")
    broken = CliRunner().invoke(cli, ["inspect", str(folder)])
    assert broken.exit_code == 1
    assert "build the engines again" in broken.stderr


def test_a_build_for_an_impossible_target_fails_before_anything_is_built(tiny_files, tmp_path):
    files = ["--model-config", tiny_files / "model.json", "--router", tiny_files / "router.safetensors"]
    options = ["--random-weights", 3, "--backend", "ort-cuda", "--target", "sm86", "-o", tmp_path / "b"]
    result = CliRunner().invoke(cli, ["build", *map(str, files + options)])
    assert result.exit_code == 4
    assert not (tmp_path / "b").exists()
