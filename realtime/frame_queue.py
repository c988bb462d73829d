"""The frame queue between the reading threads and the loop: it is bounded, and a policy says what
happens when it is full.
"""

import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from engines.errors import SourceError
from realtime.frames import ENDED, Frame, FrameRecord, LoopFrame

READ_AHEAD_FRAMES = 2
MOST_WAITING_FRAMES = 32  # under max-age: a second of most cameras
NEWER = "a newer frame was waiting"
DAMAGED = "damaged on the way"
FULL = "too many were waiting"
"""Why frames are dropped, besides for their age and because the run ended."""


@dataclass(frozen=True)
class Policy:
    """What becomes of frames that come faster than they are taken.

    ``latest``: the newest one waits, older ones are dropped. ``every``: the reader waits, nothing
        is dropped. ``max-age``: they
    wait in turn, and are dropped when they are older than ``max_age_ms`` before their turn
    comes.
    """

    name: str = "latest"
    max_age_ms: float = float("inf")

    @property
    def capacity(self) -> int:
        """The number of frames of one source that may wait."""
        return {"latest": 1, "every": READ_AHEAD_FRAMES}.get(self.name, MOST_WAITING_FRAMES)

    @property
    def drops(self) -> bool:
        return self.name != "every"

    @classmethod
    def of(cls, text: str) -> Self:
        """Read ``latest``, ``every`` or ``max-age MS``.

        Raises:
            SourceError: it is none of these.
        """
        if text in ("latest", "every"):
            return cls(text)
        found = re.fullmatch(r"max-age[ =:](\d+(?:\.\d+)?)(?: ?ms)?", text.strip())
        if not found or float(found[1]) <= 0:
            raise SourceError(
                f"unknown policy '{text}': write latest, every, or 'max-age MS' such as 'max-age"
                " 200'"
            )
        return cls("max-age", float(found[1]))


LATEST, EVERY = Policy("latest"), Policy("every")


class FrameQueue:
    """Frames of one or more sources on their way to the loop. Readers put, each at its own place;
    the loop takes from all.

    Args:
        policy: for each source.
        sources: how many put frames here.
        at_once: how many frames of different sources are given out together, if so many wait; a
            slow one is not waited for.

    Attributes:
        closed: nothing more is taken in.
        captured: frames that came, by place.
    """

    def __init__(self, policy: Policy, sources: int = 1, at_once: int = 1) -> None:
        self.closed = threading.Event()
        self.captured = [0] * sources
        self._policy, self._at_once = policy, at_once
        self._changed = threading.Condition()
        self._waiting: list[deque[FrameRecord]] = [deque() for _ in range(sources)]
        self._dropped: list[FrameRecord] = []
        self._giving: deque[LoopFrame] = deque()  # taken from what waits, and not asked for yet
        self._reading = sources
        self._next = 0
        self._draining = False
        self._error: Exception | None = None

    def put(self, frame: Frame, place: int = 0) -> bool:
        """Take in a frame; waits while it is full, if the policy drops none. False when closed: the
        frame does not count.
        """
        with self._changed:
            waiting, full = self._waiting[place], self._policy.capacity
            if not self._policy.drops:
                self._changed.wait_for(lambda: len(waiting) < full or self.closed.is_set())
            if self.closed.is_set():
                return False
            self.captured[place] += 1
            record = FrameRecord(frame)
            if frame.damaged:
                self._drop(record, DAMAGED)
            else:
                if len(waiting) == full:
                    self._drop(waiting.popleft(), NEWER if full == 1 else FULL)
                waiting.append(record)
            self._changed.notify_all()
            return True

    def end(self, error: Exception | None) -> None:
        """A source has ended; the first error is raised in the loop when all have, after what still
        waits.
        """
        with self._changed:
            self._reading -= 1
            self._error = self._error or error
            self._changed.notify_all()

    def abort(self, error: Exception) -> None:
        """Raise an error in the loop, whatever the other sources do."""
        with self._changed:
            self._reading, self._error = 0, error
            self._changed.notify_all()

    def close(self) -> None:
        """Take nothing more in. Readers that wait to put a frame here wait no longer."""
        with self._changed:
            self.closed.set()
            self._changed.notify_all()

    def stop(self) -> None:
        """End the frames as soon as possible. Frames that wait are dropped."""
        self._draining = True
        self.close()

    def frames(self) -> Iterator[LoopFrame]:
        """Dropped and waiting frames, until all sources have ended. Then their error is raised, if
        there is one.
        """
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: (
                        self._dropped or any(self._waiting) or self._reading <= 0 or self._draining
                    )
                )
                if self._draining:
                    self._drop_waiting()
                taken = self._take()
                self._giving.extend([*map(LoopFrame, self._dropped), *taken])
                self._dropped = []
                if not self._giving and (self._draining or self._reading <= 0):
                    if self._error is not None and not self._draining:
                        raise self._error
                    return
                self._changed.notify_all()
            while self._giving:
                yield self._giving.popleft()

    def left(self) -> list[FrameRecord]:
        """Drop the frames that were not given out, and return their records. A run that failed
        counts them.
        """
        with self._changed:
            self._waiting.append(deque(frame.record for frame in self._giving))
            self._giving.clear()
            self._drop_waiting()
            left, self._dropped = self._dropped, []
            return left

    def _take(self) -> list[LoopFrame]:
        """At most ``at_once`` frames, one of each source, taking turns."""
        taken: list[LoopFrame] = []
        for offset in range(len(self._waiting)):
            place = (self._next + offset) % len(self._waiting)
            self._drop_old(self._waiting[place])
            if self._waiting[place]:
                taken.append(LoopFrame(self._waiting[place].popleft()))
            if len(taken) == self._at_once:
                self._next = place + 1
                break
        for frame in taken[:-1]:
            frame.batch_with_next = True
        return taken

    def _drop_old(self, waiting: deque[FrameRecord]) -> None:
        oldest_ns = time.monotonic_ns() - self._policy.max_age_ms * 1e6
        while waiting and waiting[0].frame.captured_ns < oldest_ns:
            self._drop(waiting.popleft(), f"older than {self._policy.max_age_ms:g} ms")

    def _drop_waiting(self) -> None:
        for waiting in self._waiting:
            while waiting:
                self._drop(waiting.popleft(), ENDED)

    def _drop(self, record: FrameRecord, cause: str) -> None:
        if record.outcome == "shown":
            record.outcome, record.cause = "dropped", cause
        record.release()
        self._dropped.append(record)
