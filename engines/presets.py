"""The cheaper presets that a latency budget has of what a user chose.

They come in this order, for what it costs in accuracy: precision, then depth of the backward pass
and input size (which come with a head that was fitted for them, or with the training-free box), and
last a heat map that is not drawn afresh for every frame.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pkgutil import resolve_name

import onnx

from engines.backends.registry import candidates
from engines.build import AnyHead
from engines.choose import choose_head, choose_quantization, chosen_spec
from engines.dense import DenseHead
from engines.graph import Graph
from engines.head import Head, shipped_heads
from engines.maps import PIXELS, MapSpec
from engines.networks.registry import Classifier
from engines.options import EngineOptions

PRECISION_COST = {"fp32": 1.0, "bf16": 0.53, "int8": 0.37}
"""Time of a graph beside that in fp32, where the processor computes in it natively (measured on the
compact network).
"""
DENSE_PRODUCTS = 340e6
"""What a dense head costs besides the network, in multiplications of the latter: it is hundreds of
small nodes, at every size (measured).
"""
SIZE_STEP_PX = 32
"""Of presets of one network: networks take multiples of it."""
SMALLEST_SHARE = 0.5
"""Of the usual side: below it, a training-free box finds little."""
DENSE_SHARES = (0.8, 0.6)
"""Sides of a dense head's presets beside the usual one."""
CHEAPEST_MODEL = "compact"
"""The last preset of the default network, where one object is looked for."""
COARSE_SIDE = 8  # pixels of the image that one of an inner map stands for
SPARSE_HEAT_MAP = 8
WORTH_A_STEP = 0.9


@dataclass(frozen=True)
class Preset:
    """One setting.

    Attributes:
        name: what distinguishes it, for people.
        choice: what to open.
        cost: estimated time in the engine, beside the other presets'.
        heat_map_every: draw a fresh heat map only every so many frames.
    """

    name: str
    choice: EngineOptions
    cost: float
    heat_map_every: int = 1


def presets(choice: EngineOptions) -> list[Preset]:
    """The settings from what was chosen to the cheapest, each estimated to be cheaper than the one
    before.

    With a head that the user named, precision and heat map are all that changes, and the input of a
    dense head: another head might look for something else.

    Raises:
        ModelError: the network, weights or head of the choice cannot be used.
        EngineError: no preset's precision can be run here.
    """
    classifier = choice.classifier()
    top, *others = _variants(choice, classifier)
    ladder = [_preset(top, precision) for precision in _precisions(choice, classifier)]
    cheaper = []
    for other in others:
        *_, cheapest = _precisions(replace(other.choice, precision="auto"), other.classifier)
        cheaper.append(_preset(other, cheapest))
    for preset in sorted(cheaper, key=lambda preset: -preset.cost):
        if preset.cost < WORTH_A_STEP * ladder[-1].cost:
            ladder.append(preset)
    last = ladder[-1]
    return [
        *ladder,
        replace(
            last,
            name=f"{last.name}, heat map every {SPARSE_HEAT_MAP}th",
            heat_map_every=SPARSE_HEAT_MAP,
        ),
    ]


@dataclass(frozen=True)
class _Variant:
    """What stays the same from precision to precision."""

    choice: EngineOptions
    classifier: Classifier
    name: str
    products: float  # of the network, forward and backward


def _preset(variant: _Variant, precision: str) -> Preset:
    choice = replace(variant.choice, precision=precision, size_px=variant.classifier.size_px)
    cost = PRECISION_COST[precision] * variant.products
    return Preset(f"{precision}, {variant.name}", choice, cost)


def _precisions(choice: EngineOptions, classifier: Classifier) -> list[str]:
    """The chosen precision and the cheaper ones that this machine runs, int8 only where there is a
    calibration.

    Raises:
        EngineError: the chosen one is not among them.
        ModelError: int8 is chosen, and there is no calibration.
    """
    backend = candidates(choice.backend)[-1]
    if not backend.native_precisions:
        return ["fp32"]
    calibrated, named = _calibrated(choice, classifier), choice.calibration is not None
    chosen, native = resolve_name(backend.native_precisions)(choice.precision, calibrated, named)
    return [chosen, *(p for p in native if PRECISION_COST[p] < PRECISION_COST[chosen])]


def _calibrated(choice: EngineOptions, classifier: Classifier) -> bool:
    """Whether int8 can be had.

    Raises:
        ModelError: it is asked for, and there is no calibration.
    """
    asked = choice if choice.precision == "int8" else replace(choice, precision="auto")
    return (
        choose_quantization(
            asked, classifier, chosen_spec(choice, choose_head(choice, classifier), classifier)
        )
        is not None
    )


def _variants(choice: EngineOptions, classifier: Classifier) -> Iterator[_Variant]:
    """What was chosen, then every other head or training-free setting that may take its place."""
    head = choose_head(choice, classifier)
    depth, whole = backward_shares(classifier), forward_products(classifier)

    def variant(changed: EngineOptions, size_px: int, deepest: str) -> _Variant:
        products = whole * (size_px / classifier.size_px) ** 2 * (1 + depth[deepest])
        resized = replace(classifier, size_px=size_px)
        if isinstance(head, DenseHead):
            return _Variant(changed, resized, f"{size_px} px", products + DENSE_PRODUCTS)
        return _Variant(changed, resized, f"{size_px} px, back to {deepest}", products)

    usual, coarse = _deepest(head, depth), _coarse_layer(classifier)
    yield variant(choice, classifier.size_px, usual)
    if isinstance(head, DenseHead):
        for share in DENSE_SHARES:
            size_px = round(share * classifier.size_px / SIZE_STEP_PX) * SIZE_STEP_PX
            if 0 < size_px < classifier.size_px:
                yield variant(choice, size_px, usual)
        if choice.default_head is not None and choice.objects == 1:
            yield _of_cheapest_model(choice)
    elif choice.head is not None:
        return
    elif isinstance(head, Head):
        for name, other in shipped_heads(classifier).items():
            fits = isinstance(other, Head) and other.spec.objective == head.spec.objective
            if fits and other.size_px <= head.size_px and other.digest != head.digest:
                changed = replace(choice, head=name, layer=None)
                yield variant(changed, other.size_px, _deepest(other, depth))
    else:
        for size_px in range(
            classifier.size_px, int(SMALLEST_SHARE * classifier.size_px) - 1, -SIZE_STEP_PX
        ):
            yield variant(choice, size_px, usual)
            if head is not None and depth[coarse] < depth[usual]:
                yield variant(replace(choice, layer=coarse), size_px, coarse)


def _of_cheapest_model(choice: EngineOptions) -> _Variant:
    """The cheapest network with its usual head, in place of what was chosen."""
    changed = replace(choice, model=CHEAPEST_MODEL, size_px=None)
    usual = next(_variants(changed, changed.classifier()))
    return replace(usual, name=f"{CHEAPEST_MODEL} at {usual.name}")


def _deepest(head: AnyHead | None, depth: Mapping[str, float]) -> str:
    """The layer nearest to the image that the head's maps are differentiated with respect to."""
    spec = head.spec if head else MapSpec()
    wanted = [
        (spec.signal, spec.layer),
        *((f.signal, f.layer) for f in (head.features if isinstance(head, Head) else ())),
    ]
    return max(
        (layer for signal, layer in wanted if signal != "activation"),
        key=lambda layer: depth[layer],
    )


def backward_shares(classifier: Classifier) -> dict[str, float]:
    """For ``pixels`` and every layer, the share of the forward pass's products behind it: what
    going back to it costs again.
    """
    graph, forward = classifier.forward_graph()
    done, done_at = 0, {PIXELS: 0}
    for node in graph.nodes:
        done += _products(graph, node)
        done_at |= dict.fromkeys(node.output, done)
    tensors = {PIXELS: PIXELS, **forward.layers}
    return {layer: 1 - done_at.get(tensor, 0) / max(done, 1) for layer, tensor in tensors.items()}


def forward_products(classifier: Classifier) -> int:
    """Multiplications of the forward pass."""
    graph, _ = classifier.forward_graph()
    return sum(_products(graph, node) for node in graph.nodes)


def _products(graph: Graph, node: onnx.NodeProto) -> int:
    """Multiplications of a node, as far as they matter."""
    if node.op_type == "Conv":
        return math.prod(graph.shape(node.output[0])) * math.prod(graph.shape(node.input[1])[1:])
    if node.op_type in ("Gemm", "MatMul"):
        return math.prod(graph.shape(node.output[0])) * graph.shape(node.input[0])[-1]
    return 0


def _coarse_layer(classifier: Classifier) -> str:
    """The layer nearest to the image that has a value for ``COARSE_SIDE`` x ``COARSE_SIDE`` pixels
    or more; else the pixels.
    """
    graph, forward = classifier.forward_graph()
    for layer, tensor in forward.layers.items():
        shape = graph.shape(tensor)
        if len(shape) == 4 and 1 < shape[2] * COARSE_SIDE <= classifier.size_px:
            return layer
    return PIXELS
