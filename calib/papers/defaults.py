"""What Sightline's default network and head find in the images of a paper's table.

The papers' tables show it beside the published way, with its time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from calib.data.choose import SAME_NAMES
from calib.data.datasets import Sample
from calib.data.images import size_of
from calib.evaluation.metrics import (
    Predicted,
    Truths,
    detection_ap,
    is_ignored,
    is_ignored_point,
    localization_ap,
    mean_ap,
)
from calib.papers.reproduce import Request
from engines.errors import ModelError
from engines.localizer import Localization, Localizer
from engines.options import MOST_OBJECTS, EngineOptions
from realtime.latency_budget import open_with_notes


@dataclass(frozen=True)
class Defaults:
    """What was found.

    Attributes:
        found: of each image; no box is withheld.
        boxes: the main object's, in fractions of width and height, ``[N, 4]``; the whole image
            where none was found.
        ms_per_image: the median time.
        model: the network's name.
    """

    found: tuple[Localization, ...]
    boxes: NDArray[np.float64]
    ms_per_image: float
    model: str


def found_by_default(
    samples: Sequence[Sample], request: Request, several: bool = False
) -> Defaults:
    """Run Sightline's default on images, at each one's own size.

    Args:
        samples: the images.
        request: says how far it is.
        several: also what else is there, up to ``MOST_OBJECTS``, where the head finds several.
    """
    found, boxes, times_ms = list[Localization](), [], []
    with _opened(request, several) as localizer:
        for sample in track(samples, "Sightline's default", console=request.console):
            image = sample.read()
            before = perf_counter()
            answer = localizer.localize([image])[0]
            times_ms.append((perf_counter() - before) * 1e3)
            found.append(replace(answer, map_hw=answer.map_hw[:0]))  # the maps of a set are large
            size = np.tile(size_of(image), 2)
            boxes.append(np.array(answer.box_xyxy_px or (0, 0, *size[:2])) / size)
    middle = float(np.median(times_ms))
    return Defaults(tuple(found), np.array(boxes), middle, EngineOptions().model)


def _opened(request: Request, several: bool) -> Localizer:
    choice = EngineOptions(least_confidence=0.0)
    if several:
        try:
            return open_with_notes(replace(choice, objects=MOST_OBJECTS), request.console)
        except ModelError:  # the compact network, where there is no other, finds one object
            pass
    return open_with_notes(choice, request.console)


def default_ap(
    samples: Sequence[Sample], truths: Truths, least_iou: float, request: Request
) -> dict[str, Any]:
    """Localization and detection AP of the boxes and names of Sightline's default.

    A box is ranked by its confidence times the probability of its name; one without a sure name is
    of no class. The point of a class is the centre of its best box.

    Args:
        samples: the images.
        truths: their true boxes by class.
        least_iou: of a right box.
        request: says how far it is.

    Returns:
        ``ap``, by what is measured and then by class; ``map``, the means; and ``ms_per_image``.
    """
    called = {SAME_NAMES.get(name, name): name for name in truths}
    points, boxes = list[Predicted](), list[Predicted]()
    default = found_by_default(samples, request, several=True)
    for sample, found in zip(samples, default.found, strict=True):
        for each in found.detections or (found,):
            label, share = each.class_name, each.score
            if each.box_name is not None:
                label, share = each.box_name.label, each.box_name.probability
            name, box = called.get(label), each.box_xyxy_px
            if name is None or box is None or each.confidence is None:
                continue
            score = each.confidence * share
            if not is_ignored(box, sample):
                boxes.append(Predicted(sample.name, name, score, box))
            point = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            if not is_ignored_point(point, sample):
                points.append(Predicted(sample.name, name, score, point))
    aps = {
        "localization": localization_ap(points, truths),
        "detection": detection_ap(boxes, truths, least_iou),
    }
    means = {kind: mean_ap(each) for kind, each in aps.items()}
    return {"ap": aps, "map": means, "ms_per_image": default.ms_per_image}
