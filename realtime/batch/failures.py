"""What becomes of an error in a batch: it is said in one line, and only one that concerns every source ends the run."""

import errno

from engines.base import OutputError, SightlineError, SourceError
from engines.text import in_words

FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
"""Results of no source can be written any more: the disk or the quota is full, or the file system became read-only."""


def ends_run(error: Exception) -> bool:
    """Whether the sources that are left would fail by it, too."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    return isinstance(error, OutputError | OSError) and isinstance(cause, OSError) and cause.errno in FULL_ERRNOS


def failed(error: BaseException) -> dict[str, str | int | bool]:
    """The summary of a source of which nothing came."""
    return {"error": in_words(error), "frames": 0, "failed": 0, "interrupted": False}


def as_told(error: Exception) -> SightlineError:
    """An error of any kind as one that the command line shows; a defect of ours says which it is."""
    return error if isinstance(error, SightlineError) else SourceError(in_words(error))
