from dataclasses import replace

import numpy as np
import pytest

from l2c_export.core.overlap import mask_overlap
from l2c_export.core.schedule import Router, threshold_router
from l2c_export.errors import L2CError

SLOTS = ("00.attn", "00.mlp")


def router(*logits, routed=(False, True, True)):
    return Router(np.array(logits, np.float32), np.array(routed), "ddim", slots=SLOTS)


A = router([0, 0], [-9, 9], [-9, -9])
B = router([9, -9], [-9, -9], [9, -9])  # the first call is not routed: its scores mean nothing


def test_overlap_counts_what_both_remove():
    overlap = mask_overlap(A, B, 0.5)
    assert (overlap.both, overlap.either, overlap.same, overlap.routed) == (2, 4, 2, 4)
    assert (overlap.jaccard, overlap.agreement) == (0.5, 0.5)
    assert mask_overlap(A, A, 0.5).jaccard == 1


def test_overlap_sees_what_the_schedule_removes():
    counts = [threshold_router(r, SLOTS, "ddim", 3, 0.5).removed for r in (A, B)]
    overlap = mask_overlap(A, B, 0.5)
    assert sum(counts) == overlap.both + overlap.either


def test_routers_that_remove_nothing_agree():
    overlap = mask_overlap(A, B, 0.0)
    assert (overlap.either, overlap.jaccard, overlap.agreement) == (0, 1.0, 1.0)


def test_a_call_that_one_router_alone_decides_counts():
    pairs = replace(A, routed=np.array([False, True, False]))
    overlap = mask_overlap(A, pairs, 0.5)
    assert (overlap.both, overlap.either, overlap.same, overlap.routed) == (1, 3, 2, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "euler"}, r"different samplers \(ddim and euler\)"),
        ({"slots": ("00.attn", "01.attn")}, "different sub-layers"),
        ({"logits": A.logits[:2], "routed": A.routed[:2]}, r"different calls \(3 and 2\)"),
        ({"logits": A.logits[:, :1], "slots": None}, r"different scores a call \(2 and 1\)"),
    ],
)
def test_routers_for_other_things_are_not_compared(changes, message):
    with pytest.raises(L2CError, match=message):
        mask_overlap(A, replace(A, **changes), 0.5)
