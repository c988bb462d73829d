"""Finds cameras and measures their real frame rate. It runs as a program of its own, because a
driver may hang.

``python -m realtime.sources.cameras 0`` opens camera 0, reads for a moment and prints one JSON
object.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

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
    command = [sys.executable, "-m", "realtime.sources.cameras", str(index)]
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
    import cv2

    cv2.utils.logging.setLogLevel(
        cv2.utils.logging.LOG_LEVEL_SILENT
    )  # it lists every driver that it tries
    capture = cv2.VideoCapture(index)
    if not capture.isOpened():
        return CameraFacts(
            index, problem="cannot be opened: in use, not permitted, or not a camera"
        )
    nominal, backend = float(capture.get(cv2.CAP_PROP_FPS)), str(capture.getBackendName())
    shape, count, start = (0, 0), 0, 0.0
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
