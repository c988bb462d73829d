"""A scripted user teaches an object on the page: from the command to a head that runs, with at most
15 boxes, each edge off by up to 5 % of the box's sides.

Each clip is measured on the frames that are at least a second from any labelled one. The script
prints what the default head gave there, and how long each part took.
"""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from engines.boxes import iou
from engines.choose import open_localizer
from realtime.teaching.labels import LabelFolder
from tests.conftest import DATA
from tests.realtime.web.page import PATIENCE_S, ROOT, Run, wait_for

BOXES, JITTER, RIGHT = 15, 0.05, 0.75
FEWEST_FRAMES_BETWEEN = 1
MODEL = "lite0"
FROZEN_OR_TOLD = "() => !easel.hidden || document.getElementById('teach-told').textContent"
pytestmark = [
    pytest.mark.timeout(1500),
    pytest.mark.long,
    pytest.mark.skipif(not DATA.is_dir(), reason="the real data are not here"),
]


def bag():
    corners = np.loadtxt(DATA / "videos" / "bag_groundtruth.txt", delimiter=",")
    low = [corners[:, axis::2].min(axis=1) for axis in (0, 1)]
    high = [corners[:, axis::2].max(axis=1) for axis in (0, 1)]
    return DATA / "videos" / "bag.avi", np.stack([*low, *high], axis=1).clip(0, (480, 360) * 2)


def motorcycle(folder):
    boxes = np.loadtxt(DATA / "otb" / "MotorRolling_groundtruth_rect.txt", delimiter=",")
    boxes[:, 2:] += boxes[:, :2]
    return film_of(DATA / "otb" / "MotorRolling.tar", folder, 25), boxes


def davis(name, folder):
    boxes = np.genfromtxt(DATA / "davis" / f"{name}_boxes.csv", delimiter=",", skip_header=1)
    return film_of(DATA / "davis" / f"{name}.tar", folder, 24), boxes[:, 1:5]


def film_of(archive, folder, rate_fps):
    """A film of the images of an archive."""
    path = folder / f"{archive.stem}.mp4"
    with tarfile.open(archive) as images, av.open(str(path), "w") as film:
        stream = None
        for member in sorted(each.name for each in images if each.name.endswith(".jpg")):
            content = np.frombuffer(images.extractfile(member).read(), np.uint8)
            image = cv2.imdecode(content, cv2.IMREAD_COLOR)
            image = image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2]
            if stream is None:
                stream = film.add_stream("libx264", rate=rate_fps, options={"crf": "12"})
                stream.height, stream.width, stream.pix_fmt = *image.shape[:2], "yuv420p"
            film.mux(stream.encode(av.VideoFrame.from_ndarray(image, "bgr24")))
        film.mux(stream.encode())
    return path


CLIPS = {
    "bag": (lambda folder: bag(), ((0.0, 0.22), (0.78, 1.0))),
    "motorcycle": (motorcycle, ((0.0, 0.22), (0.78, 1.0))),
    "dancer": (lambda folder: davis("dance-twirl", folder), ((0.0, 0.26),)),
}
"""Each with the parts of the film that the user labels. A dancer is a person, too: the default knows
people.
"""


def frames_of(path):
    with av.open(str(path)) as film:
        rate = float(film.streams.video[0].average_rate)
        return [each.to_ndarray(format="bgr24") for each in film.decode(video=0)], rate


@contextmanager
def streaming(folder, film):
    """The command; only what ends it is asked for here."""
    words = ["stream", str(film), "--model", MODEL, "--web", "0", "--no-window", "--no-follow"]
    words += ["--labels-dir", str(folder / "labels"), "--log", str(folder / "log.jsonl")]
    with subprocess.Popen(
        [sys.executable, "-m", "cli", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as process:
        line = next(each for each in process.stderr if each.startswith("watch on "))
        run = Run(line.removeprefix("watch on ").strip(), folder / "log.jsonl", folder)
        run.process = process
        try:
            yield run
        finally:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=30)
            process.kill()


class User:
    """Looks at frames, knows where the object is, and draws it a little wrong."""

    def __init__(self, page, run, frames, boxes):
        self.page, self.run, self.boxes = page, run, boxes
        self.small = np.stack([self.seen(each) for each in frames])
        self.rng = np.random.default_rng(0)

    @staticmethod
    def seen(image):
        return cv2.resize(image, (40, 30), interpolation=cv2.INTER_AREA).astype(np.float32).ravel()

    def state(self):
        return json.loads(self.run.ask("/teach")[1])

    def frozen(self):
        """The number of the frozen frame in the film, and its picture's place on the screen."""
        self.page.wait_for_function("() => frozen.complete && frozen.naturalWidth > 0")
        source = self.page.evaluate("document.getElementById('frozen').getAttribute('src')")
        content = np.frombuffer(self.run.ask(f"/{source}")[1], np.uint8)
        picture = self.seen(cv2.imdecode(content, cv2.IMREAD_COLOR))
        number = int(((self.small - picture) ** 2).mean(axis=1).argmin())
        place = self.page.evaluate(
            "(() => { const m = boxes.getScreenCTM(); return [m.a, m.e, m.f]; })()"
        )
        return number, place

    def draw(self, number, place):
        scale, left, top = place
        x0, y0, x1, y1 = self.boxes[number]
        off = self.rng.uniform(-JITTER, JITTER, 4) * [x1 - x0, y1 - y0, x1 - x0, y1 - y0]
        view = self.page.evaluate("[boxes.viewBox.baseVal.width, boxes.viewBox.baseVal.height]")
        drawn = np.clip(self.boxes[number] + off, 0.5, [side - 1 for side in view] * 2)
        corners = drawn[:2], (drawn[:2] + drawn[2:]) / 2, drawn[2:]
        points = [(left + scale * x, top + scale * y) for x, y in corners]
        self.page.mouse.move(*points[0])
        self.page.mouse.down()
        self.page.mouse.move(*points[1])
        self.page.mouse.move(*points[2])
        self.page.mouse.up()

    def label(self, parts, name):
        """Freeze frames of some parts of the film until there are boxes enough."""
        labelled, count = [], len(self.boxes)
        while len(labelled) < BOXES:
            self.page.locator("#teach-freeze").click()
            self.page.wait_for_function(FROZEN_OR_TOLD)
            if not self.page.locator("#easel").is_visible():
                print(self.page.locator("#teach-told").inner_text())  # a slow machine: once more
                continue
            number, place = self.frozen()
            wanted = any(low * count <= number < high * count for low, high in parts)
            near = any(abs(number - each) < FEWEST_FRAMES_BETWEEN for each in labelled)
            if wanted and not near and np.isfinite(self.boxes[number]).all():
                self.draw(number, place)
                if not labelled:
                    self.page.keyboard.type(name)
                    self.page.keyboard.press("Enter")
                labelled.append(number)
                wait_for(lambda: self.state()["boxes"] == len(labelled))
            self.page.locator("#teach-live").click()
        return labelled


def right(head, frames, boxes, places):
    """Share of frames whose shown box is right, share of those whose best box is, and the names."""
    with open_localizer(MODEL, head=head) as localizer:
        shown, names = list[bool](), set[str]()
        for place in places:
            (found,) = localizer.localize([frames[place]])
            box = found.box_xyxy_px
            shown.append(box is not None and iou(box, boxes[place]) > 0.5)
            names |= {found.label} if box is not None else set()
        localizer.abstain_below(0.0)
        every = [
            iou(localizer.localize([frames[place]])[0].box_xyxy_px, boxes[place]) > 0.5
            for place in places
        ]
    return float(np.mean(shown)), float(np.mean(every)), names


@pytest.mark.parametrize("name", CLIPS)
def test_an_object_is_taught_by_clicks(name, browser, tmp_path):
    make, parts = CLIPS[name]
    film, boxes = make(tmp_path)
    frames, rate_fps = frames_of(film)
    began_s = time.monotonic()
    with streaming(tmp_path, film) as run:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE_S * 1000)
        page.goto(run.url)
        page.get_by_role("button", name="Teach", exact=True).click()
        page.wait_for_function("() => Number(picture.dataset.number) > 2")
        user = User(page, run, frames, boxes)
        ready_s = time.monotonic()
        labelled = user.label(parts, f"my {name}")
        labelled_s = time.monotonic()
        before_fps = run.state()["all"]["fps"]
        page.locator("#teach-learn").click()
        rates = []
        while user.state()["learning"]["state"] == "running":
            rates.append(run.state()["all"]["fps"])
            time.sleep(1)
        learning = user.state()["learning"]
        taught_s = time.monotonic()
        assert learning["uses_taught"], learning.get("why")
        assert run.state()["title"].endswith("taught")
        second = browser.new_page()
        second.goto(run.url)
        second.get_by_text(f"my {name}").first.wait_for(timeout=PATIENCE_S * 1000)
        page.locator("#teach-head").fill("mine")
        page.get_by_role("button", name="Keep").click()
        wait_for((tmp_path / "mine.safetensors").exists)
        second.close()
        page.close()
    away = [
        place
        for place in range(len(boxes))
        if min(abs(place - each) for each in labelled) >= rate_fps
        and np.isfinite(boxes[place]).all()
    ]
    old, new = (right(head, frames, boxes, away) for head in (None, str(tmp_path / "mine")))
    print(
        f"\n{name}: {len(labelled)} boxes, {len(away)} frames a second or more away; shown and right"
        f" {100 * old[0]:.0f} -> {100 * new[0]:.0f} %, right {100 * old[1]:.0f} ->"
        f" {100 * new[1]:.0f} %; start {ready_s - began_s:.0f} s, label {labelled_s - ready_s:.0f}"
        f" s, learn {taught_s - labelled_s:.0f} s; frames/s {before_fps:.1f} before,"
        f" {np.median(rates):.1f} while it learned; {learning['before']} -> {learning['after']}"
    )
    rows = run.rows()
    assert [each["frame"] for each in rows] == list(range(len(rows))), "each frame has its row"
    assert {each["outcome"] for each in rows} <= {"shown", "dropped"}
    assert f"my {name}" in new[2]
    assert new[0] >= RIGHT


def test_a_killed_run_leaves_its_labels_and_no_process(tmp_path):
    film, _ = bag()
    with streaming(tmp_path, film) as run:
        run.ask("/teach?open=true")
        keys = set()
        while len(keys) < 6:
            keys.add(json.loads(run.ask("/teach/freeze", "POST", {"source": "bag"})[1])["key"])
            time.sleep(0.1)
        for key in keys:
            body = {"key": key, "boxes": [{"name": "bag", "box": [10.0, 10.0, 90.0, 80.0]}]}
            assert run.ask("/teach/save", "POST", body)[0].status == 200
        labels = run.ask("/teach")[1]
        assert run.ask("/teach/learn", "POST", {})[0].status == 200
        time.sleep(2)
        children = (Path("/proc") / str(run.process.pid) / "task").glob("*/children")
        pids = [pid for each in children for pid in each.read_text().split()]
        run.process.kill()
        run.process.wait()
    assert pids
    wait_for(lambda: not any((Path("/proc") / pid).exists() for pid in pids))
    found = LabelFolder(tmp_path / "labels")
    assert len(found.all()) == json.loads(labels)["images"]
    assert found.counts() == json.loads(labels)["names"]
    assert not [each for each in found.folder.iterdir() if each.name.startswith("taught")]
