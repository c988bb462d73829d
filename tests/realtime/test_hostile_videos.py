"""Videos whose pictures are larger than memory should hold, or whose bytes are changed."""

import json
from contextlib import suppress
from pathlib import Path

import av
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import SourceError
from realtime.file_sinks import WRITTEN_SIDE_PX
from realtime.sources.spec import open_source
from tests.command_line import command
from tests.realtime.media import write_video


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("good") / "good.mp4", 3)


def test_a_video_of_any_width_is_done_or_refused_by_its_header(good, tmp_path):
    wide = write_video(tmp_path / "wide.mkv", 2, codec="ffv1", width=20_000, height=64)
    huge = write_video(tmp_path / "huge.mkv", 1, codec="ffv1", width=9_000, height=8_000)
    found = command(
        "batch", wide, huge, good, "--weights", "random", "--size", 32, "--out", tmp_path / "out"
    )
    assert found.returncode == 1, found.stderr
    assert found.stderr.count("9000x8000 pixels") == 1
    summaries = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert ["error" in summary for summary in summaries] == [False, True, False]
    with av.open(str(tmp_path / "out" / "wide.mp4")) as container:
        assert container.streams.video[0].width == WRITTEN_SIDE_PX


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6
    ),
    data=st.data(),
)
def test_any_change_of_a_video_gives_frames_or_is_refused(good, tmp_path_factory, changes, data):
    content = bytearray(good.read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "changed.mp4"
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    with suppress(SourceError), open_source(str(path)) as source:
        for _, frame in zip(range(9), source, strict=False):
            assert frame.image_bgr.ndim == 3
