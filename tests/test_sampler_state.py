"""The update of a call, and the noise that stochastic samplers draw."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import handmade
import numpy as np
import pytest
from handmade import LATENT, PROGRAM

from l2c_export.core.bundle import Manifest, read_bundle, write_manifest
from l2c_export.core.samplers import Update
from l2c_export.errors import L2CError
from l2c_export.runtime import Runner
from l2c_export.runtime.noise import seeded_noise
from l2c_export.runtime.sampler_state import SamplerState


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return handmade.write_bundle(tmp_path_factory.mktemp("handmade") / "bundle")


def with_updates(bundle: Path, updates: list[Update], *, stochastic: bool = False) -> Manifest:
    manifest = read_bundle(bundle).manifest
    pairs = zip(manifest.calls, updates, strict=True)
    return replace(manifest, stochastic=stochastic, calls=tuple(replace(c, update=u) for c, u in pairs))


@pytest.fixture
def noisy(bundle: Path, tmp_path: Path) -> Runner:
    """The bundle with a sampler that draws noise in every call but the last."""
    folder = handmade.write_bundle(tmp_path / "noisy")
    updates = [
        {"x": {"x": 0.5, "output": 0.25} | ({"noise": 0.5} if i + 1 < len(PROGRAM) else {})}
        for i in range(len(PROGRAM))
    ]
    write_manifest(folder, with_updates(folder, updates, stochastic=True))
    return Runner.load(folder)


def test_all_sources_are_the_values_before_the_update(bundle: Path) -> None:
    swap: Update = {
        "history": {"x": 1.0},
        "x": {"history": 1.0, "output": 2.0, "x": 10.0},
        "history2": {"history": -1.0},
    }
    state = SamplerState(with_updates(bundle, [swap] * len(PROGRAM)), 2)
    state.x[:], state.output[:], state._kept["history"][:] = 3, 5, 7
    x = state.x
    state.apply(0, swap, None)
    assert state.x is x
    assert (x == 7 + 2 * 5 + 10 * 3).all()
    assert (state._kept["history"] == 3).all()
    assert (state._kept["history2"] == -7).all()


def test_a_target_that_is_not_named_keeps_its_value(bundle: Path) -> None:
    first: Update = {"x": {"x": 2.0}, "history": {"x": 1.0}}
    second: Update = {"x": {"history": 1.0}}
    state = SamplerState(with_updates(bundle, [first, *[second] * (len(PROGRAM) - 1)]), 1)
    state.x[:] = 3
    state.apply(0, first, None)
    assert (state.x == 6).all()
    for index in (1, 2):
        state.apply(index, second, None)
        assert (state.x == 3).all()


def test_a_program_with_histories_runs_through_the_session(tmp_path: Path) -> None:
    """Two calls back: x_next = x of the call before + output / 4."""
    folder = handmade.write_bundle(tmp_path / "kept")
    back: Update = {"x": {"history": 1.0, "output": 0.25}, "history": {"x": 1.0}}
    first: Update = {"x": {"x": 1.0, "output": 0.25}, "history": {"x": 1.0}}
    write_manifest(folder, with_updates(folder, [first, *[back] * (len(PROGRAM) - 1)]))
    session = Runner.load(folder).session(2)
    for _ in range(2):  # the second trajectory sees nothing of the first
        session.start([3, 7], seed=1)
        x = session.x.copy()
        before = x
        for call in session:
            expected = before + np.float32(0.25) * call.output
            np.testing.assert_array_equal(call.x, expected)
            before, x = x, expected


def test_an_update_allocates_no_arrays(noisy: Runner) -> None:
    state = SamplerState(replace(noisy.manifest, latent=(4, 64, 64)), 4)
    state.x[:], state.output[:] = 0, 0
    draw = seeded_noise(0, range(4))
    tracemalloc.start()
    for index in range(3):
        state.apply(index, noisy.manifest.calls[index].update, draw)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < state.x[0].nbytes // 4


def test_noise_does_not_depend_on_batches(noisy: Runner, tmp_path: Path) -> None:
    labels = list(range(9))
    folder = handmade.write_bundle(tmp_path / "single", batch=(1, 1))
    manifest = replace(
        read_bundle(folder).manifest, calls=noisy.manifest.calls, stochastic=noisy.manifest.stochastic
    )
    write_manifest(folder, manifest)
    whole, single = noisy.sample(labels, seed=5), Runner.load(folder).sample(labels, seed=5)
    np.testing.assert_allclose(whole, single, rtol=1e-5, atol=1e-5)


def test_a_seed_gives_the_same_again_and_another_gives_another(noisy: Runner) -> None:
    first = noisy.sample([1, 1], seed=5)
    assert np.array_equal(noisy.sample([1, 1], seed=5), first)
    assert not np.allclose(noisy.sample([1, 1], seed=6), first)
    assert not np.allclose(noisy.sample([1, 1]), noisy.sample([1, 1]))
    start = np.zeros((2, *LATENT), np.float32)
    latents = noisy.sample([1, 1], noise=start, seed=5)
    assert not np.allclose(latents[0], latents[1])  # the noise of the calls differs
    assert np.array_equal(noisy.sample([1, 1], noise=start, seed=5), latents)
    assert not np.allclose(noisy.sample([1, 1], noise=start, seed=6), latents)


def test_the_noise_of_the_calls_may_be_given(noisy: Runner) -> None:
    draws = np.empty((len(PROGRAM), 6, *LATENT), np.float32)
    for index, call in enumerate(draws):
        call[:] = index
    fill = seeded_noise(5, range(6))
    for index, call in enumerate(draws):
        fill(index, call)
    labels, start = [0, 1, 2, 3, 4, 5], np.ones((6, *LATENT), np.float32)
    given = noisy.sample(labels, noise=start, call_noise=draws)
    assert np.array_equal(given, noisy.sample(labels, noise=start, seed=5))
    session = noisy.session(3)
    session.start(labels[:3], start[:3], call_noise=draws[:, :3])
    list(session)
    np.testing.assert_allclose(session.x, given[:3], rtol=1e-5, atol=1e-5)


def test_noise_that_does_not_fit_is_refused(noisy: Runner, bundle: Path) -> None:
    draws = np.zeros((len(PROGRAM), 2, *LATENT), np.float32)
    with pytest.raises(L2CError, match=r"call_noise has shape \(6, 2.*needs \(6, 1,"):
        noisy.sample([1], call_noise=draws)
    with pytest.raises(L2CError, match="sampler of this bundle, ddim, draws no noise"):
        Runner.load(bundle).sample([1, 2], call_noise=draws)
    with pytest.raises(L2CError, match="noise and seed are both given"):
        Runner.load(bundle).sample([1], noise=np.zeros((1, *LATENT), np.float32), seed=0)
    with pytest.raises(L2CError, match="seed is -1"):
        noisy.sample([1], noise=np.zeros((1, *LATENT), np.float32), seed=-1)
