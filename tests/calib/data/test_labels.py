"""Label files: what they say of difficult objects, and that malformed ones are refused in one line that says where."""

import zipfile

import pytest

from calib.data.labels import xml_label
from tests.calib.layouts import coco, csv, otb, refused, voc, voc_xml

HEAD = "file,class,x0,y0,x1,y1\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the first line must name file,class,x0,y0,x1,y1"),
        ("name,x\n", r"the first line must name file,class,x0,y0,x1,y1 \(it names name,x\)"),
        (HEAD, "no labelled image"),
        (HEAD + "a.png,,,,,\n", "no labelled image"),
        (HEAD + "z.png,cat,0,0,5,5\n", r"names image z\.png"),
        (HEAD + "a.png,cat,0,0,five,5\n", "line 2: the box 0,0,five,5 is not four numbers"),
        (HEAD + "b.png,cat,0,0,9,9\na.png,cat,,0,5,5\n", "line 3: the box ,0,5,5 is not four numbers"),
        (HEAD + "a.png,cat,0,0,5\n", "line 2: the first line has 6 values, this one has not"),
        (HEAD + "a.png,big, cat,0,0,5,5\n", "line 2: the first line has 6 values, this one has not"),
        (HEAD + "a.png,,0,0,5,5\n", "line 2: the box has no class"),
        (HEAD + '"a.png,cat,0,0,5,5\n', "is not a CSV file in UTF-8"),
        (b"\xff\xfe\x00", "is not a CSV file in UTF-8"),
    ],
)
def test_malformed_csv(tmp_path, text, words):
    labels = csv(tmp_path)
    labels.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(words, labels)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<annotation>", r"b\.xml is not VOC XML: no element found"),
        ("<html></html>", r"b\.xml is not VOC XML: its root is <html>"),
        (voc_xml("b.png").replace("<ymax>60</ymax>", ""), r"b\.xml is not VOC XML: object 'cat' has no ymax"),
        (voc_xml("b.png").replace("60", "sixty"), r"b\.xml is not VOC XML: could not convert string to float: 'sixty'"),
        (voc_xml("b.png").replace("cat", ""), r"b\.xml is not VOC XML: object '' has no name"),
    ],
)
def test_malformed_xml(tmp_path, text, words):
    labels = voc(tmp_path)
    (labels / "b.xml").write_text(text)
    refused(words, labels)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-9], r"set\.json is not COCO json: Unterminated string"),
        (lambda _: "[]", r"set\.json is not COCO json: "),
        (lambda _: "{}", r"set\.json is not COCO json: it has no 'categories'"),
        (lambda text: text.replace('"bbox": [10.0, ', '"bbox": ['), "annotation 1 is not COCO json: not enough values"),
        (lambda text: text.replace('"bbox"', '"box"'), "annotation 1 is not COCO json: it has no 'bbox'"),
        (lambda text: text.replace('"image_id": 1', '"image_id": 5'), "annotation 2 .*: its image_id is 5, which the file"),
        (lambda text: text.replace('"id": 7', '"id": 8'), "annotation 1 .*: its category_id is 7, which the file"),
    ],
)
def test_malformed_coco(tmp_path, change, words):
    labels = coco(tmp_path)
    labels.write_text(change(labels.read_text()))
    refused(words, labels)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("11,21,30\n", "line 2: 3 numbers; a box has 4 .* or 8"),
        ("11,21,30,forty\n", "line 2: '11,21,30,forty' is not a list of numbers"),
        ("11,nan,30,40\n", "line 2: '11,nan,30,40' holds a number that is not finite"),
        ("11,21,-30,40\n", "line 2: '11,21,-30,40' has a negative size"),
        ("500,21,30,40\n", "line 2: of box 499,20,529,60 nothing lies in the frame of 128x96 px"),
        ("11,21,30,40\n" * 2, "has boxes for 3 frames, .*set has 2 frames"),
        ("", "has boxes for 1 frames, .*set has 2 frames"),
        ("\n11,21,30,40\n", "line 2: 0 numbers"),
    ],
)
def test_malformed_tracks(tmp_path, line, words):
    labels = otb(tmp_path)
    labels.write_text("11,21,30,40\n" + line)
    refused(words, labels)


def test_difficult_objects_are_neither_truth_nor_mistake():
    easy, difficult = (voc_xml("a.png", extra=f"<difficult>{flag}</difficult>") for flag in (0, 1))
    assert len(xml_label(easy.encode(), "a.xml").truths) == 1
    assert xml_label(difficult.encode(), "a.xml").truths == ()


def test_a_damaged_annotation_in_a_zip_is_named(tmp_path):
    voc(tmp_path)
    with zipfile.ZipFile(tmp_path / "boxes.zip", "w") as archive:
        archive.writestr("a.xml", voc_xml("a.png"))
    content = (tmp_path / "boxes.zip").read_bytes()
    (tmp_path / "boxes.zip").write_bytes(content.replace(b"<annotation>", b"<annotations", 1))
    refused(r"boxes\.zip: a\.xml: Bad CRC-32", tmp_path / "boxes.zip")
