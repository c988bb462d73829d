"""The options of ``stream`` besides those of the engine and of tracking."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from engines.options import ADVANCED, LOOK_AT, MOST_IMAGES, OUTPUT, SPEED, Option
from realtime.annotate import Look
from realtime.events import USUAL
from realtime.sources.video import SourceOptions

REPEATED_PHOTOS_FPS = 1.0


@dataclass(frozen=True)
class StreamOptions(Look):
    """What ``realtime.live.stream`` does with frames and results, and how it opens live sources.
    The fields of ``Look`` are how the run begins to draw.
    """

    window: Annotated[bool, Option("Open a window where there is a display.", OUTPUT)] = True
    record: Annotated[
        Path | None,
        Option("Annotated MP4 to write, a new one; of several sources, one each.", OUTPUT),
    ] = None
    log: Annotated[
        Path | None,
        Option("Per-frame JSONL to write; it goes on in one that is there.", OUTPUT),
    ] = None
    log_max_mb: Annotated[
        float | None,
        Option("Begin a new log at this size; the last 5 are kept.", OUTPUT, min=0.01),
    ] = None
    events: Annotated[
        Path | None,
        Option("JSONL to write of what came into view: when, what, how sure, until when.", OUTPUT),
    ] = None
    event_clips: Annotated[
        Path | None,
        Option(
            "Folder for a clip of each event, from 3 seconds before it until 2 after it.", OUTPUT
        ),
    ] = None
    on_event: Annotated[
        str | None,
        Option(
            "Tell of it as it comes and goes: a COMMAND to run, or the address of a webhook"
            " (http, https) or of an MQTT topic (mqtt://HOST/TOPIC).",
            OUTPUT,
            metavar="COMMAND|URL",
        ),
    ] = None
    event_score: Annotated[
        float | None,
        Option(
            "Least confidence of a box that makes an event. Else each box that is shown.",
            OUTPUT,
            min=0,
            max=1,
        ),
    ] = None
    event_seconds: Annotated[
        float,
        Option("In view for less than this is no event.", OUTPUT, min=0),
    ] = USUAL.begins_after_s
    trace: Annotated[
        Path | None,
        Option("Timeline to write, FILE.json: opens in ui.perfetto.dev.", OUTPUT),
    ] = None
    metrics: Annotated[
        int | None,
        Option(
            "Port on this machine for Prometheus (/metrics) and /snapshot.jpg.",
            OUTPUT,
            min=0,
            max=65535,
        ),
    ] = None
    web: Annotated[
        str | None, Option("Serve a page to watch and steer on, at [HOST:]PORT.", OUTPUT)
    ] = None
    open_page: Annotated[
        bool, Option("Show the page in a browser; of --web, or on port 8000.", OUTPUT, ("open",))
    ] = False
    web_token: Annotated[
        str | None,
        Option(
            "Secret to see the page and the metrics; beyond this machine, a new one if not given.",
            ADVANCED,
            envvar="SIGHTLINE_WEB_TOKEN",
        ),
    ] = None
    web_dir: Annotated[Path, Option("Folder for recordings begun on the page.", OUTPUT)] = Path(
        "recordings"
    )
    labels_dir: Annotated[
        Path, Option("Folder for labels made on the page: images and labels.csv.", OUTPUT)
    ] = Path("labels")
    repeat: Annotated[
        bool, Option("Play files again and again, until Ctrl-C; photos one a second.", LOOK_AT)
    ] = False
    seconds: Annotated[float | None, Option("Stop after this long.", LOOK_AT, min=0.1)] = None
    policy: Annotated[
        str,
        Option(
            "latest: the newest frame; every: all of them; 'max-age MS': those not older than"
            " that.",
            SPEED,
        ),
    ] = "latest"
    batch: Annotated[
        int,
        Option(
            "Frames of different sources in one engine call, padded where fewer wait: pays on"
            " GPUs.",
            SPEED,
            min=1,
            max=MOST_IMAGES,
        ),
    ] = 1
    width_px: Annotated[
        int | None,
        Option("Asked of a camera, in pixels.", ADVANCED, ("width",), min=1, max=65535),
    ] = None
    height_px: Annotated[
        int | None,
        Option("Asked of a camera, in pixels.", ADVANCED, ("height",), min=1, max=65535),
    ] = None
    rate_fps: Annotated[float | None, Option("Asked of a camera.", ADVANCED, ("fps",), min=0.1)] = (
        None
    )
    camera_backend: Annotated[
        str,
        Option(
            "How cameras are opened: auto, v4l2, gstreamer, dshow, msmf or avfoundation.", ADVANCED
        ),
    ] = "auto"
    stall_s: Annotated[
        float,
        Option(
            "Seconds of silence after which a camera or stream is opened again.",
            ADVANCED,
            ("stall",),
            min=0.5,
        ),
    ] = 3.0

    @property
    def sources(self) -> SourceOptions:
        """How live sources are opened."""
        return SourceOptions(
            self.width_px,
            self.height_px,
            self.rate_fps,
            self.camera_backend,
            self.stall_s,
            photos_fps=REPEATED_PHOTOS_FPS if self.repeat else None,
        )
