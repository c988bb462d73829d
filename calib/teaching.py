"""Teaches from Python what the page teaches by hand: a head for objects of your own, from images
and boxes; and takes labels of other programs into the folder that the page labels in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, get_args, get_type_hints

from rich.console import Console

from calib.data.datasets import decodable, load_dataset
from calib.heads import dense
from calib.heads.dense import DenseFit
from calib.why import add_label
from engines.choose import open_localizer
from engines.errors import InputError
from engines.head import dense_input
from engines.localizer import ImageBgr, Localizer
from engines.options import LOOK_AT, EngineOptions, Option
from engines.text import displayable
from realtime.annotate import jpeg_of
from realtime.teaching.labels import Box, LabelFolder
from realtime.teaching.teacher import JPEG_QUALITY

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
        add_label(labels, f"image-{number:04d}", image, [_box_of(each) for each in named])
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


@dataclass(frozen=True)
class ImportOptions:
    """Labels of another program that ``label`` takes."""

    add: Annotated[
        Path | None,
        Option("Labels of another program to begin with: COCO, VOC, CSV ... are copied.", LOOK_AT),
    ] = None
    only: Annotated[
        list[str] | None,
        Option("With --add: only the labelled image of that name; may be given again.", LOOK_AT),
    ] = None


def import_chosen(
    options: ImportOptions, sources: Sequence[str], folder: Path, console: Console
) -> None:
    """Take the labels that are asked for, see ``import_labels``.

    Raises:
        InputError: there is neither a source to label nor a file of labels to take.
        SightlineError: see ``import_labels``.
    """
    if options.add is not None:
        import_labels(options.add, folder, console, options.only or ())
    elif options.only:
        raise InputError(
            "an image of other labels is named, but not their file: name it", option=("only", "add")
        )
    elif not sources:
        raise InputError("name what to label: a film, a folder of photos, or a camera, such as 0")


def import_labels(data: Path, folder: Path, console: Console, only: Sequence[str] = ()) -> int:
    """Copy the labelled images of another program's labels into a folder of labels, as JPEG.

    Args:
        data: in any form that ``fit`` reads, such as a COCO file.
        folder: of labels.
        console: says how many there were.
        only: names of images as in the labels; empty for all.

    Returns:
        How many images were taken. Those that are there already, with labels, stay as they are.

    Raises:
        SightlineError: the labels cannot be read, or the folder cannot be written.
    """
    labels, taken = LabelFolder(folder), 0
    wanted = set(only)
    samples = [each for each in load_dataset(data) if not only or each.name in wanted]
    missing = sorted(wanted - {each.name for each in samples})
    if missing:
        raise InputError(f"{data} labels no image '{displayable(missing[0])}'", option="only")
    samples = decodable(samples)
    for sample in samples:
        boxes = [Box(each.class_name, each.box_xyxy_px) for each in sample.truths]
        image, stem = sample.read(), Path(sample.name).stem
        if not _has(labels, stem, image):
            add_label(labels, stem, image, boxes)
            taken += 1
    there = f", {len(samples) - taken} were there" if taken < len(samples) else ""
    console.print(f"took {taken} labelled images of {data} into {folder}{there}", soft_wrap=True)
    return taken


def _has(labels: LabelFolder, name: str, image_bgr: ImageBgr) -> bool:
    """Whether an image is in a folder under that name, with labels."""
    there = labels.folder / f"{name}.jpg"
    if there.name not in labels.all() or not there.is_file():
        return False
    return there.read_bytes() == jpeg_of(image_bgr, JPEG_QUALITY)


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
