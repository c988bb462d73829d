"""Writes the results page:
``python -m calib.research.results --data DATA --out docs/results.md``.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import cv2
import jinja2
import numpy as np
from rich.console import Console
from rich.progress import track

from calib.bench.machine import machine
from calib.data.datasets import Sample, load_dataset
from calib.evaluation.metrics import WHOLE_IMAGE, constant_boxes, scored
from calib.heads.fit import FITTERS, default_features
from calib.heads.linear import (
    FOLDS,
    Array64,
    FeatureTable,
    Rows,
    choose_strength,
    feature_table,
    predict,
    solve,
)
from calib.research.command_line import run
from engines.backends.openvino import OpenVinoEngine
from engines.build import IMAGE, WANTED_CLASS, build_graph
from engines.files import whole_file
from engines.graph import FLOAT, Graph
from engines.head import Heuristic, append_heuristic_box
from engines.localizer import ImageBgr, Localizer
from engines.maps import PIXELS, Feature, MapSpec
from engines.networks.registry import Classifier, load_classifier
from engines.options import Option
from engines.text import Terminal

REPORT_SEQUENCES = (
    "blackswan",
    "dance-twirl",
    "horsejump-high",
    "kite-surf",
    "motocross-jump",
    "scooter-black",
)
OBJECTIVES = {"class score": "sensitivity", "Gestalt Total": "gestalt"}
LAST = {"compact": "pool5", "squeezenet": "conv_final"}
"""The layer whose mean the network scores. Grad-CAM at this layer is CAM."""
RIVAL_FOLDS = 2
BEST = "**all depths, as `fit` makes it**"
FORWARD = "forward"
BOTH = "forward + backward"
SIGMAS = (0.0, 0.01, 0.02, 0.04, 0.08, 0.15)
PAPERS_SHARE = 0.2
PAIRS = 200
Scores = dict[tuple[str, str], list[tuple[float, float]]]
"""(CorLoc, mean IoU) on each set, by head and cost."""


@dataclass(frozen=True)
class Row:
    """One line of the page.

    Attributes:
        objective, aggregation: of the map.
        head: what reads the box.
        cost: which passes of the network it needs.
        scores: (CorLoc, mean IoU) on each set.
    """

    objective: str
    aggregation: str
    head: str
    cost: str
    scores: dict[str, tuple[float, float]]


def results(
    data: Annotated[
        Path,
        Option("Folder with animal_pose_voc, raccoon, tiny_imagenet_200, davis, SqueezeNet."),
    ],
    out: Annotated[Path, Option("The page to write (Markdown).")] = Path("docs/results.md"),
    networks: Annotated[
        str, Option("Comma-separated: compact, squeezenet.")
    ] = "compact,squeezenet",
    sgd: Annotated[
        bool,
        Option("The papers' head by their 30,000 steps too: minutes for each network."),
    ] = True,
) -> None:
    """Fit and measure everything, and write the page.

    Networks that are left out keep their figures, which lie in the JSON beside the page.
    """
    console = Terminal(stderr=True)
    train = load_dataset(data / "animal_pose_voc" / "train.csv")
    tests = measured_sets(data)
    kept = out.with_suffix(".json")
    pages: dict[str, dict[str, Any]] = (
        json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    )
    for name in networks.split(","):
        weights = (
            data / "squeezenet_v1.0_imagenet" / "compressed_SqueezeNet.net"
            if name == "squeezenet"
            else None
        )
        classifier = load_classifier(name, str(weights) if weights else None)
        rows = [asdict(row) for row in network_rows(classifier, train, tests, console, sgd)]
        pages[name] = {
            "size_px": classifier.size_px,
            "rows": rows,
            "named": named_class_rows(classifier, tests, console),
        }
    singles = {name: sum(sample.single for sample in samples) for name, samples in tests.items()}
    texts = {
        kept: json.dumps(pages, indent=1),
        out: rendered(pages, singles, constant_rows(train, tests, console)),
    }
    for path, text in texts.items():
        with whole_file(path) as part:
            part.write_text(text, encoding="utf-8")
    console.print(f"wrote {out} and {kept}")


def rendered(
    pages: dict[str, dict[str, Any]], singles: dict[str, int], constants: dict[str, Any]
) -> str:
    """The page in Markdown.

    Args:
        pages: rows of each network.
        singles: the number of images of each set.
        constants: scores of the constant boxes.
    """
    template = (Path(__file__).parent / "assets" / "results.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=False, trim_blocks=True, lstrip_blocks=True
    )  # Markdown, no markup from users
    return environment.from_string(template).render(
        pages=pages, sets=singles, constants=constants, machine=machine()
    )


def measured_sets(data: Path) -> dict[str, list[Sample]]:
    """The sets of the page, by name: of Tiny ImageNet every twentieth image, and of sequences every
    fourth frame.
    """
    raccoon = data / "raccoon"
    davis = [
        sample
        for name in REPORT_SEQUENCES
        for sample in load_dataset(data / "davis" / f"{name}_boxes.csv")[::4]
    ]
    return {
        "animals": load_dataset(data / "animal_pose_voc" / "test.csv"),
        "raccoon": load_dataset(
            raccoon / "annotations.tar", raccoon / "images.tar", raccoon / "test.txt"
        ),
        "Tiny ImageNet": load_dataset(data / "tiny_imagenet_200" / "val.csv")[::20],
        "DAVIS": davis,
    }


def network_rows(
    classifier: Classifier,
    train: Sequence[Sample],
    tests: dict[str, list[Sample]],
    console: Console,
    sgd: bool = True,
) -> list[Row]:
    """Measure every head of one network.

    Rivals and heads of single depths are measured only for the class score with max aggregation.

    Args:
        classifier: the network.
        train: the set to fit on.
        tests: the sets to measure on.
        console: for progress.
        sgd: whether to fit the papers' head by gradient descent, too.
    """
    rows = []
    for objective, method in OBJECTIVES.items():
        for aggregation in ("max", "mean"):
            spec = MapSpec(default_features(classifier, method)[0].objective, aggregation)
            first = method == "sensitivity" and aggregation == "max"
            features = all_features(classifier, method, rivals=first)
            console.print(f"{classifier.name}, {objective}, {aggregation}")
            tables = [
                feature_table(samples, classifier, spec, features, console)
                for samples in (train, *tests.values())
            ]
            wanted = selections(classifier) if first else [(BEST, BOTH, features[:-1])]
            found = {
                (head, cost): fitted_scores(
                    tables, columns(features, kept), FOLDS if head == BEST else RIVAL_FOLDS
                )
                for head, cost, kept in wanted
            }
            whole = columns(features, features[-1:])
            found |= paper_rows(
                [restricted(table, whole) for table in tables], with_sgd=first and sgd
            )
            if first:
                found |= heuristic_rows(
                    [restricted(table, whole) for table in tables], classifier.size_px
                )
            rows += [
                Row(objective, aggregation, head, cost, dict(zip(tests, scores, strict=True)))
                for (head, cost), scores in found.items()
            ]
    return rows


def all_features(classifier: Classifier, method: str, rivals: bool) -> tuple[Feature, ...]:
    """The features of the head that ``fit`` makes, then those of its rivals if ``rivals`` is set,
    and last the whole map.
    """
    layers = classifier.network.head_layers
    cam_layers = classifier.network.head_cam_layers
    extra: list[Feature] = []
    if rivals:
        extra += [Feature("quantiles", layer, 15, 1.0, "activation") for layer in layers]
        extra += [Feature("grid", layer, 8, 1.0, "activation") for layer in layers]
        cams = [
            ("gradcam", LAST[classifier.name]),
            ("gradcam", layers[-1]),
            *(("layercam", k) for k in cam_layers),
        ]
        for signal, layer in cams:
            extra += [Feature("quantiles", layer, 15, power, signal) for power in (0.5, 1.0, 2.0)]
            extra += [Feature("grid", layer, 8, 0.5, signal)]
    whole = Feature("grid", PIXELS, classifier.size_px)
    return (*dict.fromkeys([*default_features(classifier, method)[1], *extra]), whole)


def selections(classifier: Classifier) -> list[tuple[str, str, Sequence[Feature]]]:
    """The heads for the class score, each as (name, cost, its features). The one that ``fit`` makes
    comes first.
    """
    layers = classifier.network.head_layers
    cam_layers = classifier.network.head_cam_layers
    every, default = (
        all_features(classifier, "sensitivity", rivals=True)[:-1],
        default_features(classifier, "sensitivity")[1],
    )

    def of(signal: str, chosen: Sequence[str]) -> Sequence[Feature]:
        return [f for f in every if f.signal == signal and f.layer in chosen]

    rows: list[tuple[str, str, Sequence[Feature]]] = [(BEST, BOTH, default)]
    rows += [
        (f"gradient at {layer} alone", f"{BOTH} to {layer}", of("gradient", [layer]))
        for layer in (PIXELS, *layers)
    ]
    rows += [("gradients of all depths", BOTH, of("gradient", [PIXELS, *layers]))]
    rows += [
        ("gradients of the last two depths", f"{BOTH} to {layers[-2]}", of("gradient", layers[-2:]))
    ]
    rows += [("activations of all depths", FORWARD, of("activation", layers))]
    rows += [("activations of the last depth", FORWARD, of("activation", layers[-1:]))]
    rows += [("CAM", FORWARD, of("gradcam", [LAST[classifier.name]]))]
    rows += [(f"Grad-CAM at {layers[-1]}", f"{BOTH} to {layers[-1]}", of("gradcam", [layers[-1]]))]
    return [
        *rows,
        (
            f"LayerCAM at {len(cam_layers)} depths",
            f"{BOTH} to {cam_layers[0]}",
            of("layercam", cam_layers),
        ),
    ]


def columns(features: Sequence[Feature], kept: Sequence[Feature]) -> Rows:
    """The columns of a table of ``features`` that belong to ``kept``."""
    starts = np.cumsum([0, *(feature.width for feature in features)])
    return np.concatenate(
        [
            np.arange(starts[i], starts[i + 1])
            for i, feature in enumerate(features)
            if feature in kept
        ]
    )


def restricted(table: FeatureTable, kept: Rows) -> FeatureTable:
    """The table with the columns ``kept`` alone."""
    return replace(table, values=table.values[:, kept], mirrored=table.mirrored[:, kept])


def fitted_scores(
    tables: Sequence[FeatureTable], kept: Rows, splits: int
) -> list[tuple[float, float]]:
    """Fit a head on the first table, and measure it on the others.

    Args:
        tables: of features.
        kept: the columns that the head reads.
        splits: choose the ridge penalty on the first so many folds.

    Returns:
        (CorLoc, mean IoU) on each table but the first.
    """
    train, *others = (restricted(table, kept) for table in tables)
    rows = np.arange(len(train.values))
    head = solve(train, rows, choose_strength(train, rows, splits=splits))
    return [scored(predict(other.values, *head), other.boxes_xyxy) for other in others]


def constant_rows(
    train: Sequence[Sample], tests: dict[str, list[Sample]], console: Console
) -> dict[str, dict[str, tuple[float, float]]]:
    """The scores of constant boxes, which are fitted on the training set."""
    classifier, one = load_classifier("compact"), (Feature("quantiles", PIXELS, 1),)
    boxes = [
        feature_table(samples, classifier, MapSpec(), one, console).boxes_xyxy
        for samples in (train, *tests.values())
    ]
    fitted = constant_boxes(boxes[0])
    kinds = {
        "best constant box": fitted.best_constant,
        "mean box": fitted.mean_box,
        "whole image": WHOLE_IMAGE,
    }
    return {
        kind: {
            name: scored(np.asarray(box)[None], true)
            for name, true in zip(tests, boxes[1:], strict=True)
        }
        for kind, box in kinds.items()
    }


def paper_rows(tables: Sequence[FeatureTable], with_sgd: bool) -> Scores:
    """Fit the papers' head on the whole maps of the first table, and measure it on the others.

    It is fitted in closed form, and with ``with_sgd`` by gradient descent, too.
    """
    train, *others = tables
    rows, names = np.arange(len(train.values)), {"paper": "papers' linear head, closed form"}
    if with_sgd:
        names["paper-sgd"] = "papers' linear head, SGD"
    strength = choose_strength(
        train, rows, refine=False, splits=1
    )  # whole maps are wide: a fold takes most of a minute
    heads = {name: FITTERS[kind](train, rows, strength) for kind, name in names.items()}
    return {
        (name, BOTH): [scored(predict(other.values, *head), other.boxes_xyxy) for other in others]
        for name, head in heads.items()
    }


def heuristic_rows(tables: Sequence[FeatureTable], side_px: int) -> Scores:
    """Choose the blur of the papers' heuristic on the whole maps of the first table, and measure it
    on the others.
    """
    train, *others = tables
    scores = {
        sigma: scored(heuristic_boxes(train, side_px, sigma), train.boxes_xyxy) for sigma in SIGMAS
    }
    best = max(SIGMAS, key=lambda sigma: scores[sigma])
    name = f"papers' heuristic, blur {100 * best:g} % of the side, top 20 %"
    return {
        (name, BOTH): [
            scored(heuristic_boxes(other, side_px, best), other.boxes_xyxy) for other in others
        ]
    }


def heuristic_boxes(table: FeatureTable, side_px: int, sigma: float) -> Array64:
    """The boxes ``[N, 4]`` of whole maps, by the same graph that engines run."""
    graph = Graph()
    name = graph.input("map", FLOAT, (1, side_px, side_px))
    graph.output(
        append_heuristic_box(graph, name, Heuristic(sigma=sigma, share=PAPERS_SHARE)), "box_xyxy"
    )
    engine = OpenVinoEngine(graph.model(), "fp32")
    maps = table.values.reshape(-1, 1, side_px, side_px)
    return np.stack([engine.infer({"map": each})["box_xyxy"][0] for each in maps]).astype(
        np.float64
    )


def named_class_rows(
    classifier: Classifier, tests: dict[str, list[Sample]], console: Console
) -> dict[str, float]:
    """How often the map of a named class, of two photos side by side, lies mostly on the right one.

    The class is the network's answer to that photo alone. Pairs with one kind of animal, or with
    one answer, are left out. A map that does not depend on the class scores a half. This is the
    energy-based pointing game (Wang et al. 2020, section 4.2), on halves instead of boxes.
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
    engines = {
        name: OpenVinoEngine(build_graph(classifier, spec), "fp32") for name, spec in specs.items()
    }
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
    halves = [
        cv2.resize(image, (side_px // 2, side_px), interpolation=cv2.INTER_AREA)
        for image in (left, right)
    ]
    return np.asarray(np.concatenate(halves, axis=1), np.uint8)


if __name__ == "__main__":
    run(results)
