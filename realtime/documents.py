"""What result pages share: the template, and the plot of the time that frames took.

All pages extend ``assets/document.html``.
"""

import webbrowser
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines.files import picture_kind, signed, whole_file
from engines.text import displayable
from realtime.frames import STAGES
from realtime.statistics import Run, StageTimes

if TYPE_CHECKING:
    from jinja2 import Environment

LATENCY = "time per frame"
LATENCY_FILE = picture_kind(LATENCY)
COLOURS = dict(
    zip(STAGES, ("#4C78A8", "#C8CCD2", "#72B7B2", "#E45756", "#F2A541", "#9D8CC2"), strict=True)
)
"""Of the stages, in every plot; those of the page are in ``realtime/web/assets/charts.js``."""
ASSETS = Path(__file__).parent / "assets"


def templates(folder: Path, escape: bool = True) -> "Environment":
    """The templates of a folder, beside the shared one.

    Args:
        folder: holds them.
        escape: for HTML, whose content may hold anything; Markdown stays as it is.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # where pages are written

    return Environment(
        loader=FileSystemLoader([folder, ASSETS]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=escape,
    )


def open_in_browser(target: str | Path, notify: Callable[[str], None]) -> None:
    """Show an address or a file in the browser; where there is none, ``notify`` gets a line."""
    address = target.resolve().as_uri() if isinstance(target, Path) else target
    try:
        opened = webbrowser.open(address)
    except (OSError, webbrowser.Error):
        opened = False
    if not opened:
        notify(f"no browser was found here: open {target} yourself")


def set_title(axes: Any, text: str) -> None:
    """Put any text above a plot: nothing in it is a formula, and what the font lacks is a question
    mark.
    """
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    axes.set_title(
        "".join(c if ord(c) in known else "?" for c in displayable(text)), parse_math=False
    )


@dataclass(frozen=True)
class Course:
    """How times went in the course of a run.

    Attributes:
        x: ``[n]``: frames, or seconds; ``x_label`` says which.
        stages_ms: ``[n]`` of each stage; ``y_label`` says what they are.
        total_ms: ``[n]``: their sum, or more.
        shortest: of the axis of ``x``.
    """

    x: NDArray[np.float64]
    stages_ms: Mapping[str, NDArray[np.float64]]
    total_ms: NDArray[np.float64]
    x_label: str
    y_label: str
    shortest: float


def course_of(run: Run) -> Course:
    """Each frame of a run that was shown."""
    stages = {name: np.asarray(times.values_ms) for name, times in run.times.stages.items()}
    total = np.asarray(run.total_ms)
    return Course(np.arange(len(total), dtype=float), stages, total, "frame", "milliseconds", 1.0)


def plot_latency(times: StageTimes[Any], course: Course, path: Path, title: str) -> None:
    """Two panels: the stages of frames stacked over the course of a run, and the distribution of
    each stage.

    Raises:
        OutputError: the picture cannot be written.
    """
    from matplotlib.figure import Figure  # half a second to import: only when a plot is wanted

    stages = times.names
    figure = Figure(figsize=(11, 4.2), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    stacked = np.array([course.stages_ms[stage] for stage in stages])
    colours = [COLOURS[stage] for stage in stages]
    left.stackplot(course.x, stacked, labels=stages, colors=colours, linewidth=0)
    left.set(xlabel=course.x_label, ylabel=course.y_label)
    set_title(left, title)
    left.set_xlim(course.x[0], max(course.x[-1], course.x[0] + course.shortest))
    left.set_ylim(0, 1.25 * float(np.percentile(course.total_ms, 99)))
    handles, labels = left.get_legend_handles_labels()
    left.legend(
        handles[::-1], labels[::-1], loc="upper right", frameon=False, ncols=len(stages), fontsize=8
    )
    for stage in stages:
        edges_ms, shares = times.stages[stage].distribution()
        right.step(edges_ms, 100 * shares, color=COLOURS[stage], label=stage, linewidth=1.6)
    right.set(
        xscale="log",
        xlabel="milliseconds",
        ylabel="% of frames at or below",
        ylim=(0, 101),
        title="per stage",
    )
    plain(left, right)
    with whole_file(path) as part:
        figure.savefig(part, format="png", metadata=signed(LATENCY))


def plain(*all_axes: Any) -> None:
    """Axes with a light grid and without a frame."""
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
