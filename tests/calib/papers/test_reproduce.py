"""The command that computes the papers' tables again: on a few photos, with small networks."""

import json

import cv2
import numpy as np
import pytest

from calib.papers.reproduce import TABLES, labelled
from engines.errors import SourceError
from tests.command_line import command, refused
from tests.realtime.media import picture


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder as VOC's two parts: photos of a bright square, some with a second object."""
    folder = tmp_path_factory.mktemp("voc")
    for split, count in (("trainval", 24), ("test", 8)):
        rows = ["file,class,x0,y0,x1,y1"]
        for index in range(count):
            name = f"{split}{index}.png"
            cv2.imwrite(str(folder / name), np.roll(picture(index), 3 * index, axis=1))
            rows.append(f"{name},{'cat' if index % 2 else 'dog'},4,30,{28 + index},54")
            if index % 4 == 0:
                rows.append(f"{name},cat,60,2,100,40")
        (folder / f"{split}.csv").write_text("\n".join(rows))
    return folder


def reproduced(table, folder, *more):
    given = ("--data", folder, "--model", "compact", "--weights", "random", "--size", "32")
    return command("reproduce", table, *given, *more, "--json")


def test_the_heuristic_prints_the_papers_numbers_beside_ours(scenes, tmp_path):
    page = tmp_path / "page.html"
    done = reproduced("heuristic", scenes, "--out", page)
    found = json.loads(done.stdout)
    assert set(found["corloc"]) == {"10", "20", "30"}
    assert found["images"] == 8
    assert "27.2 %" in done.stderr
    assert "38.4 %" in done.stderr
    assert "32.5 %" in done.stderr
    text = page.read_text()
    assert text.count("data:image/jpeg") >= 6
    assert "failures" in text
    again = reproduced("heuristic", scenes, "--limit", "5")  # the maps are there already
    assert json.loads(again.stdout)["images"] == 5
    assert "maps of" not in again.stderr


def test_what_cannot_be_reproduced_is_one_line(scenes, tmp_path):
    assert "there are heuristic" in refused("reproduce", "table9", "--data", scenes)
    assert "holds neither" in refused("reproduce", "heuristic", "--data", tmp_path)
    with pytest.raises(SourceError, match="signs for it"):
        labelled(None, "val")


def test_each_table_names_a_function_that_is_there():
    for name, table in TABLES.items():
        assert table.name == name
        assert table.load()
