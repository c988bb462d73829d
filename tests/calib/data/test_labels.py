"""Label files: what they say of difficult objects, and that malformed ones are refused in one line
that says where.
"""

import zipfile

import pytest

from calib.data.xml_dialects import xml_label
from tests.calib.layouts import coco, csv, notify, otb, refused, voc, voc_xml

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
        (
            HEAD + "b.png,cat,9,0,0,9\na.png,cat,,0,5,5\n",
            "line 3: the box ,0,5,5 is not four numbers .1 more",
        ),
        (HEAD + "a.png,cat,0,0,5\n", "line 2: the first line has 6 values, this one has not"),
        (
            HEAD + "a.png,big, cat,0,0,5,5\n",
            "line 2: the first line has 6 values, this one has not",
        ),
        (HEAD + "a.png,,0,0,5,5\n", "line 2: the box has no class"),
        (
            HEAD + '"a.png,cat,0,0,5,5\n',
            "line 2 is not a row of a CSV file: check its quotation marks",
        ),
        (b"\xff\xfe\x00", "is not a text file in UTF-8, UTF-16 or Windows-1252"),
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
        (
            voc_xml("b.png").replace("<ymax>60</ymax>", ""),
            r"b\.xml is not VOC XML: object 'cat' has no ymax",
        ),
        (
            voc_xml("b.png").replace("60", "sixty"),
            r"b\.xml is not VOC XML: object 'cat': its ymax is sixty, not a number",
        ),
        (voc_xml("b.png").replace("cat", ""), r"b\.xml is not VOC XML: object '' has no name"),
    ],
)
def test_malformed_xml(tmp_path, text, words):
    labels = voc(tmp_path)
    (labels / "b.xml").write_text(text)
    assert [sample.name for sample in notify(words, labels)] == ["a.png"]
    (labels / "a.xml").unlink()
    refused(words, labels)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-9], r"set\.json is not JSON: Unterminated string"),
        (lambda _: "[]", r"set\.json is not COCO json, nor of another tool"),
        (lambda _: "{}", r"set\.json is not COCO json, nor of another tool"),
        (
            lambda text: text.replace('"bbox": [10.0, ', '"bbox": ['),
            r"annotation 1: its bbox is \[20.0, .*, not 4 numbers",
        ),
        (lambda text: text.replace('"bbox"', '"box"'), "annotation 1: it has no 'bbox'"),
        (
            lambda text: text.replace('"image_id": ', '"image_id": 5'),
            "annotation 1: its image_id is 50, which the file",
        ),
        (
            lambda text: text.replace('"id": 7', '"id": 8'),
            "annotation 1: its category_id is 7, which the file",
        ),
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
