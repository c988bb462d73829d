"""All errors that Sightline raises on purpose.

The error tree (each is one clear line: what, where, what to do; the command line ends with status
2)::

    SightlineError
    ├── ModelError    a network, its weights or a head cannot be used
    ├── InputError    a tensor given to an engine does not fit
    ├── EngineError   a backend is missing or failed
    ├── SourceError   a camera, video, folder or data set cannot be read
    ├── DownloadError a file on the web cannot be fetched
    └── OutputError   a result cannot be written
"""

from engines.text import shown


class SightlineError(Exception):
    """Base of every error that is the user's to mend; its text is one line, without secrets of
    addresses.

    Attributes:
        options: names of the fields of options, or of the parameters, that the error is about. The
            text says it in words; the command line adds how they are written there.
    """

    def __init__(self, *parts: object, option: str | tuple[str, ...] = ()) -> None:
        self.options = (option,) if isinstance(option, str) else option
        super().__init__(
            *(
                shown(" ".join(part.split("\n"))) if isinstance(part, str) else part
                for part in parts
            )
        )


class ModelError(SightlineError):
    """A network, its weights or a head cannot be used."""


class InputError(SightlineError):
    """A tensor given to an engine does not fit."""


class EngineError(SightlineError):
    """A backend is missing or failed."""


class SourceError(SightlineError):
    """A camera, video, folder or data set cannot be read."""


class DownloadError(SightlineError):
    """A file on the web cannot be fetched."""


class OutputError(SightlineError):
    """A result cannot be written."""
