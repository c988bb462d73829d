"""Reads what can be read only once and in order: standard input, named pipes and devices."""

import os
import select
import stat
import time
from pathlib import Path

from engines.errors import SourceError

STDIN = "-"
WRITER_S = 10.0  # for the first byte of a named pipe, which may have nobody who writes to it
SILENCE_S = 60.0  # of a pipe that gave something, or of standard input, whose writer is there


def is_pipe(spec: str) -> bool:
    """Whether a source is standard input or a file that cannot be read again, such as a named
    pipe.
    """
    if spec == STDIN:
        return True
    try:
        mode = Path(spec).stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


class Pipe:
    """A pipe's content, for ``av.open``; it never waits for ever.

    Args:
        spec: see ``is_pipe``.

    Raises:
        SourceError: it cannot be opened, it is a terminal, or nothing comes for too long; ``read``
            raises the last one.
    """

    def __init__(self, spec: str) -> None:
        self.name = "standard input" if spec == STDIN else spec
        try:
            self._file = (
                os.dup(0)
                if spec == STDIN
                else os.open(spec, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            )
        except OSError as error:
            raise SourceError(f"cannot open {self.name}: {error.strerror}") from error
        if os.isatty(self._file):
            self.close()
            raise SourceError(
                f"{self.name} is a terminal: send a video into it, as in 'cat clip.ts | sightline"
                " stream -'"
            )
        self._patience_s = (
            WRITER_S if stat.S_ISFIFO(os.fstat(self._file).st_mode) and spec != STDIN else SILENCE_S
        )

    def read(self, size: int) -> bytes:
        """Up to so many bytes; none at the end."""
        self._wait()
        while True:
            try:
                found = os.read(self._file, size)
            except BlockingIOError:
                time.sleep(0.01)
                self._wait()
                continue
            self._patience_s = SILENCE_S
            return found

    def _wait(self) -> None:
        if not hasattr(select, "poll"):  # Windows: reading waits
            return
        watch = select.poll()
        watch.register(self._file, select.POLLIN)
        if not watch.poll(1000 * self._patience_s):
            what = (
                "nobody writes to it" if self._patience_s == WRITER_S else "its writer has stopped"
            )
            raise SourceError(f"{self.name}: nothing came for {self._patience_s:g} s: {what}")

    def close(self) -> None:
        """Release it."""
        os.close(self._file)
