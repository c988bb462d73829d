"""What is written beside a live run fails alone: the run goes on, and says so once."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from engines.errors import OutputError
from engines.localizer import Localizer
from realtime import live
from realtime.annotate import Annotator
from realtime.file_sinks import JsonlSink, Recorder, Recording, VideoSink
from realtime.options import StreamOptions
from realtime.session import Session
from tests.engines.mock import MockEngine
from tests.realtime.media import timestamps_s, write_video

FRAMES = 60


@pytest.fixture
def clip(tmp_path) -> Path:
    return write_video(tmp_path / "clip.mp4", FRAMES)


def played(clip: Path, options: StreamOptions) -> tuple[dict, str]:
    """A whole run: its summary, and what was said."""
    console = Console(file=io.StringIO(), width=400)
    summary = live.stream(
        [str(clip)],
        Localizer(MockEngine(32)),
        console,
        replace(options, window=False, policy="every"),
    )
    return summary, console.file.getvalue()


def test_a_recording_that_cannot_be_begun_ends_alone(clip, tmp_path, monkeypatch):
    """A viewer presses Record, where the folder for recordings is a file; presses again, and it
    works.
    """
    (tmp_path / "afile").write_text("precious")
    seen: list[str] = []

    class Pressing(Session):
        def write(self, record, picture):
            super().write(record, picture)
            if record.frame.index == 5:
                self.change(record=tmp_path / "afile" / "r.mp4")
            if self.trouble and not seen:
                assert self.settings.record is None
                seen.append(self.trouble)
                self.change(record=tmp_path / "good.mp4")

    monkeypatch.setattr(live, "Session", Pressing)
    summary, said = played(clip, StreamOptions())
    assert summary["frames"] == FRAMES
    assert "afile/r.mp4 has ended" in seen[0]
    assert said.count("afile/r.mp4 has ended") == 1
    assert len(summary["trouble"]) == 1
    assert len(timestamps_s(tmp_path / "good.mp4")) > 5
    assert (tmp_path / "afile").read_text() == "precious"


def test_a_disk_that_fills_up_ends_the_recording_only(clip, tmp_path, monkeypatch):
    write = VideoSink.write

    def full(self, record, picture):
        if record.frame.index > 20:
            raise OutputError(f"cannot write {self.path}: No space left on device")
        write(self, record, picture)

    monkeypatch.setattr(VideoSink, "write", full)
    summary, said = played(
        clip, StreamOptions(record=tmp_path / "r.mp4", log=tmp_path / "log.jsonl")
    )
    assert summary["frames"] == FRAMES
    assert said.count("No space left") == 1
    assert timestamps_s(tmp_path / "r.mp4"), "what was recorded until then stays"
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == FRAMES


def test_a_log_that_cannot_begin_its_next_file_ends_alone(clip, tmp_path, monkeypatch):
    def rotate(self):
        self._file.close()
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(JsonlSink, "_rotate", rotate)
    summary, said = played(
        clip, StreamOptions(log=tmp_path / "log.jsonl", log_max_mb=0.005, record=tmp_path / "r.mp4")
    )
    assert summary["frames"] == FRAMES
    assert said.count("the log has ended, and the run goes on without it") == 1
    assert all(json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert timestamps_s(tmp_path / "r.mp4")


def test_what_cannot_be_begun_at_the_start_is_refused(clip, tmp_path):
    (tmp_path / "afile").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*r\.mp4"):
        played(clip, StreamOptions(record=tmp_path / "afile" / "r.mp4"))


def test_one_source_of_several_that_cannot_be_recorded(tmp_path):
    """Both recordings end, once, and nothing is tried again until another is wanted."""
    failures = []
    recording = Recording(tmp_path)
    with Recorder(
        lambda: recording, ["a", "b"], lambda which, error: failures.append(which)
    ) as recorder:
        recorder._give_up(recording, OSError("full"))
        assert not recorder.needs_picture
    assert failures == [recording]


def test_a_frame_that_cannot_be_drawn_fails_alone(clip, monkeypatch, tmp_path):
    paint = Annotator.paint

    def failing(self, frame, *arguments):
        if frame.index == 7:
            raise MemoryError
        return paint(self, frame, *arguments)

    monkeypatch.setattr(Annotator, "paint", failing)
    summary, _ = played(clip, StreamOptions(record=tmp_path / "r.mp4"))
    assert summary["failed"] == 1
    assert summary["frames"] == FRAMES - 1
