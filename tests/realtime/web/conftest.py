"""What tests of the page share."""

import shutil

import pytest

from realtime.capture import Connection
from realtime.session import Session
from realtime.statistics import LiveRun

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture
def session():
    with Session(
        [Connection("cam", "0"), Connection("door", "1")], LiveRun(["cam", "door"]), ("cat", "dog")
    ) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    """A browser; its event loop runs in this thread until the module is done."""
    api = pytest.importorskip(
        "playwright.sync_api", reason="driving a browser needs the package playwright"
    )
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with api.sync_playwright() as driver:
        opened = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield opened
        opened.close()
