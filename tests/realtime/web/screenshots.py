"""Makes pictures of the page over a real run, in a real browser.

``python -m tests.realtime.web.screenshots`` makes ``docs/page.jpg`` anew;
``python -m tests.realtime.web.screenshots FOLDER [SOURCE]`` makes four others to look at, on a desk
and on a phone, light and dark; a second source is another camera. Needs Chromium.
"""

import os
import sys
import tempfile
from pathlib import Path

from tests.realtime.web.conftest import CHROMIUM
from tests.realtime.web.page import ROOT, streaming, wait_for

SIZES_PX = {"desk": (1280, 900), "phone": (390, 844)}
DOCS_PX = (1400, 1000)
EVENTS = 3  # before the first picture is made


def make(shots: dict[Path, tuple[tuple[int, int], str, bool]], *sources: str) -> None:
    """Make pictures: of each file its size in pixels, colour scheme, and whether the whole page is
    on it.
    """
    from playwright.sync_api import sync_playwright

    os.environ.pop("SIGHTLINE_MODEL", None)  # the tests' own is not the default
    with (
        tempfile.TemporaryDirectory() as folder,
        streaming(Path(folder), *sources) as run,
        sync_playwright() as driver,
    ):
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        wait_for(lambda: run.state()["events"] >= EVENTS)
        for path, ((width, height), scheme, whole) in shots.items():
            context = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme=scheme,
                has_touch=width < 600,
            )
            page = context.new_page()
            page.goto(run.url)
            page.wait_for_function(
                "() => Number(stages.dataset.points) > 6 && /person 9/.test(seen.textContent)"
            )
            page.screenshot(path=path, full_page=whole, **jpeg(path))
            context.close()
            print(path)
        browser.close()


def jpeg(path: Path) -> dict[str, object]:
    return {"type": "jpeg", "quality": 88} if path.suffix == ".jpg" else {}


if __name__ == "__main__":
    if len(sys.argv) == 1:
        make({ROOT / "docs" / "page.jpg": (DOCS_PX, "light", False)})
    else:
        folder = Path(sys.argv[1])
        folder.mkdir(parents=True, exist_ok=True)
        make(
            {
                folder / f"{name}_{scheme}.png": (size_px, scheme, True)
                for name, size_px in SIZES_PX.items()
                for scheme in ("light", "dark")
            },
            *sys.argv[2:],
        )
