"""Fits the confidence model of tracked boxes: ``python -m calib.research.confidence --data DATA``.

Clips are made of training photos (``clips``: objects of ``animal_pose_voc`` train over photos of
``imagenet_sample``) and tracked; so are plain photos before a camera that sways, and the DAVIS
sequences that may be tuned on. A logistic model learns from eleven numbers of each box whether it
was right. This is done twice, because the confidence decides where the tracker looks next.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from calib.data.datasets import load_dataset
from calib.evaluation.metrics import CORLOC_IOU
from calib.evaluation.sequences import follow_frame
from calib.heads.confidence import logistic
from calib.research.clips import Clip, clips, stills
from engines.boxes import iou
from engines.choose import Choice, open_localizer
from engines.files import whole_file
from engines.localizer import Localizer
from engines.text import Terminal
from realtime.frames import BoxPx
from realtime.sources.images import open_source
from realtime.tracking.confidence import CUES, SHIPPED, ConfidenceModel, Cues, expanded
from realtime.tracking.tracker import Tracker

TUNING = ("camel", "dog", "car-roundabout")
CLIPS, BACKGROUNDS, ROUNDS = 150, 100, 2
PENALTY = 10.0
REAL_SHARE, STILL_SHARE = 0.2, 0.25
"""Of the weight, for the real sequences (few, and easier than most), and for clips of single
photos.
"""
RATE_FPS = 24.0
UNSURE = 0.7
"""Said of every box in the first round."""


@dataclass(frozen=True)
class RatedAnswer:
    """Signs of boxes ``[N, S]``, whether each was right ``[N]``, and what each counts for
    ``[N]``.
    """

    cues: NDArray[np.float64]
    right: NDArray[np.float64]
    weights: NDArray[np.float64]


class _Watched(ConfidenceModel):
    """A model that keeps the cues it was asked about; without weights it says ``UNSURE``."""

    asked: list[Cues]

    def __call__(self, cues: Cues) -> float:
        self.asked.append(cues)
        return super().__call__(cues) if self.weight.size else UNSURE


def watched(model: ConfidenceModel | None) -> _Watched:
    """The model, or one that knows nothing, which keeps what it is asked."""
    empty = np.zeros(0)
    watch = (
        _Watched(model.mean, model.scale, model.weight, model.bias)
        if model
        else _Watched(empty, empty, empty, 0.0)
    )
    object.__setattr__(watch, "asked", [])
    return watch


def follow(
    clip: Clip, localizer: Localizer, confidence_model: ConfidenceModel
) -> list[tuple[BoxPx | None, BoxPx | None]]:
    """(followed, true) box of each frame that was looked at, one engine call after the other."""
    height, width = clip.frames[0].shape[:2]
    tracker = Tracker(width, height, confidence_model)
    found = []
    for number, (frame, truth) in enumerate(zip(clip.frames, clip.boxes, strict=True)):
        answer, said = follow_frame(tracker, localizer, frame, number / RATE_FPS)
        if said.window_xyxy_px:
            found.append((answer.box_xyxy_px, truth))
    return found


def rated_answers(
    groups: Sequence[tuple[float, Iterable[Clip]]],
    localizer: Localizer,
    model: ConfidenceModel | None,
    console: Console,
) -> RatedAnswer:
    """Follow clips with a model and judge every box; each group of clips has its share of the
    weight.
    """
    cues: list[Cues] = []
    right: list[float] = []
    weights: list[float] = []
    for share, group in groups:
        before = len(cues)
        for clip in track(list(group), "following", console=console):
            watch = watched(model)
            boxes = follow(clip, localizer, watch)
            cues += watch.asked
            right += [_right(box, truth) for box, truth in boxes]
        weights += [share / (len(cues) - before)] * (len(cues) - before)
    return RatedAnswer(np.array(cues), np.array(right), np.array(weights))


def _right(box: tuple[float, ...] | None, truth: tuple[float, ...] | None) -> float:
    return float(box is not None and truth is not None and float(iou(box, truth)) > CORLOC_IOU)


def fitted(data: RatedAnswer) -> ConfidenceModel:
    """Logistic regression on the cues and their products."""
    mean, scale = data.cues.mean(axis=0), data.cues.std(axis=0) + 1e-3
    x = expanded((data.cues - mean) / scale)
    return ConfidenceModel(mean, scale, *logistic(x, data.right, data.weights * len(x), PENALTY))


def save(model: ConfidenceModel, path: Path) -> None:
    """Write it, whole or not at all."""
    stored = {
        "signs": CUES,
        "mean": model.mean.round(5).tolist(),
        "scale": model.scale.round(5).tolist(),
        "weight": model.weight.round(5).tolist(),
        "bias": round(model.bias, 5),
    }
    with whole_file(path) as part:
        part.write_text(json.dumps(stored) + "\n", encoding="utf-8")


def sequence_clips(folder: Path, names: Sequence[str]) -> Iterator[Clip]:
    """DAVIS sequences with their boxes."""
    for name in names:
        samples = load_dataset(folder / f"{name}_boxes.csv")
        boxes = tuple(sample.truths[0].box_xyxy_px if sample.truths else None for sample in samples)
        yield Clip(tuple(sample.read() for sample in samples), boxes)


def main(
    data: Annotated[Path, typer.Option(help="Folder of the data sets.")],
    out: Annotated[Path, typer.Option(help="FILE.json to write.")] = SHIPPED,
    count: Annotated[int, typer.Option(help="Clips made of photos.", min=1)] = CLIPS,
) -> None:
    """Fit and save the model."""
    console = Terminal(stderr=True)
    with open_source(str(data / "imagenet_sample/images_256.zip")) as photos:
        backgrounds = [
            frame.image_bgr for frame, _ in zip(photos, range(BACKGROUNDS), strict=False)
        ]
    objects = [
        sample for sample in load_dataset(data / "animal_pose_voc/train.csv") if sample.one_box
    ]
    made, real = (
        list(clips(objects, backgrounds, count)),
        list(sequence_clips(data / "davis", TUNING)),
    )
    still = list(stills(objects, count // 2))
    groups = [(1 - REAL_SHARE - STILL_SHARE, made), (STILL_SHARE, still), (REAL_SHARE, real)]
    localizer, model = open_localizer(Choice()), None
    for _ in range(ROUNDS):
        seen = rated_answers(groups, localizer, model, console)
        model = fitted(seen)
        console.print(f"{len(seen.right)} boxes, {100 * seen.right.mean():.1f} % of them right")
    assert model is not None
    save(model, out)


if __name__ == "__main__":
    typer.run(main)
