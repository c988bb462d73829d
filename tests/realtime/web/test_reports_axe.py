"""axe-core finds nothing in the reports that commands write."""

import csv
import shutil

import cv2
import pytest

from tests.command_line import command
from tests.realtime.web.accessibility import found_by_axe
from tests.virtual_camera import DemoCamera

pytest.importorskip("axe_playwright_python", reason="needs axe-core")


@pytest.fixture(scope="module")
def reports(data, tmp_path_factory):
    """Every kind of report, of short films and a few pictures."""
    folder = tmp_path_factory.mktemp("reports")
    film = data / "videos" / "bag.avi"
    shutil.copy(film, folder / "again.avi")
    a, b = folder / "a", folder / "b"
    runs = [
        ("batch", film, folder / "again.avi", "--end", "2", "--out", a),
        ("batch", film, "--end", "2", "--size", "192", "--out", b),
        ("compare", a / "bag.jsonl", b / "bag.jsonl", "--source", film, "--out", folder / "c.html"),
        ("evaluate", folder / "labels.csv", "--report", folder / "measured.html"),
        ("why", folder / "0.jpg", "--out", folder / "why.html"),
    ]
    camera = DemoCamera(300)
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "x0", "y0", "x1", "y1", "label"])
        for index in range(12):
            picture, box = camera.shoot(20 * index)
            cv2.imwrite(str(folder / f"{index}.jpg"), picture)
            rows.writerow([f"{index}.jpg", *box, "cat"])
    for arguments in runs:
        run = command(*arguments)
        assert run.returncode == 0, run.stderr
    names = "a/index.html", "a/bag.report.html", "c.html", "measured.html", "why.html"
    return [folder / name for name in names]


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width_px", [1280, 390])
def test_nothing_is_found_in_any_report(width_px, scheme, reports, browser):
    size = {"width": width_px, "height": 900}
    with browser.new_context(viewport=size, color_scheme=scheme) as context:
        for report in reports:
            page = context.new_page()
            page.goto(report.as_uri())
            assert found_by_axe(page) == [], report.name
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width_px, report.name
