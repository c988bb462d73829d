"""Gradient rules of convolutions, pools and matrix products."""

from collections.abc import Mapping
from dataclasses import replace

import onnx

from engines.errors import ModelError
from engines.gradient.walk import Rule, Step
from engines.gradient.windows import convolution_adjoint, spread_windows, windows_of


def conv(step: Step, _: int) -> str:
    """Correlation with the flipped kernel, channels swapped; strides by sub-pixel phases."""
    return convolution_adjoint(step.graph, step.node, step.constant(1), step.cotangent)


def conv_transpose(step: Step, _: int) -> str:
    """The convolution that it is the adjoint of."""
    step.constant(1)
    at = step.attributes
    kept = ("kernel_shape", "strides", "dilations", "group", "pads")
    if at.get("auto_pad", b"NOTSET") != b"NOTSET" or "output_shape" in at:
        raise ModelError(f"{step.where}: only explicit pads are supported")
    given = {name: at[name] for name in kept if name in at}
    return step.add("Conv", step.cotangent, step.node.input[1], **given)


def max_pool(step: Step, _: int) -> str:
    """To the largest element of each window, the first of equal ones in reading order, as PyTorch
    does.
    """
    windows = windows_of(step.graph, step.node)
    return spread_windows(step.graph, windows, step.cotangent, (step.x, step.y))


def average_pool(step: Step, _: int) -> str:
    """Evenly to each window's elements (only those inside the image, unless
    ``count_include_pad``).
    """
    windows = windows_of(step.graph, step.node)
    counts = windows.counts(bool(step.attributes.get("count_include_pad", 0)))
    weights = step.graph.constant(1.0 / counts)
    return spread_windows(step.graph, windows, step.times(weights), None)


def of_images(rule: Rule) -> Rule:
    """A rule of images ``[N, C, H, W]`` that takes rows ``[N, C, L]`` too, as images of one row."""

    def taken(step: Step, index: int) -> str:
        shape = step.shape(step.x)
        if len(shape) != 3:
            return rule(step, index)
        node = onnx.NodeProto()
        node.CopyFrom(step.node)
        node.input[0], node.output[0] = (_one_row(step, name) for name in (step.x, step.y))
        if node.op_type == "Conv":
            node.input[1] = step.graph.constant(step.constant(1)[:, :, None])
        for attribute in node.attribute:
            before = ONE_ROW.get(attribute.name)
            if before is not None:
                half = len(attribute.ints) // len(before)
                parts = [attribute.ints[i * half : (i + 1) * half] for i in range(len(before))]
                ints = [n for i, part in enumerate(parts) for n in (before[i], *part)]
                attribute.ints[:] = ints
        image = replace(step, node=node, cotangents=(_one_row(step, step.cotangent),))
        found = rule(image, index)
        return step.reshape(found, [step.shape(found)[0], *shape[1:]])

    return taken


ONE_ROW = {"kernel_shape": (1,), "strides": (1,), "dilations": (1,), "pads": (0, 0)}
"""What the attributes of windows say of the axis of one row, before each of their parts."""


def _one_row(step: Step, tensor: str) -> str:
    return step.add("Unsqueeze", tensor, step.integers([2]))


def matmul(step: Step, index: int) -> str:
    """X @ W: g @ W^T and X^T @ g.

    Raises:
        ModelError: one of them is a vector.
    """
    other = step.node.input[1 - index]
    if min(len(step.shape(name)) for name in step.node.input) < 2:
        raise ModelError(f"{step.where}: products with a vector are not supported")
    turned = _swapped(step, other)
    factors = (step.cotangent, turned) if index == 0 else (turned, step.cotangent)
    product = step.add("MatMul", *factors)
    return step.unbroadcast(product, index, inner=2)


def _swapped(step: Step, tensor: str) -> str:
    """The two last axes exchanged."""
    if tensor in step.graph.constants:
        return step.graph.constant(step.graph.constants[tensor].swapaxes(-1, -2))
    rank = len(step.shape(tensor))
    return step.add("Transpose", tensor, perm=[*range(rank - 2), rank - 1, rank - 2])


def gemm(step: Step, index: int) -> str:
    """Alpha * x @ op(W) + beta * c: alpha * g @ op(W)^T, reading the same stored weight.

    Raises:
        ModelError: the data input is transposed, or the weight is computed from the image.
    """
    at = step.attributes
    if index == 2:
        beta = float(at.get("beta", 1.0))  # type: ignore[arg-type]
        return step.unbroadcast(step.times(step.number(beta)), 2)
    step.constant(1)
    if at.get("transA", 0):
        raise ModelError(f"{step.where}: a transposed data input is not supported")
    alpha = float(at.get("alpha", 1.0))  # type: ignore[arg-type]
    turned = 1 - int(bool(at.get("transB", 0)))
    return step.add("Gemm", step.cotangent, step.node.input[1], transB=turned, alpha=alpha)


def einsum(step: Step, index: int) -> str:
    """The product of the cotangent with all other operands, summed over what this operand lacks.

    Raises:
        ModelError: the equation has an ellipsis, an index twice in one operand, or no result.
    """
    equation = step.attributes["equation"].decode().replace(" ", "")  # type: ignore[attr-defined]
    if "->" not in equation or "." in equation:
        raise ModelError(f"{step.where}: the equation {equation} is not supported")
    terms, result = equation.split("->")[0].split(","), equation.split("->")[1]
    term, others = terms[index], [t for i, t in enumerate(terms) if i != index]
    if len(set(term)) < len(term):
        raise ModelError(f"{step.where}: a diagonal is not supported: {equation}")
    shape = step.shape(step.node.input[index])
    known = "".join(letter for letter in term if letter in result + "".join(others))
    operands = [step.cotangent, *(n for i, n in enumerate(step.node.input) if i != index)]
    found = step.add("Einsum", *operands, equation=f"{','.join([result, *others])}->{known}")
    if known == term:
        return found
    kept = [n if letter in known else 1 for letter, n in zip(term, shape, strict=True)]
    return step.add("Expand", step.reshape(found, kept), step.integers(shape))


RULES: Mapping[str, Rule] = {
    "Conv": of_images(conv),
    "ConvTranspose": conv_transpose,
    "MaxPool": of_images(max_pool),
    "AveragePool": of_images(average_pool),
    "MatMul": matmul,
    "Gemm": gemm,
    "Einsum": einsum,
}
