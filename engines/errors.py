"""All errors that Sightline raises on purpose, and the commands that they tell the user to run.

The error tree (each is one clear line: what, where, what to do; the command line ends with status
2)::

    SightlineError
    ├── ModelError    a network, its weights or a head cannot be used
    ├── InputError    a tensor given to an engine does not fit
    ├── EngineError   a backend is missing or failed
    ├── SourceError   a camera, video, folder or data set cannot be read
    ├── DownloadError a file on the web cannot be fetched
    └── OutputError   a result cannot be written

Commands that install what is missing work in any folder, for the Python that runs Sightline. An
extra is printed as the packages that it stands for: ``pip install '.[web]'`` works in the folder of
a clone only, and Sightline itself is on no package index. What has its command's name there is
somebody else's.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

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


DISTRIBUTION = "sightline-vision"
ROOT = Path(__file__).parent.parent
"""The folder of the clone, or ``site-packages``."""


def install_packages(*requirements: str, options: str = "") -> str:
    """The command that installs these packages, such as ``pip install 'ray>=2.55'``.

    Args:
        requirements: names, with versions where they matter.
        options: of ``pip install``.
    """
    return " ".join([_pip_install(), *options.split(), *map(_quoted, requirements)])


def install_extra(name: str) -> str:
    """The command that installs what an extra of Sightline stands for.

    Raises:
        KeyError: there is no extra of that name.
    """
    return install_packages(*extra_requirements(name))


def sightline_command(name: str, **options: str | bool) -> str:
    """A command of Sightline's own, such as ``sightline build --backend tensorrt --rebuild``.

    Args:
        name: of the command.
        options: their values; True where one has none, False where it is left out.
    """
    words = [
        f"--{option.replace('_', '-')}" + (f" {value}" if isinstance(value, str) else "")
        for option, value in options.items()
        if value is not False
    ]
    return " ".join(["sightline", name, *words])


REBUILD = sightline_command("build", backend="tensorrt", rebuild=True)


def restore(path: Path) -> str:
    """What brings back a damaged file or folder of Sightline's own: a command, or words where none
    can be known.
    """
    if (ROOT / ".git").exists() and path.is_relative_to(ROOT):
        return (
            f"git -C {_quoted(str(ROOT))} checkout -- {_quoted(path.relative_to(ROOT).as_posix())}"
        )
    try:
        origin = json.loads(
            importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json") or "{}"
        ).get("url", "")
    except importlib.metadata.PackageNotFoundError:
        origin = ""
    from urllib.parse import urlparse  # half of what this module would take to load
    from urllib.request import url2pathname

    source = Path(url2pathname(urlparse(origin).path))
    if urlparse(origin).scheme == "file" and source.exists():
        return install_packages(str(source), options="--force-reinstall --no-deps")
    return "install Sightline again, from the wheel file or the folder that it came from"


def extra_requirements(name: str) -> list[str]:
    """The packages of an extra that this machine needs, those of the extras that it names included.

    Raises:
        KeyError: there is no extra of that name.
    """
    from packaging.requirements import Requirement

    found: list[str] = []
    for text in _extras()[name]:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": name}):
            continue
        if requirement.name == DISTRIBUTION:
            found += [
                other for extra in sorted(requirement.extras) for other in extra_requirements(extra)
            ]
        else:
            found.append(f"{requirement.name}{requirement.specifier}")
    return list(dict.fromkeys(found))


def _extras() -> dict[str, list[str]]:
    """Every extra's requirements: as pyproject.toml has them in a clone, else from the metadata of
    the installed wheel.
    """
    project = ROOT / "pyproject.toml"
    if project.is_file():
        stated: dict[str, list[str]] = tomllib.loads(project.read_text(encoding="utf-8"))[
            "project"
        ]["optional-dependencies"]
        return stated
    metadata = importlib.metadata.metadata(DISTRIBUTION)
    names = metadata.get_all("Provides-Extra") or []
    requirements = [text for text in metadata.get_all("Requires-Dist") or [] if "extra ==" in text]
    return {
        name: [text for text in requirements if re.search(rf"extra == ['\"]{name}['\"]", text)]
        for name in names
    }


def _pip_install() -> str:
    """``pip install`` where ``pip`` is the one of this Python, else a longer way to it."""
    found, python = shutil.which("pip"), _quoted(sys.executable)
    if found and Path(found).parent == Path(sys.executable).parent:
        return "pip install"
    if importlib.util.find_spec("pip") is None and shutil.which("uv"):
        return f"uv pip install --python {python}"
    return f"{python} -m pip install"


def _quoted(word: str) -> str:
    """The word as a shell reads it back: a bare ``>`` would write to a file."""
    quote = '"' if os.name == "nt" else "'"
    return (
        word
        if re.fullmatch(r"[\w./:\\-]+" if os.name == "nt" else r"[\w./-]+", word)
        else f"{quote}{word}{quote}"
    )
