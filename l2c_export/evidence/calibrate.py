"""Calibration: sample a model, watch what the linear layers of its branches take, choose where to clip.

A layer's magnitudes are counted in bins of fixed edges, sixteen an octave, so one pass over the
trajectories is enough. A wide range makes large steps, a narrow one cuts off large values: the clipping
value is the one with the least expected squared error of both together (of the rules that Wu et al.
2020, arXiv 2004.09602, compare, it is nearest to their entropy, without its binning).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from l2c_export.build.calibration import weights_digest
from l2c_export.core.bundle import Bundle
from l2c_export.core.calibration import Calibration, LayerInput
from l2c_export.core.precision import branch_weights
from l2c_export.core.samplers import model_table
from l2c_export.errors import L2CError
from l2c_export.evidence.reference import bundle_reference
from l2c_export.evidence.verify import draw_call_noise, draw_inputs

_SHIFT = 19  # leaves a float32 its exponent and four bits of mantissa
_BINS = 1 << (31 - _SHIFT)
_INFINITE = 255 << (23 - _SHIFT)  # the first bin of infinity and NaN
_STARTS = np.arange(_INFINITE + 1, dtype=np.int32) << _SHIFT
_EDGES = _STARTS.view(np.float32).astype(np.float64)
_CENTRES = (_STARTS[:-1] + (1 << _SHIFT >> 1)).view(np.float32).astype(np.float64)

_LATENTS = 4  # in one call of the reference

Progress = Callable[[str, int, int], None]
"""Called with what is done, how many calls of it and how many there are."""


class Magnitudes:
    """Counts of the input of a layer, by magnitude.

    Attributes:
        counts: (4096,) int64, by the first twelve bits of the magnitude as a float32.
        largest: The largest magnitude.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(_BINS, np.int64)
        self.largest = 0.0

    def add(self, x: Tensor) -> None:
        """Count the values of a float32 tensor."""
        magnitudes = x.detach().abs().flatten()
        bins = torch.bincount(magnitudes.view(torch.int32) >> _SHIFT, minlength=_BINS)
        self.counts += bins.numpy()
        self.largest = max(self.largest, float(magnitudes.max()))

    @property
    def finite(self) -> bool:
        """Whether no infinity or NaN was counted."""
        return not self.counts[_INFINITE:].any()

    def choose(self) -> LayerInput:
        """The clipping value with the least expected squared error of symmetric int8.

        Of a value below half a step nothing is left, others are off by a twelfth of the squared step
        on average, and those beyond the clipping value by what they are beyond it.
        """
        (used,) = np.nonzero(self.counts)
        values, counts = _CENTRES[used], self.counts[used]
        total = float(values**2 @ counts)
        clips = np.minimum(_EDGES[used + 1], self.largest)[:, None]
        if self.largest == 0:
            return LayerInput(0.0, 0.0, 0.0)
        steps = clips / 127
        squares = np.where(values < steps / 2, values**2, steps**2 / 12)
        squares = np.where(values > clips, (values - clips) ** 2, squares)
        errors = squares @ counts
        best = int(errors.argmin())
        return LayerInput(self.largest, float(clips[best, 0]), float(np.sqrt(errors[best] / total)))


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
    done, total = itertools.count(1), len(batches) * len(table)
    seen = {name: Magnitudes() for name in branch_weights(config)}
    with _watching(reference.model, seen, str(bundle.path)):
        for part in batches:
            call_noise = () if draws is None else torch.from_numpy(draws[:, part])
            for _ in reference.trajectory(
                table, [()] * len(table), labels[part], noise[part], scale or 1.0, call_noise
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
        layers={name: magnitudes.choose() for name, magnitudes in seen.items()},
    )


@contextmanager
def _watching(model: nn.Module, seen: Mapping[str, Magnitudes], where: str) -> Iterator[None]:
    """Count what layers take, by the names of their weights; ``where`` begins the message."""

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name].add(args[0])
            if not seen[name].finite:
                raise L2CError(f"{where}: the input of {name} holds NaN or Inf; nothing can be chosen")

        return count

    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in seen}
    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
