"""The tolerances of ``verify`` beside the errors that they are for."""

import math

import pytest
import tolerances
from tolerances import Line, compare, make_models, measure, table, worst_errors

from l2c_export.evidence.compare import CallErrors
from l2c_export.evidence.verify import ROUNDED, TOLERANCES, Report


def report(*errors):
    """Of one call with two slots: the second slot's error, the output's and the latent's."""
    slot, output, latent = errors
    call = CallErrors(0, 0.0, "g", output, {"00.attn": 1e-9, "00.mlp": slot}, latent)
    return Report(TOLERANCES["float32"], {}, [call])


def test_the_worst_of_all_models_is_held_against_the_tolerance():
    found = [
        ("int8", "a", report(0.01, 0.02, 0.01)),
        ("int8", "b", report(0.02, 0.01, 0.01)),
        ("float8-weights, checkpoint", "a", report(0.1, math.nan, 0.3)),
    ]
    lines = compare(found)
    assert [(line.precision, line.part, line.model) for line in lines[:3]] == [
        ("int8", "slots", "b"),
        ("int8", "output", "a"),
        ("int8", "latent", "a"),
    ]
    assert [line.allowed for line in lines[3:]] == [
        getattr(ROUNDED["float8-weights"], part) for part in tolerances.PARTS
    ]
    assert not lines[4].sound
    assert "(!)" in table(lines).splitlines()[6]


@pytest.mark.parametrize(
    ("precision", "worst", "sound"),
    [
        ("int8", 0.01, True),
        ("int8", 0.07, False),
        ("int8", 0.001, False),
        ("float32", 0.001, True),
        ("float32, checkpoint", 0.001, True),
        ("int8, unrounded", 0.001, True),
        ("int8, unrounded", 0.07, False),
    ],
)
def test_a_tolerance_is_neither_tight_nor_loose(precision, worst, sound):
    assert Line(precision, "slots", worst, "model", 0.02).sound is sound


def test_the_smallest_model_is_measured_beside_all_it_is_compared_with(tmp_path):
    found = list(measure(make_models(tmp_path)[:1], "int8", 1, tmp_path))
    assert [name for name, *_ in found] == ["int8", "int8, unrounded", "int8, checkpoint"]
    worst = [worst_errors(report) for *_, report in found]
    assert worst[1]["slots"] < 1e-5 < worst[0]["slots"] < worst[2]["slots"] < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("precision", TOLERANCES)
def test_every_tolerance_fits_what_it_is_for(precision, tmp_path):
    small = make_models(tmp_path)[:3]  # exporting 28 blocks takes minutes; the example does that
    lines = compare(list(measure(small, precision, 1, tmp_path)))
    assert all(line.margin >= tolerances.MARGIN[0] for line in lines), table(lines)
