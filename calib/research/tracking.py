"""Measures tracking on what it may be tuned on: ``python -m calib.research.tracking --data DATA
--cache FOLDER``.

What the engine answers is kept in a folder, so that a change of the tracker is measured in a
minute. There are real sequences, films of whole photos and clips of pasted objects
(``calib.research.clips``), made of training photos; with ``--held-out`` of the other half of them.
``--fit`` fits the shipped confidence model to the boxes of all.

A box is right if its IoU is over 0.5. HOTA, IDF1 and MOTA are computed by ``trackeval`` (Luiten et
al., "HOTA: A Higher Order Metric for Evaluating Multi-Object Tracking", IJCV 2020).
"""

import hashlib
import json
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from calib.data.datasets import Sample, load_dataset
from calib.evaluation.metrics import CORLOC_IOU
from calib.heads.confidence import RatedBoxes, fit_confidence_model
from calib.research.clips import FILMS, Film, crowds, films
from calib.research.command_line import run
from calib.research.shown import empty_frames
from engines.boxes import overlap
from engines.choose import open_localizer
from engines.confidence import USUAL_LIMITS, ConfidenceModel, Limits
from engines.files import whole_file
from engines.localizer import ImageBgr, Localization, Localizer
from engines.options import Option
from engines.text import Terminal
from realtime.frames import NO_MAP, BoxPx, Tracked
from realtime.sources.spec import open_source
from realtime.tracking.confidence import CUES, SHIPPED, load_confidence_model
from realtime.tracking.tracker import Tracker

REAL, EMPTY = "real", "empty"
EMPTY_FRAMES = 100
"""The most frames of one empty film."""
TUNING = (
    "davis/camel_boxes.csv",
    "davis/dog_boxes.csv",
    "davis/car-roundabout_boxes.csv",
    "videos/bag_groundtruth.txt",
)
"""The real sequences that may be tuned on."""
CROWDS = {"one": 1, "two": 2, "three": 3}
"""Clips of so many pasted objects."""
MOST = {REAL: 1, EMPTY: 1, **dict.fromkeys(FILMS, 1), "several": 3, "one": 2, "two": 2, "three": 3}
"""The number of objects that are asked for."""
SEVERAL = {"several", *CROWDS}
COUNT = 8
BACKGROUNDS = 200
RATE_FPS = 25.0
NOWHERE = (0.0, 0.0, 0.0, 0.0)
SURE = 0.8
ROUNDS, PENALTY, FOLDS = 2, 300.0, 4
"""Of the fit: rounds, because the confidence decides which objects are followed on; the penalty on
the weights; and the parts of which one is left out at a time. The penalty and the weights were
chosen by leaving out whole kinds: an unseen video is one.
"""
WEIGHTS = {REAL: 4.0, **dict.fromkeys(CROWDS, 0.3)}
"""Those of kinds in the fit, besides 1."""
Model = Callable[[Sequence[float]], float]


@dataclass
class Take:
    """A film with what the engine answers of its frames.

    Attributes:
        film: its frames are empty; they are in ``stored``.
        stored: the frames as JPEG.
        single: the answer for each whole frame by itself.
        every: the answer for each whole frame, as a tracker gets it.
    """

    film: Film
    stored: list[bytes]
    single: list[Localization]
    every: list[Localization]

    def frame(self, number: int) -> ImageBgr:
        """One of its frames."""
        image = cv2.imdecode(np.frombuffer(self.stored[number], np.uint8), cv2.IMREAD_COLOR)
        return np.asarray(image, np.uint8)


def real_films(data: Path, names: Sequence[str] = TUNING) -> Iterator[Film]:
    """Sequences with their boxes."""
    for name in names:
        samples = load_dataset(data / name)
        boxes = tuple({n: t.box_xyxy_px for n, t in enumerate(s.truths)} for s in samples)
        yield Film(Path(name).name.split("_")[0], tuple(s.read() for s in samples), boxes)


def empty_films(data: Path, held_out: bool) -> Iterator[Film]:
    """The frames of the shared videos in which nothing is, each video as a film. What stands there
    all the time counts as objects.
    """
    frames = list(empty_frames(data, "report" if held_out else "tuning"))
    for video in dict.fromkeys(frame.video for frame in frames):
        part = [frame for frame in frames if frame.video == video][:EMPTY_FRAMES]
        boxes = tuple(dict(enumerate(frame.standing_xyxy_px)) for frame in part)
        yield Film(f"{EMPTY} {video}", tuple(frame.image_bgr for frame in part), boxes)


def made_films(data: Path, kind: str, count: int, held_out: bool) -> Iterator[Film]:
    """Films or clips of one kind, of the first or the second half of the training photos."""
    half, seed = (1, 1) if held_out else (0, 0)
    animals = load_dataset(data / "animal_pose_voc/train.csv")
    if kind in CROWDS:
        with open_source(str(data / "imagenet_sample/images_256.zip")) as photos:
            images = [f.image_bgr for f, _ in zip(photos, range(BACKGROUNDS), strict=False)]
        middle = len(images) // 2
        objects = [sample for sample in animals if sample.one_box]
        made = crowds(
            _half(objects, half), images[half * middle :][:middle], count, seed, CROWDS[kind]
        )
        for number, crowd in enumerate(made):
            boxes = tuple(dict(enumerate(each)) for each in crowd.boxes)
            yield Film(f"{kind} {number}", crowd.frames, boxes)
        return
    photos_of = (animals, load_dataset(data / "voc2007/trainval.csv"))
    raccoons = load_dataset(data / "raccoon/train_labels.csv")
    samples = [each for part in (*photos_of, raccoons) for each in _half(part, half)]
    part = "report" if held_out else "tuning"
    empty = [f.image_bgr for f in empty_frames(data, part) if not f.standing_xyxy_px]
    yield from films(samples, empty, kind, count, seed)


def _half(samples: Sequence[Sample], which: int) -> Sequence[Sample]:
    middle = len(samples) // 2
    return samples[middle:] if which else samples[:middle]


def takes(
    cache: Path, kind: str, make: Callable[[], Iterator[Film]], localizer: Localizer
) -> list[Take]:
    """What the engine answers of films, kept in a folder.

    Args:
        cache: the folder.
        kind: of the films; the file's name.
        make: makes them where they are not there.
        localizer: the engine.
    """
    identity = json.dumps(localizer.identity, sort_keys=True, default=str)
    digest = hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()
    path = cache / f"{kind}-{digest}.pickle"
    if path.is_file():
        found: list[Take] = pickle.loads(path.read_bytes())  # written below
        return found
    made = [_taken(film, localizer) for film in make()]
    cache.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(made))
    return made


def _taken(film: Film, localizer: Localizer) -> Take:
    single, every = list[Localization](), list[Localization]()
    for image in film.frames:
        height, width = image.shape[:2]
        outputs = localizer.infer([localizer.prepare(image)])
        for kept, all_of_them in ((single, False), (every, True)):
            found = localizer.read(outputs, 0, width, height, every=all_of_them)
            kept.append(replace(found, map_hw=NO_MAP))
    stored = [
        cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
        for image in film.frames
    ]
    return Take(replace(film, frames=()), stored, single, every)


@dataclass
class Followed:
    """A take, followed.

    Attributes:
        take: see there.
        main: the box of the main object in each frame; None where none is sure enough.
        confidences: how sure the main object is, whether it is shown or not.
        right: whether its box is right, whether it is shown or not.
        objects: the objects that are shown in each frame.
        cues, cues_right: of each object in each frame, and whether its box is right.
    """

    take: Take
    main: list[BoxPx | None] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    objects: list[list[Tracked]] = field(default_factory=list)
    cues: list[list[float]] = field(default_factory=list)
    cues_right: list[float] = field(default_factory=list)


def followed(take: Take, most: int, model: Model, limits: Limits) -> Followed:
    """Follow a take.

    Args:
        take: what the engine answers.
        most: the largest number of objects.
        model: gives the confidence.
        limits: of the head.
    """
    height, width = take.frame(0).shape[:2]
    tracker = Tracker(width, height, model, most, limits=limits)
    result = Followed(take)
    for number, there in enumerate(take.film.boxes):
        tracker.see(take.frame(number), number / RATE_FPS)
        found, said = tracker.update(take.every[number])
        box, sure = found.box_xyxy_px, said.confidence >= limits.shown_from
        result.main.append(box if sure else None)
        result.confidences.append(said.confidence)
        result.right.append(_fit(box, there) > CORLOC_IOU)
        result.objects.append(
            [each for each in tracker.objects if each.confidence >= limits.shown_from]
        )
        for cues, each_px in tracker.cues:
            result.cues.append(cues)
            result.cues_right.append(float(_fit(each_px, there) > CORLOC_IOU))
    return result


def followed_all(
    groups: Mapping[str, Sequence[Take]], model: Model, limits: Limits
) -> dict[str, list[Followed]]:
    """Follow the takes of all kinds."""
    return {
        kind: [followed(take, MOST[kind], model, limits) for take in group]
        for kind, group in groups.items()
    }


def _fit(box_px: BoxPx | None, there: Mapping[int, BoxPx]) -> float:
    """The IoU of a box with the object that it fits best."""
    return max((overlap(box_px, true) for true in there.values() if box_px), default=0.0)


def jitter_px(boxes: Sequence[BoxPx | None], film: Film) -> float:
    """The mean absolute change of edges from frame to frame, less that of the true box, where only
    one object is there; nan where there is no such frame.
    """
    changes = list[float]()
    last: tuple[BoxPx, BoxPx] | None = None
    for box, there in zip(boxes, film.boxes, strict=True):
        now = (box, next(iter(there.values()))) if box and len(there) == 1 else None
        if last is not None and now is not None:
            change = np.subtract(now[0], last[0]) - np.subtract(now[1], last[1])
            changes.append(float(np.abs(change).mean()))
        last = now
    return float(np.mean(changes)) if changes else float("nan")


def main_row(found: Followed) -> dict[str, float]:
    """Of one take: the shares of frames with a right box, alone and followed, mean IoU and jitter
    of both, and the share of frames without an object that show a box; nan where there is none.
    """
    film = found.take.film
    alone = [answer.box_xyxy_px for answer in found.take.single]
    row = dict[str, float]()
    for kind, boxes in (("alone", alone), ("followed", found.main)):
        pairs = list(zip(boxes, film.boxes, strict=True))
        ious = np.array([_fit(box, there) for box, there in pairs if there])
        row[kind] = float(np.mean(ious > CORLOC_IOU)) if len(ious) else np.nan
        row[f"{kind} IoU"] = float(np.mean(ious)) if len(ious) else np.nan
        row[f"{kind} jitter"] = jitter_px(boxes, film)
        empty = [box is not None for box, there in pairs if not there]
        row[f"{kind} on nothing"] = float(np.mean(empty)) if empty else np.nan
    return row


def several_row(all_of_them: Sequence[Followed]) -> dict[str, float]:
    """Of takes of one kind: HOTA, IDF1 and MOTA, and of these the share of objects with a right
    box, the boxes on nothing a frame, and the changes of number a clip.
    """
    from trackeval.metrics import CLEAR, HOTA, Identity  # only here: it is no dependency of a user

    rows = [_for_trackeval(each) for each in all_of_them]
    found = dict[str, Any]()
    for metric in (HOTA(), CLEAR({"PRINT_CONFIG": False}), Identity({"PRINT_CONFIG": False})):
        each_row = {str(n): metric.eval_sequence(row) for n, row in enumerate(rows)}
        found |= metric.combine_sequences(each_row)
    frames = sum(row["num_timesteps"] for row in rows)
    return {
        "HOTA": float(np.mean(found["HOTA"])),
        "IDF1": float(found["IDF1"]),
        "MOTA": float(found["MOTA"]),
        "each right": float(found["CLR_Re"]),
        "on nothing": float(found["CLR_FP"]) / frames,
        "changes": float(found["IDSW"]) / len(rows),
    }


def _for_trackeval(found: Followed) -> dict[str, Any]:
    """A take as ``trackeval`` reads it."""
    true = [list(there) for there in found.take.film.boxes]
    ours = [[each.track.track_id for each in objects] for objects in found.objects]
    places, numbers = (sorted({one for each in part for one in each}) for part in (true, ours))
    alike = [
        np.array(
            [
                [overlap(box, each.box_xyxy_px or NOWHERE) for each in objects]
                for box in there.values()
            ]
        ).reshape(len(there), len(objects))
        for there, objects in zip(found.take.film.boxes, found.objects, strict=True)
    ]
    return {
        "num_timesteps": len(true),
        "num_gt_ids": len(places),
        "num_tracker_ids": len(numbers),
        "num_gt_dets": sum(map(len, true)),
        "num_tracker_dets": sum(map(len, ours)),
        "gt_ids": [np.array([places.index(one) for one in each], int) for each in true],
        "tracker_ids": [np.array([numbers.index(one) for one in each], int) for each in ours],
        "similarity_scores": alike,
    }


def fit_model(groups: Mapping[str, Sequence[Followed]]) -> ConfidenceModel:
    """Fit the confidence model to the boxes of takes, see ``WEIGHTS``."""
    cues, right, counts = list[list[float]](), list[float](), list[float]()
    for kind, group in groups.items():
        number = sum(len(each.cues) for each in group)
        for each in group:
            cues += each.cues
            right += each.cues_right
            counts += [WEIGHTS.get(kind, 1.0) / number] * len(each.cues)
    weights = np.array(counts) * len(counts) / sum(counts)
    rated = RatedBoxes(np.array(cues), np.array(right), weights)
    return fit_confidence_model(rated, CUES, PENALTY, pairs=True)


def left_out(groups: Mapping[str, Sequence[Take]], limits: Limits) -> dict[str, list[Followed]]:
    """Follow all takes, each with a model that was fitted without it: of the real sequences one is
    left out at a time, and of the others every ``FOLDS``-th.
    """
    plain = {
        k: [followed(t, MOST[k], load_confidence_model(), limits) for t in g]
        for k, g in groups.items()
    }
    result: dict[str, list[Followed]] = {kind: [] for kind in groups}
    for fold in range(FOLDS):
        rest = {k: [f for n, f in enumerate(g) if n % FOLDS != fold] for k, g in plain.items()}
        model = fit_model(rest)
        for kind, group in groups.items():
            result[kind] += [followed(t, MOST[kind], model, limits) for t in group[fold::FOLDS]]
    return result


def reliability_row(groups: Sequence[Followed]) -> tuple[float, float]:
    """Of the main boxes that say ``SURE`` or more: the share that is right, and their share of all
    right ones.
    """
    said, right = (
        np.concatenate([np.array(getattr(each, name), float) for each in groups])
        for name in ("confidences", "right")
    )
    sure = said >= SURE
    return float(right[sure].mean()), float(right[sure].sum() / right.sum())


def tables(groups: Mapping[str, Sequence[Followed]], console: Console) -> None:
    """Print what was measured: the mean of each kind with the deviation between its takes."""
    names = ("alone %", "followed %", "IoU", "jitter px", "of alone", "nothing %", "alone")
    table = _table("main object", names)
    means = list[tuple[float, float]]()
    for kind, group in groups.items():
        if kind in SEVERAL:
            continue
        rows = [main_row(each) for each in group]
        if kind == REAL:
            for row, each in zip(rows, group, strict=True):
                table.add_row(each.take.film.name, *_texts([row]))
        table.add_row(kind, *_texts(rows))
        if kind != EMPTY:
            means.append((_mean(rows, "alone"), _mean(rows, "followed")))
    spread = [
        f"{100 * np.mean(each):.1f} ({100 * np.std(each):.0f})" for each in zip(*means, strict=True)
    ]
    table.add_row("mean of kinds", *spread)
    console.print(table)
    scores = ("HOTA %", "IDF1 %", "MOTA %", "each right %", "on nothing", "changes")
    table = _table("several objects", scores)
    for kind in (each for each in groups if each in SEVERAL):
        found = list(several_row(groups[kind]).values())
        shares = [f"{100 * each:.1f}" for each in found[:4]]
        table.add_row(kind, *shares, *(f"{each:.2f}" for each in found[4:]))
    console.print(table)
    single = [each for kind, group in groups.items() if kind not in SEVERAL for each in group]
    right, kept = reliability_row(single)
    console.print(f"boxes that say {SURE:.0%}: {right:.1%} right, {kept:.1%} of all right ones")


def _table(title: str, names: Sequence[str]) -> Table:
    table = Table("", title=f"{title}, IoU over {CORLOC_IOU}", title_justify="left", box=None)
    for name in names:
        table.add_column(name, justify="right")
    return table


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    """The mean of a column, without what could not be measured."""
    known = [row[name] for row in rows if not np.isnan(row[name])]
    return float(np.mean(known)) if known else float("nan")


def _texts(rows: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """The means of rows, with the deviation between them where there are several."""
    for kind in ("alone", "followed"):
        spread = f" ({100 * np.std([row[kind] for row in rows]):.0f})" if len(rows) > 1 else ""
        yield f"{100 * _mean(rows, kind):.1f}{spread}"
    yield f"{_mean(rows, 'followed IoU'):.3f}"
    yield f"{_mean(rows, 'followed jitter'):.1f}"
    yield f"{_mean(rows, 'followed jitter') / _mean(rows, 'alone jitter'):.2f}"
    yield f"{100 * _mean(rows, 'followed on nothing'):.0f}"
    yield f"{100 * _mean(rows, 'alone on nothing'):.0f}"


def main(
    data: Annotated[Path, Option("Folder of the data sets.")],
    cache: Annotated[Path, Option("Folder for what the engine answers.")],
    count: Annotated[int, Option("Takes of each kind.", min=1)] = COUNT,
    held_out: Annotated[bool, Option("Films and clips of the other photos.")] = False,
    leave_one_out: Annotated[bool, Option("Models fitted without what they judge.")] = False,
    fit: Annotated[bool, Option("Fit the shipped confidence model first.")] = False,
) -> None:
    """Measure tracking, and print tables."""
    console = Terminal()
    localizer = open_localizer("lite0")
    limits = localizer.limits or USUAL_LIMITS
    names = ([] if held_out else [REAL]) + [EMPTY, *FILMS, *CROWDS]
    groups = dict[str, list[Take]]()
    for kind in track(names, "what the engine answers", console=Terminal(stderr=True)):
        if kind == REAL:
            make = partial(real_films, data)
        elif kind == EMPTY:
            make = partial(empty_films, data, held_out)
        else:
            make = partial(made_films, data, kind, count, held_out)
        name = f"{kind}-{count}{'-held-out' if held_out else ''}"
        groups[kind] = takes(cache, name, make, localizer)
    if fit:
        model: Model = load_confidence_model()
        for _ in range(ROUNDS):
            model = fit_model(followed_all(groups, model, limits))
        assert isinstance(model, ConfidenceModel)
        save(model, SHIPPED)
        load_confidence_model.cache_clear()
    if leave_one_out:
        tables(left_out(groups, limits), console)
        return
    model = load_confidence_model()
    tables(
        {k: [followed(t, MOST[k], model, limits) for t in g] for k, g in groups.items()}, console
    )


def save(model: ConfidenceModel, path: Path) -> None:
    """Write a model as JSON, whole or not at all.

    Raises:
        OutputError: the place cannot be written.
    """
    with whole_file(path) as part:
        part.write_text(json.dumps(model.stored()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
