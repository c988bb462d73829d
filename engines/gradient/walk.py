"""The walk back through a graph, and what a gradient rule is given."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from engines.errors import ModelError
from engines.graph import FLOAT, Graph, attributes_of


@dataclass(frozen=True)
class Step:
    """One node on the way back.

    Attributes:
        graph: the rule appends its nodes to it.
        node: of the forward pass.
        cotangents: of each output of the node; None where the objective does not depend on it.
        guided: whether ReLUs follow the rule of guided backpropagation.
    """

    graph: Graph
    node: onnx.NodeProto
    cotangents: tuple[str | None, ...]
    guided: bool

    @property
    def cotangent(self) -> str:
        """Of the first output.

        Raises:
            ModelError: the objective depends on another output only.
        """
        if self.cotangents[0] is None or any(self.cotangents[1:]):
            raise ModelError(f"{self.where}: its outputs besides the first have no gradient rule")
        return self.cotangents[0]

    @property
    def where(self) -> str:
        """The node in words."""
        return f"node '{self.node.name or self.y}' ({self.node.op_type})"

    @property
    def attributes(self) -> dict[str, object]:
        return attributes_of(self.node)

    @property
    def x(self) -> str:
        """The data input."""
        return str(self.node.input[0])

    @property
    def y(self) -> str:
        return str(self.node.output[0])

    def shape(self, tensor: str) -> tuple[int, ...]:
        return self.graph.shape(tensor)

    def batched(self, shape: Sequence[int]) -> list[int]:
        """The shape of a gradient: that of its tensor, with as many images as the cotangent has
        where it has the output's.
        """
        kept = bool(shape) and bool(self.shape(self.y)) and shape[0] == self.shape(self.y)[0]
        found = next(name for name in self.cotangents if name is not None)
        return [self.shape(found)[0] if kept and i == 0 else n for i, n in enumerate(shape)]

    def add(self, op: str, *inputs: str, **attributes: object) -> str:
        return self.graph.add(op, *inputs, hint=f"grad_{self.y}", **attributes)

    def number(self, value: float) -> str:
        """A float constant."""
        return self.graph.constant(value)

    def integers(self, values: Sequence[int]) -> str:
        """A constant vector of int64."""
        return self.graph.constant(list(values), np.int64)

    def reshape(self, tensor: str, shape: Sequence[int]) -> str:
        """A tensor in another shape; itself where it has that shape."""
        if list(self.shape(tensor)) == list(shape):
            return tensor
        return self.add("Reshape", tensor, self.integers(shape))

    def times(self, factor: str) -> str:
        """The cotangent, multiplied."""
        return self.add("Mul", self.unspread(factor), factor)

    def unspread(self, beside: str) -> str:
        """The cotangent, or where it repeats a smaller tensor that one, if an operator that also
        reads ``beside`` repeats it by itself: the gradient of a mean is one value for many.
        """
        before = self.graph.producer(self.cotangent)
        if before is None or before.op_type != "Expand":
            return self.cotangent
        small = str(before.input[0])
        shapes = self.shape(small), self.shape(beside)
        whole = np.broadcast_shapes(*shapes) == self.shape(self.cotangent)
        return small if whole else self.cotangent

    def is_constant(self, index: int) -> bool:
        """Whether input ``index`` is the same for all images."""
        return self.node.input[index] in self.graph.constants

    def constant(self, index: int) -> np.ndarray:
        """The value of input ``index``, which must be a constant.

        Raises:
            ModelError: it is computed from the image.
        """
        name = self.node.input[index]
        if name not in self.graph.constants:
            raise ModelError(
                f"{self.where}: input '{name}' must be a constant for the gradient graph"
            )
        return self.graph.constants[name]

    def unbroadcast(self, cotangent: str, index: int, inner: int = 0) -> str:
        """Sum a cotangent over the axes along which input ``index`` was broadcast. The last
        ``inner`` axes are not broadcast: those of a matrix product are its own.
        """
        have, want = self.shape(self.y), self.shape(self.node.input[index])
        lead = len(have) - len(want)
        axes = [i for i in range(len(have) - inner) if i < lead or want[i - lead] != have[i]]
        if not axes:
            return cotangent
        summed = self.add("ReduceSum", cotangent, self.integers(axes), keepdims=1)
        return self.reshape(summed, want if lead else self.batched(want))


Rule = Callable[[Step, int], str]
"""(step, which input) -> cotangent of that input."""

RULES: dict[str, Rule] = {}
"""Rule of each operator, filled by ``engines.gradient``."""


def attach_gradient(
    graph: Graph, cotangents: Mapping[str, str], wrt: Sequence[str], relu_rule: str = "plain"
) -> dict[str, str]:
    """Append the gradient of an objective to the forward graph it depends on.

    Args:
        graph: the forward graph; the gradient nodes are appended to it.
        cotangents: for each tensor that the objective reads directly, the name of the objective's
            gradient with respect to it: of the same shape, or where the forward graph is of one
            image, of several objectives at once.
        wrt: the tensors to differentiate by: the pixels, inner activations, several at once. The
            walk stops at the last of them, so that an inner layer is cheaper than the pixels.
        relu_rule: ``plain``, or ``guided`` for guided backpropagation.

    Returns:
        For each tensor in ``wrt``, the name of its gradient.

    Raises:
        ModelError: operators on the way have no rule, or a tensor in ``wrt`` does not influence
            the objective.
    """
    if relu_rule not in ("plain", "guided"):
        raise ModelError(f"unknown ReLU rule '{relu_rule}': use plain or guided")
    reached = _influenced(graph, wrt)
    nodes = _between(graph.nodes, reached, cotangents)
    _check_rules(nodes)
    graph.backward_starts.update(cotangents.values())
    found: dict[str, list[str]] = {name: [value] for name, value in cotangents.items()}
    totals: dict[str, str] = {}
    for node in nodes:
        totals.update({name: _sum(graph, found.pop(name)) for name in node.output if name in found})
        parts = tuple(totals.get(name) for name in node.output)
        if not any(parts):
            continue
        step = Step(graph, node, parts, relu_rule == "guided")
        for index, name in enumerate(node.input):
            if name in reached:
                found.setdefault(name, []).append(RULES[node.op_type](step, index))
    totals.update({name: _sum(graph, parts) for name, parts in found.items() if name in wrt})
    for name in wrt:
        if name not in totals:
            raise ModelError(
                f"the objective does not depend on tensor '{name}': choose a layer before it"
            )
    graph.backward_ends.update(totals[name] for name in wrt)
    return {name: totals[name] for name in wrt}


def _influenced(graph: Graph, wrt: Sequence[str]) -> set[str]:
    """Every float tensor that depends on one of ``wrt``, those included."""
    reached = set(wrt)
    for node in graph.nodes:
        if reached.intersection(node.input):
            reached.update(name for name in node.output if name and graph.types[name].elem == FLOAT)
    return reached


def _between(
    nodes: Sequence[onnx.NodeProto], reached: set[str], ends: Mapping[str, str]
) -> list[onnx.NodeProto]:
    """The nodes between ``wrt`` and the objective, the last one first."""
    wanted, kept = set(ends), []
    for node in reversed(nodes):
        if wanted.intersection(node.output) and reached.intersection(node.input):
            kept.append(node)
            wanted.update(reached.intersection(node.input))
    return kept


def _check_rules(nodes: Sequence[onnx.NodeProto]) -> None:
    """Raise ModelError with all operators that have no rule, where and how often."""
    missing: dict[str, list[str]] = {}
    for node in reversed(nodes):
        if node.op_type not in RULES:
            missing.setdefault(node.op_type, []).append(node.name or node.output[0])
    if missing:
        named = [
            f"{kind} (1 node, '{names[0]}')"
            if len(names) == 1
            else f"{kind} ({len(names)} nodes, the first '{names[0]}')"
            for kind, names in sorted(missing.items())
        ]
        raise ModelError(
            f"operator{'s' * (len(named) > 1)} {', '.join(named)}"
            f" ha{'ve' if len(named) > 1 else 's'} no gradient rule, as {len(RULES)} other"
            " operators have: export the network without"
        )


def _sum(graph: Graph, parts: list[str]) -> str:
    total = parts[0]
    for part in parts[1:]:
        total = graph.add("Add", total, part, hint="grad_sum")
    return total
