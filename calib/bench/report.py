"""Shows a bench: tables for the terminal, and plots of latency, peers, sweeps and the roofline."""

from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from calib.bench.gpu import gpu_table
from engines.errors import OutputError
from engines.files import checked_output, file_key, picture_kind, signed, whole_file
from engines.text import displayable
from realtime.documents import LATENCY_FILE, course_of, plot_latency
from realtime.statistics import Run
from realtime.terminal import STAGES_TITLE, held_up_by, latency_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = "#4C78A8"
THEIRS = "#C2C8D0"
DARK = "#222222"
NAMES = ("peers", "rounds", "gpu", "roofline", "sweep", "profile")
FIGURE_SPACE = "\u2007"  # as wide as a digit, so that columns of figures line up
COLOURS = {"fp32": "#4C78A8", "bf16": "#E45756", "fp16": "#F2A541", "int8": "#54A24B"}


def check_plots(folder: Path, inputs: Iterable[str | Path | None]) -> None:
    """Refuse a folder whose pictures cannot be written without loss, before any work.

    Raises:
        OutputError: it is a file, or is read, or holds files of others under the names of our
            pictures.
    """
    inputs = list(inputs)
    if folder.exists() and not folder.is_dir():
        raise OutputError(
            f"{displayable(str(folder))} is a file: name a folder for the plots", option="plots"
        )
    if folder.is_dir() and file_key(folder) in {file_key(each) for each in inputs if each}:
        raise OutputError(
            f"{displayable(str(folder))} is a folder that is read: name another one for the plots",
            option="plots",
        )
    checked_output(folder / "latency.png", LATENCY_FILE, inputs)
    for name in NAMES:
        checked_output(folder / f"{name}.png", picture_kind(f"bench {name}"), inputs)


def plot_bench(result: dict[str, Any], run: Run, folder: Path) -> list[Path]:
    """Write ``latency.png``, ``peers.png``, ``rounds.png`` and, where the result has them,
    ``gpu.png``, ``roofline.png`` and ``sweep.png``.

    Raises:
        OutputError: a picture cannot be written.
    """
    from matplotlib.figure import Figure  # half a second to import: only when a plot is wanted

    written = []
    if run.total_ms:
        written.append(folder / "latency.png")
        title = f"{result['source']}: time per frame, held up by {held_up_by(result['verdict'])}"
        plot_latency(run.times, course_of(run), written[-1], title)
    draw: dict[str, Callable[[dict[str, Any]], Figure]] = {"peers": _peers, "rounds": _rounds}
    draw |= {"gpu": _gpu} if "gpu" in result["engines"][0] else {}
    draw |= {
        name: picture
        for name, picture in (("roofline", _roofline), ("sweep", _sweep))
        if result.get(name)
    }
    for name, picture in draw.items():
        written.append(folder / f"{name}.png")
        with whole_file(written[-1]) as part:
            picture(result).savefig(part, format="png", metadata=signed(f"bench {name}"))
    return written


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _plain(axes: Any, grid: Literal["both", "x", "y"] = "both") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.25)
    axes.set_axisbelow(True)


def _ours(name: str) -> bool:
    return name.startswith("Sightline")


def _colour(name: str) -> str:
    return OURS if _ours(name) else THEIRS


def _peers(result: dict[str, Any]) -> "Figure":
    """Draw a bar for each row up to the median, and a line to the 90th percentile.

    The line is cut at the edge. Each bar says how many times longer than ours it is.
    """
    engines = result["engines"]
    figure = _figure(
        6.8 * len(engines) + 0.8, 1.3 + 0.4 * max(len(engine["peers"]) for engine in engines)
    )
    for axes, engine in zip(np.atleast_1d(figure.subplots(1, len(engines))), engines, strict=True):
        peers = sorted(engine["peers"], key=lambda row: row["p50_ms"], reverse=True)
        names, medians = [row["name"] for row in peers], [row["p50_ms"] for row in peers]
        axes.barh(names, medians, color=[_colour(name) for name in names], height=0.68)
        axes.hlines(
            names, medians, [row["p90_ms"] for row in peers], color="#79706E", linewidth=1.2
        )
        figures = axes.secondary_yaxis("right")
        texts = (f"{row['p50_ms']:6.1f} ms {row['ratio']:6.2f} x" for row in peers)
        figures.set_yticks(
            range(len(peers)), [text.replace(" ", FIGURE_SPACE) for text in texts], fontsize=9
        )
        figures.tick_params(length=0)
        figures.spines["right"].set_visible(False)
        for label, name in zip(figures.get_yticklabels(), names, strict=True):
            label.set_color(OURS if _ours(name) else DARK)
        axes.set(
            xlabel="milliseconds: median, line to the 90th percentile",
            xlim=(0, 1.25 * max(medians)),
        )
        axes.set_title(engine["engine"], fontsize=11, loc="left")
        axes.tick_params(axis="y", length=0, labelsize=9)
        _plain(axes, "x")
    figure.suptitle("One image, in turns with what others run; times ours", fontsize=12)
    return figure


def _gpu(result: dict[str, Any]) -> "Figure":
    """Draw medians of copying and computing, for every batch size of each network."""
    engines = result["engines"]
    figure = _figure(11, 1.6 + 0.5 * sum(len(engine["gpu"]) for engine in engines))
    for axes, engine in zip(np.atleast_1d(figure.subplots(len(engines), 1)), engines, strict=True):
        timed = engine["gpu"][::-1]
        names, left = [f"batch {times['batch']}" for times in timed], np.zeros(len(timed))
        for name, words, colour in (
            ("h2d_ms", "H2D", "#F2A541"),
            ("compute_ms", "GPU Compute", OURS),
            ("d2h_ms", "D2H", "#54A24B"),
        ):
            widths = np.array([times[name]["p50"] for times in timed])
            axes.barh(names, widths, left=left, color=colour, height=0.62, label=words)
            left += widths
        for row, times in enumerate(timed):
            text = f"{left[row]:.2f} ms, {times['images_per_s']:.0f} images/s"
            axes.annotate(
                text, (left[row], row), (6, 0), textcoords="offset points", va="center", fontsize=9
            )
        axes.set(xlabel="milliseconds, medians", xlim=(0, 1.35 * max(left)))
        axes.set_title(engine["engine"], fontsize=11, loc="left")
        axes.tick_params(axis="y", length=0)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)
        _plain(axes, "x")
    return figure


def _rounds(result: dict[str, Any]) -> "Figure":
    """Draw every call over the rounds, and how the calls are distributed."""
    engines = result["engines"]
    figure = _figure(13.5, 3.9 * len(engines))
    grid = figure.subplots(len(engines), 2, width_ratios=(2, 1), squeeze=False)
    for (left, right), engine in zip(grid, engines, strict=True):
        palette = _row_colours([row["name"] for row in engine["peers"]])
        for row in engine["peers"]:
            values, style = (
                np.array(row["samples_ms"]),
                {"color": palette[row["name"]], "linewidth": 1.0 + _ours(row["name"])},
            )
            left.plot(np.arange(1, len(values) + 1), values, **style)
            share = 100 * np.arange(1, len(values) + 1) / len(values)
            right.step(np.sort(values), share, where="post", label=row["name"], **style)
        stable = "settled" if engine["stability"]["stable"] else "not settled"
        left.set(yscale="log", xlabel="round", ylabel="milliseconds")
        left.set_title(f"{engine['engine']}: every call ({stable})", fontsize=11, loc="left")
        left.xaxis.get_major_locator().set_params(integer=True)
        right.set(
            xscale="log", xlabel="milliseconds", ylabel="% of calls at or below", ylim=(0, 101)
        )
        right.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9)
        for axes, axis in ((left, left.yaxis), (right, right.xaxis)):
            _plain(axes)
            axis.set_major_formatter("{x:g}")
    return figure


def _row_colours(names: list[str]) -> dict[str, str]:
    """Our rows are blue. Each peer has a colour of its own."""
    blues = cycle(("#1F4E79", "#4C78A8", "#9ECAE9"))
    others = cycle(("#E45756", "#F2A541", "#54A24B", "#B279A2", "#9D755D", "#79706E", "#72B7B2"))
    return {name: next(blues) if _ours(name) else next(others) for name in names}


def _roofline(result: dict[str, Any]) -> "Figure":
    """Draw the machine's limit in each precision, and our numbered rows under it, log-log."""
    roofline = result["roofline"]
    points = roofline["points"]
    bandwidth = roofline["gbyte_per_s"]
    peaks = roofline["gflop_per_s"]
    corners = [point["flop_per_byte"] for point in points] + [
        peak / bandwidth for peak in peaks.values()
    ]
    intensity = np.geomspace(0.35 * min(corners), 2.5 * max(corners), 400)
    figure = _figure(10, 5)
    axes = figure.subplots()
    for precision, peak in peaks.items():
        colour, knee = COLOURS.get(precision, DARK), peak / bandwidth
        axes.plot(
            intensity,
            np.minimum(peak, bandwidth * intensity),
            color=colour,
            linewidth=1.8,
            zorder=1,
        )
        text = f"{precision} {peak:.0f} GFLOP/s"
        axes.annotate(
            text, (knee, peak), xytext=(14, 4), textcoords="offset points", color=colour, fontsize=9
        )
    for number, point in enumerate(points, start=1):
        colour, place = (
            COLOURS.get(point["precision"], DARK),
            (point["flop_per_byte"], point["gflop_per_s"]),
        )
        roof = min(peaks[point["precision"]], bandwidth * place[0])
        axes.vlines(
            place[0], place[1], roof, color=colour, linewidth=1, linestyle=(0, (2, 2)), zorder=2
        )
        label = (
            f"{number}  {point['network']}, {point['name'].removeprefix('Sightline ')}:"
            f" {point['gap']:.1f} x its bound"
        )
        axes.plot(
            *place,
            "o",
            color=colour,
            markersize=13,
            markeredgecolor="white",
            zorder=3 + number,
            label=label,
            linestyle="",
        )
        axes.text(
            *place,
            str(number),
            color="white",
            fontsize=8,
            weight="bold",
            ha="center",
            va="center",
            zorder=3 + number,
        )
    lowest = min([point["gflop_per_s"] for point in points] + list(peaks.values()))
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP for each byte moved",
        ylabel="GFLOP/s",
        xlim=(intensity[0], intensity[-1]),
    )
    axes.set_ylim(0.5 * lowest, 1.8 * max(peaks.values()))
    axes.set_title(f"Roofline of one core, memory at {bandwidth:.1f} GB/s", fontsize=12, loc="left")
    axes.legend(
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        fontsize=9,
        labelspacing=1.1,
        handletextpad=0.3,
    )
    _plain(axes)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    return figure


def _sweep(result: dict[str, Any]) -> "Figure":
    """Draw milliseconds for an image over the input side, beside the area, and over the batch."""
    sweep = result["sweep"]
    by_size = sorted((p for p in sweep["points"] if p["batch"] == 1), key=lambda p: p["size_px"])
    by_batch = sorted(
        (p for p in sweep["points"] if p["size_px"] == sweep["size_px"]), key=lambda p: p["batch"]
    )
    panels = [
        panel
        for panel in (
            ("input side, px", "size_px", by_size),
            ("images in a call", "batch", by_batch),
        )
        if panel[2]
    ]
    figure = _figure(5.4 * len(panels) + 0.4, 4.2)
    for axes, (label, key, points) in zip(
        np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True
    ):
        x, y, above = (
            np.array([p[name] for p in points])
            for name in (key, "ms_per_image", "p90_ms_per_image")
        )
        axes.fill_between(
            x, y, above, color=OURS, alpha=0.18, linewidth=0, label="to the 90th percentile"
        )
        axes.plot(x, y, "o-", color=OURS, markersize=6, label="median")
        if key == "size_px":
            area = y[-1] * (x / x[-1]) ** 2
            axes.plot(
                x,
                area,
                color=DARK,
                linewidth=1.2,
                linestyle=(0, (5, 3)),
                label="in proportion to the area",
            )
        for place, value in zip(x, y, strict=True):
            axes.annotate(
                f"{value:.1f}",
                (place, value),
                xytext=(4, -13),
                textcoords="offset points",
                fontsize=9,
                color=OURS,
            )
        axes.set(xlabel=label, ylabel="milliseconds per image", ylim=(0, 1.35 * above.max()))
        axes.set_xticks(x, [str(value) for value in x])
        axes.margins(x=0.08)
        axes.legend(loc="upper left", frameon=False, fontsize=9)
        _plain(axes)
    figure.suptitle(
        f"{sweep['network']} {sweep['precision']}, engine only, map at {sweep['layer']}",
        fontsize=12,
    )
    return figure


CROWDED = 0.05
"""Share of the processors that other programs may take before it is worth a word."""


def print_bench(result: dict[str, Any], console: Console) -> None:
    """Print every part as a table, with the conditions under it."""
    console.print(
        latency_table(f"{result['source']}, {result['engine']}: {STAGES_TITLE}", result),
        *processor_lines(result),
        settling(result),
        sep="\n",
    )
    for engine in result["engines"]:
        if "gpu" in engine:
            console.print(gpu_table(engine["engine"], engine["gpu"]), *map(settling, engine["gpu"]))
        console.print(peers_table(engine))
    if "roofline" in result:
        console.print(roofline_table(result["roofline"]))
    if "sweep" in result:
        console.print(sweep_table(result["sweep"]))
    console.print(f"{result['machine']}; no outlier removed", style="dim")


def processor_lines(result: dict[str, Any]) -> list[Text]:
    """What a frame costs, whatever else runs, and who takes it; empty where it was not measured."""
    if "processor_ms_per_frame" not in result:
        return []
    each, shares = result["processor_ms_per_frame"], result["processor_share"]
    lines = [
        Text(
            f"processor time of a frame {each['p50']:.2f} ms ({each['low']:.2f} to"
            f" {each['high']:.2f}): with nothing else running, at most"
            f" {result['fps_alone']:.0f} frames/s",
            style="bold",
        )
    ]
    if shares:
        words = ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in shares.items())
        lines.append(Text(f"of it: {words}"))
    return lines


def settling(part: dict[str, Any]) -> Text:
    """Say in words how sure a part's figures are, and what was not counted."""
    rule, samples = part["stability"], part.get("frames", part.get("calls"))
    before = (
        f"{part['warm_up_calls']} warm-up calls not counted; " if "warm_up_calls" in part else ""
    )
    others = rule["busy_elsewhere"] or 0.0
    busy = (
        f"; other programs took {100 * others:.0f} % of the processors" if others > CROWDED else ""
    )
    if rule["stable"]:
        return Text(f"{before}{samples} {rule['unit']}: {rule['rule']}{busy}", style="dim")
    margin = rule["margin"]
    reached = f"{100 * margin:.1f} %" if margin is not None else "no known margin, too few"
    text = (
        f"{before}NOT SETTLED within {rule['time_limit_s']:g} s, {samples} {rule['unit']}: not"
        f" {rule['rule']}; {rule['widest']}: {reached}{busy}"
    )
    return Text(text, style="yellow")


def peers_table(engine: dict[str, Any]) -> Group:
    """A table of one network: our rows, then the peers, then those that could not run, and why."""
    on = "" if "gpu" in engine else ", processor time on one thread"
    table = Table(
        title=f"{engine['engine']}, one image{on}, {engine['calls']} calls each, in turns",
        title_justify="left",
    )
    interval = f"{engine['stability']['confidence']} % between"
    for column in ("", "p50 ms", "p90 ms", "times ours", interval):
        table.add_column(column, justify="left" if not column else "right")
    for row in engine["peers"]:
        style = "bold" if row["name"].startswith("Sightline") else ""
        table.add_row(
            row["name"],
            f"{row['p50_ms']:.2f}",
            f"{row['p90_ms']:.2f}",
            f"{row['ratio']:.2f} x",
            f"{row['ratio_low']:.2f} and {row['ratio_high']:.2f}",
            style=style,
        )
    reasons = [
        Text(f"{row['name']}: not available: {row['why']}", style="yellow")
        for row in engine["not_available"]
    ]
    return Group(table, *reasons, settling(engine))


def roofline_table(roofline: dict[str, Any]) -> Group:
    """A table of our rows beside the bounds of this machine."""
    table = Table(title="roofline of one core", title_justify="left")
    for column in ("", "GFLOP", "MB", "compute ms", "memory ms", "took ms", "gap"):
        table.add_column(column, justify="left" if not column else "right")
    for point in roofline["points"]:
        bounds = (f"{point[name]:.2f}" for name in ("compute_ms", "memory_ms", "achieved_ms"))
        amount = f"{point['flop'] / 1e9:.2f}", f"{point['bytes'] / 1e6:.1f}"
        table.add_row(
            f"{point['network'].partition(' ')[0]}, {point['name'].removeprefix('Sightline ')}",
            *amount,
            *bounds,
            f"{point['gap']:.2f} x",
        )
    memory = f"memory {roofline['gbyte_per_s']:.1f} GB/s"
    return Group(table, Text(f"{peaks_in_words(roofline)}; {memory}", style="dim"))


def peaks_in_words(peaks: dict[str, Any]) -> str:
    """The highest rates of products, see ``Peaks.report``."""
    rates = ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in peaks["gflop_per_s"].items())
    return f"measured peaks of one core: {rates}"


def sweep_table(sweep: dict[str, Any]) -> Group:
    """A table of the cost of an image at each input size and batch."""
    title = f"{sweep['network']} {sweep['precision']}, engine only, map at {sweep['layer']}"
    table = Table(title=title, title_justify="left")
    for column in ("size px", "batch", "ms per image", "p90"):
        table.add_column(column, justify="right")
    for point in sweep["points"]:
        costs = f"{point['ms_per_image']:.2f}", f"{point['p90_ms_per_image']:.2f}"
        table.add_row(str(point["size_px"]), str(point["batch"]), *costs)
    return Group(table, settling(sweep))
