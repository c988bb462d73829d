"""Reports: what they say, that they stand alone, which cases they show, and that they are written
whole or not at all.
"""

import json
import os
import re
import shlex
from base64 import b64decode
from html import unescape

import cv2
import numpy as np
import pytest
from rich.console import Console

from calib.data.datasets import Sample, load_dataset
from calib.evaluation.evaluate import Case, evaluate
from calib.evaluation.metrics import ConstantBoxes
from calib.evaluation.report import (
    PANEL_PX,
    check_report,
    class_bars,
    example_cases,
    outline,
    write_report,
)
from engines.errors import ModelError, OutputError
from engines.explain import Cue, Explanation, Rival
from engines.localizer import Localizer
from engines.text import REPLACEMENT
from realtime.annotate import SHADE_BGR, TRUTH_BGR
from realtime.documents import ASSETS, templates
from realtime.teaching.labels import LabelFolder
from tests.command_line import command, refused
from tests.engines.mock import MockEngine
from tests.realtime.media import picture

FACTS = {"model": "mock <b>", "machine": "a | b"}


def case(iou, class_name="cat"):
    return Case(
        Sample("x", lambda: picture(0), ()),
        class_name,
        iou,
        {"whole_image": 0.1},
        (4, 30, 28, 54),
        (4, 30, 28, 54),
        1,
    )


@pytest.fixture
def labels(tmp_path):
    """Thirteen small pictures of two classes, one with a name that HTML and Markdown both find
    hard.
    """
    names = [f"{i}.png" for i in range(12)] + ["a<b>_|_c*.png"]
    (tmp_path / "d").mkdir()
    for index, name in enumerate(names):
        cv2.imwrite(str(tmp_path / "d" / name), picture(index))
    rows = [
        f"{name},{'dog' if i % 3 else 'cat & co'},4,30,{28 + i},54" for i, name in enumerate(names)
    ]
    (tmp_path / "d.csv").write_text("file,class,x0,y0,x1,y1\n" + "\n".join(rows))
    return tmp_path / "d.csv"


@pytest.fixture
def write(labels):
    """Evaluate with the mock and write a report to a path."""
    localizer = Localizer(MockEngine(96))
    constants = ConstantBoxes((0, 0.2, 0.5, 0.8), (0, 0.3, 0.3, 0.6))
    report, cases = evaluate(load_dataset(labels), localizer, Console(quiet=True), constants)
    return lambda path: write_report(path, "On d", report, cases, localizer, FACTS, explain, labels)


def explain(image_bgr, box_xyxy_px):
    """No box of an image that is dark is explained."""
    if image_bgr.mean() < 20:
        raise ModelError("it is too dark")
    cues = (Cue("area", "its size", 1.0, 2.0, -0.75), Cue("alike", "others", 3.0, 2.0, 0.5))
    rivals = (Rival("cat <i>", 0.7), Rival("no object", 0.2))
    sizes = (320, 240), (40, 30)
    return Explanation(box_xyxy_px, "cat", 0.6, rivals, (), cues, 0.1, *sizes, np.zeros((2, 2)))


def decoded(content):
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)


def test_html_stands_alone(write, labels, tmp_path):
    write(tmp_path / "deep" / "r.html")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["r.html"]
    text = (tmp_path / "deep" / "r.html").read_text()
    sources = re.findall(r'src="(.*?)"', text)
    assert len(sources) == 14  # a bar chart, how good the boxes are, and 12 cases
    for source in sources:
        head, content = source.split(",")
        assert head in {"data:image/png;base64", "data:image/jpeg;base64"}
        assert decoded(b64decode(content)).shape[1] > 300
    assert "<script" not in text
    assert "http" not in text
    assert "mock &lt;b&gt;" in text
    assert "cat &amp; co" in text
    assert text.count("<summary>Why?</summary>") == 12
    assert "Against it speaks its size (less than usual)." in text
    assert '<i class="against" style="width: 100%"></i>-0.8' in text
    assert "names: cat &lt;i&gt; 70 %, no object 20 %" in text
    command_line = unescape(re.search("<code>(sightline label --add.*?)</code>", text)[1])
    words = shlex.split(command_line)
    assert words[:4] == ["sightline", "label", "--add", str(labels)]
    assert words[4::2] == ["--only"] * 4
    into = ["--labels-dir", str(tmp_path / "mine")]
    result = command(*words[1:], *into)
    assert "took 4 labelled images" in result.stderr
    assert len(LabelFolder(tmp_path / "mine").all()) == 4
    assert command(*words[1:], *into).stderr.count("4 were there") == 1
    assert "labels no image 'no'" in refused(*words[1:4], "--only", "no", *into)
    for words in (
        "CorLoc",
        "mean IoU",
        "box accuracy",
        "whole image",
        "mean box",
        "best constant box",
        "margin 0.5",
    ):
        assert words in text


def test_markdown_has_its_pictures_beside_it(write, tmp_path):
    write(tmp_path / "my report.md")
    text = (tmp_path / "my report.md").read_text()
    links = re.findall(r"!\[.*\]\((.*)\)", text)
    assert set(links) == {
        f"my%20report_files/{p.name}" for p in (tmp_path / "my report_files").iterdir()
    }
    assert len(links) == 14
    assert text.count("Against it speaks its size") == 4, "the worst"
    assert "`sightline label --add" in text
    assert r"a \| b" in text
    rows = [line for line in text.splitlines() if line.startswith("|") and ".jpg)" in line]
    assert len(rows) == 12
    assert all(
        len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows
    )  # four cells each, whatever the name


def test_a_report_that_cannot_be_written_leaves_nothing(write, tmp_path):
    (tmp_path / "r_files").touch()  # the place of the pictures is taken
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match=r"cannot write .*r_files"):
        write(tmp_path / "r.md")
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(OutputError, match=r"\.html or \.md; rename it"):
        write(tmp_path / "r.pdf")


def test_a_report_may_be_renewed_and_another_s_files_may_not_be_lost(write, tmp_path):
    for name in ("r.md", "r.html"):
        check_report(tmp_path / name)
        write(tmp_path / name)
        check_report(tmp_path / name)
    with pytest.raises(OutputError, match=r"its pictures need the folder r_files"):
        check_report(tmp_path / "r.md", [tmp_path / "r_files"])
    (tmp_path / "r_files" / "notes.txt").touch()
    check_report(tmp_path / "r.md")
    (tmp_path / "r_files" / "worst_9.jpg").write_bytes(b"theirs")
    with pytest.raises(OutputError, match=r"r_files, holds worst_9\.jpg"):
        check_report(tmp_path / "r.md")
    (tmp_path / "r_files" / "worst_9.jpg").unlink()
    (tmp_path / "r_files" / os.fsdecode(b"\xff.jpg")).touch()
    with pytest.raises(OutputError, match=f"r_files, holds {REPLACEMENT}[.]jpg"):
        check_report(tmp_path / "r.md")
    (tmp_path / "r_files" / os.fsdecode(b"\xff.jpg")).unlink()
    (tmp_path / "r.md").unlink()  # the pictures alone may be anybody's
    with pytest.raises(OutputError, match=r"which no report there names"):
        check_report(tmp_path / "r.md")
    (tmp_path / "s_files").touch()
    with pytest.raises(OutputError, match=r"its pictures need the folder s_files"):
        check_report(tmp_path / "s.md")


def test_a_page_of_another_command_is_no_report_of_this_one(tmp_path):
    (tmp_path / "clip.html").write_text(
        templates(ASSETS).get_template("document.html").render(title="a clip")
    )
    with pytest.raises(OutputError, match="another file has that name"):
        check_report(tmp_path / "clip.html")


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, [1]), (2, [1, 1]), (3, [1, 1, 1]), (7, [2, 2, 2]), (30, [4, 4, 4])]
)
def test_examples_are_the_best_the_middle_and_the_worst(count, sizes):
    cases = [case(i / 100) for i in np.random.default_rng(count).permutation(count)]
    groups = example_cases(cases)
    assert [len(group) for group in groups.values()] == sizes
    shown = [c.iou for group in groups.values() for c in group]
    assert len(set(shown)) == len(shown)
    assert shown[0] == (count - 1) / 100
    if count > 1:
        assert groups["worst"][0].iou == 0
    if count == 30:
        assert [c.iou for c in groups["median"]] == [0.16, 0.15, 0.14, 0.13]


def test_an_outline_lies_inside_the_box_on_a_dark_line():
    canvas = np.full((60, 80, 3), 200, np.uint8)
    outline(canvas, (10, 10, 70, 50), TRUTH_BGR)
    assert (canvas[:9] == 200).all()
    assert (canvas[20:40, 20:60] == 200).all()
    np.testing.assert_allclose(canvas[10:15, 40], [SHADE_BGR, *[TRUTH_BGR] * 3, SHADE_BGR], atol=50)


def test_a_case_picture_is_photo_and_map_of_one_size(write, tmp_path):
    write(tmp_path / "r.md")
    height, width = cv2.imread(str(tmp_path / "r_files" / "best_1.jpg")).shape[:2]
    assert (width - 6) % 2 == 0
    assert height <= PANEL_PX[1]
    assert (width - 6) / 2 / height == pytest.approx(128 / 96, abs=0.02)


def test_many_classes_still_make_a_picture_that_can_be_looked_at():
    bars = decoded(class_bars([case(0.6, f"class {i}") for i in range(300)]).content)
    assert bars.shape[0] < 4000


def test_the_command_writes_a_report(labels, tmp_path):
    result = command("evaluate", labels, "--report", tmp_path / "r.html")
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "r.html").read_text()
    for words in (
        "compact",
        "sensitivity",
        "openvino",
        "cores",
        "best constant box",
        f"{tmp_path.name}/d",
    ):
        assert words in text
    assert "r.txt: the name must end in .html or .md" in refused(
        "evaluate", labels, "--report", tmp_path / "r.txt"
    )


def test_real_photos_of_one_class_need_no_bars(data, tmp_path):
    raccoon = data / "raccoon"
    result = command(
        "evaluate",
        raccoon / "annotations.tar",
        "--ids",
        raccoon / "test.txt",
        "--images",
        raccoon / "images.tar",
        "--method",
        "gestalt",
        "--report",
        tmp_path / "r.md",
        "--min-score",
        0.7,
        "--json",
    )
    assert result.returncode == 0, result.stderr
    pictures = {path.name for path in (tmp_path / "r_files").iterdir()}
    assert len(pictures) == 14
    assert {"quality.png", "sure.png"} <= pictures
    found = json.loads(result.stdout)
    assert sum(row["boxes"] for row in found["reliability"]) == 40
    assert found["at_min_score"] == {"min_score": 0.7, **found["coverage"]["0.7"]}
    assert found["coverage"]["0.0"] == {"kept": 1.0, "corloc": found["corloc"]}
    assert 0 < found["coverage"]["0.7"]["kept"] < 1
    text = (tmp_path / "r.md").read_text()
    assert "40 images" in text
    assert (
        f"`--min-score 0.7` {100 * found['at_min_score']['kept']:.1f} % of images keep a box"
        in text
    )
    assert "By class" not in text
