"""Sources that are video: files and streams through PyAV, cameras through OpenCV. Lost frames are
noticed.

``python -m realtime.sources.video 0`` opens camera 0, reads for a moment and prints one JSON object
with what it found. ``probe`` runs it as a program of its own, because a driver may hang.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import av
import av.error
import cv2
import numpy as np
from av.codec.context import Flags

from engines.errors import SourceError
from engines.text import shown
from realtime.frames import Frame
from realtime.sources.colour import ToBgr
from realtime.sources.film import (
    BOUNDED,
    Film,
    Packet,
    Pipe,
    decoder_threads,
    is_pipe,
    open_film,
    presented_frames,
)


class Losses:
    """Which pictures of a live stream are whole, when data are lost on the way.

    A loss spoils its picture and all that build on it, until the next key picture. Decoders fill
    the gaps, and own up to few.

    Attributes:
        last_s: how long the present loss has lasted.
    """

    def __init__(self) -> None:
        self._whole_from_pts = -math.inf
        self._since_s = 0.0
        self._hole_before = False

    @property
    def last_s(self) -> float:
        return time.monotonic() - self._since_s if self._whole_from_pts == math.inf else 0.0

    def begin(self) -> None:
        """Something is lost."""
        if self._whole_from_pts != math.inf:
            self._whole_from_pts, self._since_s = math.inf, time.monotonic()

    def come(self, packet: "av.Packet[av.VideoStream]") -> None:
        """Look at a packet before it is decoded."""
        if (
            packet.is_corrupt or self._hole_before
        ):  # a hole is told of where it begins, and may reach into the next packet
            self.begin()
        elif packet.is_keyframe and self._whole_from_pts == math.inf:
            self._whole_from_pts = -math.inf if packet.pts is None else packet.pts
        self._hole_before = packet.is_corrupt

    def spoil(self, picture: av.VideoFrame) -> bool:
        """Whether this picture is not whole."""
        if picture.is_corrupt:
            self.begin()
        return self._whole_from_pts == math.inf or (
            picture.pts is not None and picture.pts < self._whole_from_pts
        )


LIVE_SCHEMES = frozenset({"rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp", "srt", "tcp"})
"""Addresses under which time does not wait; http(s) may hold a file, which does."""
LOW_LATENCY = {
    "fflags": "nobuffer",
    "max_delay": "0",
    "probesize": "500000",
    "analyzeduration": "500000",
}
"""FFmpeg's demuxer keeps nothing back for sorting, and looks at the first half second only to learn
what it has before it.
"""
OPEN_TIMEOUT_S, FILE_TIMEOUT_S = 5.0, 10.0
NOTICE_S = 0.5  # who watches for a stall notices it before FFmpeg does
LONGEST_LOSS_S = 10.0  # key pictures come more often; a new connection begins with one
CAMERA_BACKENDS = {
    "auto": cv2.CAP_ANY,
    "v4l2": cv2.CAP_V4L2,
    "gstreamer": cv2.CAP_GSTREAMER,
    "dshow": cv2.CAP_DSHOW,
    "msmf": cv2.CAP_MSMF,
    "avfoundation": cv2.CAP_AVFOUNDATION,
}


@dataclass(frozen=True)
class SourceOptions:
    """How live sources are opened.

    Attributes:
        width_px, height_px, rate_fps: asked of a camera; it may give others. None for its own.
        camera_backend: one of ``CAMERA_BACKENDS``.
        stall_s: a stream from which nothing comes for so long has stalled.
        poll: ask an address that answers with one picture again and again, see
            ``realtime.sources.web_camera``.
        photos_fps: how fast photos are shown; None for as fast as a film.
    """

    width_px: int | None = None
    height_px: int | None = None
    rate_fps: float | None = None
    camera_backend: str = "auto"
    stall_s: float = 3.0
    poll: bool = True
    photos_fps: float | None = None


USUAL = SourceOptions()


class Source:
    """An open source: iterate it once, inside its ``with`` block.

    Attributes:
        name: for logs and file names; ``realtime.sources.spec.open_source`` sets it.
        live: it cannot wait: frames that are not read in time are lost.
        frames: how many there are, where it is known.
        rate_fps: nominal frame rate.
        time_base: the unit of its timestamps, in seconds.
        notes: what of it is not read, in words; more may come while it is read.
        heard_s: when something last came (``time.monotonic()``), even if it was no whole frame.
    """

    name: str
    live: bool = False
    frames: int | None = None
    rate_fps: float = 25.0
    time_base: Fraction = Fraction(1, 90000)
    heard_s: float = 0.0
    notes: Sequence[str] = ()

    def __iter__(self) -> Iterator[Frame]:
        raise NotImplementedError

    def close(self) -> None:
        """Release what is open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()


class VideoFile(Source):
    """A video file or network stream, with its own timestamps and rotation.

    Raises:
        SourceError: it cannot be opened, holds no video, or ends before all its frames are decoded;
            a live one stalls, or gives no whole picture for long.
    """

    def __init__(self, url: str, options: SourceOptions = USUAL) -> None:
        self.name = "video"
        self._url = shown(url)
        self._stall_s = options.stall_s
        self._pipe = Pipe(url) if is_pipe(url) else None
        scheme = url.split("://", maxsplit=1)[0].lower() if "://" in url else ""
        demuxing: dict[str, str] = {}
        timeout: Any = FILE_TIMEOUT_S if scheme else None
        if scheme in LIVE_SCHEMES:
            demuxing, timeout = dict(LOW_LATENCY), (OPEN_TIMEOUT_S, options.stall_s + NOTICE_S)
        if scheme in ("rtsp", "rtsps"):
            demuxing["rtsp_transport"] = "tcp"
        begin_s = time.monotonic()
        try:
            self._container = open_film(self._pipe or url, demuxing, timeout)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            silent = (
                scheme in LIVE_SCHEMES and time.monotonic() - begin_s >= OPEN_TIMEOUT_S
            )  # FFmpeg has other words for it
            reason = f"no answer within {OPEN_TIMEOUT_S:g} s" if silent else reason_of(error)
            raise SourceError(f"cannot open {self._url}: {reason}") from error
        # A file on a web server can wait.
        self.live = scheme in LIVE_SCHEMES or ("://" in url and not self._container.duration)
        self._film = Film(
            self._container, self._url, None if scheme or self._pipe else url, self.live
        )
        self._stream, self.notes = self._film.stream, self._film.left_out
        self._stream.thread_type = (
            "SLICE" if self.live else decoder_threads(self._stream)
        )  # threads by frames keep as many frames back
        if self.live:
            self._stream.codec_context.flags |= Flags.low_delay
            if (
                self._stream.codec_context.name == "mjpeg"
            ):  # half a JPEG is an error: else its other half is made up
                self._stream.codec_context.options = {**BOUNDED, "err_detect": "explode"}
        self.frames = None if self.live else presented_frames(self._container, self._stream) or None
        self.rate_fps = float(self._stream.average_rate or 25)
        self.time_base = self._stream.time_base or Fraction(1, 90000)

    def __iter__(self) -> Iterator[Frame]:
        index, first_pts = 0, None
        to_bgr = ToBgr()
        start_ns = time.monotonic_ns()
        for picture, damaged in self._pictures():
            pts = picture.pts if picture.pts is not None else index
            first_pts = pts if first_pts is None else first_pts
            image = to_bgr(picture)
            now_ns, pts_s = time.monotonic_ns(), float((pts - first_pts) * self.time_base)
            if self.live:  # waiting for the camera is no reading
                start_ns = round(self.heard_s * 1e9)
            yield Frame(
                image, self.name, index, pts_s, now_ns, (now_ns - start_ns) / 1e6, damaged=damaged
            )
            index += 1
            start_ns = time.monotonic_ns()
        if index == 0:
            raise SourceError(f"{self._url} holds no frame: the file is empty or cut off")
        if self.frames and index < self.frames and not self.live:
            raise SourceError(
                f"{self._url} is cut off: {index} of {self.frames} frames can be decoded"
            )

    def _pictures(self) -> Iterator[tuple[av.VideoFrame, bool]]:
        """Decoded pictures, and whether something of them is lost; in a file, what is lost is an
        error.
        """
        count = 0
        losses = Losses()
        asked_s = time.monotonic()
        try:
            for packet in self._film.packets():
                self.heard_s = time.monotonic()
                if (
                    self.live and self.heard_s - asked_s > self._stall_s
                ):  # FFmpeg gives up, and out what it has of a picture
                    raise SourceError(
                        f"{self._url} stopped after frame {count}: nothing came for"
                        f" {self._stall_s:g} s"
                    )
                losses.come(packet)
                for picture in self._decoded(packet, losses):
                    yield picture, self.live and losses.spoil(picture)
                    count += 1
                if self.live and losses.last_s > LONGEST_LOSS_S:
                    raise SourceError(
                        f"{self._url} gives no whole picture any more: too much is lost on the way"
                    )
                asked_s = time.monotonic()
        except av.error.FFmpegError as error:
            words = "stopped" if self.live else "is damaged"
            raise SourceError(
                f"{self._url} {words} after frame {count}: {reason_of(error)}"
            ) from error

    def _decoded(self, packet: Packet, losses: Losses) -> list[av.VideoFrame]:
        try:
            return packet.decode()
        except av.error.InvalidDataError:
            if not self.live:
                raise
            losses.begin()
            return []

    def close(self) -> None:
        """Release the file."""
        self._container.close()
        if self._pipe:
            self._pipe.close()


class Camera(Source):
    """A camera by number, through OpenCV.

    Attributes:
        width_px, height_px: what it gives.

    Raises:
        SourceError: it cannot be opened, or stops giving frames.
    """

    live = True
    time_base = Fraction(1, 1000000)

    def __init__(self, index: int, options: SourceOptions = USUAL) -> None:
        self.name = f"camera{index}"
        if options.camera_backend not in CAMERA_BACKENDS:
            raise SourceError(
                f"unknown camera backend '{options.camera_backend}': use"
                f" {', '.join(CAMERA_BACKENDS)}"
            )
        level = cv2.utils.logging.setLogLevel(
            cv2.utils.logging.LOG_LEVEL_SILENT
        )  # it lists every driver that it tries
        self._capture = cv2.VideoCapture(index, CAMERA_BACKENDS[options.camera_backend])
        cv2.utils.logging.setLogLevel(level)
        if not self._capture.isOpened():
            raise SourceError(
                f"camera {index} cannot be opened: check that it is plugged in and not in use;"
                " without a camera, a file or demo: can be streamed"
            )
        wanted = {
            cv2.CAP_PROP_FRAME_WIDTH: options.width_px,
            cv2.CAP_PROP_FRAME_HEIGHT: options.height_px,
            cv2.CAP_PROP_FPS: options.rate_fps,
            cv2.CAP_PROP_READ_TIMEOUT_MSEC: 1e3 * options.stall_s,
        }
        for what, value in wanted.items():
            if value is not None:
                self._capture.set(what, value)
        self.width_px = int(self._capture.get(cv2.CAP_PROP_FRAME_WIDTH))
        self.height_px = int(self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        self.rate_fps = float(self._capture.get(cv2.CAP_PROP_FPS)) or 30.0

    def __iter__(self) -> Iterator[Frame]:
        index, first_ns = 0, None
        while True:
            good, image = self._capture.grab(), None
            start_ns = time.monotonic_ns()  # waiting for the camera is no reading
            if good:
                good, image = self._capture.retrieve()
            now_ns = time.monotonic_ns()
            if not good:
                raise SourceError(
                    f"{self.name} stopped giving frames after {index}: check its cable"
                )
            first_ns = now_ns if first_ns is None else first_ns
            frame = np.asarray(image, np.uint8)
            yield Frame(
                frame,
                self.name,
                index,
                (now_ns - first_ns) / 1e9,
                now_ns,
                (now_ns - start_ns) / 1e6,
            )
            index += 1

    def close(self) -> None:
        """Release the camera."""
        self._capture.release()


def reason_of(error: BaseException) -> str:
    """FFmpeg's or the system's words without the error number and path."""
    if isinstance(error, av.error.ExitError):
        return "nothing came for too long"
    return str(
        shown(getattr(error, "strerror", None) or str(error).strip() or type(error).__name__)
    )


MEASURED_S = 1.5
SETTLE_FRAMES = 5  # the first ones come late: exposure and white balance are still being found
PROBE_TIMEOUT_S = 8.0
MOST_CAMERAS = 4


@dataclass(frozen=True)
class CameraFacts:
    """What opening a camera showed.

    Attributes:
        index: its number, as ``stream`` takes it.
        width_px, height_px: of its frames; 0 where there was none.
        fps: measured; ``nominal_fps`` is what its driver claims.
        problem: in words, or empty.
    """

    index: int
    width_px: int = 0
    height_px: int = 0
    fps: float = 0.0
    nominal_fps: float = 0.0
    backend: str = ""
    problem: str = ""


def find_cameras(timeout_s: float = PROBE_TIMEOUT_S) -> list[CameraFacts]:
    """Every camera that can be told to be here, each asked in a process of its own.

    Where the system lists its video devices (Linux), those; elsewhere the first ``MOST_CAMERAS``
    numbers. Numbers at which nothing answers are left out, except where the system says that there
    is a device.
    """
    listed = listed_cameras()
    probed = [
        probe(index, timeout_s) for index in (listed if listed is not None else range(MOST_CAMERAS))
    ]
    return [facts for facts in probed if not facts.problem or listed is not None]


def listed_cameras(devices: Path = Path("/dev")) -> list[int] | None:
    """Numbers of ``/dev/video*``; None where the system keeps no such list."""
    if not sys.platform.startswith("linux"):
        return None
    numbers = [path.name.removeprefix("video") for path in devices.glob("video*")]
    return sorted(int(number) for number in numbers if number.isdigit())


def probe(index: int, timeout_s: float = PROBE_TIMEOUT_S) -> CameraFacts:
    """Open the camera in another process; one that hangs or crashes is a problem in words, and no
    more.
    """
    command = [sys.executable, "-m", "realtime.sources.video", str(index)]
    try:
        ended = subprocess.run(
            command,
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        facts = json.loads(ended.stdout.strip().splitlines()[-1])
        return CameraFacts(**facts)
    except subprocess.TimeoutExpired:
        return CameraFacts(index, problem=f"does not answer within {timeout_s:g} s")
    except (OSError, ValueError, IndexError, TypeError):
        return CameraFacts(index, problem="its driver ended the probe")


def measure(index: int) -> CameraFacts:
    """Open the camera here and count frames for ``MEASURED_S``."""
    cv2.utils.logging.setLogLevel(
        cv2.utils.logging.LOG_LEVEL_SILENT
    )  # it lists every driver that it tries
    capture = cv2.VideoCapture(index)
    if not capture.isOpened():
        return CameraFacts(
            index, problem="cannot be opened: in use, not permitted, or not a camera"
        )
    nominal, backend = float(capture.get(cv2.CAP_PROP_FPS)), str(capture.getBackendName())
    shape = (0, 0)
    count = 0
    start = 0.0
    for number in range(100000):
        good, image = capture.read()
        now = time.monotonic()
        if not good:
            break
        shape = image.shape[:2]
        if number < SETTLE_FRAMES:
            start = now
        elif now - start >= MEASURED_S:
            break
        else:
            count += 1
    capture.release()
    if not count:
        return CameraFacts(
            index, nominal_fps=nominal, backend=backend, problem="opens, but gives no frames"
        )
    fps = round(count / max(now - start, 1e-9), 1)
    return CameraFacts(index, int(shape[1]), int(shape[0]), fps, round(nominal, 1), backend)


if __name__ == "__main__":
    with contextlib.redirect_stderr(open(os.devnull, "w")):  # noqa: PTH123
        print(json.dumps(asdict(measure(int(sys.argv[1])))))
