"""What of a folder, a glob or an archive is not read is counted and named; files of several
pictures give all of them, or say so.
"""

import zipfile

import cv2
import numpy as np
import PIL.Image
import pytest

from engines.errors import SourceError
from realtime.batch.plan import make_plan
from realtime.batch.segment import SegmentEnd, read_segment
from realtime.sources.image_files import HIDDEN, OTHER, SUBFOLDER, VIDEO
from realtime.sources.spec import open_source
from tests.realtime.media import picture, write_images, write_video


def mixed(folder):
    write_images(folder, 2)
    write_images(folder / "sub", 1)
    write_video(folder / "film.mp4", 2)
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "shot 8.xml").write_text("<annotation/>")
    for suffix in (".gif", ".avif", ".jpg"):
        cv2.imwrite(str(folder / f"other{suffix}"), picture(0))
    (folder / "other.jpg").rename(folder / "other.jfif")
    return folder


def test_a_folder_names_what_it_does_not_read(tmp_path):
    clip = make_plan(str(mixed(tmp_path / "shots")), "")
    assert clip.frames == 5
    assert clip.left_out == {
        HIDDEN: [".hidden.png"],
        VIDEO: ["film.mp4"],
        OTHER: ["shot 8.xml"],
        SUBFOLDER: ["sub/shot 8.png"],
    }
    (line,) = clip.notes
    assert line.startswith("4 of 9 files are not read: ")
    assert all(name in line for name in ("film.mp4", "shot 8.xml", "sub/shot 8.png", ".hidden.png"))


def test_a_glob_enters_subfolders_and_an_archive_names_the_rest(tmp_path):
    folder = mixed(tmp_path / "shots")
    with open_source(str(folder / "**" / "*.png")) as source:
        assert len(list(source)) == 3
    with zipfile.ZipFile(tmp_path / "shots.zip", "w") as archive:
        for file in folder.rglob("*"):
            archive.write(file, file.relative_to(folder))
    clip = make_plan(str(tmp_path / "shots.zip"), "")
    assert clip.frames == 6
    assert clip.left_out == {HIDDEN: [".hidden.png"], VIDEO: ["film.mp4"], OTHER: ["shot 8.xml"]}


def test_a_folder_of_videos_says_so(tmp_path):
    (tmp_path / "films").mkdir()
    write_video(tmp_path / "films" / "film.mp4", 2)
    with pytest.raises(
        SourceError, match=r"holds no image .*1 a video \(name it by itself\): film\.mp4"
    ):
        open_source(str(tmp_path / "films"))


@pytest.mark.parametrize("ending", ["webp", "png", "gif", "tiff"])
def test_a_file_of_several_pictures_gives_all_of_them(ending, tmp_path):
    path = tmp_path / "shots" / f"moving.{ending}"
    path.parent.mkdir()
    shots = [PIL.Image.fromarray(picture(8 * index)[:, :, ::-1]) for index in range(4)]
    exact = {"lossless": True} if ending == "webp" else {}
    shots[0].save(path, save_all=True, append_images=shots[1:], duration=100, **exact)
    clip = make_plan(str(path), "")
    frames = [
        item
        for segment in clip.segments
        for item in read_segment(clip, segment)
        if not isinstance(item, SegmentEnd)
    ]
    with open_source(str(path)) as source:
        assert len(list(source)) == len(frames) == 4
    for index, frame in enumerate(frames):
        assert np.abs(frame.image_bgr.astype(int) - picture(8 * index)).mean() < 3
    if ending != "tiff":
        assert frames[1].pts_s == pytest.approx(0.1, abs=1e-3)
    assert make_plan(str(path.parent), "").notes == (
        f"of 1 files with several pictures the first is read: moving.{ending} (4)",
    )
