"""The command line: one file a command, each a doorway to one library function."""

from __future__ import annotations

import importlib
import logging
import os
import sys

import click

from l2c_export import __version__
from l2c_export.errors import L2CError, UnsupportedError

COMMANDS = {
    "plan": "l2c_export.cli.plan",
    "build": "l2c_export.cli.build",
    "calibrate": "l2c_export.cli.calibrate",
    "engines": "l2c_export.cli.engines",
    "run": "l2c_export.cli.run",
    "verify": "l2c_export.cli.verify",
    "bench": "l2c_export.cli.bench",
    "tune": "l2c_export.cli.tune",
    "inspect": "l2c_export.cli.inspect",
    "doctor": "l2c_export.cli.doctor",
    "train-router": "l2c_export.cli.train_router",
    "demo": "l2c_export.cli.demo",
}
"""Command name to the module that defines it as ``command``; imported when it is used."""


_EXTRAS = {f"engines {name}": "engines" for name in ("filelock", "onnx", "onnx_ir")}
"""Command and missing module to the extra that has it without PyTorch; ``all`` has everything."""


class _Shown(click.ClickException):
    """An error of ours as click shows it, with its own exit code."""

    def __init__(self, error: L2CError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]


class _Commands(click.Group):
    """Loads a command when it is asked for, and turns errors into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name]).command
        if not any(param.name == "verbose" for param in command.params):
            command = _verbose(command)
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except L2CError as error:
            raise _Shown(error) from error
        except ModuleNotFoundError as error:
            if (error.name or "l2c_export").startswith("l2c_export"):
                raise
            extra = _EXTRAS.get(f"{ctx.invoked_subcommand} {error.name}", "all")
            need = f"this needs {error.name}; install it with: pip install 'l2c-export[{extra}]'"
            raise _Shown(UnsupportedError(need)) from error
        except BrokenPipeError:
            raise
        except OSError as error:
            what = error.filename or "a file"
            raise _Shown(L2CError(f"cannot use {what}: {error.strerror or error}")) from error


class _Echo(logging.Handler):
    """Log records as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        click.echo(f"{'warning' if warning else record.name}: {record.getMessage()}", err=True)


def _set_level(ctx: click.Context, param: click.Parameter, count: int) -> None:
    """Show what our own modules log; other libraries keep their peace."""
    logger = logging.getLogger("l2c_export")
    if count or ctx.parent is None:
        logger.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(count, 2)])
    if not logger.handlers:
        logger.addHandler(_Echo())


_verbose = click.option(
    "-v",
    "--verbose",
    count=True,
    expose_value=False,
    callback=_set_level,
    help="Say more; twice for everything.",
)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="l2c-export")
@_verbose
def cli() -> None:
    """Compile a learned caching schedule of a diffusion transformer into deployable graphs."""


def main() -> None:
    """Run the command line; Ctrl-C exits with 130."""
    try:
        code = cli.main(prog_name="l2c-export", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        code = 130
    except click.ClickException as error:
        _show(error)
        code = error.exit_code
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code if isinstance(code, int) else 0)


def _show(error: click.ClickException) -> None:
    """Say what is wrong in one line; a command line without a command gets the help."""
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        error.show()
        return
    text, ctx = error.format_message(), getattr(error, "ctx", None)
    if ctx is not None:
        text = f"{' '.join(text.split())}  (see: {ctx.command_path} -h)"
    click.echo(f"Error: {text}", err=True)
