"""Label files that are damaged, made to exhaust us, or plain nonsense: each is one line that the
user can act on, or is read.
"""

import json
import random
import resource

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calib.data.datasets import load_dataset
from engines.errors import SightlineError
from tests import command_line
from tests.calib.layouts import images, voc_xml

HEAD = b"file,class,x0,y0,x1,y1\n"
NUMBERS = [
    "nan",
    "inf",
    "-inf",
    "1e999",
    "-1e999",
    "1e308",
    "-500",
    "",
    "five",
    "0x10",
    "1_0",
    "9" * 5000,
    "--1",
    "1e",
    "None",
    "true",
]
GARBAGE = [
    b"",
    b"\0",
    b"\0" * 5000,
    b"\xff\xfe",
    b"\xff\xfe\x00",
    b"\xef\xbb\xbf",
    b"\xfe\xff\xd8\x00",
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    b"\x1f\x8b\x08\0\0\0",
    b"PK\x03\x04",
    b"%PDF-1.7",
    b"\n\n\n",
    b"   ",
    b"hello",
    bytes(range(256)),
    b"\xff\xfe\0\0" + b"\0" * 9,
    random.Random(0).randbytes(20_000),
]
TABLES = [
    *GARBAGE,
    *[HEAD + f"a.png,cat,1,2,{value},40\n".encode() for value in NUMBERS],
    HEAD + b"a.png,cat,40,2,10,40\n",
    HEAD + b"a.png,cat,500,500,600,600\n",
    HEAD + b"a.png,cat,5,5,5,5\n",
    HEAD + b",cat,1,2,30,40\n",
    HEAD + b"a.png,,1,2,30,40\n",
    HEAD + b"a.png\n",
    HEAD + b"a.png,cat,1,2,30\n",
    HEAD + b"a.png,cat,1,2,30,40,50,60\n",
    HEAD + b'"a.png,cat,1,2,30,40\n',
    HEAD + b'a.png,"ca"t,1,2,30,40\n',
    HEAD + b"a\0.png,cat,1,2,30,40\n",
    HEAD + b"../../../etc/passwd,cat,1,2,30,40\n",
    HEAD + b"a.png,cat," + b"1" * 200_000 + b",2,30,40\n",
    HEAD[:11],
    HEAD,
    HEAD + b"x" * 300_000 + b",cat,1,2,30,40\n",
    b"file,class,x0,y0,x1\na.png,cat,1,2,3\n",
    b"class,x0,y0,x1,y1\ncat,1,2,30,40\n",
    b"," * 100_000 + b"\n",
    b"1,2,3,4,5,6\n" * 50,
    b"file,bbox\na.png,[1;2;3]\n",
    b"file,bbox\na.png,[[[[[[\n",
    b"file,bbox\na.png," + b"[" * 90_000,
    b"filename,region_shape_attributes,region_attributes\na.png,{,}\n",
    b"filename,region_shape_attributes,region_attributes\na.png," + b"[" * 90_000 + b",{}\n",
    b"filename,region_shape_attributes,region_attributes\na.png,[1],{}\n",
    HEAD.replace(b",", b"\x01"),
    HEAD + b"http://[bad,cat,1,2,30,40\n",
    HEAD + b"%zz%00.png,cat,1,2,30,40\n",
    HEAD + b"\\\\\\,cat,1,2,30,40\n",
    HEAD + b"..,cat,1,2,30,40\n",
    HEAD + b"a" * 5000 + b",cat,1,2,3,4\n",
]
BAD_VALUES = [
    None,
    "",
    "x",
    -1,
    1e308,
    float("nan"),
    float("inf"),
    True,
    [],
    {},
    [[]],
    [None] * 4,
    ["a"] * 4,
    {"a": 1},
    "9" * 5000,
    10**400,
    "\ud800",
    "\0",
]


def of_coco(**changes):
    """One image, one class, one object, with parts replaced."""
    image = {"id": 0, "file_name": "a.png", "width": 128, "height": 96} | changes.get("image", {})
    item = {"image_id": 0, "category_id": 7, "bbox": [10, 20, 30, 40]} | changes.get("item", {})
    whole = {
        "images": [image],
        "categories": [{"id": 7, "name": "cat"} | changes.get("category", {})],
        "annotations": [item],
    }
    return _json(whole | changes.get("whole", {}))


def _json(value):
    try:
        return json.dumps(value).encode()
    except ValueError:  # a whole number too long for Python to print
        return b'{"images": [' + b"9" * 5000 + b"]}"


def labelme(shape):
    return _json({"shapes": [shape], "imagePath": "a.png"})


def studio(value, **more):
    return _json(
        [{"data": {"image": "a.png"}, "annotations": [{"result": [{"value": value, **more}]}]}]
    )


RECTANGLE = {"x": 1, "y": 1, "width": 50, "height": 50, "rectanglelabels": ["cat"]}
JSONS = [
    *GARBAGE,
    *[of_coco(item={"bbox": value}) for value in BAD_VALUES if value != []],
    *[
        of_coco(item={"bbox": [1, 2, value, 4]})
        for value in BAD_VALUES
        if value not in (True, 1e308)
    ],
    *[of_coco(item={"image_id": value}) for value in BAD_VALUES],
    *[of_coco(item={"category_id": value}) for value in BAD_VALUES],
    *[of_coco(image={"file_name": value}) for value in BAD_VALUES],
    *[of_coco(image={"id": value}) for value in BAD_VALUES],
    *[
        of_coco(category={"name": value})
        for value in BAD_VALUES
        if value not in ("x", -1, True, "9" * 5000, "\ud800", "\0", 10**400)
    ],
    *[of_coco(whole={"images": value}) for value in BAD_VALUES],
    *[of_coco(whole={"annotations": value}) for value in BAD_VALUES],
    *[of_coco(whole={"categories": value}) for value in BAD_VALUES],
    *[of_coco(item={"bbox": None, "segmentation": value}) for value in BAD_VALUES],
    *[
        of_coco(item={"bbox": None, "segmentation": {"size": [96, 128], "counts": value}})
        for value in BAD_VALUES
    ],
    of_coco(item={"bbox": None, "segmentation": {"size": [0, 0], "counts": [1, 2]}}),
    of_coco(item={"bbox": None, "segmentation": {"size": [96, 128], "counts": "o" * 100_000}}),
    b"[" * 200_000,
    b'{"a":' * 200_000,
    b"[" * 200_000 + b"]" * 200_000,
    b'{"images": [' + b"9" * 5000 + b"]}",
    b'{"images": NaN}',
    b"null",
    b"1",
    b'"text"',
    of_coco()[:-20],
    of_coco() * 2,
    b'{"images": [], "annotations": []}',
    b"[1, 2, 3]",
    b"[[[]]]",
    b"[{}]",
    b"{}",
    b"[]",
    *[labelme({"label": "cat", "points": value}) for value in BAD_VALUES],
    *[
        labelme({"label": "cat", "points": [[1, 2], [value, 50]]})
        for value in BAD_VALUES
        if value != -1
    ],
    *[labelme(value) for value in BAD_VALUES],
    labelme({"label": "cat", "points": [[1, 2]], "shape_type": "circle"}),
    labelme({"label": "cat", "points": [[1, 2], [1e308, 1e308]], "shape_type": "circle"}),
    labelme({"label": "", "points": [[1, 2], [30, 40]]}),
    *[studio(RECTANGLE | {"width": value}) for value in BAD_VALUES],
    *[
        studio(RECTANGLE | {"rotation": value})
        for value in BAD_VALUES
        if value and value is not True and value != -1
    ],
    studio(RECTANGLE | {"rotation": 30}),
    studio(RECTANGLE | {"rotation": float("nan")}, original_width=9, original_height=9),
    studio([]),
    _json([{"data": {}, "annotations": []}]),
    _json([{"data": None, "annotations": None}]),
    _json([{"image": "a.png", "annotations": [{"label": "x"}]}]),
    _json([{"image": "a.png", "annotations": [{"label": "x", "coordinates": []}]}]),
    _json([{"name": 1, "labels": [{"box2d": 3}]}]),
    _json({"a": {"filename": "a.png", "regions": [3]}}),
    _json({"_via_img_metadata": {"a": 3}}),
    _json({"objects": [{}], "size": {}}),
    _json(
        {
            "a": {
                "filename": "a.png",
                "regions": {
                    "0": {
                        "shape_attributes": {
                            "name": "polygon",
                            "all_points_x": [1],
                            "all_points_y": [],
                        }
                    }
                },
            }
        }
    ),
    _json([{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]),
    _json({"type": "FeatureCollection", "features": []}),
    _json({"items": [], "categories": {}}),
    _json([{"Labeled Data": "x"}]),
    _json([{"a": "b", "rects": [{"rectanglelabels": []}]}]),
]
LAUGHS = (
    b'<!DOCTYPE l [<!ENTITY a "ha">'
    + b"".join(b'<!ENTITY %c "&%c;&%c;">' % (98 + n, 97 + n, 97 + n) for n in range(20))
    + b"]>"
)
VOC = voc_xml("a.png").encode()
CVAT = b'<annotations><image name="a.png" width="128" height="96"><box label="cat" xtl="%s" ytl="2" xbr="30" ybr="40"/></image></annotations>'
XMLS = [
    *GARBAGE,
    *[VOC.replace(b"<xmax>40", b"<xmax>" + value.encode()) for value in NUMBERS],
    *[CVAT % value.encode() for value in NUMBERS],
    LAUGHS + b"<annotation><filename>&u;</filename></annotation>",
    LAUGHS.decode().encode("utf-16") + "<annotation/>".encode("utf-16-le"),
    b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><filename>&x;</filename></annotation>',
    b'<!DOCTYPE a SYSTEM "http://127.0.0.1:9/x.dtd"><annotation>&y;</annotation>',
    b"<annotation>" * 300_000,
    b"<annotation>" + b"<a>" * 100_000 + b"</a>" * 100_000 + b"</annotation>",
    VOC[:-30],
    VOC + VOC,
    b"<" * 1000,
    b"<annotation/>",
    b"<annotation></annotations>",
    b"<html/>",
    b"<svg xmlns='http://x'/>",
    b"<annotations/>",
    b"<dataset/>",
    b"<?xml version='1.0' encoding='nonsense'?><annotation/>",
    b"<?xml version='1.0' encoding='zlib'?><annotation/>",
    b"<?xml version='1.0' encoding='utf-16'?><annotation/>",
    b"<annotation><object/></annotation>",
    b"<annotation><object><name>cat</name></object></annotation>",
    b"<annotation><object><name>cat</name><bndbox/></object></annotation>",
    b"<annotation><object><name>cat</name><polygon/></object></annotation>",
    b"<annotation><object><name>cat</name><robndbox><cx>1</cx></robndbox></object></annotation>",
    b"<annotation><object><name>cat</name><polygon><x1>a</x1><y1>2</y1></polygon></object></annotation>",
    VOC.replace(b"cat", b""),
    VOC.replace(b"<width>128", b"<width>12800"),
    VOC.replace(b"<xmin>11", b"<xmin>50"),
    VOC.replace(b"<xmin>11", b"<xmin>-900"),
    VOC.replace(b"cat", b"c\0t"),
    b"<annotations><image/></annotations>",
    b'<annotations><image name="a.png"><polygon label="cat" points="1,2;3"/></image></annotations>',
    b'<annotations><track label="cat"><box frame="x" xtl="1"/></track></annotations>',
    b'<annotations><track><box frame="0" xtl="1" ytl="1" xbr="9" ybr="9"/></track></annotations>',
    b'<annotations><track label="cat"><box frame="'
    + b"9" * 5000
    + b'" xtl="1"/></track></annotations>',
    b'<annotations><image name="a.png"><box label="cat" xtl="1" ytl="1" xbr="9" ybr="9" rotation="nan"/></image></annotations>',
    b'<dataset><images><image file="a.png"><box top="a" left="1" width="2" height="3"/></image></images></dataset>',
    b"<a " + b'b="1" ' * 50_000 + b"/>",
]
TEXTS = [
    *GARBAGE,
    *[f"0 0.5 0.5 {value} 0.4\n".encode() for value in NUMBERS],
    b"0 5 5 5 5\n",
    b"0 0.5 0.5 -0.2 0.2\n",
    b"0 0.5\n",
    b"9 0.5 0.5 0.2 0.2\n",
    b"1e999 0.5 0.5 0.2 0.2\n",
    b"nan 0.5 0.5 0.2 0.2\n",
    b"0 0.1 0.1 0.2 0.2 0.3 0.3 0.4\n",
    b"Car 0 0 0 a b c d 1 1 1 1 1 1 1\n",
    b"Car 0 0 0 1 2 nan 4 1 1 1 1 1 1 1\n",
    b"0 " + b"0.5 " * 100_001 + b"\n",
    b"1,2,3,4\n",
]
NAMES = [
    b"names: [cat",
    b"names:\n  0: \n",
    b"names: {" + b"0: a, " * 9000,
    b"names: &a [*a, *a]",
    b"\xff\xfe\0",
    b"names:\n" + b"- x\n" * 9000,
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return images(tmp_path_factory.mktemp("hostile") / "images").parent


def one_line(path, content=None):
    """Loading is refused in one displayable line; what can be read after all gives boxes in their
    image.
    """
    if content is not None:
        path.write_bytes(content)
    try:
        samples = load_dataset(path)
        for sample in samples:
            for truth in sample.clipped(sample.read()).truths:
                x0, y0, x1, y1 = truth.box_xyxy_px
                assert 0 <= x0 < x1 <= 128
                assert 0 <= y0 < y1 <= 96
                assert truth.class_name
    except SightlineError as refusal:
        line = str(refusal)
    else:
        return False
    assert line.isprintable()
    assert len(line) < 1500
    return True


def each(contents):
    assert len(contents) >= 40
    return pytest.mark.parametrize("number", range(len(contents)))


@each(TABLES)
def test_tables(place, number, capsys):
    assert one_line(place / "labels.csv", TABLES[number])


@each(JSONS)
def test_json(place, number, capsys):
    assert one_line(place / "labels.json", JSONS[number])


@each(XMLS)
def test_xml(place, number, capsys):
    assert one_line(place / "labels.xml", XMLS[number])
    folder = place / "annotations"
    folder.mkdir(exist_ok=True)
    (folder / "a.xml").write_bytes(XMLS[number])
    assert one_line(folder)


@each(TEXTS)
def test_text_folders(tmp_path, number, capsys):
    images(tmp_path / "images")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_bytes(TEXTS[number])
    (tmp_path / "data.yaml").write_text("names: [cat]")
    assert one_line(tmp_path)


@pytest.mark.parametrize("content", [*TEXTS, *TABLES[:30]])
def test_tracks(tmp_path, content, capsys):
    images(tmp_path / "set")
    one_line(tmp_path / "set_groundtruth.txt", content)


@pytest.mark.parametrize("content", NAMES)
def test_names_of_classes(tmp_path, content, capsys):
    images(tmp_path / "images")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_bytes(b"0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "data.yaml").write_bytes(content)
    one_line(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        LAUGHS + b"<annotation>&u;</annotation>",
        b"[" * 3_000_000,
        b"<annotation>" * 300_000,
        b"," * 3_000_000,
    ],
)
@pytest.mark.parametrize("name", ["labels.xml", "labels.json", "labels.csv"])
def test_memory_stays_bounded(place, name, content, capsys):
    """Of three megabytes of nonsense, each bracket or comma costs an object of Python's at most."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert one_line(place / name, content)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.csv", HEAD + b"a.png,cat,1,2,nan,40\n"),
        ("labels.json", b"[" * 200_000),
        ("labels.xml", LAUGHS + b"<annotation>&u;</annotation>"),
        ("labels.json", GARBAGE[-2]),
    ],
)
def test_through_the_command_line(place, name, content):
    (place / name).write_bytes(content)
    assert str(place / name) in command_line.refused("evaluate", place / name)


VALID = {
    "labels.csv": HEAD + b"a.png,cat,10,20,40,60\nb.png,dog,10,20,40,60\n",
    "labels.json": of_coco(),
    "labels.xml": VOC,
    "cvat.xml": CVAT % b"1",
    "studio.json": studio(RECTANGLE | {"rotation": 10}, original_width=128, original_height=96),
    "via.json": _json(
        {
            "a": {
                "filename": "a.png",
                "regions": [
                    {"shape_attributes": {"name": "rect", "x": 1, "y": 2, "width": 9, "height": 9}}
                ],
            }
        }
    ),
    "runs.json": of_coco(
        item={
            "bbox": None,
            "segmentation": {"size": [96, 128], "counts": [1930, 30, 66, 30, 10232]},
        }
    ),
}
CHANGES = st.lists(
    st.tuples(st.integers(0, 2000), st.integers(0, 6), st.binary(min_size=0, max_size=6)),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("name", VALID)
@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(changes=CHANGES)
def test_valid_files_with_some_bytes_changed(place, name, changes):
    content = VALID[name]
    for start, length, new in changes:
        at = start % len(content) if content else 0
        content = content[:at] + new + content[at + length :]
    one_line(place / name, content)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["id", "bbox", "points", "label", "value", "x", "data"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("name", ["labels.json", "studio.json", "via.json", "runs.json"])
@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(place_in=st.lists(st.integers(0, 9), min_size=1, max_size=6), value=VALUES)
def test_valid_json_with_a_value_replaced(place, name, place_in, value):
    data = json.loads(VALID[name])
    at = data
    for step in place_in:
        keys = list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else ()
        if not keys:
            break
        key = list(keys)[step % len(keys)]
        parent, at = at, at[key]
    parent[key] = value
    one_line(place / name, json.dumps(data).encode())


def test_the_valid_files_are_read(place, capsys):
    for name, content in VALID.items():
        assert not one_line(place / name, content), name
