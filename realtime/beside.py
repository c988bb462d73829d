"""What is written beside a live run: where it fails, it ends alone, and the run goes on."""

from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from engines.localizer import ImageBgr
from engines.text import in_words
from realtime.frames import FrameRecord
from realtime.sinks import Sink


class Told:
    """Says lines, and keeps them for the summary.

    Args:
        told: gets each.
    """

    def __init__(self, told: Callable[[str], None]) -> None:
        self._told, self._lines = told, list[str]()

    def __call__(self, line: str) -> None:
        """Say one."""
        self._lines.append(line)
        self._told(line)

    def summary(self) -> dict[str, list[str]]:
        """``trouble``, where there was any."""
        return {"trouble": self._lines} if self._lines else {}


class Beside:
    """A sink whose errors, of any kind, end it and nothing else.

    Args:
        sink: gets everything until it fails.
        what: names it in the line that says so.
        told: gets that line, once.
    """

    def __init__(self, sink: Sink, what: str, told: Callable[[str], None]) -> None:
        self._sink, self._what, self._told, self._failed = sink, what, told, False

    @property
    def needs_picture(self) -> bool:
        """See ``Sink.needs_picture``."""
        return not self._failed and self._sink.needs_picture

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``; raises nothing."""
        if self._failed:
            return
        try:
            self._sink.write(record, picture)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failed = True
        self._told(f"{self._what} has ended, and the run goes on without it: {in_words(error)}")

    def __enter__(self) -> Self:
        self._sink.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._failed:
            with suppress(Exception):
                self._sink.__exit__(kind, error, trace)
            return
        try:
            self._sink.__exit__(kind, error, trace)
        except Exception as failure:
            self._fail(failure)
