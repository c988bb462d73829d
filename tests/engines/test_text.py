"""Names from outside, made fit for files, pictures and JSON."""

import pytest

from engines.text import MOST_NAME_BYTES, displayable, file_name


@pytest.mark.parametrize(
    "text",
    ["clip", "Übung 3", "日本語　写真", "a.b", "👩‍👩‍👧", "$x$ [bold]", "x" * MOST_NAME_BYTES],
)
def test_what_can_be_shown_stays(text):
    assert displayable(text) == file_name(text) == text


@pytest.mark.parametrize(
    "text", ["\udcff\udcfe", "a\nb", "\x1b[2J", "a\u202egpj", "\ud800", "\x00", "a\u2028b", "\x9b"]
)
def test_what_cannot_be_shown_is_replaced(text):
    shown = displayable(text)
    assert shown.encode()
    assert len(shown) == len(text)
    assert "\ufffd" in shown
    assert displayable(shown) == shown
    assert file_name(text).startswith(shown + "_")


def test_file_names_are_short_and_different():
    names = ["x" * 245, "x" * 246, "日" * 100, "\udcff", "\udcfe", "\ufffd", "\udcff" * 250]
    found = [file_name(name) for name in names]
    assert len(set(found)) == len(names)
    assert all(len(name.encode()) <= MOST_NAME_BYTES for name in found)
    assert found == [file_name(name) for name in names]
