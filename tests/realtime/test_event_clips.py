"""Clips of events: what is in them, and that they are whole files or none."""

import av
import numpy as np
import pytest

from engines.errors import OutputError
from realtime import event_clips
from realtime.event_clips import AFTER_S, BEFORE_S, EventClips, cut_clip
from realtime.events import Event
from realtime.frames import Frame, FrameRecord
from tests.realtime.media import timestamps_s, write_video

RATE_FPS = 10


def shown(clips, first, last, source="door"):
    """Give clips the pictures from one second to another; each is brighter by 1."""
    for place in range(round(first * RATE_FPS), round(last * RATE_FPS)):
        picture = np.full((48, 64, 3), 10 + place, np.uint8)
        frame = Frame(picture, source, place, place / RATE_FPS, 0, 0.0)
        clips.write(FrameRecord(frame), picture)


def event(number=1, begin_s=5.0, name="my mug/2"):
    found = Event("door", number, begin_s, begin_s, number=number)
    found._names[name] += 1
    return found


@pytest.fixture
def said():
    return []


@pytest.fixture
def clips(tmp_path, said):
    with EventClips(tmp_path / "clips", 0.5, said.append) as found:
        yield found


def brightness(path):
    with av.open(str(path)) as video:
        return [frame.to_ndarray(format="gray").mean() for frame in video.decode(video=0)]


def test_a_clip_begins_some_seconds_before_the_event_and_ends_with_it(clips, said):
    shown(clips, 0, 5.5)
    clips.begin(event())
    shown(clips, 5.5, 8)
    clips.begin(event(2, 7.5))
    shown(clips, 8, 9)
    path, other = clips.end(event()), clips.end(event(2))
    times_s, seen = timestamps_s(path), brightness(path)
    assert times_s[0] == 0
    length_s = times_s[-1] + 1 / RATE_FPS
    assert BEFORE_S + 4 <= length_s <= BEFORE_S + 4 + 1.1, "a key frame every second"
    assert seen[-1] == pytest.approx(99, abs=3)
    assert seen[0] == pytest.approx(10 + 10 * (9 - length_s), abs=3)
    assert np.all(np.diff(seen) > -1)
    assert len(timestamps_s(other)) >= 4.5 * RATE_FPS
    assert clips.written == [path, other]
    assert sorted(path.parent.iterdir()) == sorted([path, other])
    assert "/" not in path.name.removesuffix(".mp4").split("-")[-1]
    assert said == []


def test_a_long_event_has_a_clip_of_its_beginning(clips, monkeypatch):
    monkeypatch.setattr(event_clips, "LONGEST_S", 1.0)
    shown(clips, 0, 5.5)
    clips.begin(event())
    shown(clips, 5.5, 9)
    assert brightness(clips.end(event()))[-1] == pytest.approx(10 + 10 * 6, abs=3)


def test_a_run_that_fails_leaves_no_part_of_a_clip(tmp_path, said):
    with EventClips(tmp_path, 0.5, said.append) as clips:
        shown(clips, 0, 1)
        clips.begin(event())
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_ends_the_clips_and_is_said_once(tmp_path, said):
    folder = tmp_path / "clips"
    with EventClips(folder, 0.5, said.append) as clips:
        shown(clips, 0, 1)
        folder.rmdir()
        folder.write_text("a file of the user's")
        clips.begin(event())
        shown(clips, 1, 2)
        assert clips.end(event()) is None
    assert len(said) == 1
    assert "the clips of events have ended" in said[0]
    assert folder.read_text() == "a file of the user's"
    with pytest.raises(OutputError, match="cannot write"):
        EventClips(folder, 0.5, said.append)


def test_a_part_of_a_video_is_cut_out_at_a_key_frame(tmp_path):
    video, clip = write_video(tmp_path / "v.mp4", 100), tmp_path / "c.mp4"
    whole_s = timestamps_s(video)
    cut_clip(video, whole_s[60], whole_s[80], clip)
    times_s = timestamps_s(clip)
    assert times_s[0] == 0
    assert 20 <= len(times_s) <= 81
    assert brightness(clip) == pytest.approx(brightness(video)[81 - len(times_s) : 81], abs=0.1)
    with pytest.raises(OutputError):
        cut_clip(tmp_path / "none.mp4", 0, AFTER_S, tmp_path / "n.mp4")
    assert not (tmp_path / "n.mp4").exists()
