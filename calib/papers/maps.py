"""Sensitivity maps of a labelled set, computed once and kept on disk, for the papers' tables.

Every image has a file of its own, under the digest of its pixels. So a run that was stopped goes
on, and any part of a set can be used.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from calib.data.datasets import Sample
from calib.data.images import size_of
from calib.data.labels import SizePx
from engines.backends.openvino import OpenVinoEngine
from engines.build import (
    IMAGE,
    WANTED_CLASS,
    append_chosen_class,
    append_no_class,
    append_preprocessing,
    stamp,
)
from engines.downloads import cache_dir
from engines.files import whole_file
from engines.gradient import attach_gradient
from engines.graph import INT64, Graph
from engines.localizer import Localizer
from engines.maps import AGGREGATIONS, MapSpec, aggregated
from engines.networks.registry import Classifier
from engines.objectives import objective_cotangents

FORMAT = 1
BATCH = 4
"""Images a call: the convolutions of VGG16 take a fifth less of each than of one alone."""
AT_ONCE = 256
"""Maps that are in memory at once where all are read."""
Map32 = NDArray[np.float32]


@dataclass(frozen=True)
class MapStore:
    """The maps of images, by one network and one objective.

    Attributes:
        classifier: the network; its images are squashed to its square.
        objective: see ``engines.maps.OBJECTIVES``.
        precision: of the engine.
        folder: where the files are.
    """

    classifier: Classifier
    objective: str
    precision: str
    folder: Path

    @classmethod
    def of(cls, classifier: Classifier, objective: str, precision: str = "fp32") -> "MapStore":
        """The store of a network in the user's cache."""
        settings = [FORMAT, classifier.digest, classifier.size_px, objective, precision]
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]
        return cls(classifier, objective, precision, cache_dir() / "papers" / key)

    def path(self, digest: str) -> Path:
        """The file of an image."""
        return self.folder / digest[:2] / f"{digest}.npz"

    def fill(
        self, samples: Sequence[Sample], title: str, console: Console, threads: int = 0
    ) -> "Images":
        """Compute the maps that are missing, and say how far that is and how long it takes."""
        digests, sizes_px, missing = [], [], []
        for sample in samples:
            image = sample.read()
            digest = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()[:32]
            digests.append(digest)
            sizes_px.append(size_of(image))
            if not self.path(digest).exists():
                missing.append((digest, sample))
        if missing:
            self._compute(missing, title, console, threads)
        return Images(self, tuple(digests), tuple(sizes_px))

    def _compute(
        self, missing: Sequence[tuple[str, Sample]], title: str, console: Console, threads: int
    ) -> None:
        engine = OpenVinoEngine(_graph(self.classifier, self.objective), self.precision, threads)
        columns = (
            TextColumn(f"maps of {title}, {self.precision}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Localizer(engine) as localizer, Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=len(missing))
            for start in range(0, len(missing), BATCH):
                some = missing[start : start + BATCH]
                images = [localizer.prepare(sample.read()) for _, sample in some]
                images += [images[-1]] * (BATCH - len(images))
                wanted = np.full(BATCH, -1, np.int64)
                outputs = engine.infer({IMAGE: np.stack(images), WANTED_CLASS: wanted})
                for place, (digest, _) in enumerate(some):
                    maps = np.stack([outputs[f"{each}_out"][place] for each in AGGREGATIONS])
                    peaks = maps.max(axis=(1, 2)) + 1e-30
                    with whole_file(self.path(digest)) as part, part.open("wb") as file:
                        np.savez(
                            file,
                            maps=(maps / peaks[:, None, None]).astype(np.float16),
                            peaks=peaks.astype(np.float32),
                            pooled=outputs["average_out"][place].astype(np.float32),
                            class_index=np.int64(outputs["class_index"][place]),
                        )
                progress.advance(task, len(some))


@dataclass(frozen=True)
class Images:
    """The images of a set whose maps are stored, in order.

    Attributes:
        store: where the maps are.
        digests: of the images.
        sizes_px: (width, height) of each.
    """

    store: MapStore
    digests: tuple[str, ...]
    sizes_px: tuple[SizePx, ...]

    def __len__(self) -> int:
        return len(self.digests)

    def take(self, rows: Sequence[int]) -> "Images":
        """Some of the images."""
        return Images(
            self.store,
            tuple(self.digests[row] for row in rows),
            tuple(self.sizes_px[row] for row in rows),
        )

    def maps(self, aggregation: str, rows: Sequence[int] | None = None) -> Map32:
        """The maps of some images as rows, float32 ``[n, M]`` with M pixels; all are not kept."""
        which = AGGREGATIONS.index(aggregation)
        found = []
        for row in range(len(self)) if rows is None else rows:
            with np.load(self.store.path(self.digests[row])) as stored:
                found.append(
                    stored["maps"][which].astype(np.float32).ravel() * stored["peaks"][which]
                )
        return np.array(found)

    def chunks(self, aggregation: str) -> Iterator[tuple[slice, Map32]]:
        """All maps, ``AT_ONCE`` at a time: where they stand, and their rows."""
        for start in range(0, len(self), AT_ONCE):
            stop = min(start + AT_ONCE, len(self))
            yield slice(start, stop), self.maps(aggregation, range(start, stop))

    def pooled(self) -> Map32:
        """The last feature maps, averaged over cells, ``[N, C]``."""
        found = []
        for digest in self.digests:
            with np.load(self.store.path(digest)) as stored:
                found.append(stored["pooled"])
        return np.array(found)


def _graph(classifier: Classifier, objective: str) -> onnx.ModelProto:
    """A graph of one backward pass that publishes the map of each aggregation, ``max_out`` and
    ``mean_out``, and the last feature maps averaged over cells, ``average_out``.
    """
    graph = Graph()
    pixels, normalised = append_preprocessing(
        graph, BATCH, classifier.shape, classifier.preprocessing
    )
    wanted = graph.input(WANTED_CLASS, INT64, (BATCH,))
    forward = classifier.append(graph, normalised)
    class_index, _ = (
        append_no_class(graph, wanted)
        if classifier.network.classless
        else append_chosen_class(graph, forward, wanted)
    )
    cotangents = objective_cotangents(graph, forward, class_index, objective)
    gradient = attach_gradient(graph, cotangents, [pixels])[pixels]
    for aggregation in AGGREGATIONS:
        graph.output(aggregated(graph, gradient, aggregation, aggregation), f"{aggregation}_out")
    cells = graph.constant([2, 3], np.int64)
    last = forward.layers.get("pool5", forward.last)
    graph.output(graph.add("ReduceMean", last, cells, keepdims=0), "average_out")
    graph.output(class_index, "class_index")
    return graph.model(
        stamp(classifier, MapSpec(objective), None, None, graph.shape(forward.scores)[1])
    )
