"""A sampler's call: a timestep, and the coefficients of the update after it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

Terms = dict[str, float]
"""A sum: name of a value to its coefficient."""

Update = dict[str, Terms]
"""What a call leaves behind: target to the coefficients of its sources.

Targets are ``"x"``, the next latent, and the histories that the call writes; others keep their value.
Sources are ``"x"`` (the latent that the call saw), ``"output"`` (the guided model output), histories,
and ``"noise"`` (fresh standard normal numbers, one draw a call). All are the values before the update.
"""

HISTORIES = ("history", "history2")
"""Latents that a solver keeps between calls, each of the shape of x."""


class Step(Protocol):
    """A sampler's or a manifest's call."""

    @property
    def timestep(self) -> float:
        """What the network is told."""

    @property
    def update(self) -> Update:
        """What becomes of the latent and of what the sampler keeps."""


@dataclass(frozen=True)
class Call:
    """One evaluation of the network and the update after it.

    Attributes:
        timestep: What the network is told.
        update: See :data:`Update`.
    """

    timestep: float
    update: Update


def combine(*parts: tuple[float, Terms]) -> Terms:
    """The sum of sums, each times its factor; what has the coefficient 0 is left out."""
    total: Terms = {}
    for factor, terms in parts:
        for name, coefficient in terms.items():
            total[name] = total.get(name, 0.0) + factor * coefficient
    return {name: float(coefficient) for name, coefficient in total.items() if coefficient}


def is_stochastic(calls: Iterable[Step]) -> bool:
    """Whether a program draws noise after its start."""
    return any("noise" in sources for call in calls for sources in call.update.values())


def update_fault(update: Update, written: Collection[str], stochastic: bool) -> str | None:
    """What is wrong with a call's update, in words; None where a runner can execute it.

    Args:
        update: Of one call.
        written: The histories that earlier calls wrote.
        stochastic: Whether the program may draw noise.
    """
    if "x" not in update:
        return "has no update of x"
    if unknown := sorted(set(update) - {"x", *HISTORIES}):
        return f"updates {unknown}, this release knows x, {', '.join(HISTORIES)}"
    sources = {source for coefficients in update.values() for source in coefficients}
    if unknown := sorted(sources - {"x", "output", "noise", *HISTORIES}):
        return f"updates from {unknown}, this release knows x, output, noise, {', '.join(HISTORIES)}"
    if early := sorted(sources & set(HISTORIES) - set(written)):
        return f"reads {early}, which no call before it wrote"
    if "noise" in sources and not stochastic:
        return "draws noise, though the sampler is not stochastic"
    if not all(update.values()):
        return "has an update from nothing"
    if not all(math.isfinite(number) for terms in update.values() for number in terms.values()):
        return "has an update that is no finite number"
    return None
