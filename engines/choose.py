"""Opens the engine that a user's options describe: model, weights, method, head, backend,
precision.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from engines.build import build_graph
from engines.certificate import open_certified, refuse_failed
from engines.downloads import cache_dir
from engines.engine import Engine
from engines.errors import EngineError, InputError, ModelError, SightlineError
from engines.head import Head, load_head, shipped_head_names, shipped_head_path, shipped_heads
from engines.heuristic import Heuristic, default_heuristic
from engines.install import install_extra
from engines.int8 import Quantization, load_quantization
from engines.localizer import Localizer
from engines.maps import PIXELS, MapSpec
from engines.networks.registry import Classifier, load_classifier
from engines.networks.weights import ASSETS
from engines.options import EngineOptions
from engines.search.choose import open_search
from engines.search.crops import CropScorer, load_crop_scorer

METHODS = {
    "sensitivity": "class",
    "gestalt": "gestalt",
    "heuristic": "class",
    "dam": "class",
    "beam": "class",
}
"""What each method differentiates."""
SEARCHES = ("dam", "beam")
"""Methods that take several engine calls, see ``engines.search``."""
BACKENDS = ("auto", "openvino", "tensorrt", "torch")


def open_localizer(
    model: str | EngineOptions = "compact",
    notify: Callable[[str], None] | None = None,
    streams: int = 1,
    batch: int = 1,
    **options: Any,
) -> Localizer:
    """Load, build and compile what was chosen.

    Args:
        model: a network's name or file, or all the common options.
        notify: gets what a user should know of it, such as why ``auto`` does not take TensorRT.
        streams: 1 for the soonest answer (live), 0 for the most answers a second (files); see
            ``OpenVinoEngine``.
        batch: images that one call takes.
        options: any fields of ``EngineOptions``, which go before those of ``model``.

    Raises:
        ModelError: the model, weights or head cannot be used, or does not say how sure it is where
            that is asked for.
        EngineError: the backend cannot run them.
        TypeError: there is no such option.
    """
    choice = chosen(model, options)
    classifier = load_classifier(choice.model, choice.weights, choice.size_px)
    if choice.method in SEARCHES and (
        choice.head is None or (choice.method, choice.head) == ("beam", "none")
    ):
        engine = open_search(
            choice.method,
            classifier,
            backend=choice.backend,
            precision=choice.precision,
            threads=choice.threads,
            streams=streams,
            objects=choice.objects,
            layer=choice.layer,
            readers=readers_of_crops(choice, classifier),
        )
    else:
        engine = open_engine(
            choice, classifier, choose_head(choice, classifier), notify, streams, batch
        )
    if notify is not None:
        for note in (*classifier.network.notes, *engine.losses):
            notify(note)
    localizer = Localizer(engine)
    try:
        if choice.wanted_class is not None:
            localizer.look_for(class_index(choice.wanted_class, localizer.class_names))
        localizer.abstain_below(choice.least_confidence)
    except SightlineError:
        localizer.close()
        raise
    return localizer


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


def choose_head(choice: EngineOptions, classifier: Classifier) -> Head | Heuristic | None:
    """The named head, or the shipped one that fits, or the training-free one; None where none is
    wanted.

    Raises:
        ModelError: the head cannot be read, or the options contradict each other.
    """
    objective = objective_of(choice.method)
    if choice.method in SEARCHES:
        raise ModelError(
            f"method {choice.method} takes several graphs and no head of one's own: it runs in"
            " demo, batch, stream and evaluate, without a head and without a budget",
            option=("method", "head", "budget_ms"),
        )
    if choice.objects > 1:
        raise ModelError(
            f"method {choice.method} finds the main object only: for more, use method"
            f" {' or '.join(SEARCHES)}",
            option=("method", "objects"),
        )
    if choice.head == "none":
        return None
    if choice.head is not None:
        if choice.method == "heuristic":
            raise ModelError(
                "method heuristic reads the box without a fitted head: drop it, or drop the head"
                f" {choice.head}",
                option=("method", "head"),
            )
        path = Path(choice.head)
        is_name = not path.exists() and choice.head in shipped_head_names()
        return load_head(shipped_head_path(choice.head) if is_name else path)
    for name, head in shipped_heads(classifier.digest).items():
        is_usual = (
            name.startswith(f"{classifier.name}_{choice.method}")
            and head.size_px == classifier.size_px
        )
        if is_usual and choice.layer in (None, head.spec.layer):
            return head
    return default_heuristic(classifier.network, objective, choice.layer)


def readers_of_crops(
    choice: EngineOptions, classifier: Classifier
) -> tuple[Head, CropScorer] | None:
    """The shipped head and judge with which ``--method beam`` looks for several objects; None for
    the paper's search.

    That is what one object, ``--head none`` and a feature map of one's own are searched with, and
    networks without a judge.

    Raises:
        ModelError: the judge is damaged.
    """
    path = ASSETS / f"{classifier.name}_crops.safetensors"
    if (
        choice.method != "beam"
        or choice.objects == 1
        or choice.head
        or choice.layer
        or not path.exists()
    ):
        return None
    crop_scorer = load_crop_scorer(path)
    for head in shipped_heads(classifier.digest).values():
        if (head.network, head.digest) == (crop_scorer.network, crop_scorer.head):
            return head, crop_scorer
    return None


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
    name = f"{classifier.name}_{objective}_{classifier.size_px}_{classifier.digest[:12]}.int8.json"
    return cache_dir() / "calibrations" / name, ASSETS / name


def open_engine(
    choice: EngineOptions,
    classifier: Classifier,
    head: Head | Heuristic | None,
    notify: Callable[[str], None] | None = None,
    streams: int = 1,
    batch: int = 1,
) -> Engine:
    """Compile the graph on the chosen backend, or find it compiled and certified; the arguments as
    for ``open_localizer``.
    """
    spec, notify = chosen_spec(choice, head), notify or (lambda _: None)
    if choice.backend in ("auto", "tensorrt"):
        try:
            quantization = (
                choose_quantization(choice, classifier, spec)
                if choice.precision == "int8"
                else None
            )
            return open_certified(
                lambda: build_graph(classifier, spec, head, batch=batch, quantization=quantization),
                choice.precision,
            )
        except EngineError as error:
            if choice.backend == "tensorrt":
                raise EngineError(
                    f"{error}; backend openvino needs no GPU", option="backend"
                ) from error
            notify(f"not TensorRT: {error}")
    if choice.backend in ("auto", "openvino"):
        from engines.backends.openvino import (
            OpenVinoEngine,
            has_vnni,
        )  # only the chosen backend is imported

        wanted = choice.precision == "int8" or choice.calibration is not None or has_vnni()
        quantization = choose_quantization(choice, classifier, spec) if wanted else None
        graph = build_graph(classifier, spec, head, batch=batch, quantization=quantization)
        engine = OpenVinoEngine(graph, choice.precision, choice.threads, streams)
        refuse_failed(graph, engine)
        return engine
    if choice.backend == "torch":
        try:
            from engines.backends.torch_cuda import open_torch
        except ImportError as error:
            raise EngineError(
                f"backend torch needs PyTorch: {install_extra('torch')}, or use openvino",
                option="backend",
            ) from error
        return open_torch(classifier, spec, head, choice.precision, batch)
    raise EngineError(
        f"unknown backend '{choice.backend}': use {', '.join(BACKENDS)}", option="backend"
    )


def build_chosen(choice: EngineOptions, batch: int = 1) -> onnx.ModelProto:
    """The graph of what was chosen, for ``batch`` images a call, not compiled.

    Raises:
        ModelError: see ``open_localizer``.
    """
    classifier = load_classifier(choice.model, choice.weights, choice.size_px)
    head = choose_head(choice, classifier)
    spec = chosen_spec(choice, head)
    quantization = (
        choose_quantization(choice, classifier, spec) if choice.precision == "int8" else None
    )
    return build_graph(classifier, spec, head, batch=batch, quantization=quantization)


def chosen_spec(choice: EngineOptions, head: Head | Heuristic | None) -> MapSpec:
    """The map that method and head agree on.

    Raises:
        ModelError: they do not.
    """
    objective = objective_of(choice.method)
    spec = head.spec if head else MapSpec(objective, layer=choice.layer or PIXELS)
    if choice.layer not in (None, spec.layer):
        raise ModelError(
            f"the head reads the map at {spec.layer}, not at {choice.layer}: drop the layer, or the"
            " head",
            option=("layer", "head"),
        )
    if spec.objective != objective:
        raise ModelError(
            f"the head reads the {spec.objective} objective, not method {choice.method}; drop one"
            " of the two",
            option=("head", "method"),
        )
    return spec


def objective_of(method: str) -> str:
    """The objective that a method differentiates.

    Raises:
        ModelError: the method is unknown.
    """
    if method not in METHODS:
        raise ModelError(f"unknown method '{method}': use {', '.join(METHODS)}", option="method")
    return METHODS[method]


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
