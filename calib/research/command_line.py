"""Runs a script of this folder: each parameter of its function is an option of ``python -m``."""

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_args, get_type_hints

from engines.errors import SightlineError
from engines.options import Option


def run(script: Callable[..., None], words: Sequence[str] | None = None) -> None:
    """Call a function with what its command line says.

    Args:
        script: a function whose parameters are annotated with an ``Option``.
        words: the command line; that of the process if None.

    Raises:
        SystemExit: the words do not fit, help was asked for, or the script cannot do its work.
    """
    parser = argparse.ArgumentParser(
        description=inspect.getdoc(script),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    hints = get_type_hints(script, include_extras=True)
    for name, parameter in inspect.signature(script).parameters.items():
        kind, about = get_args(hints[name])
        _add(parser, name, kind, about, parameter.default)
    given = vars(parser.parse_args(words))
    try:
        script(**given)
    except SightlineError as error:
        sys.exit(f"error: {error}")


def _add(
    parser: argparse.ArgumentParser, name: str, kind: Any, about: Option, default: Any
) -> None:
    flag = (about.names or (name,))[0].replace("_", "-")
    required = default is inspect.Parameter.empty
    how: dict[str, Any] = {
        "dest": name,
        "help": about.help.replace("%", "%%"),
        "required": required,
        "default": argparse.SUPPRESS if required else default,
    }
    if kind is bool:
        how["action"] = argparse.BooleanOptionalAction
    else:
        how["type"] = kind if about.min is None else _at_least(kind, about.min)
        how["metavar"] = flag.upper()
    parser.add_argument(f"--{flag}", **how)


def _at_least(kind: Callable[[str], Any], least: float) -> Callable[[str], Any]:
    """A reader of numbers that are not smaller than ``least``."""

    def read(text: str) -> Any:
        value = kind(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is smaller than {least:g}")
        return value

    return read
