"""Every kind of file that users have goes through, with its times, its sound, its shape; what is
broken is told.
"""

import io
import json
import resource
import subprocess
import sys
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from rich.console import Console

from engines.errors import InputError, OutputError, SourceError
from engines.localizer import Localizer
from realtime.batch.options import Settings
from realtime.batch.run import process_all
from realtime.tracking.options import FollowOptions
from tests.conftest import ROOT
from tests.engines.mock import MockEngine
from tests.realtime.batch.clips import (
    cut_off,
    damaged,
    decoded,
    ffmpeg,
    make_clip,
    packet_times,
    rows_of,
    sound_of,
    table_of,
)
from tests.realtime.media import write_images, write_video

QUIET = Console(quiet=True)
KINDS = {
    "plain.mp4": ["-bf", "2"],
    "variable.mp4": [
        "-vf",
        "select='not(between(mod(n,7),2,4))',setpts=PTS+0.013*mod(N\\,3)/TB",
        "-fps_mode",
        "vfr",
    ],
    "ten_bit.mp4": ["-pix_fmt", "yuv420p10le", "-profile:v", "high10"],
    "open_gop.ts": ["-bf", "3", "-x264-params", "open-gop=1:scenecut=0"],
    "odd.mkv": ["-vf", "crop=151:113:0:0:exact=1", "-pix_fmt", "yuv444p"],
    "old.avi": ["-c:v", "mpeg4", "-bf", "2"],
    "wide.mov": [
        "-vf",
        "setsar=4/3",
        "-colorspace",
        "bt709",
        "-color_primaries",
        "bt709",
        "-color_trc",
        "bt709",
    ],
}


LONG = ("plain.mp4", "old.avi")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in KINDS]
)
def test_times_frames_and_shape_are_the_sources(name, tiny_localizer, tmp_path):
    clip = make_clip(
        tmp_path / name, *KINDS[name], rate="30000/1001" if name == "wide.mov" else "10"
    )
    summary = process_all([str(clip)], tmp_path / "out", tiny_localizer, QUIET)[0]
    assert summary["trouble"] == []
    (source, unit), (written, _) = (
        packet_times(clip),
        packet_times(tmp_path / "out" / f"{clip.stem}.mp4"),
    )
    assert (
        len(source)
        == len(written)
        == summary["frames"]
        == decoded(tmp_path / "out" / f"{clip.stem}.mp4")
    )
    assert max(abs(one - other) for one, other in zip(source, written, strict=True)) <= unit
    rows = rows_of(tmp_path / "out" / f"{clip.stem}.jsonl")
    assert [
        Fraction(row["pts"] * row["time_base_num"], row["time_base_den"]) for row in rows
    ] == source
    assert [row["pts_s"] for row in rows] == pytest.approx(
        [float(time - source[0]) for time in source], abs=1e-6
    )
    assert [row["frame"] for row in rows] == list(range(len(source)))
    with av.open(str(clip)) as given, av.open(str(tmp_path / "out" / f"{clip.stem}.mp4")) as found:
        one, other = given.streams.video[0], found.streams.video[0]
        assert (other.width, other.height) == (
            one.width + one.width % 2,
            one.height + one.height % 2,
        )
        assert (other.sample_aspect_ratio or 1) == (one.sample_aspect_ratio or 1)
        assert other.codec_context.pix_fmt == "yuv420p"
        assert other.codec_context.colorspace == one.codec_context.colorspace
        assert not found.streams.audio


def test_each_event_has_a_clip_which_the_report_and_the_file_of_events_name(tmp_path):
    film, out = write_video(tmp_path / "film.mp4", 60), tmp_path / "out"
    following = FollowOptions(follow=True, min_score=0.0)
    settings = Settings(event_clips=True, start_s=0.5, following=following)
    localizer = Localizer(MockEngine(96))
    summary = process_all([str(film)], out, localizer, QUIET, settings)[0]
    events = [json.loads(line) for line in (out / "film.events.jsonl").read_text().splitlines()]
    assert summary["clips"] == [each["clip"] for each in events] != []
    for each in events:
        length_s = packet_times(out / each["clip"])[0][-1]
        assert each["end_s"] - each["begin_s"] - 0.1 <= length_s <= 60
        assert each["clip"] in (out / "film.report.html").read_text()
    before = {path: path.read_bytes() for path in out.glob("film.event*.mp4")}
    again = process_all([str(film)], out, localizer, QUIET, settings)[0]
    assert again["skipped"]
    assert {path: path.read_bytes() for path in out.glob("film.event*.mp4")} == before
    with pytest.raises(InputError, match="cut out of the annotated video"):
        Settings(event_clips=True, video=False)


@pytest.mark.parametrize("degrees", [90, pytest.param(180, marks=pytest.mark.long), 270])
def test_what_a_phone_turned_stands_upright(degrees, tiny_localizer, tmp_path):
    clip = write_video(tmp_path / "turned.mp4", rotation=degrees)
    process_all([str(clip)], tmp_path / "out", tiny_localizer, QUIET, Settings(heat_video=True))
    with av.open(str(tmp_path / "out" / "turned.heat.mp4")) as found:
        frame = next(found.decode(video=0))
        seen = cv2.cvtColor(frame.to_ndarray(format="bgr24"), cv2.COLOR_BGR2GRAY).astype(float)
        assert frame.rotation == 0
    turned = subprocess.run(
        [
            "ffmpeg",
            "-v",
            "error",
            "-i",
            clip,
            "-frames:v",
            "1",
            "-f",
            "rawvideo",
            "-pix_fmt",
            "gray",
            "-",
        ],
        capture_output=True,
        check=True,
    ).stdout
    shown = (
        np.frombuffer(turned, np.uint8)
        .reshape((96, 128) if degrees == 180 else (128, 96))
        .astype(float)
    )
    alike = {
        turn: np.corrcoef(np.rot90(shown, turn).ravel(), seen.ravel())[0, 1] for turn in (0, 2)
    }
    assert seen.shape == shown.shape
    assert alike[0] > alike[2] + 0.1


@pytest.mark.parametrize(
    ("ending", "codec"),
    [
        ("mp4", "aac"),
        ("ts", "aac"),
        pytest.param("mkv", "libopus", marks=pytest.mark.long),
        ("mov", "pcm_s16le"),
    ],
)
def test_sound_is_copied_and_stays_in_step(ending, codec, tiny_localizer, tmp_path):
    clip = make_clip(tmp_path / f"clip.{ending}", sound=codec, seconds=12)
    process_all([str(clip)], tmp_path / "out", tiny_localizer, QUIET, Settings())
    found = tmp_path / "out" / "clip.mp4"
    (source, unit), (written, _) = packet_times(clip, "audio"), packet_times(found, "audio")
    assert packet_times(clip)[0] == packet_times(found)[0]
    if codec == "pcm_s16le":  # MP4 does not hold it: AAC now
        assert float(written[-1]) == pytest.approx(float(source[-1]), abs=0.15)
        return
    assert len(source) == len(written)
    assert max(abs(one - other) for one, other in zip(source, written, strict=True)) <= max(
        unit, Fraction(1, 44100)
    )
    if ending != "ts":  # there, each packet has a header that MP4 keeps once
        assert sound_of(clip) == sound_of(found)


def test_every_start_and_end(tiny_localizer, tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", sound="aac")
    process_all([str(clip)], tmp_path / "whole", tiny_localizer, QUIET, Settings(video=False))
    settings = Settings(every=3, start_s=5.02, end_s=17.0)
    process_all([str(clip)], tmp_path / "out", tiny_localizer, QUIET, settings)
    wanted = [
        row
        for row in rows_of(tmp_path / "whole" / "clip.jsonl")
        if row["frame"] % 3 == 0 and 5.02 <= row["pts_s"] < 17
    ]
    assert rows_of(tmp_path / "out" / "clip.jsonl") == wanted
    video, sound = (
        packet_times(tmp_path / "out" / "clip.mp4")[0],
        packet_times(tmp_path / "out" / "clip.mp4", "audio")[0],
    )
    assert [float(time) for time in video] == pytest.approx(
        [row["pts_s"] - wanted[0]["pts_s"] for row in wanted]
    )
    assert -0.05 < sound[0] < 0.05
    assert 11.8 < sound[-1] < 12
    with pytest.raises(SourceError, match="over before the start"):
        process_all([str(clip)], tmp_path / "none", tiny_localizer, QUIET, Settings(start_s=30))


def test_rows_are_the_same_in_both_files(tiny_localizer, tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", seconds=12)
    summary = process_all(
        [str(clip)], tmp_path / "out", tiny_localizer, QUIET, Settings(video=False)
    )[0]
    rows, table = (
        rows_of(tmp_path / "out" / "clip.jsonl"),
        table_of(tmp_path / "out" / "clip.parquet"),
    )
    assert [{key: value for key, value in row.items() if key in rows[0]} for row in table] == rows
    assert not (tmp_path / "out" / "clip.mp4").exists()
    page = (tmp_path / "out" / "clip.report.html").read_text()
    assert page.count("data:image/jpeg") == 12
    assert "<video" not in page
    assert cv2.imread(summary["files"]["latency_plot"]).shape[1] > 1000
    assert json.loads((tmp_path / "out" / "summary.json").read_text())[0]["frames"] == 120


def test_a_damaged_part_costs_its_frames_and_nothing_else(tiny_localizer, tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", "-bf", "2", sound="aac")
    broken = damaged(tmp_path / "broken.mp4", clip)
    good, bad = process_all([str(clip), str(broken)], tmp_path / "out", tiny_localizer, QUIET)
    assert good["trouble"] == []
    assert bad["failed"] > 0
    assert bad["trouble"] == [
        f"{bad['failed']} frames are lost: damaged, or built on a damaged frame"
    ]
    whole, rows = (rows_of(tmp_path / "out" / f"{name}.jsonl") for name in ("clip", "broken"))
    assert [row["pts"] for row in rows] == [row["pts"] for row in whole]
    assert bad["failed"] <= 20 + 2  # up to the next key frame
    lost = [place for place, row in enumerate(rows) if row["outcome"] == "failed"]
    assert lost[-1] - lost[0] <= 20
    for place, (one, other) in enumerate(zip(rows, whole, strict=True)):
        if (
            not lost[0] - 3 <= place <= lost[-1]
        ):  # no decoder notices that the end of a picture is damaged
            assert {**one, "source": "clip"} == other
    shown = [
        Fraction(row["pts"] * row["time_base_num"], row["time_base_den"])
        for row in rows
        if row["outcome"] == "shown"
    ]
    assert packet_times(tmp_path / "out" / "broken.mp4")[0] == shown


@pytest.mark.parametrize("ending", ["mp4", pytest.param("mkv", marks=pytest.mark.long)])
def test_a_file_that_is_cut_off_gives_what_is_there(ending, tiny_localizer, tmp_path):
    front = ["-movflags", "faststart"] if ending == "mp4" else []
    short = cut_off(tmp_path / f"short.{ending}", make_clip(tmp_path / f"clip.{ending}", *front))
    summary = process_all([str(short)], tmp_path / "out", tiny_localizer, QUIET)[0]
    assert "is cut off" in summary["trouble"][0]
    assert 100 < summary["frames"] < 160
    assert len(packet_times(tmp_path / "out" / "short.mp4")[0]) == summary["frames"]


def test_what_cannot_be_read_at_all_is_told_and_the_rest_goes_on(tiny_localizer, tmp_path):
    clip, text = write_video(tmp_path / "clip.mp4"), tmp_path / "text.mp4"
    text.write_text("no video")
    notify = Console(file=io.StringIO(), width=200)
    bad, good = process_all([str(text), str(clip)], tmp_path / "out", tiny_localizer, notify)
    assert "cannot open" in bad["error"]
    assert "text.mp4" in notify.file.getvalue()
    assert good["frames"] == 12
    assert not (tmp_path / "out" / ".sightline" / "text").exists()
    with pytest.raises(SourceError, match=r"none\.mp4 does not exist"):
        process_all(
            [str(clip), str(tmp_path / "none.mp4")], tmp_path / "other", tiny_localizer, QUIET
        )
    assert not (tmp_path / "other").exists()


def test_a_broken_image_costs_itself(tiny_localizer, tmp_path):
    folder = write_images(tmp_path / "shots", 6)
    (folder / "shot 10.png").write_bytes(b"no image")
    summary = process_all([str(folder)], tmp_path / "out", tiny_localizer, QUIET)[0]
    assert (summary["frames"], summary["failed"]) == (5, 1)
    assert "shot 10.png is not a readable image" in summary["trouble"][0]
    assert [row["outcome"] for row in rows_of(tmp_path / "out" / "shots.jsonl")].index(
        "failed"
    ) == 2


def test_key_frames_that_are_none_are_found_out(tiny_localizer, tmp_path):
    """With intra refresh, a picture is whole only some frames behind what looks like a key
    frame.
    """
    clip = make_clip(tmp_path / "clip.ts", "-x264-params", "intra-refresh=1")
    summary = process_all(
        [str(clip)], tmp_path / "out", tiny_localizer, QUIET, Settings(video=False)
    )[0]
    assert (summary["segments"], summary["frames"], summary["trouble"]) == (1, 220, [])


def test_a_place_that_cannot_be_written_is_named_and_what_was_there_stays(tiny_localizer, tmp_path):
    clip, file = write_video(tmp_path / "clip.mp4"), tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(OutputError, match=r"cannot write .*run the same command to go on"):
        process_all([str(clip)], file / "out", tiny_localizer, QUIET)
    assert file.read_text() == "precious"


@pytest.mark.parametrize("kilobytes", [pytest.param(60, marks=pytest.mark.long), 300])
def test_a_disk_that_fills_up_is_told_and_room_is_enough_to_go_on(kilobytes, tmp_path):
    """No file may grow beyond so many kilobytes: a piece of the video, or the whole of it, finds no
    room.
    """
    clip, out = make_clip(tmp_path / "clip.mp4", seconds=22), tmp_path / "out"
    write_video(out / "old.mp4") if out.mkdir() is None else None
    before = (out / "old.mp4").read_bytes()
    line = [
        sys.executable,
        "-m",
        "cli",
        "batch",
        str(clip),
        "--weights",
        "random",
        "--size",
        "32",
        "--out",
        str(out),
    ]
    limit = (resource.RLIMIT_FSIZE, (kilobytes * 1024, kilobytes * 1024))
    full = subprocess.run(
        line,
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(*limit),
        timeout=120,
    )
    assert full.returncode == 2
    assert "File too large" in full.stderr
    assert "run the same command to go on" in " ".join(full.stderr.split())
    assert (out / "old.mp4").read_bytes() == before
    assert not [
        path for path in out.rglob("*") if path.name.endswith(".part") or path == out / "clip.mp4"
    ]
    assert (
        subprocess.run(line, check=False, cwd=ROOT, capture_output=True, timeout=120).returncode
        == 0
    )
    resumed = json.loads((out / "clip.summary.json").read_text())["segments_resumed"]
    assert resumed == (0 if kilobytes == 60 else 3)
    assert len(packet_times(out / "clip.mp4")[0]) == 220


def test_nothing_that_ffmpeg_finds_wrong(tiny_localizer, tmp_path):
    """The whole file, sound and all, decoded with errors as errors; its index is in front."""
    clip = make_clip(tmp_path / "clip.mp4", sound="aac", seconds=12)
    process_all([str(clip)], tmp_path / "out", tiny_localizer, QUIET)
    found = tmp_path / "out" / "clip.mp4"
    ffmpeg("-xerror", "-i", found, "-f", "null", "-")
    content = found.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
