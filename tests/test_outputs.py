"""Names that commands write to: never a file that they read or that is another's; their own earlier
results are renewed.
"""

import os
import shutil

import numpy as np
import pytest
from matplotlib.figure import Figure

from calib.heads.curve import CURVE_FILE, Curve, Point, plot_curve
from calib.heads.finetune import WEIGHTS_FILE, Finetuned, save_finetuned
from calib.precision.build import BuildOptions, check_options
from engines.certificate import CERTIFICATE_FILE, ENGINE_FILE, Certificate, EngineKey, write_engine
from engines.choose import choose_head
from engines.errors import OutputError
from engines.files import Kind, checked_output, picture_kind, signed
from engines.head import HEAD_FILE
from engines.int8 import CALIBRATION_FILE, Quantization
from engines.networks.registry import load_classifier
from engines.options import EngineOptions
from realtime.documents import LATENCY_FILE
from tests.command_line import command, refused

ANYTHING = Kind("result", (), b"")

# of each option: the words of its command, IN where it reads a file and OUT where it writes one,
# and the ending of both
WRITERS = {
    "fit --out": ("fit x.csv --weights IN --out OUT", ".safetensors"),
    "fit --curve": ("fit x.csv --curve-on IN --out h.safetensors --curve OUT", ".png"),
    "finetune --out": ("finetune x.csv --weights IN --out OUT", ".safetensors"),
    "build --out": ("build --weights IN --out OUT", ".onnx"),
    "build's certificate": (
        "build --backend openvino --calibration IN --out net.onnx",
        ".certificate.json",
    ),
    "build --out engine": ("build --backend tensorrt --rebuild --on IN --out OUT", ".engine"),
    "calibrate --out": ("calibrate IN --out OUT", ".json"),
    "calibrate --plot": ("calibrate IN --plot OUT", ".svg"),
    "evaluate --report html": ("evaluate x.csv --train IN --report OUT", ".html"),
    "evaluate --report md": ("evaluate x.csv --ids IN --report OUT", ".md"),
    "bench --plots": ("bench IN --plots .", ".png"),
}
NAMES = {"build's certificate": "net", "bench --plots": "peers"}


def same(path):
    return path


def spelt(path):
    """Through a folder that is not there: a program that makes it would find the file."""
    return path.parent / "none" / ".." / path.name


def symbolic(path):
    link = path.with_name(f"link{path.suffix}")
    link.symlink_to(path)
    return link


def hard(path):
    link = path.with_name(f"hard{path.suffix}")
    os.link(path, link)
    return link


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.csv").write_text("file,class,x0,y0,x1,y1\n")
    return tmp_path


def words_of(writer, read, written):
    return [{"IN": read, "OUT": written}.get(word, word) for word in WRITERS[writer][0].split()]


@pytest.mark.parametrize("alias", [same, spelt, symbolic, hard])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_command_never_writes_over_what_it_reads(writer, alias, place):
    read = place / f"{NAMES.get(writer, 'mine')}{WRITERS[writer][1]}"
    read.write_bytes(b"mine")
    if "OUT" in WRITERS[writer][0]:
        words = words_of(writer, read, alias(read))
    else:  # the name that is written follows from another one
        (place / "none").mkdir()
        words = words_of(writer, alias(read), None)
    assert "this command reads that file" in refused(*words)
    assert read.read_bytes() == b"mine"


@pytest.mark.parametrize("writer", WRITERS)
def test_a_command_never_writes_over_another_s_file(writer, place):
    theirs = place / f"{NAMES.get(writer, 'mine')}{WRITERS[writer][1]}"
    theirs.write_bytes(b"theirs")
    line = refused(*words_of(writer, "other.csv", theirs))
    assert "choose another name, or remove that file" in line
    assert theirs.read_bytes() == b"theirs"
    assert sorted(path.name for path in place.iterdir()) == sorted(["x.csv", theirs.name])


def test_what_is_no_plain_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for name in ("pipe", "nowhere"):
        with pytest.raises(OutputError, match="another file has that name"):
            checked_output(tmp_path / name, ANYTHING)
    with pytest.raises(OutputError, match="that is a folder"):
        checked_output(tmp_path, ANYTHING)
    checked_output(
        tmp_path / "new", ANYTHING, ["random", None, "rtsp://camera/1", tmp_path / "gone"]
    )


def test_one_s_own_file_is_refused_where_it_is_read(tmp_path):
    (tmp_path / "a").write_bytes(b"ours")
    checked_output(tmp_path / "a", ANYTHING)
    with pytest.raises(OutputError, match="this command reads that file"):
        checked_output(tmp_path / "a", ANYTHING, [tmp_path / "a"])


@pytest.fixture
def written(tmp_path):
    """A file of each kind, by the functions that write them."""
    classifier = load_classifier("compact", None)
    head = choose_head(EngineOptions(), classifier)
    head.save(tmp_path / "head.safetensors")
    count = len(classifier.weights["classifier.bias"])
    names = tuple(f"a {{class}} {number}" for number in range(count))
    tuned = Finetuned(
        names,
        np.zeros((count, classifier.weights["classifier.weight"].shape[1])),
        np.zeros(count),
        1.0,
        {},
    )
    save_finetuned(tuned, classifier, tmp_path / "weights.safetensors")
    Quantization({"a": 1.0}, (), "0", 96, "class", "pixels").save(tmp_path / "calibration.json")
    Certificate({}, "a", "b", 16, None, 1.0, 1.0, 0.0, 0.0).save(tmp_path / "net.certificate.json")
    write_engine(tmp_path / "net.engine", EngineKey(*(["0"] * 7)), b"plan")
    plot_curve(Curve((Point(10, (0.5,), (0.4,)),), 0.5, 0.5, 40), tmp_path / "curve.png", "Heads")
    Figure().savefig(tmp_path / "a.png", metadata=signed("x"))
    Figure().savefig(tmp_path / "a.svg", metadata=signed("x", ".SVG"))
    drawn = picture_kind("x", ".png", ".svg")
    kinds = (
        HEAD_FILE,
        WEIGHTS_FILE,
        CALIBRATION_FILE,
        CERTIFICATE_FILE,
        ENGINE_FILE,
        CURVE_FILE,
        drawn,
        drawn,
    )
    files = (
        "head.safetensors",
        "weights.safetensors",
        "calibration.json",
        "net.certificate.json",
        "net.engine",
        "curve.png",
        "a.png",
        "a.svg",
    )
    return {tmp_path / file: kind for file, kind in zip(files, kinds, strict=True)}


def test_each_kind_knows_its_own_files_and_no_other_s(written):
    for kind in {*written.values(), LATENCY_FILE}:
        for path, its_own in written.items():
            assert kind.is_at(path) is (kind == its_own), (kind, path)


def test_an_engine_is_replaced_only_where_that_is_said(written, tmp_path):
    engine = next(path for path, kind in written.items() if kind is ENGINE_FILE)
    with pytest.raises(OutputError, match="rebuild it to replace it"):
        check_options(BuildOptions(engine, "tensorrt"))
    check_options(BuildOptions(engine, "tensorrt", rebuild=True))


def test_a_result_is_renewed_by_the_command_that_wrote_it(place):
    words = ("build", "--weights", "random", "--size", 64, "--head", "none", "--out", "net.onnx")
    for batch in (1, 2):
        assert command(*words, "--batch", batch).returncode == 0
    shutil.copy("net.onnx", "copy.onnx")
    assert "this command reads that file" in refused(
        "build", "--weights", "copy.onnx", "--out", "copy.onnx"
    )
