"""Measures what is shown by default, and draws a contact sheet of typical scenes:
``python -m calib.research.shown --data DATA --sheet SHEET.jpg`` and, at the end of all tuning,
``--out docs/shown.md``.

How many frames without an object get a box is counted in the videos, where the list
``assets/empty_frames.csv`` says that nothing is there. It was made by hand, by looking at every
frame around each border. ``standing`` holds objects that stand there all the time (a table, and a
screen that the picture cuts off): a box around one of them is not on nothing. Frames in which an
object is partly in view are in no row.

Of the photos, the first box of each image counts, because not all objects of a photo are labelled.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import cv2
import jinja2
import numpy as np
from rich.console import Console
from rich.progress import track

from calib.bench.machine import machine
from calib.data.choose import SAME_NAMES
from calib.data.datasets import Sample, load_dataset
from calib.evaluation.metrics import CORLOC_IOU, best_iou
from calib.research.command_line import run
from calib.research.detector import collections
from engines.boxes import iou
from engines.choose import open_localizer
from engines.dense_names import OBJECT
from engines.errors import InputError
from engines.files import whole_file
from engines.localizer import ImageBgr, Localization, Localizer
from engines.networks.registry import DEFAULT_MODEL
from engines.options import EngineOptions, Option
from engines.text import Terminal
from realtime.annotate import draw
from realtime.frames import BoxPx
from realtime.sources.demo import Demo

ASSETS = Path(__file__).parent / "assets"
TUNING, REPORT = "tuning", "report"
SAID = 0.8
"""Boxes that say so much or more should be right so often."""
NAMED_SETS = ("animals", "VOC 2007", "coco128")
"""The sets whose classes are those of the names, or may be compared with them."""
SYSTEMS = {"compact": "the compact network", DEFAULT_MODEL: "the default"}
DEMO_FRAMES, DEMO_PX = (20, 60, 94), (560, 315)
COLUMNS, CELL_PX = 4, (300, 225)

SCENES = (
    ("desk", "coco128/000000000643.jpg"),
    ("street", "coco128/000000000094.jpg"),
    ("room", "coco128/000000000164.jpg"),
    ("living room", "voc2007/007390.jpg"),
    ("road", "coco128/000000000471.jpg"),
    ("park, several people", "coco128/000000000368.jpg"),
    ("park, a dog", "davis/dog/00010.jpg"),
    ("pet", "coco128/000000000394.jpg"),
    ("pet on a couch", "coco128/000000000599.jpg"),
    ("two pets", "coco128/000000000575.jpg"),
    ("dog in a street", "coco128/000000000074.jpg"),
    ("cups", "coco128/000000000605.jpg"),
    ("bottle on a table", "coco128/000000000283.jpg"),
    ("bottles", "videos/bottle-detection.mp4/90"),
    ("several people", "coco128/000000000308.jpg"),
    ("two people", "coco128/000000000113.jpg"),
    ("one person in a room", "videos/one-by-one-person-detection.mp4/300"),
    ("person on a bench", "coco128/000000000510.jpg"),
    ("dark, a person", "coco128/000000000326.jpg"),
    ("dark, far away", "coco128/000000000589.jpg"),
    ("blurred", "videos/bag.avi/0"),
    ("car from above", "videos/car-detection.mp4/80"),
    ("empty road", "videos/car-detection.mp4/25"),
    ("empty room", "videos/one-by-one-person-detection.mp4/20"),
)
"""What each scene shows, and its file: of a set, or of a video with the number of a frame."""


def main(
    data: Annotated[Path, Option("Folder of the data sets.")],
    sheet: Annotated[str, Option("The contact sheet to draw, FILE.jpg.")] = "",
    demo: Annotated[str, Option("The picture of the demo to draw, FILE.jpg.")] = "",
    out: Annotated[str, Option("The page to write, FILE.md, with the report sets measured.")] = "",
    model: Annotated[str, Option("What is measured.")] = DEFAULT_MODEL,
) -> None:
    """Draw the demo or the sheet, or count boxes on nothing in the tuning part; or measure all."""
    console = Terminal(stderr=True)
    if demo:
        draw_demo(Path(demo))
        console.print(f"wrote {demo}")
        return
    if sheet:
        draw_sheet(data, Path(sheet))
        console.print(f"wrote {sheet}")
        return
    localizer = open_localizer(EngineOptions(model, least_confidence=0.0))
    if localizer.limits is None:
        raise InputError(f"nothing tells how sure the boxes of {model} are")
    parts = (TUNING, REPORT) if out else (TUNING,)
    report: dict[str, Any] = {
        "machine": machine(),
        "model": model,
        "shown_from": localizer.limits.shown_from,
        "said": SAID,
        "empty": {part: on_nothing(data, part, localizer, console) for part in parts},
        "sets": {},
    }
    if out:
        report["sets"] = {
            name: figures(name, samples, localizer, console)
            for name, samples in collections(data).items()
        }
    page = rendered(report)
    print(page)
    if out:
        with whole_file(Path(out)) as part:
            part.write_text(page, encoding="utf-8")


@dataclass(frozen=True)
class EmptyFrame:
    """A frame in which nothing is but what stands there all the time."""

    video: str
    image_bgr: ImageBgr
    standing_xyxy_px: tuple[BoxPx, ...]


def empty_frames(data: Path, part: str) -> Iterator[EmptyFrame]:
    """The frames of one part of the list, video by video.

    Raises:
        InputError: a video is not there.
    """
    with (ASSETS / "empty_frames.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == part]
    for video in dict.fromkeys(row["video"] for row in rows):
        spans = [row for row in rows if row["video"] == video]
        for number, image in _frames(data / "videos" / video):
            for row in spans:
                if int(row["first"]) <= number <= int(row["last"]):
                    yield EmptyFrame(video, image, _boxes(row["standing"]))


def _boxes(text: str) -> tuple[BoxPx, ...]:
    found = [[float(edge) for edge in box.split()] for box in text.split(";") if box]
    return tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in found)


def _frames(path: Path) -> Iterator[tuple[int, ImageBgr]]:
    capture = cv2.VideoCapture(str(path))
    number = 0
    while True:
        there, image = capture.read()
        if not there:
            break
        yield number, np.asarray(image, np.uint8)
        number += 1
    capture.release()
    if not number:
        raise InputError(f"{path} cannot be read")


def on_nothing(data: Path, part: str, localizer: Localizer, console: Console) -> dict[str, Any]:
    """In how many frames without an object a box is shown: ``frames``, ``boxed``, ``share`` with
    its interval, and how sure the surest of these boxes was.
    """
    assert localizer.limits is not None
    worst = list[float]()
    for frame in track(empty_frames(data, part), f"nothing, {part}", console=console):
        found = localizer.localize([frame.image_bgr])[0]
        worst.append(max(boxes_on_nothing(found, frame.standing_xyxy_px), default=0.0))
    boxed = sum(each >= localizer.limits.shown_from for each in worst)
    return {
        **share(boxed, len(worst)),
        "surest": max(worst),
        "p95": float(np.quantile(worst, 0.95)),
    }


def boxes_on_nothing(found: Localization, standing: Sequence[BoxPx]) -> Iterator[float]:
    """How sure each box is that is around nothing."""
    for each in found.detections or (found,):
        box = each.box_xyxy_px
        if box is not None and all(float(iou(box, other)) <= CORLOC_IOU for other in standing):
            yield each.confidence or 0.0


def share(part: int, whole: int) -> dict[str, Any]:
    """``part``, ``whole``, ``share``, and the ends ``low`` and ``high`` of its 95 % interval
    (Wilson 1927, "Probable inference").
    """
    if not whole:
        return {"part": 0, "whole": 0, "share": 0.0, "low": 0.0, "high": 1.0}
    z, p = 1.96, part / whole
    middle = (p + z**2 / (2 * whole)) / (1 + z**2 / whole)
    half = z / (1 + z**2 / whole) * np.sqrt(p * (1 - p) / whole + z**2 / (4 * whole**2))
    ends = {"low": float(max(0.0, middle - half)), "high": float(min(1.0, middle + half))}
    return {"part": part, "whole": whole, "share": p, **ends}


def figures(
    name: str, samples: Sequence[Sample], localizer: Localizer, console: Console
) -> dict[str, Any]:
    """The figures of one set: ``right`` of all images, with every box and with those that are
    shown; ``kept`` of the right boxes; ``reliable``: the right ones of those that say ``SAID``; and
    where names can be compared ``named`` of the right boxes that are shown, and ``names_right`` of
    those.
    """
    assert localizer.limits is not None
    sure, right = list[float](), list[bool]()
    named = list[bool | None]()
    for sample in track(samples, name, console=console):
        image = sample.read()
        found = localizer.localize([image])[0]
        truths = sample.clipped(image).truths
        boxes = [truth.box_xyxy_px for truth in truths]
        sure.append(found.confidence or 0.0)
        right.append(
            found.box_xyxy_px is not None and best_iou(found.box_xyxy_px, boxes) > CORLOC_IOU
        )
        named.append(named_rightly(found, sample) if right[-1] else None)
    is_right, confidence = np.array(right), np.array(sure)
    shown, said = confidence >= localizer.limits.shown_from, confidence >= SAID
    counted = {
        "right": share(int(is_right.sum()), len(right)),
        "right_shown": share(int((is_right & shown).sum()), len(right)),
        "kept": share(int((is_right & shown).sum()), int(is_right.sum())),
        "reliable": share(int((is_right & said).sum()), int(said.sum())),
    }
    if name in NAMED_SETS:
        names = [each for each, seen in zip(named, is_right & shown, strict=True) if seen]
        given = [each for each in names if each is not None]
        counted["named"] = share(len(given), len(names))
        counted["names_right"] = share(sum(given), len(given))
    return counted


def named_rightly(found: Localization, sample: Sample) -> bool | None:
    """Whether a right box is called what it is; None where it is called an object."""
    if found.box_name is None or found.box_name.label == OBJECT or found.box_xyxy_px is None:
        return None
    box = found.box_xyxy_px
    best = max(sample.truths, key=lambda truth: float(iou(box, truth.box_xyxy_px)))
    return found.box_name.label == SAME_NAMES.get(best.class_name, best.class_name)


def rendered(report: Mapping[str, Any]) -> str:
    """The page in Markdown."""
    environment = jinja2.Environment(
        autoescape=False, trim_blocks=True, lstrip_blocks=True
    )  # Markdown, no markup from users

    def percent(each: Mapping[str, Any]) -> str:
        ends = f"{100 * each['low']:.0f} to {100 * each['high']:.0f}"
        return f"{100 * each['share']:.1f} ({ends}; {each['part']} of {each['whole']})"

    environment.filters["percent"] = percent
    template = (ASSETS / "shown.md").read_text(encoding="utf-8")
    return environment.from_string(template).render(report=report)


def draw_sheet(data: Path, path: Path) -> None:
    """Draw every scene twice, by the compact network and by the default.

    Raises:
        InputError: a scene is not there.
        OutputError: the sheet cannot be written.
    """
    localizers = [open_localizer(EngineOptions(each)) for each in SYSTEMS]
    cells = list[ImageBgr]()
    for what, name in SCENES:
        image = scene(data, name)
        pair = [draw(image, each.localize([image])[0], status=what) for each in localizers]
        cells.append(np.concatenate([_fitted(each) for each in pair], axis=1))
    rows = [np.concatenate(cells[i : i + COLUMNS], axis=1) for i in range(0, len(cells), COLUMNS)]
    encoded = cv2.imencode(path.suffix, np.concatenate(rows, axis=0))[1]
    with whole_file(path) as part:
        part.write_bytes(encoded.tobytes())


def draw_demo(path: Path) -> None:
    """Draw three frames of the demo side by side, with their true boxes.

    Raises:
        OutputError: the picture cannot be written.
    """
    pictures = list[ImageBgr]()
    with open_localizer() as localizer:
        for frame in Demo():
            if frame.index in DEMO_FRAMES:
                found = localizer.localize([frame.image_bgr])[0]
                drawn = draw(frame.image_bgr, found, frame.truth_xyxy_px)
                pictures.append(
                    np.asarray(cv2.resize(drawn, DEMO_PX, interpolation=cv2.INTER_AREA))
                )
    encoded = cv2.imencode(path.suffix, np.concatenate(pictures, axis=1))[1]
    with whole_file(path) as part:
        part.write_bytes(encoded.tobytes())


def scene(data: Path, name: str) -> ImageBgr:
    """The image of a scene, see ``SCENES``.

    Raises:
        InputError: it is not there.
    """
    collection, *inside = name.split("/")
    if collection == "videos":
        wanted = int(inside[1])
        return next(
            image for number, image in _frames(data / collection / inside[0]) if number == wanted
        )
    labels = {
        "coco128": "train2017_boxes.csv",
        "voc2007": "trainval.csv",
        "davis": f"{inside[0]}_boxes.csv",
    }
    for sample in load_dataset(data / collection / labels[collection]):
        if sample.name == "/".join(inside):
            return sample.read()
    raise InputError(f"there is no {name}")


def _fitted(image: ImageBgr) -> ImageBgr:
    """An image at the size of a cell, with its shape kept, on a light ground."""
    width, height = CELL_PX
    scale = min((width - 4) / image.shape[1], (height - 4) / image.shape[0])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    cell = np.full((height, width, 3), 235, np.uint8)
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    x, y = (width - size[0]) // 2, (height - size[1]) // 2
    cell[y : y + size[1], x : x + size[0]] = small
    return cell


if __name__ == "__main__":
    run(main)
