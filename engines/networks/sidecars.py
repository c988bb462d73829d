"""What comes with a classifier's ONNX file and says what it takes, and what its classes are called.

It is the metadata within it, ``config.json`` and ``preprocessor_config.json`` beside it, and files
of labels.
"""

import ast
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engines.errors import InputError, ModelError
from engines.files import json_object, parsed_json, read_file
from engines.networks.preprocessing import CROP, LETTERBOX, SQUASH, Rgb, numbers_of

MOST_BYTES = 1 << 24
"""Of a sidecar or a file of labels: ImageNet-21k's names are 1 MB."""
MOST_NAMES = 100_000
SIDECARS = ("preprocessor_config.json", "config.json")
"""Names of files beside a classifier's, the one that is believed first before the other."""
IMAGE_RANGES: Mapping[str, tuple[Rgb, Rgb]] = {
    "NominalRange_0_255": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "Normalized_0_1": ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
    "Normalized_1_1": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
}
"""Mean and deviation for each ``Image.NominalPixelRange`` of ONNX's metadata of images."""
PROCESSOR_KEYS = {
    "image_mean",
    "image_std",
    "do_normalize",
    "do_rescale",
    "rescale_factor",
    "size",
    "crop_size",
}
NAMES_KEYS = ("names", "class_names", "classes", "labels", "id2label")


@dataclass(frozen=True)
class StatedInput:
    """What one place says of a classifier; None, or empty, where it is silent.

    Attributes:
        origin: the place, in words.
        mean, std: of pixels 0..255, in ``order``.
        order: ``rgb`` or ``bgr``; with mean and std always.
        side_px: of the square.
        resize: how images became squares when it was trained, see ``Preprocessing``.
        crop_share: with ``crop``.
        names: of the classes.
        task: what the network is for, where that is said.
    """

    origin: str
    mean: Rgb | None = None
    std: Rgb | None = None
    order: str | None = None
    side_px: int | None = None
    resize: str | None = None
    crop_share: float | None = None
    names: tuple[str, ...] = ()
    task: str | None = None


def stated_by_file(path: Path, metadata: Mapping[str, str]) -> list[StatedInput]:
    """What is said of a classifier, what is believed first before the rest.

    Args:
        path: of its ONNX file, beside which there may be others.
        metadata: within it.

    Raises:
        ModelError: one of them is damaged or contradicts itself.
    """
    found = [_of_metadata(path, metadata)]
    for place in sidecars_of(path):
        try:
            found.append(_of_sidecar(place))
        except (TypeError, ValueError, KeyError, InputError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ModelError(
                f"{place}, which says what {path.name} takes, cannot be used: {reason}; mend it, or"
                " move it to another folder"
            ) from error
    return found


def sidecars_of(path: Path) -> list[Path]:
    """The files beside a classifier's that are read; Hugging Face keeps them above a folder
    ``onnx``.
    """
    folders = [path.parent]
    if path.absolute().parent.name == "onnx":
        folders.append(path.absolute().parent.parent)
    places = [[folder / name for folder in folders] for name in SIDECARS]
    return [each for several in places for each in [p for p in several if p.is_file()][:1]]


def _of_metadata(path: Path, metadata: Mapping[str, str]) -> StatedInput:
    """Ultralytics' keys, ONNX's own of images (``Image.BitmapPixelFormat``, as Custom Vision writes
    them), or plain ``mean`` and ``std``.
    """
    origin, names = "its metadata", class_names_of(metadata)
    if "task" in metadata and "names" in metadata:
        side = _listed(metadata.get("imgsz", ""))
        whole = [int(each) for each in side if str(each).isdigit()]
        side_px = whole[0] if len(set(whole)) == 1 else None
        numbers = numbers_of(None, None, 255.0)
        said = StatedInput("its metadata, Ultralytics'", *numbers, "rgb", side_px, CROP, 1.0, names)
        return replace(said, task=metadata["task"])
    order = {"Rgb8": "rgb", "Bgr8": "bgr"}.get(metadata.get("Image.BitmapPixelFormat", ""))
    span = IMAGE_RANGES.get(metadata.get("Image.NominalPixelRange", ""))
    try:
        mean = _channels(metadata, "mean", "image_mean")
        std = _channels(metadata, "std", "image_std")
        if span is None and (mean or std):
            return StatedInput(origin, *numbers_of(mean, std), order or "rgb", names=names)
    except (ValueError, InputError) as error:
        raise ModelError(f"{path}: its metadata cannot be used: {error}") from error
    if span is not None:
        return StatedInput(origin, *numbers_of(*span, 1.0), order or "rgb", names=names)
    return StatedInput(origin, order=order, names=names)


def _of_sidecar(place: Path) -> StatedInput:
    """What timm's or Hugging Face's file says; nothing where it is some other file.

    Raises:
        TypeError, ValueError, KeyError, InputError: it is damaged.
    """
    found = json_object(read_file(place, "sidecar", MOST_BYTES))
    if place.name == "config.json":
        timm = found.get("pretrained_cfg", found if "architecture" in found else None)
        if isinstance(timm, Mapping):
            return _of_timm(place.name, timm, _timm_names({**timm, **found}))
        names = found.get("id2label")
        return StatedInput(place.name, names=_numbered(names) if isinstance(names, Mapping) else ())
    timm = found.get("pretrained_cfg")
    if isinstance(timm, Mapping):
        return _of_timm(place.name, timm, ())
    return _of_processor(place.name, found)


def _of_timm(origin: str, found: Mapping[str, Any], names: tuple[str, ...]) -> StatedInput:
    """``mean`` and ``std`` of pixels 0..1, ``input_size``, ``crop_pct`` and ``crop_mode``."""
    mean, std = _channels(found, "mean"), _channels(found, "std")
    sizes = found.get("input_size") or (None,)
    share, mode = float(found.get("crop_pct") or 1.0), found.get("crop_mode") or "center"
    if not 0 < share <= 1:
        raise ValueError(f"crop_pct is {share:g}, which is no share of an image")
    resize = {"center": CROP, "squash": SQUASH, "border": LETTERBOX}.get(str(mode))
    shape = StatedInput(origin, None, None, None, _whole(sizes[-1]), resize, share, names)
    if mean is None and std is None:
        return shape
    centre, width = numbers_of(mean, std, 255.0)
    return replace(shape, mean=centre, std=width, order="rgb")


def _timm_names(found: Mapping[str, Any]) -> tuple[str, ...]:
    """``label_names``, or what ``label_descriptions`` says of each."""
    names, described = found.get("label_names") or (), found.get("label_descriptions") or {}
    if not isinstance(names, list | tuple) or not isinstance(described, Mapping):
        raise ValueError("its label_names are no list")
    return distinct([str(described.get(name, name)) for name in names])


def _of_processor(origin: str, found: Mapping[str, Any]) -> StatedInput:
    """Hugging Face's image processors: rescale, normalise, resize, crop, and turn the channels.

    EfficientNet's divides by ``image_std`` twice (``include_top``), or turns pixels into -1..1
    (``rescale_offset``). What is left out is what most processors do: pixels are rescaled by
    1/255.
    """
    if not found.keys() & PROCESSOR_KEYS:
        return StatedInput(origin)
    kind = str(found.get("image_processor_type") or found.get("feature_extractor_type") or "")
    factor = float(found.get("rescale_factor") or 1 / 255) if found.get("do_rescale", True) else 1.0
    mean, std = _channels(found, "image_mean"), _channels(found, "image_std")
    if not found.get("do_normalize", bool(mean or std)):
        mean = std = None
    if std and kind.startswith("EfficientNet") and found.get("include_top", True):
        std = tuple(value * value for value in std)  # type: ignore[assignment]
    if found.get("rescale_offset"):
        mean, std = tuple(value + 1 for value in mean or (0.0,) * 3), std or (1.0,) * 3  # type: ignore[assignment]
    centre, width = numbers_of(mean, std, 1 / factor)
    order = "bgr" if found.get("do_flip_channel_order") else "rgb"
    side_px, resize, share = _processor_size(found)
    return StatedInput(origin, centre, width, order, side_px, resize, share)


def _processor_size(found: Mapping[str, Any]) -> tuple[int | None, str | None, float | None]:
    """(side, how images become squares, share of a crop)."""
    size, crop = found.get("size"), found.get("crop_size")
    edge = size.get("shortest_edge") if isinstance(size, Mapping) else None
    square = _side(size)
    side = _side(crop)
    if found.get("do_center_crop") and side:
        resized = _whole(edge) or square or side
        return side, CROP, min(1.0, side / resized)
    if edge and found.get("crop_pct") and int(edge) < 384:  # ConvNeXt's; larger ones are squashed
        return _whole(edge), CROP, float(found["crop_pct"])
    if square or found.get("crop_pct"):
        return square or _whole(edge), SQUASH, None
    return None, None, None


def _side(size: object) -> int | None:
    """Of a square: of ``224`` or ``{"height": 224, "width": 224}``."""
    if isinstance(size, Mapping):
        return _whole(size.get("height")) if size.get("height") == size.get("width") else None
    return _whole(size)


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _channels(found: Mapping[str, Any], *keys: str) -> Rgb | None:
    """Three numbers under one of the keys, or one for all three; None where there is no such key.

    Raises:
        ValueError: they are none.
    """
    for key in keys:
        value = found.get(key)
        if value is None:
            continue
        values = _listed(value) if isinstance(value, str) else value
        numbers = list(values) if isinstance(values, Sequence) else [values]
        if len(numbers) == 1:
            numbers *= 3
        try:
            red, green, blue = (float(number) for number in numbers)
        except (TypeError, ValueError):
            raise ValueError(f"its {key} is not three numbers: {value!r:.80}") from None
        return red, green, blue
    return None


def class_names_of(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The names in an ONNX file's metadata, as Ultralytics (``names``), fastai and Custom Vision
    (``labels``, ``classes``) and others write them: a list, or names by their index; as JSON, as
    Python prints them, or one a line. Empty where there are none.
    """
    for key in NAMES_KEYS:
        if key in metadata:
            names = _names(_parsed(metadata[key]))
            if names:
                return names
    return ()


def read_labels(path: Path) -> tuple[str, ...]:
    """The names in a file: one a line; a JSON list; ``{"0": name}``, ``{"0": [id, name]}`` as of
    ImageNet's class index, or ``{name: 0}``; or a ``config.json`` that holds such.

    Raises:
        ModelError: it cannot be read, or holds no names.
    """
    content = read_file(path, "labels", MOST_BYTES)
    try:
        text = content.decode("utf-8-sig")
        if text.lstrip()[:1] in ("{", "["):
            found = parsed_json(text)
            if isinstance(found, Mapping) and not all(str(key).isdigit() for key in found):
                inner = next((found[key] for key in NAMES_KEYS if key in found), None)
                found = _timm_names(found) if "label_names" in found else inner or _turned(found)
        else:
            found = [line.strip() for line in text.splitlines() if line.strip()]
        names = _names(found)
    except (ValueError, TypeError) as error:
        raise ModelError(f"labels {path} cannot be used: {error}", option="labels") from error
    if not names:
        raise ModelError(
            f"labels {path} hold no names by index: give one name a line, a JSON list, or"
            ' {"0": "name", ...} without a gap',
            option="labels",
        )
    return names


def _turned(found: Mapping[Any, Any]) -> dict[str, Any]:
    """Names by index of indices by name."""
    return {str(index): name for name, index in found.items()}


def _names(found: object) -> tuple[str, ...]:
    if isinstance(found, Mapping):
        return _numbered(found)
    if isinstance(found, Sequence) and not isinstance(found, str):
        return distinct(found) if all(isinstance(name, str) for name in found) else ()
    return ()


def _numbered(names: Mapping[Any, Any]) -> tuple[str, ...]:
    """Of ``{0: name}``, ``{"0": name}`` or ``{"0": [id, name]}``; empty where an index is
    missing.
    """
    try:
        numbered = {int(str(index)): name for index, name in names.items()}
    except ValueError:
        return ()
    if sorted(numbered) != list(range(len(numbered))) or len(numbered) > MOST_NAMES:
        return ()
    ordered = (numbered[index] for index in range(len(numbered)))
    return distinct([str(each[-1] if isinstance(each, list) else each) for each in ordered])


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Names of which none is another's: ImageNet has two cranes, ``crane`` and ``crane (517)``."""
    count, taken = Counter(names), set[str]()
    found = []
    for index, name in enumerate(names):
        found.append(f"{name} ({index})" if count[name] > 1 and name in taken else name)
        taken.add(name)
    return tuple(found)


def _listed(text: str) -> list[Any]:
    found = _parsed(text)
    return list(found) if isinstance(found, Sequence) and not isinstance(found, str) else [found]


def _parsed(text: str) -> object:
    """JSON, what Python prints, or parts between line breaks or commas."""
    for parse in (parsed_json, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
    separator = "\n" if "\n" in text else ","
    return [part.strip() for part in text.split(separator) if part.strip()]
