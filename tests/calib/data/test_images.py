"""Images are found where the labels say, read in any order, and named where they are missing or
damaged.
"""

import shutil
import zipfile

import numpy as np
import pytest

from calib.data.datasets import load_dataset
from engines.errors import SourceError
from tests.calib.layouts import LABELLED, csv, frames_csv, images, notify, otb, refused, vot, zoo
from tests.realtime.media import picture


@pytest.mark.parametrize("layout", LABELLED)
def test_a_missing_image_is_named(tmp_path, layout):
    labels = layout(tmp_path)
    images(tmp_path / "others", ["a.png"])
    words = r"names image (more/)?b(\.png)?, which is not in .*others: say where it is|2 frames, .*others has 1"
    if layout is frames_csv:
        refused(words, labels, images=tmp_path / "others")  # a sequence must be whole
    else:
        assert len(notify(words, labels, images=tmp_path / "others")) == 1
        images(tmp_path / "none", ["c.png"])
        refused(
            r"names image a(\.png)?, which is not in .*none: .* \(1 more cannot be used either\)",
            labels,
            images=tmp_path / "none",
        )
    with pytest.raises(SourceError, match=r"images .*nowhere do not exist: say where they are"):
        load_dataset(labels, images=tmp_path / "nowhere")


def test_the_same_name_in_two_folders_is_not_guessed(tmp_path):
    labels = csv(tmp_path)
    images(tmp_path / "set" / "small")
    (tmp_path / "set" / "a.png").rename(tmp_path / "set" / "small" / "c.png")
    assert len(load_dataset(labels)) == 2, "b.png is at the top, a.png in one folder only"
    images(tmp_path / "set" / "large", ["a.png"])
    notify(
        "image a.png, which .*set has as (large|small)/a.png and (large|small)/a.png: name the folder",
        labels,
    )


def test_a_folder_that_the_label_names_must_be_the_image_s_own(tmp_path):
    """Splits often number their images alike: another split's image would be taken without a
    word.
    """
    labels = zoo(tmp_path, ["train/a.png,cat"])
    shutil.rmtree(tmp_path / "zoo")
    images(tmp_path / "zoo" / "val")
    refused(
        r"names image train/a\.png, which is not in .*zoo, only val/a\.png is: say where it is",
        labels,
    )
    refused("which is not in .*val, only a.png is", labels, images=tmp_path / "zoo" / "val")
    refused("which is not in .*strain, only a.png is", labels, images=images(tmp_path / "strain"))
    for place in (tmp_path / "train", tmp_path / "zoo" / "deep" / "train"):
        images(place)
        assert len(load_dataset(labels, images=place)) == 1, (
            "the folder itself may be what the label names"
        )
    assert len(load_dataset(labels)) == 1
    images(tmp_path / "zoo" / "other" / "train")
    refused("has as .*/train/a.png and .*/train/a.png: name the folder", labels)
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.write(tmp_path / "train" / "a.png", "a.png")
    assert load_dataset(labels, images=tmp_path / "train.zip")[0].read().shape == (96, 128, 3)


@pytest.mark.parametrize("suffix", [".zip", ".tar", ""])
def test_dots_in_a_name_are_part_of_it(tmp_path, suffix):
    labels = csv(tmp_path).rename(tmp_path / "holiday.2024.csv")
    place = tmp_path / "holiday.2024"
    (tmp_path / "set").rename(place)
    images(tmp_path / "holiday", ["c.png"])  # of another year
    if suffix:
        shutil.make_archive(str(place), suffix[1:], place)
        shutil.rmtree(place)
    assert len(load_dataset(labels)) == 2


def test_a_track_without_frames_beside_it(tmp_path):
    labels = otb(tmp_path)
    shutil.rmtree(tmp_path / "set")
    refused("no frames beside .*: say where they are", labels)


@pytest.mark.parametrize("layout", [otb, vot])
def test_frames_of_a_sequence_are_read_in_any_order_and_none_is_held(tmp_path, layout):
    samples = load_dataset(layout(tmp_path))
    for index in (1, 0, 0, 1, 1):
        assert np.abs(samples[index].read().astype(int) - picture(index)).mean() < 3
    assert samples[0].read() is not samples[0].read()


def test_damaged_images_and_archives_are_named(tmp_path):
    labels = csv(tmp_path)
    (tmp_path / "set" / "b.png").write_bytes(b"no image")
    assert len(notify(r"set\.csv: image b\.png is not a readable image", labels)) == 1
    (tmp_path / "set" / "b.png").unlink()
    samples = load_dataset(labels, images=images(tmp_path / "set"))
    (tmp_path / "set" / "b.png").unlink()
    with pytest.raises(SourceError, match=r"image b\.png cannot be read"):
        samples[1].read()
    labels = frames_csv(tmp_path)
    (tmp_path / "more.tar").write_bytes((tmp_path / "more.tar").read_bytes()[:700])
    with pytest.raises(SourceError, match=r"cannot read archive .*more\.tar"):
        load_dataset(labels)
