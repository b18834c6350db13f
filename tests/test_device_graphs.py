"""Graphs of a trajectory that lack something, do something else, or cannot be made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from handmade import PROGRAM
from test_device_runner import distance, make_bundle

from l2c_export.core.bundle import CONDITIONING, read_bundle
from l2c_export.core.engines import UPDATE
from l2c_export.errors import L2CError, UnsupportedError
from l2c_export.runtime import Runner
from l2c_export.runtime.device import graphs as device_graphs
from l2c_export.runtime.device import ort_engine
from l2c_export.runtime.device.host import HostDevice

HOST = "l2c_export.runtime.device.host.HostDevice"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("graphs") / "bundle")


def engines(bundle: Path) -> list[str]:
    return [CONDITIONING, UPDATE, *read_bundle(bundle).manifest.step_graphs()]


def found_out(bundle: Path, graphs: str) -> str:
    """What is said, by the first trajectory of a session and by its second."""
    runner = Runner.load(bundle, "lookalike", 1, graphs=graphs)
    said = set()
    for seed in range(2):
        with pytest.raises(L2CError) as caught:
            runner.sample([1], seed=seed)
        said.add(str(caught.value))
    assert len(runner._idle) == 1
    assert not runner.backend.device._graphs
    (message,) = said
    return message


class EmptyGraphs(HostDevice):
    """Captures nothing, as where a context runs on another device than the stream."""

    def end_capture(self, stream):
        super().end_capture(stream)
        return []


@pytest.mark.parametrize("graphs", ["trajectory", "call"])
def test_a_graph_of_nothing(bundle, monkeypatch, graphs):
    monkeypatch.setattr(HOST, EmptyGraphs)
    assert "is empty: the engine runs on another device" in found_out(bundle, graphs)


@pytest.mark.parametrize("graphs", ["trajectory", "call"])
def test_a_graph_that_one_engine_is_never_in(bundle, monkeypatch, graphs):
    """As where one context of several runs on another stream."""

    class Lacking(HostDevice):
        def submit(self, stream, work):
            if stream not in self._capturing or work.what != lacking:
                super().submit(stream, work)

    monkeypatch.setattr(HOST, Lacking)
    for lacking in engines(bundle):
        assert f"a captured graph of the engine of {lacking} is empty" in found_out(bundle, graphs)


@pytest.mark.parametrize("work", range(2 + 3 * len(PROGRAM)))
def test_a_graph_that_one_engine_or_copy_is_once_not_in(bundle, monkeypatch, work):
    class Lacking(HostDevice):
        def end_capture(self, stream):
            works = super().end_capture(stream)
            return works if len(works) == 1 else works[:work] + works[work + 1 :]

    monkeypatch.setattr(HOST, Lacking)
    assert "it lacks some of them" in (said := found_out(bundle, "trajectory"))
    assert said.endswith("run with graphs='none', and report the driver and backend versions")


@pytest.mark.parametrize("graphs", ["trajectory", "call"])
@pytest.mark.parametrize("engine", [CONDITIONING, UPDATE, "step"])
def test_a_graph_of_engines_that_do_nothing(bundle, monkeypatch, graphs, engine):
    """As where they run on buffers that are no longer there; what the warm-up left is of no help."""
    idle = engines(bundle)[2:] if engine == "step" else [engine]

    class Stale(HostDevice):
        def end_capture(self, stream):
            return [
                replace(work, run=lambda: None) if work.what in idle else work
                for work in super().end_capture(stream)
            ]

    monkeypatch.setattr(HOST, Stale)
    assert "does not compute what its engines compute: it is stale" in found_out(bundle, graphs)


def falls_back(bundle: Path, caplog) -> str:
    """The one warning, where trajectories are right nevertheless."""
    runner = Runner.load(bundle, "lookalike", 1)
    session = runner.session(1)
    for seed in range(2):
        session.start([1], seed=seed)
        session.run()
        wanted = Runner.load(bundle, threads=1).sample([1], seed=seed)
        assert distance(session.x, wanted) < 1e-6
    assert session.graphs == "none"
    assert not runner.backend.device._graphs
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    return warning.removeprefix("calls are enqueued one by one, since no graph can be captured: ")


def test_where_nothing_can_be_captured_calls_are_enqueued(bundle, monkeypatch, caplog):
    class NoGraphs(HostDevice):
        def capture(self, stream, enqueue):
            raise UnsupportedError("operation not permitted when stream is capturing")

    monkeypatch.setattr(HOST, NoGraphs)
    assert falls_back(bundle, caplog) == "operation not permitted when stream is capturing"


@pytest.mark.parametrize("engine", [CONDITIONING, UPDATE])
def test_or_where_an_engine_refuses_to_be(bundle, monkeypatch, caplog, engine):
    run = ort_engine._HostContext.execute_async_v3

    def refuse(self, stream):
        if stream in self._device._capturing and self._bound.record.graph == engine:
            return False
        return run(self, stream)

    monkeypatch.setattr(ort_engine._HostContext, "execute_async_v3", refuse)
    assert falls_back(bundle, caplog) == f"the engine of {engine} did not run; see the log with -vv"


def test_a_graph_of_numbers_that_are_not_finite_is_still_a_graph():
    one = np.array([1.0, np.nan, np.inf], np.float32)
    assert device_graphs._alike(one, one)
    assert not device_graphs._alike(one, np.array([1.0, 2.0, np.inf], np.float32))
    assert not device_graphs._alike(np.array([1.5], np.float32), np.array([1.0], np.float32))
