"""Gradient rules of operators that compute each value by itself: activations and arithmetic."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from engines.gradient.walk import Rule, Step
from engines.graph import FLOAT

SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
CUBIC = 0.044715
"""Of the tanh form of GELU (Hendrycks & Gimpel 2016)."""


def _by_derivative(derivative: Callable[[Step], str]) -> Rule:
    """The rule of an activation whose derivative is a tensor."""

    def rule(step: Step, _: int) -> str:
        return step.times(derivative(step))

    return rule


def _attribute(step: Step, name: str, usual: float) -> float:
    return float(step.attributes.get(name, usual))  # type: ignore[arg-type]


def relu(step: Step, _: int) -> str:
    """Passes where the unit is active; guided backpropagation (Springenberg et al. 2015) also needs
    a positive cotangent.
    """
    if not step.guided:
        return step.times(_one_where_positive(step, step.y))
    active = step.add("Greater", step.y, step.number(0.0))
    return step.add("Where", active, step.add("Relu", step.cotangent), step.number(0.0))


def _one_where_positive(step: Step, tensor: str) -> str:
    """1 where a tensor that is never negative is positive, else 0.

    OpenVINO rounds and limits in half the time of a comparison and a choice (measured).
    """
    rounded = step.add("Ceil", tensor)
    return step.graph.add("Min", rounded, step.number(1.0), hint="active")


def clip(step: Step, _: int) -> str:
    """Passes where the value lies strictly inside the limits.

    The output lies inside where the input does. Engines compute it in one go with the convolution
    before, if nothing else reads the input. So the output is asked, if no precision rounds the
    limits: then they might not be equal.
    """
    bounds = [str(name) for name in step.node.input[1:]]
    known = [step.graph.constants.get(name) for name in bounds if name]
    if not known:
        return step.cotangent
    if any(limit is None or not is_short(float(limit.ravel()[0])) for limit in known):
        return _clip_by_input(step, bounds)
    inside = [
        (step.y if not np.any(step.graph.constants[name]) else step.add("Sub", step.y, name))
        if place == 0
        else step.add("Sub", name, step.y)
        for place, name in enumerate(bounds)
        if name
    ]
    distance = step.add("Mul", *inside) if len(inside) == 2 else inside[0]
    return step.times(_one_where_positive(step, distance))


def _clip_by_input(step: Step, bounds: Sequence[str]) -> str:
    zero, result = step.number(0.0), step.cotangent
    for bound, side in zip(bounds, ("Greater", "Less"), strict=False):
        if bound:
            result = step.add("Where", step.add(side, step.x, bound), result, zero)
    return result


def is_short(value: float) -> bool:
    """Whether every precision holds a number exactly: it has 8 significant bits at most, and is not
    beyond float16.
    """
    mantissa, exponent = math.frexp(value)
    return value == 0 or ((mantissa * 256).is_integer() and -13 <= exponent <= 16)


def _one_minus(step: Step, tensor: str) -> str:
    return step.add("Sub", step.number(1.0), tensor)


def _square(step: Step, tensor: str) -> str:
    return step.add("Mul", tensor, tensor)


def _where_positive(step: Step, positive: str, else_: str) -> str:
    return step.add("Where", step.add("Greater", step.x, step.number(0.0)), positive, else_)


def sigmoid(step: Step) -> str:
    return step.add("Mul", step.y, _one_minus(step, step.y))


def tanh(step: Step) -> str:
    return _one_minus(step, _square(step, step.y))


def hard_sigmoid(step: Step) -> str:
    """``alpha`` between the two ends."""
    alpha, beta = _attribute(step, "alpha", 0.2), _attribute(step, "beta", 0.5)
    from_middle = step.add("Abs", step.add("Sub", step.x, step.number((0.5 - beta) / alpha)))
    inside = step.add("Less", from_middle, step.number(abs(0.5 / alpha)))
    return step.add("Where", inside, step.number(alpha), step.number(0.0))


def hard_swish(step: Step) -> str:
    """``x / 3 + 1 / 2`` between -3 and 3."""
    between = step.add("Add", step.add("Mul", step.x, step.number(1 / 3)), step.number(0.5))
    high = step.add("Greater", step.x, step.number(3.0))
    low = step.add("Less", step.x, step.number(-3.0))
    upper = step.add("Where", high, step.number(1.0), between)
    return step.add("Where", low, step.number(0.0), upper)


def gelu(step: Step) -> str:
    """Both forms of Hendrycks & Gimpel (2016): by the error function, and by tanh."""
    squared = _square(step, step.x)
    if step.attributes.get("approximate", b"none") == b"tanh":
        inner = step.add(
            "Mul",
            step.x,
            step.add(
                "Add",
                step.number(SQRT_2_OVER_PI),
                step.add("Mul", squared, step.number(SQRT_2_OVER_PI * CUBIC)),
            ),
        )
        t = step.add("Tanh", inner)
        slope = step.add(
            "Add",
            step.number(SQRT_2_OVER_PI),
            step.add("Mul", squared, step.number(3 * SQRT_2_OVER_PI * CUBIC)),
        )
        change = step.add("Mul", step.add("Mul", step.x, slope), _one_minus(step, _square(step, t)))
        both = step.add("Add", step.add("Add", t, step.number(1.0)), change)
        return step.add("Mul", both, step.number(0.5))
    erf = step.add("Erf", step.add("Mul", step.x, step.number(math.sqrt(0.5))))
    share = step.add("Mul", step.add("Add", erf, step.number(1.0)), step.number(0.5))
    density = step.add("Exp", step.add("Mul", squared, step.number(-0.5)))
    scaled = step.add("Mul", density, step.number(1 / math.sqrt(2 * math.pi)))
    return step.add("Add", share, step.add("Mul", step.x, scaled))


def erf(step: Step) -> str:
    density = step.add("Exp", step.add("Neg", _square(step, step.x)))
    return step.add("Mul", density, step.number(2 / math.sqrt(math.pi)))


def softplus(step: Step) -> str:
    return step.add("Sigmoid", step.x)


def softsign(step: Step) -> str:
    return step.add(
        "Reciprocal", _square(step, step.add("Add", step.add("Abs", step.x), step.number(1.0)))
    )


def mish(step: Step) -> str:
    """Of ``x tanh(softplus(x))`` (Misra 2019)."""
    t = step.add("Tanh", step.add("Softplus", step.x))
    change = step.add("Mul", _one_minus(step, _square(step, t)), step.add("Sigmoid", step.x))
    return step.add("Add", t, step.add("Mul", step.x, change))


def leaky_relu(step: Step) -> str:
    return _where_positive(step, step.number(1.0), step.number(_attribute(step, "alpha", 0.01)))


def elu(step: Step) -> str:
    alpha = _attribute(step, "alpha", 1.0)
    return _where_positive(step, step.number(1.0), step.add("Add", step.y, step.number(alpha)))


def selu(step: Step) -> str:
    alpha = _attribute(step, "alpha", 1.67326319217681884765625)
    gamma = _attribute(step, "gamma", 1.05070102214813232421875)
    below = step.add("Add", step.y, step.number(alpha * gamma))
    return _where_positive(step, step.number(gamma), below)


def celu(step: Step) -> str:
    alpha = _attribute(step, "alpha", 1.0)
    below = step.add("Add", step.add("Mul", step.y, step.number(1 / alpha)), step.number(1.0))
    return _where_positive(step, step.number(1.0), below)


def thresholded_relu(step: Step) -> str:
    active = step.add("Greater", step.x, step.number(_attribute(step, "alpha", 1.0)))
    return step.add("Where", active, step.number(1.0), step.number(0.0))


def prelu(step: Step, index: int) -> str:
    """The slope is a weight."""
    step.constant(1)
    below = step.times(step.node.input[1])
    return _where_positive(step, step.cotangent, below)


def sqrt(step: Step) -> str:
    return step.add("Div", step.number(0.5), step.y)


def reciprocal(step: Step) -> str:
    return step.add("Neg", _square(step, step.y))


def power(step: Step, index: int) -> str:
    """``p x^(p - 1)`` for the base, ``y ln x`` for the exponent."""
    exponent = step.node.input[1]
    if index == 1:
        return step.unbroadcast(step.times(step.add("Mul", step.y, step.add("Log", step.x))), 1)
    if step.is_constant(1) and np.all(step.constant(1) == 2):
        slope = step.add("Mul", step.x, step.number(2.0))
    elif step.is_constant(1) and np.all(step.constant(1) == 0.5):
        slope = step.add("Div", step.number(0.5), step.y)
    else:
        if step.graph.types[exponent].elem != FLOAT:
            exponent = step.add("Cast", exponent, to=FLOAT)
        lower = step.add("Sub", exponent, step.number(1.0))
        slope = step.add("Mul", exponent, step.add("Pow", step.x, lower))
    return step.unbroadcast(step.times(slope), 0)


def add(step: Step, index: int) -> str:
    return step.unbroadcast(step.cotangent, index)


def mean(step: Step, index: int) -> str:
    """Of several tensors."""
    return step.unbroadcast(step.times(step.number(1 / len(step.node.input))), index)


def sub(step: Step, index: int) -> str:
    signed = step.add("Neg", step.cotangent) if index == 1 else step.cotangent
    return step.unbroadcast(signed, index)


def mul(step: Step, index: int) -> str:
    return step.unbroadcast(step.times(step.node.input[1 - index]), index)


def div(step: Step, index: int) -> str:
    divided = step.add("Div", step.cotangent, step.node.input[1])
    if index == 1:
        divided = step.add("Neg", step.add("Mul", divided, step.y))
    return step.unbroadcast(divided, index)


def where(step: Step, index: int) -> str:
    zero = step.number(0.0)
    sides = (step.cotangent, zero) if index == 1 else (zero, step.cotangent)
    return step.unbroadcast(step.add("Where", step.node.input[0], *sides), index)


def extreme(step: Step, index: int) -> str:
    """Max and Min of several tensors: to the first of equal ones."""
    zero, passed = step.number(0.0), step.cotangent
    passed = step.add("Where", step.add("Equal", step.node.input[index], step.y), passed, zero)
    for earlier in step.node.input[:index]:
        passed = step.add("Where", step.add("Equal", earlier, step.y), zero, passed)
    return step.unbroadcast(passed, index)


def identity(step: Step, _: int) -> str:
    return step.cotangent


def neg(step: Step, _: int) -> str:
    return step.add("Neg", step.cotangent)


RULES: Mapping[str, Rule] = {
    "Relu": relu,
    "Clip": clip,
    "Sigmoid": _by_derivative(sigmoid),
    "Tanh": _by_derivative(tanh),
    "HardSigmoid": _by_derivative(hard_sigmoid),
    "HardSwish": _by_derivative(hard_swish),
    "Gelu": _by_derivative(gelu),
    "Erf": _by_derivative(erf),
    "Softplus": _by_derivative(softplus),
    "Softsign": _by_derivative(softsign),
    "Mish": _by_derivative(mish),
    "LeakyRelu": _by_derivative(leaky_relu),
    "Elu": _by_derivative(elu),
    "Selu": _by_derivative(selu),
    "Celu": _by_derivative(celu),
    "ThresholdedRelu": _by_derivative(thresholded_relu),
    "PRelu": prelu,
    "Abs": _by_derivative(lambda step: step.add("Sign", step.x)),
    "Exp": _by_derivative(lambda step: step.y),
    "Log": _by_derivative(lambda step: step.add("Reciprocal", step.x)),
    "Sin": _by_derivative(lambda step: step.add("Cos", step.x)),
    "Cos": _by_derivative(lambda step: step.add("Neg", step.add("Sin", step.x))),
    "Sqrt": _by_derivative(sqrt),
    "Reciprocal": _by_derivative(reciprocal),
    "Neg": neg,
    "Pow": power,
    "Add": add,
    "Sum": add,
    "Mean": mean,
    "Sub": sub,
    "Mul": mul,
    "Div": div,
    "Where": where,
    "Max": extreme,
    "Min": extreme,
    "Identity": identity,
    "Dropout": identity,
    "Cast": identity,
}
