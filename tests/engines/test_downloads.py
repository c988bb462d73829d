"""Downloads against a real web server: checked, kept, continued where they stopped; what a user is
told when they fail.
"""

import hashlib
import os
import subprocess
import sys
import time

import pytest

from engines import downloads
from engines.downloads import Download, downloaded
from engines.errors import DownloadError
from tests.web import FileServer

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(tmp_path):
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "a.bin").write_bytes(CONTENT)
    with FileServer(tmp_path / "www") as served:
        yield served


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "kept"


def source(server, sha256=SHA256):
    return Download(f"{server.address}/a.bin", sha256, len(CONTENT), "a.bin")


def interrupted(server, folder, after):
    """The message of a download that ends after so many bytes."""
    server.hang_up_after = after
    with pytest.raises(DownloadError) as error:
        downloaded(source(server), folder)
    server.hang_up_after = None
    return str(error.value)


def test_a_download_is_checked_and_kept(server, folder):
    path = downloaded(source(server), folder)
    assert path == folder / "a.bin"
    assert path.read_bytes() == CONTENT
    assert [p.name for p in folder.iterdir()] == ["a.bin"]
    gone = Download("https://127.0.0.1:9/gone", SHA256, len(CONTENT), "a.bin")
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
    """The rest of the file never comes; a reader that is killed in the middle leaves what it
    has.
    """
    code = (
        "from pathlib import Path; from engines import downloads; import time\n"
        "downloads.CHUNK_BYTES = 1000\n"
        "read = downloads.HTTPResponse.read\n"
        "downloads.HTTPResponse.read = lambda self, n: (time.sleep(0.01), read(self, n))[1]\n"
        f"downloads.downloaded(downloads.Download('{server.address}/a.bin', '{SHA256}', {len(CONTENT)}, 'a.bin'), Path('{folder}'))\n"
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


@pytest.mark.parametrize(
    "part", [b"", b"of another version", b"?" * len(CONTENT), CONTENT + b"too long"]
)
def test_a_wrong_checksum_throws_the_part_away(server, folder, part):
    folder.mkdir()
    (folder / "a.bin.part").write_bytes(part)
    with pytest.raises(
        DownloadError,
        match=r"a\.bin came with a sha256 that is not 0000: try again, or .* put it at ",
    ):
        downloaded(source(server, "0000"), folder)
    assert not list(folder.iterdir())


def test_offline_says_what_to_put_where(folder):
    with pytest.raises(DownloadError) as error:
        downloaded(Download("https://127.0.0.1:9/gone.bin", SHA256, 9, "gone.bin"), folder)
    assert str(error.value) == (
        "cannot download https://127.0.0.1:9/gone.bin ([Errno 111] Connection refused): "
        f"fetch it by hand and put it at {folder / 'gone.bin'}"
    )


def test_a_file_that_is_gone_from_the_web_names_the_status(server, folder):
    with pytest.raises(DownloadError, match=r"gone\.bin \(HTTP Error 404: Not Found\)"):
        downloaded(Download(f"{server.address}/gone.bin", SHA256, 9, "gone.bin"), folder)


def test_a_folder_that_cannot_be_is_one_line(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="cannot download"):
        downloaded(source(server), tmp_path / "file")


def test_progress_leaves_standard_output_alone(server, folder, capsys):
    downloaded(source(server), folder)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "a.bin" in printed.err


@pytest.mark.parametrize("damage", [CONTENT[:-1], CONTENT + b"!", b"!" + CONTENT[1:], b""])
def test_a_kept_file_is_checked_again_when_it_has_changed_and_left_as_it_is(server, folder, damage):
    path = downloaded(source(server), folder)
    path.write_bytes(damage)
    os.utime(path, ns=(0, 0))
    with pytest.raises(
        DownloadError,
        match=r"a\.bin is cut off, damaged or another file \(.*\): remove it, and it is downloaded anew",
    ):
        downloaded(source(server), folder)
    assert path.read_bytes() == damage, "it may be the user's own"
    path.unlink()
    assert downloaded(source(server), folder).read_bytes() == CONTENT


def test_a_kept_file_is_checked_by_a_new_process_and_once_only(server, folder, monkeypatch):
    digests = []
    digest = downloads._digest
    monkeypatch.setattr(
        downloads, "_digest", lambda path: digests.append(path.name) or digest(path)
    )
    downloaded(source(server), folder)
    monkeypatch.setattr(downloads, "_seen", set())
    for _ in range(3):
        downloaded(source(server), folder)
    assert digests == ["a.bin.part", "a.bin"]
    assert len(server.asked) == 1


def test_a_kept_thing_that_cannot_be_read_is_one_line(server, folder):
    (folder / "a.bin").mkdir(parents=True)
    with pytest.raises(DownloadError, match=r"a\.bin"):
        downloaded(source(server), folder)


def test_plain_http_is_never_asked(tmp_path, folder):
    (tmp_path / "a.bin").write_bytes(CONTENT)
    with (
        FileServer(tmp_path, encrypted=False) as plain,
        pytest.raises(DownloadError, match="is not https, and only https is taken"),
    ):
        downloaded(source(plain), folder)
    assert plain.asked == []


def leading(server, address):
    """A download whose address leads on to another one."""
    server.leads_to = address
    return Download(f"{server.address}/leads", SHA256, len(CONTENT), "a.bin")


def test_https_may_lead_on_to_https(server, folder):
    assert downloaded(leading(server, f"{server.address}/a.bin"), folder).read_bytes() == CONTENT
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    "address",
    [
        "http://{}/a.bin?signature=secret",
        "HTTP://me:secret@{}/a.bin",
        "ftp://{}/a",
        "file:///etc/passwd",
    ],
)
def test_https_that_leads_on_to_anything_else_is_refused(server, folder, tmp_path, address):
    with FileServer(tmp_path / "www", encrypted=False) as plain:
        source = leading(server, address.format(plain.address.removeprefix("http://")))
        with pytest.raises(DownloadError, match="cannot download") as error:
            downloaded(source, folder)
    assert plain.asked == []
    assert "secret" not in str(error.value)
    assert not list(folder.iterdir())


def test_a_certificate_that_nobody_vouches_for_is_refused(server, folder, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(DownloadError, match=r"(?i)certificate"):
        downloaded(source(server), folder)


def test_no_more_is_read_than_the_file_has(server, folder, tmp_path):
    with (tmp_path / "www" / "a.bin").open("ab") as file:
        file.write(b"more" * 10_000)
    assert downloaded(source(server), folder).stat().st_size == len(CONTENT)


def test_no_name_or_password_reaches_a_message(server, folder):
    secret = Download("https://me:secret@127.0.0.1:9/a.bin?pwd=secret", SHA256, 9, "a.bin")
    with pytest.raises(DownloadError, match=r"https://127\.0\.0\.1:9/a\.bin \(") as error:
        downloaded(secret, folder)
    assert "secret" not in str(error.value)


def test_others_may_not_write_to_what_is_kept_and_a_link_is_not_followed(server, folder, tmp_path):
    before = os.umask(0)
    try:
        assert downloaded(source(server), folder).stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)
    (folder / "a.bin").unlink()
    (tmp_path / "precious").write_bytes(b"as it was")
    (folder / "a.bin.part").symlink_to(tmp_path / "precious")
    with pytest.raises(DownloadError, match="cannot download"):
        downloaded(source(server), folder)
    assert (tmp_path / "precious").read_bytes() == b"as it was"
