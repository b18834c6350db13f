"""What a training asks of its student in one iteration, and the chance that it is drawn with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

Weights = Callable[[int], Tensor]
"""From a row of the router to its (slots,) weights of fresh branches, with their gradient."""


class Objective(Protocol):
    """The errors of an iteration.

    Attributes:
        importance: (rows,) weights of the errors, part of a training's checkpoint.
    """

    importance: Tensor

    def errors(self, iteration: int, weights: Weights) -> Iterator[tuple[int, Tensor]]:
        """Yield rows of the router with the error of their student, one at a time.

        Whoever takes an error goes backward through it before taking the next, so that one call's
        activations are held at once.
        """


def generator(*entropy: int) -> torch.Generator:
    """Chance as a function of some numbers: a resumed training is the same training."""
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)
