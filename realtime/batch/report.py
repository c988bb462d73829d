"""Writes the rows of all segments as one JSONL and one Parquet file, and the report of a clip: an
HTML page with curves over its time. Rows are summed up in constant memory.
"""

import json
import math
import re
import shlex
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from engines.errors import OutputError
from engines.files import Kind, whole_file
from engines.text import displayable, masked
from realtime import frames
from realtime.annotate import clock
from realtime.batch.segment import Clip
from realtime.documents import Course, plain, templates
from realtime.event_clips import begin_of
from realtime.events import Event, EventFinder, rules_for, summed_up, surest, times
from realtime.frames import STAGES, Column
from realtime.statistics import Histogram, StageTimes, counts_of
from realtime.terminal import held_up_by

Row = dict[str, Any]
ROWS_PER_GROUP = 4_000  # a few kilobytes each while they wait


def read_rows(pieces: Sequence[tuple[Path, int]]) -> Iterator[Row]:
    """The rows of each piece, in order, ``frame`` moved by the piece's shift."""
    for path, shift in pieces:
        with path.open(encoding="utf-8") as file:
            for line in file:
                row: Row = json.loads(line)
                row["frame"] += shift
                yield row


def write_rows(
    rows: Iterator[Row], jsonl: Path, parquet: Path, seen: Callable[[Row], None]
) -> None:
    """Write both files, whole or not at all. ``seen`` gets each row.

    Raises:
        OutputError: one cannot be written.
    """
    import pyarrow as pa  # only where whole files are worked through
    import pyarrow.parquet as pq

    schema, group = arrow_schema(), list[Row]()
    try:
        with ExitStack() as stack:
            parts = stack.enter_context(whole_file(jsonl)), stack.enter_context(whole_file(parquet))
            file = stack.enter_context(parts[0].open("w", encoding="utf-8"))
            writer = stack.enter_context(pq.ParquetWriter(parts[1], schema, compression="zstd"))
            for row in rows:
                seen(row)
                file.write(json.dumps(row) + "\n")
                group.append(row)
                if len(group) == ROWS_PER_GROUP:
                    writer.write_table(pa.Table.from_pylist(group, schema))
                    group.clear()
            writer.write_table(pa.Table.from_pylist(group, schema))
    except pa.ArrowException as error:
        raise OutputError(f"cannot write {parquet}: {error}") from error


def write_events(path: Path, events: Iterable[Event], clips: Mapping[int, Path]) -> None:
    """Write one event a line, whole or not at all, with the name of its clip where there are clips.

    Raises:
        OutputError: it cannot be written.
    """
    rows = [event.row() for event in events]
    if clips:
        names = {number: path.name for number, path in clips.items()}
        rows = [{**row, "clip": names.get(row["event"])} for row in rows]
    with whole_file(path) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def arrow_schema() -> Any:
    """The ``pyarrow.Schema`` of a log, from ``realtime.frames.COLUMNS``. What a row lacks is
    null.
    """
    import pyarrow as pa

    return pa.schema(_arrow_fields(frames.COLUMNS))


def _arrow_fields(columns: Iterable[Column]) -> list[tuple[str, Any]]:
    import pyarrow as pa

    fields = []
    for column in columns:
        if column.parts:
            fields.append((column.name, pa.list_(pa.struct(_arrow_fields(column.parts)))))
        elif column.type.startswith("list<"):
            fields.append((column.name, pa.list_(pa.type_for_alias(column.type[5:-1]))))
        elif column.type:
            fields.append((column.name, pa.type_for_alias(column.type)))
    return fields


MOST_BINS = 400
MOST_EVENTS = 100
"""In the summary, and on the page; the file of events has all."""


class Tally:
    """Counts rows. Curves have a point for each of up to ``MOST_BINS`` equal runs of frames.

    Attributes:
        outcomes: frames by outcome.
        causes: of those that failed.
        times: of the frames that were shown.
        first_s: when the first frame that was shown was, in seconds of the source.
        times_s: ``[bins]``: when each run of frames begins, since the first frame of the source.
        counts: ``[bins]``: frames shown.
        failed: ``[bins]``: frames lost.
        stage_sums: of each stage, ``[bins]``.
        boxed, nothing: ``[bins]``: frames in which a box is shown, and in which nothing is sure.
        rated: ``[bins]``: frames whose answer says how sure its box is, shown or not.
        slowest_ms, sure_sum, score_sum, area_sum: ``[bins]``; areas are shares of the picture.
        events: what was in view, in the order in which it came.
    """

    def __init__(self, clip: Clip) -> None:
        self._first, self._frames = clip.segments[0].first_frame, max(1, clip.selected_frames)
        self._picture_px = clip.width_px * clip.height_px
        bins = min(MOST_BINS, self._frames)
        self.events: list[Event] = []
        self._photos = clip.kind == "images"
        self.first_s = math.nan
        self._finder = EventFinder(rules_for(self._photos))
        self.outcomes, self.causes = Counter[str](), Counter[str]()
        self.times = StageTimes(Histogram)
        self.times_s = np.full(bins, np.nan)
        self.counts, self.failed = np.zeros(bins, np.int64), np.zeros(bins, np.int64)
        self.stage_sums = {stage: np.zeros(bins) for stage in STAGES}
        self.boxed, self.nothing = np.zeros(bins, np.int64), np.zeros(bins, np.int64)
        self.rated = np.zeros(bins, np.int64)
        self.slowest_ms = np.zeros(bins)
        self.sure_sum = np.zeros(bins)
        self.score_sum = np.zeros(bins)
        self.area_sum = np.zeros(bins)

    def add(self, row: Row) -> None:
        """Count a row."""
        place = min(
            len(self.counts) - 1,
            max(0, (row["frame"] - self._first) * len(self.counts) // self._frames),
        )
        changes = self._finder.add(row)
        self.events += [event for change, event in changes if change == "began"]
        self.outcomes[row["outcome"]] += 1
        if np.isnan(self.times_s[place]):
            self.times_s[place] = row["pts_s"]
        if row["outcome"] != "shown":
            self.causes[row["cause"]] += 1
            self.failed[place] += 1
            return
        self.first_s = row["pts_s"] if math.isnan(self.first_s) else self.first_s
        found = {stage: row.get(f"{stage}_ms") for stage in STAGES}
        stages_ms = {stage: value for stage, value in found.items() if value is not None}
        self.times.add(stages_ms, row["total_ms"])
        for stage, value in stages_ms.items():
            self.stage_sums[stage][place] += value
        self.counts[place] += 1
        self.slowest_ms[place] = max(self.slowest_ms[place], row["total_ms"])
        self.score_sum[place] += row["score"] or 0.0
        sure = row.get("confidence")
        if sure is not None:
            self.rated[place] += 1
            self.sure_sum[place] += sure
        if row["boxes"]:
            self.boxed[place] += 1
        elif sure is not None:
            self.nothing[place] += 1
        if row["x0"] is not None:
            self.area_sum[place] += (
                (row["x1"] - row["x0"]) * (row["y1"] - row["y0"]) / self._picture_px
            )

    def add_pictures(self, pictures: Iterable[Mapping[str, Any]]) -> None:
        """Give each event the surest of the pictures that segments took of it."""
        best: dict[int, float] = {}
        for each in pictures:
            for place, event in enumerate(self.events):
                overlaps = each["begin_s"] <= event.end_s and event.begin_s <= each["end_s"]
                sure = each["confidence"] or 0.0
                if overlaps and each["key"] == event.key and sure > best.get(place, -1.0):
                    best[place] = sure
                    event.picture = each["jpeg"]

    def summary(self) -> dict[str, Any]:
        """``events``, ``event_count``, ``seen``; and ``frames``, ``dropped``, ``failed``,
        ``localized``, ``nothing_sure``, ``causes``, ``latency_ms`` and ``stages_ms`` as in
        ``Run.summary``.
        """
        rows = [event.row() for event in self.events]
        return {
            "events": rows[:MOST_EVENTS],
            "event_count": len(rows),
            "seen": summed_up(rows, self._photos),
            **counts_of(self.outcomes),
            "localized": int(self.boxed.sum()),
            "nothing_sure": int(self.nothing.sum()),
            "causes": dict(self.causes),
            **self.times.summary(),
        }


ASSETS = Path(__file__).parent / "assets"
INDEX = Kind("index", (".html",), rb'.{,200}content="Sightline index"')
INK, NOTHING, LOST = "#4C78A8", "#C9CED6", "#E45756"


def write_report(
    path: Path,
    title: str,
    clip: Clip,
    summary: Mapping[str, Any],
    tally: Tally,
    strip: Sequence[Mapping[str, Any]],
    latency_plot: Path,
    clips: Mapping[int, Path],
) -> None:
    """Write the page, whole or not at all.

    Args:
        path: ``.html``.
        title: the clip's name.
        clip: what was worked on.
        summary: its numbers; ``files`` say which video lies beside the page.
        tally: its curves.
        strip: pictures: ``pts_s`` and ``jpeg`` in base64 of each.
        latency_plot: a PNG.
        clips: of events, by their numbers.

    Raises:
        OutputError: it cannot be written.
    """
    worked = sum(tally.outcomes.values())
    facts = {
        "engine": f"{summary['backend']} {summary['precision']}, {summary['size_px']} px",
        "processor": ", ".join(summary["devices"]),
        "picture": f"{clip.width_px} x {clip.height_px}",
        "length": clock(float(clip.frames / clip.rate_fps)),
        "sound": ", ".join(clip.audio) or "none",
        "segments": str(len(clip.segments)),
    }
    has_video = "video" in summary["files"]
    page = (
        templates(ASSETS)
        .get_template("report.html")
        .render(
            title=title,
            summary=summary,
            held_up_by=held_up_by(summary["verdict"]),
            facts=facts,
            clip=clip,
            worked=worked,
            strip=strip,
            clock=clock,
            spec=displayable(shlex.quote(masked(clip.spec))),
            events=surest(tally.events, MOST_EVENTS),
            seen=summary["seen"],
            event_count=len(tally.events),
            events_file=Path(summary["files"]["events"]).name,
            photos=clip.kind == "images",
            clips={number: quote(path.name) for number, path in clips.items()},
            shift_s=begin_of(Path(summary["files"]["video"])) - tally.first_s if has_video else 0.0,
            length_s=max(1e-3, float(clip.frames / clip.rate_fps)),
            curves=b64encode(_curves(tally)).decode(),
            latency=b64encode(latency_plot.read_bytes()).decode(),
            video=quote(Path(summary["files"]["video"]).name) if has_video else "",
        )
    )
    with whole_file(path) as part:
        part.write_text(page, encoding="utf-8", errors="replace")


def write_index(out: Path, summaries: Sequence[Mapping[str, Any]]) -> Path | None:
    """Write ``index.html``, which leads to the reports of several sources, whole or not at all.

    Returns:
        The file; None where a file of the user's has that name.

    Raises:
        OutputError: it cannot be written.
    """
    path = out / "index.html"
    if path.exists() and not INDEX.is_at(path):
        return None
    counts = Counter[str]()
    rows = []
    names = _short_names([each["source"] for each in summaries])
    for each in summaries:
        counts.update(event["name"] for event in each.get("events", ()))
        report = each.get("files", {}).get("report")
        row = {
            "name": names[each["source"]],
            "report": quote(Path(report).name) if report else "",
            "error": each.get("error", ""),
            "seen": each.get("seen", ""),
            "frames": each["frames"],
            "localized": each.get("localized", 0),
        }
        rows.append(row)
    seen = ", ".join(f"{name} {times(count)}" for name, count in counts.most_common(8))
    page = templates(ASSETS).get_template("index.html")
    with whole_file(path) as part:
        text = page.render(title="What was seen", rows=rows, seen=seen)
        part.write_text(text, encoding="utf-8", errors="replace")
    return path


def _short_names(sources: Sequence[str]) -> dict[str, str]:
    """Each source by its last part, or whole where several have the same."""
    last = {each: re.split(r"[/\\]", each.rstrip("/\\"))[-1] or each for each in sources}
    counts = Counter(last[each] for each in set(sources))
    return {each: name if counts[name] == 1 else each for each, name in last.items()}


def course_of(tally: Tally) -> Course:
    """The mean of each run of frames over the clip's time."""
    shown = tally.counts > 0
    stages = {
        stage: tally.stage_sums[stage][shown] / tally.counts[shown] for stage in tally.times.names
    }
    total = np.sum(list(stages.values()), axis=0)
    times_s = tally.times_s[shown]
    return Course(times_s, stages, total, "seconds of the clip", "milliseconds, mean", 1e-3)


def _curves(tally: Tally) -> bytes:
    """How sure the box is (or the score, where nothing tells), its size, and in which frames there
    is one, over the clip's time, as a PNG.
    """
    from matplotlib.figure import Figure  # half a second to import: only when a plot is wanted

    seen = ~np.isnan(tally.times_s)
    times_s = tally.times_s[seen]
    counts = tally.counts[seen]
    boxed, nothing, failed = (each[seen] for each in (tally.boxed, tally.nothing, tally.failed))
    figure = Figure(figsize=(11, 4.4), dpi=130, layout="constrained")
    score, area, coverage = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))
    rated = tally.rated[seen]
    upper = (
        (100 * tally.sure_sum[seen], rated, "how sure the box is, %")
        if rated.any()
        else (100 * tally.score_sum[seen], counts, "score of the class, %")
    )
    lower = (100 * tally.area_sum[seen], boxed, "box, % of picture")
    for axes, (sums, of, label) in ((score, upper), (area, lower)):
        means = _mean(sums, of)
        axes.plot(times_s, means, color=INK, linewidth=1.4, marker="." if len(means) < 40 else "")
        axes.set(ylabel=label)
        top = np.nanmax(means) if np.isfinite(means).any() else 100.0
        axes.set_ylim(0, min(100.0, 1.15 * top) or 1.0)
    last_s = times_s[-1] + (times_s[-1] - times_s[0]) / max(1, len(times_s) - 1)
    spans = [
        (begin, end - begin) for begin, end in zip(times_s, [*times_s[1:], last_s], strict=True)
    ]
    every = np.maximum(1, counts + failed)
    coverage.broken_barh(spans, (0, 1), facecolors=INK, linewidth=0)
    for span, quiet, lost in zip(spans, nothing / every, failed / every, strict=True):
        if quiet:
            coverage.broken_barh([span], (1 - quiet, quiet), facecolors=NOTHING, linewidth=0)
        if lost:
            coverage.broken_barh([span], (0, max(0.25, lost)), facecolors=LOST, linewidth=0)
    coverage.set(
        ylabel="frames",
        yticks=(),
        ylim=(0, 1),
        xlabel="seconds of the clip   (blue: a box, grey: nothing sure in view, red: lost)",
    )
    coverage.set_xlim(times_s[0], max(last_s, times_s[0] + 1e-3))
    plain(score, area)
    coverage.spines[["top", "right", "left"]].set_visible(False)
    stored = BytesIO()
    figure.savefig(stored, format="png")
    return stored.getvalue()


def _mean(sums: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """The means; NaN, which is drawn as a gap, where nothing was counted."""
    return np.where(counts > 0, sums / np.maximum(1, counts), np.nan)
