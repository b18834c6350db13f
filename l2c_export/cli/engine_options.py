"""Options of the commands that build engines, and what those do with them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from l2c_export.core.engines import PER
from l2c_export.core.profile import parse_bytes
from l2c_export.errors import L2CError

if TYPE_CHECKING:
    from l2c_export.engines.request import EngineRequest

ENGINE_BACKENDS = ("rtx", "trt", "ort-cuda")
"""Backends that run engines."""

ENGINE_KEYS = ("per", "target", "max_vram", "optimization_level", "workspace", "tf32")
"""What these options take from a profile."""


def _bytes(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else parse_bytes(value)
    except L2CError as error:
        raise click.BadParameter(str(error)) from None


_OPTIONS = (
    click.option(
        "--per",
        type=click.Choice(PER),
        default="graph",
        show_default=True,
        help="What gets an engine: each step graph, or each kind of sub-layer, for every schedule.",
    ),
    click.option(
        "--target",
        metavar="SM,SM …",
        help="Compute capabilities: sm86,sm89. Default: portable (rtx), this machine's GPU (trt).",
    ),
    click.option(
        "--weights",
        type=click.Choice(["inputs", "constants"]),
        default="inputs",
        show_default=True,
        help="One copy that all engines are bound to, or a copy inside of each.",
    ),
    click.option(
        "--max-vram", metavar="SIZE", callback=_bytes, help="Fail if a session needs more: 8G."
    ),
    click.option(
        "--optimization-level", type=click.IntRange(0, 5), help="How long the builder searches."
    ),
    click.option(
        "--workspace", metavar="SIZE", callback=_bytes, help="Scratch that a kernel may take: 1G."
    ),
    click.option("--tf32/--no-tf32", default=False, help="Round float32 products to TF32."),
)


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add them; the command gets ``engines``, which makes a request for a backend."""

    @functools.wraps(command)
    def packed(**values: Any) -> Any:
        given = {name: values.pop(name) for name in (*ENGINE_KEYS, "weights")}
        return command(engines=functools.partial(_request, given), **values)

    for option in reversed(_OPTIONS):
        packed = option(packed)
    return packed


def check_typed(name: str, precision: str, backend: str) -> None:
    """Refuse a backend, as typed, that does not take the precision of a bundle.

    A request says ``ort`` of ``ort-cuda`` too: the same networks, which a CPU could run.

    Raises:
        UnsupportedError: It does not.
    """
    from l2c_export.engines.request import check_precision

    check_precision(name, precision, backend)


def _request(given: dict[str, Any], backend: str) -> EngineRequest:
    from l2c_export.engines.request import EngineRequest, parse_targets

    return EngineRequest(
        "ort" if backend == "ort-cuda" else backend,
        parse_targets(given["target"]) if given["target"] else (),
        given["weights"] == "constants",
        given["per"],
        given["max_vram"],
        given["optimization_level"],
        given["workspace"],
        given["tf32"],
    )
