"""No file of the user's is replaced or taken for a source's result, and no result eats
another's.
"""

import io
import json
import os
import shutil
from pathlib import Path

import fsspec
import pytest
from rich.console import Console

from engines.errors import OutputError
from engines.localizer import Localizer
from engines.options import EngineOptions
from realtime.batch.cluster.scheduler import process_across
from realtime.batch.job import Naming, overview_path, without_results
from realtime.batch.options import Settings
from realtime.batch.run import process_all
from realtime.written import FOLDER, MANIFEST
from tests.engines.mock import MockEngine
from tests.realtime.batch.here import Here
from tests.realtime.media import write_images, write_video

DATA_ONLY = Settings(video=False)


@pytest.fixture
def localizer():
    return Localizer(MockEngine(32))


def run(localizer, specs, out, settings=DATA_ONLY) -> tuple[list[dict], str]:
    console = Console(file=io.StringIO(), width=400)
    return process_all(
        [str(spec) for spec in specs], out, localizer, console, settings
    ), console.file.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("kind", ["itself", "dots", "symlink", "hard link", "linked folder"])
def test_a_source_survives_whatever_its_name_is(kind, localizer, tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    clip = write_video(folder / "clip.mp4", 6)
    content = clip.read_bytes()
    spec = clip
    out = folder
    if kind == "dots":
        spec = folder / ".." / "d" / "." / "clip.mp4"
    elif kind == "linked folder":
        out = tmp_path / "link"
        out.symlink_to(folder)
    elif kind != "itself":
        spec = clip.rename(tmp_path / "film.mp4").rename(tmp_path / "clip.mp4")
        clip.symlink_to(spec) if kind == "symlink" else os.link(spec, clip)
    for again in (False, True):
        (summary,), said = run(localizer, [spec], out, Settings())
        assert Path(summary["files"]["video"]).name == "clip_2.mp4"
        assert summary.get("skipped", False) == again
        assert "clip.mp4: its results are called clip_2, because clip is taken in" in said
        assert clip.read_bytes() == spec.read_bytes() == content


def test_films_of_one_name_keep_their_results_in_one_run_and_the_next(localizer, tmp_path):
    films = [tmp_path / name / "cam.mp4" for name in ("one", "two", "three")]
    for frames, film in enumerate(films, start=3):
        film.parent.mkdir()
        write_video(film, frames)
    out = tmp_path / "out"
    run(localizer, [films[0]], out)
    first = contents(out)
    summaries, said = run(localizer, films[1:], out)
    assert [Path(summary["files"]["log"]).name for summary in summaries] == [
        "cam_2.jsonl",
        "cam_3.jsonl",
    ]
    assert said.count("its results are called cam_") == 2
    assert {name: content for name, content in contents(out).items() if name in first} == {
        **first,
        "summary.json": (out / "summary.json").read_bytes(),
    }
    again = [run(localizer, [film], out)[0][0] for film in reversed(films)]
    assert all(summary["skipped"] for summary in again)
    assert [Path(summary["files"]["log"]).name for summary in again] == [
        "cam_3.jsonl",
        "cam_2.jsonl",
        "cam.jsonl",
    ]
    moved = films[1].rename(tmp_path / "two.mp4").rename(tmp_path / "cam.mp4")
    assert run(localizer, [moved], out)[0][0]["skipped"], "the same content"


def test_files_of_the_users_own_are_not_replaced(localizer, tmp_path):
    clip, out = write_video(tmp_path / "clip.mp4", 3), tmp_path / "out"
    out.mkdir()
    own = {
        "clip.parquet": b"mine",
        "summary.json": b'{"mine": 1}',
        "clip_2.summary.json": b"mine too",
    }
    for name, content in own.items():
        (out / name).write_bytes(content)
    for _ in range(2):
        (summary,), said = run(localizer, [clip], out)
        assert Path(summary["files"]["table"]).name == "clip_3.parquet"
        assert "is called summary_2.json" in said
        assert {name: content for name, content in contents(out).items() if name in own} == own
    assert summary["skipped"]


def test_results_are_renewed_unless_somebody_changed_them(localizer, tmp_path):
    clip, out = write_video(tmp_path / "clip.mp4", 6), tmp_path / "out"
    run(localizer, [clip], out)
    assert run(localizer, [clip], out, Settings(video=False, every=2))[0][0]["frames"] == 3
    assert not list(out.glob("clip_2*"))
    (out / "clip.jsonl").write_text("notes of my own\n")
    (summary,), _ = run(localizer, [clip], out)
    assert summary["files"]["log"].endswith("clip_2.jsonl")
    assert (out / "clip.jsonl").read_text() == "notes of my own\n"
    write_video(clip, 5)
    (summary,), _ = run(localizer, [clip], out)
    assert (summary["frames"], summary["files"]["log"]) == (5, str(out / "clip_2.jsonl")), (
        "the same path"
    )


def test_a_folder_is_read_without_what_was_written_there(localizer, tmp_path):
    shots = write_images(tmp_path / "shots", 3)
    for spec in (shots, shots / "*.png", shots):
        (summary,), _ = run(localizer, [spec], shots, Settings())
        assert summary["frames"] == 3
    shutil.copy(shots / "shots.latency.png", shots / "mine.png")
    (shots / "shots.latency.png").write_bytes((shots / "mine.png").read_bytes() + b"changed")
    assert run(localizer, [shots], shots)[0][0]["frames"] == 5, "both are the user's now"


def test_results_among_sources_are_left_out_and_said(localizer, tmp_path):
    clips = [write_video(tmp_path / f"{name}.mp4", 3) for name in "ab"]
    for _ in range(2):
        summaries, said = run(localizer, sorted(tmp_path.glob("*.mp4")), tmp_path, Settings())
        assert [summary["source"] for summary in summaries] == list(map(str, clips))
    assert said.count("is left out: it is a result of Sightline's") == 2
    notify: list[str] = []
    assert without_results([str(tmp_path / "a_2.mp4")], notify.append) == [
        str(tmp_path / "a_2.mp4")
    ], "named alone"
    assert not notify


def test_a_cameras_results_stay_and_the_demos_are_renewed(localizer, tmp_path):
    for frames in (3, 2):
        (summary,), _ = run(localizer, [f"demo:{frames}"], tmp_path)
        assert (summary["frames"], Path(summary["files"]["log"]).name) == (frames, "demo.jsonl")
    said: list[str] = []
    for expected in ("cam", "cam_2"):
        naming = Naming(tmp_path, said.append)
        job = naming.job("rtsp://user:secret@host/cam", [".mp4"], os.urandom(4).hex())
        with naming.holding(job) as held:
            held.claim([tmp_path / f"{job.name}.mp4"])
            (tmp_path / f"{job.name}.mp4").write_bytes(b"film")
        assert job.name == expected
    assert len(said) == 1
    assert "secret" not in said[0]


def test_results_that_a_killed_run_was_writing_are_known(tmp_path):
    naming = Naming(tmp_path, print)
    job = naming.job("clip.mp4", [".mp4", ".jsonl"], "d1", "s1", "/clip.mp4")
    job.claim([tmp_path / "clip.mp4", tmp_path / "clip.jsonl"])
    (tmp_path / "clip.mp4").write_bytes(b"half of the results")
    assert (
        Naming(tmp_path, print).job("clip.mp4", [".mp4", ".jsonl"], "d1", "s2", "/clip.mp4").name
        == "clip"
    )
    other = Naming(tmp_path, print).job("clip.mp4", [".mp4"], "d2", "s2", "/other/clip.mp4")
    assert other.name == "clip_2"
    (tmp_path / "clip_2.mp4").write_bytes(b"the user's")
    with pytest.raises(OutputError, match="has appeared, and is not Sightline's"):
        other.claim([tmp_path / "clip_2.mp4"])


def test_a_result_that_is_read_in_this_run_is_not_renewed_in_it(localizer, tmp_path):
    clip, out = write_video(tmp_path / "clip.mp4", 3), tmp_path / "out"
    run(localizer, [clip], out, Settings())
    before = (out / "clip.mp4").read_bytes()
    naming = Naming(out, print, [out / "clip.mp4"])
    digest = json.loads((out / FOLDER / "clip" / MANIFEST).read_text())["source"]
    assert naming.job(str(clip), [".mp4"], digest, "other settings").name == "clip_2"
    assert (out / "clip.mp4").read_bytes() == before


def test_names_that_only_differ_in_case_or_meet_another_kinds_ending(tmp_path):
    naming = Naming(tmp_path, print)
    endings = [".mp4", ".heat.mp4"]
    assert [
        naming.job(spec, endings, spec).name
        for spec in ("Clip.mp4", "clip.mp4", "clip.heat.mp4", "x.heat.mp4", "x.mp4")
    ] == [
        "Clip",
        "clip_2",
        "clip.heat_2",
        "x.heat",
        "x_2",
    ]


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 50, b"[1]", b'{"source": 3, "results": [], "claims": {"a": 1}}', b"[" * 9000],
)
def test_a_manifest_that_is_damaged_is_nobodys(content, localizer, tmp_path):
    clip, out = write_video(tmp_path / "clip.mp4", 3), tmp_path / "out"
    (out / FOLDER / "clip").mkdir(parents=True)
    (out / FOLDER / "clip" / MANIFEST).write_bytes(content)
    assert run(localizer, [clip], out)[0][0]["frames"] == 3


def test_the_overview_is_told_from_a_file_of_the_users(tmp_path):
    path = tmp_path / "summary.json"
    for content, name in (
        (b"", "summary"),
        (b'[{"source": "a", "frames": 1}]', "summary"),
        (b"[1]", "summary_2"),
        (b"x", "summary_2"),
    ):
        path.write_bytes(content)
        assert overview_path(tmp_path, lambda _: None).stem == name


def test_shared_storage_keeps_what_lies_there_too(tmp_path):
    files = fsspec.filesystem("memory")
    film = write_video(tmp_path / "film.mp4", 3).read_bytes()
    for path in ("/kept/film.mp4", "/kept/other/film.mp4"):
        files.pipe(path, film + path.encode())
    files.pipe("/kept/summary.json", b"mine")
    specs, console = (
        ["memory://kept/film.mp4", "memory://kept/other/film.mp4"],
        Console(file=io.StringIO(), width=300),
    )
    for again in (False, True):
        choice = EngineOptions(weights="random", size_px=32)
        summaries = process_across(specs, "memory://kept", Here(choice), console, Settings())
        assert [summary["files"]["video"].rpartition("/")[2] for summary in summaries] == [
            "film_2.mp4",
            "film_3.mp4",
        ]
        assert all(summary.get("skipped", False) == again for summary in summaries)
    assert files.cat("/kept/film.mp4") == film + b"/kept/film.mp4"
    assert files.cat("/kept/summary.json") == b"mine"
    assert json.loads(files.cat("/kept/summary_2.json"))
    files.store.clear()
