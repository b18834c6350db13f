"""Checkpoints of a router's training: safetensors, whole or not at all, and never a pickle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from l2c_export.core.files import replacing
from l2c_export.core.models import ModelConfig
from l2c_export.errors import L2CError
from l2c_export.train.recipe import Recipe

FORMAT, VERSION = "l2c-router-training", "2"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_AGAIN = "remove it and train without --resume"


@dataclass(frozen=True)
class Run:
    """What a training is: a checkpoint of one is refused by another.

    Attributes:
        recipe: How it is trained.
        config: The model.
        weights: Hexadecimal SHA-256 of the model's checkpoint.
        data: Hexadecimal SHA-256 of the data; None without data.
        processes: How many share a batch.
        latent_scale: Factor of the latents; None without data.
    """

    recipe: Recipe
    config: ModelConfig
    weights: str
    data: str | None
    processes: int = 1
    latent_scale: float | None = 1.0

    def facts(self) -> dict[str, Any]:
        """For the router file: names to numbers, strings and None."""
        return asdict(self.recipe) | {
            "weights_sha256": self.weights,
            "data_sha256": self.data,
            "processes": self.processes,
            "latent_scale": self.latent_scale,
        }


def write_state(
    path: Path,
    run: Run,
    iteration: int,
    logits: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    importance: Tensor,
) -> None:
    """Write logits, AdamW's moments, the weights of the errors and the iteration.

    Raises:
        L2CError: They cannot be written there.
    """
    tensors = {"logits": torch.stack([row.detach().cpu() for row in logits])}
    zero = torch.zeros_like(tensors["logits"][0])
    empty = {"step": torch.zeros(()), "exp_avg": zero, "exp_avg_sq": zero}
    for name in _MOMENTS:
        rows = [optimizer.state[row].get(name, empty[name]).cpu() for row in logits]
        tensors[name] = torch.stack(rows)
    tensors["importance"] = importance
    state = {"iteration": iteration, "run": run.facts(), "model": run.config.to_json()}
    metadata = {"format": FORMAT, "version": VERSION, "state": json.dumps(state, sort_keys=True)}
    try:
        with replacing(path, durable=True) as temporary:
            save_file(tensors, temporary, metadata)
    except OSError as error:
        raise L2CError(f"cannot write the training checkpoint {path}: {error.strerror}") from None


def read_state(
    path: Path, run: Run, logits: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, Tensor]:
    """Fill logits and optimizer from a checkpoint of the same training.

    Returns:
        Iterations made, and the (rows,) weights of the errors.

    Raises:
        L2CError: There is no checkpoint, it is damaged, or it is of another or a longer training.
    """
    tensors, state = _read(path)
    if state["model"] != run.config.to_json():
        raise L2CError(f"training checkpoint {path} is for another model; {_AGAIN}")
    there, here = dict(state["run"]), run.facts()
    # The one thing that may grow: the learning rate is constant.
    there["iterations"] = here["iterations"]
    changed = [
        f"{key} was {there.get(key)}, is {here[key]}" for key in here if there.get(key) != here[key]
    ]
    if changed:
        raise L2CError(
            f"training checkpoint {path} is of another training: {'; '.join(changed[:3])}; "
            f"use the same options, or {_AGAIN}"
        )
    if (done := int(state["iteration"])) > here["iterations"]:
        raise L2CError(
            f"training checkpoint {path} has {done} iterations already; use --iterations {done} or more"
        )
    row = (len(logits),)
    shapes = {"logits": (*row, *logits[0].shape), "step": row, "importance": row}
    for name, tensor in tensors.items():
        if tensor.shape != shapes.get(name, shapes["logits"]) or not torch.isfinite(tensor).all():
            raise L2CError(f"training checkpoint {path} is damaged: '{name}' does not fit the model")
    for i, parameter in enumerate(logits):
        parameter.data.copy_(tensors["logits"][i])
        if tensors["step"][i] > 0:
            moments = {name: tensors[name][i].clone().to(parameter.device) for name in _MOMENTS[1:]}
            optimizer.state[parameter] = {"step": tensors["step"][i].clone()} | moments
    return done, tensors["importance"]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise L2CError(f"nothing to resume: there is no training checkpoint {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise L2CError(f"training checkpoint {path} is damaged: {error}") from None
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise L2CError(f"{path} is no training checkpoint of this release; {_AGAIN}")
    if set(tensors) != {"logits", "importance", *_MOMENTS}:
        raise L2CError(f"training checkpoint {path} is damaged: it holds {sorted(tensors)}")
    try:
        state = json.loads(metadata["state"])
        if isinstance(state["iteration"], int) and isinstance(state["run"], dict) and "model" in state:
            return tensors, state
    except (KeyError, TypeError, ValueError):
        pass
    raise L2CError(f"training checkpoint {path} is damaged: its metadata is incomplete")
