"""Opens the engine that a user's options describe."""

import difflib
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
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
from engines.head import (
    NO_HEAD,
    PUBLISHED_SIGMA_PX,
    Heuristic,
    default_heuristic,
    head_path,
    load_head,
    shipped_heads,
    usual_spec,
)
from engines.int8 import Quantization, load_quantization
from engines.localizer import Localizer
from engines.maps import METHODS, PIXELS, MapSpec, Method, method_of, names_of_searches
from engines.networks.network import Shape
from engines.networks.preprocessing import LETTERBOX
from engines.networks.registry import DEFAULT_MODEL, Classifier
from engines.networks.weights import ASSETS
from engines.options import EngineOptions
from engines.resizing import frame_shape

MOST_NEAR = 6
"""So many names are listed that a wanted one could be."""
MOST_LETTERS = 100
"""So many letters of a wanted name are compared with the known ones."""


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
        batch: images that one call takes; 0 for as many as give the most answers a second.
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
    if choice.as_published and not (method.published or method.published_map):
        known = ", ".join(
            each.name for each in METHODS.values() if each.published or each.published_map
        )
        raise ModelError(
            f"only {known} have a form as published, not method {method.name}",
            option=("as_published", "method"),
        )
    if method.search and (choice.head is None or (method.headless and choice.head == NO_HEAD)):
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
            localizer.look_for(
                class_index(choice.wanted_class, localizer.class_names, localizer.names)
            )
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
        same_map = choice.aggregation in (None, head.spec.aggregation) and not choice.as_published
        if is_usual and same_map and choice.layer in (None, head.spec.layer):
            return head
    return _training_free(choice, classifier, method)


def _training_free(choice: EngineOptions, classifier: Classifier, method: Method) -> Heuristic:
    """The training-free head: the network's own, or as published, with what else is asked for.

    Raises:
        ModelError: the aggregation is unknown.
    """
    found = default_heuristic(classifier, method, choice.layer)
    if choice.as_published and method.published_map:
        layer = choice.layer or PIXELS
        spec = replace(method.published_map, layer=layer)
        found = Heuristic(spec, PUBLISHED_SIGMA_PX / classifier.size_px)
    if choice.aggregation is not None:
        found = replace(found, spec=replace(found.spec, aggregation=choice.aggregation))
    if choice.sigma_px is not None:
        found = replace(found, sigma=choice.sigma_px / classifier.size_px)
    return found


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
                notify(f"not {backend.label}: {error}{_other_use_of_gpu()}")
    try:
        return opened(last)
    except EngineError as error:
        if not last.otherwise:
            raise
        raise EngineError(f"{error}; {last.otherwise}", option="backend") from error


def _other_use_of_gpu() -> str:
    """Words that name PyTorch, where there are a GPU and PyTorch."""
    from engines.backends.cuda import probe_gpu

    try:
        gpu = probe_gpu()
    except EngineError:
        return ""
    return f"; backend torch computes on {gpu}" if find_spec("torch") else ""


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

    search = method.published if choice.as_published else method.search
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
    elif choice.as_published and method.published_map:
        spec = replace(method.published_map, layer=choice.layer or PIXELS)
    elif method.signal is not None:
        spec = usual_spec(classifier, method, choice.layer)
    else:
        spec = MapSpec(method.objective, method.aggregation, choice.layer or PIXELS)
    if head is None and choice.aggregation is not None:
        spec = replace(spec, aggregation=choice.aggregation)
    if choice.aggregation not in (None, spec.aggregation):
        raise ModelError(
            f"the head reads the {spec.aggregation} over channels, not the {choice.aggregation}:"
            " drop one of the two",
            option=("aggregation", "head"),
        )
    if choice.layer not in (None, spec.layer):
        raise ModelError(
            f"the head reads the map at {spec.layer}, not at {choice.layer}: drop the layer, or the"
            " head",
            option=("layer", "head"),
        )
    published = {method.published_map.objective} if method.published_map else set()
    known = published if choice.as_published and published else {method.objective, *published}
    if spec.objective not in known:
        raise ModelError(
            f"the head reads the {spec.objective} objective, not method {choice.method}; drop one"
            " of the two",
            option=("head", "method"),
        )
    return spec


def class_index(wanted: str, classes: tuple[str, ...], names: tuple[str, ...] = ()) -> int:
    """Index of what is to be looked for, see ``Localizer.look_for``.

    Args:
        wanted: the exact name of a box or of a class, the index of a class, or a part that only one
            of all names has. A name of boxes goes before a class of the same spelling.
        classes: of the network.
        names: of boxes, see ``Localizer.names``.

    Raises:
        ModelError: nothing fits, or several do.
    """
    text, indices = wanted.lower(), dict[str, int]()
    for place, name in enumerate(names):
        indices.setdefault(name.lower(), len(classes) + place)
    if text in indices:
        return indices[text]
    if wanted.isascii() and wanted.isdigit() and len(wanted) < 10 and int(wanted) < len(classes):
        return int(wanted)
    for place, name in enumerate(classes):
        indices.setdefault(name.lower(), place)
    if text in indices:
        return indices[text]
    found = [name for name in indices if text in name]
    if len(found) == 1:
        return indices[found[0]]
    near = found or difflib.get_close_matches(text[:MOST_LETTERS], indices, MOST_NEAR)
    known = (*classes, *names)
    some = ", ".join(known[indices[name]] for name in near[:MOST_NEAR])
    trouble = "could be" if found else "is unknown to this network" + (": near are" if near else "")
    advice = f" {some}: write one of them" if near else ""
    raise ModelError(f"class '{wanted}' {trouble}{advice}", option="wanted_class")
