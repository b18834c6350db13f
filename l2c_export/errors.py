"""The one exception that users see, and the exit codes of the command line.

A bare ``ValueError`` or ``assert`` anywhere else means that we made the mistake.
"""

from __future__ import annotations


class L2CError(Exception):
    """A user's mistake or a broken input: one line that names the thing, the value and the way out."""

    exit_code = 1


class VerificationError(L2CError):
    """A bundle computes something else than its reference."""

    exit_code = 3


class UnsupportedError(L2CError):
    """This machine, this release or this bundle cannot do what was asked."""

    exit_code = 4
