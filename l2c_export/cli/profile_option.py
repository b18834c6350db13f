"""``--profile``: a deployment target's defaults for the options of a command."""

from __future__ import annotations

import click

from l2c_export.core.profile import profile_names, read_profile
from l2c_export.errors import L2CError


def _apply(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Make the profile's values the command's defaults; what the user types goes before them."""
    if value is None:
        return
    try:
        profile = read_profile(value)
    except L2CError as error:
        if error.exit_code != 1:
            raise
        raise click.BadParameter(str(error), ctx, param) from None
    values = {
        "backend": profile.backend,
        "batch": profile.batch,
        "threads": profile.threads,
        "max_graphs": profile.max_graphs,
    }
    ctx.default_map = {key: value for key, value in values.items() if value is not None}


profile_option = click.option(
    "--profile",
    metavar="NAME|FILE",
    is_eager=True,
    expose_value=False,
    callback=_apply,
    help=f"Defaults for a deployment target: {', '.join(profile_names())}, or a TOML file.",
)
