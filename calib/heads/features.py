"""Computes the features of a labelled set once with the engine, and caches them by content."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from calib.data.datasets import Sample
from calib.data.images import size_of
from calib.data.labels import SizePx
from calib.evaluation.metrics import relative_boxes
from engines.backends.openvino import OpenVinoEngine
from engines.build import build_graph
from engines.confidence import averaged, cues_of
from engines.downloads import cache_dir
from engines.features import Feature
from engines.files import whole_file
from engines.localizer import Localizer
from engines.maps import MapSpec
from engines.networks.registry import Classifier

TABLE_FORMAT = 3


@dataclass(frozen=True)
class Answers:
    """What the engine said of each of N images, as far as it tells how sure a box is, see
    ``engines.confidence``.

    Attributes:
        maps: averaged, float32 ``[N, SIDE, SIDE]``.
        scores, logits: of the network's own best class, float32 ``[N]``.
    """

    maps: NDArray[np.float32]
    scores: NDArray[np.float32]
    logits: NDArray[np.float32]

    def take(self, rows: NDArray[np.int64]) -> "Answers":
        """Those of some of the images."""
        return Answers(self.maps[rows], self.scores[rows], self.logits[rows])

    def cues(self, boxes_xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
        """The cues of a box ``[N, 4]`` in each image, ``[N, S]``."""
        each = zip(boxes_xyxy, self.maps, self.scores, self.logits, strict=True)
        return np.array(
            [cues_of(box, map_hw, float(score), float(logit)) for box, map_hw, score, logit in each]
        )


@dataclass(frozen=True)
class FeatureTable:
    """Features and boxes of N images with one box each.

    Attributes:
        values: float32 ``[N, D]``.
        mirrored: the same of the mirrored images.
        boxes_xyxy: float64 ``[N, 4]``, fractions of width and height.
        class_names: of each object.
        class_indices: the network's own best class of each image, int64 ``[N]``.
        groups: of each image, see ``calib.data.datasets.Sample.group``.
        answers: what tells how sure a box is; None where nobody asks.
    """

    values: NDArray[np.float32]
    mirrored: NDArray[np.float32]
    boxes_xyxy: NDArray[np.float64]
    class_names: tuple[str, ...]
    class_indices: NDArray[np.int64]
    groups: tuple[str, ...]
    answers: Answers | None = None

    def take(self, rows: NDArray[np.int64]) -> "FeatureTable":
        """The table of some of its images."""
        names, groups = (
            tuple(texts[row] for row in rows) for texts in (self.class_names, self.groups)
        )
        arrays = self.values[rows], self.mirrored[rows], self.boxes_xyxy[rows]
        answers = self.answers.take(rows) if self.answers else None
        return FeatureTable(*arrays, names, self.class_indices[rows], groups, answers)


def feature_table(
    samples: Sequence[Sample],
    classifier: Classifier,
    spec: MapSpec,
    features: Sequence[Feature],
    console: Console,
) -> FeatureTable:
    """Compute (or fetch) the features of every image with exactly one box, in fp32."""
    singles = [sample for sample in samples if sample.one_box]
    key, sizes_px = _key(singles, classifier, spec, features)
    path = cache_dir() / "features" / f"{key}.npz"
    if path.exists():
        with np.load(path) as stored:
            found: Mapping[str, NDArray[Any]] = dict(stored)
    else:
        found = _computed(singles, classifier, spec, features, console)
        with whole_file(path) as part, part.open("wb") as file:
            np.savez(file, allow_pickle=False, **found)
    names = tuple(sample.truths[0].class_name for sample in singles)
    groups = tuple(sample.group for sample in singles)
    boxes, answers = (
        relative_boxes(singles, sizes_px),
        Answers(found["maps"], found["scores"], found["logits"]),
    )
    return FeatureTable(
        found["values"], found["mirrored"], boxes, names, found["class_indices"], groups, answers
    )


def _computed(
    singles: Sequence[Sample],
    classifier: Classifier,
    spec: MapSpec,
    features: Sequence[Feature],
    console: Console,
) -> dict[str, NDArray[Any]]:
    """The fields of a table by name, boxes and names apart."""
    localizer = Localizer(OpenVinoEngine(build_graph(classifier, spec, features=features), "fp32"))
    found: dict[str, list[Any]] = {
        name: [] for name in ("values", "mirrored", "class_indices", "maps", "scores", "logits")
    }
    for sample in track(singles, "computing maps", console=console):
        prepared = localizer.prepare(sample.read())
        outputs = localizer.infer([prepared])
        found["values"].append(outputs["features"][0].copy())
        found["mirrored"].append(localizer.infer([prepared[:, ::-1]])["features"][0].copy())
        found["class_indices"].append(np.int64(outputs["class_index"][0]))
        found["maps"].append(averaged(outputs["map"][0]).copy())
        found["scores"].append(outputs["score"][0])
        found["logits"].append(outputs["logit"][0])
    return {name: np.array(values) for name, values in found.items()}


def _key(
    singles: Sequence[Sample], classifier: Classifier, spec: MapSpec, features: Sequence[Feature]
) -> tuple[str, list[SizePx]]:
    """(what the features depend on, in 32 digits; the images' sizes). Images are decoded singly:
    thousands do not fit.
    """
    settings = [classifier.digest, classifier.size_px, asdict(spec), [asdict(f) for f in features]]
    digest = hashlib.sha256(json.dumps([TABLE_FORMAT, *settings]).encode())
    sizes_px = []
    for sample in singles:
        image = sample.read()
        digest.update(repr(image.shape).encode() + image.tobytes())
        sizes_px.append(size_of(image))
    return digest.hexdigest()[:32], sizes_px
