"""``--profile``: a deployment target's defaults for the options of a command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import click

from l2c_export.core.profile import profile_names, read_profile
from l2c_export.errors import L2CError, UnsupportedError

PROFILE = f"{__name__}.profile"
"""Where a command finds the whole profile, in its context's ``meta``."""

_Command = TypeVar("_Command", bound=Callable[..., Any])


def profile_option(*keys: str) -> Callable[[_Command], _Command]:
    """Add ``--profile``: these of its values become defaults; what the user types goes before them."""

    def apply(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        if value is None:
            return
        try:
            profile = read_profile(value)
        except UnsupportedError:
            raise
        except L2CError as error:
            raise click.BadParameter(str(error), ctx, param) from None
        ctx.meta[PROFILE] = profile
        values = asdict(profile)
        ctx.default_map = {key: values[key] for key in keys if values[key] is not None}

    return click.option(
        "--profile",
        metavar="NAME|FILE",
        is_eager=True,
        expose_value=False,
        callback=apply,
        help=f"Defaults for a deployment target: {', '.join(profile_names())}, or a TOML file.",
    )
