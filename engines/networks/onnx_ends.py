"""What an ONNX classifier takes and gives, found by looking at its graph and metadata.

The layout, type and value range of the image, a normalization that the network does by itself, the
output that has the class scores, and the names of the classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from engines.engine import Array
from engines.errors import InputError, ModelError
from engines.files import shown
from engines.networks.onnx_tensors import FLOATS
from engines.networks.preprocessing import (
    CROP,
    IDENTITY,
    SQUASH,
    UNIT,
    USUAL_CROP,
    GivenInput,
    Preprocessing,
    numbers_of,
)
from engines.networks.sidecars import StatedInput, read_labels, stated_by_file

LARGEST_SIDE_PX = 4096
WIDEST = 8.0
"""Of normalised values the largest less the smallest: ImageNet's deviations give 4.5."""
FAR_BELOW = 8.0
"""A mean that is so large is one of pixels 0..255."""
BLUE_FIRST = np.array([103.939, 116.779, 123.68])
"""ImageNet's mean, which tells the order of the channels."""
SAME_MEAN = 3.0


@dataclass(frozen=True)
class Ends:
    """What goes in and comes out.

    Attributes:
        input_name: of the image.
        side_px: of the image, where the file, or one beside it, says it.
        channels_last: the image is ``[N, H, W, 3]``.
        preprocessing: what the network expects of its input.
        output_name: of the class scores.
        output_is_usual: it is the one that is taken where none is named.
        class_names: as given, or as the file or one beside it says; else empty.
        names_from: which of them says it.
        origins: where each part of the input comes from, see ``Preprocessing.describe``.
        notes: what else was found, chosen or assumed, for the user, one line each.
    """

    input_name: str
    side_px: int | None
    channels_last: bool
    preprocessing: Preprocessing
    output_name: str
    output_is_usual: bool
    class_names: tuple[str, ...]
    names_from: str
    origins: Mapping[str, str]
    notes: tuple[str, ...]


def ends_of(
    path: Path,
    model: onnx.ModelProto,
    constants: Mapping[str, Array],
    given: GivenInput = GivenInput(),
) -> Ends:
    """Look at both ends of a classifier.

    Args:
        path: of its file, beside which others may say what it takes.
        model: its graph, without the constants.
        constants: all of them, by name.
        given: what the user says of them.

    Raises:
        ModelError: it does not take one image, or gives no class scores, or a file beside it is
            damaged.
        InputError: what the user says contradicts itself.
    """
    image = only_input(path, model, constants)
    side_px, channels_last = _image_of(path, image)
    said = stated_by_file(path, {entry.key: entry.value for entry in model.metadata_props})
    task = next((each.task for each in said if each.task), None)
    if task not in (None, "classify"):
        raise ModelError(
            f"{path} is made for {shown(task)}, its metadata say, and not to classify: give a"
            " classifier"
        )
    is_uint8 = image.type.tensor_type.elem_type == TensorProto.UINT8
    own = _own_normalization(model, constants, image.name)
    values = _values_of(path, own, is_uint8, given, said)
    resize, share, resize_from = _resize_of(given, said)
    sided = next((each for each in said if each.side_px), None)
    side_from = "its graph" if side_px else sided.origin if sided else "the default"
    if side_px and sided and sided.side_px != side_px:
        side_from += f"; {sided.origin} says {sided.side_px}"
    output, is_usual, chosen = _output_of(path, model, given.output)
    names, names_from = _names_of(given, said)
    origins = {
        "side": side_from,
        "layout is": "channels last" if channels_last else "channels first",
        "layout": "its graph",
        "order": values.order_from,
        "numbers": values.numbers_from,
        "resize": resize_from,
    }
    return Ends(
        image.name,
        side_px or (sided.side_px if sided else None),
        channels_last,
        replace(values.preprocessing, resize=resize, crop_share=share),
        output,
        is_usual,
        names,
        names_from,
        origins,
        tuple(note for note in (*values.notes, chosen) if note),
    )


def _names_of(given: GivenInput, said: Sequence[StatedInput]) -> tuple[tuple[str, ...], str]:
    """(the names of the classes, where they come from)."""
    if given.labels is not None:
        return read_labels(Path(given.labels)), given.labels
    for each in said:
        if each.names:
            return each.names, each.origin
    return (), ""


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
    """What the first nodes compute of a pixel: ``scale * pixel + offset``, per channel of the
    input.

    Attributes:
        scale, offset: ``[1]`` or ``[3]``.
        nodes: their kinds.
        turned: the channels were turned on the way.
    """

    scale: Array
    offset: Array
    nodes: tuple[str, ...] = ()
    turned: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether it takes pixels 0..255, not 0..1."""
        return (
            float(np.abs(self.scale).max()) * 255 <= WIDEST
            or float(np.abs(self.offset).max()) > FAR_BELOW
        )

    @property
    def is_adapter(self) -> bool:
        """Whether it changes so little that it is no normalization of pixels, but a layer behind
        one.
        """
        scale, offset = np.abs(self.scale), np.abs(self.offset)
        return bool(scale.min() > 0.25 and scale.max() < 1.9 and offset.max() < 0.3)

    def numbers(self, span: float) -> tuple[Array, Array]:
        """Mean and deviation of pixels 0..255, where it is given ``pixel / span``."""
        with np.errstate(divide="ignore", invalid="ignore"):
            std = span / self.scale
            return np.broadcast_to(-self.offset * std, 3), np.broadcast_to(std, 3)

    def is_of(self, mean: Sequence[float], std: Sequence[float], span: float) -> bool:
        """Whether it does what mean and deviation say of pixels 0..255, given ``pixel / span``."""
        own_mean, own_std = self.numbers(span)
        close = np.allclose(own_mean, mean, rtol=0.01, atol=0.5)
        return bool(close and np.allclose(own_std, std, rtol=0.01))


@dataclass(frozen=True)
class _Values:
    """Preprocessing without resizing, where it comes from, and what else must be said."""

    preprocessing: Preprocessing
    order_from: str
    numbers_from: str
    notes: tuple[str, ...] = ()


def _values_of(
    path: Path, own: _Affine, is_uint8: bool, given: GivenInput, said: Sequence[StatedInput]
) -> _Values:
    """What the image's values must be.

    What a user says goes before metadata, those before the files beside it, those before what the
    graph begins with. But what the graph does already is not done a second time.

    Raises:
        InputError: what a user says contradicts itself, or bytes are to be normalised.
    """
    stated = _stated(given, said)
    order, order_from = _order_of(own, given, said)
    if is_uint8:
        if given.has_numbers:
            raise InputError(
                f"{path.name} takes uint8 pixels and normalises them by itself: no mean, deviation"
                " and scale can be given",
                option=("mean", "std", "scale"),
            )
        return _Values(replace(IDENTITY, order=order), order_from, "it takes uint8")
    if stated is None or stated.mean is None or stated.std is None:
        if own.nodes:
            span = IDENTITY if own.is_whole else UNIT
            words = f"it normalises by itself: {', '.join(own.nodes)}"
            return _Values(replace(span, order=order), order_from, words)
        usual = _in_order(Preprocessing(), order)
        return _Values(usual, order_from, "assumed, ImageNet's mean and deviation: nothing says it")
    numbers = Preprocessing(stated.order or order, stated.mean, stated.std)
    if stated.order != order and stated.order is not None:
        numbers = _in_order(numbers, order)
    return _once(numbers, own, stated.origin, order_from, is_given=given.has_numbers)


def _once(
    numbers: Preprocessing, own: _Affine, origin: str, order_from: str, *, is_given: bool
) -> _Values:
    """Numbers that were stated, beside what the graph begins with."""
    is_range = not any(numbers.mean) and len(set(numbers.std)) == 1
    if not own.nodes or is_range or own.is_adapter:
        return _Values(numbers, order_from, origin)
    nodes = ", ".join(own.nodes)
    for span, raw in ((1.0, IDENTITY), (255.0, UNIT)):
        if own.is_of(numbers.mean, numbers.std, span):
            words = f"it normalises by itself ({nodes}) as {origin} says, which is not done twice"
            return _Values(replace(raw, order=numbers.order), order_from, words)
    if is_given:
        note = f"it begins with {nodes}, too: what you gave is done before that"
        return _Values(numbers, order_from, origin, (note,))
    raw = replace(IDENTITY if own.is_whole else UNIT, order=numbers.order)
    note = (
        f"{origin} says {numbers.formula}, but it normalises by itself ({nodes}), and otherwise:"
        " that is taken, and nothing is done twice; if it is wrong, say mean and deviation"
    )
    return _Values(raw, order_from, f"it normalises by itself: {nodes}", (note,))


def _stated(given: GivenInput, said: Sequence[StatedInput]) -> StatedInput | None:
    """The first that says mean and deviation."""
    if given.has_numbers:
        return StatedInput("as given", *numbers_of(given.mean, given.std, given.scale))
    return next((each for each in said if each.mean is not None), None)


def _order_of(own: _Affine, given: GivenInput, said: Sequence[StatedInput]) -> tuple[str, str]:
    """(order of the channels, where it comes from)."""
    if given.order is not None:
        return given.order, "as given"
    for each in said:
        if each.order is not None:
            return each.order, each.origin
    for span in (1.0, 255.0):
        mean = own.numbers(span)[0]
        for order, known in (("bgr", BLUE_FIRST), ("rgb", BLUE_FIRST[::-1])):
            if own.nodes and np.abs(mean - known).max() < SAME_MEAN:
                return order, "by the mean in it"
    return "rgb", "assumed"


def _in_order(numbers: Preprocessing, order: str) -> Preprocessing:
    """The same numbers for channels in another order."""
    if numbers.order == order:
        return numbers
    return replace(numbers, order=order, mean=numbers.mean[::-1], std=numbers.std[::-1])


def _resize_of(given: GivenInput, said: Sequence[StatedInput]) -> tuple[str, float, str]:
    """(how an image becomes a square, share of a crop, where that comes from).

    A whole image is wanted where objects are looked for, whatever the classifier was trained on.
    """
    trained = next((each for each in said if each.resize is not None), None)
    share = next((each.crop_share for each in said if each.crop_share is not None), USUAL_CROP)
    if given.resize is not None:
        return given.resize, share if given.resize == CROP else 1.0, "as given"
    words = "the default"
    if trained is not None and trained.resize != SQUASH:
        how = Preprocessing(resize=trained.resize or SQUASH, crop_share=share).resize_words
        words += f"; trained on {how}, says {trained.origin}"
    return SQUASH, 1.0, words


def _own_normalization(
    model: onnx.ModelProto, constants: Mapping[str, Array], name: str
) -> _Affine:
    """The chain of Sub, Div, Mul, Add and BatchNormalization with constants, and turned channels,
    that begins at the image.
    """
    found = _Affine(np.ones(1), np.zeros(1))
    while True:
        readers = [node for node in model.graph.node if name in node.input]
        if len(readers) != 1:
            return found
        node = readers[0]
        after = _followed(found, node, name, constants)
        if after is None:
            return found
        found, name = after, node.output[0]


def _followed(
    before: _Affine, node: onnx.NodeProto, name: str, constants: Mapping[str, Array]
) -> _Affine | None:
    """With one more node; None where the chain ends before it."""
    if node.op_type in ("Cast", "Identity", "Transpose"):
        return before
    if node.op_type in ("Gather", "Slice"):
        return replace(before, turned=not before.turned) if _turns(node, constants) else None
    if node.op_type == "BatchNormalization" and node.input[0] == name:
        values = [constants.get(each) for each in node.input[1:5]]
        if any(value is None or value.size != 3 for value in values):
            return None
        gain, bias, mean, variance = (np.asarray(v, np.float64).ravel() for v in values)
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        gain = gain / np.sqrt(variance + epsilon)
        after = _applied(before, "Mul", gain)
        after = _applied(after, "Add", bias - gain * mean)
        return replace(after, nodes=(*before.nodes, node.op_type))
    if node.op_type not in ("Sub", "Div", "Mul", "Add") or len(node.input) != 2:
        return None
    other = node.input[1] if node.input[0] == name else node.input[0]
    value = constants.get(other)
    swapped = node.input[0] != name and node.op_type in ("Sub", "Div")
    if value is None or swapped or value.size not in (1, 3):
        return None
    return _applied(before, node.op_type, np.asarray(value, np.float64).ravel())


def _turns(node: onnx.NodeProto, constants: Mapping[str, Array]) -> bool:
    """Whether a node puts three channels into the reverse order."""
    if node.op_type == "Gather":
        indices = constants.get(node.input[1])
        return indices is not None and indices.ravel().tolist() == [2, 1, 0]
    steps = constants.get(node.input[4]) if len(node.input) > 4 else None
    return steps is not None and sorted(steps.ravel().tolist()) in ([-1], [-1, 1, 1, 1])


def _applied(before: _Affine, operator: str, value: Array) -> _Affine:
    if before.turned:
        value = value[::-1]
    nodes = (*before.nodes, operator)
    if operator in ("Add", "Sub"):
        signed = value if operator == "Add" else -value
        return replace(before, offset=before.offset + signed, nodes=nodes)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = value if operator == "Mul" else 1 / value
        return replace(
            before, scale=before.scale * factor, offset=before.offset * factor, nodes=nodes
        )


def _output_of(path: Path, model: onnx.ModelProto, wanted: str | None) -> tuple[str, bool, str]:
    """(the output with the class scores, whether it is the usual one, how it was chosen).

    Raises:
        ModelError: none may be it, or several, or there is none of the wanted name.
    """
    written = {name for node in model.graph.node for name in node.output}
    for value in model.graph.output:
        if value.name not in written:
            raise ModelError(f"{path}: nothing computes its output {shown(value.name)}")
    names = [str(value.name) for value in model.graph.output]
    possible = [str(value.name) for value in model.graph.output if _may_be_scores(value)]
    usual = names if len(names) == 1 else possible
    shapes = ", ".join(
        f"{shown(value.name)} {_shape_words(value)}" for value in model.graph.output[:9]
    )
    if wanted is not None:
        if wanted not in names:
            raise ModelError(
                f"{path} has no output {shown(wanted)}; it has {shapes}", option="output"
            )
        return wanted, usual == [wanted], ""
    if len(usual) != 1:
        raise ModelError(
            f"{path} has {len(names)} outputs ({shapes}), and which has the class scores cannot be"
            " told: name it",
            option="output",
        )
    chosen = f"of its {len(names)} outputs {shown(usual[0])} has the class scores"
    return usual[0], True, chosen if len(names) > 1 else ""


def _may_be_scores(value: onnx.ValueInfoProto) -> bool:
    """Floats of one vector an image, as far as the file says it."""
    tensor = value.type.tensor_type
    sizes = [dim.dim_value for dim in tensor.shape.dim]
    if tensor.elem_type not in FLOATS or (tensor.HasField("shape") and len(sizes) < 2):
        return False
    return len([size for size in sizes[1:] if size != 1]) <= 1


def _shape_words(value: onnx.ValueInfoProto) -> str:
    if not value.type.tensor_type.HasField("shape"):
        return "of any shape"
    dims = value.type.tensor_type.shape.dim
    return "x".join(str(dim.dim_value or "any") for dim in dims) or "scalar"
