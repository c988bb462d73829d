"""The options of ``stream`` besides those of the engine and of tracking."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from engines.options import MOST_IMAGES, takes
from realtime.sources.video import SourceOptions


@dataclass(frozen=True)
class StreamOptions:
    """See ``realtime.live.stream``.

    Attributes:
        window: open one for each source where there is a display.
        record: annotated MP4 to write, see ``realtime.session.Settings``.
        log: JSONL to write.
        log_max_mb: begin a new one when it has grown so large, keeping the last few; None for one
            that grows.
        trace: timeline to write, see ``realtime.trace``.
        metrics: port for Prometheus and ``/snapshot.jpg``, see ``realtime.metrics``.
        web: ``[HOST:]PORT`` of the page, see ``realtime.web.server``.
        web_token: opens the page and the metrics; None for none on this machine alone, for a new
            one elsewhere.
        web_dir: where recordings go that are begun on the page.
        heat_map: see ``realtime.annotate.Look``.
        alpha: likewise.
        smoothing: likewise.
        seconds: when to stop.
        policy: what becomes of frames that come too fast, see ``realtime.frame_queue.Policy``.
        batch: frames of different sources in one engine call; where fewer wait, it is filled up,
            and takes as long.
        width_px, height_px, rate_fps, camera_backend, stall_s: see
        ``realtime.sources.video.SourceOptions``.
    """

    window: bool = True
    record: Path | None = None
    log: Path | None = None
    log_max_mb: float | None = None
    trace: Path | None = None
    metrics: int | None = None
    web: str | None = None
    web_token: str | None = None
    web_dir: Path = Path("recordings")
    heat_map: str = "inset"
    alpha: float = 0.5
    smoothing: float = 0.0
    seconds: float | None = None
    policy: str = "latest"
    batch: int = 1
    width_px: int | None = None
    height_px: int | None = None
    rate_fps: float | None = None
    camera_backend: str = "auto"
    stall_s: float = 3.0

    @property
    def sources(self) -> SourceOptions:
        """How live sources are opened."""
        return SourceOptions(
            self.width_px, self.height_px, self.rate_fps, self.camera_backend, self.stall_s
        )


OPTIONS: dict[str, Any] = {
    "window": Annotated[bool, typer.Option(help="Open a window where there is a display.")],
    "record": Annotated[
        Path | None,
        typer.Option(help="Annotated MP4 to write, a new one; of several sources, one each."),
    ],
    "log": Annotated[
        Path | None, typer.Option(help="Per-frame JSONL to write; it goes on in one that is there.")
    ],
    "log_max_mb": Annotated[
        float | None,
        typer.Option(help="Begin a new log at this size; the last 5 are kept.", min=0.01),
    ],
    "trace": Annotated[
        Path | None, typer.Option(help="Timeline to write, FILE.json: opens in ui.perfetto.dev.")
    ],
    "metrics": Annotated[
        int | None,
        typer.Option(
            help="Port on this machine for Prometheus (/metrics) and /snapshot.jpg.",
            min=0,
            max=65535,
        ),
    ],
    "web": Annotated[
        str | None, typer.Option(help="Serve a page to watch and steer on, at [HOST:]PORT.")
    ],
    "web_token": Annotated[
        str | None,
        typer.Option(
            envvar="SIGHTLINE_WEB_TOKEN",
            help=(
                "Secret to see the page and the metrics; beyond this machine, a new one if not"
                " given."
            ),
        ),
    ],
    "web_dir": Annotated[Path, typer.Option(help="Folder for recordings begun on the page.")],
    "heat_map": Annotated[
        str, typer.Option(help="inset: in the corner; over: on the whole picture; off.")
    ],
    "alpha": Annotated[float, typer.Option(help="Opacity of --heat-map over.", min=0, max=1)],
    "smoothing": Annotated[
        float,
        typer.Option(
            "--smooth",
            help="Calm the drawn box: 0 (not at all) to 1. The log keeps the raw box.",
            min=0,
            max=1,
        ),
    ],
    "seconds": Annotated[float | None, typer.Option(help="Stop after this long.", min=0.1)],
    "policy": Annotated[
        str,
        typer.Option(
            help=(
                "latest: the newest frame; every: all of them; 'max-age MS': those not older than"
                " that."
            )
        ),
    ],
    "batch": Annotated[
        int,
        typer.Option(
            min=1,
            max=MOST_IMAGES,
            help=(
                "Frames of different sources in one engine call, padded where fewer wait: pays on"
                " GPUs."
            ),
        ),
    ],
    "width_px": Annotated[
        int | None, typer.Option("--width", help="Asked of a camera, in pixels.", min=1, max=65535)
    ],
    "height_px": Annotated[
        int | None, typer.Option("--height", help="Asked of a camera, in pixels.", min=1, max=65535)
    ],
    "rate_fps": Annotated[float | None, typer.Option("--fps", help="Asked of a camera.", min=0.1)],
    "camera_backend": Annotated[
        str,
        typer.Option(
            help="How cameras are opened: auto, v4l2, gstreamer, dshow, msmf or avfoundation."
        ),
    ],
    "stall_s": Annotated[
        float,
        typer.Option(
            "--stall",
            help="Seconds of silence after which a camera or stream is opened again.",
            min=0.5,
        ),
    ],
}
takes_stream = takes("options", StreamOptions, OPTIONS)
"""A command's parameter ``options`` becomes one option for each of these."""
