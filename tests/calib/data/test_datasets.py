"""Data sets in every layout, right and wrong: the same boxes come out, the same mistakes are
refused in one line.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from calib.data.datasets import load_dataset
from calib.data.labels import Remarks
from calib.evaluation.evaluate import evaluate
from calib.evaluation.metrics import baselines
from calib.heads.fit import default_features, fit_head
from engines.errors import SourceError
from engines.localizer import Localizer
from engines.networks.registry import load_classifier
from tests.calib.layouts import (
    BOX,
    LABELLED,
    LAYOUTS,
    SIZE,
    coco,
    csv,
    frames_csv,
    notify,
    otb,
    otb_native,
    refused,
    voc,
    voc_xml,
    vot,
    vot_native,
    zoo,
)
from tests.engines.mock import MockEngine
from tests.realtime.media import picture

QUIET = Console(quiet=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_labels(tmp_path, layout):
    samples = load_dataset(layout(tmp_path))
    assert len(samples) == 2
    for index, sample in enumerate(samples):
        assert sample.single
        assert sample.truths[0].box_xyxy_px == BOX
        assert sample.clipped(sample.read()).truths == sample.truths
        assert np.abs(sample.read().astype(int) - picture(index)).mean() < 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_box_may_reach_one_pixel_beyond_its_image_and_is_cut_there(tmp_path, layout):
    sample = load_dataset(layout(tmp_path, (-1.0, 20.0, 129.0, 96.75)))[1]
    assert sample.clipped(sample.read()).truths[0].box_xyxy_px == (0, 20, 128, 96)


@pytest.mark.parametrize("layout", LABELLED)
@pytest.mark.parametrize(
    ("box", "words"),
    [
        (
            (-20.5, 20, 40, 60),
            r"a\b.*box -20\.5,20,40,60 of '(cat|object)' reaches 20\.5 px beyond the image",
        ),
        (
            (10, 20, 180, 60),
            "box 10,20,180,60 .* reaches 52 px beyond the image of 128x96 px: correct it, or give the images",
        ),
        ((200, 20, 240, 60), "box 200,20,240,60 .* lies outside the image of 128x96 px"),
        ((128, 20, 129, 60), "lies outside the image"),
        ((40, 20, 10, 60), "box 40,20,10,60 .* is empty or reversed: edges are x0,y0,x1,y1"),
        ((10, float("nan"), 40, 60), "box .*nan.* has an edge that is not a finite number"),
        ((10, 20, float("inf"), 60), "box .*(inf|nan).* has an edge that is not a finite number"),
    ],
)
def test_boxes_that_cannot_be_are_refused(tmp_path, layout, box, words):
    refused(words, layout(tmp_path, box))


@pytest.mark.parametrize("layout", LABELLED)
@pytest.mark.parametrize("box", [(-1.5, 20, 40, 60), (10, 20, 130, 60), (10, 20, 40, 97.25)])
def test_boxes_that_reach_slightly_beyond_their_image_are_cut_to_it_and_this_is_said(
    tmp_path, layout, box
):
    samples = notify(
        r"boxes that reach slightly beyond their image are cut to it \(.*a\b", layout(tmp_path, box)
    )
    assert samples[0].truths[0].box_xyxy_px == (
        max(0, box[0]),
        box[1],
        min(128, box[2]),
        min(96, box[3]),
    )


@pytest.mark.parametrize(
    ("layout", "groups"),
    [
        (csv, {"a.png", "b.png"}),
        (voc, {"a.png", "b.png"}),
        (frames_csv, {"more"}),
        (otb, {"set"}),
        (vot, {"clip"}),
        (otb_native, {"Jogging"}),
        (vot_native, {"bag"}),
    ],
)
def test_frames_of_a_sequence_are_one_group_and_photos_their_own(tmp_path, layout, groups):
    assert {sample.group for sample in load_dataset(layout(tmp_path))} == groups


@pytest.mark.parametrize(
    "size", ["<size><width>64</width><height>96</height></size>", SIZE.replace("96", "90")]
)
def test_labels_made_for_an_image_of_another_size_are_left_out(tmp_path, size):
    labels = voc(tmp_path)
    (labels / "b.xml").write_text(voc_xml("b.png", (10, 20, 40, 60), size=size))
    words = r"image b\.png has 128x96 px, its label says (64x96|128x90): give the images that the labels were made for"
    assert [sample.name for sample in notify(words, labels)] == ["a.png"]
    (labels / "a.xml").unlink()
    refused(words, labels)


@pytest.mark.parametrize(
    "size", ["", "<size><width>0</width><height>0</height></size>", SIZE.replace("96", "95")]
)
def test_sizes_that_tools_leave_out_or_round_are_no_mistake(tmp_path, size):
    labels = voc(tmp_path)
    (labels / "b.xml").write_text(voc_xml("b.png", size=size))
    assert load_dataset(labels)[1].read().shape == (96, 128, 3)


def test_boxes_of_no_height_and_crowds_are_left_out_of_coco(tmp_path):
    """COCO train2017 has two boxes of no height among 860,001."""
    labels = coco(tmp_path)
    content = json.loads(labels.read_text())
    content["annotations"][0]["bbox"][3] = 0.0
    content["annotations"] += [
        {**content["annotations"][1], "iscrowd": 1, "bbox": [0, 0, 500, 500]}
    ]
    labels.write_text(json.dumps(content))
    assert [len(sample.truths) for sample in load_dataset(labels)] == [0, 1]


def test_tracked_objects_may_be_absent_or_leave_the_frame_in_part(tmp_path):
    labels = otb(tmp_path)
    for absent in ("0,0,0,0", "nan,nan,nan,nan"):
        labels.write_text(f"{absent}\n-9,81,50,50\n")
        first, second = load_dataset(labels)
        assert first.truths == ()
        assert second.truths[0].box_xyxy_px == (0, 80, 40, 96)


def test_a_sequence_needs_a_row_for_every_frame(tmp_path):
    labels = frames_csv(tmp_path)
    labels.write_text("frame,x0,y0,x1,y1\nmore/a.png,10,20,40,60\n")
    refused(r"has boxes for 1 frames, .*more\.tar has 2 frames", labels)
    labels.write_text("frame,x0,y0,x1,y1\nmore/a.png,10,20,40,60\nmore/b.png,,,,\n")
    assert [len(sample.truths) for sample in load_dataset(labels)] == [1, 0]


def test_what_is_no_data_set_at_all(tmp_path):
    refused("does not exist", tmp_path / "nothing.csv")
    for name, words in (
        ("set.xyz", "give a .csv, .json, .txt, or a folder, zip or tar of .xml files"),
        ("set.xlsx", "is a spreadsheet: save it as CSV"),
        ("set.tfrecord", "is a TFRecord: export"),
    ):
        (tmp_path / name).touch()
        refused(words, tmp_path / name)
    (tmp_path / "empty").mkdir()
    refused("holds no labelled image", tmp_path / "empty")


def test_an_image_set_names_the_images_to_keep(tmp_path):
    labels = csv(tmp_path)
    (tmp_path / "ids.txt").write_text("b  1\n\nunknown\n")
    assert [s.name for s in load_dataset(labels, ids=tmp_path / "ids.txt")] == ["b.png"]
    (tmp_path / "ids.txt").write_text("c\n")
    with pytest.raises(SourceError, match=r"that .*ids\.txt names"):
        load_dataset(labels, ids=tmp_path / "ids.txt")
    with pytest.raises(SourceError, match="cannot read"):
        load_dataset(labels, ids=tmp_path / "nothing.txt")


def test_only_the_classes_asked_for_are_kept(tmp_path):
    labels = zoo(tmp_path, ["a.png,cat", "a.png,dog", "b.png,cow"])
    kept = load_dataset(labels, classes=["dog", "cat"])
    assert [(sample.name, [truth.class_name for truth in sample.truths]) for sample in kept] == [
        ("a.png", ["cat", "dog"])
    ]
    (dog,), (cow,) = (load_dataset(labels, classes=[name]) for name in ("dog", "cow"))
    assert (dog.one_box, dog.single) == (True, False), (
        "a head may be fitted to the dog, but the image shows a cat too"
    )
    assert (cow.one_box, cow.single) == (True, True)
    refused(
        r"zoo\.csv has no class 'horse': it has cat, cow, dog$", labels, classes=["dog", "horse"]
    )


def test_an_image_with_one_dog_and_a_cat_is_no_single_object_image(tmp_path):
    labels, localizer = (
        zoo(tmp_path, ["a.png,cat", "a.png,dog", "b.png,dog"]),
        Localizer(MockEngine(96)),
    )
    dogs = load_dataset(labels, classes=["dog"])
    assert evaluate(dogs, localizer, QUIET, None)[0]["images"] == 2
    _, cases = evaluate(dogs, localizer, QUIET, None, single=True)
    assert [case.sample.name for case in cases] == ["b.png"]
    with pytest.raises(SourceError, match="no image with exactly one object"):
        evaluate(load_dataset(labels, classes=["cat"]), localizer, QUIET, None, single=True)


def test_a_long_list_of_classes_is_cut(tmp_path):
    labels = zoo(tmp_path, [f"a.png,n{number:03}" for number in range(100)])
    refused("it has n000, n001, .*, n039 and 60 more$", labels, classes=["cat"])


def test_a_set_without_an_image_of_one_object(tmp_path):
    labels = zoo(tmp_path, ["a.png,cat", "a.png,cat"])
    samples, classifier = load_dataset(labels), load_classifier("compact", "random", 64)
    with pytest.raises(
        SourceError,
        match=r"zoo: 0 images have exactly one box, a head needs at least 10: .*some kinds of objects",
    ):
        fit_head(samples, classifier, *default_features(classifier, "sensitivity"), QUIET, "zoo")
    with pytest.raises(SourceError, match="no image with exactly one object"):
        evaluate(samples, Localizer(MockEngine(96)), QUIET, None, single=True)
    with pytest.raises(
        SourceError, match="no image to take constant boxes from has exactly one object"
    ):
        baselines(Localizer(MockEngine(96)), samples)


def boxes_of(path: Path, **options):
    return {Path(sample.name).stem: sample.truths for sample in load_dataset(path, **options)}


def test_the_raccoon_table_and_its_xml_agree(data):
    table, xml = (
        boxes_of(data / "raccoon" / name) for name in ("raccoon_labels.csv", "annotations.tar")
    )
    assert table == xml
    assert len(xml) == 200


@pytest.mark.parametrize(
    ("name", "boxes"),
    [
        ("tiny_imagenet_200/val.csv", 10_000),
        ("animal_pose_voc/test.csv", 789),
        ("raccoon/annotations.tar", 217),
        ("coco128/train2017_boxes.csv", 929),
        ("davis/dog_boxes.csv", 60),
        ("otb/MotorRolling_groundtruth_rect.txt", 164),
        ("videos/bag_groundtruth.txt", 196),
    ],
)
def test_no_box_of_a_real_set_is_refused(data, name, boxes):
    samples = load_dataset(data / name)
    for sample in samples[:: max(1, len(samples) // 200)]:
        assert sample.clipped(sample.read()).truths == sample.truths
    assert sum(len(sample.truths) for sample in samples) == boxes


def test_difficult_objects_and_crowds_are_kept_to_be_ignored(tmp_path):
    """In XML, COCO and CSV alike."""
    labels = coco(tmp_path / "coco")
    content = json.loads(labels.read_text())
    crowd = {**content["annotations"][1], "iscrowd": 1, "bbox": [20, 10, 500, 30]}
    labels.write_text(json.dumps({**content, "annotations": [*content["annotations"], crowd]}))
    remarks = Remarks()
    plain, crowded = load_dataset(labels, remarks=remarks)
    assert plain.ignored == ()
    assert [each.box_xyxy_px for each in crowded.ignored] == [(20, 10, 128, 40)]
    assert any("are ignored" in line for line in remarks.lines())

    labels = voc(tmp_path / "voc")
    first = (labels / "a.xml").read_text()
    item = "<object><name>dog</name><difficult>1</difficult><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object>"
    (labels / "a.xml").write_text(first.replace("</annotation>", f"{item}</annotation>"))
    sample = load_dataset(labels)[0]
    assert [each.box_xyxy_px for each in sample.ignored] == [(1, 2, 9, 8)]
    assert len(sample.truths) == 1

    table = tmp_path / "voc" / "boxes.csv"
    rows = ["a.png,dog,1,2,9,8,1", "a.png,cat,10,20,40,60,0", "a.png,cat,x,2,3,4,1"]
    table.write_text("\n".join(["file,class,x0,y0,x1,y1,Difficult", *rows]))
    (sample,) = load_dataset(table, labels.parent / "JPEGImages")
    assert [each.class_name for each in sample.ignored] == ["dog"]
    assert [each.class_name for each in sample.truths] == ["cat"]
    assert sample.single
