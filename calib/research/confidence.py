"""Fits the shipped confidence models: ``python -m calib.research.confidence --data DATA``.

By default it fits the model of tracked boxes. Clips are made of training photos (``clips``: objects
of ``animal_pose_voc`` train over photos of ``imagenet_sample``) and tracked; so are plain photos
before a camera that sways, and the DAVIS sequences that may be tuned on. The cues of each box, and
whether it was right, are what the model is fitted to. This is done twice, because the confidence
decides where the tracker looks next.

With ``--heads`` it fits the models of the shipped heads. Each head is fitted again on four fifths
of its training set at a time, as ``fit`` does. The model is fitted to its boxes in the rest and
written into the head's file. The head itself stays as it is. A user's own heads get their models
from ``fit``.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
from rich.console import Console
from rich.progress import track

from calib.data.datasets import Sample, load_dataset
from calib.evaluation.metrics import CORLOC_IOU
from calib.evaluation.sequences import follow_frame
from calib.heads.confidence import RatedBoxes, fit_confidence_model, head_confidence_model
from calib.heads.linear import feature_table, held_out_boxes
from calib.research.clips import Clip, clips, stills
from calib.research.command_line import run
from engines.boxes import iou
from engines.choose import open_localizer
from engines.confidence import ConfidenceModel
from engines.files import whole_file
from engines.head import Head, load_head, shipped_head_names, shipped_head_path
from engines.localizer import Localizer
from engines.networks.registry import NETWORKS, Classifier, load_classifier
from engines.options import Option
from engines.text import Terminal
from realtime.frames import BoxPx
from realtime.sources.spec import open_source
from realtime.tracking.confidence import CUES, SHIPPED
from realtime.tracking.tracker import Tracker

TUNING = (
    "davis/camel_boxes.csv",
    "davis/dog_boxes.csv",
    "davis/car-roundabout_boxes.csv",
    "videos/bag_groundtruth.txt",
)
CLIPS = 36
BACKGROUNDS = 100
ROUNDS = 2
PENALTY = 10.0
MISSED_LOGIT, LOOKS_HELD = 0.5, 2.0
"""A look in which an object is not found takes so much off the logit; and the unit of the number of
such looks, of which a model counts three.
"""
REAL_SHARE = 0.5
"""The share of the weight that the real sequences have."""
STILL_SHARE = 0.25
"""The share of the weight that clips of single photos have."""
RATE_FPS = 24.0
UNSURE = 0.7
"""The confidence of every box in the first round."""
CuesToConfidence = Callable[[Sequence[float]], float]


def follow(
    clip: Clip, localizer: Localizer, confidence_model: CuesToConfidence
) -> list[tuple[list[float], BoxPx, BoxPx | None]]:
    """Track the main object of a clip.

    Returns:
        The cues, the box and the true box of each frame with a tracked box.
    """
    height, width = clip.frames[0].shape[:2]
    tracker = Tracker(width, height, confidence_model)
    found = []
    for number, (frame, truth) in enumerate(zip(clip.frames, clip.boxes, strict=True)):
        answer, _ = follow_frame(tracker, localizer, frame, number / RATE_FPS)
        if answer.box_xyxy_px is not None and tracker.cues is not None:
            found.append((tracker.cues, answer.box_xyxy_px, truth))
    return found


def rated_boxes(
    groups: Sequence[tuple[float, Iterable[Clip]]],
    localizer: Localizer,
    model: ConfidenceModel | None,
    console: Console,
) -> RatedBoxes:
    """Track the objects of clips with a model, and rate every box.

    Args:
        groups: clips, and their share of the weight of all boxes.
        localizer: an engine with a head.
        model: gives the confidence; without one it is ``UNSURE``.
        console: for progress.
    """
    cues: list[Sequence[float]] = []
    right: list[float] = []
    shares: list[float] = []
    for share, group in groups:
        before = len(cues)
        for clip in track(list(group), "following", console=console):
            for each, box, truth in follow(clip, localizer, model or (lambda _: UNSURE)):
                cues.append(each)
                right.append(_right(box, truth))
        shares += [share / (len(cues) - before)] * (len(cues) - before)
    return RatedBoxes(np.array(cues), np.array(right), np.array(shares) * len(cues))


def _right(box: tuple[float, ...] | None, truth: tuple[float, ...] | None) -> float:
    """1 for a right box, else 0. Without a true box, none is right."""
    return float(box is not None and truth is not None and float(iou(box, truth)) > CORLOC_IOU)


def fit_tracking_model(boxes: RatedBoxes) -> ConfidenceModel:
    """Fit the model of tracked boxes on their cues. What a missed look means is set: hardly an
    object leaves in these clips.
    """
    fitted = fit_confidence_model(boxes, CUES, PENALTY)
    place = CUES.index("missed")
    mean, scale, weight = list(fitted.mean), list(fitted.scale), list(fitted.weight)
    mean[place], scale[place] = 0.0, LOOKS_HELD
    weight[place] = -MISSED_LOGIT * LOOKS_HELD
    return replace(fitted, mean=tuple(mean), scale=tuple(scale), weight=tuple(weight))


def save(model: ConfidenceModel, path: Path) -> None:
    """Write a model as JSON, whole or not at all.

    Raises:
        OutputError: the place cannot be written.
    """
    with whole_file(path) as part:
        part.write_text(json.dumps(model.stored()) + "\n", encoding="utf-8")


def sequence_clips(folder: Path, names: Sequence[str]) -> Iterator[Clip]:
    """Sequences with their boxes, as clips."""
    for name in names:
        samples = load_dataset(folder / name)
        boxes = tuple(sample.truths[0].box_xyxy_px if sample.truths else None for sample in samples)
        yield Clip(tuple(sample.read() for sample in samples), boxes)


def fit_of_tracking(data: Path, count: int, console: Console) -> ConfidenceModel:
    """Fit the model of tracked boxes on ``count`` clips, half as many stills, and the sequences."""
    with open_source(str(data / "imagenet_sample/images_256.zip")) as photos:
        backgrounds = [
            frame.image_bgr for frame, _ in zip(photos, range(BACKGROUNDS), strict=False)
        ]
    objects = [
        sample for sample in load_dataset(data / "animal_pose_voc/train.csv") if sample.one_box
    ]
    objects = objects[: len(objects) // 2]  # ``calib.research.several`` measures on the others
    made = list(clips(objects, backgrounds, count))
    real = list(sequence_clips(data, TUNING))
    still = list(stills(objects, count // 2))
    groups = [(1 - REAL_SHARE - STILL_SHARE, made), (STILL_SHARE, still), (REAL_SHARE, real)]
    localizer = open_localizer("lite0")
    model = None
    for _ in range(ROUNDS):
        boxes = rated_boxes(groups, localizer, model, console)
        model = fit_tracking_model(boxes)
        console.print(f"{len(boxes.right)} boxes, {100 * boxes.right.mean():.1f} % of them right")
    assert model is not None
    return model


def with_confidence_model(
    head: Head, samples: Sequence[Sample], classifier: Classifier, console: Console
) -> Head:
    """A head that was fitted on these samples, with the confidence model of its boxes."""
    table = feature_table(samples, classifier, head.spec, head.features, console)
    found = held_out_boxes(table, np.arange(len(table.values)), float(str(head.card["strength"])))
    return replace(head, confidence_model=head_confidence_model(table, found))


def fit_of_shipped_heads(data: Path, console: Console) -> None:
    """Fit the confidence model of every shipped head whose network ships too, and write it into the
    head's file.
    """
    samples = load_dataset(data / "animal_pose_voc" / "train.csv")
    for name in shipped_head_names():
        head, network = load_head(shipped_head_path(name)), name.split("_")[0]
        if not isinstance(head, Head) or NETWORKS[network].shipped is None:
            continue
        classifier = load_classifier(network, size_px=head.size_px)
        fitted = with_confidence_model(head, samples, classifier, console)
        fitted.save(shipped_head_path(name))
        console.print(f"{name}: done")


def main(
    data: Annotated[Path, Option("Folder of the data sets.")],
    out: Annotated[Path, Option("FILE.json to write.")] = SHIPPED,
    count: Annotated[int, Option("Clips made of photos.", min=1)] = CLIPS,
    heads: Annotated[bool, Option("Fit the models of the shipped heads instead.")] = False,
) -> None:
    """Fit and save the model of tracked boxes, or those of the shipped heads."""
    console = Terminal(stderr=True)
    if heads:
        fit_of_shipped_heads(data, console)
    else:
        save(fit_of_tracking(data, count, console), out)


if __name__ == "__main__":
    run(main)
