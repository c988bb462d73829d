"""Makes typer's commands and options of functions and dataclasses whose parameters and fields are
annotated with an ``engines.options.Option``. What a command names is imported when it is built.
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer

from engines.errors import SightlineError

if TYPE_CHECKING:
    from engines.options import Option

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
        from engines.options import PANELS

        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = PANELS[-1]
        return option


@dataclass(frozen=True)
class Registered:
    """A command before it is built.

    Attributes:
        function: what it calls, with the parameters that it takes.
        examples: command lines; behind a ``#`` what each does.
        group: under which it stands in the list of all commands.
    """

    function: Callable[..., None]
    examples: tuple[str, ...]
    group: str

    @property
    def name(self) -> str:
        """What it is called on the command line."""
        return self.function.__name__.rstrip("_")


REGISTERED: dict[str, Registered] = {}
FIND = "Find objects"


def command(
    *examples: str, group: str = FIND
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command, see ``all_commands`` and ``Registered``."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        registered = Registered(function, examples, group)
        REGISTERED[registered.name] = registered
        return function

    return register


def all_commands(alone: str | None = None) -> typer.Typer:
    """The command line.

    Args:
        alone: the only command that is built; of the others name and help are there. None builds
            all.
    """
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        help=(
            "Find the main object in every frame, with nothing but an image classifier: a box, and"
            " the reason for it."
        ),
    )
    app.callback()(lambda: None)  # one command alone has a name, too
    for each in REGISTERED.values():
        if alone is None or alone == each.name:
            _build(app, each)
        else:
            about = inspect.getdoc(each.function)
            app.command(each.name, help=about, rich_help_panel=each.group)(lambda: None)
    return app


@cache
def imports_of(path: str) -> dict[str, str]:
    """What a module imports only ``if TYPE_CHECKING``: each name, and where it is."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    blocks = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    return {
        each.asname or each.name: f"{node.module}.{each.name}"
        for block in blocks
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for each in node.names
    }


def load(function: Callable[..., Any]) -> None:
    """Import what a function names of ``imports_of`` its module: in its annotations, which are
    texts until then, and in its body. Importing what all commands need would take longer than most
    of them work.
    """
    names = set(function.__code__.co_names)
    for annotation in function.__annotations__.values():
        if isinstance(annotation, str):
            names |= set(compile(annotation, "annotation", "eval").co_names)
    places = imports_of(function.__globals__["__file__"])
    for name in names & places.keys():
        function.__globals__.setdefault(name, resolve_name(places[name]))


def _build(app: typer.Typer, registered: Registered) -> None:
    """Make it a command of ``app``. Each of its parameters that is annotated with an ``Option``
    becomes one option; each whose type is a dataclass becomes one for each field that is annotated
    so, and the function gets an instance.
    """
    function = registered.function
    load(function)
    groups: dict[str, tuple[Any, list[str]]] = {}
    found: list[inspect.Parameter] = []
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        kind, *extras = get_args(hints[name]) or (hints[name],)
        if is_dataclass(kind):
            options = list(options_of(kind, extras))
            groups[name] = kind, [option.name for option in options]
            found += options
        else:
            found.append(typer_option(name, hints[name], parameter.default))

    def run(**given: Any) -> None:
        try:
            for name, (kind, names) in groups.items():
                given[name] = kind(**{each: given.pop(each) for each in names})
            function(**given)
        except SightlineError as error:
            add_flags(error, found)
            raise

    found.sort(key=place_in_help)
    run.__signature__ = inspect.Signature(found)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in found}
    app.command(
        registered.name,
        cls=Command,
        epilog="\\\n".join(["Examples:", *(f"`{each}`" for each in registered.examples)]),
        help=inspect.getdoc(function),
        rich_help_panel=registered.group,
    )(run)


def options_of(kind: Any, extras: list[Any]) -> Iterator[inspect.Parameter]:
    """A typer option for each field of a dataclass that is annotated as one."""
    from engines.options import Option

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
    from engines.options import PANELS

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
