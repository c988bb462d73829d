"""A segment gives what the whole file gives, and depends on nothing else; jobs know what is
done.
"""

import dataclasses
import io
import itertools
import json
import zlib
from dataclasses import replace

import av
import pytest
from rich.console import Console

from engines.backends.openvino import OpenVinoEngine
from engines.build import build_graph
from engines.errors import InputError, OutputError
from engines.localizer import Localizer
from engines.networks.registry import load_classifier
from realtime.batch.encode import EncoderThread, read_record, run_segments
from realtime.batch.job import only_run_on
from realtime.batch.merge import UnsafeCutError, merge
from realtime.batch.options import Settings, seconds_of, settings_digest
from realtime.batch.plan import Window, digest_of, make_plan
from realtime.batch.run import process_all
from realtime.batch.segment import Clip, SegmentEnd, read_segment
from realtime.capture import ahead, names_of
from realtime.sources.video import VideoFile
from realtime.tracking.options import FollowOptions
from tests.engines.mock import MockEngine
from tests.realtime.batch.clips import make_clip, rows_of, table_of
from tests.realtime.media import write_images, write_video

QUIET = Console(quiet=True)
FOLLOWED = Settings(following=FollowOptions(follow=True))
STREAMS = {
    "b_frames.mp4": ["-bf", "3"],
    "open_gop.mp4": ["-bf", "3", "-x264-params", "open-gop=1:scenecut=0"],
    "open_gop.ts": ["-bf", "3", "-x264-params", "open-gop=1:scenecut=0"],
    "no_idr.mkv": ["-bf", "3", "-x264-params", "open-gop=1"],
    "hevc.mkv": [
        "-c:v",
        "libx265",
        "-x265-params",
        "log-level=error:open-gop=1:bframes=4",
        "-preset",
        "ultrafast",
    ],
    "mpeg2.ts": ["-c:v", "mpeg2video", "-bf", "2", "-r", "25"],
    "vp8.webm": [
        "-c:v",
        "libvpx",
        "-auto-alt-ref",
        "1",
        "-lag-in-frames",
        "8",
        "-deadline",
        "realtime",
        "-cpu-used",
        "8",
    ],
    "vp9.webm": ["-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8"],
}


def plan(path, window=Window()):
    return make_plan(str(path), digest_of(str(path)), window)


LONG = ("b_frames.mp4", "open_gop.ts", "vp8.webm", "vp9.webm")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in STREAMS]
)
def test_segments_end_to_end_are_the_file(name, tmp_path):
    shape = (
        ("160x120", "25") if name == "no_idr.mkv" else ("96x80", "10")
    )  # there, a strict decoder finds fault
    clip = plan(
        make_clip(tmp_path / name, *STREAMS[name], seconds=26, size=shape[0], rate=shape[1])
    )
    with VideoFile(clip.spec) as whole:
        expected = [
            (frame.index, round(frame.pts_s, 6), zlib.crc32(frame.image_bgr.data))
            for frame in whole
        ]
    found, ends = [], []
    for segment in clip.segments:
        *frames, end = read_segment(clip, segment)
        found += [
            (frame.index, round(frame.pts_s, 6), zlib.crc32(frame.image_bgr.data))
            for frame in frames
        ]
        ends.append(end)
        assert end.frames == segment.frames == len(frames)
    assert found == expected
    assert len(clip.segments) >= 3
    for before, after in itertools.pairwise(ends):
        assert before.next_crc == after.first_crc is not None
    assert ends[-1].next_crc is None


def test_plans_cut_at_key_frames_and_keep_to_the_window(tmp_path):
    path = make_clip(tmp_path / "clip.mp4", "-bf", "2", seconds=32)
    clip = plan(path)
    assert Clip.from_json(json.loads(json.dumps(clip.json()))) == clip
    assert [segment.frames for segment in clip.segments] == [100, 100, 100, 20]
    assert [segment.first_frame for segment in clip.segments] == [0, 100, 200, 300]
    part = plan(path, Window(12.05, 24.0))
    assert [(segment.first_frame, segment.frames) for segment in part.segments] == [
        (121, 79),
        (200, 40),
    ]
    frames = [
        item
        for segment in part.segments
        for item in read_segment(part, segment)
        if not isinstance(item, SegmentEnd)
    ]
    assert [frame.index for frame in frames] == list(range(121, 240))
    assert (frames[0].pts_s, frames[-1].pts_s) == pytest.approx((12.1, 23.9))


def test_images_are_cut_too(tmp_path):
    clip = plan(write_images(tmp_path / "shots", 5), Window(2 / 24))
    (segment,) = clip.segments
    *frames, end = read_segment(clip, segment, every=2)
    assert [frame.index for frame in frames] == [2, 4]
    assert (end.frames, segment.frames) == (3, 3)


def test_a_segment_depends_on_nothing_but_itself(tmp_path):
    """Alone, after others, and with several frames to an engine call that must not mix segments."""
    engine = OpenVinoEngine(build_graph(load_classifier("compact", "random", 64), batch=3), "fp32")
    clip, settings = (
        plan(make_clip(tmp_path / "clip.mp4", seconds=22)),
        Settings(heat_video=True, batch=3),
    )
    for name, segments in (("all", clip.segments), ("last", clip.segments[-1:])):
        list(run_segments(clip, segments, Localizer(engine), settings, tmp_path / name))
    last = f"{clip.segments[-1].index:05d}"
    for ending in (".mp4", ".heat.mp4"):
        assert (tmp_path / "all" / f"{last}{ending}").read_bytes() == (
            tmp_path / "last" / f"{last}{ending}"
        ).read_bytes()
        # the encoder says its settings: its macroblock tree is not reproducible
        assert b"mbtree=0" in (tmp_path / "last" / f"{last}{ending}").read_bytes()
    assert rows_of(tmp_path / "all" / f"{last}.jsonl") == rows_of(
        tmp_path / "last" / f"{last}.jsonl"
    )
    assert len(list((tmp_path / "last").iterdir())) == 4


def test_what_is_done_is_not_done_again_unless_something_changed(tiny_localizer, tmp_path):
    path, out = make_clip(tmp_path / "clip.mp4", seconds=3), tmp_path / "out"

    def skipped(settings=Settings(video=False)):
        return process_all([str(path)], out, tiny_localizer, QUIET, settings)[0].get(
            "skipped", False
        )

    assert [skipped(), skipped()] == [False, True]
    assert [skipped(Settings(video=False, every=2)), skipped()] == [False, False]
    (out / "clip.jsonl").write_text("")
    assert [skipped(), skipped()] == [False, True]
    make_clip(path, seconds=2)
    assert [skipped(), skipped()] == [False, True]
    assert len(rows_of(out / "clip.jsonl")) == 20


def test_an_interrupted_run_goes_on(tiny_localizer, tmp_path, monkeypatch):
    """Ctrl-C in the second segment: the first is kept."""
    path, out = make_clip(tmp_path / "clip.mp4", seconds=32), tmp_path / "out"
    process_all([str(path)], tmp_path / "whole", tiny_localizer, QUIET)
    read, taken = tiny_localizer.read, []

    def interrupted(*arguments):
        taken.append(1)
        if len(taken) == 150:
            raise KeyboardInterrupt
        return read(*arguments)

    monkeypatch.setattr(tiny_localizer, "read", interrupted)
    assert process_all([str(path), str(path)], out, tiny_localizer, QUIET)[-1]["interrupted"]
    left = sorted(path.name for path in (out / ".sightline" / "clip").iterdir())
    assert left == ["00000.json", "00000.jsonl", "00000.mp4", "manifest.json"]
    summary = process_all([str(path)], out, tiny_localizer, QUIET)[0]
    assert summary["segments_resumed"] == 1
    assert len(taken) == 150 + 220
    assert rows_of(out / "clip.jsonl") == rows_of(tmp_path / "whole" / "clip.jsonl")
    assert (out / "clip.mp4").read_bytes() == (tmp_path / "whole" / "clip.mp4").read_bytes()


def test_pieces_that_do_not_meet_are_refused(tmp_path):
    clip = plan(make_clip(tmp_path / "clip.mp4", seconds=22))
    records = [
        {"segment": 0, "next_crc": 1},
        {"segment": 1, "next_crc": None, "first_crc": 2},
        {"segment": 2, "first_crc": 3},
    ]
    with pytest.raises(UnsafeCutError):
        merge(clip, records, Settings(), tmp_path, tmp_path, "clip", {})


def test_settings_that_decide_results_decide_the_digest(tiny_localizer):
    plain = settings_digest(Settings(), tiny_localizer)
    assert plain == settings_digest(dataclasses.replace(Settings()), tiny_localizer)
    changed = (
        Settings(every=2),
        Settings(video=False),
        Settings(heat_video=True),
        Settings(start_s=1.0),
        Settings(end_s=1.0),
    )
    assert len({plain, *(settings_digest(each, tiny_localizer) for each in changed)}) == 6


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("1:30", 90), ("1:02:03.5", 3723.5), (4.5, 4.5)]
)
def test_times_as_users_write_them(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["1:2:3:4", "x", "-3", "1:x", "nan", "inf"])
def test_times_that_are_none(text):
    with pytest.raises(InputError, match="is no time"):
        seconds_of(text)


def test_names_never_meet():
    assert names_of(["a/clip.mp4", "b/clip.mp4", "clip_2.mp4"]) == ["clip", "clip_2", "clip_2_2"]


def test_reading_ahead_keeps_order_raises_last_and_ends_when_left():
    def items():
        try:
            yield from range(5)
            raise ValueError("broken")
        finally:
            closed.append(True)

    closed = []
    taken = ahead(items(), 2)
    assert [next(taken) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="broken"):
        next(taken)
    assert closed == [True]
    taken = ahead(items(), 2)
    assert next(taken) == 0
    taken.close()
    assert closed == [True, True]


def test_what_is_behind_raises_where_it_is_asked():
    behind = EncoderThread()

    def fail():
        raise OSError("full")

    behind.post(fail)
    with pytest.raises(OSError, match="full"):
        behind.finish()
    behind.close()


def test_the_pieces_play_as_they_are(tiny_localizer, tmp_path):
    """A look at what is done so far: each piece begins at 0 with a key frame."""
    clip = plan(make_clip(tmp_path / "clip.mp4", seconds=12))
    list(run_segments(clip, clip.segments, tiny_localizer, Settings(), tmp_path / "pieces"))
    with av.open(str(tmp_path / "pieces" / "00001.mp4")) as piece:
        packet = next(piece.demux(video=0))
        assert (packet.pts, packet.is_keyframe) == (0, True)


def test_two_runs_do_not_work_on_the_same(tiny_localizer, tmp_path):
    path, out = make_clip(tmp_path / "clip.mp4", seconds=3), tmp_path / "out"
    with only_run_on(out, "clip"), pytest.raises(OutputError, match="another run works on"):
        process_all([str(path)], out, tiny_localizer, QUIET, Settings(video=False))
    assert (
        process_all([str(path)], out, tiny_localizer, QUIET, Settings(video=False))[0]["frames"]
        == 30
    )
    assert [left.name for left in (out / ".sightline").iterdir()] == ["clip"]


def test_what_cannot_be_cut_goes_straight_through_beside_what_can(tiny_localizer, tmp_path):
    path = make_clip(tmp_path / "clip.mp4", seconds=3)
    first, second = process_all(
        ["demo:5", str(path)], tmp_path, tiny_localizer, Console(file=io.StringIO()), Settings()
    )
    assert (first["frames"], second["frames"]) == (5, 30)
    assert (tmp_path / "demo.mp4").exists()


@pytest.mark.parametrize(("slots", "batch"), [(1, 1), (2, 1), (2, 3)])
def test_what_is_followed_is_followed_across_segments(slots, batch, tmp_path):
    """Each segment alone, from the state behind the one before it, gives what all of them give."""
    localizer = Localizer(MockEngine(96, batch=batch, slots=slots))
    path = make_clip(tmp_path / "clip.mp4", seconds=32)
    clip, settings = plan(path), replace(FOLLOWED, batch=batch)
    assert len(clip.segments) > 2
    whole = tmp_path / "whole"
    list(run_segments(clip, clip.segments, localizer, settings, whole))
    states: dict = {}
    for segment in clip.segments:
        folder = tmp_path / f"alone{segment.index}"
        list(run_segments(clip, [segment], localizer, settings, folder, states=states))
        name = f"{segment.index:05d}"
        assert rows_of(folder / f"{name}.jsonl") == rows_of(whole / f"{name}.jsonl")
        assert (folder / f"{name}.mp4").read_bytes() == (whole / f"{name}.mp4").read_bytes()
        states = {segment.index: read_record(folder, clip, segment)["tracking"]}
        assert states[segment.index] == read_record(whole, clip, segment)["tracking"]


def test_the_log_says_how_following_went_and_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    localizer = Localizer(MockEngine(96, slots=2))
    path, out = make_clip(tmp_path / "clip.mp4", seconds=32), tmp_path / "out"
    assert settings_digest(FOLLOWED, localizer) != settings_digest(Settings(), localizer)
    (summary,) = process_all([str(path)], tmp_path / "whole", localizer, QUIET, FOLLOWED)
    rows = rows_of(tmp_path / "whole" / "clip.jsonl")
    assert (summary["frames"], len(rows)) == (320, 320)
    assert {row["state"] for row in rows} <= {"searching", "following", "unsure", "lost"}
    assert [row["confidence"] for row in table_of(tmp_path / "whole" / "clip.parquet")] == [
        row["confidence"] for row in rows
    ]
    read, taken = localizer.read, []

    def interrupted(*arguments):
        taken.append(1)
        if len(taken) == 250:
            raise KeyboardInterrupt
        return read(*arguments)

    monkeypatch.setattr(localizer, "read", interrupted)
    assert process_all([str(path)], out, localizer, QUIET, FOLLOWED)[-1]["interrupted"]
    summary = process_all([str(path)], out, localizer, QUIET, FOLLOWED)[0]
    assert summary["segments_resumed"] >= 1
    assert rows_of(out / "clip.jsonl") == rows
    assert (out / "clip.mp4").read_bytes() == (tmp_path / "whole" / "clip.mp4").read_bytes()


def test_an_engine_that_takes_one_call_can_follow_too(tmp_path):
    localizer, path = (
        Localizer(MockEngine(96, slots=1)),
        make_clip(tmp_path / "clip.mp4", seconds=2),
    )
    (summary,) = process_all(
        [str(path)],
        tmp_path / "out",
        localizer,
        QUIET,
        Settings(following=FollowOptions(follow=True)),
    )
    assert summary["frames"] == 20


def test_several_followed_objects_are_in_rows_table_and_report(tmp_path):
    localizer, path = Localizer(MockEngine(96, slots=2)), write_video(tmp_path / "clip.mp4", 40)
    several = Settings(following=FollowOptions(follow=True, objects=3, min_score=0.0))
    assert settings_digest(several, localizer) != settings_digest(
        Settings(following=FollowOptions(follow=True)), localizer
    )
    process_all([str(path)], tmp_path / "out", localizer, QUIET, several)
    rows = rows_of(tmp_path / "out" / "clip.jsonl")
    table = table_of(tmp_path / "out" / "clip.parquet")
    assert [row["objects"] for row in table] == [row["objects"] for row in rows]
    assert all(len(row["objects"]) <= 3 for row in rows)
    numbers = {each["track_id"] for row in rows for each in row["objects"]}
    report = (tmp_path / "out" / "clip.report.html").read_text(encoding="utf-8")
    lines = (tmp_path / "out" / "clip.events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    shown = {each["track_id"] for row in rows for each in row["objects"] if each["x0"] is not None}
    assert events
    assert {each["track_id"] for each in events} <= shown <= numbers
    assert "What was seen" in report
    for event in events:
        assert f'alt="{event["name"]} in frame {event["best_frame"]}"' in report
        asked = f"sightline why {path} --at {event['best_s']:.3f} --box "
        edges = ",".join(f"{edge:.0f}" for edge in event["box"])
        assert f"{asked}{edges} --out why.html" in report
    assert report.count(f"<code>sightline why {path} --at") > len(events), "the strip's, too"


def test_frames_of_video_share_calls_and_photos_do_not(tmp_path):
    photos = str(write_images(tmp_path / "shots", 1))
    assert Settings().images(["a.mp4", "b.mkv"]) == 0
    assert Settings().images(["a.mp4", photos]) == 1
    assert Settings(batch=3).images(["a.mp4", photos]) == 3
