"""Map features of a labelled set, computed once by the engine and cached by content."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from calib.data.datasets import Sample
from calib.data.images import size_of
from calib.data.labels import SizePx
from engines.backends.openvino import OpenVinoEngine
from engines.build import build_graph
from engines.classifiers import Classifier
from engines.downloads import cache_dir
from engines.features import Feature
from engines.files import whole_file
from engines.localizer import Localizer
from engines.maps import MapSpec

TABLE_FORMAT = 2


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
    """

    values: NDArray[np.float32]
    mirrored: NDArray[np.float32]
    boxes_xyxy: NDArray[np.float64]
    class_names: tuple[str, ...]
    class_indices: NDArray[np.int64]
    groups: tuple[str, ...]

    def take(self, rows: NDArray[np.int64]) -> "FeatureTable":
        """The table of some of its images."""
        names, groups = (tuple(texts[row] for row in rows) for texts in (self.class_names, self.groups))
        arrays = self.values[rows], self.mirrored[rows], self.boxes_xyxy[rows]
        return FeatureTable(*arrays, names, self.class_indices[rows], groups)


def feature_table(
    samples: Sequence[Sample], classifier: Classifier, spec: MapSpec, features: Sequence[Feature], console: Console
) -> FeatureTable:
    """Compute (or fetch) the features of every image with exactly one box, in fp32."""
    singles = [sample for sample in samples if sample.one_box]
    key, sizes_px = _key(singles, classifier, spec, features)
    path = cache_dir() / "features" / f"{key}.npz"
    if path.exists():
        with np.load(path) as stored:
            values, mirrored, indices = stored["values"], stored["mirrored"], stored["class_indices"]
    else:
        values, mirrored, indices = _computed(singles, classifier, spec, features, console)
        with whole_file(path) as part, part.open("wb") as file:
            np.savez(file, values=values, mirrored=mirrored, class_indices=indices)
    names = tuple(sample.truths[0].class_name for sample in singles)
    groups = tuple(sample.group for sample in singles)
    return FeatureTable(values, mirrored, relative_boxes(singles, sizes_px), names, indices, groups)


def relative_boxes(singles: Sequence[Sample], sizes_px: Sequence[SizePx]) -> NDArray[np.float64]:
    """The one box of each sample as fractions of its image's (width, height), clipped to it: ``[N, 4]``."""
    boxes = np.array([sample.truths[0].box_xyxy_px for sample in singles])
    return np.asarray(np.clip(boxes / np.tile(np.array(sizes_px, np.float64), 2), 0, 1))


def _computed(
    singles: Sequence[Sample], classifier: Classifier, spec: MapSpec, features: Sequence[Feature], console: Console
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    localizer = Localizer(OpenVinoEngine(build_graph(classifier, spec, features=features), "fp32"))
    rows: list[list[NDArray[np.float32]]] = [[], []]
    indices: list[int] = []
    for sample in track(singles, "computing maps", console=console):
        prepared = localizer.prepare(sample.read())
        outputs = localizer.infer([prepared])
        indices.append(int(outputs["class_index"][0]))
        rows[0].append(outputs["features"][0].copy())
        rows[1].append(localizer.infer([prepared[:, ::-1]])["features"][0].copy())
    return np.stack(rows[0]), np.stack(rows[1]), np.array(indices, np.int64)


def _key(
    singles: Sequence[Sample], classifier: Classifier, spec: MapSpec, features: Sequence[Feature]
) -> tuple[str, list[SizePx]]:
    """(what the features depend on, in 32 digits; the images' sizes). Images are decoded singly: thousands do not fit."""
    settings = [classifier.digest, classifier.size_px, asdict(spec), [asdict(f) for f in features]]
    digest = hashlib.sha256(json.dumps([TABLE_FORMAT, *settings]).encode())
    sizes_px = []
    for sample in singles:
        image = sample.read()
        digest.update(repr(image.shape).encode() + image.tobytes())
        sizes_px.append(size_of(image))
    return digest.hexdigest()[:32], sizes_px
