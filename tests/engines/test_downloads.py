"""Downloads against a real web server: checked, kept, continued where they stopped; what a user is told when they fail."""

import hashlib
import subprocess
import sys
import time

import pytest

from engines.base import DownloadError
from engines.downloads import Download, downloaded
from tests.web import FileServer

CONTENT = bytes(range(256)) * 4000
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


@pytest.fixture
def server(tmp_path):
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "a.bin").write_bytes(CONTENT)
    with FileServer(tmp_path / "www") as served:
        yield served


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "kept"


def source(server, checksum=SHA256):
    return Download(f"{server.address}/a.bin", checksum, "a.bin")


def interrupted(server, folder, after):
    """The message of a download that ends after so many bytes."""
    server.hang_up_after = after
    with pytest.raises(DownloadError) as error:
        downloaded(source(server), folder)
    server.hang_up_after = None
    return str(error.value)


@pytest.mark.parametrize("checksum", [SHA256, SHA256[:15], MD5])
def test_a_download_is_checked_and_kept(server, folder, checksum):
    path = downloaded(source(server, checksum), folder)
    assert path == folder / "a.bin"
    assert path.read_bytes() == CONTENT
    assert [p.name for p in folder.iterdir()] == ["a.bin"]
    gone = Download("http://127.0.0.1:9/gone", checksum, "a.bin")
    assert downloaded(gone, folder) == path, "the second time no network is needed"


def test_an_interrupted_download_goes_on_where_it_stopped(server, folder):
    message = interrupted(server, folder, 300_000)
    assert "ended after 300000 of 1024000 bytes" in message
    assert "try again to go on after 300000 bytes" in message
    assert (folder / "a.bin.part").read_bytes() == CONTENT[:300_000]
    interrupted(server, folder, 200_000)
    assert downloaded(source(server), folder).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-", "bytes=500000-"]
    assert [p.name for p in folder.iterdir()] == ["a.bin"]


def test_a_killed_download_goes_on_too(server, folder):
    """The rest of the file never comes; a reader that is killed in the middle leaves what it has."""
    code = (
        "from pathlib import Path; from engines import downloads; import time\n"
        "downloads.CHUNK_BYTES = 1000\n"
        "read = downloads.HTTPResponse.read\n"
        "downloads.HTTPResponse.read = lambda self, n: (time.sleep(0.01), read(self, n))[1]\n"
        f"downloads.downloaded(downloads.Download('{server.address}/a.bin', '{SHA256}', 'a.bin'), Path('{folder}'))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    part, deadline = folder / "a.bin.part", time.monotonic() + 30
    while time.monotonic() < deadline and not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    process.kill()
    process.wait()
    have = part.stat().st_size
    assert 0 < have < len(CONTENT)
    assert downloaded(source(server), folder).read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={have}-"]


def test_a_server_without_ranges_is_asked_for_all_of_it_again(server, folder):
    interrupted(server, folder, 300_000)
    server.ranges = False
    assert downloaded(source(server), folder).read_bytes() == CONTENT


def test_a_part_that_is_complete_is_taken(server, folder):
    folder.mkdir()
    (folder / "a.bin.part").write_bytes(CONTENT)
    assert downloaded(source(server), folder).read_bytes() == CONTENT


@pytest.mark.parametrize("part", [b"", b"of another version", CONTENT + b"too long"])
def test_a_wrong_checksum_throws_the_part_away(server, folder, part):
    folder.mkdir()
    (folder / "a.bin.part").write_bytes(part)
    with pytest.raises(
        DownloadError, match=r"a\.bin came with a checksum that is not sha256:0000: try again, or .* put it at "
    ):
        downloaded(source(server, "sha256:0000"), folder)
    assert not list(folder.iterdir())


def test_offline_says_what_to_put_where(folder):
    with pytest.raises(DownloadError) as error:
        downloaded(Download("http://127.0.0.1:9/gone.bin", "md5:00", "gone.bin"), folder)
    assert str(error.value) == (
        "cannot download http://127.0.0.1:9/gone.bin ([Errno 111] Connection refused): "
        f"fetch it by hand and put it at {folder / 'gone.bin'}"
    )


def test_a_file_that_is_gone_from_the_web_names_the_status(server, folder):
    with pytest.raises(DownloadError, match=r"gone\.bin \(HTTP Error 404: Not Found\)"):
        downloaded(Download(f"{server.address}/gone.bin", "md5:00", "gone.bin"), folder)


def test_a_folder_that_cannot_be_is_one_line(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="cannot download"):
        downloaded(source(server), tmp_path / "file")


def test_progress_leaves_standard_output_alone(server, folder, capsys):
    downloaded(source(server), folder)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "a.bin" in printed.err
