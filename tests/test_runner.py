"""The runner on a bundle made by hand; the exporter's bundles are tested where they are built."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import handmade
import numpy as np
import pytest
from handmade import CLASSES, LATENT, PROGRAM, SLOTS, TOKENS, WIDTH

from l2c_export.core.bundle import MANIFEST, File, Value, read_bundle, write_manifest
from l2c_export.core.files import sha256
from l2c_export.errors import L2CError, UnsupportedError
from l2c_export.runtime import Runner, Session, backends
from l2c_export.runtime.inputs import batches
from l2c_export.runtime.session import aligned


@pytest.fixture(scope="session")
def bundle(tmp_path_factory) -> Path:
    return handmade.write_bundle(tmp_path_factory.mktemp("handmade") / "bundle")


@pytest.fixture(scope="session")
def runner(bundle) -> Runner:
    return Runner.load(bundle)


def noise(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, *LATENT), dtype=np.float32)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


# -- what it computes ---------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("labels", [[3], [3, 7], [5, 5, 0, 9]])
def test_a_trajectory_is_the_programs(runner, labels, cached):
    x = noise(len(labels))
    latents = runner.sample(labels, noise=x, cached=cached)
    assert latents.dtype == np.float32
    assert distance(latents, handmade.reference(labels, x, cached=cached)) < 1e-5


def test_caching_changes_the_result_of_this_bundle(runner):
    assert distance(runner.sample([1], seed=0), runner.sample([1], seed=0, cached=False)) > 1e-3


def test_a_bundle_without_guidance_has_one_row_a_latent(tmp_path):
    runner = Runner.load(handmade.write_bundle(tmp_path / "plain", guidance=False))
    x = noise(2)
    assert distance(runner.sample([4, 4], noise=x), handmade.reference([4, 4], x, scale=None)) < 1e-5
    assert runner.session(2)._slot_shape[0] == 2


def test_the_guidance_scale_is_the_bundles_unless_given(runner):
    x = noise(1)
    assert np.array_equal(
        runner.sample([2], noise=x), runner.sample([2], noise=x, guidance_scale=handmade.SCALE)
    )
    latents = runner.sample([2], noise=x, guidance_scale=np.float32(3))
    assert distance(latents, handmade.reference([2], x, scale=3)) < 1e-5


def test_a_seed_is_numpys_default_generator(runner):
    assert np.array_equal(runner.sample([2, 3], seed=5), runner.sample([2, 3], noise=noise(2, 5)))
    assert not np.array_equal(runner.sample([2, 3]), runner.sample([2, 3]))


def test_many_labels_go_in_batches_and_keep_their_noise(runner):
    labels = list(range(10))  # batches of 4, 4 and 2
    latents = runner.sample(labels, seed=1)
    assert distance(latents, handmade.reference(labels, noise(10, 1))) < 1e-5
    assert np.array_equal(latents[4:8], runner.sample(labels[4:8], noise=noise(10, 1)[4:8]))


def test_a_bundle_for_one_latent_samples_any_number(tmp_path):
    runner = Runner.load(handmade.write_bundle(tmp_path / "single", batch=(1, 1)))
    seen = []
    latents = runner.sample([3, 7, 3], seed=1, callback=lambda i, t, x: seen.append((i, x.copy())))
    single = [runner.sample([y], noise=noise(3, 1)[[k]]) for k, y in enumerate([3, 7, 3])]
    assert np.array_equal(latents, np.concatenate(single))
    assert [index for index, _ in seen] == 3 * list(range(len(PROGRAM)))  # a batch after another
    ends = [x for index, x in seen if index == len(PROGRAM) - 1]
    assert np.array_equal(latents, np.concatenate(ends))


@pytest.mark.parametrize(
    ("count", "limits", "expected"),
    [
        (3, (1, 4), [([0, 1, 2], 3)]),
        (5, (1, 4), [([0, 1, 2, 3], 4), ([4], 1)]),
        (5, (4, 4), [([0, 1, 2, 3], 4), ([4, 0, 1, 2], 1)]),
        (1, (3, 4), [([0, 0, 0], 1)]),
    ],
)
def test_batches_fill_up_what_is_too_small(count, limits, expected):
    assert [(part.tolist(), fresh) for part, fresh in batches(count, limits)] == expected


def test_the_conditioning_does_not_depend_on_how_much_is_kept(runner, monkeypatch):
    whole = runner.sample([1, 2, 2], seed=0)
    monkeypatch.setattr("l2c_export.runtime.session._TABLE_BYTES", 1)  # one call at a time
    session = runner.session(3)
    session.start([1, 2, 2], seed=0)
    assert all(len(session._conditioning._table) == 1 for _ in session)
    assert np.array_equal(session.x, whole)


# -- reuse --------------------------------------------------------------------------------------


def test_a_reused_runner_gives_what_a_fresh_one_gives(bundle, runner):
    def stop(index, timestep, x):
        x[:] = np.nan  # the worst that a callback can do
        if index == 2:
            raise KeyError("stop")

    runner.sample([8, 1], seed=8)
    runner.sample([8, 1], seed=8, cached=False)
    with pytest.raises(KeyError):
        runner.sample([9, 9], seed=9, callback=stop)
    with pytest.raises(L2CError):
        runner.sample([9, 99], seed=9)
    for cached in (True, False, True):
        again = runner.sample([3, 7], seed=4, guidance_scale=2, cached=cached)
        fresh = Runner.load(bundle).sample([3, 7], seed=4, guidance_scale=2, cached=cached)
        assert np.array_equal(again, fresh)


def test_a_later_run_does_not_change_an_earlier_result(runner):
    first = runner.sample([3], seed=1)
    kept = first.copy()
    runner.sample([4], seed=2)
    assert np.array_equal(first, kept)


def test_threads_share_a_runner(bundle):
    runner = Runner.load(bundle)  # none of its graphs has run
    jobs = [(seed % 4 + 1, seed, seed % 3 > 0) for seed in range(40)]
    alone = Runner.load(bundle)
    expected = [alone.sample(range(b), seed=s, cached=c) for b, s, c in jobs]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda j: runner.sample(range(j[0]), seed=j[1], cached=j[2]), jobs))
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
    assert len(runner._idle) <= 4


def test_two_trajectories_advance_in_turns(runner):
    sessions = [runner.session(1) for _ in range(2)]
    for seed, session in enumerate(sessions):
        session.start([seed], seed=seed)
    for a, b in zip(*sessions, strict=True):
        assert a.index == b.index
    for seed, session in enumerate(sessions):
        assert np.array_equal(session.x, runner.sample([seed], seed=seed))


# -- call by call -------------------------------------------------------------------------------


def test_a_session_goes_call_by_call(runner):
    session, seen = runner.session(2), []
    session.start([3, 7], noise(2))
    for call in session:
        seen.append((call.index, call.timestep))
        assert call.x is session.x
    assert seen == [(i, 999.0 - 100 * i) for i in range(len(PROGRAM))]
    assert np.array_equal(session.x, runner.sample([3, 7], noise=noise(2)))
    with pytest.raises(L2CError, match="trajectory is over"):
        session.step()


def test_a_callback_sees_every_latent(runner):
    session, seen = runner.session(1), []
    runner.sample([3], seed=0, callback=lambda i, t, x: seen.append((i, t, x.copy())))
    session.start([3], seed=0)
    for call, (index, timestep, x) in zip(session, seen, strict=True):
        assert (call.index, call.timestep) == (index, timestep)
        assert np.array_equal(call.x, x)


def test_a_callback_may_change_the_latent(runner):
    def start_over(index, timestep, x):
        if index == len(PROGRAM) - 1:
            x[:] = 7

    assert (runner.sample([3], seed=0, callback=start_over) == 7).all()


def test_slots_are_what_later_calls_read(runner):
    session = runner.session(2)
    session.start([3, 7], noise(2))
    with pytest.raises(L2CError, match=r"'00.attn' is not stored after 0 calls"):
        session.slot("00.attn")
    held: dict[str, int] = {}
    for call, (reads, writes) in zip(session, PROGRAM, strict=True):
        held = {s: b for s, b in held.items() if b not in writes.values()} | writes
        assert set(reads) <= set(held), call
        for slot in SLOTS:
            if slot in held:
                assert session.slot(slot).shape == (4, TOKENS, WIDTH)
            else:
                with pytest.raises(L2CError, match="is not stored"):
                    session.slot(slot)


def test_a_single_call_leaves_the_trajectory_alone(runner):
    session = runner.session(2)
    session.start([3, 7], noise(2))
    before = session.x.copy()
    first = session.step()
    stored = {slot: session.slot(slot).copy() for slot in PROGRAM[0][1]}
    output, writes = session.run_call(0, before)
    assert np.array_equal(output, first.output)
    assert all(np.array_equal(writes[slot], stored[slot]) for slot in stored)

    given, after = session.x.copy(), [session.x.copy()]
    reads = {"00.attn": stored["00.attn"]}
    output, writes = session.run_call(1, given, reads)
    assert np.array_equal(session.x, given)
    second = session.step()
    assert np.array_equal(output, second.output)
    assert set(writes) == set(PROGRAM[1][1])
    changed, _ = session.run_call(1, after[0], {"00.attn": 2 * stored["00.attn"]})
    assert distance(changed, output) > 1e-4
    for _ in session:
        pass
    assert np.array_equal(session.x, runner.sample([3, 7], noise=noise(2)))


def test_a_single_call_takes_its_own_slots_only(runner):
    session = runner.session(1)
    session.start([3], seed=0)
    value = np.zeros((2, TOKENS, WIDTH), np.float32)
    with pytest.raises(L2CError, match=r"call 1 reads \['00.attn'\], not \[\]"):
        session.run_call(1, session.x)
    with pytest.raises(L2CError, match=r"call 0 reads \[\], not \['00.attn'\]"):
        session.run_call(0, session.x, {"00.attn": value})
    with pytest.raises(L2CError, match=r"slot 00.attn has shape"):
        session.run_call(1, session.x, {"00.attn": value[:1]})
    with pytest.raises(L2CError, match="there is no call 6"):
        session.run_call(6, session.x)
    with pytest.raises(L2CError, match="there is no call 0"):
        runner.session(1).run_call(0, session.x)


# -- buffers ------------------------------------------------------------------------------------


class FakeBackend:
    """Records the addresses that graphs are bound to; runs nothing."""

    version = "fake"
    streams = False

    def __init__(self, bundle, threads=None):
        self.manifest = bundle.manifest
        self.bound = []

    def load(self, graph):
        return FakeGraph(self, graph)

    def session(self, graphs, batch):
        return Session(graphs, batch)


class FailingBackend(FakeBackend):
    """Takes no graph."""

    def load(self, graph):
        raise L2CError(f"the backend was handed {graph}")


class FakeGraph:
    def __init__(self, backend, name):
        self.backend, self.name = backend, name

    def bind(self, inputs, outputs):
        self.backend.bound.append((self.name, dict(inputs), dict(outputs)))
        return lambda: None


def test_a_slot_is_written_where_it_is_read(bundle, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "fake", f"{__name__}:FakeBackend")
    runner = Runner.load(bundle, backend="fake")
    session = runner.session(2)
    for _ in range(2):  # the second trajectory binds no step again
        session.start([1, 2], seed=0)
        written: dict[str, int] = {}
        for call in session:
            _, inputs, outputs = [b for b in runner.backend.bound if b[0] != "conditioning"][call.index]
            reads, writes = PROGRAM[call.index]
            for name in reads:
                assert inputs[name].ctypes.data == written[name]
            written |= {name: outputs[name].ctypes.data for name in writes}
            assert inputs["x"] is session.x
    steps = [b for b in runner.backend.bound if b[0] != "conditioning"]
    assert len(steps) == len(PROGRAM)
    for _, inputs, outputs in steps:
        for array in (*inputs.values(), *outputs.values()):
            assert array.ctypes.data % 256 == 0
            assert array.flags.c_contiguous


def test_an_input_that_a_graph_does_not_use_is_not_bound(bundle, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "fake", f"{__name__}:FakeBackend")
    runner = Runner.load(bundle, backend="fake")
    runner.sample([1], seed=0)
    inputs = {name: set(inputs) for name, inputs, _ in runner.backend.bound}
    assert inputs["step-rrrr"] == {"x", "guidance_scale", *SLOTS}


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 4, 8)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_buffers_are_aligned(shape, dtype):
    array = aligned(shape, dtype)
    assert (array.shape, array.dtype, array.ctypes.data % 256) == (shape, np.dtype(dtype), 0)


# -- what it refuses ----------------------------------------------------------------------------


class Tensor:
    """A tensor of another framework, as far as DLPack shows it."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class ElsewhereTensor(Tensor):
    """A tensor that is not in CPU memory."""

    def __dlpack__(self, **kwargs):
        raise BufferError("not in CPU memory")


def test_dlpack_comes_in_and_goes_out(runner):
    x = noise(2)
    latents = runner.sample(Tensor(np.array([3, 7])), noise=Tensor(x))
    assert np.array_equal(latents, runner.sample([3, 7], noise=x))
    assert np.array_equal(np.from_dlpack(latents), latents)


def changed(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array.flat[5] = value
    return array


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([CLASSES], {}, r"label 10 is not a class of this model; it has 0 to 9"),
        ([0, -1], {}, r"label -1 is not a class"),
        ([0.0], {}, r"labels are float64; they must be integers"),
        ([True], {}, r"labels are bool; they must be integers"),
        (["cat"], {}, r"labels are <U3; they must be integers"),
        (3, {}, r"labels have shape \(\); they must be a row"),
        ([[1, 2]], {}, r"labels have shape \(1, 2\)"),
        ([], {}, r"labels have shape \(0,\)"),
        ([[1], [2, 3]], {}, r"labels cannot be read as an array"),
        (ElsewhereTensor(np.array([1])), {}, r"labels cannot be read .* not in CPU memory"),
        ([1], {"noise": noise(2)}, r"noise has shape \(2, 3, 4, 4\); this bundle needs \(1, 3, 4, 4\)"),
        ([1], {"noise": noise(1)[0]}, r"noise has shape \(3, 4, 4\)"),
        ([1], {"noise": noise(1).astype("float64")}, r"noise is float64; .* float32: cast it first"),
        ([1], {"noise": noise(1).astype("float16")}, r"noise is float16"),
        ([1], {"noise": changed(noise(1), np.nan)}, r"noise has values that are NaN or infinite"),
        ([1], {"noise": changed(noise(1), np.inf)}, r"noise has values that are NaN or infinite"),
        ([1], {"noise": noise(1), "seed": 0}, r"noise and seed are both given"),
        ([1], {"seed": -1}, r"seed is -1; it must be a whole number"),
        ([1], {"seed": 1.5}, r"seed is 1.5"),
        ([1], {"guidance_scale": float("nan")}, r"guidance_scale is nan; it must be a finite number"),
        ([1], {"guidance_scale": float("-inf")}, r"guidance_scale is -inf; it must be a finite number"),
        ([1], {"guidance_scale": 1e300}, r"guidance_scale is 1e\+300; .* finite number, in float32"),
        ([1], {"guidance_scale": 10**400}, r"guidance_scale is 10{400}; .* finite number, in float32"),
        ([1], {"guidance_scale": "4"}, r"guidance_scale is '4'"),
        ([1], {"guidance_scale": [4.0]}, r"guidance_scale is \[4.0\]"),
    ],
)
def test_an_unfit_argument_is_refused_before_anything_runs(runner, labels, options, message):
    with pytest.raises(L2CError, match=message) as caught:
        runner.sample(labels, **options)
    assert "\n" not in str(caught.value)


def test_guidance_for_a_bundle_without_it_is_refused(tmp_path):
    runner = Runner.load(handmade.write_bundle(tmp_path / "plain", guidance=False))
    with pytest.raises(L2CError, match=r"built without guidance.* build without --no-guidance"):
        runner.sample([1], guidance_scale=1.0)


def test_a_fixed_batch_is_said(tmp_path):
    runner = Runner.load(handmade.write_bundle(tmp_path / "fixed", batch=(3, 3)))
    with pytest.raises(L2CError, match=r"1 images in one batch; .* built for batch 3: build with"):
        runner.session(1)
    assert runner.sample([1], seed=0).shape == (1, *LATENT)


def test_a_range_of_batches_is_said(runner):
    with pytest.raises(
        L2CError, match=r"5 images in one batch; .* for batches of 1 to 4: .*sample\(\)"
    ):
        runner.session(5)


def test_labels_must_fill_a_session(runner):
    with pytest.raises(L2CError, match="3 labels for a session of batch 2"):
        runner.session(2).start([1, 2, 3])


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2"])
def test_threads_must_be_a_number(bundle, threads):
    with pytest.raises(L2CError, match="threads is"):
        Runner.load(bundle, threads=threads)


def test_an_unknown_backend_is_refused(bundle):
    with pytest.raises(L2CError, match="unknown backend 'trt9'; known: ort"):
        Runner.load(bundle, backend="trt9")


def test_a_backend_that_is_not_installed_says_how(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "l2c_export.runtime.ort", raising=False)
    with pytest.raises(UnsupportedError, match=r"onnxruntime.*pip install 'l2c-export\[ort\]'"):
        Runner.load(bundle)


def test_each_graph_that_is_loaded_is_logged(bundle, caplog):
    with caplog.at_level("INFO", logger="l2c_export"):
        runner = Runner.load(bundle)
    said = [record.getMessage() for record in caplog.records]
    for name in runner._graphs:
        path = re.escape(str(bundle / f"{name}.onnx"))
        assert sum(bool(re.fullmatch(rf"loaded {path} in \d+\.\d{{3}} s", line)) for line in said) == 1


# -- files --------------------------------------------------------------------------------------


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name",
    ["weights.safetensors", "conditioning.onnx", "full.onnx", "step-cccc.onnx", "step-rrrr.onnx"],
)
def test_a_flipped_byte_is_refused_with_the_files_name(tmp_path, name):
    bundle = handmade.write_bundle(tmp_path / "bundle")
    flip_byte(bundle / name)
    with pytest.raises(L2CError, match=f"{name} does not match its digest"):
        Runner.load(bundle)


def test_a_backend_gets_no_graph_before_the_small_files_are_checked(tmp_path, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "fake", f"{__name__}:FailingBackend")
    bundle = handmade.write_bundle(tmp_path / "bundle")
    with pytest.raises(L2CError, match="handed conditioning"):
        Runner.load(bundle, backend="fake")
    flip_byte(bundle / "full.onnx")
    with pytest.raises(L2CError, match=r"full.onnx does not match its digest") as caught:
        Runner.load(bundle, backend="fake")
    assert caught.value.__context__ is None  # nothing failed before


def test_damaged_weights_are_said_instead_of_a_backends_error(tmp_path, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "fake", f"{__name__}:FailingBackend")
    bundle = handmade.write_bundle(tmp_path / "bundle")
    flip_byte(bundle / "weights.safetensors")
    with pytest.raises(L2CError, match=r"weights.safetensors does not match its digest") as caught:
        Runner.load(bundle, backend="fake")
    assert "handed conditioning" in str(caught.value.__context__)


def test_a_graph_that_the_backend_does_not_take_is_named(tmp_path):
    bundle = handmade.write_bundle(tmp_path / "bundle")
    manifest = read_bundle(bundle).manifest
    (bundle / "step-cccc.onnx").write_bytes(b"no protobuf")
    files = {p.name: File(p.stat().st_size, sha256(p)) for p in bundle.iterdir() if p.name != MANIFEST}
    write_manifest(bundle, replace(manifest, files=files))
    with pytest.raises(L2CError, match=r"onnxruntime .* cannot load .*step-cccc.onnx: .*Protobuf") as e:
        Runner.load(bundle)
    assert "\n" not in str(e.value)


def test_a_graph_with_an_input_that_nothing_provides_is_refused(tmp_path):
    bundle = handmade.write_bundle(tmp_path / "bundle")
    manifest = read_bundle(bundle).manifest
    first = manifest.graphs["step-cccc"]
    graph = replace(first, inputs=(*first.inputs, Value("mask", "float32", ("rows",))))
    write_manifest(bundle, replace(manifest, graphs=manifest.graphs | {"step-cccc": graph}))
    with pytest.raises(L2CError, match=r"graph step-cccc has the value 'mask' .* has nothing for it"):
        Runner.load(bundle).sample([1])


def test_a_dtype_that_numpy_lacks_is_refused(tmp_path):
    bundle = handmade.write_bundle(tmp_path / "bundle")
    manifest = read_bundle(bundle).manifest
    write_manifest(bundle, replace(manifest, slots=replace(manifest.slots, dtype="bfloat16")))
    with pytest.raises(UnsupportedError, match="holds bfloat16 values; this runner knows"):
        Runner.load(bundle).session(1)


def test_a_cut_off_file_is_refused(tmp_path):
    bundle = handmade.write_bundle(tmp_path / "bundle")
    (bundle / "weights.safetensors").write_bytes(b"")
    with pytest.raises(L2CError, match=r"weights.safetensors has 0 bytes"):
        Runner.load(bundle)


def test_the_full_graph_is_never_loaded_and_the_uncached_one_only_when_used(bundle, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "fake", f"{__name__}:FakeBackend")
    loaded, lock = [], threading.Lock()

    def load(self, graph):
        with lock:
            loaded.append(graph)
        return FakeGraph(self, graph)

    monkeypatch.setattr(FakeBackend, "load", load)
    runner = Runner.load(bundle, backend="fake")
    runner.manifest.__dict__["uncached"] = "full"  # a program that does not use its uncached graph
    before = list(loaded)
    assert "full" not in before
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: runner.sample([1], seed=seed, cached=False), range(8)))
    assert loaded == [*before, "full"]


def in_a_process(code: str) -> str:
    """Run code where nothing has been set up; return what it prints."""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    return out.stdout


def test_each_session_has_the_threads_that_were_asked_for(bundle):
    code = f"""
import os, time
from l2c_export.runtime import Runner
def threads():
    time.sleep(0.3)  # a thread that has been joined may still be listed
    return len(os.listdir("/proc/self/task"))
Runner.load({str(bundle)!r}, threads=1)  # what importing and loading leave behind
before, one = threads(), Runner.load({str(bundle)!r}, threads=1)
between, three = threads(), Runner.load({str(bundle)!r}, threads=3)
print(between - before, threads() - between - 2 * len(three._graphs))
"""
    assert in_a_process(code).split() == ["0", "0"]


def test_a_host_application_keeps_its_own_sessions(bundle):
    """Neither a runner before it nor settings for the whole process may be in its way."""
    code = f"""
import onnxruntime as ort
from l2c_export.runtime import Runner
session = lambda **k: ort.InferenceSession({str(bundle / "conditioning.onnx")!r}, **k)
session()
Runner.load({str(bundle)!r}).sample([1], seed=0)
session()
"""
    assert in_a_process(code) == ""


def test_a_host_application_may_have_a_global_thread_pool_and_arena(bundle, runner, tmp_path):
    code = f"""
import onnxruntime as ort, numpy as np
ort.set_global_thread_pool_sizes(2, 1)
memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
ort.create_and_register_allocator(memory, None)
from l2c_export.runtime import Runner
np.save({str(tmp_path / "x.npy")!r}, Runner.load({str(bundle)!r}).sample([1], seed=0))
"""
    assert in_a_process(code) == ""
    assert np.array_equal(np.load(tmp_path / "x.npy"), runner.sample([1], seed=0))
