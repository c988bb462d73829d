"""The known networks, one record each: the names that ``--model`` takes, and how each becomes a
classifier.
"""

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np

from engines.downloads import Download, cache_dir, downloaded
from engines.engine import Array
from engines.errors import DownloadError, EngineError, ModelError, install_packages
from engines.files import read_safetensors
from engines.graph import FLOAT, Graph
from engines.networks import alexnet, efficientnet_lite, squeezenet, vgg
from engines.networks.network import Forward, Network, Shape, Weights, WeightsPackage
from engines.networks.onnx_network import network_of_file
from engines.networks.packages import PACKAGES, exported, is_packaged
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
DEFAULT_MODEL = os.environ.get("SIGHTLINE_MODEL") or efficientnet_lite.LITE0.name
"""The network that runs where none is named. A slow machine may have another one."""


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
        size_px: side of the input, the longer one where it is no square.
        digest: sha256 of architecture, preprocessing and weights: what heads are tied to.
        weights: float32 arrays by name; empty where the network came as an ONNX file.
        class_names: of its classes, where the weights say them (``finetune`` writes such); else see
            ``class_names``.
        body_digest: the digest that it has without ``Network.class_layers``, or else without its
            last linear layer: what heads that read no class scores are tied to. Empty where neither
            is known.
        other_shape: of the input, where it is no square. The longer side is ``size_px``.
    """

    network: Network
    size_px: int
    digest: str
    weights: Weights = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    body_digest: str = ""
    other_shape: Shape | None = None

    @property
    def shape(self) -> Shape:
        """Of the input: R rows and S columns."""
        return self.other_shape or (self.size_px, self.size_px)

    @property
    def name(self) -> str:
        """The network's name; of an ONNX file, the file's."""
        return self.network.name

    @property
    def preprocessing(self) -> Preprocessing:
        """What the network's input is."""
        return self.network.preprocessing

    def append(self, graph: Graph, x_nchw: str) -> Forward:
        """Append the forward graph, which reads the normalised input ``[N, 3, R, S]``.

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
        x = graph.input("pixels", FLOAT, (batch, 3, *self.shape))
        return graph, self.append(graph, x)


@cache
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """(WordNet id, name) of the 1,000 ImageNet-1k classes in their usual order."""
    lines = (ASSETS / "imagenet_classes.tsv").read_text(encoding="utf-8").splitlines()
    return tuple((wnid, name) for wnid, name in (line.split("\t") for line in lines))


def load_classifier(
    model: str = DEFAULT_MODEL,
    weights: str | None = None,
    size_px: int | None = None,
    given: GivenInput = GivenInput(),
    class_layer: str | None = None,
) -> Classifier:
    """The classifier that ``--model``, ``--weights``, ``--size`` and ``--class-layer`` name.

    Args:
        model: a name in ``NETWORKS``, the path of an ``.onnx`` classifier, or a network of a
            package such as ``timm:resnet50``.
        weights: a file, a name to download, or ``random``; the network's own when None.
        size_px: input side; the network's usual one when None.
        given: what is said of its input and output.
        class_layer: what takes the place of its class layers, see ``with_class_layer``.

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
    if is_packaged(model):
        path = exported(model, weights, size_px)
        network, digest = network_of_file(path, size_px, given, model)
        return Classifier(
            network, size_px or network.size_px, digest, class_names=network.class_names
        )
    if model not in NETWORKS:
        raise ModelError(
            f"unknown model '{model}': use {', '.join(NETWORKS)}, the path of an .onnx classifier,"
            f" or a network of a package: {', '.join(f'{name}:NAME' for name in PACKAGES)}"
        )
    known = NETWORKS[model]
    values: Weights = (
        known.random_weights() if weights == "random" else load_weights(model, weights)
    )
    names = load_class_names(weights) if weights else ()
    if given.labels is not None:
        names = read_labels(Path(given.labels))
    found = classifier_of(known, values, names, size_px, given)
    return with_class_layer(found, class_layer) if class_layer else found


def classifier_of(
    known: Network,
    values: Weights,
    names: tuple[str, ...] = (),
    size_px: int | None = None,
    given: GivenInput = GivenInput(),
) -> Classifier:
    """The classifier of a known network with these weights.

    Args:
        known: the record of the network.
        values: under the names that its ``forward`` reads.
        names: of its classes, where the weights say them.
        size_px: input side; the network's usual one when None.
        given: what is said of its input.

    Raises:
        ModelError: more is said of its input than how it becomes a square.
    """
    network = _resized(known.of_weights(known, values), given)
    digest, body_digest = _digest(known.name, network.preprocessing, values), ""
    behind = known.class_layers or tuple(f"{each}." for each in [network.last_linear] if each)
    if behind:
        body = {n: v for n, v in values.items() if not n.startswith(behind)}
        body_digest = _digest(known.name, network.preprocessing, body)
    return Classifier(
        network,
        size_px or network.size_px,
        digest,
        values,
        names or network.class_names,
        body_digest,
    )


def with_class_layer(classifier: Classifier, class_layer: str) -> Classifier:
    """The network with another layer behind its convolutions: a linear one over the global average
    of its last pool.

    Args:
        classifier: the network; what it has behind the convolutions is left out.
        class_layer: a file that ``finetune`` wrote, or the name of a shipped one, such as
            ``voc2007``.

    Raises:
        ModelError: the network takes none, or the layer cannot be read or was fitted on other
            convolutions.
    """
    network = NETWORKS.get(classifier.name)
    if network is None or not network.class_layers:
        known = [name for name, each in NETWORKS.items() if each.class_layers]
        raise ModelError(
            f"a class layer goes with {', '.join(known)}, not with {classifier.name}",
            option=("class_layer", "model"),
        )
    shipped = ASSETS / f"{network.name}_{class_layer}_classes.safetensors"
    is_name = re.fullmatch("[a-z0-9]+", class_layer) and shipped.exists()
    path = shipped if is_name else Path(class_layer)
    tensors, metadata = read_safetensors(path, "class layer")
    linear = ("classifier.weight", "classifier.bias")
    adaptation = tuple(f"{name}.{kind}" for name in vgg.ADAPTATION for kind in ("weight", "bias"))
    names = adaptation if adaptation[0] in tensors else linear
    layer = {name: tensors[name] for name in names if name in tensors}
    if len(layer) != len(names) or "body" not in metadata:
        raise ModelError(
            f"class layer {path} is not one that 'finetune' wrote for these convolutions",
            option="class_layer",
        )
    if metadata["body"] != classifier.body_digest:
        raise ModelError(
            f"class layer {path} was fitted on other convolutions or another input: fit one for"
            " these with 'finetune'",
            option="class_layer",
        )
    body = {n: v for n, v in classifier.weights.items() if not n.startswith(network.class_layers)}
    return with_weights(classifier, network, body | layer, load_class_names(str(path)))


def with_last_linear(
    classifier: Classifier, weight: Array, bias: Array, names: tuple[str, ...]
) -> Classifier:
    """The network with another last linear layer, ``[K, D]`` and ``[K]``, and the names of its K
    classes.
    """
    prefix = classifier.network.last_linear
    layer = {f"{prefix}.weight": weight, f"{prefix}.bias": bias}
    values = {**classifier.weights, **{n: np.asarray(v, np.float32) for n, v in layer.items()}}
    known = NETWORKS.get(classifier.name, classifier.network)
    return with_weights(classifier, known, values, names)


def with_weights(
    classifier: Classifier, known: Network, values: Weights, names: tuple[str, ...]
) -> Classifier:
    """The network with other weights, and the same input."""
    given = GivenInput(resize=classifier.preprocessing.resize)
    return classifier_of(known, values, names, classifier.size_px, given)


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
    elsewhere = ""
    if network.package is not None and network.elsewhere:
        elsewhere = f"; or {install_packages(network.package.requirement)}, {network.elsewhere}"
    if weights is None and network.shipped is not None:
        path = ASSETS / network.shipped
    elif weights is None and network.package is not None and _is_first(network):
        path = _packaged(model, network.package)
    elif weights is None and network.download is None:
        raise ModelError(
            f"no weights of {model} are shipped or published: name a file of them, or random"
            f"{elsewhere}"
        )
    elif weights is None or weights in downloads:
        try:
            path = downloaded(downloads[weights or model], cache_dir() / "weights")
        except DownloadError as error:
            raise DownloadError(f"{error}{elsewhere}") from error
    else:
        path = Path(weights)
    if not path.exists():
        raise ModelError(
            f"weights {path} do not exist: give a file, or one of {', '.join(downloads)}, or random"
            f"{elsewhere}"
        )
    return network.renamed(read_weights(path, network.class_layers))


def _is_first(network: Network) -> bool:
    """Whether the package of a network goes before its download."""
    package = network.package
    installed = package is not None and importlib.util.find_spec(package.module) is not None
    return installed or network.download is None


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
