"""Samplers against independent implementations, in float64, and against the orders they claim."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from l2c_export.core.models import DiTConfig, UViTConfig
from l2c_export.core.noise_schedule import alphas_cumprod
from l2c_export.core.sampler_call import Call, combine, is_stochastic, update_fault
from l2c_export.core.samplers import SAMPLERS, model_table, sampler_table
from l2c_export.errors import L2CError

GOLDEN = Path(__file__).parent / "data" / "uvit-dpm20" / "expected.npz"
TOLERANCE = 1e-9  # a thousandth of what single precision makes of it
SCHEDULES = ("linear", "scaled_linear")

Array = NDArray[np.float64]
# diffusers makes arrays of tensors, which torch does in a way of numpy 1
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Network = Callable[[Array, float], Array]


def network(x: Array, t: float) -> Array:
    """What a network might say: not linear in the latent, and different at every time."""
    u = t / 1000
    return np.tanh(x * (1.5 - u)) + 0.3 * np.sin(3 * u) * np.roll(x, 1) + 0.1 * np.cos(x + 5 * u)


def trajectory(
    table: Sequence[Call], x: Array, net: Network = network, noise: Sequence[Array] = ()
) -> Iterator[Array]:
    """The latents after each call, as a table says."""
    values = {"x": x}
    for i, call in enumerate(table):
        seen = values | {"output": net(values["x"], call.timestep)}
        if len(noise):
            seen["noise"] = noise[i]
        values = values | {
            target: sum(c * seen[source] for source, c in terms.items())
            for target, terms in call.update.items()
        }
        yield values["x"]


def start(seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((2, 3, 4))


def assert_same(table: Sequence[Call], peer: Iterator[Array], **options: Any) -> None:
    """Every latent of a trajectory is the peer's; both are consumed in step."""
    for ours, theirs in zip(trajectory(table, start(), **options), peer, strict=True):
        assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


def diffused(scheduler: Any, timesteps: Sequence[float], told: Sequence[float]) -> Iterator[Array]:
    """The latents of a diffusers scheduler; ``told`` is what the network is told."""
    x = torch.from_numpy(start())
    for step, time in zip(timesteps, told, strict=True):
        output = torch.from_numpy(network(x.numpy(), time))
        with mock.patch.object(torch.Tensor, "to", lambda self, *_, **__: self):  # "upcast" to float32
            x = scheduler.step(output, step, x).prev_sample
        assert x.dtype == torch.float64
        yield x.numpy()


def times(table: Sequence[Call]) -> list[float]:
    return [call.timestep for call in table]


# -- diffusers ----------------------------------------------------------------------------------

diffusers = pytest.importorskip("diffusers")


def respaced(scheduler: Any, table: Sequence[Call], schedule: str) -> list[int]:
    """Give a scheduler the few steps of a table as if they were all steps of its training."""
    alphas = alphas_cumprod(schedule)[[int(t) for t in times(table)[::-1]]]
    scheduler.alphas_cumprod = torch.from_numpy(alphas)
    scheduler.set_timesteps(len(table))
    steps: list[int] = scheduler.timesteps.tolist()
    assert steps == list(range(len(table)))[::-1]
    return steps


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("calls", [2, 20, 50])
def test_ddim_is_that_of_diffusers(calls: int, schedule: str) -> None:
    table = sampler_table("ddim", calls, schedule)
    peer = diffusers.DDIMScheduler(calls, clip_sample=False, set_alpha_to_one=True)
    steps = respaced(peer, table, schedule)
    assert_same(table, diffused(peer, steps, times(table)))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("calls", [2, 20, 250])
def test_ddpm_is_that_of_diffusers(calls: int, schedule: str) -> None:
    table = sampler_table("ddpm", calls, schedule)
    peer = diffusers.DDPMScheduler(calls, clip_sample=False, variance_type="fixed_small")
    steps = respaced(peer, table, schedule)
    draws = np.random.default_rng(1).standard_normal((calls, *start().shape))
    left = iter(torch.from_numpy(draws))
    with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", side_effect=left):
        assert_same(table, diffused(peer, steps, times(table)), noise=draws)
    assert len(list(left)) == 1  # the last call draws nothing


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("calls", [1, 2, 3, 10, 14, 15, 25])
def test_dpm_solver_2m_is_that_of_diffusers_with_its_defaults(calls: int, schedule: str) -> None:
    table = sampler_table("dpm-solver-2m", calls, schedule)
    betas = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}[schedule]
    peer = diffusers.DPMSolverMultistepScheduler(
        beta_start=betas[0], beta_end=betas[1], beta_schedule=schedule
    )
    peer.set_timesteps(calls)
    steps = peer.timesteps.tolist()
    assert steps == times(table)
    alphas = alphas_cumprod(schedule)[steps]
    sigmas = np.append(np.sqrt((1 - alphas) / alphas), 0.0)
    np.testing.assert_allclose(peer.sigmas, sigmas, rtol=1e-4)  # its own, in float32
    peer.sigmas = torch.from_numpy(sigmas)
    assert_same(table, diffused(peer, steps, steps))


@pytest.mark.parametrize("calls", [1, 4, 28])
def test_euler_is_that_of_diffusers(calls: int) -> None:
    table = sampler_table("euler", calls)
    peer = diffusers.FlowMatchEulerDiscreteScheduler()
    sigmas = np.linspace(1, 1 / calls, calls)
    peer.set_timesteps(sigmas=sigmas.tolist())
    np.testing.assert_allclose(times(table), peer.timesteps, rtol=1e-6)
    peer.sigmas = torch.from_numpy(np.append(sigmas, 0.0))
    assert_same(table, diffused(peer, peer.timesteps, times(table)))


def half_log_snr(schedule: str, told: Sequence[float]) -> Array:
    """lambda at times of 1 to 1000, by the definition of DPM-Solver's discrete schedules."""
    log_alpha = np.interp(told, np.arange(1, 1001), 0.5 * np.log(alphas_cumprod(schedule)))
    return log_alpha - 0.5 * np.log(-np.expm1(2 * log_alpha))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("name", "calls", "orders"),
    [
        ("dpm-solver-2s", 2, [2]),
        ("dpm-solver-2s", 20, [2] * 10),
        ("dpm-solver-3s", 1, [1]),
        ("dpm-solver-3s", 2, [2]),
        ("dpm-solver-3s", 3, [2, 1]),
        ("dpm-solver-3s", 4, [3, 1]),
        ("dpm-solver-3s", 20, [3] * 6 + [2]),
        ("dpm-solver-3s", 21, [3] * 6 + [2, 1]),
        ("dpm-solver-3s", 22, [3] * 7 + [1]),
    ],
)
def test_singlestep_dpm_solvers_are_those_of_diffusers(
    name: str, calls: int, orders: list[int], schedule: str
) -> None:
    """Given the same times; diffusers' own are integers, and its inner ones are not at r of lambda."""
    table = sampler_table(name, calls, schedule, first_timestep=1)
    peer = diffusers.DPMSolverSinglestepScheduler(
        solver_order=3, lower_order_final=False, final_sigmas_type="sigma_min"
    )
    peer.set_timesteps(3 * calls)
    peer.order_list = [k for order in orders for k in range(1, order + 1)]
    peer.timesteps = torch.tensor(times(table), dtype=torch.float64)
    lambdas = half_log_snr(schedule, [*times(table), 1.0])
    peer.sigmas = torch.from_numpy(np.exp(-lambdas))

    def steps() -> Iterator[float]:
        """Set the kind of each update: the middle one of order 3 has the phi of "heun"."""
        for order in orders:
            for k in range(1, order + 1):
                peer.register_to_config(solver_type="heun" if (order, k) == (3, 2) else "midpoint")
                yield peer.timesteps[peer.step_index or 0]

    assert_same(table, diffused(peer, steps(), times(table)))  # type: ignore[arg-type]


# -- the papers' own form -----------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("calls", [6, 20])
def test_dpm_solver_2s_is_algorithm_1_of_the_paper(calls: int, schedule: str) -> None:
    """With times and levels from the definition, and the inner times by bisection of lambda."""

    def lam(t: float) -> float:
        return float(half_log_snr(schedule, [1000 * t])[0])

    def inverse(wanted: float) -> float:
        low, high = 1e-3, 1.0
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if lam(middle) > wanted else (low, middle)
        return low

    def alpha(t: float) -> float:
        return float(1 / np.sqrt(1 + np.exp(-2 * lam(t))))

    def sigma(t: float) -> float:
        return float(1 / np.sqrt(1 + np.exp(2 * lam(t))))

    def data(x: Array, t: float) -> Array:
        seen.append(1000 * t)
        return (x - sigma(t) * network(x, 1000 * t)) / alpha(t)

    seen: list[float] = []
    x, grid, r = start(), np.linspace(1, 1e-3, calls // 2 + 1), 0.5
    ends = []
    for before, after in pairwise(grid):
        h = lam(after) - lam(before)
        s = inverse(lam(before) + r * h)
        data_before = data(x, before)
        u = sigma(s) / sigma(before) * x - alpha(s) * (np.exp(-r * h) - 1) * data_before
        d = (1 - 1 / (2 * r)) * data_before + 1 / (2 * r) * data(u, s)
        x = sigma(after) / sigma(before) * x - alpha(after) * (np.exp(-h) - 1) * d
        ends += [u, x]
    table = sampler_table("dpm-solver-2s", calls, schedule, first_timestep=1)
    np.testing.assert_allclose(times(table), seen, rtol=1e-9)
    assert_same(table, iter(ends))


def test_the_calls_of_dpm_solver_2s_are_those_of_the_official_u_vit() -> None:
    table = sampler_table("dpm-solver-2s", 20, "scaled_linear", first_timestep=1)
    official = np.load(GOLDEN)["eval_times"]  # computed in float32
    np.testing.assert_allclose(times(table), official, rtol=1e-7, atol=2e-4)


# -- the orders that the papers claim -----------------------------------------------------------

MEAN, DEVIATION = 0.7, 0.4  # of the data


def level(t: float, schedule: str = "linear") -> tuple[float, float]:
    """(alpha, sigma) at a time of 1 to 1000."""
    lam = half_log_snr(schedule, [t])[0]
    return float((1 + np.exp(-2 * lam)) ** -0.5), float((1 + np.exp(2 * lam)) ** -0.5)


def true_noise(x: Array, t: float) -> Array:
    """What a perfect network predicts for normally distributed data."""
    alpha, sigma = level(t)
    return sigma * (x - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2)


def on_the_flow(t: float, z: Array) -> Array:
    """The exact solution of the probability-flow equation at a time."""
    alpha, sigma = level(t)
    return alpha * MEAN + np.sqrt(alpha**2 * DEVIATION**2 + sigma**2) * z


def order_of(errors: Sequence[float], calls: Sequence[int]) -> float:
    """The slope of log error over log calls."""
    return -float(np.polyfit(np.log(calls), np.log(errors), 1)[0])


@pytest.mark.parametrize(
    ("name", "order"), [("ddim", 1), ("dpm-solver-2s", 2), ("dpm-solver-2m", 2), ("dpm-solver-3s", 3)]
)
def test_a_solver_converges_as_claimed(name: str, order: int) -> None:
    """Up to half of the time: towards its end uniform times are far apart in lambda."""
    z, calls, errors = start(), (48, 96, 192), []
    for n in calls:
        table = sampler_table(name, n, "linear", 1)
        half = n // 2 // SAMPLERS[name].calls_per_step * SAMPLERS[name].calls_per_step
        latents = trajectory(table, on_the_flow(table[0].timestep, z), true_noise)
        *_, x = (next(latents) for _ in range(half))
        errors.append(float(np.abs(x - on_the_flow(table[half].timestep, z)).max()))
    assert order - 0.2 < order_of(errors, calls) < order + 0.6, errors


def test_euler_converges_with_order_1() -> None:
    def variance(sigma: float) -> float:
        return (1 - sigma) ** 2 * DEVIATION**2 + sigma**2

    def velocity(x: Array, t: float) -> Array:
        sigma = t / 1000
        slope = (sigma - (1 - sigma) * DEVIATION**2) / variance(sigma)
        return -MEAN + slope * (x - (1 - sigma) * MEAN)

    z, calls, errors = start(), (10, 40, 160), []
    for n in calls:
        *_, x = trajectory(sampler_table("euler", n), z, velocity)
        errors.append(float(np.abs(x - (MEAN + DEVIATION * z)).max()))
    assert 0.9 < order_of(errors, calls) < 1.2, errors


def test_ddpm_ends_in_the_distribution_of_the_data() -> None:
    """Mean and variance, carried through the calls exactly: all of them are affine."""
    calls, errors = (100, 200, 400), []
    for n in calls:
        mean, variance = 0.0, 1.0
        for call in sampler_table("ddpm", n, "linear", 1):
            alpha, sigma = level(call.timestep)
            slope = sigma / (alpha**2 * DEVIATION**2 + sigma**2)
            terms = call.update["x"]
            gain = terms["x"] + terms["output"] * slope
            mean = gain * mean - terms["output"] * slope * alpha * MEAN
            variance = gain**2 * variance + terms.get("noise", 0.0) ** 2
        assert mean == pytest.approx(MEAN, abs=0.05)
        errors.append(abs(variance - DEVIATION**2))
    assert errors[-1] < 0.05 * DEVIATION**2
    assert order_of(errors, calls) > 0.7, errors


# -- tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("calls", [2, 6, 20, 100, 998])
def test_every_table_is_one_that_a_runner_can_execute(name: str, calls: int) -> None:
    table = sampler_table(name, calls, "scaled_linear", 1)
    assert len(table) == calls
    assert times(table) == sorted(set(times(table)), reverse=True)
    assert times(table)[0] == 1000
    stochastic, written = is_stochastic(table), set()
    for call in table:
        assert update_fault(call.update, written, stochastic) is None
        assert all(type(number) is float for terms in call.update.values() for number in terms.values())
        written |= call.update.keys()
    assert stochastic == (name == "ddpm")
    assert set(table[-1].update) == {"x"}


def test_what_is_kept_is_read() -> None:
    for name in SAMPLERS:
        table = sampler_table(name, 20)
        for i, call in enumerate(table):
            for history in call.update.keys() - {"x"}:
                later = [c.update for c in table[i + 1 :]]
                reads = [any(history in terms for terms in update.values()) for update in later]
                writes = [history in update for update in later]
                assert True in reads, (name, i, history)
                assert True not in writes[: reads.index(True)], (name, i, history)


def test_models_are_told_times_as_they_count_them() -> None:
    dit, uvit = DiTConfig(2, 8, 2, 2, 8), UViTConfig(2, 8, 2, 2, 8, noise_schedule="linear")
    for name in ("ddim", "ddpm", "dpm-solver-2s", "dpm-solver-2m"):
        ours, theirs = model_table(name, 10, dit), model_table(name, 10, uvit)
        np.testing.assert_allclose(np.add(times(ours), 1), times(theirs), rtol=1e-12)
        assert [c.update for c in ours] == [c.update for c in theirs]


def test_the_noise_schedule_is_the_models() -> None:
    uvit = UViTConfig(2, 8, 2, 2, 8)
    assert model_table("ddim", 4, uvit) == sampler_table("ddim", 4, "scaled_linear", 1)
    assert model_table("ddim", 4, uvit)[1].update != sampler_table("ddim", 4, "linear", 1)[1].update
    with pytest.raises(L2CError, match="unknown noise schedule 'cosine'; known: linear, scaled_linear"):
        sampler_table("ddim", 4, "cosine")


def test_a_sampler_for_another_prediction_is_refused() -> None:
    flow = DiTConfig(2, 8, 2, 2, 8, prediction="velocity")
    assert model_table("euler", 4, flow) == sampler_table("euler", 4)
    with pytest.raises(L2CError, match=r"'ddim' is for models that predict noise.*--sampler euler$"):
        model_table("ddim", 4, flow)
    with pytest.raises(L2CError, match=r"'euler' is for models that predict velocity.*ddim or dpm"):
        model_table("euler", 4, DiTConfig(2, 8, 2, 2, 8))


@pytest.mark.parametrize(
    ("name", "calls", "message"),
    [
        ("dpm-solver-2s", 19, r"19 steps: .* use 18 or 20$"),
        ("dpm-solver-2s", 1, r"1 steps: .* use 2$"),
        ("dpm-solver-2s", 1001, r"1001 steps: .* use 1000$"),
        ("dpm-solver-2s", 5000, r"5000 steps: .* use an even number from 2 to 1000$"),
        ("dpm-solver-3s", 0, r"0 steps: dpm-solver-3s makes 1 to 1000"),
        ("dpm-solver-3s", 1001, r"1001 steps: dpm-solver-3s makes 1 to 1000"),
        ("dpm-solver-2m", 1000, r"1000 steps: dpm-solver-2m makes 1 to 999"),
        ("euler", 0, r"0 steps: the number of steps must be between 1 and 1000"),
        ("ddpm", 1001, r"1001 steps: the number of steps must be between 1 and 1000"),
    ],
)
def test_impossible_numbers_of_calls_are_refused(name: str, calls: int, message: str) -> None:
    with pytest.raises(L2CError, match=message):
        sampler_table(name, calls)


def test_sums_are_combined_and_zeros_left_out() -> None:
    both = combine((2.0, {"x": 1.0, "output": 3.0}), (-1.0, {"x": 2.0, "noise": 0.5}))
    assert both == {"output": 6.0, "noise": -0.5}
