"""Labels as people have them, in every dialect: the same box comes out, and what was guessed is
said.
"""

import json
import unicodedata

import cv2
import numpy as np
import pytest

from calib.data.datasets import load_dataset
from calib.data.labels import Remarks
from calib.data.text_dialects import yaml_names
from tests.calib.layouts import BOX, SIZE, coco, images, notify, refused, voc, voc_xml
from tests.realtime.media import picture, write_video

X0, Y0, X1, Y1 = (int(edge) for edge in BOX)
ROWS = f"a.png,cat,{X0},{Y0},{X1},{Y1}\nb.png,cat,{X0},{Y0},{X1},{Y1}\n"
PLAIN = "file,class,x0,y0,x1,y1\n" + ROWS


def rows(header, row):
    return f"{header}\n" + "".join(f"{row}\n".replace("IMAGE", name) for name in ("a", "b"))


TABLES = {
    "semicolons": PLAIN.replace(",", ";"),
    "tabs": PLAIN.replace(",", "\t"),
    "pipes": PLAIN.replace(",", "|"),
    "spaces": PLAIN.replace(",", ", "),
    "commas at the end": PLAIN.replace("\n", ",\n"),
    "commas at the end of rows": "file,class,x0,y0,x1,y1\n" + ROWS.replace("\n", ",,\n"),
    "quoted": PLAIN.replace("cat", '"cat"').replace("a.png", '"a.png"'),
    "capitals": PLAIN.replace("file,class,x0,y0", "FileName,Class,X0,Y0"),
    "excel": "sep=;\r\n" + PLAIN.replace(",", ";").replace("\n", "\r\n"),
    "carriage returns": PLAIN.replace("\n", "\r"),
    "empty lines": PLAIN.replace("\n", "\n\n"),
    "decimal commas": PLAIN.replace(",", ";").replace("10;", "10,0;"),
    "a comment": "# " + PLAIN,
    "corners": rows("image,x1,y1,x2,y2,label", "IMAGE.png,10,20,40,60,cat"),
    "sides": rows("path;left;top;right;bottom;category", "IMAGE.png;10;20;40;60;cat"),
    "tensorflow": rows(
        "filename,width,height,class,xmin,ymin,xmax,ymax", "IMAGE.png,128,96,cat,11,21,40,60"
    ),
    "size": rows("image_id,label,x,y,w,h", "IMAGE,cat,10,20,30,40"),
    "long size": rows(
        "Image Name,Label Name,bbox_x,bbox_y,bbox_width,bbox_height", "IMAGE.png,cat,10,20,30,40"
    ),
    "centre": rows("file_name,name,cx,cy,w,h", "IMAGE.png,cat,25,40,30,40"),
    "one column": rows(
        "image_id,width,height,bbox,class", 'IMAGE,128,96,"[10.0, 20, 30.0, 40]",cat'
    ),
    "open images": rows(
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded",
        f"IMAGE,x,cat,1,{10 / 128},{40 / 128},{20 / 96},{60 / 96},0",
    ),
    "fractions": rows(
        "file,class,x0,y0,x1,y1", f"IMAGE.png,cat,{10 / 128},{20 / 96},{40 / 128},{60 / 96}"
    ),
    "retinanet": rows("", "IMAGE.png,10,20,40,60,cat").lstrip(),
    "retinanet, first empty": "c.png,,,,,\n" + rows("", "IMAGE.png,10,20,40,60,cat").lstrip(),
    "no names": rows("", "IMAGE.png;cat;10;20;40;60").lstrip(),
    "class numbers": rows("", "IMAGE.png,10,20,40,60,3").lstrip(),
    "makesense": rows("", "cat,10,20,30,40,IMAGE.png,128,96").lstrip(),
    "spaces only": rows("", "IMAGE.png 10 20 40 60 cat").lstrip(),
    "via": rows(
        "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes",
        'IMAGE.png,1,"{}",1,0,"{""name"":""rect"",""x"":10,""y"":20,""width"":30,""height"":40}","{""class"":""cat""}"',
    ),
}
UNSAID = {
    "semicolons",
    "tabs",
    "pipes",
    "spaces",
    "capitals",
    "quoted",
    "excel",
    "corners",
    "sides",
    "tensorflow",
    "size",
    "centre",
    "via",
    "decimal commas",
}


def same(samples, count=2):
    """The two images with the one box, whatever file they come from."""
    assert len(samples) == count
    for sample in samples[-2:] if count > 1 else samples:
        assert [truth.class_name for truth in sample.truths] in (["cat"], ["3"])
        assert sample.truths[0].box_xyxy_px == pytest.approx(BOX)
        assert sample.single
        assert sample.read().shape == (96, 128, 3)


@pytest.mark.parametrize("kind", TABLES)
def test_tables(tmp_path, kind):
    images(tmp_path / "images", ["a.png", "b.png", *(["c.png"] if "c.png" in TABLES[kind] else [])])
    (tmp_path / "labels.csv").write_text(TABLES[kind], newline="")
    remarks = Remarks()
    same(
        load_dataset(tmp_path / "labels.csv", remarks=remarks), 3 if "c.png" in TABLES[kind] else 2
    )
    assert not (remarks.lines() and kind in UNSAID), remarks.lines()
    assert not remarks.left_out


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("name", ["labels.csv", "LABELS.CSV", "labels.tsv", "labels.txt"])
def test_encodings_and_endings_of_tables(tmp_path, encoding, name):
    images(tmp_path / "images")
    mark = "\ufeff" if encoding == "utf-16-le" else ""
    (tmp_path / name).write_bytes((mark + PLAIN.replace("cat", "käfer")).encode(encoding))
    samples = notify("read as Windows-1252" if encoding == "cp1252" else "^$", tmp_path / name)
    assert [sample.truths[0].class_name for sample in samples] == ["käfer"] * 2


def coco_of(folder, change):
    path = coco(folder)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


def runs_as_text(runs):
    """COCO's compressed run lengths, written as its tools do."""
    text = ""
    for place, run in enumerate(runs):
        value = run - runs[place - 2] if place > 2 else run
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(48 + bits + 32 * more)
    return text


RUNS = [10 * 96 + 20, 40, *[56, 40] * 29, 96 * 88 + 36]
SHAPES = [
    [[10, 20, 40, 20, 40, 60, 10, 60]],
    [10, 20, 40, 60],
    {"size": [96, 128], "counts": RUNS},
    {"size": [96, 128], "counts": runs_as_text(RUNS)},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("box", [None, []])
def test_coco_without_a_box_has_that_of_its_outline(tmp_path, shape, box):
    def change(data):
        data["annotations"][0] |= {"bbox": box, "segmentation": shape}

    same(load_dataset(coco_of(tmp_path, change)))


@pytest.mark.parametrize(
    ("change", "words", "kept"),
    [
        (lambda d: d["annotations"][0].update(image_id="0"), "^$", 2),
        (lambda d: d["annotations"][0].update(image_id=0.0), "^$", 2),
        (lambda d: d["annotations"][0].update(category_id="7"), "^$", 2),
        (
            lambda d: d["annotations"].append(
                {"image_id": 0, "category_id": 7, "iscrowd": 1, "bbox": None}
            ),
            "^$",
            2,
        ),
        (lambda d: d["annotations"][0].update(bbox=["10", "20", 30, 40.0]), "^$", 2),
        (
            lambda d: d["annotations"][0].update(bbox=[]),
            r"^left out: .*set\.json: annotation 1: its bbox is \[\], not 4 numbers$",
            1,
        ),
        (
            lambda d: d["annotations"][0].pop("image_id"),
            "^left out: .*annotation 1: it has no 'image_id'$",
            1,
        ),
        (
            lambda d: d["annotations"].insert(0, 5),
            "^left out: .*annotation 1: it is 5, not an object",
            2,
        ),
        (
            lambda d: d["images"].append({"id": 3}),
            "^left out: .*image 3: it has no 'file_name'$",
            2,
        ),
        (
            lambda d: d["annotations"].extend([{}] * 9),
            "annotation 5: it has no 'image_id'\nleft out: 6 more$",
            2,
        ),
    ],
)
def test_one_bad_row_of_coco_is_told_and_left_out(tmp_path, change, words, kept):
    samples = [sample for sample in notify(words, coco_of(tmp_path, change)) if sample.truths]
    assert len(samples) == kept


def test_coco_without_categories_or_with_fractions(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    samples = notify(
        "no 'categories'", coco_of(tmp_path / "a", lambda data: data.pop("categories"))
    )
    assert {truth.class_name for sample in samples for truth in sample.truths} == {"7"}

    def fractions(data):
        for item in data["annotations"]:
            item["bbox"] = [10 / 128, 20 / 96, 30 / 128, 40 / 96]

    same(notify("between 0 and 1: read as fractions", coco_of(tmp_path / "b", fractions)))


def test_an_image_with_a_bad_object_is_no_single_object_image(tmp_path):
    path = coco_of(
        tmp_path,
        lambda data: data["annotations"].append(
            {"image_id": 0, "category_id": 7, "bbox": [1, 2, 3]}
        ),
    )
    assert [sample.single for sample in load_dataset(path)] == [False, True]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_json_with_a_mark(tmp_path, encoding):
    path = coco(tmp_path)
    path.write_bytes(path.read_text().encode(encoding))
    same(load_dataset(path))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("<width>128", "<width>128.0"),
        lambda text: text.replace(SIZE, "<size><width>x</width></size>"),
        lambda text: "\n " + text,
        lambda text: text.replace(
            "<annotation>", '<annotation xmlns="http://example.com/voc" verified="yes">'
        ),
        lambda text: text.replace("<annotation>", "<?xml version='1.0'?><annotation>"),
        lambda text: text.replace("annotation>", "Annotation>").replace("bndbox", "BndBox"),
        lambda text: text.replace("xmin", "x_min"),
        lambda text: text.replace(
            "<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>40</xmax><ymax>60</ymax></bndbox>",
            "<robndbox><cx>25</cx><cy>40</cy><w>40</w><h>30</h><angle>1.5707963267948966</angle></robndbox>",
        ),
        lambda text: text.replace(
            "<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>40</xmax><ymax>60</ymax></bndbox>",
            "<polygon><pt><x>10</x><y>20</y></pt><pt><x>40</x><y>60</y></pt></polygon>",
        ),
        lambda text: text.replace("11</xmin><ymin>21", f"{10 / 128}</xmin><ymin>{20 / 96}").replace(
            "40</xmax><ymax>60", f"{40 / 128}</xmax><ymax>{60 / 96}"
        ),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_spellings_of_xml(tmp_path, change, encoding):
    labels = voc(tmp_path)
    for name in "ab":
        text = change(voc_xml(f"{name}.png"))
        assert text != voc_xml(f"{name}.png")
        (labels / f"{name}.xml").write_bytes(text.encode(encoding))
    same(load_dataset(labels))


def test_xml_declares_its_encoding(tmp_path):
    labels = voc(tmp_path)
    (labels / "a.xml").write_bytes(
        ("<?xml version='1.0' encoding='gb2312'?>" + voc_xml("a.png").replace("cat", "猫")).encode(
            "gb2312"
        )
    )
    assert load_dataset(labels)[0].truths[0].class_name == "猫"


def test_swapped_sizes_are_taken_where_boxes_fit_and_exif_is_named(tmp_path):
    labels = voc(tmp_path)
    swapped = SIZE.replace("128", "0").replace("96", "128").replace(">0<", ">96<")
    (labels / "a.xml").write_text(voc_xml("a.png", size=swapped))
    same(
        notify(
            "wrong order .EXIF rotation does so.: boxes fit and are taken .*96x128, the image has 128x96 px",
            labels,
        )
    )
    jpeg = cv2.imencode(".jpg", np.rot90(picture(0)))[1].tobytes()
    exif = b"\xff\xe1\0\x22Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    (tmp_path / "JPEGImages" / "c.jpg").write_bytes(jpeg[:2] + exif + jpeg[2:])
    (labels / "a.xml").write_text(voc_xml("c.jpg", size=swapped))
    assert notify("the size before EXIF rotation: boxes fit", labels)[0].read().shape == (
        96,
        128,
        3,
    )
    (labels / "a.xml").write_text(voc_xml("c.jpg", (10, 20, 40, 120), size=swapped))
    notify(
        "c.jpg has 128x96 px, its label says 96x128; the file's EXIF data turn it by 90 degrees",
        labels,
    )


def yolo(
    folder,
    line="0 0.1953125 0.4166666666666667 0.234375 0.4166666666666667",
    data="names: [cat, dog]",
    layout="images/train labels/train",
):
    pictures, texts = layout.split()
    images(folder / pictures)
    (folder / texts).mkdir(parents=True, exist_ok=True)
    for name in "ab":
        (folder / texts / f"{name}.txt").write_text(line + "\n")
    if data:
        (folder / "data.yaml").write_text(data)
    return folder


@pytest.mark.parametrize(
    "layout", ["images/train labels/train", "images labels", "train/images train/labels", ". ."]
)
def test_yolo_folders(tmp_path, layout):
    yolo(tmp_path, layout=layout)
    (tmp_path / "README.txt").write_text("made with a tool")
    same(load_dataset(tmp_path))
    same(load_dataset(tmp_path / "data.yaml"))
    if layout != ". .":
        same(load_dataset(tmp_path / layout.split()[1]))
        same(load_dataset(tmp_path / layout.split()[0]))


@pytest.mark.parametrize(
    ("line", "data"),
    [
        ("0 0.1953125 0.4166666667 0.234375 0.4166666667 0.93", "names:\n  0: cat\n  1: dog"),
        (
            "1 0.078125 0.2083333333 0.3125 0.2083333333 0.3125 0.625 0.078125 0.625",
            "nc: 2\nnames:\n- dog\n- 'cat' # ours\nval: x",
        ),
        (
            "0 0.1953125 0.4166666667 0.234375 0.4166666667 0.5 0.5 2 0.1 0.1 0",
            "names: ['cat']\nkpt_shape: [2, 3]",
        ),
        ("cat 0.1953125 0.4166666667 0.234375 0.4166666667", ""),
        ("cat 0.00 0 -1.57 10 20 40 60 1.57 1.73 4.15 1.65 1.75 13.22 1.62", ""),
    ],
)
def test_lines_of_yolo_and_kitti(tmp_path, line, data):
    same(load_dataset(yolo(tmp_path, line, data)))


def test_yolo_says_what_it_leaves_out(tmp_path):
    yolo(tmp_path, data="")
    (tmp_path / "labels" / "train" / "a.txt").write_text("")
    samples = notify("names the classes: they are called by their number", tmp_path)
    assert [[truth.class_name for truth in sample.truths] for sample in samples] == [[], ["0"]]
    (tmp_path / "classes.txt").write_text("dog\n")
    (tmp_path / "labels" / "train" / "a.txt").write_text("0 64 48 30 40\n3 0.5 0.5 0.1 0.1\n")
    samples = notify(
        "a.txt line 1: its box 64 48 30 40 is not between 0 and 1.*\n.*a.txt line 2: its class is 3, of 1",
        tmp_path,
    )
    assert [[truth.class_name for truth in sample.truths] for sample in samples] == [["dog"]]


def test_names_in_yaml():
    assert yaml_names("names: {0: a b, 3: 'c, d'}") == {0: "a b", 3: "c, d"}
    assert yaml_names('names: [\n  "a", # first\n  b\n]') == {0: "a", 1: "b"}
    assert yaml_names("train: x") == {}


STUDIO = {
    "x": 100 * 10 / 128,
    "y": 100 * 20 / 96,
    "width": 100 * 30 / 128,
    "height": 100 * 40 / 96,
    "rotation": 0,
    "rectanglelabels": ["cat"],
}
TURNED = {
    **STUDIO,
    "x": 100 * 40 / 128,
    "width": 100 * 40 / 128,
    "height": 100 * 30 / 96,
    "rotation": 90,
}
OF = {"original_width": 128, "original_height": 96}


def tools(name):
    """One image's labels as the tool writes them."""
    corners = {"x": 10, "y": 20, "width": 30, "height": 40}
    return {
        "labelme.json": {
            "shapes": [{"label": "cat", "points": [[40, 20], [10, 60]], "shape_type": "rectangle"}],
            "imagePath": f"..\\images\\{name}",
            "imageHeight": 96,
            "imageWidth": 128,
        },
        "polygon.json": {
            "shapes": [
                {"label": "cat", "points": [[10, 20], [40, 20], [25, 60]]},
                {"label": "x", "points": [[1, 1]], "shape_type": "point"},
            ],
            "imagePath": name,
        },
        "studio.json": [
            {
                "id": 1,
                "data": {"picture": f"/data/upload/1/0a1b2c3d-{name}"},
                "annotations": [
                    {"was_cancelled": True},
                    {
                        "result": [
                            {"type": "choices", "value": {"choices": ["x"]}},
                            {"value": STUDIO, **OF},
                        ]
                    },
                ],
            }
        ],
        "turned.json": [
            {
                "data": {"image": f"/data/local-files/?d=some/{name}"},
                "annotations": [{"result": [{"value": TURNED, **OF}]}],
            }
        ],
        "min.json": [
            {
                "image": f"http://localhost:8080/data/{name}?x=1",
                "id": 1,
                "boxes": [{**STUDIO, **OF}],
            }
        ],
        "via.json": {
            "x": {
                "filename": name,
                "size": 1,
                "regions": [
                    {
                        "shape_attributes": {"name": "rect", **corners},
                        "region_attributes": {"type": "cat"},
                    }
                ],
            }
        },
        "project.json": {
            "_via_img_metadata": {
                "x": {
                    "filename": name,
                    "regions": {
                        "0": {
                            "shape_attributes": {
                                "name": "polygon",
                                "all_points_x": [10, 40],
                                "all_points_y": [20, 60],
                            },
                            "region_attributes": {"a": {"cat": True}},
                        }
                    },
                }
            }
        },
        "createml.json": [
            {
                "image": name,
                "annotations": [
                    {"label": "cat", "coordinates": {"x": 25, "y": 40, "width": 30, "height": 40}}
                ],
            }
        ],
        "bdd.json": [
            {
                "name": name,
                "labels": [
                    {"category": "cat", "box2d": {"x1": 10, "y1": 20, "x2": 40, "y2": 60}},
                    {"category": "lane", "poly2d": []},
                ],
            }
        ],
        f"{name}.json": {
            "size": {"width": 128, "height": 96},
            "objects": [
                {
                    "classTitle": "cat",
                    "geometryType": "rectangle",
                    "points": {"exterior": [[10, 20], [40, 60]], "interior": []},
                }
            ],
        },
        "cvat.xml": f'<annotations><image id="0" name="{name}" width="128" height="96"><box label="cat" xtl="10" ytl="20" xbr="40" ybr="60"/><points label="x" points="1,2"/></image></annotations>',
        "cvat_turned.xml": f'<annotations><image name="{name}" width="128" height="96"><box label="cat" xtl="5" ytl="25" xbr="45" ybr="55" rotation="90"/></image></annotations>',
        "cvat_polygon.xml": f'<annotations><image name="{name}" width="128" height="96"><polygon label="cat" points="10,20;40,30;20,60"/></image></annotations>',
        "dlib.xml": f'<dataset><images><image file="{name}"><box top="20" left="10" width="30" height="40"><label>cat</label></box></image></images></dataset>',
    }


@pytest.mark.parametrize("kind", tools("a.png"))
def test_what_other_tools_write(tmp_path, kind):
    images(tmp_path / "images")
    content = tools("a.png")[kind]
    path = tmp_path / kind
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    same(load_dataset(path), 1)
    (tmp_path / "settings.json" if kind.endswith("json") else tmp_path / "settings.xml").write_text(
        "{}"
    )
    same(notify("left out: .*settings", tmp_path), 1)


def test_tracks_of_cvat_give_frames_by_number(tmp_path):
    box = '<box frame="{}" outside="{}" xtl="10" ytl="20" xbr="40" ybr="60"/>'
    (tmp_path / "annotations.xml").write_text(
        f'<annotations><track label="cat">{box.format(0, 0)}{box.format(1, 0)}{box.format(2, 1)}</track></annotations>'
    )
    images(tmp_path / "frames")
    write_video(tmp_path / "clip.mp4", 2)
    same(load_dataset(tmp_path / "annotations.xml", tmp_path / "frames"))
    same(load_dataset(tmp_path / "annotations.xml", tmp_path / "clip.mp4"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
            "is a list of detections in COCO's form.*: give the COCO file",
        ),
        ({"items": [], "categories": {}}, "is Datumaro's JSON: export COCO or Pascal VOC"),
        ({"type": "FeatureCollection", "features": []}, "is GeoJSON: export COCO"),
        ([{"Labeled Data": "a.png"}], "is Labelbox's export: convert it to COCO"),
    ],
)
def test_what_is_known_but_not_read_is_named(tmp_path, content, words):
    (tmp_path / "labels.json").write_text(json.dumps(content))
    refused(words, tmp_path / "labels.json")


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("images\\a.png", "images/a.png"),
        ("images\\1/a.png", "images/a.png"),
        ("C:\\Users\\me\\a.png", "images/a.png"),
        ("/home/me/set/a.png", "images/deep/a.png"),
        ("http://localhost:8080/data/a.png?w=1", "images/a.png"),
        ("file:///home/me/a.png", "images/a.png"),
        ("..\\..\\x\\a.png", "images/a.png"),
        ("s3://bucket/x/a.png", "images/a.png"),
        ("my%20cat.png", "images/my cat.png"),
        ("100%25.png", "images/100%25.png"),
        ("A.PNG", "images/a.png"),
        ("a.png", "images/A.PNG"),
        ("a.jpg", "images/a.png"),
        ("a", "images/a.png"),
        (
            unicodedata.normalize("NFD", "Käse.png"),
            "images/" + unicodedata.normalize("NFC", "Käse.png"),
        ),
        (
            unicodedata.normalize("NFC", "Käse.png"),
            "images/" + unicodedata.normalize("NFD", "Käse.png"),
        ),
        (" a.png ", "images/a.png"),
        ("/x/train/a.png", "images/train/a.png"),
        ("D:\\x\\train\\a.png", "images/a.png"),
    ],
)
def test_images_are_found_by_the_name_that_people_mean(tmp_path, name, given):
    images((tmp_path / given).parent, [(tmp_path / given).name])
    (tmp_path / "labels.csv").write_text(PLAIN.split("a.png")[0] + f'"{name}",cat,10,20,40,60\n')
    same(load_dataset(tmp_path / "labels.csv"), 1)


def test_another_split_s_image_is_not_taken_for_one_of_another_machine(tmp_path):
    images(tmp_path / "images" / "val")
    (tmp_path / "labels.csv").write_text(PLAIN.replace("a.png", "/home/me/train/a.png"))
    notify(
        r"left out: .*names image /home/me/train/a\.png, which is not in .*images, only val/a\.png is",
        tmp_path / "labels.csv",
    )
    images(tmp_path / "images" / "x" / "train", ["a.png"])
    images(tmp_path / "images" / "y" / "train", ["a.png"])
    notify(
        r"which .*images has as [xy]/train/a\.png and [xy]/train/a\.png: name the folder",
        tmp_path / "labels.csv",
    )


def test_xml_beside_images(tmp_path):
    """The folder's own images come first; those of a split are not mixed up with another's."""
    images(tmp_path / "images")
    for split in ("train", "test"):
        folder = images(tmp_path / "set" / split, ["a.png"])
        (folder / "a.xml").write_text(voc_xml("a.png"))
    cv2.imwrite(str(tmp_path / "set" / "test" / "a.png"), picture(1))
    (sample,) = load_dataset(tmp_path / "set" / "test")
    assert np.abs(sample.read().astype(int) - picture(1)).mean() < 3
    samples = load_dataset(tmp_path / "set")
    assert {sample.name for sample in samples} == {"train/a.png", "test/a.png"}
    assert not np.array_equal(samples[0].read(), samples[1].read())


@pytest.mark.parametrize("image", ["IMG_old.png", "x.jpg", ""])
def test_an_image_called_as_its_label_file_is(tmp_path, image):
    labels = voc(tmp_path)
    for name in "ab":
        (labels / f"{name}.xml").write_text(voc_xml(image))
    same(load_dataset(labels))


def test_label_files_that_all_name_one_image_are_of_their_own(tmp_path):
    labels = voc(tmp_path)
    (labels / "b.xml").write_text(voc_xml("a.png"))
    first, second = notify("by the name of their label file", labels)
    assert not np.array_equal(first.read(), second.read())


def test_hidden_and_stray_files(tmp_path):
    labels = voc(tmp_path)
    (labels / "._a.xml").write_bytes(b"\0\x05\x16\x07")
    for name in (".idea/misc.xml", "__MACOSX/a.xml", ".ipynb_checkpoints/a.xml"):
        (labels / name).parent.mkdir()
        (labels / name).write_text("<project/>")
    same(notify("^$", labels))
    (labels / "pom.xml").write_text("<project/>")
    same(
        notify(
            r"^left out: .*Annotations: pom\.xml is not VOC XML: its root is <project>, not <annotation>$",
            labels,
        )
    )


@pytest.mark.parametrize("suffix", [".jfif", ".mpo", ".jp2", ".gif", ".avif", ".heic", ".psd"])
def test_kinds_of_images(tmp_path, suffix):
    images(tmp_path / "images", ["b.png"])
    kind = {".jfif": ".jpg", ".mpo": ".jpg", ".heic": ".jpg", ".psd": ".jpg"}.get(suffix, suffix)
    (tmp_path / "images" / f"a{suffix}").write_bytes(cv2.imencode(kind, picture(0))[1].tobytes())
    (tmp_path / "labels.csv").write_text(PLAIN.replace("a.png", f"a{suffix}"))
    if suffix == ".psd":
        notify(
            rf"names image a\{suffix}, which is of an unsupported kind \(\{suffix}\): convert it",
            tmp_path / "labels.csv",
        )
    else:
        same(notify("^$", tmp_path / "labels.csv"))
