"""What came of one clip, as a page and a plot."""

from pathlib import Path
from typing import Any

from engines.files import whole_file
from realtime.batch.clip import Clip
from realtime.batch.tally import Tally


def plot_latency(tally: Tally, path: Path, title: str) -> None:
    with whole_file(path) as part:
        part.write_bytes(b"")


def write_report(
    path: Path, title: str, clip: Clip, summary: dict[str, Any], tally: Tally, strip: list[dict[str, Any]]
) -> None:
    with whole_file(path) as part:
        part.write_bytes(b"")
