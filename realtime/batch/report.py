"""Writes the report of one clip: an HTML page, and a plot of the time that frames took."""

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
from realtime.documents import templates
from realtime.frames import STAGES
from realtime.statistics import set_title

MOST_OBJECTS = 30
ASSETS = Path(__file__).parent / "assets"
COLOURS = dict(
    zip(STAGES, ("#4C78A8", "#C8CCD2", "#72B7B2", "#E45756", "#F2A541", "#9D8CC2"), strict=True)
)
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


def plot_latency(tally: Tally, path: Path, title: str) -> None:
    """Two panels: the stages of frames stacked over the clip's time, and the distribution of each
    stage.

    Raises:
        OutputError: the picture cannot be written.
    """
    from matplotlib.figure import Figure  # half a second to import: only when a plot is wanted

    stages = [stage for stage in STAGES if stage in tally.stages]
    shown = tally.counts > 0
    figure = Figure(figsize=(11, 4.2), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    means = np.array([tally.stage_sums[stage][shown] / tally.counts[shown] for stage in stages])
    times_s = tally.times_s[shown]
    left.stackplot(
        times_s, means, labels=stages, colors=[COLOURS[stage] for stage in stages], linewidth=0
    )
    left.set(xlabel="seconds of the clip", ylabel="milliseconds, mean")
    set_title(left, title)
    left.set_xlim(times_s[0], max(times_s[-1], times_s[0] + 1e-3))
    left.set_ylim(0, 1.25 * float(np.percentile(means.sum(axis=0), 99)))
    handles, labels = left.get_legend_handles_labels()
    left.legend(
        handles[::-1], labels[::-1], loc="upper right", frameon=False, ncols=len(stages), fontsize=8
    )
    for stage in stages:
        edges_ms, shares = tally.stages[stage].distribution()
        right.step(edges_ms, 100 * shares, color=COLOURS[stage], label=stage, linewidth=1.6)
    right.set(
        xscale="log",
        xlabel="milliseconds",
        ylabel="% of frames at or below",
        ylim=(0, 101),
        title="per stage",
    )
    _plain(left, right)
    with whole_file(path) as part:
        figure.savefig(part, format="png")


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
    _plain(score, area)
    coverage.spines[["top", "right", "left"]].set_visible(False)
    stored = BytesIO()
    figure.savefig(stored, format="png")
    return stored.getvalue()


def _mean(sums: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """A gap where nothing was counted."""
    return np.where(counts > 0, sums / np.maximum(1, counts), np.nan)


def _plain(*all_axes: Any) -> None:
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
