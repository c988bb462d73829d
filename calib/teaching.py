"""Teaches from Python what the page teaches by hand: a head for objects of your own, from images
and boxes; and takes labels of other programs into the folder that the page labels in.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args, get_type_hints

from rich.console import Console

from calib.data.datasets import decodable, load_dataset
from calib.heads import dense
from calib.heads.dense import DenseFit
from engines.choose import open_localizer
from engines.errors import InputError
from engines.head import dense_input
from engines.localizer import ImageBgr, Localizer
from engines.options import EngineOptions, Option
from realtime.annotate import jpeg_of
from realtime.teaching.labels import Box, LabelFolder

JPEG_QUALITY = 95
NamedBox = tuple[str, Sequence[float]]
"""A name and the edges x0, y0, x1, y1 in pixels of the image."""


def teach(
    images_bgr: Sequence[ImageBgr],
    boxes: Sequence[Sequence[NamedBox]],
    folder: str | Path | None = None,
    engine: EngineOptions = EngineOptions(),
) -> tuple[Localizer, DenseFit]:
    """Fit a head to images and boxes, and open a localizer with it.

    Args:
        images_bgr: uint8 ``[height, width, 3]`` each.
        boxes: of each image, all its objects as ``(name, (x0, y0, x1, y1))``; none where nothing is
            to be found in it.
        folder: where images, ``labels.csv`` and the head ``taught.safetensors`` are kept, and
            labels that are there already are learned from, too; None keeps nothing.
        engine: the network, and the dense head to start from, where it is not the shipped one.

    Returns:
        The localizer, and how good its head and the one before are on these images, each measured
        by a head that was fitted without it.

    Raises:
        InputError: there are not as many boxes as images, or a box or a name cannot be.
        SightlineError: too few objects, or see ``calib.heads.dense.fit_dense``.
    """
    if len(images_bgr) != len(boxes):
        raise InputError(
            f"there are {len(images_bgr)} images, and boxes of {len(boxes)}: give the boxes of each"
            " image, and [] where nothing is in it"
        )
    if folder is None:
        with TemporaryDirectory(prefix="sightline-teach-") as some:
            return teach(images_bgr, boxes, some, engine)
    labels = LabelFolder(Path(folder))
    for number, (image, named) in enumerate(zip(images_bgr, boxes, strict=True)):
        _save(labels, f"image-{number:04d}", image, [_box_of(each) for each in named])
    choice = dense.with_input(engine)
    classifier = choice.classifier()
    start = dense.start_of(engine.head, classifier)
    samples = load_dataset(labels.table)
    spec = dense.default_spec(classifier, choice.layer)
    quiet = Console(quiet=True)
    name = labels.folder.name
    fitted = dense.fit_dense(samples, classifier, spec, quiet, name, start, move_boxes=True)
    path = labels.folder / "taught.safetensors"
    fitted.head.save(path)
    return open_localizer(replace(engine, head=str(path), layer=None)), fitted


def import_labels(data: Path, folder: Path, console: Console) -> int:
    """Copy the labelled images of another program's labels into a folder of labels, as JPEG.

    Args:
        data: in any form that ``fit`` reads, such as a COCO file.
        folder: of labels.
        console: says how many there were.

    Returns:
        How many images were taken. Those that are there already, with labels, stay as they are.

    Raises:
        SightlineError: the labels cannot be read, or the folder cannot be written.
    """
    labels, taken = LabelFolder(folder), 0
    samples = decodable(load_dataset(data))
    for sample in samples:
        boxes = [Box(each.class_name, each.box_xyxy_px) for each in sample.truths]
        taken += _save(labels, Path(sample.name).stem, sample.read(), boxes, again=False)
    there = f", {len(samples) - taken} were there" if taken < len(samples) else ""
    console.print(f"took {taken} labelled images of {data} into {folder}{there}", soft_wrap=True)
    return taken


def _box_of(named: NamedBox) -> Box:
    """A box of a pair of name and edges.

    Raises:
        InputError: it is none.
    """
    try:
        name, (x0, y0, x1, y1) = named
        return Box(str(name), (float(x0), float(y0), float(x1), float(y1)))
    except (TypeError, ValueError) as error:
        raise InputError(
            "a box is its name and its edges in pixels: ('my mug', (x0, y0, x1, y1))"
        ) from error


def _save(
    labels: LabelFolder, name: str, image_bgr: ImageBgr, boxes: Sequence[Box], again: bool = True
) -> bool:
    """Write an image with its boxes. The same image again gets these boxes, where ``again`` says
    so. Returns whether anything was written.
    """
    height, width = image_bgr.shape[:2]
    labels.check(boxes, (width, height))
    jpeg = jpeg_of(image_bgr, JPEG_QUALITY)
    there = labels.folder / f"{name}.jpg"
    same = there.is_file() and there.read_bytes() == jpeg
    if same and not again and there.name in labels.all():
        return False
    file = there.name if same else labels.add_image(name, jpeg)
    labels.save(file, boxes, (width, height))
    return True


def fit_command(engine: EngineOptions, names: Sequence[str]) -> Callable[[Path, Path], list[str]]:
    """What fits a dense head for an engine on the command line: to a table of labels, into a file.
    It starts from the engine's own head where that is a dense one.

    Args:
        engine: the engine.
        names: the fields of its options that ``fit`` takes.
    """
    words = ["--kind", "dense", "--move-boxes", "--even-if-worse", "--json"]
    found = dense_input(engine.head)
    if found is not None:
        size_px, resize = found
        engine = replace(engine, size_px=engine.size_px or size_px, resize=engine.resize or resize)
        words += ["--from-head", str(engine.head)]
    hints = get_type_hints(EngineOptions, include_extras=True)
    for each in fields(EngineOptions):
        value = getattr(engine, each.name)
        if each.name not in names or value in (None, each.default):
            continue
        about = next(one for one in get_args(hints[each.name]) if isinstance(one, Option))
        name = (about.names or (each.name,))[0].replace("_", "-")
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words += [f"--{name}", text]
    return lambda table, out: ["fit", str(table), "--out", str(out), *words]
