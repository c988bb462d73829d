"""Gradient rules of operators that move values: reshapes, slices, padding, resizing.

Each of them is a linear map along single axes, which takes the value at place i of the output from
place ``places[i]`` of the input. Its adjoint adds up what came from one place.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from engines.engine import Array
from engines.errors import ModelError
from engines.gradient.walk import Rule, Step
from engines.graph import IR_VERSION, OPSET

NOWHERE = -1
"""The place of a value that comes from no input, as a zero of padding does."""


def reshape(step: Step, _: int) -> str:
    return step.add("Reshape", step.cotangent, step.integers(step.batched(step.shape(step.x))))


def transpose(step: Step, _: int) -> str:
    rank = len(step.shape(step.x))
    perm = step.attributes.get("perm", list(range(rank))[::-1])
    return step.add("Transpose", step.cotangent, perm=[int(i) for i in np.argsort(perm)])  # type: ignore[arg-type]


def concat(step: Step, index: int) -> str:
    axis = int(step.attributes["axis"]) % len(step.shape(step.y))  # type: ignore[call-overload]
    sizes = [step.shape(name)[axis] for name in step.node.input]
    start = sum(sizes[:index])
    return _part(step, step.cotangent, axis, start, start + sizes[index])


def _part(step: Step, tensor: str, axis: int, start: int, end: int) -> str:
    return step.add("Slice", tensor, *(step.integers([value]) for value in (start, end, axis)))


def returned(step: Step, cotangent: str, axis: int, places: Sequence[int], length: int) -> str:
    """The adjoint of taking ``places`` along an axis.

    Args:
        step: whose node it is.
        cotangent: ``len(places)`` long along the axis.
        axis: which one.
        places: where each value of the output came from, or ``NOWHERE``.
        length: of the input along the axis.

    Returns:
        A tensor that is ``length`` long along the axis.
    """
    sources = np.asarray(places)
    counts = np.bincount(sources[sources >= 0], minlength=length)
    if counts.max(initial=0) > 1:
        return _times_matrix(step, cotangent, axis, sources[:, None] == np.arange(length))
    readers = np.full(length, len(sources))
    readers[sources[sources >= 0]] = np.flatnonzero(sources >= 0)
    if counts.all() and (np.diff(readers) == 1).all():
        if length == len(sources):
            return cotangent
        return _part(step, cotangent, axis, int(readers[0]), int(readers[-1]) + 1)
    rank = len(step.shape(cotangent))
    if not counts.all():
        read = np.flatnonzero(counts)
        run = len(read) == len(sources) and (np.diff(sources) == 1).all()
        before, after = (int(sources[0]), length - 1 - int(sources[-1])) if run else (0, 1)
        pads = np.zeros((2, rank), int)
        pads[:, axis] = before, after
        cotangent = step.add("Pad", cotangent, step.integers(pads.ravel().tolist()))
        if run:
            return cotangent
    return step.add("Gather", cotangent, step.integers(readers.tolist()), axis=axis)


def _times_matrix(step: Step, tensor: str, axis: int, matrix: np.ndarray) -> str:
    """A tensor multiplied by ``matrix`` [its length, another] along an axis."""
    rank = len(step.shape(tensor))
    factor = step.graph.constant(matrix.astype(np.float32))
    if axis == rank - 1 and rank > 1:
        return step.add("MatMul", tensor, factor)
    order = [i for i in range(rank) if i != axis] + [axis]
    turned = step.add("Transpose", tensor, perm=order)
    if rank == 1:
        turned = step.reshape(turned, [1, -1])
    product = step.add("MatMul", turned, factor)
    if rank == 1:
        return step.reshape(product, [-1])
    return step.add("Transpose", product, perm=[int(i) for i in np.argsort(order)])


def gather(step: Step, _: int) -> str:
    """Back to where constant indices point; indices of any shape."""
    shape, indices = step.shape(step.x), step.constant(1)
    axis = int(step.attributes.get("axis", 0)) % len(shape)  # type: ignore[call-overload]
    length = shape[axis]
    flat = [n if i != axis else indices.size for i, n in enumerate(shape)]
    cotangent = step.reshape(step.cotangent, step.batched(flat) if axis else flat)
    return returned(step, cotangent, axis, (indices.ravel() % length).tolist(), length)


def slice_(step: Step, _: int) -> str:
    shape = step.shape(step.x)
    starts, ends = (step.constant(i).tolist() for i in (1, 2))
    given = [len(step.node.input) > i and bool(step.node.input[i]) for i in (3, 4)]
    axes = step.constant(3).tolist() if given[0] else list(range(len(starts)))
    steps = step.constant(4).tolist() if given[1] else [1] * len(starts)
    cotangent = step.cotangent
    for start, end, axis, stride in zip(starts, ends, axes, steps, strict=True):
        length = shape[axis]
        last = None if stride < 0 and end < -length else end
        places = np.arange(length)[slice(start, last, stride)]
        cotangent = returned(step, cotangent, axis % len(shape), places.tolist(), length)
    return cotangent


def split(step: Step, _: int) -> str:
    """All parts, with zeros for those that the objective does not depend on."""
    axis = int(step.attributes.get("axis", 0)) % len(step.shape(step.x))  # type: ignore[call-overload]
    parts = []
    for name, cotangent in zip(step.node.output, step.cotangents, strict=True):
        zeros = np.zeros(step.batched(step.shape(name)) if axis else step.shape(name))
        parts.append(cotangent or step.graph.constant(zeros))
    return step.add("Concat", *parts, axis=axis)


def pad(step: Step, _: int) -> str:
    """Constant, reflected, repeated and wrapped edges; negative pads cut off."""
    shape = step.shape(step.x)
    mode = step.attributes.get("mode", b"constant").decode()  # type: ignore[attr-defined]
    pads = step.constant(1)
    has_axes = len(step.node.input) > 3 and bool(step.node.input[3])
    axes = (step.constant(3) % len(shape)).tolist() if has_axes else list(range(len(shape)))
    cotangent = step.cotangent
    for place, axis in enumerate(axes):
        before, after = int(pads[place]), int(pads[place + len(axes)])
        positions = np.arange(shape[axis])[max(0, -before) : shape[axis] - max(0, -after)]
        width = (max(0, before), max(0, after))
        more = {"constant_values": NOWHERE} if mode == "constant" else {}
        places = np.pad(positions, width, mode=mode, **more)
        cotangent = returned(step, cotangent, axis, places.tolist(), shape[axis])
    return cotangent


def expand(step: Step, _: int) -> str:
    return step.unbroadcast(step.cotangent, 0)


def tile(step: Step, _: int) -> str:
    """The sum of all copies."""
    result, shape = step.cotangent, step.shape(step.x)
    for axis, (length, copies) in enumerate(zip(shape, step.constant(1).tolist(), strict=True)):
        if copies > 1:
            now = list(step.shape(result))
            apart = step.reshape(result, [*now[:axis], copies, length, *now[axis + 1 :]])
            result = step.add("ReduceSum", apart, step.integers([axis]), keepdims=0)
    return result


def resize(step: Step, _: int) -> str:
    """The transposed matrix of each axis that changes; ONNX's reference says what it is."""
    shape, result = step.shape(step.x), step.cotangent
    given = [*step.node.input[1:], "", "", ""]
    scales = step.graph.constants.get(given[1], np.zeros(0)).tolist() if given[1] else []
    axes = step.attributes.get("axes") or range(len(shape))
    by_axis = dict(zip(axes, scales, strict=True)) if scales else {}  # type: ignore[call-overload]
    for axis, (before, after) in enumerate(zip(shape, step.shape(step.y), strict=True)):
        if before != after:
            matrix = _resizing(step, before, after, by_axis.get(axis))
            result = _times_matrix(step, result, axis, matrix.T)
    return result


def _resizing(step: Step, before: int, after: int, scale: float | None) -> Array:
    """The matrix ``[before, after]`` of resizing along one axis."""
    unused = ("axes", "keep_aspect_ratio_policy")
    kept: dict[str, Any] = {n: v for n, v in step.attributes.items() if n not in unused}
    if kept.get("coordinate_transformation_mode") == b"tf_crop_and_resize":
        raise ModelError(f"{step.where}: cropping while resizing is not supported")
    how = ["x", "", "scales"] if scale is not None else ["x", "", "", "sizes"]
    values: dict[str, Array] = {
        "x": np.eye(before, dtype=np.float32)[None, None],
        "scales": np.array([1, 1, 1, scale or 1], np.float32),
        "sizes": np.array([1, 1, before, after], np.int64),
    }
    node = helper.make_node("Resize", how, ["y"], **kept)
    read = [name for name in how if name]
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(values[name].dtype), values[name].shape
        )
        for name in read
    ]
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph([node], "axis", inputs, [output]),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    from onnx.reference import ReferenceEvaluator  # only where an axis is resized

    found: Any = ReferenceEvaluator(model).run(None, {name: values[name] for name in read})
    matrix: Array = np.asarray(found[0])[0, 0]
    return matrix


def depth_to_space(step: Step, _: int) -> str:
    """Space to depth, in the same order."""
    block = int(step.attributes["blocksize"])  # type: ignore[call-overload]
    mode = step.attributes.get("mode", b"DCR")
    _, channels, height, width = step.shape(step.x)
    images, inner = step.shape(step.cotangent)[0], channels // block**2
    apart = step.reshape(step.cotangent, [images, inner, height, block, width, block])
    order = [0, 3, 5, 1, 2, 4] if mode == b"DCR" else [0, 1, 3, 5, 2, 4]
    turned = step.add("Transpose", apart, perm=order)
    return step.reshape(turned, [images, channels, height, width])


def space_to_depth(step: Step, _: int) -> str:
    block = int(step.attributes["blocksize"])  # type: ignore[call-overload]
    _, channels, height, width = step.shape(step.x)
    images = step.shape(step.cotangent)[0]
    blocks = [images, block, block, channels, height // block, width // block]
    apart = step.reshape(step.cotangent, blocks)
    turned = step.add("Transpose", apart, perm=[0, 3, 4, 1, 5, 2])
    return step.reshape(turned, [images, channels, height, width])


def triangle(step: Step, _: int) -> str:
    """The same half of the cotangent."""
    given = [name for name in step.node.input[1:] if name]
    return step.add("Trilu", step.cotangent, *given, upper=step.attributes.get("upper", 1))


RULES: Mapping[str, Rule] = {
    "Concat": concat,
    "Reshape": reshape,
    "Flatten": reshape,
    "Squeeze": reshape,
    "Unsqueeze": reshape,
    "Transpose": transpose,
    "Gather": gather,
    "Slice": slice_,
    "Split": split,
    "Pad": pad,
    "Expand": expand,
    "Tile": tile,
    "Resize": resize,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
    "Trilu": triangle,
}
