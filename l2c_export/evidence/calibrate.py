"""Calibration: sample a model, and watch how large the inputs of its branches' linear layers get."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from l2c_export.build.calibration import weights_digest
from l2c_export.core.bundle import Bundle
from l2c_export.core.calibration import Calibration
from l2c_export.core.precision import branch_weights
from l2c_export.core.samplers import model_table
from l2c_export.errors import L2CError
from l2c_export.evidence.reference import bundle_reference
from l2c_export.evidence.verify import draw_call_noise, draw_inputs

_LATENTS = 4  # in one call of the reference

Progress = Callable[[str, int, int], None]
"""Called with what is done, how many calls of it and how many there are."""


def calibrate(
    bundle: Bundle, samples: int, seed: int, progress: Progress = lambda *_: None
) -> Calibration:
    """Sample with a bundle's model, weights, sampler, number of calls and guidance, all computed.

    Args:
        bundle: Of any precision; its schedule does not matter.
        samples: Trajectories, of random classes.
        seed: Of classes and noise.
        progress: Told each call.

    Raises:
        L2CError: A layer takes what is not finite.
    """
    manifest, reference = bundle.manifest, bundle_reference(bundle)
    config = reference.config
    scale = manifest.guidance.scale if manifest.guidance else None
    table = model_table(manifest.sampler, len(manifest.calls), config)
    labels, noise = (torch.from_numpy(drawn) for drawn in draw_inputs(manifest, None, samples, seed))
    draws = draw_call_noise(manifest, samples, seed)
    batches = [slice(begin, begin + _LATENTS) for begin in range(0, samples, _LATENTS)]
    nothing: list[tuple[str, ...]] = [()] * len(table)  # is reused
    done, total = itertools.count(1), len(batches) * len(table)
    seen = {name: torch.zeros(()) for name in branch_weights(config)}
    with _watching(reference.model, seen, str(bundle.path)):
        for part in batches:
            call_noise = () if draws is None else torch.from_numpy(draws[:, part])
            for _ in reference.trajectory(
                table, nothing, labels[part], noise[part], 1.0 if scale is None else scale, call_noise
            ):
                progress("calibration", next(done), total)
    parameters = dict(reference.model.named_parameters()) | dict(reference.model.named_buffers())
    return Calibration(
        model=config.to_json(),
        weights=weights_digest(config, parameters.__getitem__),
        sampler=manifest.sampler,
        calls=len(table),
        samples=samples,
        seed=seed,
        guidance_scale=scale,
        layers={name: tuple(_short(maxima)) for name, maxima in seen.items()},
    )


def _short(maxima: Tensor) -> list[float]:
    """Rounded to four digits: more than a range needs, and short as text."""
    return [float(f"{value:.4g}") for value in maxima.tolist()]


@contextmanager
def _watching(model: nn.Module, seen: dict[str, Tensor], where: str) -> Iterator[None]:
    """Keep the largest magnitude of each input channel, by weight; ``where`` begins the message."""

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            largest = args[0].detach().abs().flatten(0, -2).amax(0)
            seen[name] = torch.maximum(seen[name], largest)
            if not torch.isfinite(largest).all():
                raise L2CError(f"{where}: the input of {name} holds NaN or Inf; nothing can be chosen")

        return keep

    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in seen}
    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
