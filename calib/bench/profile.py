"""Where the time of one image goes: each operator and node of the compiled graph beside what one
core could do at best, and the whole beside the forward pass alone.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
from rich.console import Console
from rich.table import Table

from calib.bench.compare import OURS
from calib.bench.machine import Peaks, machine, measure_peaks, multiply_adds, tensor_shapes
from calib.bench.report import peaks_in_words, settling
from calib.bench.turns import THREADS, engine_call, forward_graph, take_turns
from engines.backends.openvino import OpenVinoEngine
from engines.backends.registry import AUTO
from engines.build import IMAGE, WANTED_CLASS, assemble, build_graph
from engines.choose import choose_head, choose_quantization, chosen_spec
from engines.errors import EngineError
from engines.files import signed, whole_file
from engines.graph import Graph, needed
from engines.int8 import quantize
from engines.options import EngineOptions

FORWARD, BACKWARD, HEAD = "forward", "backward", "map and head"
WHOLE, ALONE = f"{OURS}, all of it", f"{OURS}, the forward pass alone"
PARTS = (FORWARD, BACKWARD, HEAD)
MOST_CALLS, FEWEST_CALLS = 60, 5
PRODUCTS = ("Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul")
"""OpenVINO's kinds that have FLOP."""
PICTURE = "bench profile"
DRAWN = 16
COLOURS = {FORWARD: "#4C78A8", BACKWARD: "#54A24B", HEAD: "#F2A541"}
COSTLIEST = 15
"""Nodes that the table shows."""


@dataclass(frozen=True)
class Row:
    """A node of the compiled graph.

    Attributes:
        name: of the node.
        operator: its kind, in OpenVINO's word.
        kernel: what computes it, and in which type.
        part: one of ``PARTS``.
        ms: the fastest of the calls: other programs make most of them longer.
        flop: two for each multiply-add of the convolutions and products in it.
        precision: what it computes in, in OpenVINO's word.
        moved_bytes: of its inputs, weights and outputs.
        bound_ms: what one core needs at least, see ``bound_ms``.
    """

    name: str
    operator: str
    kernel: str
    part: str
    ms: float
    flop: int
    precision: str
    moved_bytes: int
    bound_ms: float


TYPES = {"bf16": "bf16", "f16": "fp16", "u8": "int8", "i8": "int8"}
"""``Peaks``' name of OpenVINO's; others are fp32."""


def bound_ms(flop: int, moved_bytes: int, precision: str, peaks: Peaks) -> float:
    """What one core needs at least for this work: at its highest rate of products, or at that of
    copying within its own cache, whichever is longer.
    """
    rate = peaks.gflop_per_s.get(TYPES.get(precision, "fp32"), peaks.gflop_per_s["fp32"])
    return max(flop / rate, moved_bytes / peaks.cached_gbyte_per_s) / 1e6


def bench_profile(choice: EngineOptions, seconds: float, console: Console) -> dict[str, Any]:
    """Time every node of what a user gets, and the whole in turns with the forward pass alone, on
    one thread.

    Args:
        choice: model, weights, method, size, head, layer and precision.
        seconds: time limit, of the nodes and of the turns each.
        console: for progress.

    Returns:
        ``engine``, ``precision``, ``layer``, ``forward_ms``, ``whole_ms`` and ``ratio`` (medians of
        calls in turns, without measuring nodes), ``calls``, ``stability``, ``nodes_ms`` (the sum of
        all nodes), ``bound_ms`` (of all nodes), ``parts``, ``operators``, ``nodes`` (the
        costliest), ``peaks`` and ``machine``.

    Raises:
        EngineError: another backend than OpenVINO is asked for.
    """
    if choice.backend not in (AUTO, "openvino"):
        raise EngineError(
            "nodes are timed on OpenVINO only: use backend openvino", option="backend"
        )
    classifier = choice.classifier()
    head = choose_head(choice, classifier)
    spec = chosen_spec(choice, head, classifier)
    ranges = choose_quantization(choice, classifier, spec)
    side = classifier.size_px
    image = np.random.default_rng(0).integers(0, 256, (1, side, side, 3)).astype(np.uint8)
    feed = {IMAGE: image, WANTED_CLASS: np.array([-1])}
    title = f"{choice.model} at {side} px"
    with console.status(f"{title}: building and compiling ..."):
        model = build_graph(classifier, spec, head, quantization=ranges)
        written = assemble(classifier, spec, head)
        if ranges is not None:
            quantize(written.graph, ranges, written.exact)
        whole = OpenVinoEngine(model, choice.precision, THREADS)
        plain = "auto" if choice.precision == "int8" else choice.precision
        alone = OpenVinoEngine(forward_graph(classifier), plain, THREADS)
        measured = OpenVinoEngine(model, choice.precision, THREADS, with_times=True)
    parts = parts_of(written.graph, written.outputs["class_index"], written.exact)
    flop = flop_of(model)
    with closing(whole), closing(alone), closing(measured):
        calls = {WHOLE: engine_call(whole, feed), ALONE: engine_call(alone, {IMAGE: image})}
        samples_ms, stability = take_turns(calls, seconds, console, title)
        with console.status(f"{title}: timing every node ..."):
            peaks = measure_peaks()
            rows = timed(measured, feed, seconds, parts, flop, peaks)
    whole_ms, forward_ms = (median(samples_ms[name]) for name in (WHOLE, ALONE))
    return {
        "engine": title,
        "precision": whole.precision,
        "forward_precision": alone.precision,
        "layer": spec.layer,
        "forward_ms": round(forward_ms, 3),
        "whole_ms": round(whole_ms, 3),
        "ratio": round(whole_ms / forward_ms, 3),
        "calls": len(samples_ms[WHOLE]),
        "stability": stability,
        **summary_of(rows),
        "peaks": peaks.report(),
        "machine": machine(),
    }


def parts_of(graph: Graph, class_index: str, head: Sequence[str] = ()) -> dict[str, str]:
    """Part of each node by its name: backward is what leads from the backward pass's starts to its
    ends, forward is what else leads to these and to the class, and the map and the head are the
    rest. All nodes of a dense ``head`` are of the head: it scores the image, too.
    """
    after = set(graph.backward_starts)
    for node in graph.nodes:
        if after.intersection(node.input):
            after.update(node.output)
    between = {n.name for n in needed(graph.nodes, graph.backward_ends)}
    of_head = set(head)
    before = between | {n.name for n in needed(graph.nodes, [class_index])}
    return {
        node.name: HEAD
        if node.name not in before or node.name in of_head
        else BACKWARD
        if after.intersection(node.output) and node.name in between
        else FORWARD
        for node in graph.nodes
    }


def flop_of(model: onnx.ModelProto) -> dict[str, int]:
    """Two for each multiply-add of each convolution and product, by the node's name, and likewise
    by that of a factor or summand behind it: OpenVINO may put that into the weights, and names what
    comes out after it.
    """
    shapes = tensor_shapes(model)
    found: dict[str, int] = {}
    written: dict[str, str] = {}
    for node in model.graph.node:
        found[node.name] = 2 * multiply_adds(node, shapes)
        written.update(dict.fromkeys(node.output, node.name))
        if node.op_type in ("Mul", "Add", "Sub", "Div"):
            before = [found[written[name]] for name in node.input if name in written]
            found[node.name] = before[0] if len(before) == 1 else 0
    return found


def timed(
    engine: OpenVinoEngine,
    feed: Mapping[str, Any],
    seconds: float,
    parts: Mapping[str, str],
    flop: Mapping[str, int],
    peaks: Peaks,
) -> list[Row]:
    """Every node of a compiled graph, the costliest first."""
    samples_ms: dict[str, list[float]] = defaultdict(list)
    calls, passed_ms = 0, 0.0
    while calls < FEWEST_CALLS or (calls < MOST_CALLS and passed_ms < 1e3 * seconds):
        engine.infer(feed)
        times = engine.node_times()
        for node in times:
            samples_ms[node.name].append(node.ms)
        calls, passed_ms = calls + 1, passed_ms + sum(node.ms for node in times)
    rows = []
    for node in times:
        sources = {name for name in (_known(each, parts) for each in node.sources) if name}
        found = {parts[name] for name in sources}
        part = next((p for p in PARTS if p in found), "")
        work = max((flop[name] for name in sources if node.kind in PRODUCTS), default=0)
        rows.append(
            Row(
                node.name,
                node.kind,
                node.kernel,
                part or _part_of_name(node.name, parts),
                min(samples_ms[node.name]),
                work,
                node.precision,
                node.moved_bytes,
                bound_ms(work, node.moved_bytes, node.precision, peaks),
            )
        )
    return sorted(rows, key=lambda row: row.ms, reverse=True)


def _known(name: str, parts: Mapping[str, str]) -> str:
    """The graph's node that OpenVINO's name is of: it may add endings."""
    while name and name not in parts:
        name = name[: max(name.rfind("/"), name.rfind("."), 0)]
    return name


def _part_of_name(name: str, parts: Mapping[str, str]) -> str:
    """Of a node that OpenVINO put in, which is named after its neighbours: the last part of
    those.
    """
    near = [parts[each] for each in parts if each and each in name]
    return max(near, key=PARTS.index, default=FORWARD)


def summary_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Sums by part and by operator, and the costliest nodes, for the JSON."""
    total_ms = sum(row.ms for row in rows)

    def sums(chosen: Iterable[Row]) -> dict[str, Any]:
        chosen = list(chosen)
        ms = sum(row.ms for row in chosen)
        return {
            "nodes": len(chosen),
            "ms": round(ms, 4),
            "share": round(ms / max(total_ms, 1e-9), 4),
            "flop": sum(row.flop for row in chosen),
            "bytes": sum(row.moved_bytes for row in chosen),
            "bound_ms": round(sum(row.bound_ms for row in chosen), 4),
        }

    kinds = dict.fromkeys((row.part, row.operator, row.kernel) for row in rows)
    operators = [
        {"operator": operator, "kernel": kernel, "part": part}
        | sums(
            row for row in rows if (row.part, row.operator, row.kernel) == (part, operator, kernel)
        )
        for part, operator, kernel in kinds
    ]
    return {
        "nodes_ms": round(total_ms, 4),
        "bound_ms": round(sum(row.bound_ms for row in rows), 4),
        "parts": [{"part": part} | sums(r for r in rows if r.part == part) for part in PARTS],
        "operators": sorted(operators, key=lambda each: each["ms"], reverse=True),
        "nodes": [
            {"name": row.name, "operator": row.operator, "kernel": row.kernel, "part": row.part}
            | {key: value for key, value in sums([row]).items() if key != "nodes"}
            for row in rows[:COSTLIEST]
        ],
    }


def print_profile(result: dict[str, Any], console: Console) -> None:
    """Print the tables, with the conditions under them."""
    console.print(
        f"{result['engine']}, {result['precision']}, map at {result['layer']}: one image takes"
        f" {result['whole_ms']:.2f} ms, {result['ratio']:.2f} x the forward pass alone"
        f" ({result['forward_ms']:.2f} ms, {result['forward_precision']})",
        settling(result),
    )
    best = f"{result['whole_ms'] / result['bound_ms']:.2f} x what its nodes need at best"
    console.print(f"that is {best} ({result['bound_ms']:.2f} ms)")
    for title, key, names in (
        ("by part", "parts", ("part", "nodes")),
        (f"by operator, the {COSTLIEST} costliest", "operators", ("operator", "part", "nodes")),
        (f"the {COSTLIEST} costliest nodes", "nodes", ("name", "part")),
    ):
        table = Table(title=title, title_justify="left")
        for name in names:
            table.add_column(name, justify="right" if name == "nodes" else "left")
        for name in ("ms", "share", "MFLOP", "GFLOP/s", "at best ms", "lost ms"):
            table.add_column(name, justify="right")
        for row in result[key][:COSTLIEST]:
            words = [str(row[name]) for name in names]
            if key == "operators":
                words[0] += f" {row['kernel'].rpartition('_')[2]}"
            table.add_row(*words, *_figures(row))
        console.print(table)
    console.print(
        f"the nodes alone take {result['nodes_ms']:.2f} ms while each is timed, the fastest of its"
        f" calls; {peaks_in_words(result['peaks'])},"
        f" {result['peaks']['cached_gbyte_per_s']:.0f} GB/s in cache; {result['machine']}",
        style="dim",
    )


def _figures(row: Mapping[str, Any]) -> list[str]:
    """The figures of a row of a table."""
    work = f"{row['flop'] / 1e6:.1f}" if row["flop"] else ""
    rate = f"{row['flop'] / row['ms'] / 1e6:.0f}" if row["flop"] and row["ms"] else ""
    times = f"{row['ms']:.3f}", f"{100 * row['share']:.1f} %"
    return [*times, work, rate, f"{row['bound_ms']:.3f}", f"{row['ms'] - row['bound_ms']:.3f}"]


def plot_profile(result: dict[str, Any], path: Path) -> None:
    """Draw what each operator takes, and what of it one core needs at best.

    Raises:
        OutputError: the picture cannot be written.
    """
    from matplotlib.figure import Figure  # half a second to import: only when a plot is wanted
    from matplotlib.patches import Patch

    rows = result["operators"][:DRAWN][::-1]
    names = [f"{row['operator']}, {row['part']} ({row['kernel']}) x {row['nodes']}" for row in rows]
    figure = Figure(figsize=(11, 1.4 + 0.32 * len(rows)), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.barh(names, [row["ms"] for row in rows], color=[COLOURS[row["part"]] for row in rows])
    axes.barh(names, [row["bound_ms"] for row in rows], color="#222222", height=0.3)
    for place, row in enumerate(rows):
        share = row["bound_ms"] / max(row["ms"], 1e-9)
        text = f" {row['ms']:.2f} ms, {100 * share:.0f} % of it at best"
        axes.text(row["ms"], place, text, va="center", fontsize=8)
    axes.set(xlabel="milliseconds on one core; black: at best", xlim=(0, 1.35 * rows[-1]["ms"]))
    axes.set_title(
        f"{result['engine']}, {result['precision']}: {result['nodes_ms']:.1f} ms,"
        f" {result['bound_ms']:.1f} at best",
        fontsize=11,
        loc="left",
    )
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=colour, label=part) for part, colour in COLOURS.items()]
    axes.legend(handles=handles, loc="lower right", frameon=False)
    with whole_file(path) as part:
        figure.savefig(part, format="png", metadata=signed(PICTURE))
