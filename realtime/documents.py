"""The common template of result pages. All of them extend ``assets/document.html``."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

ASSETS = Path(__file__).parent / "assets"


def templates(folder: Path, escape: bool = True) -> Environment:
    """The templates of a folder, beside the shared one.

    Args:
        folder: holds them.
        escape: for HTML, whose content may hold anything; Markdown stays as it is.
    """
    return Environment(
        loader=FileSystemLoader([folder, ASSETS]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=escape,
    )
