import pytest

from l2c_export.core.models import preset
from l2c_export.errors import L2CError
from l2c_export.train.recipe import Recipe, make_recipe
from l2c_export.train.shape import make_shape

DIT, UVIT = preset("dit-xl-2"), preset("uvit-h-2")


@pytest.mark.parametrize(
    ("schedule", "sampler", "calls", "routed", "origins"),
    [
        ("pairs", "ddim", 6, (1, 3, 5), (0, 2, 4)),
        ("pairs", "ddpm", 4, (1, 3), (0, 2)),
        ("pairs", "euler", 2, (1,), (0,)),
        ("pairs", "dpm-solver-2s", 8, (2, 4, 6), (0, 2, 4)),
        ("pairs", "dpm-solver-3s", 8, (3, 6), (0, 3)),
        ("pairs", "dpm-solver-3s", 9, (3, 6, 8), (0, 3, 6)),  # its last steps are shorter
        ("pairs", "dpm-solver-2m", 4, (1, 3), None),
        ("every", "ddim", 5, (1, 2, 3, 4), None),
        ("every", "dpm-solver-2s", 4, (1, 2, 3), None),
    ],
)
def test_which_calls_a_router_decides(schedule, sampler, calls, routed, origins):
    shape = make_shape(schedule, sampler, calls)
    assert (shape.calls, shape.routed, shape.origins) == (calls, routed, origins)


@pytest.mark.parametrize(
    ("schedule", "sampler", "calls", "message"),
    [
        ("pairs", "ddim", 5, "must be even; use 6"),
        ("pairs", "ddim", 0, "0 steps: the number of steps must be between"),
        ("pairs", "dpm-solver-2s", 2, "one solver step of them, .*; use 4 or more"),
        ("pairs", "dpm-solver-2s", 7, "two calls a solver step; use 6 or 8"),
        ("pairs", "dpm-solver-3s", 2, "use 4 or more"),
        ("pairs", "plms", 6, "unknown sampler 'plms'"),
        ("every", "ddim", 1, "the first call can reuse nothing"),
        ("triples", "ddim", 6, "'triples' is unknown"),
    ],
)
def test_a_number_of_calls_that_does_not_fit_is_refused(schedule, sampler, calls, message):
    with pytest.raises(L2CError, match=message):
        make_shape(schedule, sampler, calls)


def test_the_recipes_of_the_families():
    dit, uvit = make_recipe(DIT), make_recipe(UVIT)
    assert dit == Recipe()
    assert (uvit.sampler, uvit.error, uvit.l1, uvit.clamp) == ("dpm-solver-2s", "sum", 0.1, None)
    assert (uvit.lr, uvit.label_dropout, uvit.batch) == (1e-3, 0.1, 64)
    free = make_recipe(UVIT, no_data=True, l1=0.2, clamp=None)
    assert (free.l1, free.clamp, free.guidance_scale, free.label_dropout) == (0.2, 5.0, 1.4, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "every"}, "--schedule every needs the caches of a whole trajectory"),
        ({"guidance_scale": 2.0}, "--guidance-scale is for training without data: add --no-data"),
        ({"reweigh_every": 5}, "--reweigh-every is for training without data: add --no-data"),
        ({"sampler": "dpm-solver-2m"}, "dpm-solver-2m keeps a history"),
        ({"no_data": True, "label_dropout": 0.2}, "--label-dropout is for training with data"),
        ({"error": "max"}, "--error 'max' is unknown"),
        ({"no_data": True, "reweigh_every": 0}, "--reweigh-every 0 is outside"),
        ({"clamp": 0.0}, "--clamp 0.0 is outside"),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(changes, message):
    with pytest.raises(L2CError, match=message):
        make_recipe(DIT, **changes)
