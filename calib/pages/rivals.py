"""What the page of results holds the fitted heads against: the papers' heads, and maps that were asked for one of two."""

from collections.abc import Sequence

import cv2
import numpy as np
from rich.console import Console
from rich.progress import track

from calib.data.datasets import Sample
from calib.evaluation.metrics import scored
from calib.heads.features import FeatureTable
from calib.heads.fit import FITTERS
from calib.heads.linear import Array64, choose_strength, predict
from engines.backends.openvino import OpenVinoEngine
from engines.build import WANTED_CLASS, build_graph
from engines.classifiers import Classifier
from engines.graph import FLOAT, Graph
from engines.heuristic import Heuristic, append_heuristic_box
from engines.localizer import ImageBgr, Localizer
from engines.maps import MapSpec
from engines.preprocess import IMAGE

Scores = dict[tuple[str, str], list[tuple[float, float]]]
SIGMAS = (0.0, 0.01, 0.02, 0.04, 0.08, 0.15)
PAPERS_SHARE = 0.2
WHOLE_BACKWARD = "forward + backward"
PAIRS = 200


def paper_rows(tables: Sequence[FeatureTable], with_sgd: bool) -> Scores:
    """The papers' head on whole maps, fitted on the first table and measured on the others: in closed form, and by SGD."""
    train, *others = tables
    rows, names = np.arange(len(train.values)), {"paper": "papers' linear head, closed form"}
    if with_sgd:
        names["paper-sgd"] = "papers' linear head, SGD"
    strength = choose_strength(train, rows, refine=False, splits=1)  # whole maps are wide: a fold takes most of a minute
    heads = {name: FITTERS[kind](train, rows, strength) for kind, name in names.items()}
    return {
        (name, WHOLE_BACKWARD): [scored(predict(other.values, *head), other.boxes_xyxy) for other in others]
        for name, head in heads.items()
    }


def heuristic_rows(tables: Sequence[FeatureTable], side_px: int) -> Scores:
    """The papers' heuristic on whole maps, its blur chosen on the first table."""
    train, *others = tables
    scores = {sigma: scored(heuristic_boxes(train, side_px, sigma), train.boxes_xyxy) for sigma in SIGMAS}
    best = max(SIGMAS, key=lambda sigma: scores[sigma])
    name = f"papers' heuristic, blur {100 * best:g} % of the side, top 20 %"
    return {(name, WHOLE_BACKWARD): [scored(heuristic_boxes(other, side_px, best), other.boxes_xyxy) for other in others]}


def heuristic_boxes(table: FeatureTable, side_px: int, sigma: float) -> Array64:
    """Boxes ``[N, 4]`` of whole maps, by the very graph that engines run."""
    graph = Graph()
    name = graph.input("map", FLOAT, (1, side_px, side_px))
    graph.output(append_heuristic_box(graph, name, Heuristic(sigma=sigma, share=PAPERS_SHARE)), "box_xyxy")
    engine = OpenVinoEngine(graph.model(), "fp32")
    maps = table.values.reshape(-1, 1, side_px, side_px)
    return np.stack([engine.infer({"map": each})["box_xyxy"][0] for each in maps]).astype(np.float64)


def named_class_rows(classifier: Classifier, tests: dict[str, list[Sample]], console: Console) -> dict[str, float]:
    """Of two photos side by side, how often the map of a named class lies mostly on the photo that shows it.

    The class that is asked for is the network's own answer to the one photo alone; pairs of one kind of animal, or of one
    answer, are left out. Half is what a map scores that does not know what it is asked for (the energy-based pointing game,
    Wang et al. 2020, section 4.2, on halves instead of boxes).
    """
    photos = [sample for sample in tests["animals"] if sample.single]
    chosen = np.random.default_rng(0).permutation(len(photos))[: 2 * PAIRS].reshape(-1, 2)
    last = {"compact": "conv5_3", "squeezenet": "fire9"}[classifier.name]
    specs = {
        "sensitivity map at the pixels": MapSpec(),
        f"LayerCAM at {last}": MapSpec(layer=last, signal="layercam"),
        f"Grad-CAM at {last}": MapSpec(layer=last, signal="gradcam"),
        f"activations of {last}, forward only": MapSpec(layer=last, signal="activation"),
    }
    engines = {name: OpenVinoEngine(build_graph(classifier, spec), "fp32") for name, spec in specs.items()}
    localizer = Localizer(next(iter(engines.values())))
    right: dict[str, list[bool]] = {name: [] for name in specs}
    for pair in track(chosen, "two at once", console=console):
        if photos[pair[0]].truths[0].class_name == photos[pair[1]].truths[0].class_name:
            continue
        images = [photos[i].read() for i in pair]
        classes = [localizer.localize([image])[0].class_index for image in images]
        if classes[0] == classes[1]:
            continue
        both = localizer.prepare(side_by_side(*images))[None]
        for name, engine in engines.items():
            for place, index in enumerate(classes):
                found = engine.infer({IMAGE: both, WANTED_CLASS: np.array([index])})["map"][0]
                columns = found.sum(axis=0)
                left = columns[: len(columns) // 2].sum() > columns[(len(columns) + 1) // 2 :].sum()
                right[name].append(bool(left) == (place == 0))
    return {name: float(np.mean(values)) for name, values in right.items() if values}


def side_by_side(left: ImageBgr, right: ImageBgr, side_px: int = 448) -> ImageBgr:
    """Two photos as the halves of one square image."""
    halves = [cv2.resize(image, (side_px // 2, side_px), interpolation=cv2.INTER_AREA) for image in (left, right)]
    return np.asarray(np.concatenate(halves, axis=1), np.uint8)
