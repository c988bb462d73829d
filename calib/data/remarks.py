"""Collects what was left out or guessed while labels were read. It counts every case and keeps the
first few.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from engines.errors import SourceError
from engines.text import displayable

NAMED = 3
"""How many examples of a remark are named; the others are counted."""
LONGEST, LONGEST_EXAMPLE = 100, 400
"""Characters of a value out of a file that a message holds, and of an example with the path of its
file.
"""


class BadLabelError(SourceError):
    """One row, object or file of a label set cannot be used; the others can."""


def shown(value: object, longest: int = LONGEST) -> str:
    """Text out of a file as a message may hold it: on one line, without control characters, cut
    where it is long.
    """
    text = displayable(str(value)[: longest + 1])
    return text if len(text) <= longest else text[:longest] + " ..."


class Remarks:
    """Collects what a reader leaves out and what it guesses.

    Attributes:
        left_out: how many rows, objects, files and images could not be used.
        first: why the first of them could not; None where all could.
    """

    def __init__(self) -> None:
        self.left_out = 0
        self.first: SourceError | None = None
        self._examples: list[str] = []
        self._guesses: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def guess(self, what: str, example: str) -> None:
        """Something was read otherwise than the file says it; ``example`` is the row, file or
        image.
        """
        self._counts[what] = self._counts.get(what, 0) + 1
        kept = self._guesses.setdefault(what, [])
        if len(kept) < NAMED and example not in kept:
            kept.append(shown(example, LONGEST_EXAMPLE))

    def leave_out(self, error: SourceError) -> None:
        """Something cannot be used and is passed over."""
        self.left_out += 1
        self.first = self.first or error
        if len(self._examples) < NAMED:
            self._examples.append(str(error))

    @contextmanager
    def leaving_out(self) -> Iterator[None]:
        """What raises SourceError inside is left out."""
        try:
            yield
        except SourceError as error:
            self.leave_out(error)

    def nothing_left(self) -> SourceError | None:
        """The error where all had to be left out: why the first of them was, and how many more;
        None where nothing was.
        """
        if self.first is None:
            return None
        more = f" ({self.left_out - 1} more cannot be used either)" if self.left_out > 1 else ""
        return SourceError(f"{self.first}{more}")

    def add(self, other: "Remarks") -> None:
        """Take over all that another collected."""
        self.left_out += other.left_out
        self.first = self.first or other.first
        self._examples = (self._examples + other._examples)[:NAMED]
        for what, examples in other._guesses.items():
            self._counts[what] = self._counts.get(what, 0) + other._counts[what]
            self._guesses[what] = (self._guesses.get(what, []) + examples)[:NAMED]

    def lines(self) -> list[str]:
        """One line for each kind of guess; one for each of the first things left out, and one for
        the number of the others.
        """
        guesses = [
            f"{what} ({_counted(self._counts[what], examples)})"
            for what, examples in self._guesses.items()
        ]
        left = [f"left out: {example}" for example in self._examples]
        more = self.left_out - len(self._examples)
        return [*guesses, *left, *([f"left out: {more} more"] if more > 0 else [])]

    def tell(self) -> None:
        """Print the lines on the standard error stream."""
        for line in self.lines():
            print(displayable(f"note: {line}"), file=sys.stderr)


def _counted(count: int, examples: list[str]) -> str:
    more = count - len(examples)
    return ", ".join(examples) + (f" and {more} more" if more > 0 else "")
