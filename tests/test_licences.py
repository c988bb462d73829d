"""Every package that running needs is in docs/licences.md, with the licence that it states."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGE = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
TABLE = {
    canonicalize_name(name): licence
    for name, licence in re.findall(
        r"^\| ([\w.-]+) \| (.+?) \| [^|]+ \|$", PAGE.partition("## Packages")[2], re.MULTILINE
    )
    if name != "package" and not name.startswith("--")
}


def needed():
    """The packages of Sightline and of all extras but the developers', and what those need that are
    installed.
    """
    todo = list(PROJECT["dependencies"])
    for extra, texts in PROJECT["optional-dependencies"].items():
        todo += texts if extra != "dev" else []
    found = {}
    while todo:
        wanted = Requirement(todo.pop())
        name = canonicalize_name(wanted.name)
        if name == PROJECT["name"] or (name in found and wanted.extras <= found[name]):
            continue
        found[name] = frozenset(wanted.extras) | (found.get(name) or frozenset())
        try:
            stated = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for text in stated:
            marker = Requirement(text).marker
            if marker is None or any(
                marker.evaluate({"extra": extra}) for extra in {"", *found[name]}
            ):
                todo.append(text)
    assert len(found) > 60
    return sorted(found)


def stated_licence(name):
    metadata = importlib.metadata.metadata(name)
    classifiers = [
        text for text in metadata.get_all("Classifier") or [] if text.startswith("License")
    ]
    return metadata.get("License-Expression"), " ".join(
        [(metadata.get("License") or "")[:300], *classifiers]
    )


@pytest.mark.parametrize("name", needed())
def test_a_needed_package_has_its_licence_on_the_page_and_a_pin(name):
    assert name in TABLE, f"{name} is missing in docs/licences.md"
    pins = [
        canonicalize_name(line.split("==")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    ]
    assert name in pins or name.startswith(("nvidia-cu", "nvidia-nv", "triton", "cuda-"))
    try:
        expression, words = stated_licence(name)
    except importlib.metadata.PackageNotFoundError:
        return
    assert "AGPL" not in f"{expression} {words}"
    assert "Affero" not in words
    shown = TABLE[name].split(";")[0]
    if expression:
        assert shown == expression
    elif family := re.search(r"MIT|Apache|BSD|MPL|ISC|Proprietary|Python Software", words):
        assert family[0].lower() in shown.lower() or (
            family[0] == "Python Software" and "PSF" in shown
        )


def test_what_wheels_bundle_is_as_the_page_says():
    """Where these libraries are no longer in PyAV's wheel, or FFmpeg's own words change, the page
    is to be mended.
    """
    files = [str(file) for file in importlib.metadata.files("av") or []]
    if any("av.libs" in file for file in files):  # the wheel for Linux
        assert any("libx264" in file for file in files)
        assert any("libx265" in file for file in files)
    (text, *_) = [
        file.read_text()
        for file in importlib.metadata.files("opencv-python") or []
        if file.name == "LICENSE-3RD-PARTY.txt"
    ]
    assert "FFmpeg is redistributed within all opencv-python packages" in text
    assert (
        "Qt 5 is redistributed within non-headless opencv-python Linux and macOS packages" in text
    )
