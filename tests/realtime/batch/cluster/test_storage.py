"""Files on shared storage: fetched once, written whole, known again."""

import os
import time
from pathlib import Path

import fsspec
import pytest

from engines.errors import OutputError, SightlineError, SourceError
from realtime.batch.cluster.storage import (
    Digests,
    Store,
    expanded,
    filesystem,
    identity,
    is_shared,
    local_path,
)
from realtime.written import stamp_of


@pytest.fixture
def memory():
    """A file system in memory, empty."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


def test_addresses_of_files_are_told_from_streams():
    assert [
        is_shared(spec)
        for spec in ("s3://b/a.mp4", "memory://a", "rtsp://cam", "http://a/b.mp4", "a.mp4", "demo:")
    ] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]


def test_a_pattern_becomes_the_files_it_matches_in_order(memory):
    for name in ("b.mp4", "a.mp4", "c.txt"):
        memory.pipe(f"/films/{name}", b"x")
    assert expanded(["x.mp4", "memory://films/*.mp4"]) == [
        "x.mp4",
        "memory:///films/a.mp4",
        "memory:///films/b.mp4",
    ]
    with pytest.raises(SourceError, match="matches no file"):
        expanded(["memory://films/*.mkv"])


def test_a_file_is_fetched_once_and_again_when_it_has_changed(memory):
    memory.pipe("/films/a.mp4", b"one")
    first = Path(local_path("memory://films/a.mp4"))
    assert (first.read_bytes(), first.name) == (b"one", "a.mp4")
    before = first.stat().st_ino
    assert Path(local_path("memory://films/a.mp4")).stat().st_ino == before
    memory.pipe("/films/a.mp4", b"other")
    assert Path(local_path("memory://films/a.mp4")).read_bytes() == b"other"
    assert local_path("here.mp4") == "here.mp4"


def test_what_is_fetched_makes_room_for_what_comes(memory, monkeypatch):
    monkeypatch.setenv("SIGHTLINE_FETCHED_GB", "1e-9")
    memory.pipe("/films/a.mp4", b"one")
    old = local_path("memory://films/a.mp4")
    memory.pipe("/films/b.mp4", b"two")
    local_path("memory://films/b.mp4")
    assert Path(old).exists()  # somebody may be reading it
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    memory.pipe("/films/c.mp4", b"three")
    newest = local_path("memory://films/c.mp4")
    assert not Path(old).exists()
    assert Path(newest).exists()


def test_what_is_not_there_is_the_users_to_mend(memory):
    with pytest.raises(SourceError, match="cannot read memory://films/none"):
        identity("memory://films/none.mp4")
    memory.pipe("/films/a.mp4", b"one")
    with pytest.raises(
        SourceError, match=r"is a folder: name its files, as in memory://films/\*.mp4"
    ):
        identity("memory://films")
    with pytest.raises(SightlineError, match="needs another package"):
        filesystem("gs://bucket/a.mp4")


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_results_are_put_whole_and_fetched_by_another_machine(memory, tmp_path, monkeypatch, kind):
    address = "memory://results" if kind == "memory" else f"file://{tmp_path}/results"
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path / "one"))
    store = Store(address)
    result, folder = store.folder / "a.mp4", store.folder / ".sightline" / "a"
    folder.mkdir(parents=True)
    for path in (result, folder / "00000.json", folder / "manifest.json"):
        path.write_bytes(b"123")
    assert store.stamp(result) is None
    store.put([result, folder / "00000.json", folder / "manifest.json"])
    assert (store.stamp(result), store.name(result)) == ((3, 0), f"{address}/a.mp4")
    assert store.read(result) == b"123"
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path / "two"))
    other = Store(address)
    there = other.folder / ".sightline" / "a"
    other.get_folder(there)
    assert sorted(path.name for path in there.iterdir()) == ["00000.json", "manifest.json"]
    other.drop_all_but(there, ["manifest.json"])
    files, root = filesystem(address)
    left = sorted(path.removeprefix(root).strip("/") for path in files.find(root))
    assert left == [".sightline/a/manifest.json", "a.mp4"]


def test_a_folder_of_this_machine_is_left_as_it_is(tmp_path):
    store = Store(str(tmp_path))
    (tmp_path / "a").write_text("1")
    store.put([tmp_path / "a"])
    store.get_folder(tmp_path)
    store.drop_all_but(tmp_path, [])
    assert store.folder == tmp_path
    assert store.stamp(tmp_path / "a") == stamp_of(tmp_path / "a")
    assert store.stamp(tmp_path / "b") is None


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    store = Store(f"file://{tmp_path}/file/out")
    store.folder.mkdir(parents=True)
    (store.folder / "a").write_text("1")
    with pytest.raises(OutputError, match="cannot write file://"):
        store.put([store.folder / "a"])


def test_digests_are_known_by_what_the_storage_says_of_a_file(memory):
    memory.pipe("/films/a.mp4", b"one")
    digests = Digests(Store("memory://results"))
    before = identity("memory://films/a.mp4")
    digests.keep("a", before, "d1")
    assert digests.find("a", before) == "d1"
    memory.pipe("/films/a.mp4", b"more")
    assert digests.find("a", identity("memory://films/a.mp4")) is None
    assert digests.find("b", before) is None
