"""One call of a bundle against the same call of the eager reference.

Two comparisons, because each sees what the other cannot. Teacher forcing gives every call of the
bundle the reference's own latent and slots, so an error is found in the call and the slot where it
is made. Free running feeds the bundle what it made itself, so it sees the buffers, the sampler's
numbers and how errors grow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from l2c_export.core.bundle import Manifest, ProgramCall
from l2c_export.core.samplers import Call, model_table

if TYPE_CHECKING:
    from torch import Tensor

    from l2c_export.evidence.reference import Record, Reference
    from l2c_export.runtime.session import AnySession

Array = NDArray[Any]


@dataclass(frozen=True)
class Tolerance:
    """The largest errors allowed.

    Attributes:
        slots: Of a slot, from the reference's own inputs.
        output: Of a call's guided output, from the reference's own inputs.
        latent: Of what free running makes, to which the errors of all calls before add up.
        rms: Errors are root mean squares instead of the worst value's.
    """

    slots: float
    output: float
    latent: float
    rms: bool = False

    def error(self, value: Array, reference: Array) -> float:
        """What is held against it: :func:`relative_error`."""
        return relative_error(value, reference, self.rms)


@dataclass(frozen=True)
class CallErrors:
    """What one call of the bundle has different from the reference.

    Attributes:
        index: Of the call.
        timestep: What the network is told.
        graph: The step graph.
        output: Error of the guided output, by teacher forcing where the call is cached.
        slots: Teacher forcing: error of each written slot, in execution order.
        latent: Free running: error of the latent after the call.
        blamed: The slot that the call reads wrongly, or the first that is not finite, where further
            runs found one.
        forced: The output is of teacher forcing, not of free running.
    """

    index: int
    timestep: float
    graph: str
    output: float
    slots: dict[str, float]
    latent: float
    blamed: str = ""

    forced: bool = True

    @property
    def errors(self) -> list[float]:
        """All of them."""
        return [*self.slots.values(), self.output, self.latent]

    @property
    def worst_slot(self) -> tuple[str, float]:
        """Name and error of the written slot that differs most."""
        name = max(self.slots, key=lambda slot: rank(self.slots[slot]), default="")
        return name, self.slots.get(name, 0.0)

    def fault(self, tolerance: Tolerance) -> str | None:
        """The first thing that is wrong in this call, in words."""
        limit = "more than the tolerance {:.1e}".format
        for slot, error in self.slots.items():
            if math.isnan(error):
                return f"slot {slot} holds NaN or Inf"
            if not error <= tolerance.slots:
                return f"slot {slot} differs by {error:.2e}, {limit(tolerance.slots)}"
        if math.isnan(self.output):
            where = f", first in slot {self.blamed}" if self.blamed else ""
            return f"the output holds NaN or Inf{where}"
        allowed = tolerance.output if self.forced else tolerance.latent
        if not self.output <= allowed:
            read = f" because it reads slot {self.blamed} wrongly" if self.blamed else ""
            return f"the output differs by {self.output:.2e}, {limit(allowed)}{read}"
        if math.isnan(self.latent):
            return "the latent after it holds NaN or Inf, though the call is right by itself"
        if not self.latent <= tolerance.latent:
            return (
                f"the latent after it differs by {self.latent:.2e}, {limit(tolerance.latent)}, though "
                "the call is right by itself: the update or the buffers are wrong, or small errors grow"
            )
        return None


def rank(error: float) -> float:
    """A key that sorts NaN as the worst error."""
    return math.inf if math.isnan(error) else error


def relative_error(value: Array, reference: Array, rms: bool = False) -> float:
    """max|value - reference| / max|reference|; NaN where either has a value that is not finite.

    With ``rms`` the root mean square of the difference takes the place of its largest value.
    """
    if not (np.isfinite(value).all() and np.isfinite(reference).all()):
        return math.nan
    apart = np.abs(value.astype(np.float64) - reference)
    difference = float(np.sqrt(np.square(apart).mean()) if rms else apart.max())
    scale = float(np.abs(reference).max())
    return difference / scale if scale else (math.inf if difference else 0.0)


@dataclass
class Comparison:
    """A bundle's trajectory beside the reference's; no more than one call of it is kept.

    Attributes:
        reference: The eager model.
        session: Of the bundle, for as many latents as there are labels.
        manifest: The bundle's.
        labels: (B,) int64.
        noise: (B, C, H, W) float32.
        scale: Guidance scale.
        calls: How many calls to compare.
        tolerance: Says how errors are measured, and which are too large.
        branches: Takes (B, C, H, W) x and a timestep; gives every slot of the bundle's full graph.
        call_noise: (calls, B, C, H, W) float32 that the calls draw; None where they draw none.
    """

    reference: Reference
    session: AnySession
    manifest: Manifest
    labels: NDArray[np.int64]
    noise: Array
    scale: float
    calls: int
    tolerance: Tolerance
    branches: Callable[[Array, float], Mapping[str, Array]]
    call_noise: Array | None = None

    def cached(self) -> Iterator[tuple[CallErrors, Array]]:
        """Yield each call's errors and the bundle's (B, C, H, W) latent after it."""
        tolerance = self.tolerance
        self._start(cached=True)
        sound = True
        program = list(self.manifest.calls[: self.calls])
        for i, (call, record) in enumerate(zip(program, self._records(program), strict=True)):
            output, slots = self._forced(i, call, record)
            bad_slot = not all(error <= tolerance.slots for error in slots.values())
            blamed = ""
            if sound and not output <= tolerance.output and not bad_slot:
                blamed = self._blame(i, call, record)
            latent = self.session.step().x.copy()
            free = tolerance.error(latent, record.x_next.numpy())
            errors = CallErrors(i, call.timestep, call.graph, output, slots, free, blamed)
            sound = sound and errors.fault(tolerance) is None
            yield errors, latent

    def uncached(self) -> Iterator[tuple[CallErrors, Array]]:
        """The same for the graph that computes everything; free running alone, output and latent."""
        self._start(cached=False)
        graph = self.manifest.uncached
        program = [replace(c, graph=graph, reads={}, writes={}) for c in self.manifest.calls]
        program = program[: self.calls]
        for i, (call, record) in enumerate(zip(program, self._records(program), strict=True)):
            result = self.session.step()
            output = self.tolerance.error(result.output, record.output.numpy())
            free = self.tolerance.error(result.x, record.x_next.numpy())
            errors = CallErrors(i, call.timestep, graph, output, {}, free, forced=False)
            yield errors, result.x.copy()

    def _start(self, *, cached: bool) -> None:
        scale = self.scale if self.manifest.guidance else None
        self.session.start(self.labels, self.noise, scale, cached, call_noise=self.call_noise)

    @cached_property
    def _table(self) -> tuple[Call, ...]:
        """What the sampler's name says for the model, not what the manifest's numbers are."""
        config = self.reference.config
        return model_table(self.manifest.sampler, len(self.manifest.calls), config)

    def _records(self, program: list[ProgramCall]) -> Iterator[Record]:
        """The reference's calls: timesteps and updates are the sampler's, not the manifest's."""
        import torch

        return self.reference.trajectory(
            self._table[: self.calls],
            [tuple(call.reads) for call in program],
            torch.from_numpy(self.labels),
            torch.from_numpy(self.noise),
            self.scale,
            () if self.call_noise is None else map(torch.from_numpy, self.call_noise),
        )

    def _forced(self, i: int, call: ProgramCall, record: Record) -> tuple[float, dict[str, float]]:
        """Errors of the output and of every written slot, from the reference's own inputs."""
        wanted = {name: self._stored(record.branches[name]) for name in (*call.reads, *call.writes)}
        order = [name for name in self.manifest.slots.names if name in call.writes]
        inputs = (record.x.numpy(), *(wanted[name] for name in call.reads))
        if not all(np.isfinite(array).all() for array in inputs):
            return math.nan, dict.fromkeys(order, math.nan)
        reads = {name: wanted[name] for name in call.reads}
        output, writes = self.session.run_call(i, record.x.numpy(), reads)
        slots = {name: self.tolerance.error(writes[name], wanted[name]) for name in order}
        return self.tolerance.error(output, record.output.numpy()), slots

    def _stored(self, value: Tensor) -> Array:
        """A branch output of the reference in the bundle's own dtype; bfloat16 in float32."""
        if self.manifest.slots.dtype == "bfloat16":
            return value.bfloat16().float().numpy()
        return value.numpy().astype(self.manifest.slots.dtype, copy=False)

    def _blame(self, i: int, call: ProgramCall, record: Record) -> str:
        """The slot that a call reads wrongly: it sees one at a time, and zeros for the others.

        Where the output is not finite: the first slot of the full graph that is not.
        """
        import torch

        if math.isnan(self._forced(i, call, record)[0]):
            values = self.branches(record.x.numpy(), call.timestep)
            bad = (n for n, value in values.items() if not np.isfinite(value).all())
            return next(bad, "")
        tolerance = self.tolerance.output
        zeros = {name: torch.zeros_like(record.branches[name]) for name in call.reads}
        if not self._probe(i, record, zeros) <= tolerance:
            return ""  # what the call computes is wrong, whatever it reads
        for name in self.manifest.slots.names:
            if name in zeros:
                one = zeros | {name: record.branches[name]}
                if not self._probe(i, record, one) <= tolerance:
                    return name
        return ""

    def _probe(self, i: int, record: Record, reads: dict[str, Tensor]) -> float:
        """Error of a call's output for slots of our choice."""
        import torch

        if not all(torch.isfinite(value).all() for value in (record.x, *reads.values())):
            return math.nan
        timestep = self._table[i].timestep
        labels = torch.from_numpy(self.labels)
        wanted, _ = self.reference.call(record.x, timestep, labels, self.scale, reads)
        arrays = {name: self._stored(value) for name, value in reads.items()}
        got, _ = self.session.run_call(i, record.x.numpy(), arrays)
        return self.tolerance.error(got, wanted.numpy())
