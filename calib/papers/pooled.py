"""Pooled maps of the last convolution, computed once for each image and kept on disk: what Bency's
tables are fitted on and cut.

Each image has a file of its own, under the digest of its pixels. So a run that was stopped goes on,
and any part of a set can be used.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engines.backends.openvino import OpenVinoEngine
from engines.build import IMAGE, append_preprocessing
from engines.downloads import cache_dir
from engines.files import whole_file
from engines.graph import Graph
from engines.localizer import ImageBgr
from engines.networks.registry import Classifier
from engines.resizing import resized
from engines.search.beam_published import build_maps_graph

FORMAT = 1
BEFORE_LAST = "input of the last layer"
"""Taken as a layer's name."""
BATCH = 4
"""Images a call: so many take a fifth less time each than one alone."""
Maps = NDArray[np.float16]
Reader = Callable[[], ImageBgr]


@dataclass(frozen=True)
class PooledStore:
    """The maps of images, by one network.

    Attributes:
        classifier: the network; an image is squashed to its square.
        layer: whose maps they are.
        precision: of the engine.
        folder: where the files are.
    """

    classifier: Classifier
    layer: str
    precision: str
    folder: Path

    @classmethod
    def of(cls, classifier: Classifier, layer: str, precision: str = "auto") -> "PooledStore":
        """The store of a network in the user's cache; it does not depend on what lies behind the
        convolutions, where the network has parts.
        """
        body = classifier.body_digest or classifier.digest
        settings = [FORMAT, body, classifier.size_px, layer, precision]
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]
        return cls(classifier, layer, precision, cache_dir() / "papers" / f"pooled-{key}")

    def path(self, image_bgr: ImageBgr) -> Path:
        """The file of an image."""
        digest = hashlib.sha256(repr(image_bgr.shape).encode() + image_bgr.tobytes()).hexdigest()
        return self.folder / digest[:2] / f"{digest[:32]}.npy"

    def maps_of(self, readers: Sequence[Reader], title: str, console: Console) -> Maps:
        """The maps of images, ``[N, C, L, L]``; those that are missing are computed, and how far
        that is and how long it takes is shown.
        """
        return np.stack([np.load(path) for path in self.fill(readers, title, console)])

    def fill(self, readers: Sequence[Reader], title: str, console: Console) -> list[Path]:
        """Compute the maps that are missing; the files of all."""
        paths = [self.path(read()) for read in readers]
        missing = [place for place, path in enumerate(paths) if not path.exists()]
        if missing:
            self._compute([(paths[i], readers[i]) for i in missing], title, console)
        return paths

    def _compute(
        self, missing: Sequence[tuple[Path, Reader]], title: str, console: Console
    ) -> None:
        engine = OpenVinoEngine(_graph(self.classifier, self.layer), self.precision)
        side = self.classifier.size_px
        columns = (
            TextColumn(f"{self.layer} of {title}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=len(missing))
            for start in range(0, len(missing), BATCH):
                some = missing[start : start + BATCH]
                images = [resized(read(), side) for _, read in some]
                images += [images[-1]] * (BATCH - len(images))
                found = engine.infer({IMAGE: np.stack(images)})["features"]
                for place, (path, _) in enumerate(some):
                    with whole_file(path) as part, part.open("wb") as file:
                        np.save(file, found[place].astype(np.float16))
                progress.advance(task, len(some))
        engine.close()


def _graph(classifier: Classifier, layer: str) -> onnx.ModelProto:
    """Images in; ``features`` of a layer out."""
    if layer != BEFORE_LAST:
        return build_maps_graph(classifier, layer, BATCH)
    graph = Graph()
    _, x = append_preprocessing(graph, BATCH, classifier.shape, classifier.preprocessing)
    last = graph.producer(classifier.append(graph, x).scores)
    assert last is not None  # such networks end in a fully connected layer
    graph.output(last.input[0], "features")
    return graph.model()
