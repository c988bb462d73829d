"""The workers of a batch on a cluster: hired as far as there is room and work, replaced where they die."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.console import Console

from engines.base import EngineError, SightlineError
from realtime.batch.clip import Clip, Segment
from realtime.batch.worker import Opened

QUEUED = 2
"""Segments that a worker has at a time: one that it works on, one so that it need not wait."""
MOST_LOST = 5
"""So many workers in a row may die before they are ready."""

Ref = Any


class LostError(Exception):
    """The process or machine that worked on it is gone."""


class RemoteWorker(Protocol):
    """A ``realtime.batch.worker.Worker`` somewhere: calls give references, for ``Cluster.get``."""

    def open(self) -> Ref: ...

    def work(self, clip: Clip, segment: Segment) -> Ref: ...


class Cluster(Protocol):
    """What a batch needs of a cluster; see ``realtime.batch.cluster``."""

    def room(self) -> int: ...

    def hire(self) -> RemoteWorker: ...

    def dismiss(self, worker: Any) -> None: ...

    def task(self, function: Callable[..., Any], *arguments: Any) -> Ref: ...

    def wait(self, refs: list[Ref], timeout_s: float) -> list[Ref]: ...

    def get(self, ref: Ref) -> Any: ...


@dataclass(eq=False)
class Hand:
    """A worker as it is known here.

    Attributes:
        worker: does segments.
        ready: its engine is.
        segments: that it has, the one that it works on first.
        source: name of the source that it worked on last, which it may have a copy of.
        blamed: the segment that it died of, or with.
    """

    worker: RemoteWorker
    ready: bool = False
    segments: deque[Segment] = field(default_factory=deque)
    source: str = ""
    blamed: Segment | None = None


@dataclass
class Crew:
    """Workers.

    Args:
        cluster: where they are.
        most: at most so many; None for as many as there is room for.
        console: gets what a user should know.

    Attributes:
        opened: what the first one said of itself; all others must give the same results.
        lost: how many died.
    """

    cluster: Cluster
    most: int | None
    console: Console
    opened: Opened | None = None
    lost: int = 0
    hands: list[Hand] = field(default_factory=list)
    _lost_unready: int = 0

    def hire(self, segments: int) -> dict[Ref, Hand]:
        """Hire until there are enough for ``segments``, or no room is left.

        Returns:
            The new ones, by a reference to what they will say of themselves, for ``open``.

        Raises:
            EngineError: the cluster has no room for a single one.
        """
        room = self.cluster.room() if self.most is None else self.most
        if not room and not self.hands:
            raise EngineError("the cluster has no free processor or GPU for a worker: lower --threads, or add machines")
        found = {}
        first = 1 if self.opened is None else room  # the others, when it is known that the engine can be opened
        while len(self.hands) < min(room, first, max(1, segments)):
            hand = Hand(self.cluster.hire())
            self.hands.append(hand)
            found[hand.worker.open()] = hand
        return found

    def open(self, hand: Hand, ref: Ref) -> None:
        """Hear what a new worker says.

        Raises:
            SightlineError: the first one's engine cannot be opened, or workers keep dying before theirs is.
        """
        try:
            opened: Opened = self.cluster.get(ref)
        except LostError as error:
            self.lose(hand)
            self._lost_unready += 1
            if self._lost_unready >= MOST_LOST:
                raise EngineError(f"{MOST_LOST} workers in a row died while they opened their engine: {error}") from error
            return
        except SightlineError as error:
            if self.opened is None:
                raise
            self._refuse(hand, str(error))
            return
        self._lost_unready = 0
        if self.opened is None:
            self.opened = opened
            self.console.print(
                f"workers: {opened.backend} {opened.precision} at {opened.size_px} px, the first on {opened.device}",
                style="dim", soft_wrap=True,
            )  # fmt: skip
        if opened.settings_digest != self.opened.settings_digest:
            self._refuse(hand, f"it would give other results ({opened.backend} {opened.precision} on {opened.device})")
            return
        hand.ready = True

    def _refuse(self, hand: Hand, why: str) -> None:
        """Keep its place, so that no other of its kind is hired, but give it nothing."""
        self.console.print(f"a worker is not used: {why}", style="yellow", soft_wrap=True)
        self.cluster.dismiss(hand.worker)

    def lose(self, hand: Hand) -> None:
        """It is gone."""
        if hand in self.hands:
            hand.blamed = hand.segments[0] if hand.segments else None
            self.hands.remove(hand)
            self.lost += 1
            self.cluster.dismiss(hand.worker)

    def free(self) -> Hand | None:
        """The one with the least to do, if it can take another segment."""
        found = min((hand for hand in self.hands if hand.ready), key=lambda hand: len(hand.segments), default=None)
        return found if found and len(found.segments) < QUEUED else None
