"""Films that are copied as they are, with the boxes as a subtitle track."""

from fractions import Fraction
from pathlib import Path

import av
import pytest
from rich.console import Console

from realtime.batch.copied import copy_with_boxes, subtitles_of
from realtime.batch.options import Settings
from realtime.batch.plan import Window, make_plan
from realtime.batch.run import process_all
from tests.command_line import refused
from tests.realtime.batch.clips import make_clip
from tests.realtime.media import write_images, write_video

QUIET = Console(quiet=True)


def packets(path: Path, kind: str) -> list[tuple[Fraction, bytes]]:
    with av.open(str(path)) as container:
        (stream,) = (each for each in container.streams if each.type == kind)
        found = [each for each in container.demux(stream) if each.size]
        return [(each.pts * each.time_base, bytes(each)) for each in found]


def row(frame: int, **changed) -> dict:
    box = {"x0": 10.2, "y0": 30.0, "x1": 60.4, "y1": 80.0, "label": "dog (beagle)"}
    known = {"frame": frame, "pts_s": frame / 25, "outcome": "shown", "confidence": 0.934}
    return {**known, **box, **changed}


def test_pictures_are_copied_and_boxes_are_a_track_beside_them(tiny_localizer, tmp_path):
    film = write_video(tmp_path / "film.mp4")
    (summary,) = process_all(
        [str(film)], tmp_path / "out", tiny_localizer, QUIET, Settings(copy_video=True)
    )
    copied = tmp_path / "out" / "film.boxes.mkv"
    assert summary["files"]["copied_video"] == str(copied)
    assert "video" not in summary["files"]
    assert not (tmp_path / "out" / "film.mp4").exists()
    given, found = packets(film, "video"), packets(copied, "video")
    assert [len(content) for _, content in found] == [len(content) for _, content in given]
    assert [float(time_s) for time_s, _ in found] == pytest.approx(
        [float(time_s) for time_s, _ in given], abs=1e-3
    )
    with av.open(str(copied)) as container:
        assert [each.type for each in container.streams] == ["video", "subtitle"]


def test_sound_and_pictures_out_of_order_are_copied_too(tmp_path):
    film = make_clip(tmp_path / "film.mp4", "-bf", "2", seconds=1, rate="25", sound="aac")
    clip = make_plan(str(film), "", Window(0.0, None))
    copy_with_boxes(clip, [row(0), row(3)], tmp_path / "copied.mkv")
    copied = packets(tmp_path / "copied.mkv", "video"), packets(tmp_path / "copied.mkv", "audio")
    for kind, found in zip(("video", "audio"), copied, strict=True):
        given = [len(content) for time_s, content in packets(film, kind) if time_s >= 0]
        assert [len(content) for _, content in found] == given
    assert sum(1 for _ in packets(tmp_path / "copied.mkv", "subtitle")) == 4


def test_a_turned_film_stays_turned(tmp_path):
    film = write_video(tmp_path / "turned.mp4", rotation=90)
    clip = make_plan(str(film), "", Window(0.0, None))
    copy_with_boxes(clip, [], tmp_path / "copied.mkv")
    with av.open(str(film)) as one, av.open(str(tmp_path / "copied.mkv")) as other:
        turned = [next(each.decode(video=0)).rotation for each in (one, other)]
    assert turned[0] == turned[1] != 0


def test_each_box_stands_until_the_next_row(tmp_path):
    clip = make_plan(str(write_video(tmp_path / "film.mp4")), "", Window(0.0, None))
    rows = [row(0), row(2, x0=None), row(5, track_id=1, label="a {cat}\\N")]
    lines = "".join(subtitles_of(rows, clip, Fraction(0))).splitlines()
    drawn = [line.removeprefix("Dialogue: 0,") for line in lines if line.startswith("Dialogue")]
    assert [line[:21] for line in drawn] == ["0:00:00.00,0:00:00.08"] * 2 + [
        "0:00:00.20,0:00:00.24"
    ] * 2
    assert "m 10 30 l 60 30 60 80 10 80" in drawn[0]
    assert drawn[1].endswith("dog 93 %")
    assert drawn[3].endswith("a (cat)/N 93 %")
    assert f"PlayResX: {clip.width_px}" in lines


def test_a_part_of_a_film_begins_at_the_key_frame_before_it(tmp_path):
    film = write_video(tmp_path / "film.mp4", 12)
    clip = make_plan(str(film), "", Window(0.2, 0.4))
    copy_with_boxes(clip, [row(5)], tmp_path / "copied.mkv")
    (begin_s, _), *_ = packets(tmp_path / "copied.mkv", "video")
    (box_s, _), *_ = packets(tmp_path / "copied.mkv", "subtitle")
    assert begin_s == 0
    assert float(box_s) == pytest.approx(0.2, abs=0.01), "the film has one key frame, its first"


def test_clips_of_events_need_the_annotated_video(tmp_path):
    words = ("--copy-video", "--event-clips", "--out", tmp_path / "out")
    assert "write that, or no clips (--event-clips, --copy-video)" in refused(
        "batch", "a.mp4", *words
    )


def test_photos_have_no_film_to_copy(tmp_path):
    folder = write_images(tmp_path / "photos", 2)
    assert "is no film whose pictures can be copied" in refused(
        "batch", folder, "--copy-video", "--out", tmp_path / "out"
    )
