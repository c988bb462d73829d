"""Compares two logs of the same frames: where their boxes differ, and in which frames most.

A log is what ``batch`` and ``stream --log`` write, or the boxes of another program: one JSON object
a line, with ``frame``, ``x0``, ``y0``, ``x1``, ``y1``, and, where they are known, ``source``,
``pts_s``, ``label`` and ``confidence``. Several lines may be about one frame.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from engines.boxes import iou
from engines.errors import InputError
from engines.files import Kind, checked_output, whole_file
from engines.localizer import ImageBgr
from engines.options import LOOK_AT, OUTPUT, Option
from engines.text import displayable
from realtime.annotate import clock, jpeg_of
from realtime.documents import plain, templates
from realtime.events import name_in, shown_in
from realtime.frames import BoxPx
from realtime.sources.spec import open_source

ASSETS = Path(__file__).parent / "assets"
SAME_IOU = 0.5
"""From this overlap on, two boxes are about the same object."""
PAGE = Kind("comparison", (".html", ".htm"), rb'.{,200}content="Sightline comparison"')
APART_S = 1.0
"""Frames that are shown lie at least so far apart: neighbours show the same."""
LEAST_SIZE = 0.01
"""Of a difference that is shown: a pair whose boxes overlap by less than 0.9."""
BINS = 200
PICTURE_PX = 720
A_COLOUR, B_COLOUR, BOTH_COLOUR = "#2f6db5", "#d9730d", "#9aa4b1"
Key = tuple[str, int]


@dataclass(frozen=True)
class CompareOptions:
    """What ``compare_logs`` shows, and where."""

    source: Annotated[
        str | None,
        Option("The video, folder or archive of both logs: pictures of the worst frames.", LOOK_AT),
    ] = None
    frames: Annotated[int, Option("So many frames are shown.", LOOK_AT, min=0, max=200)] = 12
    out: Annotated[Path, Option("HTML page to write.", OUTPUT)] = Path("comparison.html")


@dataclass(frozen=True)
class LoggedBox:
    """One box of a log.

    Attributes:
        xyxy_px: its edges, in pixels of the frame.
        name: what it is called; empty where the log does not say.
        confidence: that it is right; None where the log does not say.
    """

    xyxy_px: BoxPx
    name: str
    confidence: float | None

    @property
    def weight(self) -> float:
        """How much it counts in the order of frames."""
        return 1.0 if self.confidence is None else self.confidence


@dataclass
class LoggedFrame:
    """One frame of a log: when it is, and its boxes that are shown."""

    pts_s: float
    boxes: list[LoggedBox] = field(default_factory=list)


@dataclass(frozen=True)
class Difference:
    """How the boxes of one frame differ.

    Attributes:
        key: the source's name, and the number of the frame.
        pts_s: its time.
        same: pairs of boxes that overlap by ``SAME_IOU`` or more, A's first, the best pair first.
        only_a, only_b: boxes that are no part of a pair.
    """

    key: Key
    pts_s: float
    same: tuple[tuple[LoggedBox, LoggedBox], ...]
    only_a: tuple[LoggedBox, ...]
    only_b: tuple[LoggedBox, ...]

    @property
    def renamed(self) -> list[tuple[LoggedBox, LoggedBox]]:
        """Pairs whose names differ."""
        return [(a, b) for a, b in self.same if a.name and b.name and a.name != b.name]

    @property
    def size(self) -> float:
        """How much the frame differs: the confidences of boxes without a partner, and half of those
        with another name; what pairs lack of a full overlap breaks ties.
        """
        alone = sum(box.weight for box in (*self.only_a, *self.only_b))
        renamed = sum(0.5 * max(a.weight, b.weight) for a, b in self.renamed)
        loose = sum(1 - float(iou(a.xyxy_px, b.xyxy_px)) for a, b in self.same)
        return alone + renamed + 0.1 * loose


def read_log(path: Path) -> dict[Key, LoggedFrame]:
    """The frames of a log, by source and number. Frames that were dropped or failed are left out.

    Raises:
        InputError: the file cannot be read, or a line is no row of a log.
    """
    found: dict[Key, LoggedFrame] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    _add_line(found, line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise InputError(f"cannot read {path}: {reason}") from error
    if not found:
        raise InputError(f"{path} has no frame: it must be a log, such as NAME.jsonl of batch")
    return found


def _add_line(found: dict[Key, LoggedFrame], line: str, place: str) -> None:
    try:
        row = json.loads(line)
        if row.get("outcome", "shown") != "shown":
            return
        key = str(row.get("source", "")), int(row["frame"])
        frame = found.setdefault(key, LoggedFrame(float(row.get("pts_s", 0.0))))
        row = {"outcome": "shown", "class_name": "", "x0": None, **row}
        frame.boxes += [_box(each) for each in shown_in(row)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{place} is no row of a log: frame, x0, y0, x1, y1 must be there"
        ) from error


def _box(part: Mapping[str, Any]) -> LoggedBox:
    x0, y0, x1, y1 = (float(part[name]) for name in ("x0", "y0", "x1", "y1"))
    sure = part.get("confidence")
    name = name_in({"class_name": "", **part})
    return LoggedBox((x0, y0, x1, y1), name, None if sure is None else float(sure))


def differences(a: Mapping[Key, LoggedFrame], b: Mapping[Key, LoggedFrame]) -> list[Difference]:
    """Compare the frames that both logs have, in their order. Where each log has one source, its
    name does not matter.

    Raises:
        InputError: they have no frame in common.
    """
    if len({source for source, _ in a}) == len({source for source, _ in b}) == 1:
        name = next(iter(a))[0]
        b = {(name, number): frame for (_, number), frame in b.items()}
    common = sorted(a.keys() & b.keys())
    if not common:
        raise InputError("the two logs have no frame in common: are they of the same source?")
    return [_difference(key, a[key], b[key]) for key in common]


def _difference(key: Key, a: LoggedFrame, b: LoggedFrame) -> Difference:
    left_a, left_b = list(a.boxes), list(b.boxes)
    pairs: list[tuple[LoggedBox, LoggedBox]] = []
    while left_a and left_b:
        overlaps = iou(
            np.array([each.xyxy_px for each in left_a])[:, None],
            np.array([each.xyxy_px for each in left_b])[None],
        )
        place_a, place_b = np.unravel_index(int(overlaps.argmax()), overlaps.shape)
        if overlaps[place_a, place_b] < SAME_IOU:
            break
        pairs.append((left_a.pop(int(place_a)), left_b.pop(int(place_b))))
    return Difference(key, a.pts_s or b.pts_s, tuple(pairs), tuple(left_a), tuple(left_b))


def summary_of(found: Sequence[Difference]) -> dict[str, Any]:
    """The comparison in numbers: ``frames``, ``same`` (boxes in both), ``mean_iou`` of those,
    ``renamed``, ``only_a``, ``only_b``, and ``frames_that_differ``.
    """
    overlaps = [float(iou(a.xyxy_px, b.xyxy_px)) for each in found for a, b in each.same]
    return {
        "frames": len(found),
        "same": len(overlaps),
        "mean_iou": round(float(np.mean(overlaps)), 4) if overlaps else None,
        "renamed": sum(len(each.renamed) for each in found),
        "only_a": sum(len(each.only_a) for each in found),
        "only_b": sum(len(each.only_b) for each in found),
        "frames_that_differ": sum(bool(each.only_a or each.only_b) for each in found),
    }


def worst(found: Sequence[Difference], most: int) -> list[Difference]:
    """The frames that differ most, the worst first, no two of them neighbours."""
    kept: list[Difference] = []
    for each in sorted(found, key=lambda each: -each.size):
        if len(kept) == most or each.size < LEAST_SIZE:
            break
        if not any(_neighbours(each, other) for other in kept):
            kept.append(each)
    return kept


def _neighbours(one: Difference, other: Difference) -> bool:
    return one.key[0] == other.key[0] and 0 < abs(one.pts_s - other.pts_s) < APART_S


def compare_logs(a: Path, b: Path, options: CompareOptions, console: Console) -> dict[str, Any]:
    """Compare two logs, write the page, and print the numbers.

    Returns:
        See ``summary_of``; besides ``a``, ``b`` and ``out``.

    Raises:
        InputError: a log cannot be read, or they have no frame in common.
        SourceError: the source cannot be read.
        OutputError: the page cannot be written.
    """
    checked_output(options.out, PAGE, (a, b, options.source))
    frames_a = read_log(a)
    frames_b = read_log(b)
    sources = [sorted({source for source, _ in frames}) for frames in (frames_a, frames_b)]
    if sources[0] != sources[1] and [""] not in sources:
        what = " and ".join(", ".join(names) for names in sources)
        console.print(f"the logs name different sources: {what}", style="yellow", markup=False)
    found = differences(frames_a, frames_b)
    summary = {"a": str(a), "b": str(b), **summary_of(found), "out": str(options.out)}
    shown_frames = worst(found, options.frames)
    pictures: dict[Key, str] = {}
    if options.source is not None:
        pictures = _pictures(options.source, shown_frames, console)
    names = [displayable(str(each if a.name == b.name else each.name)) for each in (a, b)]
    page = (
        templates(ASSETS)
        .get_template("comparison.html")
        .render(
            title=" and ".join(names),
            summary=summary,
            a=names[0],
            b=names[1],
            frames=[(each, pictures.get(each.key, "")) for each in shown_frames],
            curves=base64.b64encode(_curves(found)).decode(),
            clock=clock,
            source=options.source,
            colours={"a": A_COLOUR, "b": B_COLOUR},
        )
    )
    with whole_file(options.out) as part:
        part.write_text(page, encoding="utf-8", errors="replace")
    console.print(_table(summary))
    return summary


def _table(summary: Mapping[str, Any]) -> Table:
    table = Table(title="two logs of the same frames", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = {
        "frames in both": summary["frames"],
        "frames that differ": summary["frames_that_differ"],
        "boxes in both": summary["same"],
        "their mean IoU": "" if summary["mean_iou"] is None else f"{summary['mean_iou']:.2f}",
        "of them, other names": summary["renamed"],
        f"only in {summary['a']}": summary["only_a"],
        f"only in {summary['b']}": summary["only_b"],
        "page": summary["out"],
    }
    for name, value in rows.items():
        table.add_row(displayable(name), displayable(str(value)))
    return table


def _pictures(spec: str, wanted: Sequence[Difference], console: Console) -> dict[Key, str]:
    """The frames with both logs' boxes, as JPEGs in base64."""
    left = {each.key[1]: each for each in wanted}
    found: dict[Key, str] = {}
    with open_source(spec) as source:
        frames = track(
            source, "reading frames", max(left, default=0) + 1, console=console, transient=True
        )
        for frame in frames:
            if (each := left.pop(frame.index, None)) is not None:
                found[each.key] = _drawn(frame.image_bgr, each)
            if not left:
                break
    return found


def _drawn(image_bgr: ImageBgr, difference: Difference) -> str:
    height, width = image_bgr.shape[:2]
    scale = min(1.0, PICTURE_PX / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = cv2.resize(image_bgr, size, interpolation=cv2.INTER_AREA)
    boxes = [(box, BOTH_COLOUR, 2) for pair in difference.same for box in pair]
    boxes += [(box, A_COLOUR, 3) for box in difference.only_a]
    boxes += [(box, B_COLOUR, 3) for box in difference.only_b]
    for box, colour, thick in boxes:
        x0, y0, x1, y1 = (round(edge * scale) for edge in box.xyxy_px)
        cv2.rectangle(picture, (x0, y0), (x1, y1), _bgr(colour), thick, cv2.LINE_AA)
    return base64.b64encode(jpeg_of(picture, 88)).decode()


def _bgr(colour: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(colour[1:])
    return blue, green, red


def _curves(found: Sequence[Difference]) -> bytes:
    """Boxes in both, only in A and only in B over the frames, as a PNG."""
    from matplotlib.figure import Figure  # half a second to import: only when a plot is wanted

    counts = np.array(
        [(len(each.same), len(each.only_a), len(each.only_b)) for each in found], float
    )
    bins = np.array_split(counts, min(BINS, len(counts)))
    means = np.array([part.mean(0) for part in bins])
    places = np.linspace(0, len(found), len(means), endpoint=False)
    figure = Figure(figsize=(11, 2.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    width = len(found) / len(means)
    bottom = np.zeros(len(means))
    colours = (BOTH_COLOUR, A_COLOUR, B_COLOUR)
    for column, (colour, name) in enumerate(
        zip(colours, ("both", "only A", "only B"), strict=True)
    ):
        heights = means[:, column]
        axes.bar(places, heights, width, bottom, align="edge", color=colour, label=name)
        bottom += heights
    axes.set(xlabel="frames that both logs have", ylabel="boxes a frame", xlim=(0, len(found)))
    axes.legend(frameon=False, ncols=3, loc="upper right")
    axes.set_ylim(0, 1.3 * max(1.0, float(bottom.max())))
    plain(axes)
    stored = BytesIO()
    figure.savefig(stored, format="png")
    return stored.getvalue()
