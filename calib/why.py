"""The ``why`` command: explains a box of a photo or of a frame, and adds it to one's labels."""

import base64
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from calib.evaluation.report import TEMPLATES, outline
from engines.errors import InputError, SourceError
from engines.explain import Explainer, Explanation
from engines.files import Kind, checked_output, whole_file
from engines.localizer import ImageBgr
from engines.options import LOOK_AT, OUTPUT, EngineOptions, Option
from engines.text import displayable, file_name
from realtime.annotate import PREDICTED_BGR, heat_map, jpeg_of
from realtime.batch.plan import Window, make_plan
from realtime.batch.segment import frames_of
from realtime.documents import templates
from realtime.frames import BoxPx
from realtime.sources.spec import kind_of, name_of, open_source
from realtime.teaching.labels import Box, LabelFolder
from realtime.teaching.teacher import JPEG_QUALITY, MAP_SHARE, check_folder
from realtime.teaching.why import Signature, explanation_json, nearest, percent, signature_of

PAGE = Kind("explanation", (".html",), rb'.{,200}content="Sightline explanation"')
EARLIER_S = 0.002
"""A time is written with three places: the frame may be so much earlier."""
PICTURE_PX = 1600


def parsed_box(text: str) -> BoxPx:
    """The box of a text X0,Y0,X1,Y1, in pixels.

    Raises:
        InputError: it is none.
    """
    try:
        x0, y0, x1, y1 = (float(part) for part in str(text).split(","))
    except ValueError:
        x0, y0, x1, y1 = 0.0, 0.0, 0.0, 0.0
    if not (x0 < x1 < float("inf") and y0 < y1 < float("inf")):
        raise InputError(f"'{displayable(str(text))}' is no box X0,Y0,X1,Y1", option="box")
    return x0, y0, x1, y1


@dataclass(frozen=True)
class WhyOptions:
    """What ``why_chosen`` explains, and what it does with it."""

    at_s: Annotated[
        float | None,
        Option("Of a film: the frame at that second; else the first.", LOOK_AT, ("at",), min=0),
    ] = None
    box: Annotated[
        BoxPx | None,
        Option(
            "What lies in that box; else the surest box.",
            LOOK_AT,
            parser=parsed_box,
            metavar="X0,Y0,X1,Y1",
        ),
    ] = None
    out: Annotated[
        Path | None, Option("Page to write, with the map over the picture: FILE.html.", OUTPUT)
    ] = None
    add_as: Annotated[
        str | None,
        Option(
            "Add the frame to the labels, with --box or else the surest box by that NAME.", OUTPUT
        ),
    ] = None
    nothing_here: Annotated[
        bool, Option("Add the frame to the labels as one that shows none of your objects.", OUTPUT)
    ] = False
    labels_dir: Annotated[
        Path, Option("Folder of your labels: the nearest are named, and new ones added.", OUTPUT)
    ] = Path("labels")


def why_chosen(
    source: str, options: WhyOptions, choice: EngineOptions, console: Console
) -> dict[str, Any]:
    """Explain a box of one frame: print it, write its page, add it to the labels.

    Returns:
        The explanation, with ``words``, ``nearest`` labelled images, and what was written.

    Raises:
        SightlineError: the source or the network cannot be used, the options contradict each other,
            or something cannot be written.
    """
    if options.add_as is not None and options.nothing_here:
        raise InputError(
            "the frame shows an object, or nothing: ask for one of the two",
            option=("add_as", "nothing_here"),
        )
    check_folder(options.labels_dir)
    if options.out is not None:
        checked_output(options.out, PAGE, (source, *choice.inputs))
    labels = LabelFolder(options.labels_dir)
    image, at_s = frame_of(source, options.at_s)
    found = Explainer(choice).explain(image, options.box)
    result = {"source": displayable(source), "at_s": round(at_s, 3), **explanation_json(found)}
    result["nearest"] = _nearest(image, labels)
    _print(found, result, console)
    if options.out is not None:
        _write_page(options.out, result, image, found)
        result["page"] = str(options.out)
        console.print(f"wrote {options.out}")
    if options.add_as is not None or options.nothing_here:
        box = options.box or found.box_xyxy_px
        if options.add_as is not None and box is None:
            raise InputError(
                "no box is found there: say which, X0,Y0,X1,Y1", option=("add_as", "box")
            )
        named = [Box(options.add_as, box)] if options.add_as is not None and box else []
        stem = file_name(Path(name_of(source)).stem)
        name = f"{stem}-{at_s:.3f}s" if at_s else stem
        result["label"] = str(labels.folder / add_label(labels, name, image, named))
        console.print(f"added to {labels.table}: {result['label']}")
    return result


def frame_of(source: str, at_s: float | None) -> tuple[ImageBgr, float]:
    """A frame of a source, and when it is, in seconds since the first one.

    Args:
        source: see ``realtime.sources.spec.open_source``.
        at_s: when it is; None for the first.

    Raises:
        InputError: a time is asked for of a source that has none.
        SourceError: the source cannot be read, or there is no frame at that time.
    """
    if not kind_of(source).can_be_cut:
        if at_s is not None:
            raise InputError("only files and folders have a frame at a time", option="at_s")
        with open_source(source) as opened:
            for frame in opened:
                if frame.image_bgr.size:
                    return frame.image_bgr, frame.pts_s
        raise SourceError(f"{source} gives no picture")
    clip = make_plan(source, "", Window(max(0.0, (at_s or 0.0) - EARLIER_S)))
    with closing(frames_of(clip, clip.segments, 1, 1, {})) as frames:
        for each in frames:
            frame = each.record.frame
            if each.record.outcome == "shown" and frame.image_bgr.size:
                return frame.image_bgr, frame.pts_s
    raise SourceError(f"{source} has no frame there that can be decoded", option="at_s")


def add_label(labels: LabelFolder, name: str, image_bgr: ImageBgr, boxes: Iterable[Box]) -> str:
    """Write an image with its boxes, which replace those that the same image has. Returns the name
    of its file.

    Raises:
        InputError: a box or a name cannot be.
        OutputError: it cannot be written.
    """
    height, width = image_bgr.shape[:2]
    checked = labels.check(list(boxes), (width, height))
    jpeg = jpeg_of(image_bgr, JPEG_QUALITY)
    there = labels.folder / f"{name}.jpg"
    same = there.is_file() and there.read_bytes() == jpeg
    file = there.name if same else labels.add_image(name, jpeg)
    labels.save(file, checked, (width, height))
    return file


def _nearest(image_bgr: ImageBgr, labels: LabelFolder) -> list[dict[str, Any]]:
    """The labelled images that look most like an image, with their names."""
    known, signatures = labels.all(), dict[str, Signature]()
    for file in known:
        image = cv2.imread(str(labels.folder / file), cv2.IMREAD_COLOR)
        if image is not None:
            signatures[file] = signature_of(np.asarray(image, np.uint8))
    return [
        {"file": file, "names": sorted({each.name for each in known[file]})}
        for file in nearest(signature_of(image_bgr), signatures)
    ]


def _print(found: Explanation, result: dict[str, Any], console: Console) -> None:
    for line in result["words"]:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if found.cues:
        table = Table("what speaks for it and against it", "adds")
        for cue in found.cues:
            table.add_row(cue.words, f"{cue.share:+.1f}", style="" if cue.share >= 0 else "red")
        console.print(table)
    for what, rivals in (("names", found.names), ("classes", found.classes)):
        said = ", ".join(f"{each.name} {percent(each.probability)}" for each in rivals)
        if said:
            console.print(f"{what}: {said}", highlight=False, markup=False)
    near = ", ".join(
        f"{each['file']} ({', '.join(each['names']) or 'nothing here'})"
        for each in result["nearest"]
    )
    if near:
        console.print(f"nearest labels: {near}", highlight=False, markup=False)


def _write_page(
    path: Path, result: dict[str, Any], image_bgr: ImageBgr, found: Explanation
) -> None:
    """Write the page, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    height, width = image_bgr.shape[:2]
    scale = min(1.0, PICTURE_PX / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.asarray(cv2.resize(image_bgr, size, interpolation=cv2.INTER_AREA), np.uint8)
    heat = heat_map(found.map_hw, *size)
    over = np.asarray(cv2.addWeighted(small, 1 - MAP_SHARE, heat, MAP_SHARE, 0), np.uint8)
    for picture in (small, over):
        if found.box_xyxy_px is not None:
            outline(picture, [edge * scale for edge in found.box_xyxy_px], PREDICTED_BGR)
    photo, map_ = (base64.b64encode(jpeg_of(each, 88)).decode() for each in (small, over))
    page = templates(TEMPLATES).get_template("explanation.html")
    with whole_file(path) as part:
        text = page.render(title="Why?", found=result, photo=photo, map=map_)
        part.write_text(text, encoding="utf-8", errors="replace")
