"""Gradient rules of reductions and normalizations: operators that compute a value from many."""

from collections.abc import Mapping, Sequence

import numpy as np

from engines.errors import ModelError
from engines.gradient.walk import Rule, Step
from engines.gradient.windows import lrn_adjoint
from engines.graph import FLOAT


def _axes(step: Step) -> list[int]:
    """The axes that a Reduce operator goes over."""
    rank = len(step.shape(step.x))
    if len(step.node.input) > 1 and step.node.input[1] and step.constant(1).size:
        return [int(axis) % rank for axis in step.constant(1)]
    return [] if step.attributes.get("noop_with_empty_axes", 0) else list(range(rank))


def _kept(step: Step, tensor: str) -> str:
    """A result, or its cotangent, with the axes that were reduced as axes of length 1."""
    axes = _axes(step)
    shape = [1 if i in axes else n for i, n in enumerate(step.shape(step.x))]
    wanted = step.batched(shape) if tensor == step.cotangent else shape
    return step.add("Reshape", tensor, step.integers(wanted))


def _spread(step: Step, tensor: str) -> str:
    """A tensor of the reduced shape, repeated to the shape of the input."""
    return step.add("Expand", tensor, step.integers(step.batched(step.shape(step.x))))


def reduce_sum(step: Step, _: int) -> str:
    return _spread(step, _kept(step, step.cotangent))


def reduce_mean(step: Step, _: int) -> str:
    """Evenly over constant axes."""
    share = np.prod(step.shape(step.y)) / np.prod(step.shape(step.x))
    return _spread(step, step.add("Mul", _kept(step, step.cotangent), step.number(share)))


def global_average_pool(step: Step, _: int) -> str:
    share = np.prod(step.shape(step.y)) / np.prod(step.shape(step.x))
    return _spread(step, step.times(step.number(share)))


def _to_equal(step: Step, result: str, cotangent: str, axes: Sequence[int]) -> str:
    """Evenly to the elements that equal the result."""
    equal = step.add("Cast", step.add("Equal", step.x, result), to=FLOAT)
    count = step.add("ReduceSum", equal, step.integers(axes), keepdims=1)
    return step.add("Mul", equal, step.add("Div", cotangent, count))


def reduce_extreme(step: Step, _: int) -> str:
    """Evenly to the largest (ReduceMax) or smallest elements, as PyTorch's ``amax`` does."""
    return _to_equal(step, _kept(step, step.y), _kept(step, step.cotangent), _axes(step))


def global_max_pool(step: Step, _: int) -> str:
    return _to_equal(step, step.y, step.cotangent, range(2, len(step.shape(step.x))))


def reduce_l1(step: Step, _: int) -> str:
    return step.add("Mul", step.add("Sign", step.x), _kept(step, step.cotangent))


def reduce_l2(step: Step, _: int) -> str:
    share = step.add("Div", _kept(step, step.cotangent), _kept(step, step.y))
    return step.add("Mul", step.x, share)


def reduce_sum_square(step: Step, _: int) -> str:
    doubled = step.add("Mul", step.x, step.number(2.0))
    return step.add("Mul", doubled, _kept(step, step.cotangent))


def reduce_log_sum_exp(step: Step, _: int) -> str:
    share = step.add("Exp", step.add("Sub", step.x, _kept(step, step.y)))
    return step.add("Mul", share, _kept(step, step.cotangent))


def reduce_product(step: Step, _: int) -> str:
    """The product of all others. It needs inputs that are not 0."""
    others = step.add("Div", _kept(step, step.y), step.x)
    return step.add("Mul", others, _kept(step, step.cotangent))


def softmax(step: Step, _: int) -> str:
    """``y (g - sum(g y))``."""
    axis = step.integers([int(step.attributes.get("axis", -1))])  # type: ignore[call-overload]
    total = step.add("ReduceSum", step.times(step.y), axis, keepdims=1)
    return step.add("Mul", step.y, step.add("Sub", step.cotangent, total))


def log_softmax(step: Step, _: int) -> str:
    """``g - exp(y) sum(g)``."""
    axis = step.integers([int(step.attributes.get("axis", -1))])  # type: ignore[call-overload]
    total = step.add("ReduceSum", step.cotangent, axis, keepdims=1)
    return step.add("Sub", step.cotangent, step.add("Mul", step.add("Exp", step.y), total))


def batch_normalization(step: Step, _: int) -> str:
    """A fixed scale per channel, as at inference: gamma / sqrt(variance + epsilon)."""
    epsilon = float(step.attributes.get("epsilon", 1e-5))  # type: ignore[arg-type]
    scale = step.constant(1) / np.sqrt(step.constant(4) + epsilon)
    shape = [1, -1] + [1] * (len(step.shape(step.x)) - 2)
    return step.times(step.graph.constant(scale.reshape(shape)))


def lrn(step: Step, _: int) -> str:
    """Local response normalization, see ``engines.gradient.windows.lrn_adjoint``."""
    return lrn_adjoint(step.graph, step.node, step.cotangent)


def _normalized(step: Step, x: str, cotangent: str, axes: Sequence[int], epsilon: float) -> str:
    """The adjoint of ``(x - mean) / sqrt(variance + epsilon)`` over ``axes``.

    With the normalized value n and its cotangent g: ``(g - mean(g) - n mean(g n)) / deviation``
    (Ba et al. 2016, "Layer normalization").
    """
    over = step.integers(axes)
    centred = step.add("Sub", x, step.add("ReduceMean", x, over, keepdims=1))
    variance = step.add("ReduceMean", step.add("Mul", centred, centred), over, keepdims=1)
    deviation = step.add("Sqrt", step.add("Add", variance, step.number(epsilon)))
    normal = step.add("Div", centred, deviation)
    mean = step.add("ReduceMean", cotangent, over, keepdims=1)
    slope = step.add("ReduceMean", step.add("Mul", cotangent, normal), over, keepdims=1)
    rest = step.add("Sub", step.add("Sub", cotangent, mean), step.add("Mul", normal, slope))
    return step.add("Div", rest, deviation)


def layer_normalization(step: Step, _: int) -> str:
    step.constant(1)
    rank = len(step.shape(step.x))
    first = int(step.attributes.get("axis", -1)) % rank  # type: ignore[call-overload]
    epsilon = float(step.attributes.get("epsilon", 1e-5))  # type: ignore[arg-type]
    scaled = step.times(step.node.input[1])
    return _normalized(step, step.x, scaled, range(first, rank), epsilon)


def instance_normalization(step: Step, _: int) -> str:
    rank = len(step.shape(step.x))
    epsilon = float(step.attributes.get("epsilon", 1e-5))  # type: ignore[arg-type]
    scale = step.constant(1).reshape([1, -1] + [1] * (rank - 2))
    scaled = step.times(step.graph.constant(scale))
    return _normalized(step, step.x, scaled, range(2, rank), epsilon)


def lp_normalization(step: Step, _: int) -> str:
    """Of the Euclidean length: ``(g - y sum(g y)) / length``.

    Raises:
        ModelError: it is another length.
    """
    if int(step.attributes.get("p", 2)) != 2:  # type: ignore[call-overload]
        raise ModelError(f"{step.where}: only p = 2 is supported")
    axis = step.integers([int(step.attributes.get("axis", -1))])  # type: ignore[call-overload]
    length = step.add("ReduceL2", step.x, axis, keepdims=1)
    total = step.add("ReduceSum", step.times(step.y), axis, keepdims=1)
    rest = step.add("Sub", step.cotangent, step.add("Mul", step.y, total))
    return step.add("Div", rest, length)


RULES: Mapping[str, Rule] = {
    "GlobalAveragePool": global_average_pool,
    "GlobalMaxPool": global_max_pool,
    "ReduceMean": reduce_mean,
    "ReduceSum": reduce_sum,
    "ReduceMax": reduce_extreme,
    "ReduceMin": reduce_extreme,
    "ReduceL1": reduce_l1,
    "ReduceL2": reduce_l2,
    "ReduceSumSquare": reduce_sum_square,
    "ReduceLogSumExp": reduce_log_sum_exp,
    "ReduceProd": reduce_product,
    "Softmax": softmax,
    "LogSoftmax": log_softmax,
    "BatchNormalization": batch_normalization,
    "LRN": lrn,
    "LayerNormalization": layer_normalization,
    "InstanceNormalization": instance_normalization,
    "LpNormalization": lp_normalization,
}
