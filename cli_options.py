"""Makes typer's options of the fields of dataclasses, and of parameters, that are annotated with an
``engines.options.Option``.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from engines.errors import SightlineError
from engines.options import PANELS, Option

LARGEST = 10**9
"""Of a number that counts something, where its option sets no limit."""
EARLIER_NAMES = {"--heat-video": "--heat-map-video"}
"""Options by the names that they once had; help does not show those."""


@dataclass(frozen=True)
class Only:
    """Stands in a parameter's type beside the dataclass: the fields that the command takes; the
    others keep their defaults.
    """

    names: tuple[str, ...]


class Command(typer.core.TyperCommand):
    """A command whose ``--help`` stands in the last panel, beside other options, and whose options
    may be called by ``EARLIER_NAMES``, too.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See ``click.Command.parse_args``."""
        return super().parse_args(ctx, [EARLIER_NAMES.get(word, word) for word in args])

    def get_help_option(self, ctx: Any) -> Any:
        """The option ``--help``."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = PANELS[-1]
        return option


def options_of(kind: Any, extras: list[Any]) -> Iterator[inspect.Parameter]:
    """A typer option for each field of a dataclass that is annotated as one."""
    chosen = next((extra.names for extra in extras if isinstance(extra, Only)), None)
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        annotated = any(isinstance(extra, Option) for extra in get_args(hints[field.name])[1:])
        if annotated and (chosen is None or field.name in chosen):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            yield typer_option(field.name, hints[field.name], default)


def typer_option(name: str, hint: Any, default: Any) -> inspect.Parameter:
    """The parameter from which typer makes an option or an argument."""
    kind, about = get_args(hint)
    kinds = (kind, *get_args(kind))
    if about.parser is not None and any(get_origin(each) is tuple for each in kinds):
        kind = str | None  # typer would take a text for each of a tuple's parts
    common: dict[str, Any] = {"help": about.help, "metavar": about.metavar}
    if about.panel is None:
        made = typer.Argument(**common, show_default=about.metavar is None)
    else:
        made = typer.Option(
            *_names(name, about, default, kind),
            **common,
            rich_help_panel=about.panel,
            min=about.min,
            max=LARGEST if int in kinds and about.max is None else about.max,
            envvar=about.envvar,
            parser=_parser(about.parser) if about.parser else None,
            callback=_finite if float in kinds and not about.parser else None,
        )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, made, about],
    )


def _names(name: str, about: Option, default: Any, kind: Any = None) -> list[str]:
    """What an option is called on the command line, such as ``--size``."""
    names = [f"--{each.replace('_', '-')}" for each in about.names or (name,)]
    both = default is True or kind == bool | None
    return [f"{names[0]}/--no-{names[0][2:]}"] if both else names


def add_flags(error: SightlineError, parameters: list[inspect.Parameter]) -> None:
    """Note behind an error how the options that it is about are written for this command."""
    flags: dict[str, str] = {}
    for parameter in parameters:
        about = parameter.annotation.__metadata__[-1]
        if about.panel is not None:
            written = _names(parameter.name, about, parameter.default)[0].split("/")[-1]
            flags.update(dict.fromkeys((parameter.name, *about.names), written))
    named: list[str] = []
    cause: BaseException | None = error
    while isinstance(cause, SightlineError):
        named += [flags[option] for option in cause.options if option in flags]
        cause = cause.__cause__
    if named:
        error.add_note(f"({', '.join(dict.fromkeys(named))})")


def place_in_help(parameter: inspect.Parameter) -> int:
    panel = getattr(parameter.annotation.__metadata__[0], "rich_help_panel", None)
    return PANELS.index(panel) if panel else -1


def _parser(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser whose error names the option."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except SightlineError as error:
            raise typer.BadParameter(str(error)) from error

    return parsed


def _finite(value: float | None) -> float | None:
    """Limits alone let NaN through."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value
