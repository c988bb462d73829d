"""Learning with a stand-in for the command that fits; the real one is in the long test of the page."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from engines.errors import InputError, ModelError, OutputError
from realtime.teaching.labels import Box, LabelFolder
from realtime.teaching.learning import Learning, ReplaceableLocalizer

LABELS = {f"{i}.jpg": (Box("my mug", (1.0, 1.0, 20.0, 20.0)),) for i in range(5)}
FIT = """
import json, sys, time
out, mode = sys.argv[1:]
for number in range(8):
    print(f"measuring, {number} of 5 " + "━" * 40 + " 100% 0:00:00", file=sys.stderr, flush=True)
if mode == "slow":
    time.sleep(60)
if mode == "bad":
    print("error: labels.csv: it has 1 box", file=sys.stderr)
    sys.exit(2)
open(out, "w").write(mode)
print(json.dumps({"before": {"corloc": 0.5}, "held_out": {"corloc": 0.9}, "worse": mode == "worse", "more": "it helps"}))
"""


class Plain:
    """As much of a localizer as replacing needs."""

    def __init__(self, names=()):
        self.names, self.class_names, self.asked_confidence, self.objects = names, ("cat",), None, 1
        self.engine, self.batch, self.size_px, self.limits = self, 1, 320, None
        self.looked_for, self.closed = "nothing", False

    def look_for(self, index):
        self.looked_for = index

    def abstain_below(self, confidence):
        self.asked_confidence = confidence

    def submit(self, prepared):
        return prepared

    def collect(self, ticket):
        return self, ticket

    def close(self):
        self.closed = True


class Frames:
    """A frame loop without frames."""

    def __init__(self, localizer):
        self.localizer, self.stopped = localizer, threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        while not self.stopped.wait(0.002):
            self.localizer.look_for(None)


@pytest.fixture
def made(tmp_path):
    """A function that makes what learns, by how the fit ends."""
    loops = []

    def make(mode="good", open_head=lambda path: Plain(("dog", "my mug"))):
        localizer = ReplaceableLocalizer(Plain(("dog",)))
        loops.append(Frames(localizer))
        modes = [mode]
        learning = Learning(
            localizer,
            lambda table, out: [str(out), modes[0]],
            open_head,
            lambda found: learning.__dict__.setdefault("said", []).append(found.names),
            tmp_path,
            tmp_path,
            (sys.executable, "-c", FIT),
        )
        return learning, localizer, modes

    yield make
    for each in loops:
        each.stopped.set()
        each.thread.join()


def ended(learning):
    end_s = time.monotonic() + 40
    while (state := learning.state())["state"] == "running":
        assert time.monotonic() < end_s
        time.sleep(0.01)
    return state


def test_a_better_head_is_used_and_left_and_used_again(made, tmp_path):
    learning, localizer, _ = made()
    with pytest.raises(InputError, match="nothing was taught yet"):
        learning.use(True)
    learning.start(tmp_path / "labels.csv", LABELS)
    state = ended(learning)
    assert state["state"] == "done"
    assert (state["boxes"], state["share"], state["uses_taught"]) == (5, 1.0, True)
    assert (state["before"], state["after"]) == ({"corloc": 0.5}, {"corloc": 0.9})
    assert localizer.names == ("dog", "my mug")
    assert state["course"] == [{"boxes": 5, "corloc": 0.9}]
    assert state["more"] == "it helps"
    assert learning.in_use == (tmp_path / "taught.safetensors", 1)
    learning.use(False)
    assert (localizer.names, learning.state()["uses_taught"]) == (("dog",), False)
    assert learning.in_use == (None, 2)
    learning.use(True)
    assert learning.said == [("dog", "my mug"), ("dog",), ("dog", "my mug")]
    with pytest.raises(InputError, match="nothing is new since it learned"):
        learning.start(tmp_path / "labels.csv", LABELS)


def test_a_worse_head_is_refused_unless_it_is_asked_for(made, tmp_path):
    learning, localizer, _ = made("worse")
    learning.start(tmp_path / "labels.csv", LABELS)
    assert ended(learning)["state"] == "worse"
    assert localizer.names == ("dog",)
    assert not (tmp_path / "taught.safetensors").exists()
    learning.start(tmp_path / "labels.csv", LABELS, even_if_worse=True)
    assert ended(learning)["state"] == "done"
    assert localizer.names == ("dog", "my mug")
    assert (tmp_path / "taught.safetensors").read_text() == "worse"


def test_a_fit_is_stopped_and_its_error_said_and_it_begins_anew(made, tmp_path):
    learning, _, modes = made("slow")
    learning.start(tmp_path / "labels.csv", LABELS)
    with pytest.raises(InputError, match="it is learning already"):
        learning.start(tmp_path / "labels.csv", LABELS)
    while learning.state()["share"] < 0.9:
        time.sleep(0.01)
    learning.stop()
    assert ended(learning)["state"] == "idle"
    modes[0] = "bad"
    learning.start(tmp_path / "labels.csv", LABELS)
    assert ended(learning)["why"] == "it could not learn: labels.csv: it has 1 box"
    modes[0] = "good"
    learning.start(tmp_path / "labels.csv", LABELS)
    assert ended(learning)["uses_taught"]


def test_a_head_that_cannot_be_opened_leaves_the_one_that_runs(made, tmp_path):
    def broken(path):
        raise ModelError(f"cannot read {path.name}")

    learning, localizer, _ = made(open_head=broken)
    learning.start(tmp_path / "labels.csv", LABELS)
    state = ended(learning)
    assert (state["state"], state["why"]) == ("failed", "cannot read trial.safetensors")
    assert localizer.names == ("dog",)


def test_a_head_is_kept_by_name_and_never_replaced(made, tmp_path):
    learning, _, _ = made()
    with pytest.raises(InputError, match="nothing was taught yet"):
        learning.keep("mug")
    learning.start(tmp_path / "labels.csv", LABELS)
    ended(learning)
    for name in ("", "../mug", "a/b", ".mug"):
        with pytest.raises(InputError, match="a head's name has letters"):
            learning.keep(name)
    assert learning.keep("mug").read_text() == "good"
    assert learning.state()["kept"] == "mug"
    with pytest.raises(OutputError, match=r"there is a file mug\.safetensors already"):
        learning.keep("mug")


def test_a_localizer_is_replaced_between_two_images_and_answers_stay_its_own():
    first, second = Plain(("dog", "my mug")), Plain(("dog",))
    localizer = ReplaceableLocalizer(first)
    localizer.look_for(2)
    ticket = localizer.submit([np.zeros((2, 2, 3), np.uint8)])
    done = localizer.replaced(second)
    assert localizer.collect(ticket)[0] is first
    assert not done.is_set()
    localizer.look_for(2)
    assert done.is_set()
    assert localizer.is_replaced
    assert (second.looked_for, localizer.names) == (None, ("dog",)), "it has no such name"


def test_the_process_that_fits_is_the_command_and_tells_of_its_errors(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-m", "realtime.teaching.learning", "fit", "no.csv", "--out", "x"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    ) as process:
        assert process.stderr.read().decode().startswith("error: data set no.csv does not exist")
        assert process.wait(30) == 2


def test_the_process_that_fits_ends_with_the_run(tmp_path):
    """Whatever ends the run: its end of the pipe closes."""
    code = "import time\nimport realtime.teaching.learning as l, threading\n"
    code += "threading.Thread(target=l._end_with_parent, daemon=True).start()\ntime.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    ) as process:
        process.stdin.close()
        assert process.wait(30) == 3


KILLED = """
import os, signal, sys, time
from pathlib import Path
from realtime.teaching.labels import Box, LabelFolder
from realtime.teaching.learning import Learning, ReplaceableLocalizer
from tests.realtime.teaching.test_learning import FIT, Frames, Plain

folder, when = Path(sys.argv[1]), sys.argv[2]
labels = LabelFolder(folder)
for number in range(5):
    file = labels.add_image(f"f{number}", b"a picture")
    labels.save(file, [Box("my mug", (1.0, 1.0, 20.0, 20.0))], (64, 48))


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def opened(path):
    return killed() if when == "opening" else Plain(("dog", "my mug"))


localizer = ReplaceableLocalizer(Plain(("dog",)))
Frames(localizer)
learning = Learning(
    localizer,
    lambda table, out: [str(out), "slow" if when == "fitting" else "good"],
    opened,
    killed,
    folder,
    folder,
    (sys.executable, "-c", FIT),
)
learning.start(labels.table, labels.all())
while learning.state()["share"] < 0.9:
    time.sleep(0.01)
if when == "fitting":
    killed()
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("when", "head"), [("fitting", "old"), ("opening", "old"), ("swapping", "good")]
)
def test_a_run_that_is_killed_leaves_labels_and_a_whole_head(tmp_path, when, head):
    (tmp_path / "taught.safetensors").write_text("old")
    end = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), when],
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        timeout=60,
        check=False,
        stderr=subprocess.DEVNULL,
    )
    assert end.returncode == -signal.SIGKILL
    found = LabelFolder(tmp_path)
    assert found.counts() == {"my mug": 5}
    assert all((tmp_path / file).read_bytes() == b"a picture" for file in found.all())
    assert (tmp_path / "taught.safetensors").read_text() == head
