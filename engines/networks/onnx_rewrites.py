"""Rewrites what an ONNX file holds besides plain operators at inference: labels at its end,
functions, training mode, 8-bit integers.

The operators that ONNX itself defines by others are written out too, where the gradient graph has
no rule for them.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, helper

from engines.engine import Array
from engines.errors import ModelError
from engines.files import shown
from engines.gradient import RULES
from engines.graph import FOLDED, OPSET, attributes_of
from engines.networks.onnx_fused import FUSED

OWN = ("", "ai.onnx")
"""How ONNX's own domain of operators is written."""
MOST_NODES = 20_000
"""Operators of a network; the largest published ones have half as many."""
MOST_DEFINED = 2000
"""Operators that are written out; attention is a hundred others."""
DEEPEST_DEFINITIONS = 4
"""ONNX defines some operators by others that it defines."""
DEEPEST_CALLS = 40
Key = tuple[str, str, str]

LABELS = frozenset({"ArgMax", "TopK", "ZipMap"})
"""Operators that make labels, or lists of scores; what they read are the scores."""
OF_LABELS = frozenset(
    {"LabelEncoder", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Identity", "Gather"}
)
"""Operators that change the form of a label, or look up its name."""


def without_labels(model: onnx.ModelProto) -> None:
    """Where all outputs are labels, put the scores that they were made of in their place. The model
    is changed.
    """
    writers = {name: node for node in model.graph.node for name in node.output if name}
    constants = {tensor.name for tensor in model.graph.initializer}
    found = [_scores_of_label(each.name, writers, constants) for each in model.graph.output]
    names = dict.fromkeys(name for name in found if name is not None)
    if None not in found:
        made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
        del model.graph.output[:]
        model.graph.output.extend(made)


def _scores_of_label(
    name: str, writers: Mapping[str, onnx.NodeProto], constants: set[str]
) -> str | None:
    """What a label is made of; None where it is none."""
    found, seen = None, set[str]()
    while name in writers and name not in seen:
        seen.add(name)
        node = writers[name]
        if node.op_type in LABELS and node.input:
            found = name = node.input[0]
        elif node.op_type in OF_LABELS and node.input and found is None:
            is_table = node.op_type == "Gather" and node.input[0] in constants
            name = node.input[-1 if is_table else 0]
        else:
            break
    return found


def inlined(path: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network without functions of its own, and without those operators that ONNX defines
    by others and that have no gradient rule. How long it gets is known before it is written out.

    Raises:
        ModelError: functions call themselves, or stand for too many operators.
    """
    functions = {(f.domain, f.name, f.overload): f for f in model.functions}
    if len(functions) != len(model.functions):
        raise ModelError(f"{path} defines a function twice: the file is damaged")
    _expanded(path, model.graph.node, functions, {}, ())
    if functions:
        versions = {each.version for each in model.opset_import if each.domain in OWN}
        theirs = {o.version for f in functions.values() for o in f.opset_import if o.domain in OWN}
        model = _without_weights(
            path, model, onnx.inliner.inline_local_functions, bool(theirs - versions)
        )
        if model.functions:
            raise ModelError(
                f"{path}: not all of its local functions can be inlined: export it without"
                " functions"
            )
    for _ in range(DEEPEST_DEFINITIONS):
        version = opset_of(model)
        names = {node.op_type for node in model.graph.node if node.domain in OWN}
        defined = sorted(("", name) for name in names if _is_defined_by_others(name, version))
        count = sum(("", node.op_type) in defined for node in model.graph.node)
        if count > MOST_DEFINED:
            raise ModelError(f"{path} has {count:,} operators that stand for many others each")
        if not defined:
            break
        _add_defaults(model, dict.fromkeys(name for _, name in defined), version or OPSET)
        model = _without_weights(
            path, model, onnx.inliner.inline_selected_functions, defined, False, True
        )
    return model


def _is_defined_by_others(name: str, version: int | None) -> bool:
    """Whether ONNX writes an operator by others, and the gradient graph has no rule for it."""
    if name in RULES or name in FUSED or (name in FOLDED and name != "CastLike"):
        return False
    try:
        schema = onnx.defs.get_schema(name, version or OPSET, "")
    except onnx.defs.SchemaError:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)  # type: ignore[attr-defined]


def _add_defaults(model: onnx.ModelProto, names: Container[str], version: int) -> None:
    """Write out the attributes that are left out: the inliner forgets what they are then."""
    for node in model.graph.node:
        if node.domain in OWN and node.op_type in names:
            given = {each.name for each in node.attribute}
            schema = onnx.defs.get_schema(node.op_type, version, "")
            node.attribute.extend(
                each.default_value
                for name, each in schema.attributes.items()
                if name not in given and each.default_value.name
            )


def _without_weights(
    path: Path, model: onnx.ModelProto, inline: Callable[..., onnx.ModelProto], *how: object
) -> onnx.ModelProto:
    """Inline with the weights as inputs: native code need not copy them, but must know what they
    are.
    """
    weights, inputs = list(model.graph.initializer), list(model.graph.input)
    given = {value.name for value in inputs}
    typed = [
        helper.make_tensor_value_info(w.name, w.data_type, w.dims)
        for w in weights
        if w.name not in given
    ]
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.initializer[:]
    bare.graph.input.extend(typed)
    try:
        flat = inline(bare, *how)
    except Exception as error:  # native code, with exceptions of its own
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path}: its functions cannot be inlined: {shown(text)}") from error
    del flat.graph.input[:]
    flat.graph.input.extend(inputs)
    flat.graph.initializer.extend(weights)
    return flat


def _expanded(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    functions: Mapping[Key, onnx.FunctionProto],
    known: dict[Key, int],
    callers: tuple[Key, ...],
) -> int:
    """How many operators these nodes stand for."""
    total = 0
    for node in nodes:
        key = (node.domain, node.op_type, node.overload)
        if key not in functions:
            total += 1
            continue
        if key in callers or len(callers) > DEEPEST_CALLS:
            raise ModelError(
                f"{path}: function {shown(node.op_type)} calls itself, or is nested too deeply"
            )
        if key not in known:
            known[key] = _expanded(path, functions[key].node, functions, known, (*callers, key))
        total += known[key]
    if total > MOST_NODES:
        raise ModelError(
            f"{path} stands for more than {MOST_NODES:,} operators with its functions written out"
        )
    return total


def opset_of(model: onnx.ModelProto) -> int | None:
    """The version of ONNX's own operators that a model is written in; None where it says none."""
    return next((int(o.version) for o in model.opset_import if o.domain in OWN), None)


def at_inference(nodes: Sequence[onnx.NodeProto], image: str) -> bool:
    """Put dropout and batch normalization out of training mode; the nodes are changed.

    A normalization's own mean and variance, which it reads, are those that were learned. One of
    weights stays as it is: so do exporters write weight standardization (Brock et al. 2021,
    "Characterizing signal propagation"), and what it computes is a constant.

    Args:
        nodes: in order.
        image: the network's input.

    Returns:
        Whether any was in training mode.
    """
    found = False
    of_image = {image}
    for node in nodes:
        if of_image.isdisjoint(node.input):
            continue
        of_image.update(node.output)
        if node.op_type == "BatchNormalization":
            mode = [each for each in node.attribute if each.name == "training_mode"]
            found |= any(each.i for each in mode) or len(node.output) > 1
            for each in mode:
                node.attribute.remove(each)
            del node.output[1:]
        elif node.op_type == "Dropout" and len(node.input) > 2:
            found = True
            del node.input[2:]
    return found


def in_floats(
    path: Path, nodes: Sequence[onnx.NodeProto], constants: dict[str, Array]
) -> tuple[list[onnx.NodeProto], bool]:
    """The same network without 8-bit integers: what they stand for is computed in floats, cut off
    where integers end, but not rounded. So the gradient passes straight through (Bengio et al.
    2013, "Estimating or propagating gradients through stochastic neurons").

    Args:
        path: for messages.
        nodes: of the network.
        constants: gets the weights that integers stand for.

    Returns:
        (its nodes, whether there were integers).

    Raises:
        ModelError: scales are computed, or an operator computes integers otherwise.
    """
    kept, found = list[onnx.NodeProto](), False
    for node in nodes:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.domain not in OWN:
            kept.append(node)
            continue
        found = True
        scale, zero = (constants.get(name) for name in (*node.input[1:], "", "")[:2])
        if scale is None or (len(node.input) > 2 and node.input[2] and zero is None):
            raise ModelError(
                f"{path}: node {shown(node.name or node.output[0])} ({node.op_type}) computes its"
                " scale or its zero from the image: give the float32 model"
            )
        value = constants.get(node.input[0])
        if node.op_type == "QuantizeLinear":
            kept.append(_cut_off(path, node, scale, zero, constants))
        elif value is None:
            kept.append(helper.make_node("Identity", node.input[:1], node.output[:1], node.name))
        else:
            constants[node.output[0]] = _meant(path, node, value, scale, zero)
    return kept, found


def _cut_off(
    path: Path, node: onnx.NodeProto, scale: Array, zero: Array | None, constants: dict[str, Array]
) -> onnx.NodeProto:
    """Values cut off where the integers end that they were to become."""
    kind = np.dtype(np.uint8) if zero is None else zero.dtype
    place = np.zeros(1) if zero is None else zero.astype(np.float64).ravel()
    if scale.size != 1 or place.size != 1 or kind.kind not in "iu":
        raise ModelError(
            f"{path}: node {shown(node.name or node.output[0])} (QuantizeLinear) has a scale for"
            " each channel of a tensor that is no weight: give the float32 model"
        )
    ends = [
        np.float32((end - place[0]) * float(scale.ravel()[0]))
        for end in (np.iinfo(kind).min, np.iinfo(kind).max)
    ]
    names = [f"{node.output[0]}/{end}" for end in ("least", "most")]
    constants.update({name: np.asarray(end) for name, end in zip(names, ends, strict=True)})
    return helper.make_node("Clip", [node.input[0], *names], node.output[:1], node.name)


def _meant(
    path: Path, node: onnx.NodeProto, value: Array, scale: Array, zero: Array | None
) -> Array:
    """The numbers that constant integers stand for."""
    axis = int(attributes_of(node).get("axis", 1))
    shape = [1] * value.ndim
    if scale.ndim == 1 and scale.size > 1:
        shape[axis % value.ndim if value.ndim else 0] = -1
    place = np.zeros(1) if zero is None else zero.astype(np.float64)
    try:
        if scale.ndim > 1:
            raise ValueError("scales of blocks")
        turned = scale.astype(np.float64).reshape(shape)
        moved = place.reshape(shape if place.size > 1 else [1] * value.ndim)
        return np.asarray((value - moved) * turned, np.float32)
    except (ValueError, IndexError) as error:
        raise ModelError(
            f"{path}: node {shown(node.name or node.output[0])} (DequantizeLinear): its scale does"
            " not fit its values: give the float32 model"
        ) from error
