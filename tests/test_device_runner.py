"""The device runner over host memory, which is strict: what it computes, and what it asks for when."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import handmade
import numpy as np
import pytest
from handmade import LATENT, PROGRAM, SLOTS
from networks import write_networks

from l2c_export.core.bundle import ProgramCall, read_bundle, write_manifest
from l2c_export.core.engine_archive import unpack_plans
from l2c_export.core.engines import UPDATE, find_engines
from l2c_export.core.sampler_call import is_stochastic
from l2c_export.core.samplers import SAMPLERS, sampler_table
from l2c_export.errors import L2CError, UnsupportedError
from l2c_export.runtime import Runner
from l2c_export.runtime.device import backend as device_backend
from l2c_export.runtime.device import ort_engine
from l2c_export.runtime.device import weights as device_weights
from l2c_export.runtime.device.host import HostDevice
from l2c_export.runtime.device.session import DeviceSession

# A solver with two histories, and one that draws noise: the coefficients are made up.
UPDATES = {
    "histories": lambda i: {
        "x": {"x": 0.9, "output": 0.3, **({"history": 0.1, "history2": -0.05} if i > 1 else {})},
        "history": {"output": 0.5, "x": 0.1},
        **({"history2": {"history": 1.0}} if i else {"history2": {"x": 0.2}}),
    },
    "noise": lambda i: {
        "x": {"x": 0.8, "output": 0.2, **({"noise": 0.3} if i < len(PROGRAM) - 1 else {})}
    },
}


def make_bundle(folder: Path, updates: str = "ddim", **options) -> Path:
    """The handmade bundle with engines that are networks, and another sampler."""
    handmade.write_bundle(folder, **options)
    bundle = read_bundle(folder)
    if updates in UPDATES:
        calls = tuple(
            replace(call, update=UPDATES[updates](i)) for i, call in enumerate(bundle.manifest.calls)
        )
        changed = replace(bundle.manifest, calls=calls, stochastic=updates == "noise")
        write_manifest(folder, changed)
    write_networks(read_bundle(folder))
    return folder


@pytest.fixture(scope="session")
def bundles(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("device")
    return {name: make_bundle(folder / name, name) for name in ("ddim", *UPDATES)}


@pytest.fixture
def runner(bundles) -> Runner:
    return Runner.load(bundles["ddim"], "lookalike", 1)


def device(runner: Runner) -> HostDevice:
    return runner.backend.device


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


# -- what it computes ---------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("graphs", ["trajectory", "call", "none"])
@pytest.mark.parametrize("updates", ["ddim", "histories", "noise"])
def test_a_trajectory_is_that_of_the_host_runner(bundles, updates, graphs, cached):
    host = Runner.load(bundles[updates], threads=1)
    runner = Runner.load(bundles[updates], "lookalike", 1, graphs=graphs)
    for labels in ([3, 7], [5, 5, 0, 9], [1]):
        for seed in (0, 1):  # the second trajectory of a session replays what the first captured
            wanted = host.sample(labels, seed=seed, cached=cached)
            assert distance(runner.sample(labels, seed=seed, cached=cached), wanted) < 1e-6


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_every_sampler_runs_on_the_device_as_on_the_host(tmp_path, name):
    folder = handmade.write_bundle(tmp_path / "bundle")
    manifest = read_bundle(folder).manifest
    table = sampler_table(name, len(PROGRAM))
    calls = tuple(
        replace(call, timestep=made.timestep, update=made.update)
        for call, made in zip(manifest.calls, table, strict=True)
    )
    write_manifest(folder, replace(manifest, calls=calls, stochastic=is_stochastic(table)))
    write_networks(read_bundle(folder))
    host = Runner.load(folder, threads=1)
    runner = Runner.load(folder, "lookalike", 1)
    for seed in (0, 1):
        wanted = host.sample([3, 7], seed=seed)
        assert distance(runner.sample([3, 7], seed=seed), wanted) < 1e-6


def test_it_is_the_references_too(runner):
    x = np.random.default_rng(0).standard_normal((2, *LATENT), dtype=np.float32)
    assert distance(runner.sample([3, 7], noise=x), handmade.reference([3, 7], x)) < 1e-5
    scaled = runner.sample([3, 7], noise=x, guidance_scale=3)
    assert distance(scaled, handmade.reference([3, 7], x, scale=3)) < 1e-5


def test_a_bundle_without_guidance(tmp_path):
    folder = make_bundle(tmp_path / "plain", guidance=False)
    wanted = Runner.load(folder, threads=1).sample([4, 4], seed=0)
    assert distance(Runner.load(folder, "lookalike", 1).sample([4, 4], seed=0), wanted) < 1e-6


@pytest.mark.parametrize("updates", ["ddim", "histories", "noise"])
@pytest.mark.parametrize("graphs", ["trajectory", "call"])
def test_calls_can_be_run_one_by_one_at_any_time(bundles, updates, graphs):
    host = Runner.load(bundles[updates], threads=1).session(2)
    session = Runner.load(bundles[updates], "lookalike", 1, graphs=graphs).session(2)
    for start in range(3):  # before and after graphs were captured
        session.start([3, 7], seed=start)
        host.start([3, 7], seed=start)
        assert np.array_equal(session.x, host.x)
        for wanted, call in zip(host, session, strict=True):
            assert (call.index, call.timestep) == (wanted.index, wanted.timestep)
            assert distance(call.x, wanted.x) < 1e-6
            assert distance(call.output, wanted.output) < 1e-6
            for slot in host._held:
                assert distance(session.slot(slot), host.slot(slot)) < 1e-6
            assert session._held == host._held
        with pytest.raises(L2CError, match="the trajectory is over"):
            session.step()
        session.start([3, 7], seed=start)
        session.step()
        session.run()  # the rest of a trajectory that was begun by hand
        assert distance(session.x, host.x) < 1e-6
        session.start([3, 7], seed=start)
        session.run()
        assert distance(session.x, host.x) < 1e-6
        assert session._held == host._held


def test_a_single_call_leaves_the_trajectory_where_it_is(bundles):
    host = Runner.load(bundles["ddim"], threads=1).session(2)
    session = Runner.load(bundles["ddim"], "lookalike", 1).session(2)
    for one in (host, session):
        one.start([3, 7], seed=0)
        one.step()
    x, reads = host.x.copy(), {"00.attn": 2 * host.slot("00.attn")}
    wanted, slots = host.run_call(1, x, reads)
    found, writes = session.run_call(1, x, reads)
    assert distance(found, wanted) < 1e-6
    assert {name: distance(writes[name], slots[name]) < 1e-6 for name in slots} == dict.fromkeys(
        PROGRAM[1][1], True
    )
    session.run_call(5, x, {"01.attn": reads["00.attn"]})
    host.run()
    session.run()
    assert distance(session.x, host.x) < 1e-6


@pytest.mark.parametrize("rows", [16, 17, 100])
def test_the_conditioning_does_not_depend_on_how_much_of_it_is_kept(tmp_path, rows):
    folder = make_bundle(tmp_path / "bundle")
    bundle = read_bundle(folder)
    wanted = Runner.load(folder, threads=1).sample([1, 2, 2, 5], seed=0)
    write_networks(bundle, rows=rows)
    runner = Runner.load(folder, "lookalike", 1)
    session = runner.session(4)
    assert session._table.calls == min(len(PROGRAM), rows // 8)
    for _ in range(2):
        session.start([1, 2, 2, 5], seed=0)
        session.run()
        assert distance(session.x, wanted) < 1e-6
    session.start([1, 2, 2, 5], seed=0)
    for call in session:
        session.run_call(0, call.x)  # takes the table elsewhere
    assert distance(session.x, wanted) < 1e-6


# -- memory -------------------------------------------------------------------------------------


def overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[0] + b[1] and b[0] < a[0] + a[1]


@pytest.mark.parametrize("updates", ["ddim", "histories", "noise"])
def test_no_engine_writes_what_it_reads_and_every_address_is_aligned(bundles, updates):
    runner = Runner.load(bundles[updates], "lookalike", 1)
    runner.sample([3, 7], seed=0)
    runs = [work for work in device(runner).done if work.kind == "run"]
    assert len(runs) >= 2 * 2 * len(PROGRAM)
    for work in runs:
        for i, place in enumerate(work.writes):
            assert place[0] % 256 == 0
            others = (*work.reads, *work.writes[i + 1 :])
            assert not any(overlap(place, other) for other in others), work.what
        assert all(address % 256 == 0 for address, _ in work.reads)


@pytest.mark.parametrize("updates", ["ddim", "histories", "noise"])
@pytest.mark.parametrize("graphs", ["trajectory", "none"])
def test_nothing_is_read_before_it_is_written(bundles, updates, graphs):
    runner = Runner.load(bundles[updates], "lookalike", 1, graphs=graphs)
    for cached in (True, False):
        runner.sample([3, 7], seed=0, cached=cached)
    written = Written()
    for work in device(runner).done:
        for place in work.reads:
            assert place in written, f"{work.kind} {work.what} reads what nobody wrote"
        for place in work.writes:
            written.add(place)


class Written:
    """Bytes that somebody wrote, as ranges that neither touch nor overlap."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def add(self, place: tuple[int, int]) -> None:
        begin, end = place[0], place[0] + place[1]
        near = [r for r in self.ranges if r[0] <= end and begin <= r[1]]
        self.ranges = [r for r in self.ranges if r not in near]
        self.ranges.append((min([begin, *(r[0] for r in near)]), max([end, *(r[1] for r in near)])))

    def __contains__(self, place: tuple[int, int]) -> bool:
        return any(r[0] <= place[0] and place[0] + place[1] <= r[1] for r in self.ranges)


def test_all_contexts_of_a_session_have_one_scratch_memory(runner):
    runner.sample([3, 7], seed=0)
    runs = [work for work in device(runner).done if work.kind == "run"]
    assert len({work.what for work in runs}) == len(set(runner.manifest.step_graphs())) + 2
    assert len({work.writes[-1] for work in runs}) == 1
    assert runs[0].writes[-1][1] == 4096


def test_scratch_that_grows_is_counted(runner, monkeypatch):
    session = runner.session(1)
    before = session.bytes["scratch"]
    monkeypatch.setattr(runner.backend.engine(runner.manifest.calls[0].graph), "scratch", 1 << 14)
    session.start([1], seed=0)
    session.run()
    assert session.bytes["scratch"] == before + (1 << 14)


def test_the_weights_are_on_the_device_once_for_all_engines_and_sessions(runner):
    for batch in (1, 2, 3):
        runner.sample([1] * batch, seed=0)
    asked = device(runner).asked
    assert asked.count(("allocate", "the weights")) == 1
    stored = sum(array.nbytes for name, array in handmade.weights().items() if name not in INLINED)
    reads = {place for work in device(runner).done for place in work.reads if inside(runner, place)}
    assert sum(size for _, size in reads) == stored


INLINED = {"label", "time"}  # not read by matrix products: constants of the engines


def inside(runner: Runner, place: tuple[int, int]) -> bool:
    weights = runner.backend.weights
    return weights["in"] <= place[0] < weights["in"] + weights.size


def test_plans_are_in_host_memory_one_at_a_time(bundles, monkeypatch):
    """With weights inside they are as large as all the weights, each."""
    bundle, alive, held = read_bundle(bundles["ddim"]), set(), []
    others = tuple(call for call in bundle.manifest.calls if call.graph != bundle.manifest.uncached)
    bundle = replace(bundle, manifest=replace(bundle.manifest, calls=others))

    class Plan(bytes):
        """Bytes that tell when they are gone."""

        def __del__(self):
            alive.remove(id(self))

    def unpack(*found):
        for record, plan in unpack_plans(*found):
            copied = Plan(plan)
            alive.add(id(copied))
            yield record, copied

    def load(record, plan):
        held.append(len(alive))
        return SimpleNamespace(graph=record.graph)

    monkeypatch.setattr(device_backend, "unpack_plans", unpack)
    (found,) = find_engines(bundle)
    made = device_backend.DeviceBackend(bundle, HostDevice(), found, load, name="a test")
    assert not alive
    assert max(held) <= 2  # the one that is loaded, and the one before it
    assert len(held) == len(set(bundle.manifest.step_graphs())) + 2
    graph = bundle.manifest.uncached  # which no call of the program runs
    assert made.load(graph).graph == graph
    assert made.load(graph).graph == graph
    assert len(held) == len(found[1].engines)


def test_sessions_share_no_buffer(runner):
    first, second = runner.session(2), runner.session(2)
    for session in (first, second):
        session.start([1, 2], seed=0)
        session.run()
        device(runner).done.clear()
    places = []
    for session in (first, second):
        device(runner).done.clear()
        session.start([1, 2], seed=0)
        session.run()
        _ = session.x
        works = [w for w in device(runner).done if w.kind in ("run", "copy", "fill", "upload")]
        places.append({place for work in works for place in work.writes})
    assert not any(overlap(a, b) for a in places[0] for b in places[1])


def test_a_closed_session_leaves_nothing_behind(runner):
    free = device(runner).memory().free
    session = runner.session(2)
    session.start([1, 2], seed=0)
    session.run()
    taken = sum(session.bytes.values())
    assert free - device(runner).memory().free == taken
    session.close()
    assert device(runner).memory().free == free
    assert not device(runner)._graphs
    session.close()


def test_too_little_memory_is_said_with_the_numbers_and_leaves_nothing(bundles, monkeypatch):
    runner = Runner.load(bundles["ddim"], "lookalike", 1)
    free = device(runner).memory().free
    monkeypatch.setattr(device(runner), "limit", device(runner).limit - free + 9000)
    with pytest.raises(
        UnsupportedError, match=r"\d+ bytes for a session of batch 4 do not fit: .* has 9000 free"
    ):
        runner.sample([1, 2, 3, 4])
    assert device(runner).memory().free == 9000


# -- graphs -------------------------------------------------------------------------------------


def asked_in_a_trajectory(runner: Runner, session: DeviceSession) -> list[str]:
    """What the host asks of the device after the inputs are there, until the results are wanted."""
    session.start([3, 7], seed=1)
    before = len(device(runner).asked)
    session.run()
    return [" ".join(part for part in what if part) for what in device(runner).asked[before:]]


def test_a_trajectory_is_one_launch(runner):
    session = runner.session(2)
    alone = len(set(runner.manifest.step_graphs())) + 2
    assert asked_in_a_trajectory(runner, session).count("begin capture") == alone + 1
    for _ in range(2):
        assert asked_in_a_trajectory(runner, session) == ["launch"]


def test_or_a_launch_a_call(bundles):
    runner = Runner.load(bundles["ddim"], "lookalike", 1, graphs="call")
    session = runner.session(2)
    alone = len(set(runner.manifest.step_graphs())) + 2
    assert asked_in_a_trajectory(runner, session).count("begin capture") == alone + len(PROGRAM)
    assert asked_in_a_trajectory(runner, session) == ["launch"] * len(PROGRAM)


def test_or_nothing_but_engines_between_which_the_host_does_not_wait(bundles):
    runner = Runner.load(bundles["ddim"], "lookalike", 1, graphs="none")
    session = runner.session(2)
    steps = [f"run {call.graph}" for call in runner.manifest.calls]
    updates = [f"run {UPDATE}"] * len(steps)
    calls = [work for pair in zip(steps, updates, strict=True) for work in pair]
    copies = ["copy"] * len(PROGRAM)  # of the conditioning's rows to aligned ones
    for _ in range(2):
        assert asked_in_a_trajectory(runner, session) == ["copy", "run conditioning", *copies, *calls]


def test_every_context_runs_before_it_is_captured(runner):
    runner.sample([3, 7], seed=0)
    asked, during, capturing = device(runner).asked, [], False
    before = asked[: asked.index(("begin capture", ""))]
    for what in asked:
        capturing = what[0] == "begin capture" or (capturing and what[0] != "end capture")
        during += [what] * capturing
    assert {what for kind, what in during if kind == "run"} == {w for k, w in before if k == "run"}
    assert not {kind for kind, _ in during} & {"allocate", "free", "synchronize", "upload", "download"}


# -- streams, threads, arrays ---------------------------------------------------------------------


def test_nothing_runs_before_somebody_waits(runner):
    session = runner.session(2)
    session.start([3, 7], seed=0)
    session.run()
    session.start([3, 7], seed=1)
    device(runner).done.clear()
    session.run()
    assert not any(work.kind == "run" for work in device(runner).done)
    _ = session.x
    assert sum(work.kind == "run" for work in device(runner).done) == 2 * len(PROGRAM) + 1


def test_the_callers_stream_is_waited_for_and_waits(runner, bundles):
    host = Runner.load(bundles["ddim"], threads=1)
    stream = device(runner).create_stream()
    noise = runner.enqueue([3, 7], stream, seed=4)  # any array on the device will do
    first = host.sample([3, 7], seed=4)
    for _ in range(2):
        latents = runner.enqueue([1, 2], stream, noise=noise)
        assert latents.stream == stream
        assert distance(latents.numpy(), host.sample([1, 2], noise=first)) < 1e-5
    again = runner.enqueue([1, 2], stream, noise=noise, out=noise)
    assert again is noise
    assert distance(np.from_dlpack(again), host.sample([1, 2], noise=first)) < 1e-5


def test_work_that_the_caller_has_enqueued_comes_first(runner, bundles):
    mine = device(runner).create_stream()
    first = runner.enqueue([3], mine, seed=4)
    zeros = runner.enqueue([3], mine, seed=5)
    device(runner).fill(zeros.address, 0, zeros.nbytes, mine)  # not done yet when noise is taken
    found = runner.enqueue([1], mine, noise=zeros, out=first)
    device(runner).fill(zeros.address, 0xFF, zeros.nbytes, mine)  # nor may this come before it
    zero = np.zeros((1, *LATENT), np.float32)
    assert (
        distance(found.numpy(), Runner.load(bundles["ddim"], threads=1).sample([1], noise=zero)) < 1e-6
    )


def test_our_stream_waits_for_the_callers_whichever_is_looked_at_first(runner, bundles):
    mine = device(runner).create_stream()
    out = runner.enqueue([3], mine, seed=4)
    device(runner).fill(out.address, 0, out.nbytes, mine)
    runner.enqueue([1], mine, seed=5, out=out)
    device(runner).synchronize(runner._idle[0].stream)
    assert distance(out.numpy(), Runner.load(bundles["ddim"], threads=1).sample([1], seed=5)) < 1e-6


def test_a_result_outlives_its_session(runner, bundles):
    wanted = Runner.load(bundles["ddim"], threads=1).sample([1], seed=0)
    session = runner.session(1)
    session.start([1], seed=0)
    session.run()
    closed = session.result()
    session.close()
    session = runner.session(1)
    session.start([1], seed=0)
    session.run()
    dropped = session.result()
    del session
    assert distance(closed.numpy(), wanted) < 1e-6
    assert distance(np.from_dlpack(dropped), wanted) < 1e-6
    del closed, dropped
    assert not device(runner)._streams


def test_the_result_of_one_session_may_take_that_of_another(runner, bundles):
    first, second = runner.session(1), runner.session(1)
    first.start([1], seed=0)
    first.run()
    array = first.result()  # which is not there yet
    second.start([2], seed=1)
    second.run()
    assert second.result(out=array) is array
    wanted = Runner.load(bundles["ddim"], threads=1).sample([2], seed=1)
    assert distance(array.numpy(), wanted) < 1e-6
    assert distance(first.x, Runner.load(bundles["ddim"], threads=1).sample([1], seed=0)) < 1e-6
    assert distance(array.numpy(), wanted) < 1e-6  # whichever is looked at first


@pytest.mark.parametrize("updates", ["ddim", "noise"])
@pytest.mark.parametrize("graphs", ["trajectory", "none"])
def test_the_host_is_at_most_two_trajectories_ahead_and_waits_for_nothing_else(
    bundles, updates, graphs
):
    runner = Runner.load(bundles[updates], "lookalike", 1, graphs=graphs)
    mine = device(runner).create_stream()
    kept = [runner.enqueue([1], mine, seed=0)]
    kept[0].numpy()
    device(runner).done.clear()
    for seed, whole in ((1, 0), (2, 0), (3, 1), (4, 2)):
        kept.append(runner.enqueue([1], mine, seed=seed))
        updated = [work for work in device(runner).done if work.what == UPDATE]
        assert len(updated) == whole * len(PROGRAM)
    host = Runner.load(bundles[updates], threads=1)
    for seed, array in enumerate(kept):
        assert distance(array.numpy(), host.sample([1], seed=seed)) < 1e-6
    out = kept[0]
    device(runner).done.clear()
    for seed in (5, 6):
        runner.enqueue([1], mine, seed=seed, out=out)
    assert not [work for work in device(runner).done if work.what == UPDATE]
    assert distance(out.numpy(), host.sample([1], seed=6)) < 1e-6


def test_noise_is_the_callers_again_once_it_is_copied(runner):
    mine = device(runner).create_stream()
    noise = runner.enqueue([3], mine, seed=4)
    wanted = noise.numpy()
    session = runner.session(1)
    session.start([1], noise, stream=mine)
    device(runner).fill(noise.address, 0, noise.nbytes, mine)
    device(runner).synchronize(mine)
    assert np.array_equal(session.x, wanted)


def test_arrays_that_do_not_fit_are_refused(runner):
    stream = device(runner).create_stream()
    two = runner.enqueue([3, 7], stream, seed=0)
    with pytest.raises(
        L2CError, match=r"noise has shape \(2, 3, 4, 4\); this bundle needs \(1, 3, 4, 4\)"
    ):
        runner.enqueue([3], stream, noise=two)
    with pytest.raises(
        L2CError, match=r"out is float32 \(2, 3, 4, 4\); this bundle needs float32 \(1,"
    ):
        runner.enqueue([3], stream, seed=0, out=two)
    with pytest.raises(L2CError, match="out is not in the memory of host memory in place of a device"):
        runner.enqueue([3], stream, seed=0, out=np.zeros((1, *LATENT), np.float32))
    with pytest.raises(L2CError, match="5 images in one batch"):
        runner.enqueue([1] * 5, stream)


def test_a_backend_without_a_device_has_no_stream(bundles):
    with pytest.raises(UnsupportedError, match=r"onnxruntime .* has no stream: use sample\(\)"):
        Runner.load(bundles["ddim"], threads=1).enqueue([1], 0)


def test_sessions_may_be_interleaved(bundles):
    host, runner = (
        Runner.load(bundles["histories"], threads=1),
        Runner.load(bundles["histories"], "lookalike", 1),
    )
    sessions = [runner.session(2), runner.session(2), runner.session(1)]
    labels = [[3, 7], [1, 1], [9]]
    for seed, (session, given) in enumerate(zip(sessions, labels, strict=True)):
        session.start(given, seed=seed)
    for _ in range(2):
        for session in sessions:
            session.step()
    for session in reversed(sessions):
        session.run()
    for seed, (session, given) in enumerate(zip(sessions, labels, strict=True)):
        assert distance(session.x, host.sample(given, seed=seed)) < 1e-6


def test_several_threads_may_sample(bundles):
    host, runner = (
        Runner.load(bundles["noise"], threads=1),
        Runner.load(bundles["noise"], "lookalike", 1),
    )
    found: dict[int, np.ndarray] = {}

    def work(seed: int) -> None:
        for _ in range(3):
            found[seed] = runner.sample([seed, 2], seed=seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, latents in found.items():
        assert distance(latents, host.sample([seed, 2], seed=seed)) < 1e-6
    assert len(found) == 4


# -- what goes wrong -------------------------------------------------------------------------------


def test_a_session_is_started_before_it_is_used_and_not_closed(runner):
    session = runner.session(1)
    uses = (
        session.run,
        session.step,
        session.result,
        lambda: session.x,
        lambda: session.slot("00.attn"),
        lambda: session.run_call(0, np.zeros((1, *LATENT), np.float32)),
    )
    for use in uses:
        with pytest.raises(L2CError, match=r"no trajectory was started; begin one with start\(\)"):
            use()
    session.start([1], seed=0)
    session.close()
    for use in (*uses, lambda: session.start([1], seed=0)):
        with pytest.raises(L2CError, match="the session is closed; make another"):
            use()


def test_weights_that_cannot_be_uploaded_are_said_and_leave_nothing(bundles, monkeypatch):
    made = []

    class Failing(HostDevice):
        def __init__(self):
            super().__init__()
            made.append(self)

        def upload(self, target, source, stream):
            raise L2CError("cudaMemcpyAsync failed with cudaErrorLaunchFailure")

    monkeypatch.setattr("l2c_export.runtime.device.host.HostDevice", Failing)
    assert "cudaErrorLaunchFailure" in refused(bundles["ddim"])
    assert made[0].memory().free == made[0].limit
    assert not made[0]._streams


def test_nor_do_streams_without_memory_to_copy_from(bundles, monkeypatch):
    pinned = HostDevice.pinned
    device, asked = HostDevice(), []

    def refuse(self, size):
        asked.append(size)
        if len(asked) == 2:
            raise UnsupportedError("no memory")
        return pinned(self, size)

    monkeypatch.setattr(HostDevice, "pinned", refuse)
    with pytest.raises(UnsupportedError, match="no memory"):
        device_weights.DeviceWeights(device, bundles["ddim"] / "weights.safetensors", ())
    assert not device._streams


def test_no_graph_is_kept_of_a_single_call(runner, monkeypatch):
    once, run = [], ort_engine._HostContext.execute_async_v3

    def run_once(self, stream):
        once.append(self._bound.record.graph)
        return run(self, stream)

    monkeypatch.setattr(ort_engine._HostContext, "execute_once", run_once, raising=False)
    session = runner.session(1)
    session.start([1], seed=0)
    session.run()
    session.run_call(0, session.x)
    session.start([1], seed=1)
    session.run()
    assert once == [runner.manifest.calls[0].graph]


# -- engines that do not fit ----------------------------------------------------------------------


def refused(folder: Path, **options) -> str:
    with pytest.raises(L2CError) as caught:
        Runner.load(folder, "lookalike", 1, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_bundle_without_engines_says_how_to_build_them(tmp_path):
    folder = handmade.write_bundle(tmp_path / "bundle")
    assert refused(folder) == (
        f"{folder} has no engines for ort-cuda opset20 on this device; build them: "
        f"l2c-export engines {folder} --backend ort-cuda"
    )


def test_engines_of_another_version_or_bundle_are_refused(tmp_path):
    folder = handmade.write_bundle(tmp_path / "bundle")
    write_networks(read_bundle(folder), version="opset99")
    said = refused(folder)
    assert "ort-opset99-portable was built with ort-cuda opset99, this machine has opset20" in said
    write_networks(read_bundle(folder))
    manifest = read_bundle(folder).manifest
    call = manifest.calls[0]
    other = replace(
        manifest, latent=(3, 8, 8), calls=(ProgramCall(**vars_of(call)), *manifest.calls[1:])
    )
    write_manifest(folder, other)
    assert "was built from another update than the bundle's" in refused(folder)


def vars_of(call: ProgramCall) -> dict:
    return {name: getattr(call, name) for name in ("graph", "timestep", "update", "reads", "writes")}


def test_a_damaged_plan_is_refused(tmp_path):
    folder = make_bundle(tmp_path / "bundle")
    archive = next(folder.glob("engines/*/plans.xz"))
    archive.write_bytes(archive.read_bytes()[:-40])
    assert "plans.xz" in refused(folder)


def test_options_are_checked(bundles):
    assert "has no option 'graph'; its options: graphs" in refused(bundles["ddim"], graph="call")
    assert refused(bundles["ddim"], graphs="all") == (
        "graphs is 'all'; it must be one of: trajectory, call, none"
    )


def test_slots_are_those_of_the_manifest(runner):
    session = runner.session(1)
    session.start([1], seed=0)
    session.step()
    with pytest.raises(L2CError, match=r"slot .00\.mlp. is not stored after 1 calls"):
        session.slot("00.mlp")
    with pytest.raises(L2CError, match=r"call 1 reads \['00.attn'\], not \[\]"):
        session.run_call(1, session.x)
    with pytest.raises(L2CError, match="there is no call 6"):
        session.run_call(6, session.x)
    with pytest.raises(L2CError, match="3 labels for a session of batch 1"):
        session.start([1, 2, 3])
    assert set(SLOTS) == set(runner.manifest.slots.names)
