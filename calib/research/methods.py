"""Writes the page that compares the methods:
``python -m calib.research.methods --data DATA --out docs/methods.md``.

Nothing was chosen on the sets that are measured here. One call of a method takes several engine
calls. Its cost, compared with a plain forward pass, is counted in FLOP, and timed in the same run.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import jinja2
import numpy as np
from rich.console import Console
from rich.progress import track

from calib.bench.machine import count_work, machine
from calib.data.datasets import Sample, load_dataset
from calib.evaluation.evaluate import evaluate
from calib.evaluation.metrics import all_found
from calib.research.command_line import run
from engines.backends.openvino import OpenVinoEngine
from engines.build import IMAGE, build_graph
from engines.choose import choose_head, chosen_spec, open_localizer
from engines.files import whole_file
from engines.localizer import ImageBgr, Localizer
from engines.networks.registry import Classifier, load_classifier
from engines.options import EngineOptions, Option
from engines.search.beam import beam_settings, build_features_graph, build_tail_graph
from engines.search.crops import CropSettings, first_crops
from engines.search.dam import build_scores_graph, build_walks_graph, dam_settings
from engines.text import Terminal

OBJECTS = 5
CROPS = "beam in crops"
"""``--method beam`` with a crop scorer, for several objects; ``beam`` is over the feature map."""
SEARCHES = ("dam", "beam")
METHODS_SHOWN = ("sensitivity", "gestalt", "heuristic", *SEARCHES, CROPS)
TIMED = 30


@dataclass(frozen=True)
class Row:
    """One method of one network.

    Attributes:
        network, method: their names.
        reader: what reads the box off the map.
        sets: CorLoc, mean IoU and centre correctness (0..1), by data set.
        ms: median time of one image.
        calls: engine calls for one image.
        cost: the FLOP of one image, as a multiple of one forward pass.
        time: the time of one image, as a multiple of one forward pass.
        several: figures on photos with several objects, by name.
    """

    network: str
    method: str
    reader: str
    sets: dict[str, tuple[float, float, float]]
    ms: float
    calls: float
    cost: float
    time: float
    several: dict[str, float] = field(default_factory=dict)


def methods(
    data: Annotated[Path, Option("Folder with animal_pose_voc, raccoon, coco128 and SqueezeNet.")],
    out: Annotated[Path, Option("The page to write (Markdown).")] = Path("docs/methods.md"),
    networks: Annotated[
        str, Option("Comma-separated: compact, squeezenet.")
    ] = "compact,squeezenet",
    only: Annotated[
        str, Option(f"Comma-separated, of {', '.join(METHODS_SHOWN)}; all unless told.")
    ] = "",
    every: Annotated[
        int, Option("Measure on every N-th single-object photo of animals only.", min=1)
    ] = 1,
) -> None:
    """Measure every method, and write the page after each.

    Methods and networks that are left out keep their figures, which lie in the JSON beside the
    page.
    """
    console = Terminal(stderr=True)
    kept = out.with_suffix(".json")
    pages: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    sets = single_sets(data, every)
    several = several_sets(data)
    counts = {title: len(samples) for title, samples in (sets | several).items()}
    for name in networks.split(","):
        weights = (
            str(data / "squeezenet_v1.0_imagenet" / "compressed_SqueezeNet.net")
            if name == "squeezenet"
            else None
        )
        for row in network_rows(
            name, weights, sets, several, [m for m in only.split(",") if m], console
        ):
            others = {other["method"]: other for other in pages.get(name, [])} | {
                row.method: asdict(row)
            }
            pages[name] = [others[method] for method in METHODS_SHOWN if method in others]
            texts = {kept: json.dumps(pages, indent=1), out: rendered(pages, counts, every)}
            for path, text in texts.items():
                with whole_file(path) as part:
                    part.write_text(text, encoding="utf-8")
    console.print(f"wrote {out} and {kept}")


def rendered(pages: dict[str, Any], counts: dict[str, int], every: int) -> str:
    """The page in Markdown.

    Args:
        pages: rows of each network.
        counts: the number of images of each set.
        every: only every N-th photo of animals was measured.
    """
    template = (Path(__file__).parent / "assets" / "methods.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=False, trim_blocks=True, lstrip_blocks=True
    )  # Markdown, no markup from users
    return environment.from_string(template).render(
        pages=pages, counts=counts, every=every, machine=machine()
    )


def single_sets(data: Path, every: int) -> dict[str, list[Sample]]:
    """The sets of photos with one object, by name."""
    raccoon = load_dataset(
        data / "raccoon" / "annotations.tar",
        data / "raccoon" / "images.tar",
        data / "raccoon" / "test.txt",
    )
    animals = [
        sample for sample in load_dataset(data / "animal_pose_voc" / "test.csv") if sample.single
    ]
    return {"animals": animals[::every], "raccoon": [sample for sample in raccoon if sample.single]}


def several_sets(data: Path) -> dict[str, list[Sample]]:
    """The sets of photos with several objects, by name: two animals, more animals, scenes."""
    animals = [
        sample
        for sample in load_dataset(data / "animal_pose_voc" / "test.csv")
        if len(sample.truths) > 1
    ]
    scenes = load_dataset(
        data / "coco128" / "train2017_boxes.csv", data / "coco128" / "train2017.tar"
    )
    return {
        "two animals": [s for s in animals if len(s.truths) == 2],
        "more animals": animals,
        "coco128": scenes,
    }


def network_rows(
    name: str,
    weights: str | None,
    sets: dict[str, list[Sample]],
    several: dict[str, list[Sample]],
    only: Sequence[str],
    console: Console,
) -> Iterator[Row]:
    """Measure each method that the network can run without fitting. The compact network has shipped
    heads, so that it can run all.

    Args:
        name: of the network.
        weights: its file; None for the usual weights.
        sets: photos with one object, by name.
        several: photos with several objects, by name.
        only: the methods to measure; empty for all.
        console: for progress.
    """
    classifier = load_classifier(name, weights)
    fitted = ("sensitivity", "gestalt", CROPS) if name == "compact" else ()
    timed = [sample.read() for sample in next(iter(sets.values()))[:TIMED]]
    forward_ms = plain_forward_ms(classifier, timed)
    for method in METHODS_SHOWN:
        if method not in (*fitted, "heuristic", *SEARCHES) or (only and method not in only):
            continue
        console.print(f"{name}, {method}")
        choice = choice_of(name, weights, method)
        localizer = open_localizer(choice)
        scores = (
            {title: set_scores(samples, localizer, console) for title, samples in sets.items()}
            if method != CROPS
            else {}
        )
        ms, calls = timing(localizer, timed)
        cost = flop_of(method, classifier) / count_work(build_scores_graph(classifier, 1)).flop
        found = several_scores(choice, several, console) if choice.method in SEARCHES else {}
        yield Row(
            name, method, localizer.box_reader, scores, ms, calls, cost, ms / forward_ms, found
        )


def choice_of(name: str, weights: str | None, method: str) -> EngineOptions:
    """The options with which a user runs a method."""
    choice = EngineOptions(
        name,
        weights,
        method=method,
        backend="openvino",
        precision="auto",
        least_confidence=0.0,
    )
    if method == CROPS:
        return replace(choice, method="beam", objects=2)
    return replace(choice, head="none") if method == "beam" else choice


def set_scores(
    samples: Sequence[Sample], localizer: Localizer, console: Console
) -> tuple[float, float, float]:
    """CorLoc, mean IoU, and centre correctness at margin 0."""
    report, _ = evaluate(samples, localizer, console, None)
    return report["corloc"], report["mean_iou"], report["center_correctness"]["0.0"]


def several_scores(
    choice: EngineOptions, several: dict[str, list[Sample]], console: Console
) -> dict[str, float]:
    """The figures on photos with several objects, by name.

    ``both`` is the share of the photos with two animals in which both are found. The others are
    both kinds of average precision, and the number of classes, of each set.
    """
    pair = open_localizer(replace(choice, objects=2))
    found = {
        "both": float(
            np.mean(
                [
                    both_found(s, pair)
                    for s in track(several["two animals"], "pairs", console=console)
                ]
            )
        )
    }
    many = open_localizer(replace(choice, objects=OBJECTS))
    for title in ("more animals", "coco128"):
        report, _ = evaluate(several[title], many, console, None)
        found |= {f"{title} {key}": report[key] for key in ("localization_ap", "detection_ap")}
        found[f"{title} classes"] = len(report["detection_ap_per_class"])
    return found


def both_found(sample: Sample, localizer: Localizer) -> bool:
    """Whether each true box has a detection of its own with an IoU of at least 0.5."""
    detections = localizer.localize([sample.read()])[0].detections
    return all_found(
        [each.box_xyxy_px for each in detections], [truth.box_xyxy_px for truth in sample.truths]
    )


def plain_forward_ms(classifier: Classifier, images: Sequence[ImageBgr]) -> float:
    """The median time of computing the class scores of one image, with the same backend and
    precision.
    """
    engine = OpenVinoEngine(build_scores_graph(classifier, 1))
    prepared = [
        Localizer(OpenVinoEngine(build_graph(classifier), "fp32")).prepare(image)[None]
        for image in images
    ]
    return float(
        np.median([_ms(lambda image=image: engine.infer({IMAGE: image})) for image in prepared])
    )


def timing(localizer: Localizer, images: Sequence[ImageBgr]) -> tuple[float, float]:
    """The median milliseconds and the mean number of engine calls of one image."""
    before = getattr(localizer.engine, "calls", 0)
    ms = float(
        np.median([_ms(lambda image=image: localizer.localize([image])) for image in images])
    )
    calls = (getattr(localizer.engine, "calls", 0) - before) / len(images)
    return ms, calls or 1.0


def _ms(call: Any) -> float:
    """The time of a call, in milliseconds."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def flop_of(method: str, classifier: Classifier) -> int:
    """The FLOP of one image: of every graph that the method runs, as often as it runs it for one
    object of one class.
    """
    if method == "dam":
        settings = dam_settings(classifier.network)
        graphs = [
            (build_walks_graph(classifier, settings), 1),
            (build_scores_graph(classifier, settings.kmax), 1),
        ]
    elif method == "beam":
        beam = beam_settings()
        graphs = [
            (build_features_graph(classifier, beam), 1),
            (build_tail_graph(classifier, beam), beam.levels),
        ]
    elif method == CROPS:
        head = choose_head(EngineOptions(classifier.name), classifier)
        beams = CropSettings()
        crops = 1 + len(first_crops()) + beams.beam * (beams.levels - 1)
        graphs = [
            (build_graph(classifier, chosen_spec(EngineOptions(), head, classifier), head), crops)
        ]
    else:
        head = choose_head(EngineOptions(classifier.name, method=method), classifier)
        graphs = [
            (
                build_graph(
                    classifier, chosen_spec(EngineOptions(method=method), head, classifier), head
                ),
                1,
            )
        ]
    return sum(count_work(graph).flop * times for graph, times in graphs)


if __name__ == "__main__":
    run(methods)
