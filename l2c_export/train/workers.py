"""The processes of one training, as ``torchrun`` starts them; one alone without it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from l2c_export.errors import L2CError


@dataclass(frozen=True)
class Workers:
    """How many processes share a training, and which one this is."""

    rank: int = 0
    count: int = 1

    def average(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> float:
        """Average gradients and loss over the processes.

        Processes draw different parameters. A gradient that any of them has counts for all, zero where
        it is missing; one that none has stays None.

        Returns:
            The mean loss.
        """
        if self.count == 1:
            return float(loss)
        used = torch.tensor([p.grad is not None for p in parameters]).to(loss)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([used, loss[None], *[part.flatten() for part in parts]])
        dist.all_reduce(flat)
        at = len(parameters) + 1
        for parameter, seen in zip(parameters, flat.tolist(), strict=False):
            row = flat[at : (at := at + parameter.numel())]
            parameter.grad = (row / self.count).view_as(parameter) if seen else None
        return float(flat[len(parameters)] / self.count)


@contextmanager
def workers(device: str | None) -> Iterator[tuple[Workers, torch.device]]:
    """Join the processes that ``torchrun`` started, if it did, and leave them at the end.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:1``; None takes the GPU of this process if there is one.

    Raises:
        L2CError: There is no such device, or one GPU is named for several processes.
    """
    chosen = _device(device)
    if "WORLD_SIZE" not in os.environ:
        yield Workers(), chosen
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Workers(dist.get_rank(), dist.get_world_size()), chosen
        dist.barrier()  # the first process serves the others: it may not leave before them
    finally:
        dist.destroy_process_group()


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise L2CError(f"--device {name!r} is no device; use cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise L2CError(f"--device {name}: this machine or this PyTorch has none; use --device cpu")
    if device.type == "cuda":
        index = device.index
        if index is None:
            index = int(os.environ.get("LOCAL_RANK", 0))
        elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise L2CError(f"--device {name}: each of several processes takes its own; use cuda")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device
