"""What waits between camera and engine: by which policy frames are dropped, and that each is
accounted for.
"""

import threading
import time
from array import array
from pathlib import Path

import numpy as np
import pytest

from engines.errors import SourceError
from realtime import capture as connection
from realtime.frame_queue import Policy
from realtime.frames import Frame
from realtime.sources.video import Source
from tests.engines.mock import MockEngine
from tests.realtime.media import write_video
from tests.realtime.watched import PATIENCE_S, Watched


def test_frames_older_than_their_age_are_dropped(tmp_path):
    video = str(write_video(tmp_path / "clip.mp4", 50))
    with Watched(video, policy=Policy.of("max-age 100"), delay_s=0.06) as run:
        run._thread.join(PATIENCE_S)
    run.check()
    causes = run.live_run.summary()["causes"]
    assert causes["older than 100 ms"] > 5
    assert set(causes) == {"older than 100 ms"}
    assert np.median([row["wait_ms"] for row in run.shown()]) < 100


def test_max_age_keeps_order_and_every_drops_nothing(tmp_path):
    video = str(write_video(tmp_path / "clip.mp4", 25))
    with Watched(video, policy=Policy.of("every"), delay_s=0.05) as run:
        run._thread.join(PATIENCE_S)
    run.check()
    assert [row["frame"] for row in run.shown()] == list(range(25))


@pytest.mark.parametrize("text", ["newest", "max-age", "max-age 0", "max-age x", ""])
def test_an_unknown_policy_is_a_mistake(text):
    with pytest.raises(SourceError, match="write latest, every"):
        Policy.of(text)


def test_a_run_that_is_stopped_accounts_for_what_was_waiting(tmp_path):
    video = str(write_video(tmp_path / "clip.mp4", 250))
    with Watched(video, policy=Policy.of("every"), delay_s=0.1) as run:
        run.wait_for_more(5)
    run.check()
    assert run.error is None
    assert run.live_run.summary()["causes"].get("the run ended", 0) >= 1


class Hasty(Source):
    """A camera that gives a frame every ``gap_s`` or so."""

    name, live = "hasty", True

    def __init__(self, frames, gap_s):
        self._count, self._gap_s = frames, gap_s

    def __iter__(self):
        for index in range(self._count):
            image = np.full((480, 640, 3), index % 256, np.uint8)
            yield Frame(image, self.name, index, index * self._gap_s, time.monotonic_ns(), 0.1)
            time.sleep(self._gap_s)
        threading.Event().wait(0.2)
        raise SourceError("the cable is out")


def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.long
@pytest.mark.timeout(1000)
@pytest.mark.parametrize(
    ("policy", "frames", "gap_s", "engine_s"),
    [
        ("latest", 20_000, 0.001, 0.004),
        ("max-age 50", 20_000, 0.001, 0.004),
        ("latest", 30_000, 0.02, 0.045),
    ],
    ids=["20,000 frames", "20,000 frames, max-age", "10 minutes"],
)
def test_a_source_faster_than_the_engine_costs_neither_age_nor_memory(
    monkeypatch, policy, frames, gap_s, engine_s
):
    ages_ms, resident, drawn = array("d"), [], []

    class Light(Watched):
        needs_picture = True

        def write(self, record, picture):
            ages_ms.append(
                record.total_ms or (time.monotonic_ns() - record.frame.captured_ns) / 1e6
            )
            drawn.append(picture.shape)
            if len(ages_ms) % 100 == 0:
                resident.append(resident_mb())

    class Engine(MockEngine):
        def run(self, feeds):
            time.sleep(engine_s)
            return super().run(feeds)

    monkeypatch.setattr(connection, "open_source", lambda *_: Hasty(frames, gap_s))
    with Light("0", policy=Policy.of(policy), engine=Engine(32)) as run:
        end = time.monotonic() + 900
        while run.feed.captured["camera0"] < frames and time.monotonic() < end:
            time.sleep(0.2)
    assert run.feed.captured["camera0"] >= frames
    summary = run.live_run.summary()
    print({k: summary[k] for k in ("fps", "frames", "dropped", "age_ms")})
    print("resident MB:", [round(mb) for mb in resident[:: max(1, len(resident) // 10)]])
    assert summary["frames"] + summary["dropped"] == run.feed.captured["camera0"]
    assert summary["dropped"] > summary["frames"]
    quarter = len(ages_ms) // 4
    assert np.median(ages_ms[-quarter:]) < 2 * np.median(ages_ms[:quarter]) + 10, (
        "age does not grow"
    )
    assert max(resident[len(resident) // 4 :]) - resident[len(resident) // 4] < 15, (
        "nor does memory"
    )
