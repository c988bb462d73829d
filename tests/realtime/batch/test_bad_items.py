"""One bad item of a batch never takes the others with it."""

import errno
import io
import json
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from engines.errors import OutputError
from realtime.batch import run as batch_run
from realtime.batch.options import Settings
from realtime.batch.run import process_all
from tests.realtime.media import write_images, write_video

QUIET = Console(file=io.StringIO())


def outcomes(
    specs: list[Path | str], out: Path, localizer, settings: Settings = Settings()
) -> dict[str, str]:
    """What became of each source: "" where it is done, else why not."""
    summaries = process_all([str(spec) for spec in specs], out, localizer, QUIET, settings)
    assert json.loads((out / "summary.json").read_text()) == summaries
    return {summary["source"]: summary.get("error", "") for summary in summaries}


NAMES = ["l" * 245, "a\nb", "$\\x$ [bold] x[", "日本 écran", os.fsdecode(b"\xff\xfe")]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_video(name, tiny_localizer, tmp_path):
    clip = write_video(tmp_path / "clip.mp4")
    shutil.move(clip, tmp_path / f"{name}.mp4")
    out = tmp_path / "out"
    summary = process_all(
        [str(tmp_path / f"{name}.mp4")], out, tiny_localizer, QUIET, Settings(heat_video=True)
    )[0]
    assert summary["frames"] == 12
    assert len(summary["files"]) == 8
    assert all(Path(file).is_file() for file in summary["files"].values())
    json.dumps(summary, ensure_ascii=False).encode()


def test_any_name_of_an_image(tiny_localizer, tmp_path):
    folder = write_images(tmp_path / "shots", 3)
    for number, name in enumerate(NAMES):
        (folder / f"{name}.png").write_bytes(
            (folder / "shot 8.png").read_bytes() if number % 2 else b""
        )
    summary = process_all([str(folder)], tmp_path / "out", tiny_localizer, QUIET)[0]
    assert (summary["frames"], summary["failed"]) == (5, 3)
    json.dumps(summary, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OverflowError("large"),
        UnicodeError("odd"),
        OSError(errno.ENAMETOOLONG, "long"),
    ],
)
def test_an_error_of_any_kind_is_that_items(error, tiny_localizer, tmp_path, monkeypatch):
    good, bad = write_video(tmp_path / "good.mp4"), write_video(tmp_path / "bad.mp4")
    make_plan = batch_run.make_plan

    def failing(spec, *arguments):
        if spec == str(bad):
            raise error
        return make_plan(spec, *arguments)

    monkeypatch.setattr(batch_run, "make_plan", failing)
    found = outcomes([bad, good], tmp_path / "out", tiny_localizer)
    assert found[str(good)] == ""
    assert found[str(bad)]
    assert "\n" not in found[str(bad)]


def test_a_full_disk_is_no_items_error(tiny_localizer, tmp_path, monkeypatch):
    def failing(*_):
        raise OutputError("full") from OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(batch_run, "make_plan", failing)
    with pytest.raises(OutputError, match="run the same command to go on"):
        process_all(
            [str(write_video(tmp_path / f"{name}.mp4")) for name in "ab"],
            tmp_path / "out",
            tiny_localizer,
            QUIET,
        )


def test_links_that_lead_nowhere(tiny_localizer, tmp_path):
    good = write_video(tmp_path / "good.mp4")
    lost = tmp_path / "lost.mp4"
    loop = tmp_path / "loop.mp4"
    lost.symlink_to(tmp_path / "gone.mp4")
    loop.symlink_to(loop)
    found = outcomes([lost, loop, good], tmp_path / "out", tiny_localizer, Settings(video=False))
    assert "link to what does not exist" in found[str(lost)]
    assert found[str(loop)]
    assert found[str(good)] == ""
