"""Training without data: HarmoniCa's step-wise denoising (arXiv 2410.01723).

An iteration is one trajectory, from noise, with guidance, and it is the student's own: each routed call
starts from the latent and the caches that the student came to, teacher and student see the same, and
the student's output makes the next latent. So a call learns to reuse what it will really find, errors
of earlier calls included. No gradient passes from call to call.

The error is that of the guided output, which is what moves the latent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from l2c_export.build.models import Branches, Model, guide
from l2c_export.core.samplers import Call
from l2c_export.train.objective import Weights, generator
from l2c_export.train.recipe import Recipe
from l2c_export.train.student import advance, mixing, squared_error, times
from l2c_export.train.workers import Workers

Latents = dict[str, Tensor]


class WithoutData:
    """The errors of all routed calls of a trajectory.

    Args:
        model: Frozen, on its device.
        calls: The sampler's table.
        recipe: How it is trained.
        workers: The processes that share the batch.

    Attributes:
        importance: (rows,) weight of each routed call's error; 1 on average.
    """

    def __init__(self, model: Model, calls: Sequence[Call], recipe: Recipe, workers: Workers) -> None:
        self.model, self.calls, self.recipe, self.workers = model, calls, recipe, workers
        self.rows = {call: row for row, call in enumerate(recipe.shape.routed)}
        self.importance = torch.ones(len(self.rows))

    def errors(self, iteration: int, weights: Weights) -> Iterator[tuple[int, Tensor]]:
        """Yield each routed call's row and error, in the order of the trajectory."""
        every = self.recipe.reweigh_every
        if every is not None and iteration % every == 0:
            self.importance = self._weigh(iteration, weights)
        walk = self._start(1 + self.workers.rank, iteration)
        latents, cache = walk.noise, Branches()
        for i in range(len(self.calls)):
            row = self.rows.get(i)
            if row is None:
                with torch.no_grad():
                    output, cache = walk.output(i, latents)
            else:
                with torch.no_grad():
                    teacher = walk.output(i, latents)[0]
                student, branches = walk.output(i, latents, cache, weights(row))
                yield row, squared_error(student, teacher, self.recipe.error)
                output, cache = student.detach(), {name: b.detach() for name, b in branches.items()}
            latents = walk.advance(i, latents, output)

    def _start(self, stream: int, iteration: int) -> _Walk:
        """A trajectory by chance; each process has a stream of its own, 0 is common to all."""
        recipe, config, entropy = self.recipe, self.model.config, (self.recipe.seed, stream, iteration)
        count, device = recipe.batch // self.workers.count, next(self.model.parameters()).device
        chance = generator(*entropy)
        labels = torch.randint(config.num_classes, (count,), generator=chance)
        noise = torch.randn(count, *config.latent_shape, generator=chance)
        both = torch.cat([labels, torch.full_like(labels, config.null_label)])
        assert recipe.guidance_scale is not None  # the recipe has seen to it
        return _Walk(
            self.model,
            self.calls,
            {"x": noise.to(device)},
            both.to(device),
            recipe.guidance_scale,
            entropy,
        )

    @torch.no_grad()
    def _weigh(self, iteration: int, weights: Weights) -> Tensor:
        """(rows,) how far caching at each routed call moves the final latent, 1 on average.

        As HarmoniCa's paper defines it, the trajectory without caching at one call alone is compared
        with the student's (its released code takes caching away call after call). Divided by the mean,
        so that l1 keeps its meaning. All processes weigh the same trajectories.
        """
        walk = self._start(0, iteration)

        def follow(i: int, latents: Latents, cache: Branches) -> tuple[Latents, Branches]:
            row = self.rows.get(i)
            output, used = walk.output(i, latents, cache, None if row is None else weights(row))
            return walk.advance(i, latents, output), used

        def finish(i: int, latents: Latents, cache: Branches) -> Tensor:
            for later in range(i, len(self.calls)):
                latents, cache = follow(later, latents, cache)
            return latents["x"]

        latents, cache, finals = walk.noise, Branches(), []
        for i in range(len(self.calls)):
            if i in self.rows:
                output, fresh = walk.output(i, latents)
                finals.append(finish(i + 1, walk.advance(i, latents, output), fresh))
            latents, cache = follow(i, latents, cache)
        moved = torch.stack([(final - latents["x"]).square().mean() for final in finals]).cpu()
        mean = moved.mean()
        return moved / mean if mean > 0 else torch.ones_like(moved)


@dataclass(frozen=True)
class _Walk:
    """One batch's trajectory: what is fixed along it."""

    model: Model
    calls: Sequence[Call]
    noise: Latents
    labels: Tensor  # (2B,) one for each latent, then as many null labels
    scale: float
    entropy: tuple[int, ...]

    def output(
        self,
        call: int,
        latents: Latents,
        cache: Branches | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Branches]:
        """(B, C, S, S) guided output of a call, and the branches that it used.

        With weights it is the student's, with what the cache holds.
        """
        x = torch.cat([latents["x"], latents["x"]])
        t = times(self.calls[call], x)
        if cache is None or weights is None:
            prediction, branches = self.model(x, t, self.labels)
        else:
            with mixing(self.model, cache, weights):
                prediction, branches = self.model(x, t, self.labels)
        return guide(prediction, self.scale, self.model.config), branches

    def advance(self, call: int, latents: Latents, output: Tensor) -> Latents:
        """The latents after a call; its noise is the same however one came to it."""
        return advance(latents, self.calls[call], output, generator(*self.entropy, call))
