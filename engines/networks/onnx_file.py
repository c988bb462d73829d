"""Reads a classifier's ONNX file and checks it: what is damaged or no network is refused."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from engines.engine import Array
from engines.errors import ModelError
from engines.files import read_file, shown
from engines.graph import OPSET, needed
from engines.networks.onnx_ends import Ends, ends_of, only_input
from engines.networks.onnx_fused import FUSED, VENDOR
from engines.networks.onnx_rewrites import (
    MOST_NODES,
    OWN,
    at_inference,
    in_floats,
    inlined,
    opset_of,
    without_labels,
)
from engines.networks.onnx_tensors import FLOATS, MOST_BYTES, TensorReader, check_structure
from engines.networks.preprocessing import GivenInput

SMALL = 4096
"""Values up to which a constant is shown to ONNX's version converter: it reads shapes and axes, not
weights.
"""
INTEGER_OPS = frozenset(
    {
        "DynamicQuantizeLinear",
        "QLinearConv",
        "QLinearMatMul",
        "ConvInteger",
        "MatMulInteger",
    }
)
BOUNDS_OPS = frozenset({"Clip", "Pad", "Where", "Min", "Max", "Cast", "Equal"})
"""Operators to which infinity may be a limit or a filling."""
LARGEST_WINDOW = 1 << 16
MOST_IMAGES = 64
"""At once, that a file may be exported for."""
Model = onnx.ModelProto


@dataclass(frozen=True)
class OnnxFile:
    """What was read.

    Attributes:
        nodes: of ``opset``, in order, without Constant nodes.
        constants: weights and all other constants by name, floats as float32.
        ends: what goes in and comes out.
        digest: sha256 of the file, and of the weights beside it where there are any.
        images: how many it takes at once; 1 where any number.
        notes: what was changed of it, for the user.
    """

    nodes: Sequence[onnx.NodeProto]
    constants: Mapping[str, Array]
    ends: Ends
    digest: str
    images: int
    notes: tuple[str, ...]


def read_onnx(path: Path, opset: int, given: GivenInput = GivenInput()) -> OnnxFile:
    """Read and check a classifier's file.

    Args:
        path: of the file.
        opset: to which its operators are converted.
        given: what the user says of its input and output.

    Raises:
        ModelError: it cannot be used; the text says why.
        InputError: what the user says contradicts itself.
    """
    content = read_file(path, "model", MOST_BYTES)
    model = _parsed(path, content)
    digest = hashlib.sha256(content)
    reader = TensorReader(path, len(content))
    del content
    _opset(path, model)
    _check_whole(path, model)
    without_labels(model)
    model = inlined(path, model)
    constants = _taken_constants(model, reader)
    ends = ends_of(path, model, constants, given)
    image = only_input(path, model, constants)
    _check_flow(path, model, {ends.input_name, *constants})
    nodes = needed(model.graph.node, [ends.output_name])
    nodes, notes = _plain(path, model, nodes, constants, ends.input_name)
    converted = _converted(path, model, nodes, constants, image, ends.output_name, opset)
    _check_finite(path, converted, constants)
    if reader.bytes_beside:
        digest.update(reader.digest.digest())
    batch = image.type.tensor_type.shape.dim[0].dim_value
    images = batch if 0 < batch <= MOST_IMAGES else 1
    return OnnxFile(converted, constants, ends, digest.hexdigest(), images, notes)


def files_beside(path: Path) -> dict[str, Path]:
    """The files that hold weights of an ONNX file, by the names that it has for them.

    Raises:
        ModelError: it is no ONNX file, or one of them is not there.
    """
    model = _parsed(path, read_file(path, "model", MOST_BYTES))
    reader, found = TensorReader(path, 0), dict[str, Path]()
    nodes = [*model.graph.node, *(node for each in model.functions for node in each.node)]
    held = [each.t for node in nodes for each in node.attribute if each.HasField("t")]
    for tensor in (*model.graph.initializer, *held):
        if tensor.data_location == TensorProto.EXTERNAL:
            said = {entry.key: entry.value for entry in tensor.external_data}
            name = said.get("location", "")
            if name not in found:
                found[name] = reader.file_beside(name, f"{path}: weight {shown(tensor.name)}")
    return found


def _plain(
    path: Path,
    model: Model,
    nodes: list[onnx.NodeProto],
    constants: dict[str, Array],
    image: str,
) -> tuple[list[onnx.NodeProto], tuple[str, ...]]:
    """(the nodes as a float network at inference has them, what was changed).

    Raises:
        ModelError: one of them cannot be run or differentiated, or is not valid.
    """
    notes = []
    _mark_fused(model, nodes)
    _check_kinds(path, nodes)
    _check_nodes(path, model, nodes)
    if at_inference(nodes, image):
        notes.append("exported in training mode: used as at inference")
    nodes, had_integers = in_floats(path, nodes, constants)
    if had_integers:
        notes.append("its 8-bit integers are computed as floats, without rounding")
    return nodes, tuple(notes)


def _parsed(path: Path, content: bytes) -> Model:
    if content[:4] == b"PK\x03\x04" or content[:2] == b"\x80\x02":
        raise ModelError(
            f"{path} is a PyTorch file or an archive, not an ONNX model: export it with"
            " torch.onnx.export"
        )
    try:
        check_structure(content)
        model: Model = onnx.ModelProto.FromString(content)
    except (ValueError, DecodeError) as error:
        reason = str(error) if type(error) is ValueError else "its bytes cannot be parsed"
        raise ModelError(f"{path} is not an ONNX model: {reason}") from error
    if not model.graph.node:
        raise ModelError(f"{path} is not an ONNX model of a network: it holds no operators")
    return model


def _check_whole(path: Path, model: Model) -> None:
    """Refuse what makes the whole file unusable, before anything is made of it."""
    if model.graph.sparse_initializer:
        raise ModelError(
            f"{path} holds sparse weights, which are not supported: export it with dense ones"
        )
    count = len(model.graph.node) + sum(len(function.node) for function in model.functions)
    if count > MOST_NODES:
        raise ModelError(f"{path} has {count:,} operators: at most {MOST_NODES:,} are read")


def _mark_fused(model: Model, nodes: Iterable[onnx.NodeProto]) -> None:
    """Put operators that are written as several of ours where the version converter, which does not
    know all of them, leaves them alone.
    """
    version = opset_of(model)
    for node in nodes:
        if node.domain in OWN and (
            node.op_type == "GroupNormalization"
            or (node.op_type == "LayerNormalization" and (version or OPSET) < 17)
        ):
            node.domain = VENDOR


def _check_kinds(path: Path, nodes: Iterable[onnx.NodeProto]) -> None:
    """Refuse what cannot be run or differentiated, by its kind."""
    for node in nodes:
        where = _where(path, node)
        if any(
            a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) or a.HasField("g") or a.graphs
            for a in node.attribute
        ):
            raise ModelError(
                f"{where} is a loop or a branch, whose end only running it would show: export a"
                " network without control flow"
            )
        if node.op_type in INTEGER_OPS or node.op_type.startswith("QLinear"):
            raise ModelError(
                f"{where}: the network computes with integers, which have no gradient: give the"
                " float32 model, or one with QuantizeLinear and DequantizeLinear around its"
                " operators (QDQ); 'calibrate' makes it int8"
            )
        if node.domain == VENDOR and node.op_type not in FUSED:
            raise ModelError(
                f"{where} is an operator that ONNX Runtime's optimizer made ({VENDOR}): give the"
                " model from before it, or optimise it to the basic level only"
            )
        if node.domain not in (*OWN, VENDOR):
            raise ModelError(
                f"{where} is an operator of {shown(node.domain)}, not of ONNX's own: export without"
                " fused or vendor operators"
            )
        if any(a.HasField("sparse_tensor") or a.sparse_tensors for a in node.attribute):
            raise ModelError(
                f"{where} holds sparse values, which are not supported: export it with dense ones"
            )


def _taken_constants(model: Model, reader: TensorReader) -> dict[str, Array]:
    """Take weights and Constant nodes out of the graph, as arrays; what stays is float32 too."""
    constants: dict[str, Array] = {}

    def keep(name: str, value: Array) -> None:
        if not name or name in constants:
            raise ModelError(
                f"the model has two constants with the name {shown(name)}, or one without a name"
            )
        constants[name] = value

    for tensor in model.graph.initializer:
        keep(tensor.name, reader.array(tensor, "weight"))
    del model.graph.initializer[:]
    kept = []
    for node in model.graph.node:
        if node.op_type == "Constant":
            for name in node.output[:1]:
                keep(name, _constant_value(node, reader))
            continue
        for attribute in node.attribute:
            if attribute.HasField("t"):
                attribute.t.CopyFrom(
                    numpy_helper.from_array(
                        reader.array(attribute.t, f"the value of {node.op_type}")
                    )
                )
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in FLOATS:
                attribute.i = TensorProto.FLOAT
        kept.append(node)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return constants


def _constant_value(node: onnx.NodeProto, reader: TensorReader) -> Array:
    """The value of a Constant node, however it is written."""
    if len(node.attribute) == 1:
        attribute = node.attribute[0]
        if attribute.name == "value" and attribute.HasField("t"):
            return reader.array(attribute.t, "constant")
        values = {"value_float": attribute.f, "value_int": attribute.i}
        values |= {"value_floats": list(attribute.floats), "value_ints": list(attribute.ints)}
        if attribute.name in values:
            dtype = np.float32 if "float" in attribute.name else np.int64
            return np.asarray(values[attribute.name], dtype)
    raise ModelError(
        f"constant {shown(node.output[0] if node.output else '')} is no tensor of numbers: the file"
        " is damaged"
    )


def _check_flow(path: Path, model: Model, known: Iterable[str]) -> None:
    """Every tensor is written once, and before it is read."""
    written = set(known)
    for node in model.graph.node:
        where = _where(path, node)
        for name in node.input:
            if name and name not in written:
                raise ModelError(
                    f"{where} reads {shown(name)}, which nothing before it writes: a cycle, or"
                    " nodes out of order"
                )
        for name in node.output:
            if name and name in written:
                raise ModelError(
                    f"{where} writes {shown(name)}, which another node or weight writes, too"
                )
        if not node.output or not node.output[0]:
            raise ModelError(f"{where} writes nothing: the file is damaged")
        if len({attribute.name for attribute in node.attribute}) != len(node.attribute):
            raise ModelError(f"{where} has an attribute twice: the file is damaged")
        written.update(node.output)


def _check_nodes(path: Path, model: Model, nodes: Iterable[onnx.NodeProto]) -> None:
    """Every node is one that ONNX knows, with windows of a bearable size."""
    context = onnx.checker.C.CheckerContext()
    context.ir_version, context.opset_imports = onnx.IR_VERSION, {"": _opset(path, model)}
    for node in nodes:
        where = _where(path, node)
        _check_windows(where, node)
        if node.domain == VENDOR:
            continue
        try:
            onnx.checker.check_node(node, context)
        except onnx.checker.ValidationError as error:
            raise ModelError(f"{where} is not valid ONNX: {first_line(error)}") from error


def _opset(path: Path, model: Model) -> int:
    found = opset_of(model)
    newest = onnx.defs.onnx_opset_version()
    if found is None or not 7 <= found <= newest:
        said = "does not say its opset" if found is None else f"is of opset {found}"
        raise ModelError(
            f"{path} {said}: ONNX models of opset 7 to {newest} are read; export it with one of"
            " those"
        )
    return found


def _check_windows(where: str, node: onnx.NodeProto) -> None:
    """Kernels, strides and groups are positive, and no window or padding is larger than any
    image.
    """
    for attribute in node.attribute:
        least = {
            "kernel_shape": 1,
            "strides": 1,
            "dilations": 1,
            "group": 1,
            "blocksize": 1,
            "pads": 0,
            "size": 1,
        }
        if attribute.name not in least or (node.op_type == "Pad" and attribute.name == "pads"):
            continue
        values = list(attribute.ints) or [attribute.i]
        if attribute.ints or attribute.type == AttributeProto.INT:
            low = least[attribute.name]
            if any(not low <= value <= LARGEST_WINDOW for value in values):
                raise ModelError(
                    f"{where}: {attribute.name} {shown(values)} must lie in {low} .."
                    f" {LARGEST_WINDOW}"
                )


def _converted(
    path: Path,
    model: Model,
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, Array],
    image: onnx.ValueInfoProto,
    output: str,
    opset: int,
) -> list[onnx.NodeProto]:
    """The nodes in another opset. Weights stand in as inputs: the converter needs no gigabyte of
    values.

    ``constants`` gets what the converter adds.
    """
    typed = [_float_value(image)]
    small = []
    for name, value in constants.items():
        if value.size <= SMALL:
            small.append(numpy_helper.from_array(value, name))
        else:
            typed.append(
                helper.make_tensor_value_info(
                    name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
                )
            )
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "classifier", typed, outputs, small)
    imports = [helper.make_opsetid("", _opset(path, model)), helper.make_opsetid(VENDOR, 1)]
    try:
        converted = onnx.version_converter.convert_version(
            helper.make_model(graph, opset_imports=imports, ir_version=8), opset
        )
    except (
        Exception
    ) as error:  # the native converter raises its own, RuntimeError, IndexError and more
        version = imports[0].version
        raise ModelError(
            f"{path} (opset {version}) cannot be turned into opset {opset}: {first_line(error)}"
        ) from error
    for tensor in converted.graph.initializer:
        constants.setdefault(tensor.name, numpy_helper.to_array(tensor))
    if _opset(path, model) < 11:
        _keep_old_resizing(converted.graph.node)
    return _without_constants(converted.graph.node, constants)


def _keep_old_resizing(nodes: Iterable[onnx.NodeProto]) -> None:
    """Before opset 11 resizing began at the corner of the first pixel; the converter (1.23) forgets
    to say so.
    """
    how = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    for node in nodes:
        if node.op_type == "Resize":
            given = {each.name for each in node.attribute}
            node.attribute.extend(
                helper.make_attribute(name, value)
                for name, value in how.items()
                if name not in given
            )


def _without_constants(
    nodes: Iterable[onnx.NodeProto], constants: dict[str, Array]
) -> list[onnx.NodeProto]:
    """The nodes besides those that the converter added for constants."""
    kept = []
    for node in nodes:
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        else:
            kept.append(node)
    return kept


def _float_value(image: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    value = onnx.ValueInfoProto()
    value.CopyFrom(image)
    value.type.tensor_type.elem_type = TensorProto.FLOAT
    return value


def _check_finite(
    path: Path, nodes: Iterable[onnx.NodeProto], constants: Mapping[str, Array]
) -> None:
    """Single numbers may be infinite where they are limits; larger arrays were checked when they
    were read.
    """
    single = {
        n: float(v.ravel()[0])
        for n, v in constants.items()
        if v.size == 1 and v.dtype == np.float32
    }
    odd = {name: value for name, value in single.items() if not math.isfinite(value)}
    for node in nodes:
        for name in odd.keys() & set(node.input):
            if math.isnan(odd[name]) or node.op_type not in BOUNDS_OPS:
                raise ModelError(
                    f"{_where(path, node)} reads the constant {shown(name)}, which is {odd[name]}:"
                    " not a finite number"
                )


def _where(path: Path, node: onnx.NodeProto) -> str:
    return f"{path}: {_node_words(node)}"


def _node_words(node: onnx.NodeProto) -> str:
    name = node.name or next(iter(node.output), "")
    return f"node {shown(name)} ({shown(node.op_type)[1:-1]})"


def first_line(error: Exception) -> str:
    """What a library said, on one line; a failed assertion's place in its source is dropped."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "Assertion" in text:
        text = (
            "the operators contradict each other"
            if text.endswith("failed:")
            else text.rsplit("failed: ", 1)[-1]
        )
    return "".join(c if c.isprintable() else "?" for c in text)[:200]
