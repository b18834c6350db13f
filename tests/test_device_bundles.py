"""Real bundles, small ones, through ``l2c-export engines`` and the device runner's look-alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tiny
from click.testing import CliRunner

from l2c_export.build.build import build_bundle
from l2c_export.build.schedule_options import ScheduleOptions, plan_from_options
from l2c_export.cli import cli
from l2c_export.core.bundle import read_bundle
from l2c_export.core.engine_archive import unpack_plans
from l2c_export.core.engines import UPDATE, read_record
from l2c_export.core.models import UViTConfig
from l2c_export.core.plan_report import size
from l2c_export.core.precision import in_branch, range_name, scale_name
from l2c_export.engines.build import EngineBuild
from l2c_export.engines.request import EngineRequest
from l2c_export.errors import L2CError
from l2c_export.evidence.verify import Settings, verify
from l2c_export.runtime import Runner
from l2c_export.runtime.device import ort_engine
from l2c_export.runtime.device.host import HostDevice
from l2c_export.runtime.device.memory import Arena

UVIT = UViTConfig(
    depth=2, hidden_size=32, num_heads=2, patch_size=2, input_size=8, num_classes=10, mlp_ratio=2.0
).to_json()


def make(folder: Path, model: dict, **options) -> Path:
    """A bundle with a schedule that reuses every other call, and its networks."""
    folder.mkdir()
    config = folder / "model.json"
    config.write_text(json.dumps(model))
    chosen = {"policy": "fora:2", "steps": 6, **options}
    plan = plan_from_options(ScheduleOptions(model_config=config, **chosen))
    given = tiny.calibration(folder / "other", plan.config) if plan.precision.calibrated else None
    bundle = build_bundle(folder / "bundle", tiny.request(plan, calibration=given))
    EngineBuild(bundle, EngineRequest("ort")).run()
    return bundle.path


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.fixture(scope="module")
def folder(tiny_bundle, tmp_path_factory) -> Path:
    """The tiny bundle with its networks."""
    copied = tmp_path_factory.mktemp("networks") / "bundle"
    shutil.copytree(tiny_bundle.path, copied)
    EngineBuild(read_bundle(copied), EngineRequest("ort")).run()
    return copied


def test_uvit_in_float16_runs_on_the_device_as_on_the_host(tmp_path):
    bundle = make(tmp_path / "made", UVIT, sampler="dpm-solver-2s", precision="float16")
    host, runner = Runner.load(bundle, threads=1), Runner.load(bundle, "lookalike", threads=1)
    assert distance(runner.sample([3, 7], seed=0), host.sample([3, 7], seed=0)) < 2e-3
    session = runner.session(2)
    session.start([3, 7], seed=0)
    while not session._held:
        session.step()
    assert session.slot(next(iter(session._held))).dtype == np.float16


@pytest.mark.parametrize("precision", ["int8-weights", "float8-weights", "int8-static"])
def test_weights_in_8_bits_are_uploaded_with_their_scales(tmp_path, precision):
    bundle = make(tmp_path / "made", tiny.CONFIG.to_json(), precision=precision)
    host, runner = Runner.load(bundle, threads=1), Runner.load(bundle, "lookalike", threads=1)
    allowed = 2e-2 if precision == "int8-static" else 2e-3  # a value at the edge of a step may fall
    assert distance(runner.sample([3, 7], seed=0), host.sample([3, 7], seed=0)) < allowed
    engines = read_record(next((bundle / "engines").iterdir())).engines
    weights = {value.name: value.dtype for engine in engines for value in engine.weights}
    eights = {name for name, dtype in weights.items() if dtype in ("int8", "float8_e4m3fn")}
    assert len(eights) == 10
    assert {weights[scale_name(name)] for name in eights} == {"float16"}
    ranges = {range_name(name) for name in eights if in_branch(name)} & set(weights)
    assert len(ranges) == (8 if precision == "int8-static" else 0)


def test_dit_runs_on_the_device_as_on_the_host(folder):
    host, runner = Runner.load(folder, threads=1), Runner.load(folder, "lookalike", threads=1)
    for cached in (True, False):
        wanted = host.sample([1, 2], seed=0, cached=cached)
        assert distance(runner.sample([1, 2], seed=0, cached=cached), wanted) < 1e-5


def test_engines_that_hold_their_weights_leave_none_to_upload(tmp_path, folder):
    copied = tmp_path / "bundle"
    shutil.copytree(folder, copied)
    shutil.rmtree(copied / "engines")
    EngineBuild(read_bundle(copied), EngineRequest("ort", constant=True)).run()
    runner = Runner.load(copied, "lookalike", threads=1)
    assert runner.backend.weights.size == 0
    wanted = Runner.load(copied, threads=1).sample([3], seed=0)
    assert distance(runner.sample([3], seed=0), wanted) < 1e-5


# -- commands -----------------------------------------------------------------------------------------


def invoke(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_verify_compares_the_device_call_by_call(folder, tmp_path):
    report = tmp_path / "verify.json"
    invoke("verify", folder, "--backend", "lookalike", "--threads", 1, "--report", report)
    found = json.loads(report.read_text())
    assert found["passed"]
    assert 0 < found["worst"] < 1e-5
    assert found["machine"]["backend"].startswith("look-alike of a device runner over onnxruntime")


def test_run_launches_whole_trajectories(folder, tmp_path, monkeypatch):
    launched, launch = [], HostDevice.launch
    monkeypatch.setattr(
        HostDevice, "launch", lambda self, *given: launched.append(self) or launch(self, *given)
    )
    high = read_bundle(folder).manifest.batch[1]
    labels = ",".join(["1"] * 3 * high)
    output = tmp_path / "latents.npy"
    invoke("run", folder, "--backend", "lookalike", "--labels", labels, "-o", output)
    assert len(launched) == 3
    wanted = Runner.load(folder, threads=1).sample([1] * 3 * high, seed=0)
    assert distance(np.load(output), wanted) < 1e-5


def test_the_price_of_a_session_is_what_it_takes(tmp_path):
    bundle = make(tmp_path / "made", tiny.CONFIG.to_json(), sampler="ddpm", steps=40)
    price = EngineBuild(read_bundle(bundle), EngineRequest("ort")).price
    runner = Runner.load(bundle, "lookalike", threads=1)
    session = runner.session(runner.manifest.batch[1])
    assert 0.9 < (price.caches + price.state) / session.bytes["buffers"] < 1.05


def test_verify_names_the_first_bad_call_of_a_device(folder, tmp_path, monkeypatch):
    upload = HostDevice.upload

    def spoil(self, target, source, stream):
        if self.asked[-1] == ("synchronize", "") and source.nbytes > 4096:  # a large weight
            source = source.copy()
            source.view(np.float32)[:] *= 1.5
        upload(self, target, source, stream)

    monkeypatch.setattr(HostDevice, "upload", spoil)
    output = invoke(
        "verify", folder, "--backend", "lookalike", "--report", tmp_path / "verify.json", code=3
    )
    assert "verification FAILED in call 0" in output


def test_an_output_that_is_not_finite_on_a_device_is_a_verdict(folder):
    runner = Runner.load(folder, "lookalike", threads=1)
    runner.backend.device.view(runner.backend.weights["final_layer.linear.weight"], 4).fill(0xFF)
    assert "call 0 " in (failure := verify(runner, Settings(batch=1)).failure)
    assert failure.endswith("the output holds NaN or Inf")


def test_bench_measures_the_whole_trajectory_and_each_call(folder, tmp_path):
    report = tmp_path / "bench.json"
    options = ("--backend", "lookalike", "--threads", 1, "--repeats", 1)
    output = invoke("bench", folder, *options, "--report", report)
    found = json.loads(report.read_text())
    assert len(found["calls"]) == len(read_bundle(folder).manifest.calls)
    assert found["speed"]["cached_seconds"]["median"] > 0
    held, session = found["memory"]["device_bytes"], Runner.load(folder, "lookalike").session(1)
    assert held == {"weights": session._shared.weights.size, **session.bytes}
    assert held["buffers"] > found["memory"]["cache_bytes"]
    assert f"on the device: weights {size(held['weights'])}, buffers" in output


@pytest.mark.parametrize("command", ["verify", "bench", "run"])
def test_a_machine_without_the_device_exits_with_its_own_code(folder, tmp_path, command):
    if ort_engine.CUDA_PROVIDER in onnxruntime.get_available_providers():
        pytest.skip("there is a GPU")
    output = invoke(command, folder, "--backend", "ort-cuda", code=4)
    assert "without CUDAExecutionProvider; install the other" in output
    assert len(output.strip().splitlines()) == 1 + (command == "run")  # which warns of random weights


# -- ONNX Runtime's contexts on a GPU, as far as a CPU can tell ---------------------------------------


def test_a_context_keeps_a_graph_for_each_set_of_addresses(folder, monkeypatch):
    """The CUDA context with the CPU's provider, whose memory the addresses are then in."""
    runner = Runner.load(folder, "lookalike", threads=1)
    records = runner.backend.engines
    (plan,) = [p for r, p in unpack_plans(runner.backend.folder, records) if r.graph == UPDATE]
    record = records.engine(UPDATE)
    opened = []
    session = ort_engine._open(record, plan, ort_engine._options(folder), ["CPUExecutionProvider"])

    def open_on_cpu(record, model, options, providers):
        opened.append((options, providers))
        return session

    monkeypatch.setattr(ort_engine, "_open", open_on_cpu)
    engine = ort_engine.CudaEngine(record, plan, folder, 1, graphs=True)
    context = engine.context(0, 0, 77)
    (options, ((provider, settings),)) = opened[0]
    assert provider == "CUDAExecutionProvider"
    assert settings == {
        "device_id": "1",
        "user_compute_stream": "77",
        "enable_cuda_graph": "1",
        "arena_extend_strategy": "kSameAsRequested",
    }
    assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
    context._bound._place = ("cpu", 0)
    device = HostDevice()
    shape = (1, *runner.manifest.latent)
    size = 4 * int(np.prod(shape))
    arenas = [
        Arena(device, "a test", {"x": size, "output": size, "coefficients": 8, "x.next": size})
        for _ in range(2)
    ]
    assert not context.execute_async_v3(77)  # nothing is bound
    for value in record.inputs:
        sizes = tuple(d if isinstance(d, int) else 1 for d in value.shape)
        assert context.set_input_shape(value.name, sizes)
    assert not context.set_input_shape("x", (1, 2))
    assert not context.set_input_shape("unknown", shape)
    assert not context.set_tensor_address("unknown", 256)
    assert not context.set_tensor_address("x", arenas[0]["x"] + 4)
    for turn in (0, 1, 0):
        arena = arenas[turn]
        for name in arena.sizes:
            assert context.set_tensor_address(name, arena[name])
        device.view(arena["x"], size).view(np.float32)[:] = 1 + turn
        device.view(arena["output"], size).view(np.float32)[:] = 10
        device.view(arena["coefficients"], 8).view(np.float32)[:] = (2, 0.5)
        assert context.execute_async_v3(77)
        assert np.all(device.view(arena["x.next"], size).view(np.float32) == 2 * (1 + turn) + 5)
    ids = [options.get_run_config_entry("gpu_graph_id") for _, options in context._kept.values()]
    assert ids == ["1", "2"]
    opened.clear()
    run = ort_engine._run
    monkeypatch.setattr(ort_engine, "_run", lambda *given: opened.append(given) or run(*given))
    assert context.execute_once(77)
    ((_, _, options),) = opened
    assert options.get_run_config_entry("gpu_graph_id") == "-1"
    assert len(context._kept) == 2


def test_a_network_that_onnxruntime_does_not_take_is_named(folder):
    runner = Runner.load(folder, "lookalike", threads=1)
    record = runner.backend.engines.engines[0]
    with pytest.raises(L2CError, match=rf"onnxruntime \S+ cannot load {record.graph}: .*[Pp]rotobuf"):
        ort_engine.HostEngine(record, b"no protobuf", folder, HostDevice(), 1)
