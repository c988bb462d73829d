"""Fits a head to labels beside a run, and swaps it into the running engine.

The fit is the command ``fit`` in a process of its own with the lowest priority: whatever becomes of
it, the run goes on. ``python -m realtime.teaching.learning ARGUMENTS`` is that process: it ends
when the run does.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from engines.confidence import Limits
from engines.engine import Ticket
from engines.errors import InputError, OutputError
from engines.files import whole_file
from engines.localizer import ImageBgr, Localization, Localizer, Outputs
from engines.text import displayable, in_words
from realtime.teaching.labels import Box

TAUGHT, TRIAL = "taught.safetensors", "trial.safetensors"
STAGE = re.compile(r"^(?P<what>\S.*?) +\S*━.* 100%")
STAGES = 8
"""So many lines of progress a fit to few images has: the maps, five heads that are measured, one of
fewer images, and the one of all.
"""
OPENING_SHARE = 0.95
SWAP_S = 5.0
MOST_COURSE = 6
SWITCH_S = 0.0005
ROOT = Path(__file__).parent.parent.parent
FIGURES = ("corloc", "mean_iou", "recall_at_10", "images_with_one_object")
HEAD_NAME = re.compile(r"[\w][\w .-]{0,59}")
Command = Callable[[Path, Path], Sequence[str]]
"""The arguments of Sightline that fit a head: to this table, into this file."""


class ReplaceableLocalizer(Localizer):
    """A localizer that passes everything on to another one, which can be replaced between two
    images. One thread uses it, that of the frame loop; any thread may replace.

    Args:
        first: the one that is used at first.
    """

    def __init__(self, first: Localizer) -> None:
        self._next: tuple[Localizer, threading.Event] | None = None
        self._first = first
        self._use(first)

    def _use(self, localizer: Localizer) -> None:
        self.now = localizer
        self.engine, self.batch = localizer.engine, localizer.batch
        self.class_names, self.size_px = localizer.class_names, localizer.size_px
        self.limits: Limits | None = localizer.limits

    @property
    def is_replaced(self) -> bool:
        """Whether it uses another one than at first."""
        return self.now is not self._first

    def replaced(self, localizer: Localizer) -> threading.Event:
        """Use another one from the next image on; the event is set then."""
        done = threading.Event()
        self._next = localizer, done
        return done

    def look_for(self, class_index: int | None) -> None:
        """See ``Localizer.look_for``. The frame loop calls it before each image. A name that the
        localizer does not know is not looked for.
        """
        waiting, self._next = self._next, None
        if waiting is not None:
            localizer, done = waiting
            localizer.abstain_below(self.now.asked_confidence)
            localizer.objects = self.now.objects
            self._use(localizer)
            done.set()
        known = len(self.class_names) + len(self.names)
        is_known = class_index is None or class_index < known
        self.now.look_for(class_index if is_known else None)

    @property
    def names(self) -> tuple[str, ...]:
        """See ``Localizer.names``."""
        return self.now.names

    @property
    def wanted_class(self) -> int | None:
        """See ``Localizer.wanted_class``."""
        return self.now.wanted_class

    @property
    def least_confidence(self) -> float:
        """See ``Localizer.least_confidence``."""
        return self.now.least_confidence

    @property
    def finds_boxes(self) -> bool:
        """See ``Localizer.finds_boxes``."""
        return self.now.finds_boxes

    def abstain_below(self, confidence: float | None) -> None:
        """See ``Localizer.abstain_below``."""
        self.now.abstain_below(confidence)

    def expect(self, width_px: int, height_px: int) -> None:
        """See ``Localizer.expect``."""
        self.now.expect(width_px, height_px)

    def prepare(self, image_bgr: ImageBgr) -> ImageBgr:
        """See ``Localizer.prepare``."""
        return self.now.prepare(image_bgr)

    def submit(self, prepared: Sequence[ImageBgr]) -> Ticket:
        """See ``Localizer.submit``."""
        return self.now, self.now.submit(prepared)

    def collect(self, ticket: Ticket) -> Outputs:
        """See ``Localizer.collect``; the outputs are of the localizer that began the call."""
        localizer, its_ticket = ticket
        found: Outputs = localizer.collect(its_ticket)
        return found

    def read(
        self, outputs: Outputs, place: int, width_px: int, height_px: int, every: bool = False
    ) -> Localization:
        """See ``Localizer.read``."""
        return outputs.localizer.read(outputs, place, width_px, height_px, every)

    def close(self) -> None:
        """See ``Localizer.close``."""
        self.now.close()


class Learning:
    """Fits heads to labels, one at a time, and decides which one runs.

    Args:
        localizer: of the run.
        command: see ``Command``.
        open_head: opens the run's engine with the head of a file.
        swapped: called when another localizer is in use.
        folder: of the labels, where heads are written to.
        keep_in: where heads that are kept are written to.
        program: what takes the command's arguments.

    Attributes:
        kept: the heads that were kept.
    """

    def __init__(
        self,
        localizer: ReplaceableLocalizer,
        command: Command,
        open_head: Callable[[Path], Localizer],
        swapped: Callable[[Localizer], None],
        folder: Path,
        keep_in: Path = Path(),
        program: Sequence[str] = (sys.executable, "-m", __name__),
    ) -> None:
        self._program = program
        self._localizer, self._command = localizer, command
        self._open_head, self._swapped = open_head, swapped
        self._folder, self._keep_in = folder, keep_in
        self._lock = threading.RLock()
        self._first = localizer.now
        self._taught: Localizer | None = None
        self.kept: list[Path] = []
        self._process: subprocess.Popen[str] | None = None
        self._learnt: Mapping[str, Sequence[Box]] | None = None
        self._stopped = False
        self._swaps = 0
        self._course: list[dict[str, float]] = []
        self._facts: dict[str, Any] = {"state": "idle", "share": 0.0, "stage": "", "kept": ""}

    def state(self) -> dict[str, Any]:
        """What the page shows: ``state`` (``idle``, ``running``, ``done``, ``worse``, ``failed``),
        ``share`` done, ``stage`` in words, figures ``before`` and ``after``, the ``course`` of the
        figures over the times that it learned, ``uses_taught``.
        """
        with self._lock:
            using = self._taught is not None and self._localizer.now is self._taught
            return {**self._facts, "uses_taught": using, "has_taught": self._taught is not None}

    def start(
        self, table: Path, labels: Mapping[str, Sequence[Box]], even_if_worse: bool = False
    ) -> None:
        """Fit a head to a table of labels, and use it where it is not worse.

        Raises:
            InputError: it is learning already, or nothing is new.
        """
        with self._lock:
            if self._facts["state"] == "running":
                raise InputError("it is learning already: wait for it, or stop it")
            if self._facts["state"] == "worse" and even_if_worse and labels == self._learnt:
                self._facts |= {"state": "running", "stage": "opening the head", "share": 0.95}
                self._begin(self._use_trial)
                return
            if self._facts["state"] == "done" and labels == self._learnt:
                raise InputError("nothing is new since it learned: label more frames first")
            self._learnt, self._stopped = dict(labels), False
            self._facts = {
                "state": "running",
                "share": 0.0,
                "stage": "starting",
                "kept": "",
                "boxes": sum(map(len, labels.values())),
                "images": len(labels),
            }
            self._begin(lambda: self._learn(table, even_if_worse))

    def _begin(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except Exception as error:  # the run goes on without it
                words = in_words(error)
                with self._lock:
                    self._facts |= {"state": "failed", "why": displayable(words)}

        threading.Thread(target=run, name="learn", daemon=True).start()

    def stop(self) -> None:
        """End the fit that is going on."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """End the fit, and free what is not in use."""
        self.stop()
        for each in (self._first, self._taught):
            if each is not None and each is not self._localizer.now:
                each.close()

    def _learn(self, table: Path, even_if_worse: bool) -> None:
        began_s = time.monotonic()
        trial = self._folder / TRIAL
        result = self._fit([*self._command(table, trial)])
        took_s = time.monotonic() - began_s
        if result is None:
            with self._lock:
                self._facts |= {"state": "idle", "stage": "stopped"}
            return
        with self._lock:
            after = _figures(result.get("held_out"))
            if after:
                self._course.append({"boxes": self._facts["boxes"], **after})
            self._facts |= {
                "before": _figures(result.get("before")),
                "after": after,
                "more": displayable(str(result.get("more", ""))),
                "course": self._course[-MOST_COURSE:],
                "took_s": round(took_s, 1),
                "share": OPENING_SHARE,
                "stage": "opening the head",
            }
            if result.get("worse") and not even_if_worse:
                self._facts |= {"state": "worse", "share": 1.0}
                return
        self._use_trial()

    def _fit(self, arguments: Sequence[str]) -> dict[str, Any] | None:
        """Run the command; None where it was stopped.

        Raises:
            SightlineError: it failed, in its own words.
        """
        words = [*self._program, *arguments]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, **CHILD, "PYTHONPATH": path},
        ) as process:
            self._process = process
            if self._stopped:
                process.kill()
            said, count = list[str](), 0
            assert process.stderr is not None
            for line in process.stderr:
                stage = STAGE.match(line)
                if stage is None:
                    said.append(line.strip())
                    continue
                count += 1
                with self._lock:
                    share = OPENING_SHARE * min(1.0, count / STAGES)
                    self._facts |= {"share": share, "stage": stage["what"]}
            assert process.stdout is not None
            output = process.stdout.read()
        self._process = None
        if self._stopped:
            return None
        if process.returncode:
            words_of_it = " ".join(filter(None, said)) or f"it ended with {process.returncode}"
            raise InputError(f"it could not learn: {words_of_it.removeprefix('error: ')}")
        found: dict[str, Any] = json.loads(output)
        return found

    def _use_trial(self) -> None:
        path = self._folder / TAUGHT
        with yielding():
            opened = self._open_head(self._folder / TRIAL)
        os.replace(self._folder / TRIAL, path)
        older, self._taught = self._taught, opened
        self._swap(opened)
        if older is not None:
            older.close()
        with self._lock:
            self._facts |= {"state": "done", "share": 1.0, "stage": ""}

    def use(self, taught: bool) -> None:
        """Use the taught head, or the one that the run began with.

        Raises:
            InputError: nothing was taught yet.
        """
        with self._lock:
            wanted = self._taught if taught else self._first
        if wanted is None:
            raise InputError("nothing was taught yet: label a few frames, and let it learn")
        if wanted is not self._localizer.now:
            self._swap(wanted)

    @property
    def in_use(self) -> tuple[Path | None, int]:
        """The taught head where that runs, and how often heads were swapped so far."""
        using = self._taught is not None and self._localizer.now is self._taught
        return self._folder / TAUGHT if using else None, self._swaps

    def _swap(self, localizer: Localizer) -> None:
        self._localizer.replaced(localizer).wait(SWAP_S)
        self._swaps += 1
        self._swapped(localizer)

    def keep(self, name: str) -> Path:
        """Write the taught head under a name of the user's, for ``--head``.

        Raises:
            InputError: nothing was taught yet, or this is no name.
            OutputError: there is such a file, or it cannot be written.
        """
        wanted = name.strip()
        if self._taught is None:
            raise InputError("nothing was taught yet: label a few frames, and let it learn")
        if not HEAD_NAME.fullmatch(wanted):
            raise InputError("a head's name has letters, digits, - and _: such as mug")
        path = self._keep_in / f"{wanted}.safetensors"
        if path.exists():
            raise OutputError(f"there is a file {path.name} already: choose another name")
        try:
            with whole_file(path) as part:
                shutil.copyfile(self._folder / TAUGHT, part)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        with self._lock:
            self._facts["kept"] = wanted
            self.kept.append(path)
        return path


@contextmanager
def yielding() -> Iterator[None]:
    """Let other threads of Python have their turn sooner: frames go on while a graph is built."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before_s)


CHILD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "120"}
LOWEST = 19


def _figures(found: object) -> dict[str, float] | None:
    """Those that the page shows."""
    if not isinstance(found, dict):
        return None
    return {name: found[name] for name in FIGURES if name in found}


def _end_with_parent() -> None:
    """The run holds the other end of the standard input: it closes however the run ends."""
    with suppress(OSError):
        while os.read(0, 1024):  # Python's own reader would hold a lock when the command ends
            pass
    os._exit(3)


def main() -> None:
    """Be the command, at the lowest priority."""
    if hasattr(os, "nice"):
        os.nice(LOWEST)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runpy.run_module("cli", run_name="__main__")


if __name__ == "__main__":
    main()
