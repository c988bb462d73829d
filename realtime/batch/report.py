"""Writes the report of one clip: an HTML page with curves over the clip's time."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from engines.files import whole_file
from realtime.annotate import clock
from realtime.batch.segment import Clip
from realtime.batch.table import Tally
from realtime.documents import Course, plain, templates

MOST_OBJECTS = 30
ASSETS = Path(__file__).parent / "assets"
INK, LOST = "#4C78A8", "#E45756"


def write_report(
    path: Path,
    title: str,
    clip: Clip,
    summary: Mapping[str, Any],
    tally: Tally,
    strip: Sequence[Mapping[str, Any]],
    latency_plot: Path,
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
    page = (
        templates(ASSETS)
        .get_template("report.html")
        .render(
            title=title,
            summary=summary,
            facts=facts,
            clip=clip,
            worked=worked,
            strip=strip,
            clock=clock,
            objects=dict(
                sorted(tally.objects.items(), key=lambda each: -each[1].frames)[:MOST_OBJECTS]
            ),
            curves=b64encode(_curves(tally)).decode(),
            latency=b64encode(latency_plot.read_bytes()).decode(),
            video=quote(Path(summary["files"]["video"]).name)
            if "video" in summary["files"]
            else "",
        )
    )
    with whole_file(path) as part:
        part.write_text(page, encoding="utf-8", errors="replace")


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
    """Score, size of the box, and which frames were localized, over the clip's time, as a PNG."""
    from matplotlib.figure import Figure  # half a second to import: only when a plot is wanted

    seen = ~np.isnan(tally.times_s)
    times_s, counts, failed = tally.times_s[seen], tally.counts[seen], tally.failed[seen]
    figure = Figure(figsize=(11, 4.4), dpi=130, layout="constrained")
    score, area, coverage = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))
    for axes, sums, label in (
        (score, tally.score_sum, "score"),
        (area, 100 * tally.area_sum, "box, % of picture"),
    ):
        axes.plot(times_s, _mean(sums[seen], counts), color=INK, linewidth=1.4)
        axes.set(ylabel=label, ylim=(0, 1 if axes is score else 100))
    last_s = times_s[-1] + (times_s[-1] - times_s[0]) / max(1, len(times_s) - 1)
    spans = [
        (begin, end - begin) for begin, end in zip(times_s, [*times_s[1:], last_s], strict=True)
    ]
    share = failed / np.maximum(1, counts + failed)
    coverage.broken_barh(spans, (0, 1), facecolors=INK, linewidth=0)
    for span, part in zip(spans, share, strict=True):
        if part:
            coverage.broken_barh([span], (0, max(0.25, part)), facecolors=LOST, linewidth=0)
    coverage.set(
        ylabel="frames",
        yticks=(),
        ylim=(0, 1),
        xlabel="seconds of the clip   (blue: localized, red: lost)",
    )
    coverage.set_xlim(times_s[0], max(last_s, times_s[0] + 1e-3))
    plain(score, area)
    coverage.spines[["top", "right", "left"]].set_visible(False)
    stored = BytesIO()
    figure.savefig(stored, format="png")
    return stored.getvalue()


def _mean(sums: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """A gap where nothing was counted."""
    return np.where(counts > 0, sums / np.maximum(1, counts), np.nan)
