"""Pictures of a bench: who takes how long, how steady it was, how far from the machine's bound, what size and batch cost."""

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from engines.files import whole_file
from realtime.latency import Run, plot_latency

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, THEIRS, DARK = "#4C78A8", "#C2C8D0", "#222222"
COLOURS = {"fp32": "#4C78A8", "bf16": "#E45756", "fp16": "#F2A541", "int8": "#54A24B"}
MARKERS = "oDs^vP"


def plot_bench(result: dict[str, Any], run: Run, folder: Path) -> list[Path]:
    """Write ``latency.png``, ``peers.png``, ``rounds.png``, ``roofline.png`` and, where there is one, ``sweep.png``.

    Raises:
        OutputError: a picture cannot be written.
    """
    from matplotlib.figure import Figure  # half a second to import: only when a plot is wanted

    written = []
    if run.total_ms:
        written.append(folder / "latency.png")
        plot_latency(run, written[-1], f"{result['source']}: time per frame, {result['verdict']}")
    draw: dict[str, Callable[[dict[str, Any]], Figure]] = {"peers": _peers, "rounds": _rounds, "roofline": _roofline}
    draw |= {"sweep": _sweep} if result.get("sweep") else {}
    for name, picture in draw.items():
        written.append(folder / f"{name}.png")
        with whole_file(written[-1]) as part:
            picture(result).savefig(part, format="png")
    return written


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _plain(axes: "Axes", grid: Literal["both", "x", "y"] = "both") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.25)
    axes.set_axisbelow(True)


def _colour(name: str) -> str:
    return OURS if name.startswith("Sightline") else THEIRS


def _peers(result: dict[str, Any]) -> "Figure":
    """A bar for each row, the median; a whisker to the 90th percentile; how many times ours."""
    engines = result["engines"]
    rows = max(len(engine["peers"]) for engine in engines)
    figure = _figure(6.2 * len(engines) + 1, 1.2 + 0.42 * rows)
    for axes, engine in zip(np.atleast_1d(figure.subplots(1, len(engines))), engines, strict=True):
        peers = sorted(engine["peers"], key=lambda row: row["p50_ms"], reverse=True)
        names, medians = [row["name"] for row in peers], [row["p50_ms"] for row in peers]
        above = [row["p90_ms"] - row["p50_ms"] for row in peers]
        axes.barh(names, medians, color=[_colour(name) for name in names], height=0.7)
        axes.errorbar(medians, names, xerr=[[0] * len(peers), above], fmt="none", ecolor=DARK, elinewidth=0.9, capsize=2.5)
        for place, row in enumerate(peers):
            text = f"{row['p50_ms']:.3g} ms  ·  {row['ratio']:.2f} x"
            axes.text(1.05 * row["p90_ms"], place, text, va="center", fontsize=8.5, color=DARK)
        axes.set(xscale="log", xlabel="milliseconds, median (whisker: 90th percentile)")
        axes.set_xlim(0.6 * min(medians), 3.6 * max(row["p90_ms"] for row in peers))
        axes.set_title(engine["engine"], fontsize=11, loc="left")
        axes.tick_params(axis="y", length=0, labelsize=9)
        _plain(axes, "x")
    figure.suptitle("One image, in turns with its peers", fontsize=13)
    return figure


def _rounds(result: dict[str, Any]) -> "Figure":
    """Every call over the rounds, and how they are distributed."""
    engines = result["engines"]
    figure = _figure(12, 3.9 * len(engines) + 0.3)
    grid = figure.subplots(len(engines), 2, width_ratios=(2, 1), squeeze=False)
    for (left, right), engine in zip(grid, engines, strict=True):
        palette = _row_colours([row["name"] for row in engine["peers"]])
        for row in engine["peers"]:
            values, colour = np.array(row["samples_ms"]), palette[row["name"]]
            width = 1.8 if row["name"].startswith("Sightline") else 1.1
            left.plot(np.arange(1, len(values) + 1), values, color=colour, linewidth=width, label=row["name"])
            share = 100 * np.arange(1, len(values) + 1) / len(values)
            right.step(np.sort(values), share, where="post", color=colour, linewidth=width)
        stable = "stable" if engine["stability"]["stable"] else "NOT stable"
        left.set(yscale="log", xlabel="round", ylabel="milliseconds", title=f"{engine['engine']}: every call ({stable})")
        right.set(xscale="log", xlabel="milliseconds", ylabel="% of calls at or below", ylim=(0, 101), title="distribution")
        for axes in (left, right):
            _plain(axes)
        left.legend(loc="center left", bbox_to_anchor=(-0.62, 0.5), frameon=False, fontsize=8.5)
    return figure


def _row_colours(names: list[str]) -> dict[str, str]:
    """Ours in blues, each peer in a colour of its own."""
    blues = cycle(("#1F4E79", "#4C78A8", "#9ECAE9"))
    others = cycle(("#E45756", "#F2A541", "#54A24B", "#B279A2", "#9D755D", "#79706E", "#72B7B2"))
    return {name: next(blues) if name.startswith("Sightline") else next(others) for name in names}


def _roofline(result: dict[str, Any]) -> "Figure":
    """The machine's roof in each precision, and where each of our rows lies under it; log-log."""
    roofline = result["roofline"]
    points, bandwidth = roofline["points"], roofline["gbyte_per_s"]
    figure = _figure(8.5, 5.2)
    axes = figure.subplots()
    right_most = 1.6 * max(
        [p["flop_per_byte"] for p in points] + [peak / bandwidth for peak in roofline["gflop_per_s"].values()]
    )
    left_most = 0.4 * min(
        [p["flop_per_byte"] for p in points] + [peak / bandwidth for peak in roofline["gflop_per_s"].values()]
    )
    intensity = np.geomspace(left_most, 2.2 * right_most, 200)
    for precision, peak in roofline["gflop_per_s"].items():
        roof = np.minimum(peak, bandwidth * intensity)
        axes.plot(intensity, roof, color=COLOURS.get(precision, DARK), linewidth=1.8, zorder=1)
        axes.text(intensity[-1], 1.06 * peak, f"{precision} peak {peak:.0f} GFLOP/s", color=COLOURS.get(precision, DARK),
                  ha="right", va="bottom", fontsize=9)  # fmt: skip
    networks = list(dict.fromkeys(point["network"] for point in points))
    for point in points:
        colour, marker = COLOURS.get(point["precision"], DARK), MARKERS[networks.index(point["network"]) % len(MARKERS)]
        place = point["flop_per_byte"], point["gflop_per_s"]
        roof = min(roofline["gflop_per_s"][point["precision"]], bandwidth * place[0])
        axes.vlines(place[0], place[1], roof, color=colour, linewidth=1, linestyle=(0, (2, 2)))
        axes.plot(*place, marker, color=colour, markersize=9, markeredgecolor="white", zorder=3)
        label = f"{point['name'].removeprefix('Sightline ')}: {point['gap']:.1f} x the bound"
        axes.annotate(label, place, xytext=(9, -4), textcoords="offset points", fontsize=8.5, color=DARK)
    for number, network in enumerate(networks):
        axes.plot([], [], MARKERS[number % len(MARKERS)], color="#79706E", label=network)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte moved", ylabel="GFLOP/s")
    axes.set_title(f"Roofline of this machine (memory {bandwidth:.1f} GB/s)", fontsize=12, loc="left")
    axes.set_xlim(intensity[0], intensity[-1])
    axes.set_ylim(top=1.7 * max(roofline["gflop_per_s"].values()))
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    _plain(axes)
    return figure


def _sweep(result: dict[str, Any]) -> "Figure":
    """Milliseconds for an image against input side (and its area's share), and against batch."""
    sweep = result["sweep"]
    by_size = sorted((p for p in sweep["points"] if p["batch"] == 1), key=lambda p: p["size_px"])
    by_batch = sorted((p for p in sweep["points"] if p["size_px"] == sweep["size_px"]), key=lambda p: p["batch"])
    panels = [("input side, px", "size_px", by_size), ("images in a call", "batch", by_batch)]
    panels = [panel for panel in panels if len(panel[2]) > 1] or panels[:1]
    figure = _figure(5.2 * len(panels) + 0.6, 4.2)
    for axes, (label, key, points) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        x, y = np.array([p[key] for p in points]), np.array([p["ms_per_image"] for p in points])
        axes.fill_between(x, y, [p["p90_ms_per_image"] for p in points], color=OURS, alpha=0.18, linewidth=0, label="to p90")
        axes.plot(x, y, "o-", color=OURS, markersize=6, label="median")
        if key == "size_px" and len(x) > 1:
            axes.plot(x, y[0] * (x / x[0]) ** 2, color=DARK, linewidth=1.2, linestyle=(0, (5, 3)), label="as the area grows")
        for place, value in zip(x, y, strict=True):
            axes.annotate(f"{value:.3g}", (place, value), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=8.5)
        axes.set(xlabel=label, ylabel="milliseconds per image", ylim=(0, 1.25 * max(p["p90_ms_per_image"] for p in points)))
        axes.set_xticks(x, [str(value) for value in x])
        axes.legend(loc="upper left" if key == "size_px" else "lower left", frameon=False, fontsize=9)
        _plain(axes)
    figure.suptitle(f"{sweep['network']} {sweep['precision']}, engine only, map at the pixels", fontsize=12)
    return figure
