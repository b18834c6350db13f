"""An execution context with its weights and shapes, and what it was last bound to."""

from __future__ import annotations

from collections.abc import Mapping

from l2c_export.core.bundle import Value
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
            weights: All of the runner's.
            sizes: Of the dimensions ``"batch"``, ``"rows"`` and ``"n"``.

        Raises:
            L2CError: The engine does not take these sizes.
        """
        self._record, self._context = record, context
        self._addresses: dict[str, int] = {}
        for value in (*record.inputs, *record.weights):
            shape = sized(value, sizes)
            if not context.set_input_shape(value.name, shape):
                raise L2CError(
                    f"the engine of {record.graph} does not take {value.name} of shape {shape}; "
                    "build the engines for this batch"
                )
        for value in record.weights:
            self._set(value.name, weights[value.name])

    def enqueue(self, addresses: Mapping[str, int], stream: int, once: bool = False) -> None:
        """Run once on a stream.

        Args:
            addresses: Name to address; must have every input and output that is no weight.
            stream: Where to.
            once: Whether these addresses do not come again, so that no graph of them is of use.

        Raises:
            L2CError: An input has no address, or the engine refuses to run.
        """
        for value in (*self._record.inputs, *self._record.outputs):
            if value.name not in addresses:
                raise L2CError(
                    f"the engine of {self._record.graph} has the value {value.name!r}, which this "
                    "release knows nothing of; build the engines again or install a matching l2c-export"
                )
            if self._addresses.get(value.name) != addresses[value.name]:
                self._set(value.name, addresses[value.name])
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


def sized(value: Value, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A value's shape with numbers for its dimensions' names."""
    return tuple(d if isinstance(d, int) else sizes[d] for d in value.shape)
