"""What an ONNX classifier takes and gives, found by looking at its graph and metadata.

The layout, type and value range of the image, a normalization that the network does by itself, the
output that has the class scores, and the names of the classes.
"""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from engines.engine import Array
from engines.errors import ModelError
from engines.files import parsed_json, shown
from engines.networks.network import Preprocessing
from engines.networks.onnx_tensors import FLOATS

LARGEST_SIDE_PX = 4096
MOST_NAMES = 100_000
IDENTITY = Preprocessing("rgb", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""The network takes the pixels as they are, 0..255."""
UNIT = Preprocessing("rgb", (0.0, 0.0, 0.0), (255.0, 255.0, 255.0))
"""The network takes pixels of 0..1."""
WIDEST = 8.0
"""Of normalised values the largest less the smallest: ImageNet's deviations give 4.5."""
FAR_BELOW = 8.0
"""A mean that is so large is one of pixels 0..255."""


@dataclass(frozen=True)
class Ends:
    """What goes in and comes out.

    Attributes:
        input_name: of the image.
        side_px: of the image, where the file fixes it.
        channels_last: the image is ``[N, H, W, 3]``.
        preprocessing: what the network expects of its input.
        output_name: of the class scores.
        class_names: as the file's metadata give them; else empty.
        notes: what was found or assumed, for the user, one line each.
    """

    input_name: str
    side_px: int | None
    channels_last: bool
    preprocessing: Preprocessing
    output_name: str
    class_names: tuple[str, ...]
    notes: tuple[str, ...]


def ends_of(path: Path, model: onnx.ModelProto, constants: Mapping[str, Array]) -> Ends:
    """Look at both ends of a classifier.

    Args:
        path: for messages.
        model: its graph, without the constants.
        constants: all of them, by name.

    Raises:
        ModelError: it does not take one image, or gives no class scores.
    """
    image = only_input(path, model, constants)
    side_px, channels_last = _image_of(path, image)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    preprocessing, note = _preprocessing_of(model, constants, image, metadata)
    output, chosen = _output_of(path, model)
    names = class_names_of(metadata)
    notes = [f"{path.name}: {note}"]
    if chosen:
        notes.append(f"{path.name}: {chosen}")
    return Ends(image.name, side_px, channels_last, preprocessing, output, names, tuple(notes))


def only_input(
    path: Path, model: onnx.ModelProto, constants: Mapping[str, Array]
) -> onnx.ValueInfoProto:
    """The input that is no weight.

    Raises:
        ModelError: there is none, or there are several.
    """
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1:
        names = ", ".join(shown(value.name) for value in inputs[:9])
        raise ModelError(
            f"{path} has {len(inputs)} inputs ({names}); a classifier takes one, the image"
        )
    image: onnx.ValueInfoProto = inputs[0]
    return image


def _image_of(path: Path, image: onnx.ValueInfoProto) -> tuple[int | None, bool]:
    """(side in pixels where it is fixed, whether the channels come last)."""
    tensor, name = image.type.tensor_type, shown(image.name)
    sizes = [dim.dim_value for dim in tensor.shape.dim]
    channels_last = len(sizes) == 4 and sizes[3] == 3 and sizes[1] != 3
    if len(sizes) != 4 or not (channels_last or sizes[1] in (0, 3)):
        dims = [dim.dim_value if dim.HasField("dim_value") else "any" for dim in tensor.shape.dim]
        raise ModelError(
            f"{path}: input {name} is not a colour image [N, 3, H, W] or [N, H, W, 3]: its shape is"
            f" {shown(dims)}"
        )
    if tensor.elem_type not in (*FLOATS, TensorProto.UINT8):
        kinds = {number: kind.lower() for kind, number in TensorProto.DataType.items()}
        kind = kinds.get(tensor.elem_type, str(tensor.elem_type))
        raise ModelError(
            f"{path}: input {name} holds {kind}: a classifier takes floating-point values or uint8"
        )
    height, width = sizes[1:3] if channels_last else sizes[2:]
    if height and width and height != width:
        raise ModelError(
            f"{path}: input {name} is {width} x {height} pixels: only squares are supported"
        )
    side = height or width
    if side < 0 or side > LARGEST_SIDE_PX:
        raise ModelError(
            f"{path}: input {name} is {side:,} pixels a side: at most {LARGEST_SIDE_PX:,} are"
            " supported"
        )
    return side or None, channels_last


@dataclass(frozen=True)
class _Affine:
    """What the first nodes compute of a pixel: ``scale * pixel + offset``, per channel."""

    scale: Array
    offset: Array
    nodes: tuple[str, ...] = ()


def _preprocessing_of(
    model: onnx.ModelProto,
    constants: Mapping[str, Array],
    image: onnx.ValueInfoProto,
    metadata: Mapping[str, str],
) -> tuple[Preprocessing, str]:
    """(what the network expects, that in words)."""
    own = _own_normalization(model, constants, image.name)
    is_uint8 = image.type.tensor_type.elem_type == TensorProto.UINT8
    if is_uint8:
        return IDENTITY, "takes uint8 pixels, RGB 0..255"
    if own.nodes:
        spread = float(np.abs(own.scale).max())
        whole = spread * 255 <= WIDEST or float(np.abs(own.offset).max()) > FAR_BELOW
        span = "0..255" if whole else "0..1"
        said = f"normalises by itself ({', '.join(own.nodes)}); given RGB {span}"
        return (IDENTITY if whole else UNIT), said
    if "task" in metadata and "names" in metadata:  # as Ultralytics writes them
        return UNIT, "its metadata are Ultralytics': given RGB 0..1"
    return (
        Preprocessing(),
        "given RGB by ImageNet's mean and deviation: the file says nothing",
    )


def _own_normalization(
    model: onnx.ModelProto, constants: Mapping[str, Array], name: str
) -> _Affine:
    """The chain of Sub, Div, Mul and Add with constants that begins at the image."""
    found = _Affine(np.ones(1), np.zeros(1))
    while True:
        readers = [node for node in model.graph.node if name in node.input]
        if len(readers) != 1:
            return found
        node = readers[0]
        if node.op_type in ("Cast", "Identity", "Transpose"):
            name = node.output[0]
            continue
        if node.op_type not in ("Sub", "Div", "Mul", "Add") or len(node.input) != 2:
            return found
        other = node.input[1] if node.input[0] == name else node.input[0]
        value = constants.get(other)
        turned = node.input[0] != name and node.op_type in ("Sub", "Div")
        if value is None or turned or value.size not in (1, 3):
            return found
        found = _applied(found, node.op_type, np.asarray(value, np.float64).ravel())
        name = node.output[0]


def _applied(before: _Affine, operator: str, value: Array) -> _Affine:
    nodes = (*before.nodes, operator)
    if operator in ("Add", "Sub"):
        signed = value if operator == "Add" else -value
        return _Affine(before.scale, before.offset + signed, nodes)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = value if operator == "Mul" else 1 / value
        return _Affine(before.scale * factor, before.offset * factor, nodes)


def _output_of(path: Path, model: onnx.ModelProto) -> tuple[str, str]:
    """(the output with the class scores, how it was chosen of several).

    Raises:
        ModelError: none may be it, or several.
    """
    written = {name for node in model.graph.node for name in node.output}
    for value in model.graph.output:
        if value.name not in written:
            raise ModelError(f"{path}: nothing computes its output {shown(value.name)}")
    if len(model.graph.output) == 1:
        return str(model.graph.output[0].name), ""
    possible = [value for value in model.graph.output if _may_be_scores(value)]
    if len(possible) == 1:
        name = possible[0].name
        count = len(model.graph.output)
        return str(name), f"of its {count} outputs {shown(name)} has the class scores"
    shapes = ", ".join(
        f"{shown(value.name)} {_shape_words(value)}" for value in model.graph.output[:9]
    )
    raise ModelError(
        f"{path} has {len(model.graph.output)} outputs ({shapes}), and which has the class scores"
        " cannot be told: export it with that one"
    )


def _may_be_scores(value: onnx.ValueInfoProto) -> bool:
    """Floats of one vector an image, as far as the file says it."""
    tensor = value.type.tensor_type
    sizes = [dim.dim_value for dim in tensor.shape.dim]
    if tensor.elem_type not in FLOATS or (tensor.HasField("shape") and len(sizes) < 2):
        return False
    return len([size for size in sizes[1:] if size != 1]) <= 1


def _shape_words(value: onnx.ValueInfoProto) -> str:
    dims = value.type.tensor_type.shape.dim
    return "x".join(str(dim.dim_value or "any") for dim in dims) or "scalar"


def class_names_of(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The names in an ONNX file's metadata, as Ultralytics (``names``), fastai and Custom Vision
    (``labels``, ``classes``) and others write them: a list, or names by their index; as JSON, as
    Python prints them, or one a line. Empty where there are none.
    """
    for key in ("names", "class_names", "classes", "labels", "id2label"):
        if key in metadata:
            names = _listed(metadata[key])
            if names and len(names) == len(set(names)) <= MOST_NAMES:
                return names
    return ()


def _listed(text: str) -> tuple[str, ...]:
    found: object = None
    for parse in (parsed_json, ast.literal_eval):
        try:
            found = parse(text)
            break
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
    if found is None:
        separator = "\n" if "\n" in text else ","
        found = [part.strip() for part in text.split(separator) if part.strip()]
    if isinstance(found, Mapping):
        return _by_index(found)
    if isinstance(found, Sequence) and all(isinstance(name, str) for name in found):
        return tuple(found)
    return ()


def _by_index(names: Mapping[object, object]) -> tuple[str, ...]:
    """Of ``{0: name}`` or ``{"0": name}``; empty where an index is missing."""
    try:
        numbered = {int(str(index)): str(name) for index, name in names.items()}
    except ValueError:
        return ()
    if sorted(numbered) != list(range(len(numbered))):
        return ()
    return tuple(numbered[i] for i in range(len(numbered)))
