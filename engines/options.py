"""What a user can choose of an engine, and the record by which a field of any options says what it
is.

The fields of all options in Sightline are annotated with an ``Option``. The command line makes its
options of these records; nothing else here knows of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

from engines.backends.registry import backends_in_words, precisions_in_words
from engines.errors import InputError
from engines.head import dense_input, head_of_weights
from engines.maps import DEFAULT_METHOD, METHODS
from engines.networks.packages import PACKAGES
from engines.networks.preprocessing import (
    LETTERBOX,
    GivenInput,
    Rgb,
    parsed_channels,
    parsed_order,
    parsed_resize,
    parsed_scale,
)
from engines.networks.registry import DEFAULT_MODEL, NETWORKS, Classifier, load_classifier

LARGEST_SIDE_PX = 4096
MOST_IMAGES = 1024
"""In one call of an engine."""

LOOK_AT = "What to look at"
NETWORK = "Network"
SPEED = "Speed"
OUTPUT = "Output"
ADVANCED = "Advanced"
PANELS = (LOOK_AT, NETWORK, SPEED, OUTPUT, ADVANCED)
"""The groups of options in ``--help``, in their order."""


@dataclass(frozen=True)
class Option:
    """What a field of some options is, for users. It stands in the field's ``Annotated`` type.

    Attributes:
        help: one or two short sentences.
        panel: its group, one of ``PANELS``; None for what a command takes without a name.
        names: what it is called on the command line, where that is not the field's name.
        min, max: the smallest and the largest number.
        parser: makes the value of its text; raises ``InputError``.
        metavar: how its value is written, where its type does not say it.
        envvar: the environment variable that gives it, too.
    """

    help: str
    panel: str | None = ADVANCED
    names: tuple[str, ...] = ()
    min: float | None = None
    max: float | None = None
    parser: Callable[[str], Any] | None = None
    metavar: str | None = None
    envvar: str | None = None


MOST_OBJECTS = 20
"""That are looked for in one image; ``all`` asks for so many."""


def parsed_objects(text: str) -> int:
    """A number of objects, 1 to ``MOST_OBJECTS``, or ``all``.

    Raises:
        InputError: it is neither.
    """
    if str(text).strip() == "all":  # typer gives the default as the number that it is
        return MOST_OBJECTS
    try:
        count = int(text)
    except ValueError:
        count = 0
    if not 1 <= count <= MOST_OBJECTS:
        raise InputError(f"{text!r} is no number of objects: use 1 to {MOST_OBJECTS}, or all")
    return count


@dataclass(frozen=True)
class EngineOptions:
    """What can be chosen of an engine. None means the best default for the rest.

    ``head`` may name a shipped head, such as ``compact_gestalt``; None is the shipped one where it
    fits. ``layer`` None is the head's. ``least_confidence`` is no option of its own: it is
    ``FollowOptions.min_score`` where nothing is followed, see ``Localizer.abstain_below``. None is
    the head's own limit, and 0 gives all boxes.
    """

    model: Annotated[
        str,
        Option(
            f"{', '.join(NETWORKS)}, a classifier FILE.onnx, or by its name in a package that is"
            f" installed: {', '.join(f'{each}:NAME' for each in PACKAGES)}. SIGHTLINE_MODEL names"
            " another default.",
            NETWORK,
        ),
    ] = DEFAULT_MODEL
    weights: Annotated[
        str | None,
        Option(
            "FILE (.safetensors, .pth, .npz, .h5, .onnx, .whl, .net), a NAME to download, or"
            " random.",
            NETWORK,
        ),
    ] = None
    class_layer: Annotated[
        str | None,
        Option(
            "With --model vgg16: FILE of classes that 'finetune' wrote, or voc2007, which ships.",
            NETWORK,
        ),
    ] = None
    method: Annotated[
        str,
        Option(", ".join(f"{each.name} ({each.help})" for each in METHODS.values()) + ".", NETWORK),
    ] = DEFAULT_METHOD
    head: Annotated[
        str | None,
        Option("FILE or NAME of a fitted head, NAME of a shipped one, or none.", NETWORK),
    ] = None
    backend: Annotated[
        str,
        Option(backends_in_words(), SPEED),
    ] = "auto"
    precision: Annotated[
        str,
        Option(precisions_in_words(), SPEED),
    ] = "auto"
    size_px: Annotated[
        int | None,
        Option("Input side in pixels.", NETWORK, ("size",), min=16, max=LARGEST_SIDE_PX),
    ] = None
    wanted_class: Annotated[
        str | None,
        Option(
            "Look for this, not for the likeliest: a name of boxes, or a class (name, index).",
            LOOK_AT,
            ("class",),
        ),
    ] = None
    threads: Annotated[
        int, Option("Processor threads for the engine; 0 for all.", SPEED, min=0, max=1024)
    ] = 0
    layer: Annotated[
        str | None,
        Option(
            "Where the backward pass stops: pixels, or an inner layer, which is cheaper.", NETWORK
        ),
    ] = None
    calibration: Annotated[
        str | None,
        Option("FILE that 'calibrate' wrote, for int8; else the shipped one, or your last.", SPEED),
    ] = None
    objects: Annotated[
        int,
        Option(
            "With a dense head, or --method dam or beam, find up to so many; with --follow, follow"
            " up to so many.",
            LOOK_AT,
            parser=parsed_objects,
            metavar="N|all",
        ),
    ] = 1
    as_published: Annotated[
        bool,
        Option(
            "Each step as the method's paper has it; docs/papers.md says where that differs.",
            NETWORK,
        ),
    ] = False
    sigma_px: Annotated[
        float | None,
        Option(
            "With --method heuristic: blur of the map, in pixels of the input; as published 20.",
            NETWORK,
            ("sigma",),
            min=0,
        ),
    ] = None
    aggregation: Annotated[
        str | None,
        Option("What a map takes of the gradient's channels: max (the default) or mean.", NETWORK),
    ] = None
    mean: Annotated[
        Rgb | None,
        Option(
            "Of FILE.onnx, where nothing says it: 0.485,0.456,0.406 of pixels 0..1, or"
            " 123.675,116.28,103.53 of 0..255. Its input is (pixel / scale - mean) / std.",
            NETWORK,
            parser=parsed_channels,
            metavar="R,G,B",
        ),
    ] = None
    std: Annotated[
        Rgb | None,
        Option(
            "As --mean: 0.229,0.224,0.225 of pixels 0..1, or 58.395,57.12,57.375 of 0..255.",
            NETWORK,
            parser=parsed_channels,
            metavar="R,G,B",
        ),
    ] = None
    scale: Annotated[
        float | None,
        Option(
            "By what pixels 0..255 are divided before mean and std: 255 (or 1/255), 127.5, 1. Else"
            " 255 where those are at most 1, and 1 where they are more.",
            NETWORK,
            parser=parsed_scale,
            metavar="NUMBER",
        ),
    ] = None
    order: Annotated[
        str | None,
        Option(
            "Order of the colours in FILE.onnx's input, and in mean and std: rgb or bgr.",
            NETWORK,
            parser=parsed_order,
            metavar="rgb|bgr",
        ),
    ] = None
    resize: Annotated[
        str | None,
        Option(
            "How an image becomes the network's square: squash (the default), letterbox, or crop,"
            " which does not see what lies beside the middle.",
            NETWORK,
            parser=parsed_resize,
            metavar="squash|crop|letterbox",
        ),
    ] = None
    output: Annotated[
        str | None,
        Option("NAME of the output of FILE.onnx with the class scores, of several.", NETWORK),
    ] = None
    labels: Annotated[
        str | None,
        Option(
            "FILE of the classes' names: one a line, or JSON: a list, or names by index.", NETWORK
        ),
    ] = None
    least_confidence: float | None = None

    def classifier(self) -> Classifier:
        """The network that is chosen, with the input that a dense head which is named was fitted
        with unless another is asked for. Raises what ``load_classifier`` raises.
        """
        size_px, given = self.size_px, self.given
        if (fitted := dense_input(self.head or self.default_head)) is not None:
            size_px = size_px or fitted[0]
            given = replace(given, resize=given.resize or fitted[1])
        return load_classifier(self.model, self.weights, size_px, given, self.class_layer)

    @property
    def default_head(self) -> str | None:
        """Name of the head that the network comes with; None where a head is named, there is none,
        or what is asked for needs another one: it fits the network's own weights, with another
        last layer or not, its input, and one method with one map.
        """
        known = NETWORKS.get(self.model)
        others = (self.head, self.class_layer, self.layer, self.aggregation)
        is_usual = self.method == DEFAULT_METHOD and self.resize in (None, LETTERBOX)
        is_usual = is_usual and not self.as_published
        if known is None or not is_usual or any(each is not None for each in others):
            return None
        if self.weights is not None and head_of_weights(self.weights) != known.default_head:
            return None
        return known.default_head or None

    @property
    def given(self) -> GivenInput:
        """What is said of the classifier's input and output.

        Raises:
            InputError: it contradicts itself.
        """
        names = GivenInput.__dataclass_fields__
        return GivenInput(**{name: getattr(self, name) for name in names})

    @property
    def inputs(self) -> tuple[str, ...]:
        """What of it may be files that are read."""
        return tuple(
            each
            for each in (
                self.weights,
                self.class_layer,
                self.head,
                self.calibration,
                self.labels,
            )
            if each
        )


INPUT_OPTIONS = tuple(GivenInput.__dataclass_fields__)
"""What is said of a classifier's input and output."""
MAP_OPTIONS = ("method", "as_published", "aggregation", "layer")
NETWORK_OPTIONS = ("model", "weights", "class_layer", "size_px", *MAP_OPTIONS, *INPUT_OPTIONS)
"""What decides the maps that a head is fitted on."""
ENGINE_OPTIONS = ("head", "backend", "precision", "calibration", "objects", "threads", "sigma_px")
Budget = Annotated[
    float | None,
    Option(
        "Hold this time per frame by stepping to cheaper settings and back; 33 is 30 fps.",
        SPEED,
        min=0.1,
    ),
]
AsJson = Annotated[bool, Option("Print the summary as JSON on standard output.", OUTPUT, ("json",))]
OpenPage = Annotated[bool, Option("Show the report in a browser at the end.", OUTPUT, ("open",))]
