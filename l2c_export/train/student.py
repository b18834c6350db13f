"""Teacher and student: the frozen model, and the same with every branch mixed with a cached one.

The student's branch is (1 - w) * cached + w * fresh with w = sigmoid(logit), before the branch's gate
(L2C, arXiv 2406.01733, equation 6 with alpha = 1, as in the authors' code). What it used is what it
stores. At w = 1 that is the fresh value and at w = 0 the old one, so a cache ages as it does under the
hard schedule that the scores become.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from l2c_export.build.models import Branches, Model
from l2c_export.core.samplers import Call


@contextmanager
def mixing(model: Model, cached: Branches, weights: Tensor) -> Iterator[None]:
    """Within this block every branch of the model gives (1 - w) * cached + w * fresh.

    Args:
        model: The model; its own forward runs, so that a student can differ in nothing else.
        cached: Slot to the (R, N, D) branch output that was stored last.
        weights: (slots,) w in 0 … 1, in the order of ``config.slots``.
    """

    def mix(reused: Tensor, w: Tensor) -> Callable[[nn.Module, object, Tensor], Tensor]:
        return lambda module, args, fresh: (1 - w) * reused + w * fresh

    modules = model.branch_modules().items()
    handles = [
        module.register_forward_hook(mix(cached[name], w))
        for (name, module), w in zip(modules, weights, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def branch_weights(logits: Tensor, ste_threshold: float | None) -> Tensor:
    """(slots,) weights of fresh branches: the scores, or with a threshold 0 and 1 in their place."""
    scores = logits.sigmoid()
    if ste_threshold is None:
        return scores
    return (scores > ste_threshold).to(scores) + scores - scores.detach()


def squared_error(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Squared error of (R, C, S, S), ``mean`` or ``sum`` over a latent, and the mean over rows."""
    squares = (student - teacher).square()
    return squares.mean() if kind == "mean" else squares.flatten(1).sum(dim=1).mean()


def times(call: Call, x: Tensor) -> Tensor:
    """(R,) the call's timestep."""
    return torch.full((len(x),), call.timestep, device=x.device)


def advance(
    latents: Mapping[str, Tensor], call: Call, output: Tensor, chance: torch.Generator | None
) -> dict[str, Tensor]:
    """The sampler's update after a call.

    Args:
        latents: (R, C, S, S) ``x`` and what the sampler keeps.
        call: Says the coefficients.
        output: (R, C, S, S) model output.
        chance: Of the noise of a stochastic sampler; on the CPU.
    """
    values = {**latents, "output": output}
    if any("noise" in sources for sources in call.update.values()):
        values["noise"] = torch.randn(output.shape, generator=chance).to(output)
    return {**latents} | {
        target: functools.reduce(torch.add, [c * values[source] for source, c in sources.items()])
        for target, sources in call.update.items()
    }
