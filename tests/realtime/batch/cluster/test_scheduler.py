"""Segments to several workers: the same results as on one machine, whoever dies."""

import io
import json
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from rich.console import Console

from engines.choose import open_localizer
from engines.errors import EngineError, OutputError, SourceError
from engines.options import EngineOptions
from realtime.batch.cluster.scheduler import MOST_TRIES, process_across
from realtime.batch.options import Settings
from realtime.batch.run import process_all
from realtime.tracking.options import FollowOptions
from tests.realtime.batch.clips import make_clip
from tests.realtime.batch.here import Here
from tests.realtime.batch.test_resume import assert_same

CHOICE = EngineOptions(weights="random", size_px=32)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with two clips of three and two segments, and the results of one machine in
    ``whole``.
    """
    folder = tmp_path_factory.mktemp("across")
    specs = [
        str(make_clip(folder / "first.mp4", seconds=31, rate="5", size="96x64", sound="aac")),
        str(make_clip(folder / "second.mp4", seconds=21, rate="5", size="96x64")),
    ]
    process_all(
        specs, folder / "whole", open_localizer(CHOICE, streams=0), Console(file=io.StringIO())
    )
    return folder


def run(
    made: Path, out: object, cluster: Here, names: tuple[str, ...] = ("first", "second")
) -> tuple[list[dict], str]:
    console = Console(file=io.StringIO(), width=400)
    summaries = process_across(
        [str(made / f"{name}.mp4") for name in names], str(out), cluster, console, cluster.settings
    )
    return summaries, console.file.getvalue()


def test_results_are_those_of_one_machine(made, tmp_path):
    cluster = Here(CHOICE)
    summaries, _ = run(made, tmp_path, cluster)
    assert_same(tmp_path, made / "whole", ["first", "second"])
    assert [(s["source"], s["frames"]) for s in summaries] == [
        (str(made / "first.mp4"), 155),
        (str(made / "second.mp4"), 105),
    ]
    assert json.loads((tmp_path / "summary.json").read_text()) == summaries
    assert {number for number, *_ in cluster.worked} == {0, 1}
    assert len(cluster.worked) == len({work[1:] for work in cluster.worked}) == 5  # nothing twice


def test_what_is_followed_is_as_on_one_machine_though_a_worker_dies(made, tmp_path):
    deaths = []

    def dies(clip, segment) -> bool:
        deaths.append(segment.index)
        return deaths == [0, 1] or deaths == [1, 0]

    settings = Settings(following=FollowOptions(follow=True))
    specs = [str(made / f"{name}.mp4") for name in ("first", "second")]
    localizer = open_localizer(CHOICE, streams=0)
    process_all(specs, tmp_path / "whole", localizer, Console(file=io.StringIO()), settings)
    cluster = Here(CHOICE, settings=settings, dies=dies)
    run(made, tmp_path / "out", cluster)
    assert_same(tmp_path / "out", tmp_path / "whole", ["first", "second"])
    first = [index for _, name, index in cluster.worked if "first" in name]
    assert first == [0, 1, 2], "one after the other"


def test_a_death_costs_only_its_segment(made, tmp_path):
    deaths = []

    def dies(clip, segment) -> bool:
        if segment.index in (0, 1) and segment.index not in deaths:
            deaths.append(segment.index)
            return True
        return False

    cluster = Here(CHOICE, dies=dies)
    run(made, tmp_path, cluster, ("first",))
    assert len(deaths) == 2
    assert cluster.started_workers >= 3
    assert sorted(index for _, _, index in cluster.worked) == [0, 1, 2]
    assert_same(tmp_path, made / "whole", ["first"])


def test_a_segment_that_kills_every_worker_costs_only_its_file(made, tmp_path):
    tries = []

    def dies(clip, segment) -> bool:
        deadly = (clip.name, segment.index) == ("first", 1)
        tries.extend([1] if deadly else [])
        return deadly

    summaries, said = run(made, tmp_path, Here(CHOICE, dies=dies))
    assert len(tries) == MOST_TRIES
    assert f"lost {MOST_TRIES} times" in summaries[0]["error"]
    assert "its part at 12 s" in said
    assert summaries[1]["frames"] == 105
    assert not (tmp_path / "first.mp4").exists()


def test_a_worker_that_would_give_other_results_gets_nothing(made, tmp_path):
    cluster = Here(
        CHOICE, says={1: lambda said: replace(said, settings_digest="other", precision="fp32")}
    )
    _, said = run(made, tmp_path, cluster, ("second",))
    assert {number for number, *_ in cluster.worked} == {0}
    assert "a worker is not used: it would give other results (openvino fp32" in said
    assert_same(tmp_path, made / "whole", ["second"])


def test_what_the_first_worker_cannot_open_is_the_users_to_mend(made, tmp_path):
    with pytest.raises(SourceError, match="cannot be read by several"):
        process_across(["demo:30"], str(tmp_path), Here(CHOICE), Console(file=io.StringIO()))
    with pytest.raises(EngineError, match="unknown backend"):
        run(made, tmp_path, Here(replace(CHOICE, backend="magic")))
    with pytest.raises(EngineError, match="no free processor or GPU"):
        run(made, tmp_path, Here(CHOICE, places=0))


def test_one_machine_goes_on_where_a_cluster_was_and_finished_files_are_skipped(made, tmp_path):
    class StopError(Exception):
        pass

    def stops(clip, segment) -> bool:
        if (clip.name, segment.index) == ("first", 2):
            raise StopError
        return False

    cluster = Here(CHOICE, dies=stops, places=1)
    with pytest.raises(StopError):
        run(made, tmp_path, cluster, ("first",))
    assert len(cluster.worked) == 2
    localizer = open_localizer(CHOICE, streams=0)
    (summary,) = process_all(
        [str(made / "first.mp4")], tmp_path, localizer, Console(file=io.StringIO())
    )
    assert summary["segments_resumed"] >= 1
    assert_same(tmp_path, made / "whole", ["first"])
    again = Here(CHOICE)
    summaries, _ = run(made, tmp_path, again)
    assert summaries[0]["skipped"]
    assert {name for _, name, _ in again.worked} == {"second"}


def test_sources_and_results_on_shared_storage(made, tmp_path):
    files = fsspec.filesystem("memory")
    for name in ("first", "second"):
        files.put_file(str(made / f"{name}.mp4"), f"/films/{name}.mp4")
    specs, console = (
        ["memory://films/first.mp4", "memory://films/second.mp4"],
        Console(file=io.StringIO()),
    )
    summaries = process_across(specs, "memory://results/run", Here(CHOICE), console)
    assert summaries[0]["files"]["video"] == "memory://results/run/first.mp4"
    names = {path.removeprefix("/results/run/") for path in files.find("/results/run")}
    assert {
        "first.mp4",
        "first.jsonl",
        "first.parquet",
        "first.summary.json",
        "second.mp4",
        "summary.json",
    } <= names
    assert {name for name in names if name.startswith(".")} == {
        f".sightline/{name}"
        for name in (
            "first/manifest.json",
            "second/manifest.json",
            ".digests/first.json",
            ".digests/second.json",
        )
    }
    files.get("/results/run/", str(tmp_path / "back"), recursive=True)
    assert_same(tmp_path / "back", made / "whole", ["first", "second"])
    again = Here(CHOICE)
    assert all(
        summary["skipped"]
        for summary in process_across(specs, "memory://results/run", again, console)
    )
    assert not again.worked


def test_no_secret_of_an_address_is_kept_and_its_results_are_known_again(made, tmp_path):
    files = fsspec.filesystem("memory")
    files.put_file(str(made / "second.mp4"), "/me:hunter2@films/second.mp4")
    spec, out = "memory://me:hunter2@films/second.mp4", str(tmp_path)
    quiet = Console(file=io.StringIO())
    (first,) = process_across([spec], out, Here(CHOICE), quiet)
    manifest = tmp_path / ".sightline" / "second" / "manifest.json"
    assert json.loads(manifest.read_text())["path"] == "memory://***@films/second.mp4"
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        assert b"hunter2" not in path.read_bytes(), path
    (again,) = process_across([spec], out, Here(CHOICE), quiet)
    assert again == {**first, "skipped": True}
    files.put_file(str(made / "first.mp4"), "/me:hunter2@films/second.mp4")
    (changed,) = process_across([spec], out, Here(CHOICE), quiet)
    assert changed["files"] == first["files"], "it is the same source with other content"
    assert changed["frames"] == 155


def test_no_secret_of_the_results_address_is_kept(made):
    out, files = "memory://me:hunter3@results/run", fsspec.filesystem("memory")
    quiet = Console(file=io.StringIO())
    (summary,) = process_across([str(made / "second.mp4")], out, Here(CHOICE), quiet)
    assert summary["files"]["video"] == "memory://***@results/run/second.mp4"
    kept = files.find("/me:hunter3@results")
    assert kept
    for path in kept:
        assert b"hunter3" not in files.cat_file(path), path


def test_shared_storage_that_is_full_says_so(made, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OutputError, match="what is done stays there"):
        run(made, f"file://{blocked}/out", Here(CHOICE), ("second",))
