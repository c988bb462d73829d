"""VOC 2007 from small archives of exactly the published layout, behind a real web server; what a
user is told otherwise.
"""

import hashlib
import io
import json
import tarfile
from dataclasses import replace

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

import cli
from calib.data import choose
from calib.data.choose import DataOptions, load_chosen
from engines.downloads import cache_dir
from engines.errors import DownloadError, SourceError
from tests.web import FileServer

CLASSES = ("dog", "cat")
WIDTH, HEIGHT = 120, 90


def picture_of(seed):
    """A busy rectangle on a flat field, and its edges."""
    rng = np.random.default_rng(seed)
    x0, y0 = (int(v) for v in rng.integers(5, 40, 2))
    x1, y1 = x0 + int(rng.integers(40, 70)), y0 + int(rng.integers(30, 45))
    image = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
    image[y0:y1, x0:x1] = rng.integers(0, 256, (y1 - y0, x1 - x0, 3))
    return cv2.imencode(".jpg", image)[1].tobytes(), (x0, y0, x1, y1)


def object_xml(class_name, edges, difficult=0):
    """As in VOC: corners are pixels counted from 1, a person has parts with boxes of their own."""
    x0, y0, x1, y1 = edges
    box = f"<bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>"
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>"
    flags = f"<pose>Left</pose><truncated>1</truncated><difficult>{difficult}</difficult>"
    return f"<object><name>{class_name}</name>{flags}{box}{part}</object>"


def archive(path, split, count, first=1):
    """Every fourth image has a second, every third a further difficult object; the last has only a
    difficult one.
    """
    files = {}
    names = [f"{number:06}" for number in range(first, first + count)]
    for number, name in enumerate(names, start=1):
        content, edges = picture_of(first + number)
        last = number == count
        objects = object_xml(CLASSES[number % 2], edges, difficult=int(last))
        objects += (
            object_xml(CLASSES[number // 4 % 2], (0, 0, 20, 20))
            if number % 4 == 0 and not last
            else ""
        )
        objects += object_xml("dog", (90, 60, 120, 90), difficult=1) if number % 3 == 0 else ""
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
        files[f"JPEGImages/{name}.jpg"] = content
        files[f"Annotations/{name}.xml"] = (
            f"<annotation><folder>VOC2007</folder><filename>{name}.jpg</filename>{size}{objects}</annotation>".encode()
        )
    files["JPEGImages/009999.jpg"] = content  # of another image set
    files[f"ImageSets/Main/{split}.txt"] = ("\n".join(names) + "\n").encode()
    files[f"ImageSets/Main/dog_{split}.txt"] = "".join(f"{name} -1\n" for name in names).encode()
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"VOCdevkit/VOC2007/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Both archives on the web, small, with checksums of their own; the cache is empty."""
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "www"
    folder.mkdir()
    with FileServer(folder) as served:
        for split, count in (("trainval", 40), ("test", 13)):
            source = choose.VOC_ARCHIVES[split]
            archive(folder / source.file, split, count)
            content = (folder / source.file).read_bytes()
            there = replace(
                source,
                url=f"{served.address}/{source.file}",
                sha256=hashlib.sha256(content).hexdigest(),
                size_bytes=len(content),
            )
            monkeypatch.setitem(choose.VOC_ARCHIVES, split, there)
        yield served


def test_the_published_archives_and_checksums():
    for split, digits in (("trainval", "7d8cd951101b0957"), ("test", "6836888e2e01dca8")):
        source = choose.VOC_ARCHIVES[split]
        assert (
            source.url
            == f"https://thor.robots.ox.ac.uk/pascal/VOC/voc2007/VOC{split}_06-Nov-2007.tar"
        )
        assert source.sha256.startswith(digits)
        assert len(source.sha256) == 64


def test_images_and_boxes_come_straight_from_the_archive(server, tmp_path):
    samples = choose.load_voc2007("trainval", tmp_path / "kept")
    assert [sample.name for sample in samples] == [f"{number:06}.jpg" for number in range(1, 41)]
    for number, sample in enumerate(samples, start=1):
        assert sample.read().shape == (HEIGHT, WIDTH, 3)
        if number < 40:
            assert sample.truths[0].box_xyxy_px == picture_of(1 + number)[1]
    assert [len(sample.truths) for sample in samples[:5]] == [1, 1, 1, 2, 1], (
        "difficult objects are left out"
    )
    assert samples[-1].truths == ()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [
        "VOCtrainval_06-Nov-2007.tar"
    ], "nothing is unpacked"


def test_an_archive_is_scanned_once(server, tmp_path, monkeypatch):
    scans = []
    start = tarfile.TarFile.__init__
    monkeypatch.setattr(
        tarfile.TarFile,
        "__init__",
        lambda tar, *given, **options: (scans.append(tar), start(tar, *given, **options))[1],
    )
    for sample in choose.load_voc2007("test", tmp_path):
        sample.read()
    assert len(scans) == 1


def test_archives_that_a_user_placed_are_taken_without_the_web(server, tmp_path):
    chosen = DataOptions(dataset="voc2007", dataset_dir=tmp_path / "www", classes="cat")
    cats = load_chosen(chosen, "test")
    assert {truth.class_name for sample in cats for truth in sample.truths} == {"cat"}
    assert server.asked == []


def test_a_download_that_was_cut_off_goes_on(server):
    server.hang_up_after = 9000
    with pytest.raises(
        DownloadError,
        match=r"try again to go on after 9000 bytes, or fetch it by hand and put it at .*cache",
    ):
        load_chosen(DataOptions(dataset="voc2007"), "test")
    server.hang_up_after = None
    assert len(load_chosen(DataOptions(dataset="voc2007"), "test")) == 13
    assert server.asked == [None, "bytes=9000-"]
    assert (cache_dir() / "datasets" / "VOCtest_06-Nov-2007.tar").is_file()


def test_an_archive_with_a_wrong_checksum_is_thrown_away(server, monkeypatch):
    monkeypatch.setitem(
        choose.VOC_ARCHIVES, "test", replace(choose.VOC_ARCHIVES["test"], sha256="0" * 64)
    )
    with pytest.raises(DownloadError, match="a sha256 that is not 0000"):
        load_chosen(DataOptions(dataset="voc2007"), "test")
    assert not list((cache_dir() / "datasets").iterdir())


def test_an_archive_of_something_else_is_refused(server, tmp_path):
    path = tmp_path / "www" / choose.VOC_ARCHIVES["test"].file
    (tmp_path / "www" / choose.VOC_ARCHIVES["trainval"].file).rename(path)
    with pytest.raises(
        DownloadError, match=r"VOCtest_06-Nov-2007\.tar is cut off, damaged or another file"
    ):
        choose.load_voc2007("test", tmp_path / "www")


@pytest.mark.parametrize("kept", [5000, 5130, 30_000])
def test_an_archive_that_is_cut_off_is_refused(server, tmp_path, kept):
    path = tmp_path / "www" / choose.VOC_ARCHIVES["test"].file
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        DownloadError,
        match=rf"VOCtest_06-Nov-2007\.tar is cut off, .* \({kept} bytes of \d+\): remove it",
    ):
        choose.load_voc2007("test", tmp_path / "www")


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (DataOptions(), r"give either a label file or a data set, voc2007: neither is given"),
        (DataOptions(data="a.csv", dataset="voc2007"), r"give either .*: both are given"),
        (DataOptions(dataset="voc2012"), r"unknown data set 'voc2012': use voc2007"),
        (DataOptions(dataset="voc2007", ids="a.txt"), r"images and ids go with a label file"),
        (
            DataOptions(data="a.csv", dataset_dir="a"),
            r"the folder of a published set goes with its name",
        ),
    ],
)
def test_contradictions_are_refused(chosen, words):
    with pytest.raises(SourceError, match=words):
        load_chosen(chosen, "test")


def test_an_unknown_class_lists_the_known_ones(server):
    with pytest.raises(SourceError, match=r"voc2007 test has no class 'horse': it has cat, dog$"):
        load_chosen(DataOptions(dataset="voc2007", classes="dog, horse"), "test")


def run(*arguments):
    result = CliRunner().invoke(
        cli.all_commands(), list(map(str, arguments)), catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_fit_learns_on_trainval_and_measures_on_test(server, tmp_path):
    """From the download to the report, by the command line; then the same measurement by
    ``evaluate``.
    """
    common = ("--dataset", "voc2007", "--weights", "random", "--size", "64", "--json")
    card = run("fit", *common, "--out", tmp_path / "head.safetensors")
    assert card["data"] == "voc2007"
    assert card["images"] == 30, (
        "39 images with an object that is not difficult; 9 of them have two"
    )
    report = card["test"]
    assert report["images"] == 12
    assert set(report["corloc_per_class"]) == set(CLASSES)
    assert report["single_object"]["images"] == 9
    assert set(report["baselines"]) == {
        "whole_image",
        "mean_box",
        "best_constant",
        "centre_box",
    }
    again = run("evaluate", *common, "--head", tmp_path / "head.safetensors")
    kept = ("images", "corloc", "corloc_per_class", "baselines")
    assert {key: again[key] for key in kept} == {key: report[key] for key in kept}
    assert again["single_object"]["corloc"] == report["single_object"]["corloc"]
    assert len(server.asked) == 2, "each archive once"
