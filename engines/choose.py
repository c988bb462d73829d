"""Opens the engine that a user's options describe, and says which cheaper presets a latency budget
has of them.

The presets come in this order, for what it costs in accuracy: precision, then depth of the backward
pass and input size (which come with a head that was fitted for them, or with the training-free
box), and last a heat map that is not drawn afresh for every frame.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import onnx

from engines.backends.registry import AUTO, Backend, EngineRequest, candidates
from engines.build import AnyHead, build_graph
from engines.dense import DenseHead
from engines.downloads import cache_dir
from engines.engine import Engine
from engines.errors import EngineError, InputError, ModelError, SightlineError
from engines.graph import Graph
from engines.head import (
    NO_HEAD,
    Head,
    default_heuristic,
    head_path,
    load_head,
    shipped_heads,
    usual_spec,
)
from engines.int8 import Quantization, load_quantization
from engines.localizer import Localizer
from engines.maps import PIXELS, MapSpec, Method, method_of, names_of_searches
from engines.networks.network import Shape
from engines.networks.preprocessing import LETTERBOX
from engines.networks.registry import DEFAULT_MODEL, Classifier
from engines.networks.weights import ASSETS
from engines.options import EngineOptions
from engines.resizing import frame_shape


def open_localizer(
    model: str | EngineOptions = DEFAULT_MODEL,
    notify: Callable[[str], None] | None = None,
    streams: int = 1,
    batch: int = 1,
    first_px: tuple[int, int] | None = None,
    **options: Any,
) -> Localizer:
    """Load, build and compile what was chosen.

    A dense head whose images are letterboxed gets an engine for each shape of images as it comes,
    see ``engines.localizer.Localizer``.

    Args:
        model: a network's name or file, or all the common options.
        notify: gets what a user should know of it, such as why ``auto`` does not take TensorRT.
        streams: 1 for the soonest answer (live), 0 for the most answers a second (files); see
            ``OpenVinoEngine``.
        batch: images that one call takes.
        first_px: width and height of the images that come first, where that is known: no other
            engine is opened than theirs.
        options: any fields of ``EngineOptions``, which go before those of ``model``.

    Raises:
        ModelError: the model, weights or head cannot be used, or does not say how sure it is where
            that is asked for.
        EngineError: the backend cannot run them.
        TypeError: there is no such option.
    """
    choice = chosen(model, options)
    classifier = choice.classifier()
    method = method_of(choice.method, classifier.network.classless)
    if method.search and (choice.head is None or (method.published and choice.head == NO_HEAD)):
        engine = open_search(choice, classifier, streams)
        localizer = Localizer(engine)
    else:
        head = choose_head(choice, classifier)
        localizer = _open_with_head(choice, classifier, head, notify, streams, batch, first_px)
    engine = localizer.engine
    if notify is not None:
        for note in (*classifier.network.notes, *engine.losses):
            notify(note)
    localizer.objects = choice.objects
    try:
        if choice.wanted_class is not None:
            localizer.look_for(class_index(choice.wanted_class, localizer.class_names))
        localizer.abstain_below(choice.least_confidence)
    except SightlineError:
        localizer.close()
        raise
    return localizer


def _open_with_head(
    choice: EngineOptions,
    classifier: Classifier,
    head: AnyHead | None,
    notify: Callable[[str], None] | None,
    streams: int,
    batch: int,
    first_px: tuple[int, int] | None,
) -> Localizer:
    """A localizer with one engine, or one for each shape of images; see ``open_localizer``."""
    if not takes_shapes(head, classifier):
        return Localizer(open_engine(choice, classifier, head, notify, streams, batch))
    shape = frame_shape(*first_px, classifier.size_px) if first_px else None
    engine = open_engine(choice, classifier, head, notify, streams, batch, shape)

    def open_shape(shape: Shape) -> Engine:
        shaped = replace(classifier, other_shape=shape)
        same = replace(choice, backend=engine.backend)
        return open_engine(same, shaped, head, None, streams, batch)

    return Localizer(engine, open_shape)


def takes_shapes(head: AnyHead | None, classifier: Classifier) -> bool:
    """Whether the input may have the shape of the images, see ``engines.resizing.frame_shape``."""
    return isinstance(head, DenseHead) and classifier.preprocessing.resize == LETTERBOX


def chosen(model: str | EngineOptions, options: Mapping[str, Any]) -> EngineOptions:
    """The common options of a network's name, or those that are given, with some of them replaced.

    Raises:
        InputError: ``model`` is something else.
        TypeError: there is no such option.
    """
    known = EngineOptions.__dataclass_fields__
    unknown = sorted(set(options) - known.keys())
    if unknown:
        raise TypeError(f"there is no option '{unknown[0]}': there are {', '.join(known)}")
    if not isinstance(model, str | EngineOptions):
        raise InputError(
            "a model is a name, a file's path as text, or EngineOptions, not"
            f" {type(model).__name__}"
        )
    return replace(model if isinstance(model, EngineOptions) else EngineOptions(model), **options)


def choose_head(choice: EngineOptions, classifier: Classifier) -> AnyHead | None:
    """The named head, or the shipped one that fits, or the training-free one; None where none is
    wanted.

    Raises:
        ModelError: the head cannot be read, or the options contradict each other.
    """
    method = method_of(choice.method, classifier.network.classless)
    if method.search:
        raise ModelError(
            f"method {choice.method} takes several graphs and no head of one's own: it runs in"
            " demo, batch, stream and evaluate, without a head and without a budget",
            option=("method", "head", "budget_ms"),
        )
    head = _named_or_usual_head(choice, classifier, method)
    if choice.objects > 1 and not isinstance(head, DenseHead):
        raise ModelError(
            f"method {choice.method} with this head finds the main object only: for more, use a"
            f" dense head, which 'fit' makes, or method {' or '.join(names_of_searches())}",
            option=("method", "objects", "head"),
        )
    return head


def _named_or_usual_head(
    choice: EngineOptions, classifier: Classifier, method: Method
) -> AnyHead | None:
    """See ``choose_head``."""
    named = choice.head or choice.default_head
    if named == NO_HEAD:
        return None
    if named is not None:
        if not method.fitted:
            raise ModelError(
                f"method {method.name} reads the box without a fitted head: drop it, or drop the"
                f" head {named}",
                option=("method", "head"),
            )
        return load_head(head_path(named))
    shipped = shipped_heads(classifier) if method.fitted else {}
    usual = "gestalt" if classifier.network.classless else choice.method
    for name, head in shipped.items():
        is_usual = (
            name.startswith(f"{classifier.name}_{usual}") and head.size_px == classifier.size_px
        )
        if is_usual and choice.layer in (None, head.spec.layer):
            return head
    return default_heuristic(classifier, method, choice.layer)


def choose_quantization(
    choice: EngineOptions, classifier: Classifier, spec: MapSpec
) -> Quantization | None:
    """The named calibration, or the one that fits: the user's, made by ``calibrate`` before, or the
    shipped one.

    None for other precisions, and for ``auto`` where there is none or it was not certified for maps
    at this layer.

    Raises:
        ModelError: int8 is asked for, and there is none, or the named one cannot be read.
    """
    if choice.precision not in ("auto", "int8") or spec.relu_rule != "plain":
        return None
    if choice.calibration is not None:
        return load_quantization(Path(choice.calibration))
    for path in calibration_paths(classifier, spec.objective):
        if path.exists():
            found = load_quantization(path)
            return found if choice.precision == "int8" or found.layer == spec.layer else None
    if choice.precision == "auto":
        return None
    raise ModelError(
        f"no int8 calibration of these {classifier.name} weights at {classifier.size_px} px: make"
        " one with 'sightline calibrate', or name its file",
        option="calibration",
    )


def calibration_paths(classifier: Classifier, objective: str) -> tuple[Path, Path]:
    """Where a calibration of this network is: in the user's cache, where ``calibrate`` puts it, or
    among the shipped files.
    """
    network = re.sub(r"[^\w.-]", "-", classifier.name)
    name = f"{network}_{objective}_{classifier.size_px}_{classifier.digest[:12]}.int8.json"
    return cache_dir() / "calibrations" / name, ASSETS / name


def open_engine(
    choice: EngineOptions,
    classifier: Classifier,
    head: AnyHead | None,
    notify: Callable[[str], None] | None = None,
    streams: int = 1,
    batch: int = 1,
    shape: Shape | None = None,
) -> Engine:
    """Compile the graph on the chosen backend, or find it compiled and certified.

    The arguments are those of ``open_localizer``. ``shape`` is that of the images: a backend that
    has no engine for it opens the one for the classifier's own shape. None for that.
    """
    spec = chosen_spec(choice, head, classifier)
    request = EngineRequest(
        classifier,
        spec,
        head,
        batch,
        choice.precision,
        choice.threads,
        streams,
        lambda: choose_quantization(choice, classifier, spec),
        choice.calibration is not None,
    )

    def opened(backend: Backend) -> Engine:
        if shape not in (None, classifier.shape):
            with suppress(SightlineError):
                shaped = replace(classifier, other_shape=shape)
                return backend.opened(replace(request, classifier=shaped))
        return backend.opened(request)

    *first, last = candidates(choice.backend)
    for backend in first:
        try:
            return opened(backend)
        except EngineError as error:
            if notify is not None:
                notify(f"not {backend.label}: {error}")
    try:
        return opened(last)
    except EngineError as error:
        if not last.otherwise:
            raise
        raise EngineError(f"{error}; {last.otherwise}", option="backend") from error


def open_search(choice: EngineOptions, classifier: Classifier, streams: int = 1) -> Engine:
    """Compile the graphs of a method that searches, on OpenVINO, which is the only backend that
    runs them.

    Raises:
        EngineError: another backend is asked for, or the precision cannot be had.
        ModelError: int8 is asked for, or a graph cannot be built.
    """
    method = method_of(choice.method)
    if choice.backend not in (AUTO, "openvino"):
        raise EngineError(
            f"method {method.name} asks several graphs in turn, on OpenVINO only: use backend"
            " openvino",
            option=("method", "backend"),
        )
    if choice.precision == "int8":
        raise ModelError(
            f"method {method.name} is not calibrated for int8: use bf16 or fp32",
            option=("method", "precision"),
        )
    from engines.backends.openvino import OpenVinoEngine  # only where it is used

    def compiled(graph: onnx.ModelProto) -> Engine:
        return OpenVinoEngine(graph, choice.precision, choice.threads, streams)

    search = method.search
    open_ = resolve_name(search) if isinstance(search, str) else search
    engine: Engine = open_(classifier, compiled, choice)
    return engine


def build_chosen(
    choice: EngineOptions,
    batch: int = 1,
    frames_px: tuple[int, int] | None = None,
    notify: Callable[[str], None] | None = None,
) -> onnx.ModelProto:
    """The graph of what was chosen, not compiled.

    Args:
        choice: all the common options.
        batch: images a call.
        frames_px: width and height of the images, whose shape the input has; None for a square.
        notify: gets what was found or assumed of a foreign network.

    Raises:
        ModelError: see ``open_localizer``; or the input is a square, whatever the images are.
    """
    classifier = choice.classifier()
    if notify is not None:
        for note in classifier.network.notes:
            notify(note)
    head = choose_head(choice, classifier)
    if frames_px is not None:
        if not takes_shapes(head, classifier):
            raise ModelError(
                "only with a dense head whose images are letterboxed the input has the shape of"
                " frames: leave their size out",
                option=("frame_size", "head", "resize"),
            )
        shape = frame_shape(*frames_px, classifier.size_px)
        classifier = replace(classifier, other_shape=shape)
    spec = chosen_spec(choice, head, classifier)
    quantization = (
        choose_quantization(choice, classifier, spec) if choice.precision == "int8" else None
    )
    return build_graph(classifier, spec, head, batch=batch, quantization=quantization)


def chosen_spec(choice: EngineOptions, head: AnyHead | None, classifier: Classifier) -> MapSpec:
    """The map that method and head agree on.

    Raises:
        ModelError: they do not.
    """
    method = method_of(choice.method, classifier.network.classless)
    if head is not None:
        spec = head.spec
    elif method.signal is not None:
        spec = usual_spec(classifier, method, choice.layer)
    else:
        spec = MapSpec(method.objective, method.aggregation, choice.layer or PIXELS)
    if choice.layer not in (None, spec.layer):
        raise ModelError(
            f"the head reads the map at {spec.layer}, not at {choice.layer}: drop the layer, or the"
            " head",
            option=("layer", "head"),
        )
    if spec.objective != method.objective:
        raise ModelError(
            f"the head reads the {spec.objective} objective, not method {choice.method}; drop one"
            " of the two",
            option=("head", "method"),
        )
    return spec


def class_index(wanted: str, names: tuple[str, ...]) -> int:
    """Index of a class given by index, exact name, or a part of a name that only one class has.

    Raises:
        ModelError: no class or several classes fit.
    """
    if wanted.isascii() and wanted.isdigit() and len(wanted) < 10 and int(wanted) < len(names):
        return int(wanted)
    lower = [name.lower() for name in names]
    if wanted.lower() in lower:
        return lower.index(wanted.lower())
    found = [i for i, name in enumerate(lower) if wanted.lower() in name]
    if len(found) == 1:
        return found[0]
    some = ", ".join(names[i] for i in found[:6])
    raise ModelError(
        f"class '{wanted}' "
        + (f"could be {some}: write one of them" if found else "is unknown to this network"),
        option="wanted_class",
    )


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
