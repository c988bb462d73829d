"""Pictures upright, and colours of high dynamic range as an ordinary screen shows them."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from realtime.batch.encode import PieceVideo
from realtime.batch.plan import make_plan
from realtime.batch.segment import SegmentEnd, read_segment
from realtime.frames import FrameRecord
from realtime.sources.colour import BT709, GAMMA, HLG, PQ, ToBgr, to_bt709
from realtime.sources.spec import open_source
from tests.realtime.media import picture, write_video

MATRICES = {  # a b c d of the display matrix (x' = a x + c y, y' = b x + d y), and what it does
    "mirrored": ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda image: image[::-1]),
    "turned right": ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
    "transposed": ((0, 1, 1, 0), lambda image: image.transpose(1, 0, 2)),
    "transposed the other way": (
        (0, -1, -1, 0),
        lambda image: np.rot90(image, 2).transpose(1, 0, 2),
    ),
}


@pytest.mark.parametrize("name", MATRICES)
def test_every_display_matrix_is_obeyed(name, tmp_path):
    (a, b, c, d), expected = MATRICES[name]
    path = write_video(tmp_path / "clip.mp4", 2)
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 44  # ISO 14496-12, 8.3.2, version 0
    content[start : start + 36] = struct.pack(
        ">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30
    )
    path.write_bytes(content)
    with open_source(str(path)) as source:
        found = next(iter(source)).image_bgr
    assert np.abs(found.astype(int) - expected(picture(0))).mean() < 4
    clip = make_plan(str(path), "")
    assert (clip.height_px, clip.width_px) == found.shape[:2]


def pq(nits):
    power = (nits / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def test_grays_of_pq_are_those_of_the_screen_until_they_are_too_bright():
    nits = np.array([0, 1, 10, 50, 100, 203, 400, 1000, 10000.0])
    found = to_bt709(np.repeat(pq(nits)[:, None], 3, 1), PQ, 9)
    assert np.ptp(found, axis=1).max() < 1e-3, "gray stays gray"
    dark = nits <= 100
    np.testing.assert_allclose(found[dark, 0], (nits[dark] / 203) ** (1 / GAMMA), atol=2e-3)
    assert np.all(np.diff(found[:, 0]) >= -1e-9)
    assert 0.85 < found[5, 0] < 0.95, "white paper is bright, and there is room above it"
    assert found[7, 0] == pytest.approx(1, abs=1e-3)


def test_hlg_and_pq_agree():
    """ITU-R BT.2408: HLG at 75 % is white paper, 203 nits, on a screen of 1000."""
    hlg = to_bt709(np.array([[0.75] * 3, [1.0] * 3]), HLG, 9)
    found = to_bt709(np.repeat(pq(np.array([203.0, 1000.0]))[:, None], 3, 1), PQ, 9)
    np.testing.assert_allclose(hlg, found, atol=5e-3)


def test_a_red_of_bt709_comes_back_from_bt2020():
    """Its coordinates in BT.2020 (ITU-R BT.2087), at 50 nits, are red again."""
    linear = np.array([[0.627404, 0.069097, 0.016391]]) * 50
    found = to_bt709(pq(linear), PQ, 9)
    np.testing.assert_allclose(found, [[(50 / 203) ** (1 / GAMMA), 0, 0]], atol=0.03)


def write_flat(path, transfer, rgb, frames=3):
    """A 10-bit film of one colour, given as coded RGB."""
    red, green, blue = rgb
    luma = 0.2627 * red + 0.6780 * green + 0.0593 * blue
    values = 64 + 876 * luma, 512 + 896 * (blue - luma) / 1.8814, 512 + 896 * (red - luma) / 1.4746
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx265", rate=10, options={"x265-params": "log-level=none:qp=4"}
        )
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p10le"
        context = stream.codec_context
        context.colorspace, context.color_range, context.color_primaries, context.color_trc = (
            9,
            1,
            9,
            transfer,
        )
        for index in range(frames):
            frame = av.VideoFrame(64, 64, "yuv420p10le")
            for plane, value in zip(frame.planes, values, strict=True):
                plane.update(np.full(plane.buffer_size // 2, round(value), np.uint16).tobytes())
            frame.pts, frame.time_base = index, Fraction(1, 10)
            frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc = (
                9,
                1,
                9,
                transfer,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_films_of_high_dynamic_range_are_mapped_and_tagged_so(transfer, tmp_path):
    path = write_flat(tmp_path / "film.mp4", transfer, (0.5, 0.4, 0.3))
    expected = 255 * to_bt709(np.array([[0.5, 0.4, 0.3]]), transfer, 9)[0, ::-1]
    clip = make_plan(str(path), "")
    assert clip.colour == BT709
    *frames, end = read_segment(clip, clip.segments[0])
    assert (len(frames), end.lost) == (3, 0)
    np.testing.assert_allclose(frames[1].image_bgr[20, 20], expected, atol=5)
    with open_source(str(path)) as source:
        np.testing.assert_array_equal(next(iter(source)).image_bgr, frames[0].image_bgr)
    with PieceVideo(tmp_path / "out.mp4", clip, 0) as sink:
        for frame in frames:
            assert not isinstance(frame, SegmentEnd)
            sink.write(FrameRecord(frame), frame.image_bgr)
    with av.open(str(tmp_path / "out.mp4")) as written:
        shown = next(written.decode(video=0))
        assert (shown.color_trc, shown.color_primaries, shown.colorspace, shown.format.name) == (
            1,
            1,
            1,
            "yuv420p",
        )
        np.testing.assert_allclose(ToBgr()(shown)[20, 20], expected, atol=6)


@pytest.mark.parametrize(("full", "black", "white"), [(False, 16, 235), (True, 0, 255)])
def test_full_and_limited_range(full, black, white):
    for level, expected in ((black, 0), (white, 255)):
        frame = av.VideoFrame(32, 32, "yuv420p")
        for plane, value in zip(frame.planes, (level, 128, 128), strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        frame.color_range = 2 if full else 1
        np.testing.assert_allclose(ToBgr()(frame)[5, 5], expected, atol=1)
