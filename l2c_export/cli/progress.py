"""How far things are: one line that moves on a terminal, with a clock."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

Progress = Callable[[str, int, int], None]
"""Called with what is done, how much of it is done and how much there is."""

_COUNTABLE = 100_000  # more than that are bytes


@contextmanager
def show_progress(shown: bool = True, *, keep: bool = False) -> Iterator[Progress]:
    """Yield a function that shows on stderr how far things are.

    Args:
        shown: False shows nothing.
        keep: Leave a line for each thing that is done, on a terminal and elsewhere.
    """
    terminal, start = sys.stderr.isatty(), time.monotonic()

    def show(what: str, done: int, total: int) -> None:
        seconds = time.monotonic() - start
        if terminal:
            count = f"{done}/{total}" if total < _COUNTABLE else f"{100 * done // total} %"
            click.echo(f"\r\033[K{seconds:6.1f} s  {what} {count}", nl=False, err=True)
        if keep and done == total:
            click.echo(("\r\033[K" if terminal else "") + f"{seconds:6.1f} s  {what} done", err=True)

    if not shown:
        yield lambda *_: None
        return
    try:
        yield show
    finally:
        if terminal:
            click.echo("\r\033[K", nl=False, err=True)
