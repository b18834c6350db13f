"""The code for GPUs without one: CUDA and TensorRT are stood in for, see ``fake_cuda.py``."""

from __future__ import annotations

import ast
import importlib
import types
from pathlib import Path

import handmade
import numpy as np
import pytest
from fake_cuda import OK, Error, FakeRuntime, FakeTensorRT, Reasons
from handmade import PROGRAM
from networks import write_networks
from test_imports import HEAVY, NOT_FOR_THE_RUNTIME, modules_after

from l2c_export.core import tensorrt_module
from l2c_export.core.bundle import Bundle, read_bundle
from l2c_export.core.engine_archive import unpack_plans
from l2c_export.errors import L2CError, UnsupportedError
from l2c_export.runtime import Runner
from l2c_export.runtime.device import cuda, tensorrt
from l2c_export.runtime.device.arrays import Borrowed, DeviceArray, on_device
from l2c_export.runtime.device.cuda import CudaDevice
from l2c_export.runtime.device.memory import Arena


@pytest.fixture
def runtime(monkeypatch) -> FakeRuntime:
    made = FakeRuntime()
    monkeypatch.setattr(cuda, "_bindings", lambda: made)
    return made


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    folder = handmade.write_bundle(tmp_path / "bundle")
    write_networks(read_bundle(folder), backend="rtx", version="1.7.1", targets=("sm86", "sm89"))
    return read_bundle(folder)


@pytest.fixture
def trt(runtime, bundle, monkeypatch) -> FakeTensorRT:
    (folder,) = bundle.path.glob("engines/*")
    from l2c_export.core.engines import read_record

    records = {plan: record for record, plan in unpack_plans(folder, read_record(folder))}
    made = FakeTensorRT(runtime, records)
    monkeypatch.setattr(tensorrt, "tensorrt_module", lambda backend: made)
    tensorrt._runtime.cache_clear()
    yield made
    tensorrt._runtime.cache_clear()


# -- trajectories through TensorRT's and CUDA's interfaces ------------------------------------------


@pytest.mark.parametrize("graphs", ["trajectory", "call", "none"])
def test_a_trajectory_of_engines_is_that_of_the_host_runner(trt, bundle, graphs):
    runner = Runner.load(bundle.path, "rtx", graphs=graphs)
    host = Runner.load(bundle.path, threads=1)
    for seed in range(2):
        assert np.allclose(runner.sample([3, 7], seed=seed), host.sample([3, 7], seed=seed), atol=1e-6)
    alone = len(set(runner.manifest.step_graphs())) + 2
    captured = {"trajectory": alone + 1, "call": alone + len(PROGRAM), "none": 0}[graphs]
    assert trt.runtime.modes == ["thread local"] * captured
    name, engines, device = runner.backend.version.split(", ", 2)
    assert (name, engines) == ("fake_rtx 1.7.1", f"engines {runner.backend.folder.name}")
    assert device == "on Fake GPU, compute capability 8.9"


def test_a_replayed_trajectory_is_one_launch_and_no_other_work(trt, bundle):
    session = Runner.load(bundle.path, "rtx").session(2)
    session.start([3, 7], seed=0)
    session.run()
    session.start([3, 7], seed=1)
    trt.runtime.calls.clear()
    session.run()
    calls = [name for name in trt.runtime.calls if name not in ("cudaGetDevice", "cudaSetDevice")]
    assert calls == ["cudaGraphLaunch"]


def test_the_applications_device_is_left_as_it_was(trt, bundle):
    runner = Runner.load(bundle.path, "rtx")
    assert trt.runtime.current == 3
    runner.sample([3, 7], seed=0)
    assert trt.runtime.current == 3
    with pytest.raises(L2CError):
        runner.sample([1], noise=np.zeros(3, np.float32))
    assert trt.runtime.current == 3
    del runner
    assert trt.runtime.current == 3


def test_contexts_have_the_runners_scratch_and_kernels_before_the_capture(trt, bundle):
    Runner.load(bundle.path, "rtx").sample([1], seed=0)
    assert len(set(trt.memories)) == 1
    assert trt.memories[0][1] == 4096
    for config in trt.configs:
        assert config.cuda_graph_strategy == "disabled"
        assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
        assert config.cache is trt.configs[0].cache


def test_compiled_kernels_are_kept_for_the_next_process(trt, bundle):
    (folder,) = bundle.path.glob("engines/*")
    Runner.load(bundle.path, "rtx").sample([1], seed=0)
    cache = folder / "kernels-sm89.cache"
    assert cache.read_bytes() == b"compiled"
    Runner.load(bundle.path, "rtx").sample([1], seed=0)
    assert cache.read_bytes() == b"compiledcompiled"


@pytest.mark.parametrize("graphs", ["trajectory", "none"])
def test_and_where_no_graph_is_captured(trt, bundle, graphs):
    (folder,) = bundle.path.glob("engines/*")
    seen = []

    def look(index, *_):
        seen.append((folder / "kernels-sm89.cache").exists())

    runner = Runner.load(bundle.path, "rtx", graphs=graphs)
    runner.sample([1], seed=0, callback=look if graphs == "trajectory" else None)
    assert (folder / "kernels-sm89.cache").read_bytes() == b"compiled"
    assert not any(seen[:-1])


def test_a_folder_that_cannot_be_written_is_no_error(trt, bundle, monkeypatch, caplog):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(tensorrt, "replacing", refuse)
    with caplog.at_level("INFO", logger="l2c_export"):
        Runner.load(bundle.path, "rtx").sample([1], seed=0)
    assert any("cannot keep compiled kernels" in record.getMessage() for record in caplog.records)


def test_an_older_tensorrt_has_neither_cache_nor_config(trt, bundle, monkeypatch):
    monkeypatch.delattr(FakeTensorRT, "IRuntimeCache")
    found = Runner.load(bundle.path, "rtx").sample([1], seed=0)
    assert np.allclose(found, Runner.load(bundle.path, threads=1).sample([1], seed=0), atol=1e-6)
    assert not trt.configs


# -- what is said where it cannot run ---------------------------------------------------------------


def refused(bundle: Bundle, backend: str = "rtx", **options) -> str:
    with pytest.raises(UnsupportedError) as caught:
        Runner.load(bundle.path, backend, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_engines_for_other_gpus_are_refused_before_they_are_loaded(trt, bundle, monkeypatch):
    monkeypatch.setattr(
        FakeRuntime,
        "cudaGetDeviceProperties",
        lambda self, i: (OK, types.SimpleNamespace(name=b"Other", major=9, minor=0)),
    )
    said = refused(bundle)
    assert "rtx-1.7.1-sm86+sm89 was built for sm86, sm89, this device is sm90" in said
    assert f"l2c-export engines {bundle.path} --backend rtx --target sm90" in said
    assert "cudaMalloc" not in trt.runtime.calls


def test_engines_of_another_version_are_refused(trt, bundle, monkeypatch):
    monkeypatch.setattr(FakeTensorRT, "__version__", "1.8.0")
    assert "was built with rtx 1.7.1, this machine has 1.8.0" in refused(bundle)


def test_the_librarys_own_verdict_is_asked_first(trt, bundle):
    trt.reasons = int(Reasons.OLD_CUDA_DRIVER | Reasons.VERSION_MISMATCH)
    assert "here: old cuda driver, version mismatch; build the engines" in refused(bundle)


def test_an_engine_that_does_not_load_has_the_librarys_reason(trt, bundle):
    trt.loads = False
    assert "update: the engine cannot run on this GPU" in refused(bundle)


def test_a_missing_library_says_how_to_install_it(bundle, monkeypatch):
    monkeypatch.setitem(tensorrt_module.MODULES, "trt", ("no_such_tensorrt",))
    tensorrt_module.tensorrt_module.cache_clear()
    said = refused(bundle, "trt")
    assert "cannot import no_such_tensorrt" in said
    assert "pip install tensorrt" in said


def test_missing_bindings_say_how_to_install_them(bundle, monkeypatch):
    real = importlib.import_module

    def without(name, *rest):
        if name == "cuda.bindings.runtime":
            raise ModuleNotFoundError("No module named 'cuda'")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(
        UnsupportedError, match=r"cuda.bindings \(No module .*pip install cuda-bindings"
    ):
        CudaDevice()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            Error.cudaErrorInsufficientDriver,
            r"there is no NVIDIA driver, or one older .* \(words for 35\)",
        ),
        (Error.cudaErrorNoDevice, r"there is no NVIDIA GPU that this process may use"),
    ],
)
def test_a_missing_driver_or_gpu_is_explained(runtime, error, message):
    runtime.fails["cudaGetDeviceProperties"] = error
    with pytest.raises(UnsupportedError, match=message):
        CudaDevice()


# -- the device -------------------------------------------------------------------------------------


@pytest.fixture
def device(runtime) -> CudaDevice:
    made = CudaDevice()
    runtime.current = 0
    return made


def test_too_little_memory_is_said_with_the_numbers(device, runtime):
    runtime.host.limit = 10 << 20
    with pytest.raises(UnsupportedError) as caught:
        Arena(device, "the weights", {"a": 100, "b": 20 << 20})
    assert str(caught.value) == (
        "20.0 MiB for the weights do not fit: Fake GPU, compute capability 8.9, has 10.0 MiB "
        "of 10.0 MiB free; take a smaller batch or precision, or end what else runs here"
    )
    assert runtime.calls[-2:] == ["cudaGetLastError", "cudaMemGetInfo"]  # the error was cleared


def test_any_other_error_names_the_function(device, runtime):
    runtime.fails["cudaMemsetAsync"] = Error.cudaErrorUnknown
    with pytest.raises(L2CError) as caught:
        device.fill(0, 0, 4, 1)
    assert str(caught.value) == "cudaMemsetAsync failed with cudaErrorUnknown (words for 999)"
    assert not isinstance(caught.value, UnsupportedError)


def test_a_capture_that_fails_leaves_the_stream_usable(device, runtime):
    stream = device.create_stream()
    place = device.allocate(256, "a test")

    def fail() -> None:
        device.fill(place, 1, 4, stream)
        raise UnsupportedError("no")

    with pytest.raises(UnsupportedError, match="no"):
        device.capture(stream, fail)
    found = np.zeros(4, np.uint8)
    device.download(found, place, stream)
    device.synchronize(stream)
    assert found.tolist() == [0xFF] * 4  # the fill was captured and thrown away
    runtime.fails["cudaGraphInstantiate"] = Error.cudaErrorStreamCaptureUnsupported
    with pytest.raises(UnsupportedError, match="cannot be part of a CUDA graph"):
        device.capture(stream, lambda: device.fill(place, 1, 4, stream))


@pytest.mark.parametrize(
    "error", [Error.cudaErrorStreamCaptureInvalidated, Error.cudaErrorStreamCaptureIsolation]
)
def test_a_capture_that_is_broken_off_leaves_no_error_to_others(device, runtime, error):
    stream = device.create_stream()
    runtime.broken = error
    with pytest.raises(UnsupportedError, match="cannot be part of a CUDA graph"):
        device.capture(stream, lambda: None)
    assert runtime.last is OK


def test_what_went_wrong_first_is_what_is_told(device, runtime):
    def fail() -> None:
        with device.current():
            runtime.fails["cudaSetDevice"] = Error.cudaErrorUnknown
            raise L2CError("the first")

    with pytest.raises(L2CError, match="the first"):
        fail()


def test_a_captured_graph_runs_when_it_is_launched(device):
    stream = device.create_stream()
    place = device.allocate(256, "a test")
    graph, nodes = device.capture(stream, lambda: device.fill(place, 7, 4, stream))
    assert nodes == 1
    found = np.zeros(4, np.uint8)
    for expected in (0xFF, 7):
        device.download(found, place, stream)
        device.synchronize(stream)
        assert found.tolist() == [expected] * 4
        device.launch(graph, stream)
    device.destroy_graph(graph)
    device.destroy_stream(stream)
    device.free(place)


def test_pinned_memory_lives_as_long_as_its_array(device, runtime):
    array = device.pinned(64)
    part = array[3:5]
    del array
    part[:] = 9
    assert len(runtime._pinned) == 1
    del part
    assert not runtime._pinned


# -- arrays on a GPU ----------------------------------------------------------------------------------


class Foreign:
    """A CUDA tensor of another framework, as far as DLPack shows it."""

    def __init__(self, array: DeviceArray, index: int = 0) -> None:
        self.array, self.index, self.streams = array, index, []

    def __dlpack_device__(self):
        return (2, self.index)

    def __dlpack__(self, *, stream):
        self.streams.append(stream)
        return self.array.__dlpack__(stream=stream)


def test_arrays_of_a_gpu_come_and_go_by_dlpack(trt, bundle):
    runner = Runner.load(bundle.path, "rtx")
    trt.runtime.current = 0
    device = runner.backend.device
    stream = device.create_stream()
    host = Runner.load(bundle.path, threads=1)
    first = host.sample([3, 7], seed=4)
    noise = Foreign(runner.enqueue([3, 7], stream, seed=4))
    found = runner.enqueue([1, 2], stream, noise=noise, out=noise)
    assert found is noise
    assert noise.streams == [runner._idle[0].stream] * 2
    assert np.allclose(noise.array.numpy(), host.sample([1, 2], noise=first), atol=1e-5)
    assert found.__dlpack_device__() == (2, 0)
    with pytest.raises(L2CError, match="in the memory of GPU 1, the runner is on Fake GPU"):
        runner.enqueue([1, 2], stream, noise=Foreign(noise.array, 1))


def test_a_consumers_stream_follows_the_array_unless_it_declines(device, runtime):
    stream, theirs = device.create_stream(), device.create_stream()
    array = DeviceArray(device, (2,), np.float32, stream)
    runtime.calls.clear()
    array.__dlpack__(stream=-1)
    assert "cudaStreamWaitEvent" not in runtime.calls
    borrowed = Borrowed(array, theirs, (2,), np.float32, "noise")
    assert "cudaStreamWaitEvent" in runtime.calls
    assert borrowed.address == array.address
    borrowed.close()
    borrowed.close()
    with pytest.raises(L2CError, match="noise is not float16: cast it first"):
        Borrowed(array, theirs, (2,), np.float16, "noise")


def test_what_is_on_the_device(device):
    array = DeviceArray(device, (2,), np.float32, device.create_stream())
    assert on_device(array, device)
    assert on_device(Foreign(array), device)
    assert not on_device(np.zeros(2), device)
    assert not on_device([1.0], device)
    with pytest.raises(L2CError, match="in the memory of GPU 0, the runner is on Fake GPU"):
        on_device(array, CudaDevice(1))


def test_an_array_is_given_back_when_it_is_filled(trt, bundle):
    """Without a stream of the caller's, nobody else could wait for it."""
    runner = Runner.load(bundle.path, "rtx")
    trt.runtime.current = 0
    device = runner.backend.device
    array = DeviceArray(device, (1, *runner.manifest.latent), np.float32, device.create_stream())
    session = runner.session(1)
    session.start([3], seed=4)
    session.run()
    session.start([3], seed=4)
    session.run()
    session.result(out=Foreign(array))
    found = trt.runtime.host.view(array.address, array.nbytes).view(np.float32)
    wanted = Runner.load(bundle.path, threads=1).sample([3], seed=4)
    assert np.allclose(found, wanted.ravel(), atol=1e-6)


# -- the real modules have what is used ---------------------------------------------------------------


def calls_of(path: Path, receiver: str) -> set[str]:
    """Attributes of a name that a file uses."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == receiver
    }


def test_the_bindings_have_every_function_and_as_many_arguments():
    real = pytest.importorskip("cuda.bindings.runtime")
    tree = ast.parse(Path(cuda.__file__).read_text(encoding="utf-8"))
    called = [
        (node.args[0].value, len(node.args) - 1)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "self._call"
        and isinstance(node.args[0], ast.Constant)
    ]
    assert len(called) >= 20
    for name, count in called:
        signature = getattr(real, name).__doc__.splitlines()[0]
        wanted = signature.partition("(")[2].partition(")")[0]
        assert count == len([part for part in wanted.split(",") if part.strip()]), signature
    for name in calls_of(Path(cuda.__file__), "self._rt"):
        assert hasattr(real, name), name
    assert real.cudaMemcpyKind.cudaMemcpyDeviceToDevice is not None
    assert real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal is not None
    for name in cuda._HINTS:
        assert hasattr(real.cudaError_t, name), name
    assert [field for field in ("name", "major", "minor") if hasattr(real.cudaDeviceProp(), field)] == [
        "name",
        "major",
        "minor",
    ]


def test_the_fakes_have_nothing_that_the_real_bindings_lack():
    real = pytest.importorskip("cuda.bindings.runtime")
    names = [name for name in vars(FakeRuntime) if name.startswith("cuda")]
    assert names
    assert [name for name in names if not hasattr(real, name)] == []


@pytest.mark.parametrize("module", ["tensorrt_rtx", "tensorrt"])
def test_tensorrt_has_every_class_and_method(module):
    real = pytest.importorskip(module)
    if not hasattr(real, "Runtime"):
        pytest.skip("only type stubs")
    used = {
        "IExecutionContext": ["set_input_shape", "set_tensor_address", "execute_async_v3"],
        "ICudaEngine": ["create_execution_context", "device_memory_size_v2", "streamable_weights_size"],
        "Runtime": ["deserialize_cuda_engine"],
        "ExecutionContextAllocationStrategy": ["USER_MANAGED"],
        "ILogger": ["ERROR", "INTERNAL_ERROR", "log"],
    }
    if hasattr(real, "IRuntimeCache"):
        used |= {
            "IRuntimeConfig": [
                "set_execution_context_allocation_strategy",
                "cuda_graph_strategy",
                "dynamic_shapes_kernel_specialization_strategy",
                "create_runtime_cache",
                "set_runtime_cache",
            ],
            "IRuntimeCache": ["serialize", "deserialize"],
            "CudaGraphStrategy": ["DISABLED"],
            "DynamicShapesKernelSpecializationStrategy": ["EAGER"],
            "EngineValidity": ["INVALID"],
            "EngineInvalidityDiagnostics": ["VERSION_MISMATCH"],
        }
    for cls, names in used.items():
        for name in names:
            assert hasattr(getattr(real, cls), name), f"{cls}.{name}"


def test_a_plan_that_is_none_is_refused_by_the_real_library(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    folder = handmade.write_bundle(tmp_path / "bundle")
    bundle = read_bundle(folder)
    made = write_networks(bundle, backend="rtx")
    from l2c_export.core.engines import read_record

    record, plan = next(unpack_plans(made, read_record(made)))
    library = tensorrt.TensorRT("rtx")
    with pytest.raises(UnsupportedError, match=r"tensorrt_rtx 1\.\S+ cannot .* engine of update"):
        library.engine(record, plan)


def test_the_runner_imports_no_device_before_one_is_asked_for():
    modules = ["backend", "session", "cuda", "tensorrt", "host", "arrays"]
    names = ", ".join(f"l2c_export.runtime.device.{module}" for module in modules)
    found = modules_after(f"import {names}")
    assert not found & (HEAVY | NOT_FOR_THE_RUNTIME)
