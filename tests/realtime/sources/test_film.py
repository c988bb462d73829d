"""Frames as players present them: cover pictures, default tracks, cuts by an edit list, files that
were joined.
"""

import shutil
import subprocess
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from rich.console import Console

from engines.errors import SourceError
from realtime.batch.plan import make_plan
from realtime.batch.run import process_all
from realtime.batch.segment import SegmentEnd, read_segment
from realtime.sources.spec import open_source
from tests.realtime.media import picture

FRAMES = 10


def write_ts(path, size=(96, 64), pid=256, frames=FRAMES, start=0):
    """A transport stream with B frames, as broadcasts have."""
    with av.open(
        str(path), "w", format="mpegts", options={"mpegts_start_pid": str(pid)}
    ) as container:
        stream = container.add_stream(
            "libx264", rate=10, options={"bf": "2", "g": "5", "x264-params": "scenecut=0"}
        )
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(index, *size), format="bgr24")
            frame.pts, frame.time_base = start + index, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def joined(path, *parts):
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def write_tracks(path, *tracks):
    """A file with several video streams, each (width, codec, disposition)."""
    with av.open(str(path), "w") as container:
        streams = []
        for width, codec, disposition in tracks:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = (
                width,
                64,
                "yuv420p" if codec == "libx264" else "yuvj420p",
            )
            stream.disposition = disposition
            streams.append(stream)
        for index in range(FRAMES):
            for stream in streams:
                if index == 0 or stream.codec.name == "libx264":
                    frame = av.VideoFrame.from_ndarray(
                        picture(index, stream.width, 64), format="bgr24"
                    )
                    frame.pts, frame.time_base = index, Fraction(1, 10)
                    container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    return path


def both_ways(path):
    """(clip, frames) as a batch reads it, after a look that a live run reads the same."""
    clip = make_plan(str(path), "")
    items = [item for segment in clip.segments for item in read_segment(clip, segment)]
    ends = [item for item in items if isinstance(item, SegmentEnd)]
    frames = [item for item in items if not isinstance(item, SegmentEnd)]
    assert (clip.trouble, sum(end.lost for end in ends)) == ("", 0)
    assert clip.frames == len(frames)
    with open_source(str(path)) as source:
        played = list(source)
        assert tuple(source.notes) == clip.notes
    for one, other in zip(frames, played, strict=True):
        assert (one.index, one.pts_s) == (other.index, pytest.approx(other.pts_s))
        assert zlib.crc32(one.image_bgr.data) == zlib.crc32(other.image_bgr.data)
    times = [frame.pts_s for frame in frames]
    assert times == sorted(set(times))
    return clip, frames


@pytest.mark.parametrize(
    "second",
    [{}, {"size": (64, 48)}, {"pid": 300}, {"start": 72000}, {"pid": 300, "size": (64, 48)}],
)
def test_joined_files_give_the_frames_of_all_parts(second, tmp_path):
    first, other = write_ts(tmp_path / "first.ts"), write_ts(tmp_path / "second.ts", **second)
    clip, frames = both_ways(joined(tmp_path / "joined.ts", first, other, first))
    assert len(frames) == 3 * FRAMES
    assert len(clip.segments) == 1
    assert frames[-1].pts_s < 4
    width = second.get("size", (96, 64))[0]
    assert [frame.image_bgr.shape[1] for frame in frames[::FRAMES]] == [96, width, 96]


def test_a_second_programme_beside_the_first_is_told(tmp_path):
    path = write_tracks(tmp_path / "two.ts", (96, "libx264", 0), (64, "libx264", 0))
    clip, frames = both_ways(path)
    assert (len(frames), frames[0].image_bgr.shape[1]) == (FRAMES, 96)
    assert clip.notes == ("another video stream of the file, number 1 (64x64), is not read",)


def test_the_default_track_is_read_and_the_other_is_told(tmp_path):
    path = write_tracks(
        tmp_path / "two.mkv", (64, "libx264", 0), (96, "libx264", Disposition.default)
    )
    clip, frames = both_ways(path)
    assert (len(frames), clip.width_px) == (FRAMES, 96)
    assert clip.notes == ("another video stream of the file, number 0 (64x64), is not read",)


def test_a_cover_is_no_film(tmp_path):
    path = write_tracks(
        tmp_path / "cover.mp4",
        (32, "mjpeg", Disposition.attached_pic),
        (96, "libx264", Disposition.default),
    )
    clip, frames = both_ways(path)
    assert (len(frames), clip.width_px, clip.notes) == (FRAMES, 96, ())


def test_music_with_a_cover_has_no_video(tmp_path):
    path = tmp_path / "song.mp3"
    with av.open(str(path), "w") as container:
        sound, cover = (
            container.add_stream("libmp3lame", rate=44100),
            container.add_stream("mjpeg", rate=1),
        )
        cover.width = cover.height = 64
        cover.pix_fmt, cover.disposition = "yuvj420p", Disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(picture(0, 64, 64), format="bgr24")
        frame.pts = 0
        container.mux([*cover.encode(frame), *cover.encode(None)])
        noise = av.AudioFrame.from_ndarray(
            np.zeros((1, 1152), np.int16), format="s16", layout="mono"
        )
        noise.sample_rate = 44100
        container.mux([*sound.encode(noise), *sound.encode(None)])
    with pytest.raises(SourceError, match="only a cover picture and no video"):
        open_source(str(path))


def write_negative(path):
    """Frames with times below zero, which an edit list cuts away: only the last seven are to be
    shown.
    """
    with av.open(
        str(path), "w", options={"use_editlist": "1", "avoid_negative_ts": "disabled"}
    ) as container:
        stream = container.add_stream("libx264", rate=10, options={"bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(picture(index, 96, 64), format="bgr24")
            frame.pts, frame.time_base = index, Fraction(1, 10)
            _mux(container, stream.encode(frame))
        _mux(container, stream.encode(None))
    return path


def _mux(container, packets):
    for packet in packets:
        packet.pts, packet.dts = (
            packet.pts - round(0.3 / packet.time_base),
            packet.dts - round(0.3 / packet.time_base),
        )
        container.mux(packet)


def test_frames_that_an_edit_list_cuts_away_are_not_missed(tmp_path):
    path = write_negative(tmp_path / "trimmed.mp4")
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == FRAMES
    _, frames = both_ways(path)
    assert len(frames) == 7
    whole = picture(3, 96, 64).astype(int)
    assert np.abs(frames[0].image_bgr - whole).mean() < 4


def test_sound_of_joined_files_goes_on_with_the_pictures(tiny_localizer, tmp_path):
    part = tmp_path / "part.ts"
    with av.open(str(part), "w") as container:
        video, sound = (
            container.add_stream("libx264", rate=10),
            container.add_stream("aac", rate=48000),
        )
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        for index in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(picture(index, 96, 64), format="bgr24")
            frame.pts, frame.time_base = index, Fraction(1, 10)
            container.mux(video.encode(frame))
            noise = av.AudioFrame.from_ndarray(
                np.zeros((2, 4800), np.float32), format="fltp", layout="stereo"
            )
            noise.sample_rate, noise.pts, noise.time_base = 48000, 4800 * index, Fraction(1, 48000)
            container.mux(sound.encode(noise))
        container.mux(video.encode(None))
        container.mux(sound.encode(None))
    path = joined(tmp_path / "joined.ts", part, part)
    (summary,) = process_all([str(path)], tmp_path / "out", tiny_localizer, Console(quiet=True))
    assert (summary["frames"], summary["trouble"]) == (2 * FRAMES, [])
    with av.open(str(tmp_path / "out" / "joined.mp4")) as written:
        ends_s = [float(stream.duration * stream.time_base) for stream in written.streams]
    assert ends_s == pytest.approx([2.0, 2.0], abs=0.1)


@pytest.mark.skipif(
    shutil.which("ffprobe") is None, reason="ffprobe is not installed: apt-get install ffmpeg"
)
def test_ffprobe_counts_the_same(tmp_path):
    part = write_ts(tmp_path / "part.ts")
    files = [write_negative(tmp_path / "trimmed.mp4"), joined(tmp_path / "joined.ts", part, part)]
    for path in files:
        asked = [
            "-count_frames",
            "-select_streams",
            "v",
            "-show_entries",
            "stream=nb_read_frames",
            "-of",
            "csv=p=0",
        ]
        found = subprocess.run(
            ["ffprobe", "-v", "error", *asked, path], capture_output=True, text=True, check=True
        ).stdout
        assert len(both_ways(path)[1]) == int(found.split()[0])
