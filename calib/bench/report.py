"""A bench for the terminal: what ran how fast, beside whom, how far from the machine's bound, and whether it had settled."""

from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from calib.bench.gpu import gpu_table
from realtime.latency import latency_table

CROWDED = 0.05
"""Share of the processors that other programs may take before it is worth a word."""


def print_bench(result: dict[str, Any], console: Console) -> None:
    """Every part as a table, and the conditions under it."""
    console.print(latency_table(f"{result['source']}, {result['engine']}, {result['verdict']}", result), settling(result))
    for engine in result["engines"]:
        if "gpu" in engine:
            console.print(gpu_table(engine["engine"], engine["gpu"]), *map(settling, engine["gpu"]))
        console.print(peers_table(engine))
    if "roofline" in result:
        console.print(roofline_table(result["roofline"]))
    if "sweep" in result:
        console.print(sweep_table(result["sweep"]))
    console.print(f"{result['machine']}; no outlier removed", style="dim")


def settling(part: dict[str, Any]) -> Text:
    """Whether a part settled, in words, and what was not counted."""
    rule, samples = part["stability"], part.get("frames", part.get("calls"))
    unit = rule["unit"]
    condition = f"{rule['windows']} successive windows of {rule['window']} {unit} within {100 * rule['tolerance']:g} %"
    before = f"{part['warm_up_calls']} warm-up calls not counted; " if "warm_up_calls" in part else ""
    others = rule["busy_elsewhere"] or 0.0
    busy = f"; other programs took {100 * others:.0f} % of the processors" if others > CROWDED else ""
    if rule["stable"]:
        return Text(f"{before}stable after {samples} {unit}: {condition}{busy}", style="yellow" if busy else "dim")
    text = f"{before}NOT STABLE within {rule['time_limit_s']:g} s, {samples} {unit}: not {condition}{busy}"
    return Text(text, style="yellow")


def peers_table(engine: dict[str, Any]) -> Group:
    """One network's rows: ours, then the peers, then those that could not run and why."""
    table = Table(title=f"{engine['engine']}, one image, {engine['calls']} calls each, in turns", title_justify="left")
    for column in ("", "p50 ms", "p90 ms", "times ours"):
        table.add_column(column, justify="left" if not column else "right")
    for row in engine["peers"]:
        style = "bold" if row["name"].startswith("Sightline") else ""
        table.add_row(row["name"], f"{row['p50_ms']:.2f}", f"{row['p90_ms']:.2f}", f"{row['ratio']:.2f} x", style=style)
    reasons = [Text(f"{row['name']}: not available: {row['why']}", style="yellow") for row in engine["not_available"]]
    return Group(table, *reasons, settling(engine))


def roofline_table(roofline: dict[str, Any]) -> Group:
    """Each of our rows against the bounds of this machine."""
    table = Table(title="roofline", title_justify="left")
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
    peaks = ", ".join(f"{name} {value:.0f} GFLOP/s" for name, value in roofline["gflop_per_s"].items())
    return Group(table, Text(f"measured peaks: {peaks}; memory {roofline['gbyte_per_s']:.1f} GB/s", style="dim"))


def sweep_table(sweep: dict[str, Any]) -> Group:
    """Cost of an image against input size and batch."""
    title = f"{sweep['network']} {sweep['precision']}, engine only, map at {sweep['layer']}"
    table = Table(title=title, title_justify="left")
    for column in ("size px", "batch", "ms per image", "p90"):
        table.add_column(column, justify="right")
    for point in sweep["points"]:
        costs = f"{point['ms_per_image']:.2f}", f"{point['p90_ms_per_image']:.2f}"
        table.add_row(str(point["size_px"]), str(point["batch"]), *costs)
    return Group(table, settling(sweep))
