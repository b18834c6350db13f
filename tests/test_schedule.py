from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from l2c_export.build.router_file import read_router
from l2c_export.core.models import DiTConfig, slot
from l2c_export.core.samplers import ddim, linear_alphas_cumprod, sampler_table, spaced_timesteps
from l2c_export.core.schedule import Router, Schedule, threshold_router, uncached
from l2c_export.errors import L2CError

DATA = Path(__file__).parent / "data"
RELEASED = Path(__file__).resolve().parents[2] / "shared" / "routers"

SLOTS = ("00.attn", "00.mlp")


def slots(blocks: int) -> tuple[str, ...]:
    return tuple(slot(block, part) for block in range(blocks) for part in ("attn", "mlp"))


def released(name: str, family: str) -> Router:
    if not (RELEASED / name).is_file():
        pytest.skip(f"the released routers are not part of the project; {RELEASED} is missing")
    return read_router(RELEASED / name, family)


def router(rows: list[list[float]], routed: list[int]) -> Router:
    return Router(np.array(rows, np.float32), np.array(routed, bool), "ddim", {"file": "r.pt"})


# Released and golden routers --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family", "blocks", "calls", "threshold", "removed", "of"),
    [
        ("DDIM20_router.pt", "dit", 28, 20, 0.1, 248, 560),
        ("DDIM50_router.pt", "dit", 28, 50, 0.1, 664, 1400),
        ("dpm20_router.pth", "uvit", 29, 20, 0.9, 333, 522),
        ("dpm50_router.pth", "uvit", 29, 50, 0.9, 1304, 1392),
    ],
)
def test_released_routers_remove_what_the_paper_says(
    name: str, family: str, blocks: int, calls: int, threshold: float, removed: int, of: int
) -> None:
    trained = released(name, family)
    schedule = threshold_router(trained, slots(blocks), trained.sampler, calls, threshold)
    assert schedule.removed == removed
    assert int(trained.routed.sum()) * 2 * blocks == of


def test_ddim20_removes_most_at_the_noisy_end() -> None:
    schedule = threshold_router(released("DDIM20_router.pt", "dit"), slots(28), "ddim", 20, 0.1)
    by_row = schedule.reuse.sum(axis=1)[::-1]  # in the order of the file: row 0 is t = 0
    assert by_row[::2].tolist() == [0, 1, 1, 1, 3, 30, 48, 52, 56, 56]
    assert not by_row[1::2].any()


def test_a_dit_router_is_read_from_the_last_row_to_the_first() -> None:
    import torch

    rows = torch.load(DATA / "dit-ddim20/router.pt", weights_only=False)["routers"]
    trained = read_router(DATA / "dit-ddim20/router.pt", "dit")
    reuse = threshold_router(trained, slots(28), "ddim", 20, 0.1).reuse
    for call in range(20):
        row = 19 - call
        scores = torch.sigmoid(rows[f"{row}.prob"].double()).numpy()
        expected = (scores <= 0.1) if row % 2 == 0 else np.zeros(56, bool)
        assert (reuse[call] == expected).all(), f"call {call}"
    assert reuse.any()
    assert not reuse[0].any()
    assert reuse[19].any()


def test_a_uvit_router_belongs_to_the_start_of_each_solver_step_after_the_first() -> None:
    import torch

    rows = torch.load(DATA / "uvit-dpm20/router.pth", weights_only=True)
    trained = read_router(DATA / "uvit-dpm20/router.pth", "uvit")
    assert np.flatnonzero(trained.routed).tolist() == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    reuse = threshold_router(trained, slots(29), "dpm-solver-2s", 20, 0.9).reuse
    for call in range(20):
        scores = torch.sigmoid(rows[f"{call // 2}.prob"].double()).numpy()
        expected = (scores <= 0.9) if call in range(2, 20, 2) else np.zeros(58, bool)
        assert (reuse[call] == expected).all(), f"call {call}"
    assert reuse.any()


# Thresholds -------------------------------------------------------------------------------------


def test_a_slot_is_computed_where_its_score_is_above_the_threshold() -> None:
    schedule = threshold_router(router([[0, 0], [2, -2]], [0, 1]), SLOTS, "ddim", 2, 0.5)
    assert schedule.reuse.tolist() == [[False, False], [False, True]]


def test_a_score_equal_to_the_threshold_is_reused() -> None:
    schedule = threshold_router(router([[0, 0], [0, 1]], [0, 1]), SLOTS, "ddim", 2, 0.5)
    assert schedule.reuse[1].tolist() == [True, False]


def test_rows_of_calls_that_are_not_routed_are_never_read() -> None:
    rows = [[-9, np.nan], [2, -2], [-9, -np.inf], [-2, 2]]
    schedule = threshold_router(router(rows, [0, 1, 0, 1]), SLOTS, "ddim", 4, 0.5)
    assert schedule.reuse.tolist() == [[0, 0], [0, 1], [0, 0], [1, 0]]


def test_extreme_thresholds_and_scores() -> None:
    saturated = router([[0, 0], [-1000, 1000]], [0, 1])
    with np.errstate(over="ignore"):
        assert threshold_router(saturated, SLOTS, "ddim", 2, 0.0).removed == 1
        assert threshold_router(saturated, SLOTS, "ddim", 2, 1.0).removed == 2


def test_a_schedule_remembers_where_it_came_from() -> None:
    source = threshold_router(router([[0, 0], [2, -2]], [0, 1]), SLOTS, "ddim", 2, 0.5).source
    assert source == {
        "kind": "router",
        "threshold": 0.5,
        "routed_calls": 1,
        "router": {"file": "r.pt"},
    }


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({}, (SLOTS, "ddim", 2, 1.5), ["threshold 1.5"]),
        ({}, (SLOTS, "ddim", 2, -0.1), ["threshold -0.1"]),
        ({}, (SLOTS, "ddim", 2, float("nan")), ["threshold nan"]),
        ({}, (SLOTS, "ddim", 50, 0.5), ["r.pt", "2 calls", "not 50", "--steps 2"]),
        ({}, (SLOTS, "euler", 2, 0.5), ["r.pt", "'ddim'", "'euler'", "--sampler ddim"]),
        ({}, (slots(2), "ddim", 2, 0.5), ["r.pt", "2 scores", "4"]),
        ({"logits": np.array([[0, 0], [np.nan, 0]])}, (SLOTS, "ddim", 2, 0.5), ["r.pt", "finite"]),
        ({"logits": np.array([[0, 0], [np.inf, 0]])}, (SLOTS, "ddim", 2, 0.5), ["r.pt", "finite"]),
        ({"routed": np.array([True, True])}, (SLOTS, "ddim", 2, 0.9), ["00.attn", "first call"]),
    ],
)
def test_a_router_that_does_not_fit_is_refused(
    changes: dict[str, Any], arguments: tuple[tuple[str, ...], str, int, float], words: list[str]
) -> None:
    with pytest.raises(L2CError) as caught:
        threshold_router(replace(router([[0, 0], [2, -2]], [0, 1]), **changes), *arguments)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_the_uncached_schedule_removes_nothing() -> None:
    schedule = uncached(SLOTS, 3)
    assert (schedule.calls, schedule.removed, schedule.slots) == (3, 0, SLOTS)


@pytest.mark.parametrize("shape", [(0, 2), (2, 3), (2,)])
def test_a_schedule_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(L2CError, match="schedule needs"):
        Schedule(SLOTS, np.zeros(shape, bool))


# Samplers ---------------------------------------------------------------------------------------


def test_timesteps_are_those_of_the_official_dit() -> None:
    assert spaced_timesteps(10).tolist() == [111 * i for i in range(10)]
    assert spaced_timesteps(20).tolist() == [
        *(0, 53, 105, 158, 210, 263, 315, 368, 421, 473),
        *(526, 578, 631, 684, 736, 789, 841, 894, 946, 999),
    ]
    assert spaced_timesteps(50)[[0, 1, 2, -2, -1]].tolist() == [0, 20, 41, 979, 999]


@pytest.mark.parametrize("calls", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(calls: int) -> None:
    with pytest.raises(L2CError, match=rf"{calls} steps"):
        sampler_table("ddim", calls)


def test_an_unknown_sampler_is_refused_with_those_known() -> None:
    with pytest.raises(L2CError, match=r"'plms'.*ddim"):
        sampler_table("plms", 20)


@pytest.mark.parametrize("calls", [1, 2, 20, 50])
def test_ddim_with_the_true_noise_ends_at_the_clean_latent(calls: int) -> None:
    x0, noise = 0.7, -1.3
    alphas = linear_alphas_cumprod()
    table = ddim(calls)
    first = alphas[int(table[0].timestep)]
    x = np.sqrt(first) * x0 + np.sqrt(1 - first) * noise
    for call in table:
        alpha = alphas[int(call.timestep)]
        assert x == pytest.approx(np.sqrt(alpha) * x0 + np.sqrt(1 - alpha) * noise, rel=1e-9)
        x = call.update["x"]["x"] * x + call.update["x"]["output"] * noise
    assert x == pytest.approx(x0, rel=1e-9)


def test_ddim_runs_from_the_noisiest_call_to_t_0() -> None:
    times = [call.timestep for call in ddim(20)]
    assert times[0] == 999
    assert times[-1] == 0
    assert times == sorted(times, reverse=True)


def test_slots_come_in_execution_order() -> None:
    assert DiTConfig(2, 8, 2, 2, 8).slots == ("00.attn", "00.mlp", "01.attn", "01.mlp")


def test_a_router_of_other_sub_layers_is_refused_though_their_number_fits() -> None:
    other = replace(router([[9.0, 9.0]] * 2, [0, 1]), slots=("00.attn", "00.cross"))
    with pytest.raises(L2CError, match=r"r\.pt was trained for other sub-layers: it has '00\.cross'"):
        threshold_router(other, SLOTS, "ddim", 2, 0.1)
