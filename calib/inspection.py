"""The ``inspect`` command: what a classifier is, and a picture of its maps."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from calib.bench.machine import count_work
from calib.evaluation.report import plain
from engines.backends.openvino import OpenVinoEngine
from engines.build import IMAGE, WANTED_CLASS, build_graph
from engines.errors import ModelError, OutputError
from engines.files import checked_output, picture_kind, signed, whole_file
from engines.gradient import RULES
from engines.graph import FLOAT, Graph, needed
from engines.head import NO_HEAD
from engines.localizer import ImageBgr
from engines.maps import PIXELS, MapSpec
from engines.networks.network import Forward
from engines.networks.registry import Classifier, class_names
from engines.options import LOOK_AT, OUTPUT, EngineOptions, Option
from engines.resizing import resized
from realtime.sources.spec import open_source

MAPS = "maps"
MAPS_FILE = picture_kind(MAPS)
SHOWN_NAMES = 3
PANEL_PX = 360
"""Side of each part of the picture."""


@dataclass(frozen=True)
class InspectOptions:
    """The options of ``inspect`` besides those of the network."""

    image: Annotated[str | None, Option("A photo to draw the maps of.", LOOK_AT)] = None
    out: Annotated[Path, Option("The picture of the maps to write (.png).", OUTPUT)] = Path(
        "maps.png"
    )


def inspect_chosen(
    model: str, options: InspectOptions, choice: EngineOptions, console: Console
) -> dict[str, Any]:
    """Say what a classifier is; draw its maps where there is a photo.

    Returns:
        What was found, for JSON.

    Raises:
        SightlineError: the network or the photo cannot be read, or the picture cannot be written.
    """
    if options.image is not None:
        checked_output(options.out, MAPS_FILE, (options.image, *choice.inputs))
    classifier = replace(choice, head=NO_HEAD).classifier()
    found = inspected(classifier)
    _print(found, console)
    if options.image is not None:
        if found["missing_rules"]:
            raise ModelError(f"{model} has no maps: rules are missing", option="image")
        draw_maps(classifier, _photo(options.image), options.out)
        console.print(f"wrote {options.out}")
        found["picture"] = str(options.out)
    return found


def inspected(classifier: Classifier) -> dict[str, Any]:
    """What a classifier is: input, classes, stages, parameters, work, what is missing, notes."""
    graph, forward = classifier.forward_graph()
    nodes = needed(graph.nodes, [forward.scores])
    read = {name for node in nodes for name in node.input}
    weights = [v.size for n, v in graph.constants.items() if n in read and v.dtype.kind == "f"]
    count = graph.shape(forward.scores)[1]
    names = classifier.class_names or class_names(count)
    stages = _stages(classifier, graph, forward)
    missing = _missing(graph, forward)
    graph.output(forward.scores, "scores_out")
    work = {"forward": count_work(graph.model()).flop / 1e9}
    if not missing:
        for layer in (PIXELS, *([stages[len(stages) // 2]["layer"]] if stages else [])):
            model = build_graph(classifier, MapSpec(_objective(classifier), layer=layer))
            work[layer] = count_work(model).flop / 1e9
    return {
        "model": classifier.name,
        "digest": classifier.digest,
        "size_px": classifier.size_px,
        "input": classifier.preprocessing.describe(classifier.size_px),
        "classes": count,
        "class_names": list(names),
        "are_independent": forward.independent,
        "stages": stages,
        "parameters": int(sum(weights)),
        "gflop": work,
        "missing_rules": missing,
        "operators": dict(Counter(node.op_type for node in nodes).most_common()),
        "notes": list(classifier.network.notes),
    }


def _objective(classifier: Classifier) -> str:
    return "gestalt" if classifier.network.classless else "class"


def _stages(classifier: Classifier, graph: Graph, forward: Forward) -> list[dict[str, Any]]:
    layers = classifier.network.head_layers or tuple(forward.layers)
    found = []
    for layer in layers:
        _, channels, height, width = graph.shape(forward.layers[layer])
        stride = classifier.size_px / height
        found.append(
            {"layer": layer, "cells": [height, width], "channels": channels, "stride_px": stride}
        )
    return found


def _missing(graph: Graph, forward: Forward) -> dict[str, int]:
    """How often each operator without a gradient rule stands between image and scores."""
    reached = set(graph.inputs)
    for node in graph.nodes:
        if reached.intersection(node.input):
            reached.update(name for name in node.output if name and graph.types[name].elem == FLOAT)
    nodes = [n for n in needed(graph.nodes, [forward.scores]) if reached.intersection(n.output)]
    return dict(Counter(n.op_type for n in nodes if n.op_type not in RULES).most_common())


def _print(found: dict[str, Any], console: Console) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    names = ", ".join(found["class_names"][:SHOWN_NAMES])
    more = " ..." if found["classes"] > SHOWN_NAMES else ""
    several = ", each by itself" if found["are_independent"] else ""
    work = found["gflop"]
    said = [f"{work['forward']:.3g} forward"]
    said += [f"{v:.3g} with maps at {n}" for n, v in work.items() if n != "forward"]
    missing = ", ".join(f"{name} ({count})" for name, count in found["missing_rules"].items())
    for what, value in (
        ("network", found["model"]),
        ("input", found["input"]),
        ("classes", f"{found['classes']:,}{several}: {names}{more}"),
        ("parameters", f"{found['parameters'] / 1e6:.2f} million"),
        ("GFLOP", "; ".join(said)),
        ("gradient rules", f"missing for {missing}" if missing else "all there"),
        *(("note", note) for note in found["notes"]),
    ):
        table.add_row(what, console.render_str(value, markup=False, highlight=False))
    console.print(table)
    stages = Table("stage", "cells", "channels", "stride", title="Maps, from image to scores")
    for stage in found["stages"]:
        cells = " x ".join(str(n) for n in stage["cells"])
        stages.add_row(
            stage["layer"], cells, str(stage["channels"]), f"{stage['stride_px']:.3g} px"
        )
    console.print(stages)


def _photo(source: str) -> ImageBgr:
    """The first picture of a source.

    Raises:
        SourceError: there is none.
    """
    with open_source(source) as opened:
        for frame in opened:
            return frame.image_bgr
    raise OutputError(f"{source} holds no picture", option="image")


def draw_maps(classifier: Classifier, photo_bgr: ImageBgr, out: Path) -> None:
    """Draw the photo, and over it the map at the pixels and at each stage: bright is where a change
    moves the score of the class most.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # half a second to import: only when a plot is wanted

    square = resized(photo_bgr, classifier.size_px)
    graph, forward = classifier.forward_graph()
    layers = (PIXELS, *classifier.network.head_layers)
    parts, said = [("the photo", cv2.resize(square, (PANEL_PX, PANEL_PX)))], ""
    for layer in layers:
        is_last = layer == classifier.last_layer()
        signal = "layercam" if is_last else "gradient"
        spec = MapSpec(_objective(classifier), layer=layer, signal=signal)
        engine = OpenVinoEngine(build_graph(classifier, spec), "fp32")
        answer = engine.infer({IMAGE: square[None], WANTED_CLASS: np.array([-1])})
        engine.close()
        index, score = int(answer["class_index"][0]), float(answer["score"][0])
        names = classifier.class_names or class_names(graph.shape(forward.scores)[1])
        said = f"{names[index]} ({100 * score:.1f} %)"
        tensor = forward.layers.get(layer, graph.inputs[0])
        shape = graph.shape(tensor)[1:]
        title = f"{layer}\n{shape[1]} x {shape[2]} cells, {shape[0]} channels"
        parts.append((f"{title}{', LayerCAM' if is_last else ''}", _over(square, answer["map"][0])))
    columns = min(4, len(parts))
    rows = -(-len(parts) // columns)
    figure = Figure(figsize=(3.3 * columns, 3.75 * rows + 0.5), dpi=110, layout="constrained")
    figure.suptitle(plain(f"{classifier.name}: {said}"), fontsize=13)
    for place in range(rows * columns):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.set_axis_off()
        if place < len(parts):
            axes.imshow(cv2.cvtColor(parts[place][1], cv2.COLOR_BGR2RGB))
            axes.set_title(plain(_shortened(parts[place][0])), fontsize=9)
    with whole_file(out) as part:
        figure.savefig(part, format="png", metadata=signed(MAPS))


def _shortened(title: str, most: int = 44) -> str:
    """Lines of at most so many characters: of a long name its end tells most."""
    lines = title.split("\n")
    return "\n".join(line if len(line) <= most else f"...{line[3 - most :]}" for line in lines)


def _over(square_bgr: ImageBgr, values: np.ndarray) -> ImageBgr:
    """A map over the grey photo. Values above all but a hundredth are drawn alike, so that a few
    do not hide the rest.
    """
    top = float(np.quantile(values, 0.99)) or float(values.max()) or 1.0
    shares = np.clip(values / top, 0, 1).astype(np.float32)
    how = cv2.INTER_AREA if shares.shape[0] > PANEL_PX else cv2.INTER_CUBIC
    large = np.clip(cv2.resize(shares, (PANEL_PX, PANEL_PX), interpolation=how), 0, 1)
    heat = cv2.applyColorMap((255 * large).astype(np.uint8), cv2.COLORMAP_INFERNO)
    grey = cv2.cvtColor(cv2.resize(square_bgr, (PANEL_PX, PANEL_PX)), cv2.COLOR_BGR2GRAY)
    photo = cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)
    weight = 0.35 + 0.65 * large[..., None]
    return (weight * heat + (1 - weight) * photo).astype(np.uint8)
