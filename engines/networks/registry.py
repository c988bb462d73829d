"""The known networks, one record each: the names that ``--model`` takes, and how each becomes a
classifier.
"""

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np

from engines.downloads import Download, cache_dir, downloaded
from engines.errors import EngineError, ModelError, install_packages
from engines.graph import FLOAT, Graph
from engines.networks import alexnet, efficientnet_lite, squeezenet, vgg
from engines.networks.network import Forward, Network, Weights, WeightsPackage
from engines.networks.onnx_network import network_of_file
from engines.networks.preprocessing import CROP, USUAL_CROP, GivenInput, Preprocessing
from engines.networks.sidecars import read_labels
from engines.networks.weights import ASSETS, load_class_names, read_weights

NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        vgg.COMPACT,
        vgg.VGG16,
        alexnet.ALEXNET,
        squeezenet.SQUEEZENET,
        efficientnet_lite.LITE0,
        efficientnet_lite.LITE1,
        efficientnet_lite.LITE2,
    )
}
"""The record of each network by its name. ``register_network`` adds one from outside."""


def register_network(network: Network) -> None:
    """Make a network known to every command under its name.

    Raises:
        ModelError: there is one of that name, or the name would be taken for a file.
    """
    if network.name in NETWORKS or network.name.endswith(".onnx"):
        raise ModelError(f"a network cannot be called '{network.name}': choose another name")
    NETWORKS[network.name] = network


@dataclass(frozen=True)
class Classifier:
    """A network with its weights, which can be put into a graph.

    Attributes:
        network: the record of the network, for these weights.
        size_px: side of the input.
        digest: sha256 of architecture, preprocessing and weights: what heads are tied to.
        weights: float32 arrays by name; empty where the network came as an ONNX file.
        class_names: of its classes, where the weights say them (``finetune`` writes such); else see
            ``class_names``.
    """

    network: Network
    size_px: int
    digest: str
    weights: Weights = field(default_factory=dict)
    class_names: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The network's name; of an ONNX file, the file's."""
        return self.network.name

    @property
    def preprocessing(self) -> Preprocessing:
        """What the network's input is."""
        return self.network.preprocessing

    def append(self, graph: Graph, x_nchw: str) -> Forward:
        """Append the forward graph, which reads the normalised input ``[N, 3, S, S]``.

        Raises:
            ModelError: the weights do not fit, or the network does not take inputs of this size.
        """
        return self.network.forward(graph, x_nchw, self.weights)

    def last_layer(self) -> str:
        """Name of the layer that is ``Forward.last``; empty where no layer is."""
        if self.network.last_layer is not None:
            return self.network.last_layer
        _, forward = self.forward_graph()
        return next((name for name, each in forward.layers.items() if each == forward.last), "")

    def forward_graph(self, batch: int = 1) -> tuple[Graph, Forward]:
        """The forward graph alone, and its landmarks; its input is called ``pixels``.

        Raises:
            ModelError: see ``append``.
        """
        graph = Graph()
        x = graph.input("pixels", FLOAT, (batch, 3, self.size_px, self.size_px))
        return graph, self.append(graph, x)


@cache
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """(WordNet id, name) of the 1,000 ImageNet-1k classes in their usual order."""
    lines = (ASSETS / "imagenet_classes.tsv").read_text(encoding="utf-8").splitlines()
    return tuple((wnid, name) for wnid, name in (line.split("\t") for line in lines))


def load_classifier(
    model: str = "compact",
    weights: str | None = None,
    size_px: int | None = None,
    given: GivenInput = GivenInput(),
) -> Classifier:
    """The classifier that ``--model``, ``--weights`` and ``--size`` name.

    Args:
        model: a name in ``NETWORKS``, or the path of an ``.onnx`` classifier.
        weights: a file, a name to download, or ``random``; the network's own when None.
        size_px: input side; the network's usual one when None.
        given: what is said of its input and output.

    Raises:
        ModelError: the model is unknown, its weights are missing or do not fit, or what is said of
            it does not.
        InputError: what is said of its input contradicts itself.
        DownloadError: the weights cannot be fetched.
    """
    if model.endswith(".onnx"):
        network, digest = network_of_file(Path(model), size_px, given)
        return Classifier(
            network, size_px or network.size_px, digest, class_names=network.class_names
        )
    if model not in NETWORKS:
        raise ModelError(
            f"unknown model '{model}': use {', '.join(NETWORKS)} or the path of an .onnx classifier"
        )
    known = NETWORKS[model]
    values: Weights = (
        known.random_weights() if weights == "random" else load_weights(model, weights)
    )
    network = _resized(known.of_weights(known, values), given)
    names = load_class_names(weights) if weights else ()
    if given.labels is not None:
        names = read_labels(Path(given.labels))
    digest = _digest(model, network.preprocessing, values)
    return Classifier(network, size_px or network.size_px, digest, values, names)


def _resized(network: Network, given: GivenInput) -> Network:
    """A known network with the way to make squares that is given, the only part of its input that
    is not fixed.

    Raises:
        ModelError: another part is given.
    """
    named = {name: getattr(given, name) for name in ("mean", "std", "scale", "order", "output")}
    if fixed := tuple(name for name, value in named.items() if value is not None):
        raise ModelError(
            f"the input and output of {network.name} are known: {', '.join(fixed)} can be said of"
            " an .onnx classifier only",
            option=fixed,
        )
    if given.resize is None:
        return network
    share = USUAL_CROP if given.resize == CROP else 1.0
    changed = replace(network.preprocessing, resize=given.resize, crop_share=share)
    return replace(network, preprocessing=changed)


def load_weights(model: str, weights: str | None = None) -> dict[str, np.ndarray]:
    """Weights of a network as float32 arrays, under the names that its ``forward`` reads.

    Args:
        model: a name in ``NETWORKS``.
        weights: a file, or the name of a network whose weights can be downloaded; None for the
            shipped weights, else those of an installed package, else the download of that network.

    Raises:
        ModelError: the file is missing or unreadable, or no weights of the network are published.
        DownloadError: it cannot be fetched.
    """
    network = NETWORKS[model]
    downloads = _downloads()
    if weights is None and network.shipped is not None:
        path = ASSETS / network.shipped
    elif weights is None and network.package is not None:
        path = _packaged(model, network.package)
    elif weights is None and network.download is None:
        raise ModelError(
            f"no weights of {model} are shipped or published: name a file of them, or random"
        )
    elif weights is None or weights in downloads:
        path = downloaded(downloads[weights or model], cache_dir() / "weights")
    else:
        path = Path(weights)
    if not path.exists():
        raise ModelError(
            f"weights {path} do not exist: give a file, or one of {', '.join(downloads)}, or random"
        )
    return network.renamed(read_weights(path))


def _packaged(model: str, package: WeightsPackage) -> Path:
    """The file of an installed package; nothing of the package is run.

    Raises:
        ModelError: it is not installed.
    """
    found = importlib.util.find_spec(package.module)
    if found is None:
        raise ModelError(
            f"the weights of {model} are in a package that is not installed:"
            f" {install_packages(package.requirement)}, or name a file of them, or random"
        )
    return Path(next(iter(found.submodule_search_locations or [""]))) / package.file


def _downloads() -> Mapping[str, Download]:
    """The published weights by the network's name."""
    return {name: each.download for name, each in NETWORKS.items() if each.download is not None}


def _digest(name: str, preprocessing: Preprocessing, values: Weights) -> str:
    digest = hashlib.sha256(json.dumps([name, preprocessing.stored()]).encode())
    for key in sorted(values):
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(values[key]).data)
    return digest.hexdigest()


def class_names(count: int) -> tuple[str, ...]:
    """ImageNet-1k names for 1,000 classes, else ``class 0`` ..."""
    if count == 1000:
        return tuple(name for _, name in imagenet_classes())
    return tuple(f"class {i}" for i in range(count))


def class_count(classifier: Classifier) -> int:
    """How many classes the network scores."""
    graph, forward = classifier.forward_graph()
    return graph.shape(forward.scores)[1]


def known_layer(
    classifier: Classifier, forward: Forward, usual: str | None, wanted: str | None
) -> str:
    """The layer that is asked for, or the usual one of the network.

    Raises:
        EngineError: the network has no such layer, or none is known for it.
    """
    layer = wanted or usual
    if layer in forward.layers:
        return str(layer)
    reason = f"has no layer '{layer}'" if layer else "has no usual layer for this method: name one"
    raise EngineError(
        f"{classifier.name} {reason}; it has {', '.join(forward.layers)}", option="layer"
    )
