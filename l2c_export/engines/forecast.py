"""What engines a bundle will get, and whether it may, before the bundle is there."""

from __future__ import annotations

from dataclasses import dataclass

from l2c_export.core.engines import command_name
from l2c_export.core.plan import Plan, StepGraph
from l2c_export.core.plan_report import size
from l2c_export.engines.build import check_limit, check_request, target_families
from l2c_export.engines.request import EngineRequest


@dataclass(frozen=True)
class Forecast:
    """The engines of a bundle, as far as its plan tells.

    Attributes:
        backend: What they are built for.
        families: Targets that are built together; each becomes a folder.
        engines: In all families; None where each kind of sub-layer gets one, as only graphs tell.
        weights: Bytes of device memory for weights, small constants once.
        caches: Bytes of device memory for stored slots, at the largest batch.
        max_vram: Limit of what a session may need, in bytes; None for any.
    """

    backend: str
    families: tuple[tuple[str, ...], ...]
    engines: int | None
    weights: int
    caches: int
    max_vram: int | None


def forecast(request: EngineRequest, plan: Plan, batch: tuple[int, int]) -> Forecast:
    """Check what is asked of engines against a plan, the backend and this machine.

    Args:
        request: What is asked.
        plan: Of the bundle that they will be for.
        batch: Smallest and largest number of latents in a call.

    Raises:
        L2CError: Engines that serve many sub-layers are to hold weights.
        UnsupportedError: The bundle would be built in vain: the backend does not take its precision or
            does not build for a target here, or weights and caches alone are over the limit.
    """
    check_request("a bundle with --precision int8", plan.precision.name, request)
    families = target_families(request, plan.precision)
    graphs = {*plan.graphs, StepGraph((), ())}  # every bundle has the uncached one
    costs = plan.costs
    whole = request.per == "graph"
    made = Forecast(
        request.backend,
        families,
        (len(graphs) + 2) * len(families) if whole else None,  # the conditioning and the update
        costs.copied_weight_bytes if request.constant else costs.weight_bytes,
        (costs.buffer_bytes if whole else len(plan.config.slots) * costs.slot_bytes) * batch[1],
        request.max_vram,
    )
    parts = {"weights": made.weights, "caches": made.caches}
    check_limit("the bundle", parts, request, plan.precision.name, batch)
    return made


def forecast_text(made: Forecast) -> str:
    """The forecast for a terminal, below the plan's totals."""
    targets = "; ".join(", ".join(family) for family in made.families)
    limit = "" if made.max_vram is None else f", the limit is {size(made.max_vram)}"
    count = "one for each kind of sub-layer" if made.engines is None else made.engines
    return (
        f"engines       {count} for {command_name(made.backend)}, targets {targets}: "
        f"{size(made.weights + made.caches)} of device memory for weights and caches{limit}; "
        "beside them latents, conditioning, scratch and code"
    )
