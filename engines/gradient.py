"""Reverse-mode differentiation of an ONNX graph, written as ONNX: a table of vector-Jacobian rules
and one reverse walk.

Each rule gets the cotangent of a node's output (the gradient of the objective with respect to it)
and appends the nodes that compute the cotangent of its data input. Weights are constants and get
none. The formulas are those of Griewank & Walther (2008, chapter 3), in the forms that OpenVINO and
TensorRT compile well: no ConvTranspose, no scatter.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from engines.errors import ModelError
from engines.graph import Graph, attributes_of
from engines.windows import convolution_adjoint, lrn_adjoint, spread_windows, windows_of


@dataclass(frozen=True)
class Step:
    """One node on the way back: the graph, the node, the cotangent of its output and the ReLU rule
    in force.
    """

    graph: Graph
    node: onnx.NodeProto
    cotangent: str
    guided: bool

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
        return [
            self.shape(self.cotangent)[0] if kept and i == 0 else n for i, n in enumerate(shape)
        ]

    def add(self, op: str, *inputs: str, **attributes: object) -> str:
        return self.graph.add(op, *inputs, hint=f"grad_{self.y}", **attributes)

    def constant(self, index: int) -> np.ndarray:
        """The value of input ``index``, which must be a constant.

        Raises:
            ModelError: it is computed from the image.
        """
        name = self.node.input[index]
        if name not in self.graph.constants:
            raise ModelError(
                f"node '{self.node.name or self.y}' ({self.node.op_type}): input '{name}' must be a"
                " constant for the gradient graph"
            )
        return self.graph.constants[name]


Rule = Callable[[Step, int], str]
"""(step, which input) -> cotangent of that input."""


def conv(step: Step, _: int) -> str:
    """Correlation with the flipped kernel, channels swapped; strides by sub-pixel phases."""
    return convolution_adjoint(step.graph, step.node, step.constant(1), step.cotangent)


def relu(step: Step, _: int) -> str:
    """Passes where the unit is active; guided backpropagation (Springenberg et al. 2015) also needs
    a positive cotangent.
    """
    zero = step.graph.constant(0.0)
    active = step.add("Greater", step.y, zero)
    passed = step.add("Relu", step.cotangent) if step.guided else step.cotangent
    return step.add("Where", active, passed, zero)


def clip(step: Step, _: int) -> str:
    """Passes where the value lies strictly inside the limits."""
    zero, limits = step.graph.constant(0.0), [*step.node.input[1:], "", ""]
    result = step.cotangent
    for bound, side in ((limits[0], "Greater"), (limits[1], "Less")):
        if bound:
            result = step.add("Where", step.add(side, step.x, bound), result, zero)
    return result


def max_pool(step: Step, _: int) -> str:
    """To the largest element of each window, the first of equal ones in reading order, as PyTorch
    does.
    """
    return spread_windows(
        step.graph, windows_of(step.graph, step.node), step.cotangent, (step.x, step.y)
    )


def average_pool(step: Step, _: int) -> str:
    """Evenly to each window's elements (only those inside the image, unless
    ``count_include_pad``).
    """
    windows = windows_of(step.graph, step.node)
    weights = step.graph.constant(
        1.0 / windows.counts(bool(step.attributes.get("count_include_pad", 0)))
    )
    return spread_windows(step.graph, windows, step.add("Mul", step.cotangent, weights), None)


def global_average_pool(step: Step, _: int) -> str:
    return _expand_mean(step, step.cotangent)


def reduce_mean(step: Step, _: int) -> str:
    """Mean over constant axes."""
    rank = len(step.shape(step.x))
    axes = list(range(rank))
    if len(step.node.input) > 1 and step.node.input[1]:
        axes = [int(a) % rank for a in step.constant(1)]
    kept = [1 if i in axes else n for i, n in enumerate(step.shape(step.x))]
    return _expand_mean(step, _reshape(step, step.cotangent, step.batched(kept)))


def _expand_mean(step: Step, cotangent: str) -> str:
    """Spread a mean's cotangent (same rank as x) back over what it was the mean of."""
    shape = step.shape(step.x)
    share = np.prod(step.shape(step.y)) / np.prod(shape)
    scaled = step.add("Mul", cotangent, step.graph.constant(share))
    return step.add("Expand", scaled, step.graph.constant(step.batched(shape), np.int64))


def matmul(step: Step, _: int) -> str:
    """X @ W: g @ W^T."""
    return step.add(
        "MatMul", step.cotangent, step.graph.constant(step.constant(1).swapaxes(-1, -2))
    )


def gemm(step: Step, _: int) -> str:
    """Alpha * x @ op(W) + beta * c: alpha * g @ op(W)^T, reading the same stored weight."""
    at = step.attributes
    step.constant(1)
    if at.get("transA", 0):
        raise ModelError(
            f"node '{step.node.name or step.y}' (Gemm): a transposed data input is not supported"
        )
    alpha = float(at.get("alpha", 1.0))  # type: ignore[arg-type]
    return step.add(
        "Gemm",
        step.cotangent,
        step.node.input[1],
        transB=1 - int(bool(at.get("transB", 0))),
        alpha=alpha,
    )


def add(step: Step, index: int) -> str:
    return _unbroadcast(step, step.cotangent, step.node.input[index])


def sub(step: Step, index: int) -> str:
    signed = step.add("Neg", step.cotangent) if index == 1 else step.cotangent
    return _unbroadcast(step, signed, step.node.input[index])


def mul(step: Step, index: int) -> str:
    """Product with a constant."""
    step.constant(1 - index)
    return _unbroadcast(
        step, step.add("Mul", step.cotangent, step.node.input[1 - index]), step.node.input[index]
    )


def div(step: Step, _: int) -> str:
    """Quotient by a constant."""
    step.constant(1)
    return _unbroadcast(step, step.add("Div", step.cotangent, step.node.input[1]), step.x)


def concat(step: Step, index: int) -> str:
    axis = int(step.attributes["axis"]) % len(step.shape(step.y))  # type: ignore[call-overload]
    sizes = [step.shape(name)[axis] for name in step.node.input]
    start = sum(sizes[:index])
    ends = [np.array([value]) for value in (start, start + sizes[index], axis)]
    return step.add("Slice", step.cotangent, *(step.graph.constant(e, np.int64) for e in ends))


def reshape(step: Step, _: int) -> str:
    return _reshape(step, step.cotangent, step.batched(step.shape(step.x)))


def transpose(step: Step, _: int) -> str:
    rank = len(step.shape(step.x))
    perm = step.attributes.get("perm", list(range(rank))[::-1])
    return step.add("Transpose", step.cotangent, perm=[int(i) for i in np.argsort(perm)])  # type: ignore[arg-type]


def identity(step: Step, _: int) -> str:
    return step.cotangent


def batch_normalization(step: Step, _: int) -> str:
    """A fixed scale per channel, as at inference: gamma / sqrt(variance + epsilon)."""
    epsilon = float(step.attributes.get("epsilon", 1e-5))  # type: ignore[arg-type]
    scale = step.constant(1) / np.sqrt(step.constant(4) + epsilon)
    shape = [1, -1] + [1] * (len(step.shape(step.x)) - 2)
    return step.add("Mul", step.cotangent, step.graph.constant(scale.reshape(shape)))


def lrn(step: Step, _: int) -> str:
    """Local response normalization, see ``engines.windows.lrn_adjoint``."""
    return lrn_adjoint(step.graph, step.node, step.cotangent)


def _reshape(step: Step, tensor: str, shape: Sequence[int]) -> str:
    return step.add("Reshape", tensor, step.graph.constant(list(shape), np.int64))


def _unbroadcast(step: Step, cotangent: str, target: str) -> str:
    """Sum the cotangent over the axes along which ``target`` was broadcast."""
    have, want = step.shape(step.y), step.shape(target)
    if have == want:
        return cotangent
    lead = len(have) - len(want)
    axes = [i for i in range(len(have)) if i < lead or want[i - lead] != have[i]]
    summed = step.add("ReduceSum", cotangent, step.graph.constant(axes, np.int64), keepdims=1)
    return _reshape(step, summed, want if lead else step.batched(want))


RULES: Mapping[str, Rule] = {
    "Conv": conv,
    "Relu": relu,
    "Clip": clip,
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "GlobalAveragePool": global_average_pool,
    "ReduceMean": reduce_mean,
    "MatMul": matmul,
    "Gemm": gemm,
    "Add": add,
    "Sub": sub,
    "Mul": mul,
    "Div": div,
    "Concat": concat,
    "Reshape": reshape,
    "Flatten": reshape,
    "Squeeze": reshape,
    "Unsqueeze": reshape,
    "Transpose": transpose,
    "Identity": identity,
    "Dropout": identity,
    "BatchNormalization": batch_normalization,
    "LRN": lrn,
}


def attach_gradient(
    graph: Graph, cotangents: Mapping[str, str], wrt: Sequence[str], relu_rule: str = "plain"
) -> dict[str, str]:
    """Append the gradient of an objective to the forward graph it depends on.

    Args:
        graph: the forward graph; the gradient nodes are appended to it.
        cotangents: for each tensor that the objective reads directly, the name of the objective's
            gradient with respect
            to it: of the same shape, or where the forward graph is of one image, of several
                objectives at once.
        wrt: the tensors to differentiate by: the pixels, inner activations, several at once. The
            walk stops at the last of them, so that an inner layer is cheaper than the pixels.
        relu_rule: ``plain``, or ``guided`` for guided backpropagation.

    Returns:
        For each tensor in ``wrt``, the name of its gradient.

    Raises:
        ModelError: an operator on the way has no rule, or a tensor in ``wrt`` does not influence
            the objective.
    """
    if relu_rule not in ("plain", "guided"):
        raise ModelError(f"unknown ReLU rule '{relu_rule}': use plain or guided")
    nodes = list(graph.nodes)
    reached = _influenced(nodes, wrt)
    graph.backward_starts.update(cotangents.values())
    found: dict[str, list[str]] = {name: [value] for name, value in cotangents.items()}
    totals: dict[str, str] = {}
    for node in reversed(nodes):
        output = node.output[0]
        if output not in reached or output not in found:
            continue
        cotangent = totals[output] = _sum(graph, found.pop(output))
        if not any(name in reached for name in node.input):
            continue
        rule = RULES.get(node.op_type)
        if rule is None:
            raise ModelError(
                f"operator {node.op_type} (node '{node.name or output}') has no gradient rule; "
                f"known operators: {', '.join(sorted(RULES))}"
            )
        step = Step(graph, node, cotangent, relu_rule == "guided")
        for index, name in enumerate(node.input):
            if name in reached:
                found.setdefault(name, []).append(rule(step, index))
    totals.update({name: _sum(graph, parts) for name, parts in found.items() if name in wrt})
    for name in wrt:
        if name not in totals:
            raise ModelError(
                f"the objective does not depend on tensor '{name}': choose a layer before it"
            )
    return {name: totals[name] for name in wrt}


def _influenced(nodes: Sequence[onnx.NodeProto], wrt: Sequence[str]) -> set[str]:
    """Every float tensor that depends on one of ``wrt``, those included."""
    reached = set(wrt)
    for node in nodes:
        if reached.intersection(node.input):
            reached.update(node.output)
    return reached


def _sum(graph: Graph, parts: list[str]) -> str:
    total = parts[0]
    for part in parts[1:]:
        total = graph.add("Add", total, part, hint="grad_sum")
    return total
