"""Compares Sightline's boxes with a small trained detector's:
``python -m calib.research.detector --data DATA --out docs/detector.json``.

Nothing is chosen on these sets, they are only reported. Every system sees every image in the same
run, in turns and in an order that changes, so that all meet the same pace of the machine. Accuracy
over time is a picture and a table.
"""

import contextlib
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jinja2
import numpy as np
from rich.console import Console
from rich.progress import track

from calib.bench.detector import Detector
from calib.bench.machine import machine
from calib.data.datasets import Sample, load_dataset
from calib.evaluation.metrics import CORLOC_IOU, all_found, best_iou
from calib.research.command_line import run
from calib.research.results import REPORT_SEQUENCES
from engines.choose import open_localizer
from engines.errors import ModelError, install_extra
from engines.files import signed, whole_file
from engines.head import shipped_head_names
from engines.localizer import Detection, ImageBgr, Localization, Localizer
from engines.options import MOST_OBJECTS, EngineOptions, Option
from engines.text import Terminal
from realtime.frames import BoxPx

TIGHT_IOU = 0.7
RECALL_BOXES = 10
PARETO = "accuracy over time"
FORWARD_EVERY = 8
"""The detector's network alone is timed on one image of so many."""
DETECTOR_FILE = Path("detector_yolox_nano") / "yolox_nano_416.onnx"
Scored = tuple[BoxPx, float]
"""A box and how sure the system is of it."""


@dataclass(frozen=True)
class System:
    """What draws boxes.

    Attributes:
        name: for people.
        find: all boxes of an image, best first.
        calls: engine calls up to now; None where every image takes one.
        facts: input size and precision.
    """

    name: str
    find: Callable[[ImageBgr], list[Scored]]
    calls: Callable[[], int] | None
    facts: str


@dataclass(frozen=True)
class Answer:
    """What a system found in one image, and the time from the image to the boxes."""

    boxes: Sequence[Scored]
    ms: float

    @property
    def boxes_xyxy(self) -> list[BoxPx]:
        """The boxes, best first."""
        return [box for box, _ in self.boxes]


@dataclass(frozen=True)
class Measured:
    """One image: whether it has one object, its true boxes, each system's answer by name."""

    single: bool
    truths_xyxy: Sequence[BoxPx]
    answers: Mapping[str, Answer]

    def iou(self, name: str) -> float:
        """The IoU of a system's first box with the true box that fits best; 0 without a box."""
        boxes = self.answers[name].boxes_xyxy
        return best_iou(boxes[0], self.truths_xyxy) if boxes else 0.0


def main(
    data: Annotated[Path, Option("Folder of the data sets, and of the detector.")],
    out: Annotated[
        Path, Option("The figures to write (.json); page and picture lie beside it (.md, .png).")
    ],
    head: Annotated[
        str,
        Option("Dense heads of --model, with commas: FILE or NAME; a shipped one unless told."),
    ] = "",
    model: Annotated[str, Option("The network beside the compact one.")] = "lite0",
    sizes: Annotated[
        str, Option("Further input sides of the first dense head, with commas.")
    ] = "256,192",
    detector: Annotated[
        str, Option(f"FILE of a YOLOX detector (.onnx); {DETECTOR_FILE} unless told.")
    ] = "",
) -> None:
    """Measure Sightline and the detector on every set, print the table, and write it."""
    console = Terminal(stderr=True)
    peer = Detector(Path(detector) if detector else data / DETECTOR_FILE)
    sides = [int(each) for each in sizes.split(",") if each.strip()]
    systems = [*our_systems(model, head, sides), system_of_detector(peer)]
    sets = collections(data)
    forward_ms: list[float] = []
    calls_before = {each.name: each.calls() for each in systems if each.calls}
    measured = {
        name: measure(samples, systems, peer, forward_ms, console, name)
        for name, samples in sets.items()
    }
    everything = [each for images in measured.values() for each in images]
    report: dict[str, Any] = {
        "machine": machine(),
        "images": {name: len(images) for name, images in measured.items()},
        "detector": {"name": peer.name, "forward_ms": round(float(np.median(forward_ms)), 3)},
        "systems": {
            each.name: {
                "facts": each.facts,
                "engine_calls": round((each.calls() - calls_before[each.name]) / len(everything), 2)
                if each.calls
                else 1.0,
                "ms": round(float(np.median([m.answers[each.name].ms for m in everything])), 3),
                "sets": figures(each.name, measured),
            }
            for each in systems
        },
    }
    picture = out.with_suffix(".png")
    plot_pareto(report, picture)
    page = rendered(report, picture.name)
    for path, text in {out: json.dumps(report, indent=1), out.with_suffix(".md"): page}.items():
        with whole_file(path) as part:
            part.write_text(text, encoding="utf-8")
    print(page)
    console.print(f"wrote {out}, {out.with_suffix('.md')} and {picture}")


def our_systems(model: str, heads: str, sides: Sequence[int] = ()) -> list[System]:
    """The compact network; another one with its linear head, with dense heads, and with the first
    of these at other input sides.
    """
    dense = [each.strip() for each in heads.split(",") if each.strip()]
    usual = f"{model}_dense"
    if not dense and usual in shipped_head_names():
        dense = [usual]
    choices = {
        "compact": EngineOptions("compact"),
        f"{model}, global head": EngineOptions(model, head=f"{model}_sensitivity"),
    }
    for each in dense:
        choices[Path(each).stem] = EngineOptions(model, head=each, objects=MOST_OBJECTS)
    for side in sides if dense else ():
        name = f"{Path(dense[0]).stem}, {side} px"
        choices[name] = EngineOptions(model, head=dense[0], objects=MOST_OBJECTS, size_px=side)
    return [system_of(name, open_localizer(choice)) for name, choice in choices.items()]


def system_of(name: str, localizer: Localizer) -> System:
    """A localizer as a system. All of its boxes count, however unsure."""
    localizer.abstain_below(0.0)
    engine = localizer.engine

    def find(image_bgr: ImageBgr) -> list[Scored]:
        found = localizer.localize([image_bgr])[0]
        if found.detections:
            return [(each.box_xyxy_px, sure(each)) for each in found.detections]
        return [(found.box_xyxy_px, sure(found))] if found.box_xyxy_px else []

    def sure(found: Localization | Detection) -> float:
        return found.score if found.confidence is None else found.confidence

    calls = (lambda: int(engine.calls)) if hasattr(engine, "calls") else None
    return System(name, find, calls, f"{localizer.size_px} px, {engine.precision}")


def system_of_detector(peer: Detector) -> System:
    """The detector as a system: boxes of any class, less those of the same object."""

    def find(image_bgr: ImageBgr) -> list[Scored]:
        return [(each.box_xyxy_px, each.score) for each in peer.detect(image_bgr)]

    return System(peer.name, find, None, f"{peer.size_px} px, {peer.engine.precision}")


def collections(data: Path) -> dict[str, list[Sample]]:
    """The images to look at, by the name of their set.

    Raises:
        SourceError: a set is missing.
    """
    raccoon = data / "raccoon"
    found = {
        "animals": load_dataset(data / "animal_pose_voc" / "test.csv"),
        "raccoon": load_dataset(
            raccoon / "annotations.tar", raccoon / "images.tar", raccoon / "test.txt"
        ),
        "VOC 2007": load_dataset(data / "voc2007" / "test.csv"),
        "ImageNet": load_dataset(data / "imagenet_val_sample" / "val.csv"),
        "DAVIS": [
            sample
            for name in REPORT_SEQUENCES
            for sample in load_dataset(data / "davis" / f"{name}_boxes.csv")
        ],
        "coco128": load_dataset(data / "coco128" / "train2017_boxes.csv"),
    }
    kept: dict[str, Callable[[Sample], bool]] = {
        "animals": lambda sample: len(sample.truths) <= 2,
        "raccoon": lambda sample: sample.single,
        "ImageNet": lambda sample: sample.single,
    }
    return {
        name: [sample for sample in samples if sample.truths and kept.get(name, bool)(sample)]
        for name, samples in found.items()
    }


def measure(
    samples: Sequence[Sample],
    systems: Sequence[System],
    peer: Detector,
    forward_ms: list[float],
    console: Console,
    name: str,
) -> list[Measured]:
    """Ask every system for the boxes of every image, in turns.

    Args:
        samples: the images.
        systems: in no order.
        peer: its network alone is timed, too.
        forward_ms: those times are added to it.
        console: for progress.
        name: of the set.
    """
    order = np.random.default_rng(0)
    found = []
    for number, sample in enumerate(track(samples, name, console=console)):
        image = sample.read()
        answers = {}
        for place in order.permutation(len(systems)):
            before = time.perf_counter()
            boxes = systems[place].find(image)
            answers[systems[place].name] = Answer(boxes, (time.perf_counter() - before) * 1e3)
        if number % FORWARD_EVERY == 0:
            prepared = peer.prepare(image)
            before = time.perf_counter()
            peer.forward(prepared)
            forward_ms.append((time.perf_counter() - before) * 1e3)
        seen = sample.clipped(image)
        truths = [truth.box_xyxy_px for truth in (*seen.truths, *seen.ignored)]
        found.append(Measured(sample.single and len(truths) == 1, truths, answers))
    return found


def figures(name: str, measured: Mapping[str, Sequence[Measured]]) -> dict[str, dict[str, float]]:
    """The figures of one system on every set, shares in 0..1, by the name of the set.

    ``images``, ``ms``; of the first box ``iou_50``, ``iou_70``, ``mean_iou``; of all objects
    ``ap_50`` and ``recall_10``; of two animals ``first_two`` and ``among_all``.
    """
    first = {
        key: [each for each in images if each.single] if key != "coco128" else images
        for key, images in measured.items()
    }
    found = {}
    for key, images in first.items():
        ious = np.array([each.iou(name) for each in images])
        found[key] = {
            "images": len(images),
            "ms": float(np.median([each.answers[name].ms for each in images])),
            "iou_50": float(np.mean(ious > CORLOC_IOU)),
            "iou_70": float(np.mean(ious > TIGHT_IOU)),
            "mean_iou": float(ious.mean()),
        }
    scenes = measured["VOC 2007"]
    found["VOC 2007, all objects"] = {"images": len(scenes), **all_objects(name, scenes)}
    pairs = [each for each in measured["animals"] if len(each.truths_xyxy) == 2]
    boxes = [each.answers[name].boxes_xyxy for each in pairs]
    found["two animals"] = {
        "images": len(pairs),
        "first_two": both(pairs, [each[:2] for each in boxes]),
        "among_all": both(pairs, boxes),
    }
    return {
        key: {what: round(value, 4) for what, value in values.items()}
        for key, values in found.items()
    }


def both(pairs: Sequence[Measured], boxes_xyxy: Sequence[Sequence[BoxPx]]) -> float:
    """The share of the images in which each of the objects has a box of its own."""
    right = [
        all_found(boxes, each.truths_xyxy) for each, boxes in zip(pairs, boxes_xyxy, strict=True)
    ]
    return float(np.mean(right)) if right else 0.0


def all_objects(name: str, images: Sequence[Measured]) -> dict[str, float]:
    """Average precision at IoU 0.5 and recall of the first ten boxes, whatever the classes, as
    pycocotools computes them.

    Raises:
        ModelError: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ModelError(f"pycocotools is not installed: {install_extra('bench')}") from error
    truths: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for number, each in enumerate(images, 1):
        for box in each.truths_xyxy:
            one = {"id": len(truths) + 1, "image_id": number, "category_id": 1, "iscrowd": 0}
            truths.append({**one, **_corner_and_size(box)})
        for box, score in each.answers[name].boxes:
            scored = {"image_id": number, "category_id": 1, "score": score}
            boxes.append({**scored, **_corner_and_size(box)})
    if not truths or not boxes:
        return {"ap_50": 0.0, "recall_10": 0.0}
    coco = COCO()
    coco.dataset = {
        "images": [{"id": number} for number in range(1, len(images) + 1)],
        "annotations": truths,
        "categories": [{"id": 1}],
        "info": {},
    }
    with contextlib.redirect_stdout(io.StringIO()):  # the library prints its progress
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(boxes), "bbox")
        evaluation.params.useCats = 0
        evaluation.params.iouThrs = np.array([CORLOC_IOU])
        evaluation.params.maxDets = [1, RECALL_BOXES, 100]
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    return {
        "ap_50": float(precision[0, :, 0, 0, 2].mean()),
        "recall_10": float(recall[0, 0, 0, 1]),
    }


def _corner_and_size(box_xyxy: BoxPx) -> dict[str, Any]:
    x0, y0, x1, y1 = box_xyxy
    return {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}


MEASURES = {
    "iou_50": "first box, IoU over 0.5, % of images",
    "iou_70": "first box, IoU over 0.7, % of images",
    "mean_iou": "first box, mean IoU x 100",
    "ap_50": "AP at IoU 0.5, %",
    "recall_10": "recall of the first 10 boxes, %",
    "first_two": "both among the first two boxes, %",
    "among_all": "both among all boxes, %",
}
"""What each figure is, for the page."""


def accuracy(system: Mapping[str, Any], measure: str) -> float:
    """Of a system, the mean over the sets on which the first box is measured, in per cent."""
    values = [100 * found[measure] for found in system["sets"].values() if measure in found]
    return float(np.mean(values))


def on_front(systems: Mapping[str, Mapping[str, Any]], measure: str) -> list[str]:
    """The systems that no other one beats in both time and accuracy, the fastest first."""
    reached = {name: accuracy(each, measure) for name, each in systems.items()}
    found, best = list[str](), 0.0
    for name in sorted(systems, key=lambda each: (systems[each]["ms"], -reached[each])):
        if reached[name] > best:
            best = reached[name]
            found.append(name)
    return found


def plot_pareto(report: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy over time: the mean over the sets, then each set.

    Raises:
        OutputError: the place cannot be written.
    """
    from matplotlib.figure import Figure  # half a second to import: only when a plot is wanted

    systems, measure = report["systems"], "iou_50"
    names = list(systems)
    sets = [key for key, one in systems[names[0]]["sets"].items() if measure in one]
    panels: dict[str, dict[str, float]] = {
        "mean over the sets": {name: accuracy(systems[name], measure) for name in names}
    }
    for key in sets:
        panels[key] = {name: 100 * systems[name]["sets"][key][measure] for name in names}
    columns = 4
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 3.1 * rows), dpi=130, layout="constrained")
    for place, (title, values) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        for number, name in enumerate(names):
            peer = name == report["detector"]["name"]
            axes.scatter(
                systems[name]["ms"] / systems[names[0]]["ms"],
                values[name],
                s=60,
                marker="s" if peer else "o",
                color=f"C{number}",
                label=name if not place else None,
            )
        axes.set_title(title, fontsize=10)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"time from image to boxes, times that of {names[0]}")
    figure.supylabel("first box right (IoU over 0.5), % of images")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    with whole_file(path) as part:
        figure.savefig(part, format="png", metadata=signed(PARETO))


def rendered(report: Mapping[str, Any], picture: str = "detector.png") -> str:
    """The page in Markdown, which shows the picture of that name."""
    template = (Path(__file__).parent / "assets" / "detector.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=False, trim_blocks=True, lstrip_blocks=True
    )  # Markdown, no markup from users
    lines = compared(report)
    return environment.from_string(template).render(
        report=report,
        picture=picture,
        front=on_front(report["systems"], "iou_50"),
        mean={name: accuracy(each, "iou_50") for name, each in report["systems"].items()},
        measures={key: [line for line in lines if line["measure"] == key] for key in MEASURES},
        words=MEASURES,
        lost=[line for line in lines if line["detector_wins"]],
        won=[line for line in lines if not line["detector_wins"]],
    )


def compared(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each figure of each set: ``set``, ``images``, ``measure``, ``values`` by system in per cent,
    and whether the detector's is above the best of ours.
    """
    systems, peer = report["systems"], report["detector"]["name"]
    lines = []
    for measure in MEASURES:
        for name, one in systems[peer]["sets"].items():
            if measure not in one:
                continue
            values = {each: 100 * found["sets"][name][measure] for each, found in systems.items()}
            ours = max(value for each, value in values.items() if each != peer)
            lines.append(
                {
                    "set": name,
                    "images": one["images"],
                    "measure": measure,
                    "values": values,
                    "detector_wins": values[peer] > ours,
                    "behind": values[peer] - ours,
                }
            )
    return lines


if __name__ == "__main__":
    run(main)
