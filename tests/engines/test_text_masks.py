"""Secrets of addresses are masked wherever they stand; nothing that is printed steers a
terminal.
"""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.progress import Progress
from rich.table import Table

from engines.errors import SourceError
from engines.text import Terminal, displayable, masked, shown

SECRET = "hunter2"
ADDRESSES = [
    "rtsp://admin:hunter2@10.0.0.5/live",
    "rtsp://admin:hunter2@10.0.0.5:554",
    "RTSP://admin:hunter2@[::1]:554/x",
    "rtsp://hunter2@camera/1",
    "rtsp://:hunter2@camera/1",
    "rtsp://admin:hunter2@x@camera/1",
    "rtsp://a@b:hunter2@camera/1",
    "rtsp://admin:x/hunter2@camera/1",
    "rtsp://admin:x#hunter2@camera/1",
    "rtsp://admin:x?hunter2@camera/1",
    "rtsp://admin:my hunter2@camera/1",
    "admin:hunter2@10.0.0.5/live",
    "http://h:80/cgi?user=admin&pwd=hunter2",
    "http://h/cgi?PASSWORD=hunter2&x=1",
    "http://h/cgi?x=1&passwd=hunter2",
    "http://h/?pass=hunter2",
    "http://h/?token=hunter2",
    "http://h/?access_token=a/b/hunter2==",
    "http://h/?key=hunter2",
    "http://h/?api_key=hunter2",
    "http://h/?apikey=hunter2",
    "http://h/?secret=hunter2",
    "http://h/?client-secret=hunter2",
    "http://h/?auth=hunter2",
    "http://h/?sig=hunter2",
    "http://h/?Signature=hunter2",
    "http://h/?loginuse=admin&loginpas=hunter2",
    "http://h/?usr=a&pw=hunter2",
    "http://h/?X-Amz-Signature=hunter2&X-Amz-Date=1",
    "http://h/?X-Amz-Credential=hunter2",
    "http://h/?X-Amz-Security-Token=hunter2",
    "https://h/b?sv=1&sas=hunter2",
    "http://h/?a=1;pwd=hunter2",
    "http://h/user=admin&password=hunter2&channel=1",
    "rtsp://h/user=admin_password=hunter2_channel=1",
    "rtsp://h/password=hunter2/ch1",
    "rtsp://h/x?pwd=a#hunter2",
    "http://h/?pwd=a'hunter2",
    "http://h/?%70wd=hunter2",
    "http://h/?pwd%3Dhunter2",
    "http://h/?a=1%26pwd%3Dhunter2",
    "http://h/?to=http%3A%2F%2Fadmin%3Ahunter2%40camera%2F",
    "http://h/?to=http%253A%252F%252Fadmin%253Ahunter2%2540camera",
    "rtsp%3A%2F%2Fadmin%3Ahunter2%40camera",
    "srt://h:9000?passphrase=hunter2&mode=caller",
    "sftp://me:hunter2@store/films/*.mp4",
    "http://h/?jwt=hunter2",
    "http://h/?streamKey=hunter2",
    "http://h/?password[]=hunter2",
]


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize(
    "around",
    [
        "{}",
        "cannot open {}: Connection refused",
        "[Errno 111] refused: '{}'",
        "a {} b {}, c",
        "({})\nnext",
    ],
)
def test_secrets_are_masked_alone_and_in_messages(address, around):
    text = around.format(address, address)
    found = masked(text)
    assert SECRET not in found
    assert "***" in found
    assert masked(found) == found
    for words in ("cannot open ", "refused", "[Errno 111]", "\nnext"):
        assert (words in text) == (words in found) or words == "\nnext"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "holiday.mp4",
        "C:\\films\\a@b.mp4",
        "C:/films/a@b.mp4",
        "/data/a:b@c/film.mp4",
        "http://h:8080/a@2x.jpg",
        "http://[::1]:80/a@b",
        "demo:300",
        "rtsp://camera:554/1?channel=1&subtype=0",
        "s3://films/key=5/year=2024/a.mp4",
        "0.5 < score=0.7, seed=3",
        "100%",
        "50%25",
        "a b@c.example",
        "the page needs: pip install fastapi uvicorn",
        "http://h/?user=admin&w=640",
        "naïve 日本 film.mp4",
        "x=y",
        "frames=100; fps=25",
    ],
)
def test_other_texts_stay(text):
    assert masked(text) == text


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.text(max_size=60), st.sampled_from(ADDRESSES), st.text(max_size=60))
def test_no_text_around_an_address_brings_the_secret_back(before, address, after):
    assert SECRET not in masked(f"{before} {address} {after}")


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.text())
def test_what_is_printable_stays_one_character_each(text):
    found = displayable(text)
    assert len(found) == len(text)
    assert not any((c < " ") or "\x7f" <= c <= "\x9f" or "\u202a" <= c <= "\u202e" for c in found)
    found.encode()


def test_long_texts_take_no_long_time():
    for text in (
        "a:" * 50_000,
        "://" * 50_000,
        "x=" * 50_000,
        "%41" * 50_000,
        "a" * 200_000 + "@",
        "&pwd=" * 50_000,
        ":@" * 50_000,
        "é" * 100_000,
    ):
        masked(text)


def test_nested_results_are_shown_too():
    given = {
        "source": "rtsp://a:hunter2@c",
        "connections": [{"trouble": "x\x1b[31m http://h/?pwd=hunter2"}],
        "frames": 3,
        "none": None,
    }
    assert shown(given) == {
        "source": "rtsp://***@c",
        "connections": [{"trouble": "x\ufffd[31m http://h/?pwd=***"}],
        "frames": 3,
        "none": None,
    }


def test_errors_are_one_line_without_secrets():
    assert (
        str(SourceError("cannot open rtsp://a:hunter2@c\x1b[2J: x\ny"))
        == "cannot open rtsp://***@c\ufffd[2J: x y"
    )


def test_names_do_not_steer_the_terminal():
    evil = "a\x1b]0;title\x07\x1b[2J\x9b31m\u202etxt.exe\udcff\r"
    out = io.StringIO()
    console = Terminal(file=out, force_terminal=True, width=100)
    table = Table(title=evil)
    table.add_column(evil)
    table.add_row(evil)
    console.print(evil, markup=False)
    console.print(table)
    with Progress(console=console) as progress:
        progress.add_task("\x1b[2J" + evil, total=1)
    written = out.getvalue()
    written.encode()
    assert not set(written) & set("\x07\x9b\u202e\udcff")
    assert "\x1b]" not in written
    assert "\x1b[2J" not in written
