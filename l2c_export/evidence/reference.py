"""The eager PyTorch reference: Learning-to-Cache sampling, one call after the other.

It knows nothing of graphs, liveness or buffers: it keeps the last value of every sub-layer and takes
what the schedule reuses from there. Bundles are verified against it, and it is the peer in ``bench``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from l2c_export.build.checkpoint import open_checkpoint
from l2c_export.build.models import Branches, build_model, guide
from l2c_export.build.precision import decode
from l2c_export.core.bundle import WEIGHTS, Bundle
from l2c_export.core.models import ModelConfig, config_from_json
from l2c_export.core.precision import precision_of
from l2c_export.core.sampler_call import Step


@dataclass(frozen=True)
class Record:
    """One call of the reference.

    Attributes:
        x: (B, C, S, S) latent that the call saw.
        output: (B, C, S, S) noise prediction, guided.
        branches: Slot to the (rows, N, D) branch output that the call used, computed or reused.
        x_next: (B, C, S, S) latent after the update.
    """

    x: Tensor
    output: Tensor
    branches: Branches
    x_next: Tensor


class Reference:
    """The eager model of a configuration and its weights.

    Args:
        config: The model.
        state: Parameter name to float32 tensor; used as they are, without a copy.
        guidance: Whether a call evaluates a conditional and an unconditional row for each latent.
    """

    def __init__(self, config: ModelConfig, state: Mapping[str, Tensor], guidance: bool = True) -> None:
        with torch.device("meta"):
            self.model = build_model(config)
        self.model.load_state_dict(dict(state), assign=True)
        self.model.eval().requires_grad_(False)
        self.config = config
        self.guidance = guidance

    def call(
        self,
        x: Tensor,
        timestep: float,
        labels: Tensor,
        guidance_scale: float,
        reuse: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Branches]:
        """Evaluate the network once.

        Args:
            x: (B, C, S, S) float32.
            timestep: The same for all rows.
            labels: (B,) int64.
            guidance_scale: Of classifier-free guidance; not used without guidance.
            reuse: Slot to the (rows, N, D) value to use instead of computing it.

        Returns:
            (B, C, S, S) noise prediction and every branch output that the call used.
        """
        if self.guidance:
            x = torch.cat([x, x])
            labels = torch.cat([labels, torch.full_like(labels, self.config.null_label)])
        t = torch.full((len(x),), timestep, dtype=torch.float32)
        with torch.inference_mode():
            prediction, branches = self.model(x, t, labels, reuse)
            if self.guidance:
                return guide(prediction, guidance_scale, self.config), branches
            return prediction[:, : self.config.in_channels], branches

    def trajectory(
        self,
        calls: Iterable[Step],
        reused: Iterable[Sequence[str]],
        labels: Tensor,
        noise: Tensor,
        guidance_scale: float,
        call_noise: Iterable[Tensor] = (),
    ) -> Iterator[Record]:
        """Sample, yielding call by call.

        Args:
            calls: Timesteps and updates, noisiest first.
            reused: For each call, the slots that take the last value instead of a new one.
            labels: (B,) int64.
            noise: (B, C, S, S) float32, the first latent.
            guidance_scale: Of classifier-free guidance; not used without guidance.
            call_noise: For each call the (B, C, S, S) noise that it may draw; for stochastic
                samplers.
        """
        latents, draws = {"x": noise}, iter(call_noise)
        last: Branches = {}
        for call, names in zip(calls, reused, strict=True):
            x, reuse = latents["x"], {name: last[name] for name in names}
            output, last = self.call(x, call.timestep, labels, guidance_scale, reuse)
            values = latents | {"output": output}
            if (drawn := next(draws, None)) is not None:
                values["noise"] = drawn
            latents = latents | {
                target: reduce(torch.add, [c * values[source] for source, c in sources.items()])
                for target, sources in call.update.items()
            }
            yield Record(x, output, last, latents["x"])


def bundle_reference(bundle: Bundle) -> Reference:
    """The reference of a bundle over its own weights: mapped and not copied where they are float32."""
    manifest = bundle.manifest
    config = config_from_json(manifest.model, f"{bundle.path}: model")
    with safetensors.safe_open(bundle.path / WEIGHTS, framework="pt") as file:
        state = decode(config, precision_of(manifest.precision), file.get_tensor)
    return Reference(config, state, guidance=manifest.guidance is not None)


def checkpoint_reference(bundle: Bundle, checkpoint: Path) -> Reference:
    """The reference of a bundle with the weights of a checkpoint, read as ``build`` reads it."""
    manifest = bundle.manifest
    config = config_from_json(manifest.model, f"{bundle.path}: model")
    state = dict(open_checkpoint(checkpoint, config).iter_tensors())
    return Reference(config, state, guidance=manifest.guidance is not None)
