"""A part of a graph copied under names that say positions alone: equal parts become equal bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import onnx_ir as ir

from l2c_export.core.bundle import CONDITIONING, Dimension, Value, multiple
from l2c_export.engines.network import OPSET, Network, model_bytes, values_of


class Trace:
    """The nodes between some values and earlier stages, copied under names that say positions alone.

    Attributes:
        read: Values of earlier stages that they read.
        names: Input, weight or output of the copy to the value's name in the step graph, the name of
            a parameter, or that of a part of the conditioning.
        parts: Parts of the conditioning that they read: name and size of a row.
    """

    def __init__(
        self,
        stage_of: dict[ir.Value, int],
        stage: int,
        outside: Callable[[ir.Value], bool],
        outputs: list[ir.Value],
    ) -> None:
        """Trace values back.

        Args:
            stage_of: Of every value that depends on x.
            stage: Earlier ones are not entered.
            outside: Whether a parameter is to be an input, instead of a constant.
            outputs: The values.
        """
        self._stage_of, self._stage, self._outside = stage_of, stage, outside
        self._made: dict[ir.Value, ir.Value] = {}
        self._nodes: list[ir.Node] = []
        self._inputs: list[ir.Value] = []
        self._weights: list[ir.Value] = []
        self._held: list[ir.Value] = []
        self._constants: list[ir.Value] = []
        self.read: list[ir.Value] = []
        self.names: dict[str, str] = {}
        self.parts: list[tuple[str, int]] = []
        self._outputs: list[ir.Value] = []
        for i, value in enumerate(outputs):
            source, shape = self._unshaped(value)
            made = self._copy(source)
            made.name, made.shape = f"out.{i}", shape
            self.names[made.name] = str(value.name)
            self._outputs.append(made)

    def network(self, rows: int) -> Network:
        """The copy as a network with dimensions in multiples of a batch, which has so many rows."""
        graph = ir.Graph(
            [*self._inputs, *self._weights],
            self._outputs,
            nodes=self._nodes,
            initializers=self._held,
            opset_imports={"": OPSET},
            name="stage",
        )
        model = ir.Model(graph, ir_version=10, producer_name="l2c-export")
        return Network(
            model_bytes(model),
            _in_batches(self._inputs, rows),
            values_of(self._weights),
            _in_batches(self._outputs, rows),
            values_of(self._constants),
        )

    def _copy(self, value: ir.Value) -> ir.Value:
        if value not in self._made:
            node = value.producer()
            if value.const_value is not None:
                self._made[value] = self._parameter(value, value.const_value)
            elif part := _part(value):
                self.parts.append(part)
                self._made[value] = self._input(value, part[0])
            elif node is None or self._stage_of.get(value, self._stage) < self._stage:
                self.read.append(value)
                self._made[value] = self._input(value, str(value.name))
            else:
                self._node(node)
        return self._made[value]

    def _unshaped(self, value: ir.Value) -> tuple[ir.Value, ir.Shape | None]:
        """What the Reshape of a product takes, which are the same bytes, and its shape; else the value.

        Builders leave the bias out of a product whose result is reshaped and then an output.
        """
        node = value.producer()
        source = node.inputs[0] if node is not None and node.op_type == "Reshape" else None
        if source is None or self._stage_of.get(source) != self._stage:
            return value, value.shape
        *outer, inner = value.shape or (None,)
        names = [str(size) for size in outer if not isinstance(size, int)]
        if len(source.shape or ()) != 2 or source.shape[1] != inner or len(names) > 1:  # type: ignore[index]
            return value, value.shape
        count = math.prod(size for size in outer if isinstance(size, int))
        return source, ir.Shape([f"{names[0]}*{count}" if names else count, inner])

    def _node(self, node: ir.Node) -> None:
        inputs = [None if value is None else self._copy(value) for value in node.inputs]
        made = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            [node.attributes[name] for name in sorted(node.attributes)],
            num_outputs=len(node.outputs),
            name=f"{node.op_type}.{len(self._nodes)}",
        )
        for i, (ours, theirs) in enumerate(zip(made.outputs, node.outputs, strict=True)):
            ours.name, ours.type, ours.shape = f"{made.name}.{i}", theirs.type, theirs.shape
            self._made[theirs] = ours
        self._nodes.append(made)

    def _input(self, value: ir.Value, name: str) -> ir.Value:
        made = ir.Value(name=f"in.{len(self._inputs)}", type=value.type, shape=value.shape)
        self._inputs.append(made)
        self.names[str(made.name)] = name
        return made

    def _parameter(self, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(list(tensor.shape))  # type: ignore[arg-type]
        stored = isinstance(tensor, ir.ExternalTensor)
        if stored and self._outside(value):
            made = ir.Value(name=f"weight.{len(self._weights)}", type=kind, shape=shape)
            self._weights.append(made)
            self.names[str(made.name)] = str(value.name)
            return made
        name = f"constant.{len(self._held)}"
        held = ir.tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=name)
        made = ir.Value(name=name, type=kind, shape=shape, const_value=held)
        self._held.append(made)
        if stored:
            self._constants.append(ir.Value(name=value.name, type=kind, shape=shape))
        return made


def _in_batches(of: Iterable[ir.Value], rows: int) -> tuple[Value, ...]:
    """Values whose sizes a runner can tell from each other: not all have both batch and rows."""

    def dimension(size: Dimension) -> Dimension:
        name, times = multiple(size) if isinstance(size, str) else ("", size)
        times *= rows if name == "rows" else 1
        return times if not name else "batch" if times == 1 else f"batch*{times}"

    return tuple(replace(value, shape=tuple(map(dimension, value.shape))) for value in values_of(of))


def _part(value: ir.Value) -> tuple[str, int] | None:
    """Name and size of a part of the conditioning, where a value is one: a slice of its rows."""
    whole = value.producer()
    source = whole.inputs[0] if whole is not None and whole.op_type == "Reshape" else None
    part = source.producer() if source is not None else None
    if part is None or part.op_type != "Slice" or getattr(part.inputs[0], "name", "") != CONDITIONING:
        return None
    held = [value.const_value for value in part.inputs[1:] if value is not None]
    bounds = [int(tensor.numpy()[0]) for tensor in held if tensor is not None]
    if len(bounds) != 3 or bounds[2] != 1:
        return None
    return f"{CONDITIONING}.{bounds[0]}", bounds[1] - bounds[0]
