"""The table of Dwaraknath et al.: how well the boxes of DAM fit, and where their centres lie.

``sightline reproduce dam-imagenet``. Every image's box is kept on disk as soon as it is found.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from calib.data.choose import KNOWN
from calib.data.datasets import Sample
from calib.evaluation.metrics import (
    MARGINS,
    WHOLE_IMAGE,
    centre_correct,
    corloc,
    iou_histogram,
)
from calib.evaluation.report import Picture
from calib.papers.defaults import found_by_default
from calib.papers.reproduce import Figures, Findings, Request, percent
from calib.papers.scenes import EXAMPLES, MOST_SHOWN, photo_of
from engines.backends.openvino import OpenVinoEngine
from engines.boxes import iou
from engines.downloads import cache_dir
from engines.errors import ModelError, SourceError
from engines.localizer import Localizer
from engines.networks.registry import Classifier, class_names, imagenet_classes
from engines.search.dam_published import PublishedDamEngine, PublishedDamSettings

PAPER_IOU = 0.4679
PAPER_CENTRES = {"0.0": "90 %", "0.2": "80 %"}
PAPER_CLASSES = {"cat": (0.451, 370), "bicycle": (0.427, 386), "bottle": (0.486, 411)}
"""Mean IoU and number of images of section 5.3's table."""
WHITE, BLACK = 253, 2
"""Images with such a mean are left out as empty, as by the authors' script."""
MIDDLE = tuple(0.5 + sign * 0.5**1.5 for sign in (-1, -1, 1, 1))
"""A box of half of the image's area in its middle."""
Boxes = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """An image with one object.

    Attributes:
        sample: the image.
        index: of its class, among the network's.
        everyday: what people call that class; empty where it has no such name.
    """

    sample: Sample
    index: int
    everyday: str


def imagenet(request: Request) -> Findings:
    """Section 5.3: mean IoU, its histogram, centre correctness over the margin, three classes."""
    choice = request.choice
    classifier = choice.classifier()
    if classifier.network.classless:
        raise ModelError(
            "DAM follows the score of a class, and these weights have none: name some with fully"
            " connected layers, or another network",
            option=("weights", "model", "class_layer"),
        )
    samples = request.samples("val")
    cases = cases_of(samples, classifier)
    if not cases:
        raise SourceError(
            "no image with one object of a class that the network knows", option="folder"
        )
    request.say(f"{len(cases)} images with one object of a class that {choice.model} knows")
    found, true, cases = boxes_of(cases, classifier, request)
    names = [case.everyday for case in cases]
    default = found_by_default([case.sample for case in cases], request)
    numbers = figures_of(found, true, names, default.boxes)
    settings = PublishedDamSettings()
    protocol = (
        f"{len(cases)} of {len(samples)} images: those with exactly one object, of a class that the"
        " network knows, and not empty (section 5.1).",
        "The true class is given to the algorithm, as the authors' script for their validation"
        " does; with another, the box is of another thing.",
        f"{settings.kmax} neurons, the best {settings.k} united (section 4).",
        "A centre is correct if it lies in the true box without the margin at each of its sides"
        " (section 5.2.2).",
    )
    differs = (
        "The paper draws 4,000 images from ImageNet's 1,000 classes; here it is what lies in DATA.",
        f"Its network is VGG16; this is {choice.model}"
        f" ({classifier.network.dam_layer}, {classifier.size_px} px).",
    )
    return Findings(
        _tables(numbers),
        protocol,
        differs if choice.model != "vgg16" else differs[:1],
        pictures_of(cases, found, true),
        numbers,
    )


def cases_of(samples: Sequence[Sample], classifier: Classifier) -> list[Case]:
    """The images with one object whose class the network has: one of ImageNet's, by WordNet id or
    name, or the everyday name of it.
    """
    known = imagenet_classes()
    place = {wnid: i for i, (wnid, _) in enumerate(known)}
    place |= {name: i for i, (_, name) in reversed(list(enumerate(known)))}
    graph, forward = classifier.forward_graph()
    names = classifier.class_names or class_names(graph.shape(forward.scores)[1])
    is_imagenet = names == tuple(name for _, name in known)
    wanted = PAPER_CLASSES if is_imagenet else names
    everyday = {i: name for name, indices in KNOWN.items() if name in wanted for i in indices}
    found = []
    for sample in samples:
        index = place.get(sample.truths[0].class_name) if sample.single else None
        called = "" if index is None else everyday.get(index, "")
        if index is not None and is_imagenet:
            found.append(Case(sample, index, called))
        elif called:
            found.append(Case(sample, names.index(called), called))
    return found


def boxes_of(
    cases: Sequence[Case], classifier: Classifier, request: Request
) -> tuple[Boxes, Boxes, list[Case]]:
    """(the found boxes, the true ones in fractions of width and height, ``[N, 4]``, the images);
    without those that are empty.
    """
    settings = PublishedDamSettings(layer=classifier.network.dam_layer)
    key = json.dumps([1, classifier.digest, classifier.size_px, settings.digest])
    name = f"dam-{hashlib.sha256(key.encode()).hexdigest()[:24]}.jsonl"
    path = cache_dir() / "papers" / name
    known = _read(path)
    localizer: Localizer | None = None
    found, true, kept = [], [], []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("\n")  # ends a line that was cut off
        for case in track(cases, "DAM", console=request.console):
            image = case.sample.read()
            if not BLACK < image.mean() < WHITE:
                continue
            digest = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()[:32]
            row = f"{digest} {case.index}"
            if row not in known:
                if localizer is None:
                    compiled = partial(OpenVinoEngine, precision=request.options.precision)
                    localizer = Localizer(PublishedDamEngine(classifier, settings, compiled))
                localizer.look_for(case.index)
                box = localizer.localize([image])[0].box_xyxy_px
                assert box is not None
                size = [image.shape[1], image.shape[0]] * 2
                known[row] = tuple(edge / length for edge, length in zip(box, size, strict=True))
                file.write(json.dumps([row, known[row]]) + "\n")
                file.flush()
            found.append(known[row])
            kept.append(case)
            size_px = np.array([image.shape[1], image.shape[0]] * 2)
            true.append(np.clip(np.array(case.sample.truths[0].box_xyxy_px) / size_px, 0, 1))
    if localizer is not None:
        localizer.close()
    return np.array(found), np.array(true), kept


def _read(path: Path) -> dict[str, tuple[float, ...]]:
    """What an earlier run found; a last line that was cut off is left out."""
    found: dict[str, tuple[float, ...]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row, box = json.loads(line)
            except ValueError:
                continue
            found[row] = tuple(box)
    return found


def pictures_of(cases: Sequence[Case], found: Boxes, true: Boxes) -> dict[str, tuple[Picture, ...]]:
    """Photos with the true box in green and the found one in red: of each of the paper's classes
    the first three, and the largest failures.
    """
    groups = {
        name: [row for row, case in enumerate(cases) if case.everyday == name][:EXAMPLES]
        for name in PAPER_CLASSES
    }
    groups = {name: rows for name, rows in groups.items() if rows}
    groups["failures"] = np.argsort(iou(found, true))[:MOST_SHOWN].tolist()

    def picture(row: int, name: str) -> Picture:
        image = cases[row].sample.read()
        return photo_of(image, true[row, None], found[row, None], f"{name}_{row}.jpg")

    return {name: tuple(picture(row, name) for row in rows) for name, rows in groups.items()}


def figures_of(found: Boxes, true: Boxes, names: Sequence[str], default: Boxes) -> dict[str, Any]:
    """The numbers of section 5.3, of N boxes and their true ones in fractions; those of Sightline's
    default; and of two boxes that need no image.
    """
    constant = {"whole_image": WHOLE_IMAGE, "middle": MIDDLE}
    boxes = {
        "dam": found,
        "default": default,
        **{k: np.tile(box, (len(true), 1)) for k, box in constant.items()},
    }
    ious = iou(found, true)
    is_of = {name: np.array([each == name for each in names]) for name in PAPER_CLASSES}
    return {
        "images": len(ious),
        "iou_histogram": iou_histogram(ious),
        **{kind: _measured(each, true) for kind, each in boxes.items()},
        "classes": {
            name: {"images": int(which.sum()), "mean_iou": float(ious[which].mean())}
            for name, which in is_of.items()
            if which.any()
        },
    }


def _measured(found: Boxes, true: Boxes) -> dict[str, Any]:
    ious = iou(found, true)
    centres = {f"{m:.1f}": float(centre_correct(found, true, m).mean()) for m in MARGINS}
    return {
        "mean_iou": float(ious.mean()),
        "corloc": corloc(ious),
        "center_correctness": centres,
    }


KINDS = {
    "dam": "DAM",
    "default": "Sightline's default",
    "middle": "half of the area, in the middle",
    "whole_image": "whole image",
}


def _tables(numbers: Mapping[str, Any]) -> tuple[Figures, ...]:
    """As section 5.3 and its figures 5 and 7 show them."""
    paper = {"dam": f"{PAPER_IOU}"}
    boxes = [
        (words, f"{numbers[k]['mean_iou']:.3f}", percent(numbers[k]["corloc"]), paper.get(k, ""))
        for k, words in KINDS.items()
    ]
    centres = [
        (
            m,
            *(percent(numbers[k]["center_correctness"][m]) for k in KINDS),
            PAPER_CENTRES.get(m, ""),
        )
        for m in numbers["dam"]["center_correctness"]
    ]
    classes = [
        (
            name,
            f"{numbers['classes'][name]['mean_iou']:.3f}",
            str(numbers["classes"][name]["images"]),
            f"{mean_iou}",
            str(count),
        )
        for name, (mean_iou, count) in PAPER_CLASSES.items()
        if name in numbers["classes"]
    ]
    tenths = [
        (f"{i / 10:.1f} to {(i + 1) / 10:.1f}", str(count))
        for i, count in enumerate(numbers["iou_histogram"])
    ]
    return (
        Figures(
            f"Boxes of {numbers['images']} images (section 5.3)",
            ("", "mean IoU", "IoU over 0.5", "mean IoU in the paper"),
            tuple(boxes),
        ),
        Figures(
            "Centre correctness (section 5.2.2, figure 7)",
            ("margin at each side", *KINDS.values(), "in the paper"),
            tuple(centres),
        ),
        Figures(
            "Three classes",
            ("", "mean IoU", "images", "mean IoU in the paper", "its images"),
            tuple(classes),
            "" if classes else "None of the paper's three classes is among the images.",
        ),
        Figures("How many IoUs lie in each tenth (figure 5)", ("IoU", "images"), tuple(tenths)),
    )
