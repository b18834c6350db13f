"""The latent, what the sampler keeps beside it, and the update that a call's coefficients say."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from l2c_export.core.bundle import Manifest
from l2c_export.core.sampler_call import Update
from l2c_export.runtime.buffers import aligned
from l2c_export.runtime.noise import NoiseSource

Floats = NDArray[np.float32]


class SamplerState:
    """Buffers at fixed addresses; nothing is allocated after this.

    Attributes:
        x: (B, C, H, W) the latent.
        output: (B, C, H, W) the guided model output, which a call fills.
    """

    def __init__(self, manifest: Manifest, batch: int) -> None:
        shape = (batch, *manifest.latent)
        targets = sorted({target for call in manifest.calls for target in call.update})
        self._kept: dict[str, Floats] = {name: aligned(shape) for name in targets}
        self._next: dict[str, Floats] = {name: aligned(shape) for name in targets}
        self._term: Floats = aligned(shape)
        self.x = self._kept["x"]
        self.output: Floats = aligned(shape)
        self._values = self._kept | {"output": self.output}
        self._noise: Floats | None = None
        if manifest.stochastic:
            self._noise = self._values["noise"] = aligned(shape)

    def apply(self, index: int, update: Update, noise: NoiseSource | None) -> None:
        """Update the latent and what is kept after call ``index``.

        Args:
            index: Of the call.
            update: Of the call.
            noise: Fills the noise of the call; None where the sampler is not stochastic.
        """
        if self._noise is not None and noise is not None:
            noise(index, self._noise)
        for target, sources in update.items():  # all from the old values, whatever is updated first
            total, first = self._next[target], True
            for source, coefficient in sources.items():
                into = total if first else self._term
                np.multiply(self._values[source], np.float32(coefficient), out=into)
                if not first:
                    np.add(total, self._term, out=total)
                first = False
        for target in update:
            np.copyto(self._kept[target], self._next[target])
