"""DPM-Solver++ as tables: solvers of the diffusion ODE for networks that predict noise.

The equations are those of Lu et al. 2022, DPM-Solver++ (arXiv 2211.01095), in terms of the clean latent
that the network's noise implies; lambda is log(alpha / sigma). What a step has of earlier evaluations
is summed before the next one, so a step of order k keeps k - 1 latents.
"""

from __future__ import annotations

from math import expm1

import numpy as np

from l2c_export.core.noise_schedule import TRAIN_STEPS, ContinuousSchedule, Level, alphas_cumprod
from l2c_export.core.sampler_call import Call, Terms, combine
from l2c_export.errors import L2CError

_X: Terms = {"x": 1.0}
_LAST_TIME = 1e-3  # where the official samplers of discrete-time models stop


def dpm_solver_2s(calls: int, noise_schedule: str, first_timestep: int) -> tuple[Call, ...]:
    """Singlestep DPM-Solver++ of order 2 on uniform times, two calls a step (algorithm 1, r1 = 1/2).

    Times run from 1 to 1/1000, and the network is told times between those of its training, as in
    the official sampler of U-ViT. Nothing is done about the noise that is left at the end.

    Raises:
        L2CError: The number of calls is odd.
    """
    if calls % 2 or not 2 <= calls <= TRAIN_STEPS:
        near = {calls - calls % 2, calls + calls % 2} & set(range(2, TRAIN_STEPS + 1, 2))
        use = " or ".join(map(str, sorted(near))) or f"an even number from 2 to {TRAIN_STEPS}"
        raise L2CError(f"{calls} steps: dpm-solver-2s makes two calls a solver step; use {use}")
    return _singlestep([2] * (calls // 2), noise_schedule, first_timestep)


def dpm_solver_3s(calls: int, noise_schedule: str, first_timestep: int) -> tuple[Call, ...]:
    """The same of order 3, three calls a step (DPM-Solver, algorithm 2, of the clean latent).

    Intermediate lambdas at r1 = 1/3 and r2 = 2/3. The last steps are of lower order, as in the
    official code: of orders 2 and 1, 1, or 2, where calls mod 3 is 0, 1, or 2.
    """
    _check_calls("dpm-solver-3s", calls, TRAIN_STEPS)
    threes, rest = divmod(calls, 3)
    orders = [3] * (threes - 1) + [2, 1] if rest == 0 else [3] * threes + [rest]
    return _singlestep(orders, noise_schedule, first_timestep)


def dpm_solver_2m(calls: int, noise_schedule: str, first_timestep: int) -> tuple[Call, ...]:
    """Multistep DPM-Solver++ of order 2 (algorithm 2) on uniform integer timesteps, down to no noise.

    The first and the last step are of order 1; timesteps and orders are the defaults of diffusers'
    ``DPMSolverMultistepScheduler``.
    """
    _check_calls("dpm-solver-2m", calls, TRAIN_STEPS - 1)
    steps = np.linspace(0, TRAIN_STEPS - 1, calls + 1).round().astype(np.int64)[:0:-1]
    alphas = alphas_cumprod(noise_schedule)
    levels = [Level.of(alphas[step]) for step in steps]
    table = []
    for i, (step, start) in enumerate(zip(steps, levels, strict=True)):
        data = clean(start)
        last = i + 1 == calls
        if last:
            update = {"x": data}
        elif i == 0:
            update = {"x": _first_order(start, levels[1], data), "history": data}
        else:
            h = levels[i + 1].half_log_snr - start.half_log_snr
            r = (start.half_log_snr - levels[i - 1].half_log_snr) / h
            mixed = combine((1 + 1 / (2 * r), data), (-1 / (2 * r), {"history": 1.0}))
            update = {"x": _first_order(start, levels[i + 1], mixed), "history": data}
        if i >= calls - 2:  # nobody reads it
            update.pop("history", None)
        table.append(Call(float(step + first_timestep), update))
    return tuple(table)


def _singlestep(orders: list[int], noise_schedule: str, first_timestep: int) -> tuple[Call, ...]:
    """Steps of given orders; each takes as much time as it makes calls."""
    schedule, calls = ContinuousSchedule(noise_schedule), sum(orders)
    times = np.linspace(1.0, _LAST_TIME, calls + 1)[np.cumsum([0, *orders])]
    table: list[Call] = []
    for order, start, end in zip(orders, times[:-1], times[1:], strict=True):
        first, last = schedule.level(start).half_log_snr, schedule.level(end).half_log_snr
        inner = [schedule.time(first + k / order * (last - first)) for k in range(1, order)]
        at = [float(start), *inner]
        updates = _STEPS[order]([schedule.level(time) for time in (*at, end)])
        table += [
            Call(round(TRAIN_STEPS * time, 9) - 1 + first_timestep, update)
            for time, update in zip(at, updates, strict=True)
        ]
    return tuple(table)


def _step_1(levels: list[Level]) -> list[dict[str, Terms]]:
    s, t = levels
    return [{"x": _first_order(s, t, clean(s))}]


def _step_2(levels: list[Level]) -> list[dict[str, Terms]]:
    """From s to t with an evaluation at s1, half way in lambda."""
    s, s1, t = levels
    # With r1 = 1/2 the clean latent of s leaves the second update: its share is 1 - 1/(2 r1).
    kept = {"x": t.sigma / s.sigma}
    whole = expm1(-_distance(s, t))
    return [
        {"x": _first_order(s, s1, clean(s)), "history": kept},
        {"x": combine((1.0, {"history": 1.0}), (-t.alpha * whole, clean(s1)))},
    ]


def _step_3(levels: list[Level]) -> list[dict[str, Terms]]:
    """From s to t with evaluations at s1 and s2, at a third and two thirds in lambda."""
    s, s1, s2, t = levels
    r1, r2 = 1 / 3, 2 / 3
    h = _distance(s, t)
    a = s2.alpha * (r2 / r1) * (expm1(-r2 * h) / (r2 * h) + 1)  # of (clean at s1) - (clean at s)
    b = t.alpha * (1 / r2) * (expm1(-h) / h + 1)  # of (clean at s2) - (clean at s)
    data = clean(s)
    return [
        {
            "x": _first_order(s, s1, data),
            "history": combine((1.0, _first_order(s, s2, data)), (-a, data)),
            "history2": combine((1.0, _first_order(s, t, data)), (-b, data)),
        },
        {"x": combine((1.0, {"history": 1.0}), (a, clean(s1)))},
        {"x": combine((1.0, {"history2": 1.0}), (b, clean(s2)))},
    ]


_STEPS = {1: _step_1, 2: _step_2, 3: _step_3}


def clean(level: Level) -> Terms:
    """The clean latent that a noise prediction implies."""
    return {"x": 1 / level.alpha, "output": -level.sigma / level.alpha}


def _first_order(s: Level, t: Level, data: Terms) -> Terms:
    """The latent at t from that at s, if the clean latent stays what it is (prop. 4.1, order 1)."""
    return combine((t.sigma / s.sigma, _X), (-t.alpha * expm1(-_distance(s, t)), data))


def _distance(s: Level, t: Level) -> float:
    return t.half_log_snr - s.half_log_snr


def _check_calls(name: str, calls: int, most: int) -> None:
    if not 1 <= calls <= most:
        raise L2CError(f"{calls} steps: {name} makes 1 to {most}")
