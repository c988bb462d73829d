"""The options of ``batch``: ``Settings`` of the results, of which those that decide them have a
digest, and ``Scale``, how much there is to do and on what.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from engines.errors import InputError
from engines.localizer import Localizer
from engines.options import ADVANCED, LOOK_AT, MOST_IMAGES, OUTPUT, SPEED, EngineOptions, Option
from engines.text import shown
from realtime.batch.plan import Window
from realtime.batch.segment import Clip
from realtime.sources.spec import kind_of
from realtime.tracking.options import WHOLE_FRAMES, FollowOptions

FORMAT = 5
"""Of segments and manifests; what an older one left is done again."""


def seconds_of(text: str | float) -> float:
    """A time as users write it: ``90``, ``1:30`` or ``0:01:30.5``, in seconds.

    Raises:
        InputError: it is none.
    """
    parts = str(text).split(":")
    try:
        found = sum((float(part) * 60.0**place for place, part in enumerate(reversed(parts))), 0.0)
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf") or len(parts) > 3:
        raise InputError(f"'{text}' is no time: write seconds, M:SS or H:MM:SS")
    return found


@dataclass(frozen=True)
class Settings:
    """What ``realtime.batch.run.process_all`` makes of each source.

    ``start_s`` and ``end_s`` are seconds since the first frame; every frame whose number is a
    multiple of ``every`` is looked at.
    """

    video: Annotated[bool, Option("Write the annotated video, or only the data.", OUTPUT)] = True
    copy_video: Annotated[
        bool,
        Option(
            "Copy the film as it is into NAME.boxes.mkv, with the boxes as a subtitle track, in"
            " place of drawing on it and encoding it.",
            OUTPUT,
        ),
    ] = False
    heat_video: Annotated[
        bool,
        Option(
            "Write a video with the heat map over the frames, too.", OUTPUT, ("heat_map_video",)
        ),
    ] = False
    event_clips: Annotated[
        bool,
        Option(
            "Write a clip of each event out of the annotated video, with seconds around it.", OUTPUT
        ),
    ] = False
    every: Annotated[int, Option("Only every so many frames.", LOOK_AT, min=1)] = 1
    start_s: Annotated[
        float,
        Option("Begin so late.", LOOK_AT, ("start",), parser=seconds_of, metavar="[[H:]M:]S"),
    ] = 0.0
    end_s: Annotated[
        float | None,
        Option(
            "End there, counted from the beginning.",
            LOOK_AT,
            ("end",),
            parser=seconds_of,
            metavar="[[H:]M:]S",
        ),
    ] = None
    batch: Annotated[
        int | None,
        Option(
            "Frames in one engine call. Else 2 of video on OpenVINO, and 1.",
            SPEED,
            min=1,
            max=MOST_IMAGES,
        ),
    ] = None
    following: FollowOptions = WHOLE_FRAMES

    def __post_init__(self) -> None:
        if self.event_clips and not self.draws:
            raise InputError(
                "clips of events are cut out of the annotated video: write that, or no clips",
                option=("event_clips", "copy_video" if self.copy_video else "video"),
            )

    def in_order(self, clip: Clip) -> bool:
        """Whether the segments of a source are done one after the other: where each frame's answer
        depends on the frames before it.
        """
        return bool(self.following.for_source(clip.kind == "images").follow)

    def beside(self, choice: EngineOptions) -> "tuple[Settings, EngineOptions]":
        """These settings and the engine's options, as ``FollowOptions.beside`` divides them.

        Raises:
            InputError: see there.
        """
        following, choice = self.following.beside(choice)
        return replace(self, following=following), choice

    def images(self, specs: Sequence[str]) -> int:
        """How many frames of these sources an engine call takes, in the words of
        ``engines.choose.open_localizer``. Photos go one by one: each may have its own shape.
        """
        photos = any(kind_of(spec).alone for spec in specs)
        return self.batch or (1 if photos else 0)

    @property
    def draws(self) -> bool:
        """Whether an annotated video is encoded."""
        return self.video and not self.copy_video

    def check(self, specs: Sequence[str]) -> None:
        """Refuse what these sources cannot be.

        Raises:
            InputError: a video is to be copied of what is no film that can be read twice.
        """
        for spec in specs if self.copy_video else ():
            kind = kind_of(spec)
            if kind.alone or not kind.can_be_cut:
                raise InputError(
                    f"{shown(spec)} is no film whose pictures can be copied: leave that away",
                    option="copy_video",
                )

    @property
    def window(self) -> Window:
        """The part that is wanted."""
        return Window(self.start_s, self.end_s)


@dataclass(frozen=True)
class Scale:
    """How much there is to do, and on what. ``cameras``, ``hours``, ``within_h`` and ``machines``
    are of the estimate, see ``realtime.batch.estimate``; ``ray`` is an address of
    ``realtime.batch.cluster.ray.Cluster``, None for this machine alone.
    """

    ray: Annotated[
        str | None,
        Option(
            "Work on a Ray cluster: auto (this machine's), HOST:PORT, or local (one of this"
            " machine alone).",
            SPEED,
        ),
    ] = None
    workers: Annotated[
        int | None,
        Option("Engines on the cluster; else as many as it has room for.", SPEED, min=1),
    ] = None
    plan: Annotated[
        bool, Option("Measure a minute and estimate hours, machines and storage.", ADVANCED)
    ] = False
    cameras: Annotated[
        int | None, Option("For --plan: so many of them, day and night.", ADVANCED, min=1)
    ] = None
    hours: Annotated[
        float | None, Option("For --plan: hours of video, of each camera.", ADVANCED, min=0.01)
    ] = None
    within_h: Annotated[
        float | None, Option("For --plan: hours it may take.", ADVANCED, ("within",), min=0.01)
    ] = None
    machines: Annotated[
        int | None, Option("For --plan: so many like this one.", ADVANCED, min=1)
    ] = None


def settings_digest(settings: Settings, localizer: Localizer) -> str:
    """The digest of everything but the source that decides the results: two runs with the same
    digest give the same files.

    The processor and the number of threads are not part of it.
    """
    decides: dict[str, Any] = {
        "format": FORMAT,
        **asdict(settings),
        "batch": localizer.batch,
        **localizer.identity,
        "wanted_class": localizer.wanted_class,
    }
    for name in ("event_clips", "copy_video"):
        if not getattr(settings, name):
            del decides[name]  # what was done before there were these is not done again
    return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=20).hexdigest()
