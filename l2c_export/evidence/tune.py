"""Which threshold, of which router: what each removes, what it costs and how far it drifts.

All schedules of a model share its weights, its full graph and its conditioning, so one bundle in the
work folder holds the step graphs of all of them, and a schedule is nothing but another program on it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import filelock

from l2c_export.build.build_options import (
    build_arguments,
    request_from_options,
    weights_from_options,
)
from l2c_export.build.schedule_options import ScheduleOptions
from l2c_export.core.bundle import Bundle
from l2c_export.core.files import write_json
from l2c_export.errors import L2CError, UnsupportedError
from l2c_export.evidence.machine import load_average, machine_json, usable_cores
from l2c_export.evidence.tune_choice import Budget, Row, choose, on_front
from l2c_export.evidence.tune_costs import CostModel, measure_costs, probes
from l2c_export.evidence.tune_measure import Arena, Effort, conditions_key
from l2c_export.evidence.tune_picture import draw_tune
from l2c_export.evidence.tune_rows import tune_rows, uncached_json
from l2c_export.evidence.tune_schedules import Contest, make_contest
from l2c_export.runtime import Runner

REPORT, PICTURE = "tune.json", "tune.png"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TuneOptions:
    """What to tune, and how thoroughly.

    Attributes:
        schedule: Model, sampler, batch and budget of graphs.
        routers: Files; none takes the released router of the preset.
        checkpoint: Of the weights; None takes the official one of the preset.
        random_weights: Seed of random weights, instead of a checkpoint.
        thresholds: For all routers; None takes each router's own.
        points: So many of a router's own thresholds.
        guidance_scale: None is the model's default.
        budget: What to choose by; None marks the Pareto front and chooses nothing.
        samples: Latents that the drift is averaged over, rounded up to whole batches.
        repeats: Timed trajectories of each schedule; 0 goes by the prediction.
        seed: Of noise and labels.
        threads: None is one for each core.
    """

    schedule: ScheduleOptions
    routers: tuple[Path, ...] = ()
    checkpoint: Path | None = None
    random_weights: int | None = None
    thresholds: tuple[float, ...] | None = None
    points: int = 12
    guidance_scale: float | None = None
    budget: Budget | None = None
    samples: int = 8
    repeats: int = 3
    seed: int = 0
    threads: int | None = None


def tune(options: TuneOptions, output: Path, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Compare routers and thresholds.

    Args:
        options: What to compare.
        output: Folder for ``tune.json``, ``tune.png`` and ``work/``, which holds the bundle and all
            measurements: with it a later run measures only what is lacking.
        progress: Told what is being made or measured.

    Returns:
        The report, ready for JSON. A budget that nothing keeps leaves ``chosen`` None; see
        :func:`l2c_export.evidence.tune_choice.check_budget`.

    Raises:
        L2CError: The parts do not fit each other, or a file cannot be read or written.
        UnsupportedError: There is nothing to draw the picture with.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError("tune draws a picture; pip install 'l2c-export[report]'")
    contest = make_contest(options.schedule, options.routers, options.thresholds, options.points)
    work = output / "work"
    load_before = load_average()
    with _own(work):
        bundle = _build(work / "bundle", options, contest, progress)
        effort = Effort(
            samples=options.samples,
            repeats=options.repeats,
            batch=options.schedule.batch[1],
            seed=options.seed,
            threads=options.threads or usable_cores(),
        )
        runner = Runner.load(bundle.path, "ort", effort.threads)
        costs = _costs(work / "measured", runner, contest, effort, progress)
        programs = {contender.key: contender.plan for contender in contest.contenders}
        records = Arena(runner, work / "measured", effort).measure(programs, progress)
    rows = tune_rows(contest, costs, effort, records)
    chosen = choose(rows, options.budget)
    for i, row in enumerate(rows):
        row |= {"front": on_front(row, rows), "chosen": i == chosen}
    data = {
        **_facts(contest, runner, effort),
        "load_average_before": load_before,
        "uncached": uncached_json(contest, costs, effort, records),
        "rows": rows,
        "budget": options.budget and asdict(options.budget),
        "chosen": chosen,
        "next": None if chosen is None else _build_command(options, rows[chosen]),
    }
    write_json(output / REPORT, data)
    draw_tune(data, output / PICTURE)
    return data


@contextlib.contextmanager
def _own(work: Path) -> Iterator[None]:
    """Hold the work folder against another tuning, whose load would spoil the times."""
    work.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(work / "lock", timeout=0):
            yield
    except filelock.Timeout:
        raise L2CError(f"another tuning is at work in {work.parent}; wait for it") from None


def _build(folder: Path, options: TuneOptions, contest: Contest, progress: Progress) -> Bundle:
    """A bundle whose own program is uncached, with the step graphs of all contenders and probes."""
    from l2c_export.build.build import build_bundle

    weights = weights_from_options(options.schedule, options.checkpoint, options.random_weights)
    graphs = [graph for contender in contest.contenders for graph in contender.plan.graphs]
    more = (*graphs, *probes(contest.uncached.config).values())
    request = request_from_options(options.schedule, contest.uncached, weights, options.guidance_scale)
    return build_bundle(folder, replace(request, more_graphs=more), progress)


def _costs(
    folder: Path, runner: Runner, contest: Contest, effort: Effort, progress: Progress
) -> CostModel:
    """The cost model, measured once."""
    path = folder / f"costs-{conditions_key(runner, effort)[:16]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return CostModel(**json.loads(path.read_text(encoding="utf-8")))
    progress("cost model", 0, 1)
    costs = measure_costs(runner, contest.uncached.config, effort.batch)
    write_json(path, asdict(costs))
    progress("cost model", 1, 1)
    return costs


def _facts(contest: Contest, runner: Runner, effort: Effort) -> dict[str, Any]:
    """What was compared, and where."""
    manifest = runner.manifest
    return {
        "model": manifest.model,
        "preset": manifest.preset,
        "random_weights": manifest.random_weights,
        "sampler": manifest.sampler,
        "calls": len(manifest.calls),
        "slots": len(manifest.slots.names),
        "guidance_scale": manifest.guidance and manifest.guidance.scale,
        "batch": effort.batch,
        "samples": effort.rounds * effort.batch,
        "seed": effort.seed,
        "repeats": effort.repeats,
        "routers": [
            {"name": contest.label(i), "penalty": contest.penalty(i), **router.source}
            for i, router in enumerate(contest.routers)
        ],
        "machine": machine_json(runner.backend.version, effort.threads),
    }


def _build_command(options: TuneOptions, row: Row) -> str:
    router = options.routers[row["router"]] if options.routers else None
    chosen = replace(options.schedule, router=router)
    words = build_arguments(chosen, options.checkpoint, options.random_weights, options.guidance_scale)
    return shlex.join([*words, "--threshold", str(row["threshold"])])
