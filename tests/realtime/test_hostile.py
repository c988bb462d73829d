"""Damaged images and archives, and headers that lie: each is refused in one line, soon, and without
much memory.
"""

import json
import os
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import cv2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import SourceError
from realtime import file_sinks
from realtime.sources.images import decode_image
from realtime.sources.spec import open_source
from tests.command_line import ROOT, command
from tests.realtime import hostile
from tests.realtime.media import picture

BAD_IMAGES = dict(hostile.images())


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> list[Path]:
    """Files of which none can be worked on."""
    folder = tmp_path_factory.mktemp("bad")
    for name, content in BAD_IMAGES.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    return [
        *(folder / name for name in BAD_IMAGES),
        *hostile.archives(folder),
        folder / "folder.png",
    ]


def test_a_batch_names_each_bad_one_and_does_the_good_one(bad, tmp_path):
    good = tmp_path / "good.png"
    cv2.imwrite(str(good), picture(0))
    assert len(bad) >= 80
    found = command(
        "batch",
        *bad,
        good,
        "--no-video",
        "--weights",
        "random",
        "--size",
        32,
        "--out",
        tmp_path / "out",
    )
    assert found.returncode == 1, found.stderr
    assert "Traceback" not in found.stderr
    assert "defect" not in found.stderr
    reasons = [line for line in found.stderr.splitlines() if line.startswith(str(bad[0].parent))]
    named = list(
        dict.fromkeys(line.split(": ", 1)[0] for line in reasons)
    )  # some are told a new name besides
    assert named == [str(path) for path in bad]
    summaries = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [summary["source"] for summary in summaries if "error" not in summary] == [str(good)]
    assert json.loads((tmp_path / "out" / "good.summary.json").read_text())["frames"] == 1


def test_one_bad_image_of_a_folder_costs_no_other(tmp_path):
    folder = tmp_path / "all"
    folder.mkdir()
    for name, content in BAD_IMAGES.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "lost.png").symlink_to(folder / "gone")
    os.mkfifo(folder / "pipe.png")
    cv2.imwrite(str(folder / "zz.png"), picture(0))
    found = command(
        "batch",
        folder,
        "--no-video",
        "--weights",
        "random",
        "--size",
        32,
        "--out",
        tmp_path / "out",
    )
    assert found.returncode == 1, found.stderr
    summary = json.loads((tmp_path / "out" / "all.summary.json").read_text())
    assert summary["frames"] == 1
    assert summary["failed"] >= len(BAD_IMAGES)


MEASURE = """
import resource, sys
from engines.errors import SourceError
from realtime.sources.spec import open_source
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for spec in sys.argv[1:]:
    try:
        with open_source(spec) as source:
            for _ in source:
                pass
    except SourceError:
        pass
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_none_of_them_takes_much_memory(bad):
    """In a process that may not take more than 4 GB of addresses, libraries included."""
    bound = (resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
    line = [sys.executable, "-c", MEASURE, *map(str, bad)]
    found = subprocess.run(
        line,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
        preexec_fn=lambda: resource.setrlimit(*bound),
        timeout=120,
    )
    taken_kb = [int(line) for line in found.stdout.split()]
    assert len(taken_kb) == len(bad)
    assert taken_kb[-1] < 600_000, dict(zip(bad, taken_kb, strict=True))


@pytest.mark.parametrize(
    ("size_px", "written_px"),
    [
        ((1920, 1080), (1920, 1080)),
        ((127, 1), (128, 2)),
        ((7680, 4320), (7680, 4320)),
        ((20_000, 100), (16_384, 80)),
    ],
)
def test_videos_are_written_as_large_as_encoders_take(size_px, written_px):
    assert file_sinks.written_size(*size_px) == written_px


def test_large_videos_are_scaled_as_a_whole():
    width, height = file_sinks.written_size(16_384, 16_384)
    assert width == height
    assert width * height <= file_sinks.WRITTEN_PIXELS


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    suffix=st.sampled_from(hostile.SUFFIXES),
    changes=st.lists(st.tuples(st.integers(0, 63), st.integers(0, 255)), max_size=6),
    length=st.integers(0, 400),
)
def test_any_change_of_an_images_header_gives_an_image_or_is_refused(suffix, changes, length):
    content = bytearray(hostile.encoded(suffix))
    for place, value in changes:
        content[place % len(content)] = value
    with suppress(SourceError):
        assert decode_image("x", bytes(content[:length] if length < 200 else content)).ndim == 3


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    kind=st.sampled_from([".zip", ".tar"]),
    changes=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), max_size=6),
)
def test_any_change_of_an_archive_gives_images_or_is_refused(kind, changes, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"changed{kind}"
    content = bytearray(hostile.archive(kind))
    for place, value in changes:
        content[place % len(content)] = value
    path.write_bytes(content)
    with suppress(SourceError), open_source(str(path)) as source:
        for frame in source:
            assert frame.image_bgr.ndim == 3
