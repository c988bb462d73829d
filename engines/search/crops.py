"""Beam search over crops of the image. The fitted head reads each crop, so that each animal of a
group gets a box.

A crop of the feature map that holds two dogs is as much a dog as one that holds one, so that the
search of Bency et al. (``engines.search.beam``) has no cause to part them; measured in
``docs/methods.md``. Here a candidate is a crop of the image. The network and its head read it as
they would a photo of its own, and the box that they find, with a margin, is the candidate's child.
A second linear layer, on the same features, says how likely a box is right: the best go on, and the
best boxes that do not share ground are the objects.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from engines.boxes import iou, shared
from engines.build import IMAGE, WANTED_CLASS, build_graph
from engines.engine import Array, Compile, CompoundEngine, Found, TensorSpec
from engines.errors import ModelError
from engines.files import whole_file
from engines.head import Head, shipped_heads
from engines.networks.registry import Classifier
from engines.networks.weights import ASSETS
from engines.options import EngineOptions
from engines.resizing import resized
from engines.search.beam import BeamEngine, beam_settings

ENLARGED = 2
"""The image is taken at so many times the network's side, so that a crop of half of it is still
sharp.
"""
BATCH = 12
FORMAT = 1
EDGE = 0.03
Rows = NDArray[np.float64]


@dataclass(frozen=True)
class CropSettings:
    """Chosen on pairs put together from training photos of animal_pose_voc, see
    ``docs/methods.md``.

    Attributes:
        beam: candidates that go on from each level.
        levels: how often crops are read.
        margin: by which a box becomes a crop, as a share of its width and height, on every side.
        objects: at most so many.
        most_iou, most_shared: two objects have a lower IoU than this, and less of the smaller box
            in the other.
        least: chance of being right that every object but the best must have.
    """

    beam: int = 24
    levels: int = 2
    margin: float = 0.15
    objects: int = 2
    most_iou: float = 0.3
    most_shared: float = 0.4
    least: float = 0.2

    def __post_init__(self) -> None:
        if min(self.beam, self.levels, self.objects) < 1:
            raise ModelError(
                f"a search over crops takes at least one candidate, level and object, not {self}"
            )

    @property
    def digest(self) -> str:
        """What decides its boxes, in words."""
        return (
            f"crops: {len(first_crops())} and then {self.beam}, {self.levels} levels, read by the"
            " fitted head"
        )


@dataclass(frozen=True)
class CropScorer:
    """A linear layer that says how likely the box that a head finds in a crop has an IoU over 0.5
    with an object.

    Attributes:
        weight: ``[D + 11]``, of the head's features and of ``crop_cues``.
        bias: one number.
        network, head: digests of the classifier and of the head that it belongs to.
    """

    weight: Rows
    bias: float
    network: str
    head: str

    def chances(self, features: Array, crop_cues: Array) -> Rows:
        """Of each crop, clipped to 0..1: ``[N]``."""
        linear = np.concatenate([features, crop_cues], axis=1) @ self.weight + self.bias
        return np.asarray(np.clip(linear, 0, 1), np.float64)

    def save(self, path: Path) -> None:
        """Write it as safetensors, whole or not at all.

        Raises:
            OutputError: the place cannot be written.
        """
        described = {"sightline_judge": str(FORMAT), "network": self.network, "head": self.head}
        with whole_file(path) as part:
            part.write_bytes(
                save(
                    {
                        "weight": self.weight.astype(np.float32),
                        "bias": np.array([self.bias], np.float32),
                    },
                    described,
                )
            )


def load_crop_scorer(path: Path) -> CropScorer:
    """Read a judge.

    Raises:
        ModelError: it is missing, damaged, or not one.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            weight, bias = (file.get_tensor(name).astype(np.float64) for name in ("weight", "bias"))
        return CropScorer(weight, float(bias[0]), metadata["network"], metadata["head"])
    except (OSError, SafetensorError, KeyError, IndexError) as error:
        raise ModelError(
            f"cannot read {path}: {error or type(error).__name__}; python -m calib.research.crops"
            " fits one"
        ) from error


def readers_of_crops(
    classifier: Classifier, options: EngineOptions
) -> tuple[Head, CropScorer] | None:
    """The shipped head and crop scorer with which ``--method beam`` looks for several objects; None
    for the search over the feature map.

    That is what one object, ``--head none`` and a feature map of one's own are searched with, and
    networks without a crop scorer.

    Raises:
        ModelError: the crop scorer is damaged.
    """
    path = ASSETS / f"{classifier.name}_crops.safetensors"
    if options.objects == 1 or options.head or options.layer or not path.exists():
        return None
    crop_scorer = load_crop_scorer(path)
    for head in shipped_heads(classifier).values():
        if isinstance(head, Head) and (head.network, head.digest) == (
            crop_scorer.network,
            crop_scorer.head,
        ):
            return head, crop_scorer
    return None


def open_beam(classifier: Classifier, compiled: Compile, options: EngineOptions) -> CompoundEngine:
    """The engine of ``--method beam``: over crops of the image for several objects, else over the
    feature map.

    Raises:
        ModelError, EngineError: see ``CropsEngine`` and ``BeamEngine``.
    """
    readers = readers_of_crops(classifier, options)
    if readers is not None:
        return CropsEngine(classifier, *readers, CropSettings(objects=options.objects), compiled)
    return BeamEngine(classifier, beam_settings(options.objects, options.layer), compiled)


class CropsEngine(CompoundEngine):
    """See ``CompoundEngine``; it takes images of ``ENLARGED`` times the network's side.

    Args:
        classifier: the network.
        head: reads a box off each crop.
        crop_scorer: says which of them to believe.
        settings: the search's.
        compiled: compiles a graph.

    Attributes:
        side_px: of the network's input.

    Raises:
        ModelError: head or judge belong to another network.
    """

    def __init__(
        self,
        classifier: Classifier,
        head: Head,
        crop_scorer: CropScorer,
        settings: CropSettings,
        compiled: Compile,
    ) -> None:
        if (crop_scorer.network, crop_scorer.head) != (classifier.digest, head.digest):
            raise ModelError(
                "the judge of crops was fitted to another network or head: python -m"
                " calib.research.crops fits one"
            )
        self._settings, self._crop_scorer, side = settings, crop_scorer, classifier.size_px
        whole = build_graph(classifier, head.spec, head)
        self._reader = compiled(
            build_graph(classifier, head.spec, head, batch=BATCH, features=head.features)
        )
        metadata = {p.key: p.value for p in whole.metadata_props}
        description = {**json.loads(metadata["sightline"]), "head": settings.digest, "trust": None}
        first = compiled(whole)
        map_shape = next(spec.shape for spec in first.outputs if spec.name == "map")[1:]
        super().__init__(
            first,
            [self._reader],
            (map_shape[0], map_shape[1]),
            settings.objects,
            {**metadata, "sightline": json.dumps(description)},
        )
        self.side_px, large = side, (1, ENLARGED * side, ENLARGED * side, 3)
        self.inputs = (TensorSpec(IMAGE, np.dtype(np.uint8), large), first.inputs[1])

    def first_feeds(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """The whole image, at the network's side."""
        return {**feeds, IMAGE: resized(feeds[IMAGE][0], self.side_px)[None]}

    def search(
        self, outputs: Mapping[str, Array], feeds: Mapping[str, Array]
    ) -> tuple[list[Found], NDArray[np.float32]]:
        """See ``CompoundEngine.search``; the map is that of the whole image."""
        settings, image, wanted = self._settings, feeds[IMAGE][0], int(feeds[WANTED_CLASS][0])
        crops, found, chances = first_crops(), list[Found](), list[float]()
        for _ in range(settings.levels):
            read = self.read(image, crops, wanted)
            now = self._crop_scorer.chances(read.features, crop_cues(crops, read))
            chances += now.tolist()
            found += [
                Found(tuple(box), int(index), float(chance * score))
                for box, index, chance, score in zip(
                    read.boxes, read.classes, now, read.scores, strict=True
                )
            ]
            crops = widened(
                read.boxes[np.argsort(-now, kind="stable")[: settings.beam]], settings.margin
            )
        return [
            found[i]
            for i in apart(np.array([each.box_xyxy for each in found]), np.array(chances), settings)
        ], outputs["map"][0]

    def read(self, image_hwc: NDArray[np.uint8], crops: Rows, wanted: int = -1) -> "Read":
        """What network and head make of each crop, ``BATCH`` at a time; the last call is filled up
        with its last crop.
        """
        parts = list[dict[str, Array]]()
        for start in range(0, len(crops), BATCH):
            images = [
                resized(cropped(image_hwc, crop), self.side_px)
                for crop in crops[start : start + BATCH]
            ]
            batch = np.stack([*images, *[images[-1]] * (BATCH - len(images))])
            parts.append(
                self.ask(
                    self._reader, {IMAGE: batch, WANTED_CLASS: np.full(BATCH, wanted, np.int64)}
                )
            )
        names = ("box_xyxy", "class_index", "score", "features")
        inner, classes, scores, features = (
            np.concatenate([part[name] for part in parts])[: len(crops)] for name in names
        )
        boxes = np.tile(crops[:, :2], 2) + inner * np.tile(crops[:, 2:] - crops[:, :2], 2)
        return Read(inner.astype(np.float64), boxes, classes, scores, features)


@dataclass(frozen=True)
class Read:
    """What was read of N crops.

    Attributes:
        inner: boxes in fractions of the crop, ``[N, 4]``.
        boxes: the same in fractions of the image.
        classes, scores: of each crop, ``[N]``.
        features: of the head, ``[N, D]``.
    """

    inner: Rows
    boxes: Rows
    classes: NDArray[np.int64]
    scores: NDArray[np.float32]
    features: NDArray[np.float32]


def first_crops() -> Rows:
    """The whole image, its halves and larger parts, and squares of 0.6 and 0.4 of its sides:
    ``[36, 4]``, x0, y0, x1, y1.
    """
    sizes = (
        (1, 1, 1, 1),
        (0.5, 1, 3, 1),
        (1, 0.5, 1, 3),
        (0.7, 1, 2, 1),
        (1, 0.7, 1, 2),
        (0.6, 0.6, 3, 3),
        (0.4, 0.4, 4, 4),
    )
    return np.array(
        [
            (x, y, x + width, y + height)
            for width, height, across, down in sizes
            for x in np.linspace(0, 1 - width, across)
            for y in np.linspace(0, 1 - height, down)
        ]
    )


def widened(boxes: Rows, margin: float) -> Rows:
    """Boxes with a margin on every side, inside the image, and never too small to be looked at."""
    centres, half = (
        (boxes[:, 2:] + boxes[:, :2]) / 2,
        np.maximum(boxes[:, 2:] - boxes[:, :2], 0.06) * (0.5 + margin),
    )
    return np.asarray(
        np.clip(np.concatenate([centres - half, centres + half], axis=1), 0, 1), np.float64
    )


def cropped(image_hwc: NDArray[np.uint8], crop: Rows) -> NDArray[np.uint8]:
    """The crop's pixels, at least 8 a side."""
    height, width = image_hwc.shape[:2]
    x0, y0, x1, y1 = np.rint(crop * [width, height, width, height]).astype(int)
    x0, y0 = min(x0, width - 8), min(y0, height - 8)
    return np.asarray(image_hwc[y0 : max(y1, y0 + 8), x0 : max(x1, x0 + 8)])


def crop_cues(crops: Rows, read: Read) -> Rows:
    """What tells a judge of each crop, beside the head's features: ``[N, 11]``.

    The box inside the crop, the log of the class's probability, the crop's width and height, and
    which of the crop's edges the box touches although the image goes on there: it was cut off.
    """
    free = np.concatenate([crops[:, :2] > 0.01, crops[:, 2:] < 0.99], axis=1)
    touched = np.concatenate([read.inner[:, :2] < EDGE, read.inner[:, 2:] > 1 - EDGE], axis=1)
    log_scores = np.log(np.maximum(read.scores, 1e-9))[:, None]
    return np.concatenate(
        [read.inner, log_scores, crops[:, 2:] - crops[:, :2], free & touched], axis=1
    ).astype(np.float64)


def apart(boxes: Rows, chances: Rows, settings: CropSettings) -> list[int]:
    """Places of the objects: where several are wanted, the two boxes that share little and are the
    likeliest together, then one by one the likeliest that share little with any; one box of two
    objects fits in no pair, and so loses to theirs.
    """
    clear = (iou(boxes[:, None], boxes[None]) < settings.most_iou) & (
        shared(boxes[:, None], boxes[None]) < settings.most_shared
    )
    best = int(np.argmax(chances))
    fit = chances >= settings.least
    if settings.objects == 1:
        return [best]
    pairs = np.where(clear & fit & fit[:, None], chances + chances[:, None], -1.0)
    if pairs.max() < 0:
        return [best]
    chosen = [int(place) for place in np.unravel_index(int(np.argmax(pairs)), pairs.shape)]
    for place in np.argsort(-chances, kind="stable"):
        if len(chosen) < settings.objects and fit[place] and clear[place, chosen].all():
            chosen.append(int(place))
    return sorted(chosen, key=lambda place: -chances[place])
