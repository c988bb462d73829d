"""The command-line options of a ``Choice``. A command that takes a ``Choice`` gets one option for
each of its fields.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any, get_args

import typer

from engines.choose import Choice
from engines.networks.registry import NETWORKS

LARGEST_SIDE_PX, MOST_IMAGES, LARGEST = 4096, 1024, 10**9
"""Of a side, of images in one call, and of any other number that counts something."""


def finite(value: float | None) -> float | None:
    """The callback of every option that takes a float: limits alone let NaN through.

    Raises:
        typer.BadParameter: it is NaN or infinite.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


OPTIONS: dict[str, Any] = {
    "model": Annotated[
        str, typer.Option(help=f"{', '.join(NETWORKS)}, or a classifier FILE.onnx.")
    ],
    "weights": Annotated[
        str | None,
        typer.Option(help="FILE (.safetensors, .pth, .npz, .net), a NAME to download, or random."),
    ],
    "method": Annotated[
        str,
        typer.Option(
            help=(
                "sensitivity (gradient of the class score), gestalt (of the last feature maps),"
                " heuristic (no fitted head), dam (the neurons behind the class, traced back), beam"
                " (search over the last feature map)."
            )
        ),
    ],
    "head": Annotated[
        str | None, typer.Option(help="FILE of a fitted head, NAME of a shipped one, or none.")
    ],
    "backend": Annotated[
        str,
        typer.Option(
            help=(
                "auto (TensorRT where it is built and certified, else OpenVINO), openvino, tensorrt"
                " or torch."
            )
        ),
    ],
    "precision": Annotated[
        str,
        typer.Option(
            help=(
                "auto, fp32, bf16 (openvino), fp16 (tensorrt, torch on a GPU) or int8 (calibrated)."
            )
        ),
    ],
    "size_px": Annotated[
        int | None,
        typer.Option("--size", help="Input side in pixels.", min=16, max=LARGEST_SIDE_PX),
    ],
    "layer": Annotated[
        str | None,
        typer.Option(
            help="Where the backward pass stops: pixels, or an inner layer, which is cheaper."
        ),
    ],
    "calibration": Annotated[
        str | None,
        typer.Option(
            help="FILE that 'calibrate' wrote, for int8; else the shipped one, or your last."
        ),
    ],
    "wanted_class": Annotated[
        str | None,
        typer.Option("--class", help="Look for this class (name or index), not for the likeliest."),
    ],
    "objects": Annotated[
        int,
        typer.Option(
            help=(
                "With --method dam or beam, find up to so many; with --follow, follow up to so"
                " many."
            ),
            min=1,
            max=20,
        ),
    ],
    "threads": Annotated[
        int, typer.Option(help="Processor threads for the engine; 0 for all.", min=0, max=1024)
    ],
}

NETWORK = ("model", "weights", "method", "size_px", "layer")
"""What decides the maps that a head is fitted on."""
ENGINE = (
    *NETWORK[:3],
    "head",
    "backend",
    "precision",
    "size_px",
    "layer",
    "calibration",
    "objects",
    "threads",
)


def takes_choice(*fields: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command's parameter ``choice`` becomes one option for each of ``fields``; the others keep
    their defaults.
    """
    return takes("choice", Choice, {name: OPTIONS[name] for name in fields})


def takes(
    parameter: str, kind: Any, options: Mapping[str, Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command's ``parameter``, of the dataclass ``kind``, becomes one option for each field in
    ``options``, at its place.
    """

    def spread(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            command(**{parameter: kind(**{name: given.pop(name) for name in options})}, **given)

        found: list[inspect.Parameter] = []
        for each in inspect.signature(command).parameters.values():
            if each.name == parameter:
                found += [
                    _parameter(name, kind, annotation) for name, annotation in options.items()
                ]
            else:
                found.append(each.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        run.__signature__ = inspect.Signature(found)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in found}
        return run

    return spread


def _parameter(name: str, kind: Any, annotation: Any) -> inspect.Parameter:
    default = kind.__dataclass_fields__[name].default
    option, kinds = (
        annotation.__metadata__[0],
        (annotation.__origin__, *get_args(annotation.__origin__)),
    )
    if float in kinds and option.parser is None:
        option.callback = finite
    if int in kinds and option.max is None:
        option.max = LARGEST
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )
