"""On a machine with an NVIDIA GPU and cuda-bindings: ``pytest -m gpu``; backends that are installed.

DiT-XL/2 with random weights, so that weights are large beside a library's own workspaces.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from l2c_export.build.build import build_bundle
from l2c_export.build.schedule_options import ScheduleOptions, plan_from_options
from l2c_export.core.bundle import Bundle
from l2c_export.engines.build import EngineBuild
from l2c_export.engines.gpus import find_gpus
from l2c_export.engines.request import EngineRequest
from l2c_export.errors import UnsupportedError
from l2c_export.evidence.verify import Settings, verify
from l2c_export.runtime import Runner

pytestmark = pytest.mark.gpu


BACKENDS = {  # name of the runner's backend: that of the engines, and the package that runs them
    "ort-cuda": ("ort", "onnxruntime"),
    "rtx": ("rtx", "tensorrt_rtx"),
    "trt": ("trt", "tensorrt"),
}


@pytest.fixture(scope="module", params=["float32", "float16"])
def plain_bundle(request, tmp_path_factory) -> Bundle:
    """A bundle before any engine is built for it."""
    folder: Path = tmp_path_factory.mktemp("gpu")
    options = ScheduleOptions(model="dit-xl-2", policy="fora:3", steps=12, precision=request.param)
    return build_bundle(folder / "bundle", tiny.request(plan_from_options(options)))


@pytest.fixture(scope="module", params=list(BACKENDS))
def backend(request) -> str:
    try:
        find_gpus()
    except UnsupportedError as error:
        pytest.skip(str(error))
    package = pytest.importorskip(BACKENDS[request.param][1])
    if request.param == "ort-cuda" and "CUDAExecutionProvider" not in package.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA; needs onnxruntime-gpu")
    return request.param


@pytest.fixture(scope="module")
def bundle(backend, plain_bundle) -> Bundle:
    """The bundle with engines for the backend."""
    EngineBuild(plain_bundle, EngineRequest(BACKENDS[backend][0])).run()
    return plain_bundle


@pytest.fixture(scope="module")
def runner(bundle, backend) -> Runner:
    return Runner.load(bundle.path, backend)


def test_every_call_is_eager_pytorchs(runner):
    outcome = verify(runner, Settings(batch=2))
    assert outcome.failure is None


def test_a_graphed_trajectory_is_the_one_without_graphs(bundle, backend, runner):
    plain = Runner.load(bundle.path, backend, graphs="none")
    for seed in range(3):
        wanted, found = plain.sample([1, 2], seed=seed), runner.sample([1, 2], seed=seed)
        assert np.abs(found - wanted).max() <= 1e-3 * np.abs(wanted).max()


def test_the_weights_are_in_gpu_memory_once(bundle, backend):
    """Every further graph takes less than 2 % of the weights; measured by the driver."""
    loaded = Runner.load(bundle.path, backend)
    device = loaded.backend.device
    session = loaded.session(1)
    session.start([1], seed=0)
    session.step()
    with device.current():
        before = device.memory().free
        weights = loaded.backend.weights.size
        session.start([1], seed=0)
        session.run()
        _ = session.x
        taken = before - device.memory().free
    further = len(bundle.manifest.step_graphs()) - 1
    assert further >= 2
    assert taken < 0.02 * weights * further, (taken, weights, further)


def test_a_callers_stream_and_arrays(runner):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    wanted = runner.sample([1, 2], seed=3)
    noise = torch.from_numpy(np.random.default_rng(3).standard_normal(wanted.shape, np.float32)).cuda()
    out = torch.empty_like(noise)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        runner.enqueue([1, 2], stream.cuda_stream, noise=noise, out=out)
        found = out.cpu().numpy()
    assert np.abs(found - wanted).max() <= 1e-3 * np.abs(wanted).max()
    again = torch.from_dlpack(runner.enqueue([1, 2], stream.cuda_stream, seed=3))
    stream.synchronize()
    assert again.is_cuda
    assert np.abs(again.cpu().numpy() - wanted).max() <= 1e-3 * np.abs(wanted).max()


def test_caching_is_faster(runner):
    def seconds(cached: bool) -> float:
        begin = time.perf_counter()
        runner.sample([1, 2], seed=0, cached=cached)
        return time.perf_counter() - begin

    for cached in (True, False):
        seconds(cached)
    pairs = [(seconds(True), seconds(False)) for _ in range(5)]
    assert np.median([uncached / cached for cached, uncached in pairs]) > 1.1
