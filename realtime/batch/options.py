"""The options of ``batch``, and the digest of those that decide the results."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from engines.localizer import Localizer
from engines.options import MOST_IMAGES, takes
from realtime.batch.plan import Window
from realtime.tracking.options import WHOLE_FRAMES, FollowOptions

FORMAT = 2
"""Of segments and manifests; what an older one left is done again."""


@dataclass(frozen=True)
class Settings:
    """See ``realtime.batch.run.process_all``.

    Attributes:
        video: write the annotated video.
        heat_video: write a video with the heat map over the frames.
        every: only frames whose number is a multiple of it.
        start_s, end_s: the part that is wanted, in seconds since the first frame.
        batch: frames in one engine call.
        following: whether and what to follow.
    """

    video: bool = True
    heat_video: bool = False
    every: int = 1
    start_s: float = 0.0
    end_s: float | None = None
    batch: int = 1
    following: FollowOptions = WHOLE_FRAMES

    @property
    def whole(self) -> bool:
        """Whether a source is one segment: where each frame's answer depends on the frames before
        it.
        """
        return self.following.follow

    @property
    def window(self) -> Window:
        """The part that is wanted."""
        return Window(self.start_s, self.end_s)


def seconds_of(text: str | float) -> float:
    """A time as users write it: ``90``, ``1:30`` or ``0:01:30.5``, in seconds.

    Raises:
        typer.BadParameter: it is none.
    """
    parts = str(text).split(":")
    try:
        found = sum((float(part) * 60.0**place for place, part in enumerate(reversed(parts))), 0.0)
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf") or len(parts) > 3:
        raise typer.BadParameter(f"'{text}' is no time: write seconds, M:SS or H:MM:SS")
    return found


OPTIONS: dict[str, Any] = {
    "video": Annotated[bool, typer.Option(help="Write the annotated video, or only the data.")],
    "heat_video": Annotated[
        bool,
        typer.Option("--heat-video", help="Write a video with the heat map over the frames, too."),
    ],
    "every": Annotated[int, typer.Option(help="Only every so many frames.", min=1)],
    "start_s": Annotated[
        float,
        typer.Option("--start", parser=seconds_of, metavar="[[H:]M:]S", help="Begin so late."),
    ],
    "end_s": Annotated[
        float | None,
        typer.Option(
            "--end",
            parser=seconds_of,
            metavar="[[H:]M:]S",
            help="End there, counted from the beginning.",
        ),
    ],
    "batch": Annotated[
        int, typer.Option(help="Frames in one engine call: pays on GPUs.", min=1, max=MOST_IMAGES)
    ],
}
takes_settings = takes("settings", Settings, OPTIONS)
"""A command's parameter ``settings`` becomes one option for each of these."""


def settings_digest(settings: Settings, localizer: Localizer) -> str:
    """The digest of everything but the source that decides the results: two runs with the same
    digest give the same files.

    The processor and the number of threads are not part of it.
    """
    decides: dict[str, Any] = {
        "format": FORMAT,
        **asdict(settings),
        **localizer.identity,
        "wanted_class": localizer.wanted_class,
    }
    return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=20).hexdigest()
