"""The demo clip, whose true boxes are known: a man walks up to a table, and a car drives by.

Cut from "car-detection" and "one-by-one-person-detection" of Intel's sample videos, CC BY 4.0, see
the file NOTICE. The boxes were drawn by hand on every second to fifth frame; between these they lie
on straight lines. Frames without a box show no object, or hardly any of it.
"""

import csv
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from engines.errors import SourceError
from engines.localizer import ImageBgr
from realtime.frames import BoxPx, Frame
from realtime.sources.video import USUAL, Source, SourceOptions

ASSETS = Path(__file__).parent.parent / "assets"
CLIP, BOXES = ASSETS / "demo.mp4", ASSETS / "demo_boxes.csv"
CLIP_FRAMES = 106


class Demo(Source):
    """The clip, again and again up to so many frames. The true box of every frame is known."""

    name = "demo"
    rate_fps = 12.5
    time_base = Fraction(1, 12500)

    def __init__(self, frames: int = CLIP_FRAMES) -> None:
        self.frames = self._count = frames
        self._truths = true_boxes()

    def __iter__(self) -> Iterator[Frame]:
        with closing(_pictures()) as pictures:
            for index in range(self._count):
                start_ns = time.monotonic_ns()
                image = next(pictures)
                now_ns = time.monotonic_ns()
                yield Frame(
                    image,
                    self.name,
                    index,
                    index / self.rate_fps,
                    now_ns,
                    (now_ns - start_ns) / 1e6,
                    self._truths.get(index % CLIP_FRAMES),
                )


def true_boxes() -> dict[int, BoxPx]:
    """The box of each frame of the clip that has one."""
    with BOXES.open(encoding="utf-8") as file:
        rows = csv.DictReader(file)
        return {
            int(row["frame"]): (
                float(row["x0"]),
                float(row["y0"]),
                float(row["x1"]),
                float(row["y1"]),
            )
            for row in rows
        }


def _pictures() -> Generator[ImageBgr, None, None]:
    while True:
        with av.open(str(CLIP)) as container:
            for picture in container.decode(video=0):
                yield np.asarray(picture.to_ndarray(format="bgr24"), np.uint8)


def open_demo(spec: str, _options: SourceOptions = USUAL) -> Demo:
    """Open ``demo:`` or ``demo:FRAMES``.

    Raises:
        SourceError: the number of frames is none.
    """
    count = spec.removeprefix("demo:") or str(CLIP_FRAMES)
    if not count.isdecimal() or not int(count):
        raise SourceError(f"'{spec}': write demo: or demo:FRAMES, like demo:120")
    return Demo(int(count))
