"""Standard input and named pipes: read once and in order, and never waited for without an end."""

import os
import subprocess
import sys
import threading

import pytest

from engines.errors import SourceError
from realtime.sources import film
from realtime.sources.spec import can_be_cut, name_of, open_source
from tests.conftest import ROOT
from tests.realtime.media import write_video

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")


def test_a_named_pipe_gives_its_frames(tmp_path):
    film, pipe = write_video(tmp_path / "clip.ts"), tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(film.read_bytes()))
    writer.start()
    assert not can_be_cut(str(pipe))
    with open_source(str(pipe)) as source:
        assert [frame.index for frame in source] == list(range(12))
    writer.join()


def test_a_pipe_that_nobody_writes_to_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(film, "WRITER_S", 0.2)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match=r"nothing came for 0\.2 s: nobody writes to it"):
        open_source(str(tmp_path / "pipe"))


@pytest.mark.parametrize("spec", ["-", "/dev/stdin"])
def test_standard_input_is_a_source(spec, tmp_path):
    script = (
        f"from realtime.sources.spec import open_source; print(len(list(open_source({spec!r}))))"
    )
    film = write_video(tmp_path / "clip.ts").read_bytes()
    run = subprocess.run(
        [sys.executable, "-c", script],
        input=film,
        capture_output=True,
        check=False,
        cwd=ROOT,
        timeout=60,
    )
    assert run.stdout.strip() == b"12", run.stderr
    nothing = subprocess.run(
        [sys.executable, "-c", script],
        input=b"",
        capture_output=True,
        check=False,
        cwd=ROOT,
        timeout=60,
    )
    assert b"SourceError: cannot open" in nothing.stderr
    assert name_of(spec) == "stdin"
