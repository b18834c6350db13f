"""An execution context with its weights and shapes, and what it was last bound to."""

from __future__ import annotations

from collections.abc import Mapping

from l2c_export.core.engines import Engine as Record
from l2c_export.errors import L2CError
from l2c_export.runtime.device.protocols import ALIGNMENT, Context, KeepingContext
from l2c_export.runtime.device.weights import DeviceWeights


class Bound:
    """One context; run it as often as you like, in the order of its stream."""

    def __init__(
        self, record: Record, context: Context, weights: DeviceWeights, sizes: Mapping[str, int]
    ) -> None:
        """Fix shapes and bind the weights.

        Args:
            record: Of the engine.
            context: Of the engine.
            weights: All of the runner's; an input for weights that is none of them by its name is
                bound at each run.
            sizes: Of the dimensions ``"batch"``, ``"rows"`` and ``"n"``.

        Raises:
            L2CError: The engine does not take these sizes.
        """
        self._record, self._context = record, context
        self._addresses: dict[str, int] = {}
        fixed = [value.name for value in record.weights if value.name in weights]
        self._changing = [
            value.name
            for value in (*record.inputs, *record.weights, *record.outputs)
            if value.name not in fixed
        ]
        for value in (*record.inputs, *record.weights):
            shape = value.sized(sizes)
            if not context.set_input_shape(value.name, shape):
                raise L2CError(
                    f"the engine of {record.graph} does not take {value.name} of shape {shape}; "
                    "build the engines for this batch"
                )
        for name in fixed:
            self._set(name, weights[name])

    def enqueue(self, addresses: Mapping[str, int], stream: int, once: bool = False) -> None:
        """Run once on a stream.

        Args:
            addresses: Name to address; must have every input and output that was not bound for ever.
            stream: Where to.
            once: Whether these addresses do not come again, so that no graph of them is of use.

        Raises:
            L2CError: An input has no address, or the engine refuses to run.
        """
        for name in self._changing:
            if name not in addresses:
                raise L2CError(
                    f"the engine of {self._record.graph} has the value {name!r}, which this "
                    "release knows nothing of; build the engines again or install a matching l2c-export"
                )
            if self._addresses.get(name) != addresses[name]:
                self._set(name, addresses[name])
        self.repeat(stream, once)

    def repeat(self, stream: int, once: bool = False) -> None:
        """Run once more, with the same addresses.

        Raises:
            L2CError: The engine refuses to run.
        """
        if once and isinstance(self._context, KeepingContext):
            done = self._context.execute_once(stream)
        else:
            done = self._context.execute_async_v3(stream)
        if not done:
            raise L2CError(f"the engine of {self._record.graph} did not run; see the log with -vv")

    def _set(self, name: str, address: int) -> None:
        if address % ALIGNMENT:
            raise AssertionError(f"{name} of {self._record.graph} is at {address:#x}, unaligned")
        if not self._context.set_tensor_address(name, address):
            raise L2CError(f"the engine of {self._record.graph} does not take an address for {name!r}")
        self._addresses[name] = address
