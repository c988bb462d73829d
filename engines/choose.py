"""From what a user typed to a running engine: model, weights, method, head, backend, precision."""

from dataclasses import dataclass
from pathlib import Path

import onnx

from engines.base import Engine, EngineError, ModelError
from engines.build import build_graph
from engines.classifiers import Classifier, load_classifier
from engines.head import Head, load_head
from engines.heuristic import Heuristic, default_heuristic
from engines.localizer import Localizer
from engines.maps import MapSpec
from engines.weights import ASSETS

METHODS = {"sensitivity": "class", "gestalt": "gestalt", "heuristic": "class"}
"""What each method differentiates."""
BACKENDS = ("auto", "openvino", "torch")


@dataclass(frozen=True)
class Choice:
    """The common options of every command; None means the best default for the rest.

    Attributes:
        model: see ``engines.classifiers.load_classifier``.
        weights: a file, a name to download, ``random``, or None.
        method: ``sensitivity`` (class score), ``gestalt``, or ``heuristic`` (class score, no fitted head).
        head: a head file, the name of a shipped one (``compact_gestalt``), ``none``, or None for the shipped one where it fits.
        backend: ``auto``, ``openvino`` or ``torch``.
        precision: ``auto``, ``fp32`` or ``bf16``.
        size_px: input side.
        wanted_class: name or index of the class to look for.
        threads: processor threads; 0 for all.
        layer: where the training-free box is read; None for the network's best.
    """

    model: str = "compact"
    weights: str | None = None
    method: str = "sensitivity"
    head: str | None = None
    backend: str = "auto"
    precision: str = "auto"
    size_px: int | None = None
    wanted_class: str | None = None
    threads: int = 0
    layer: str | None = None


def open_localizer(choice: Choice, *, streams: int = 1) -> Localizer:
    """Load, build and compile what was chosen.

    Args:
        choice: what was chosen.
        streams: 1 for the soonest answer (live), 0 for the most answers a second (files); see ``OpenVinoEngine``.

    Raises:
        ModelError: the model, weights or head cannot be used.
        EngineError: the backend cannot run them.
    """
    classifier = load_classifier(choice.model, choice.weights, choice.size_px)
    head = choose_head(choice, classifier)
    engine = open_engine(choice, classifier, head, streams=streams)
    localizer = Localizer(engine)
    if choice.wanted_class is not None:
        localizer.look_for(class_index(choice.wanted_class, localizer.class_names))
    return localizer


def choose_head(choice: Choice, classifier: Classifier) -> Head | Heuristic | None:
    """The named head, or the shipped one where it fits, or the training-free one; None where none is wanted.

    Raises:
        ModelError: the head cannot be read, or both a head file and the heuristic were asked for.
    """
    if choice.head == "none":
        return None
    if choice.head is not None:
        if choice.method == "heuristic":
            raise ModelError(f"--method heuristic reads the box without a fitted head: drop it, or drop --head {choice.head}")
        path, named = Path(choice.head), ASSETS / f"{Path(choice.head).name}_head.safetensors"
        is_name = not path.exists() and path.name == choice.head and named.exists()
        return load_head(named if is_name else path)
    shipped = ASSETS / f"{classifier.name}_{choice.method}_head.safetensors"
    if shipped.exists():
        head = load_head(shipped)
        if head.network == classifier.digest and head.size_px == classifier.size_px:
            return head
    return default_heuristic(classifier.name, objective_of(choice.method), choice.layer)


def open_engine(choice: Choice, classifier: Classifier, head: Head | Heuristic | None, *, streams: int = 1) -> Engine:
    """Compile the graph on the chosen backend; ``streams`` as for ``open_localizer``."""
    spec = chosen_spec(choice, head)
    if choice.backend in ("auto", "openvino"):
        from engines.backends.openvino import OpenVinoEngine  # only the chosen backend is imported

        return OpenVinoEngine(build_graph(classifier, spec, head), choice.precision, choice.threads, streams)
    if choice.backend == "torch":
        if choice.precision not in ("auto", "fp32"):
            raise EngineError(f"the torch backend is the fp32 reference, not {choice.precision}: use --backend openvino")
        try:
            from engines.backends.torch import TorchEngine
        except ImportError as error:
            raise EngineError("--backend torch needs PyTorch: pip install 'sightline[torch]', or use openvino") from error
        return TorchEngine(classifier, spec, head)
    raise EngineError(f"unknown backend '{choice.backend}': use {', '.join(BACKENDS)}")


def build_chosen(choice: Choice, batch: int = 1) -> onnx.ModelProto:
    """The graph of what was chosen, for ``batch`` images a call, not compiled.

    Raises:
        ModelError: see ``open_localizer``.
    """
    classifier = load_classifier(choice.model, choice.weights, choice.size_px)
    head = choose_head(choice, classifier)
    return build_graph(classifier, chosen_spec(choice, head), head, batch=batch)


def chosen_spec(choice: Choice, head: Head | Heuristic | None) -> MapSpec:
    """The map that method and head agree on.

    Raises:
        ModelError: they do not.
    """
    objective = objective_of(choice.method)
    spec = head.spec if head else MapSpec(objective)
    if spec.objective != objective:
        raise ModelError(f"the head reads the {spec.objective} objective, not method {choice.method}; drop one of the two")
    return spec


def objective_of(method: str) -> str:
    """The objective that ``--method`` differentiates.

    Raises:
        ModelError: the method is unknown.
    """
    if method not in METHODS:
        raise ModelError(f"unknown method '{method}': use {', '.join(METHODS)}")
    return METHODS[method]


def class_index(wanted: str, names: tuple[str, ...]) -> int:
    """Index of a class given by index, exact name, or a part of a name that only one class has.

    Raises:
        ModelError: no class or several classes fit.
    """
    if wanted.isdigit() and int(wanted) < len(names):
        return int(wanted)
    lower = [name.lower() for name in names]
    if wanted.lower() in lower:
        return lower.index(wanted.lower())
    found = [i for i, name in enumerate(lower) if wanted.lower() in name]
    if len(found) == 1:
        return found[0]
    some = ", ".join(names[i] for i in found[:6])
    raise ModelError(f"class '{wanted}' " + (f"could be {some}: write one of them" if found else "is unknown to this network"))
