"""Schedules made by hand, drawn as in the plan: ``.`` computes, ``r`` reuses; one column a call."""

import numpy as np
import pytest

from l2c_export.core.policies import Policy, fora, random_like
from l2c_export.core.schedule import Schedule
from l2c_export.errors import L2CError

SLOTS = ("00.attn", "00.mlp", "01.attn", "01.mlp")
COSTS = {"00.attn": 3, "00.mlp": 5, "01.attn": 3, "01.mlp": 5}


def drawn(schedule):
    """One letter a call, of a schedule that treats all slots alike."""
    assert (schedule.reuse == schedule.reuse[:, :1]).all()
    return "".join("r" if reused else "." for reused in schedule.reuse[:, 0])


@pytest.mark.parametrize(
    ("calls", "interval", "anchor", "expected"),
    [
        (6, 1, "end", "......"),
        (6, 2, "end", "..r.r."),
        (5, 2, "end", ".r.r."),
        (8, 3, "end", "..rr.rr."),
        (6, 2, "start", ".r.r.."),
        (7, 3, "start", ".rr.rr."),
        (6, 3, "start", ".rr.r."),
    ],
)
def test_fora_computes_every_nth_call(calls, interval, anchor, expected):
    assert drawn(fora(SLOTS, calls, interval, anchor)) == expected


def test_fora_from_the_end_is_the_authors_rule():
    n, interval = 50, 3
    official = [i == n - 1 or i % interval == 0 for i in range(n)][::-1]  # they count down to 0
    assert (~fora(SLOTS, n, interval).reuse[:, 0] == official).all()


@pytest.mark.parametrize("interval", [0, 7])
def test_fora_refuses_an_interval_outside_the_trajectory(interval):
    with pytest.raises(L2CError, match=f"interval {interval}: with 6 calls, give 1 to 6"):
        fora(SLOTS, 6, interval)


def test_fora_refuses_an_unknown_anchor():
    with pytest.raises(L2CError, match="anchor 'middle'"):
        fora(SLOTS, 6, 2, "middle")


def learned():
    reuse = np.zeros((20, 4), bool)
    reuse[1::2] = np.random.default_rng(5).random((10, 4)) < 0.5
    reuse[7] = False
    return Schedule(SLOTS, reuse, {"kind": "router"})


@pytest.mark.parametrize("within", ["trajectory", "call"])
def test_a_random_schedule_reuses_as_much_of_each_cost_in_the_same_calls(within):
    schedule = learned()
    shuffled = random_like(schedule, 0, COSTS, within)
    assert (shuffled.reuse != schedule.reuse).any()
    for part in (slice(0, None, 2), slice(1, None, 2)):
        assert shuffled.reuse[:, part].sum() == schedule.reuse[:, part].sum()
    assert not shuffled.reuse[~schedule.reuse.any(axis=1)].any()
    assert shuffled.source["like"] == {"kind": "router"}


def test_within_a_call_only_the_blocks_are_shuffled():
    schedule = learned()
    by_call = random_like(schedule, 0, COSTS, "call").reuse.sum(axis=1)
    assert (by_call == schedule.reuse.sum(axis=1)).all()
    assert (random_like(schedule, 0, COSTS).reuse.sum(axis=1) != schedule.reuse.sum(axis=1)).any()


def test_a_seed_fixes_the_random_schedule():
    masks = [random_like(learned(), seed, COSTS).reuse for seed in (1, 1, 2)]
    assert (masks[0] == masks[1]).all()
    assert (masks[0] != masks[2]).any()


def test_an_unknown_reach_of_the_shuffle_is_refused():
    with pytest.raises(L2CError, match="within 'block'"):
        random_like(learned(), 0, COSTS, "block")


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("fora:2", Policy("fora", 2, "end")),
        ("fora:3:start", Policy("fora", 3, "start")),
        ("random:7", Policy("random", 7, "trajectory")),
        ("random:7:call", Policy("random", 7, "call")),
    ],
)
def test_policies_are_named_in_a_word(text, policy):
    assert Policy.parse(text) == policy


@pytest.mark.parametrize(
    "text", ["", "fora", "fora:", "fora:x", "fora:2:", "random:1:end", "l2c:1", "fora:²"]
)
def test_other_words_are_refused_with_what_there_is(text):
    with pytest.raises(L2CError, match="is unknown; known: fora:N, fora:N:start, random:SEED"):
        Policy.parse(text)
