"""The terminal: everything that is printed for people goes through ``Terminal``."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from engines.masks import masked
from engines.text import displayable


class Terminal(Console):
    """A console that lets no name of a file, class or source steer the terminal, and prints no secret of an address.

    Secrets are masked in texts that are given to ``print``; a ``rich.text.Text`` is printed as it is.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        """See ``rich.console.Console.print``."""
        super().print(*(masked(each) if isinstance(each, str) else each for each in objects), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See ``rich.console.Console.render``."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment("\n".join(map(displayable, segment.text.split("\n"))), segment.style)
