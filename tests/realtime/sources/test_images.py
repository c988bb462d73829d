"""Every kind of source, from real files."""

import shutil
import tarfile
import zipfile
from fractions import Fraction

import cv2
import numpy as np
import pytest

from engines.errors import SourceError
from realtime.sources.images import natural_order
from realtime.sources.spec import open_source
from tests.realtime.media import picture, web_server, write_images, write_video


def frames_of(spec):
    with open_source(str(spec)) as source:
        return list(source)


def test_a_video_gives_every_frame_with_its_timestamp(tmp_path):
    found = frames_of(write_video(tmp_path / "clip.mp4"))
    assert [frame.index for frame in found] == list(range(12))
    assert [frame.pts_s for frame in found] == pytest.approx([i / 25 for i in range(12)])
    assert found[3].source == "clip"
    assert np.abs(found[3].image_bgr.astype(int) - picture(3)).mean() < 3


def test_variable_rate_timestamps_are_kept(tmp_path):
    pts = [0, 40, 80, 95, 400, 410, 1000]
    path = write_video(tmp_path / "vfr.mp4", 7, pts=pts, time_base=Fraction(1, 1000))
    assert [frame.pts_s for frame in frames_of(path)] == pytest.approx(
        [p / 1000 for p in pts], abs=1e-3
    )


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_rotated_video_is_shown_upright(tmp_path, degrees):
    path = write_video(tmp_path / "phone.mp4", 2, rotation=degrees)
    expected = np.rot90(picture(0), -degrees // 90)  # the matrix turns clockwise
    found = frames_of(path)[0].image_bgr
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < 4


def test_folder_glob_zip_and_tar_give_the_same_images_in_natural_order(tmp_path):
    folder = write_images(tmp_path / "shots")
    with (
        zipfile.ZipFile(tmp_path / "shots.zip", "w") as archive,
        tarfile.open(tmp_path / "shots.tar", "w") as tar,
    ):
        for file in sorted(folder.iterdir()):
            archive.write(file, f"inside/{file.name}")
            tar.add(file, f"inside/{file.name}")
    (folder / "notes.txt").write_text("not an image")
    for spec in (folder, folder / "*.png", tmp_path / "shots.zip", tmp_path / "shots.tar"):
        found = frames_of(spec)
        assert len(found) == 5
        for index, frame in enumerate(found):
            np.testing.assert_array_equal(frame.image_bgr, picture(index))
            assert frame.pts_s == pytest.approx(index / 24)


def test_one_image_is_a_source_and_gray_and_transparent_ones_become_bgr(tmp_path):
    for name, image in (
        ("gray.png", picture(0)[:, :, 0]),
        ("clear.png", np.dstack([picture(0), picture(0)[:, :, :1]])),
    ):
        cv2.imwrite(str(tmp_path / name), image)
        assert frames_of(tmp_path / name)[0].image_bgr.shape == (96, 128, 3)


def test_a_one_pixel_image_is_an_image(tmp_path):
    cv2.imwrite(str(tmp_path / "dot.png"), np.zeros((1, 1, 3), np.uint8))
    assert frames_of(tmp_path / "dot.png")[0].image_bgr.shape == (1, 1, 3)


def test_demo_frames_repeat_and_their_truth_lies_inside():
    first, again = frames_of("demo:20"), frames_of("demo:20")
    assert len(first) == 20
    for frame, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(frame.image_bgr, same.image_bgr)
        x0, y0, x1, y1 = frame.truth_xyxy_px
        assert 0 <= x0 < x1 <= frame.image_bgr.shape[1]
        assert 0 <= y0 < y1 <= frame.image_bgr.shape[0]


def test_natural_order():
    assert natural_order(["b10", "b9", "a2", "b1", "10", "9"]) == [
        "9",
        "10",
        "a2",
        "b1",
        "b9",
        "b10",
    ]


def broken(tmp_path, kind):
    path = tmp_path / f"{kind}.mp4"
    if kind == "text":
        path.write_text("this is no video")
    elif kind == "empty":
        path.touch()
    elif kind == "header only":
        shutil.copy(write_video(tmp_path / "whole.mp4", 40), path)
        path.write_bytes(path.read_bytes()[:400])
    elif kind == "no frames":
        write_video(path, 0)
    return path


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "header only", "no frames"])
def test_files_that_are_no_video_say_so_in_one_line(tmp_path, kind):
    with pytest.raises(SourceError) as error:
        frames_of(broken(tmp_path, kind))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_video_cut_off_in_the_middle_gives_its_frames_and_then_says_so(tmp_path):
    whole = write_video(tmp_path / "whole.avi", 500, codec="mpeg4")
    cut = tmp_path / "cut.avi"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with open_source(str(cut)) as source:
        frames = iter(source)
        assert next(frames).index == 0
        with pytest.raises(SourceError, match=r"cut off|damaged"):
            list(frames)


@pytest.mark.parametrize("spec", ["demo:0", "demo:x", "no/such/folder/*.png", "99"])
def test_other_mistakes(spec):
    with pytest.raises(SourceError):
        frames_of(spec)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    folder = write_images(tmp_path / "shots", 2)
    (folder / "bad.png").write_bytes(b"junk")
    with pytest.raises(SourceError, match=r"bad\.png is not a readable image"):
        frames_of(folder)


def damaged_zip(path, kind):
    """A zip whose second image cannot be read; the directory at its end is whole."""
    with zipfile.ZipFile(path, "w") as archive:
        for index in (0, 1):
            content = cv2.imencode(".bmp", picture(index))[1].tobytes()
            archive.writestr(
                f"{index}.bmp",
                content,
                zipfile.ZIP_STORED if kind == "crc" else zipfile.ZIP_DEFLATED,
            )
        member = archive.infolist()[1]
    content = bytearray(path.read_bytes())
    data, entry = member.header_offset + 30 + len(member.filename), content.rindex(b"PK\x01\x02")
    if kind in ("crc", "deflate"):
        content[data] = 0xFF  # no block of deflated data begins so
    for header, flags in ((member.header_offset, 6), (entry, 8)):
        if kind == "encrypted":
            content[header + flags] |= 1
        elif kind == "deflate64":
            content[header + flags + 2] = 9
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("crc", "Bad CRC-32"),
        ("deflate", "Error -3"),
        ("encrypted", "is encrypted"),
        ("deflate64", "compression"),
    ],
)
def test_a_member_that_cannot_be_read_is_named_with_its_archive(tmp_path, kind, words):
    path = damaged_zip(tmp_path / "shots.zip", kind)
    with open_source(str(path)) as source:
        frames = iter(source)
        assert next(frames).index == 0
        with pytest.raises(
            SourceError, match=rf"cannot read archive .*shots\.zip: 1\.bmp: .*{words}"
        ) as error:
            next(frames)
    assert "\n" not in str(error.value)


def test_a_video_on_a_web_server_is_a_source(tmp_path):
    path = write_video(tmp_path / "clip.mp4")
    with web_server(tmp_path) as address:
        with open_source(f"{address}/{path.name}") as source:
            assert not source.live
            assert [frame.index for frame in source] == list(range(12))
        with pytest.raises(SourceError, match="cannot open http"):
            open_source(f"{address}/nothing.mp4")


@pytest.mark.parametrize(("name", "frames"), [("car-detection.mp4", 377), ("bag.avi", 196)])
def test_real_videos_decode_to_the_last_frame(data, name, frames):
    found = 0
    with open_source(str(data / "videos" / name)) as source:
        for frame in source:
            assert frame.index == found
            found += 1
    assert found == frames
