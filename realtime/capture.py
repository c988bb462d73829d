"""The threads that read sources: one for a file that is read to its end, one for each live source,
which reconnects.
"""

import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TypeVar

from engines.errors import SightlineError, SourceError
from engines.text import in_words, shown
from realtime.frame_queue import EVERY, LATEST, FrameQueue, Policy
from realtime.frames import Frame, FrameRecord, LoopFrame, LoopFrames
from realtime.sources.spec import kind_of, name_of, open_source
from realtime.sources.video import USUAL, Source, SourceOptions

# of an address; FFmpeg gives up sooner, if it can. How long a camera's driver takes is its own
# affair
OPENING_S = 12.0
FIRST_FRAME_S = 10.0  # some cameras take their time to begin
LOOK_EVERY_S = 0.1
LEAVE_S = 1.0
NS = 1_000_000_000
AHEAD_BYTES = 2**28
"""Of pictures that wait for the next stage of the work; at least one may. Four 8K pictures take 0.4
GB.
"""


@dataclass
class Connection:
    """How a live source is doing; its reader writes, anyone reads.

    Attributes:
        name: of its frames, different from all others'.
        spec: what the user typed, without a password.
        state: ``opening``, ``live``, ``waiting`` (to try again), ``ended`` (a file played to its
            end) or ``failed`` (for good).
        trouble: the last error, in words.
        width_px, height_px: of its last frame.
        rate_fps: nominal.
        reconnects: how often it came back.
    """

    name: str
    spec: str
    state: str = "opening"
    trouble: str = ""
    width_px: int = 0
    height_px: int = 0
    rate_fps: float = 0.0
    reconnects: int = 0


class Series:
    """One source's frames on their way into the frame queue, numbered and timed through all its
    connections.
    """

    def __init__(self, connection: Connection, frame_queue: FrameQueue, place: int) -> None:
        self.connection, self.frame_queue = connection, frame_queue
        self._place = place
        self._index = 0
        self._first_ns = 0
        self._begin_s = self._last_s = 0.0

    def begin(self, frame: Frame, captured_ns: int) -> None:
        """The first frame of a connection has come: it is live, times go on from here."""
        connection = self.connection
        if connection.width_px and connection.state != "live":
            connection.reconnects += 1
        connection.state, connection.trouble = "live", ""
        self._first_ns = self._first_ns or captured_ns
        now_s = (captured_ns - self._first_ns) / NS
        after_s = self._last_s + 1 / max(1.0, connection.rate_fps) if self._index else 0.0
        self._begin_s = max(now_s, after_s) - frame.pts_s

    def put(self, frame: Frame, captured_ns: int) -> None:
        """Hand a frame on; it waits where the frame queue does."""
        connection = self.connection
        connection.height_px, connection.width_px = frame.image_bgr.shape[:2]
        pts_s = self._last_s = self._begin_s + frame.pts_s
        frame = replace(
            frame, source=connection.name, index=self._index, pts_s=pts_s, captured_ns=captured_ns
        )
        if self.frame_queue.put(frame, self._place):
            self._index += 1


class Attempt:
    """One connection, in a thread of its own that is left behind when nothing comes from it any
    more.

    A call that a stopped server or a driver holds up cannot be interrupted, but done without: when
    it comes back, its thread closes the source and ends, and what it brings does not count.

    Args:
        spec: see ``realtime.sources.spec.open_source``.
        options: how it is opened.
        series: where its frames go.
        notify: gets what of the source is not read, in words.

    Attributes:
        live: whether it may be a camera or a network stream, which is worth opening again; an
            address may turn out a file.
    """

    def __init__(
        self,
        spec: str,
        options: SourceOptions,
        series: Series,
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._spec = spec
        self._options = options
        self._series = series
        self._notify = notify
        self._source: Source | None = None
        self._error: Exception | None = None
        self._notes = 0
        self._lock = threading.Lock()
        self._left = False
        self._done = threading.Event()
        kind = kind_of(spec)
        self._asked_s = time.monotonic()
        self._patience_s = OPENING_S if kind.address else math.inf
        self.live = kind.live is not False

    def run(self) -> None:
        """Put every frame of the connection, until it ends or the frame queue closes.

        Raises:
            SightlineError: as the source raises, or nothing came for so long as the options say.
        """
        name = f"connection of {self._series.connection.name}"
        threading.Thread(target=self._read, name=name, daemon=True).start()
        while not self._done.wait(LOOK_EVERY_S):
            if self._series.frame_queue.closed.is_set():
                if not self._done.wait(LEAVE_S):
                    self._leave()
                return
            if self._silent_s > self._patience_s:
                self._leave()
                raise SourceError(
                    f"{self._series.connection.spec}: nothing came for {self._patience_s:g} s"
                )
        if self._error is not None:
            raise self._error

    @property
    def _silent_s(self) -> float:
        """How long the source has been waited for."""
        return time.monotonic() - max(self._asked_s, self._source.heard_s if self._source else 0.0)

    def _leave(self) -> None:
        with self._lock:
            self._left = True

    def _read(self) -> None:
        try:
            with open_source(self._spec, self._options) as self._source:
                self._read_open(self._source)
        except Exception as error:  # raised by run, where it can be dealt with
            self._error = error
        finally:
            self._done.set()

    def _read_open(self, source: Source) -> None:
        series, start_s = self._series, time.monotonic()
        self.live, series.connection.rate_fps = source.live, source.rate_fps
        self._asked_s, self._patience_s = (
            time.monotonic(),
            max(FIRST_FRAME_S, self._options.stall_s),
        )
        if not source.live:
            self._patience_s = math.inf
        kind = kind_of(self._spec)
        photos = self._options.photos_fps if kind.alone and kind.can_be_cut else None
        pace = source.rate_fps / photos if photos else 1.0
        for number, frame in enumerate(source):
            self._asked_s, captured_ns = math.inf, frame.captured_ns  # now the source waits for us
            if not source.live:  # a file: at its own pace
                due_s = start_s + frame.pts_s * pace
                series.frame_queue.closed.wait(max(0.0, due_s - time.monotonic()))
                captured_ns = time.monotonic_ns()
            with self._lock:
                if self._left or series.frame_queue.closed.is_set():
                    return
                if number == 0:
                    series.begin(frame, captured_ns)
                series.put(frame, captured_ns)
                self._tell(source)
            if source.live:
                self._asked_s, self._patience_s = time.monotonic(), self._options.stall_s
        self._tell(source)

    def _tell(self, source: Source) -> None:
        """Tell the notes that were not told yet."""
        for note in source.notes[self._notes :]:
            self._notify(note)
        self._notes = len(source.notes)


FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 15.0
SOUND_S = 10.0  # a connection that held for so long starts the waits anew
Item = TypeVar("Item")


def every_frame(source: Source) -> LoopFrames:
    """Each frame in turn, as fast as they are taken; nothing is dropped. A thread reads a few
    frames ahead.

    Raises:
        SourceError: as the source raises, after the frames that it gave.
    """
    return _read_in_thread(source, FrameQueue(EVERY), paced=False)


def joined(frames: LoopFrames) -> LoopFrames:
    """The same frames. Each one may share an engine call with the next."""
    held: LoopFrame | None = None
    with closing(frames):
        try:
            for frame in frames:
                if held is not None:
                    both = held.record.outcome == frame.record.outcome == "shown"
                    held.batch_with_next = both
                    yield held
                held = frame
        except SightlineError:  # what came before it is good
            if held is not None:
                yield held
            raise
        if held is not None:
            yield held


def latest_frames(source: Source, paced: bool) -> LoopFrames:
    """The newest frame whenever one is asked for; frames that came and went unseen are recorded as
    dropped.

    Args:
        source: read in a thread of its own.
        paced: hold each frame back until its timestamp, so that a file plays at its own pace.

    Raises:
        SourceError: as the source raises, after the frames that it gave.
    """
    return _read_in_thread(source, FrameQueue(LATEST), paced)


def _read_in_thread(source: Source, frame_queue: FrameQueue, paced: bool) -> LoopFrames:
    def read() -> None:
        start_ns = time.monotonic_ns()
        try:
            for frame in source:
                if paced:
                    frame_queue.closed.wait(
                        max(0.0, frame.pts_s - (time.monotonic_ns() - start_ns) / NS)
                    )
                if not frame_queue.put(
                    replace(frame, captured_ns=time.monotonic_ns()) if paced else frame
                ):
                    return
            frame_queue.end(None)
        except Exception as error:  # handed to the loop, which raises it where it can be dealt with
            frame_queue.end(error)

    reader = threading.Thread(target=read, name=f"read {source.name}", daemon=True)
    reader.start()
    try:
        yield from frame_queue.frames()
    finally:
        frame_queue.close()
        reader.join(timeout=2.0)


def ahead(
    items: Iterator[Item],
    count: int,
    bytes_of: Callable[[Item], int] = lambda _: 0,
    most_bytes: int = AHEAD_BYTES,
) -> Generator[Item, None, None]:
    """The items, which a thread takes up to ``count`` ahead. Leaving early closes them, if they are
    a generator.

    Args:
        items: anything.
        count: how many may wait.
        bytes_of: what an item takes; the next one is taken only while those that wait take less
            than ``most_bytes``.
        most_bytes: see there.

    Raises:
        Exception: as the items raise, after those before.
    """
    waiting, changed = deque[Item](), threading.Condition()
    ended = False
    left = False
    failure = list[Exception]()

    def has_room() -> bool:
        return left or (len(waiting) < count and sum(map(bytes_of, waiting)) < max(1, most_bytes))

    def take() -> None:
        nonlocal ended
        try:
            for item in items:
                with changed:
                    waiting.append(item)
                    changed.notify_all()
                    changed.wait_for(has_room)
                    if left:
                        break
                del item  # it may be large
        except Exception as error:  # handed to whoever takes the items
            failure.append(error)
        finally:
            if isinstance(items, Generator):
                items.close()
            with changed:
                ended = True
                changed.notify_all()

    reader = threading.Thread(target=take, name="read ahead", daemon=True)
    reader.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: waiting or ended)
                if not waiting:
                    break
                item = waiting.popleft()
                changed.notify_all()
            yield item
            del item
        if failure:
            raise failure[0]
    finally:
        with changed:
            left = True
            changed.notify_all()
        reader.join()


class Feed:
    """Several sources at once, each in a thread of its own; their records come merged, in the order
    of their capture or nearly.

    A camera or network stream that fails, ends or gives nothing for ``options.stall_s`` is opened
    again, after waits that double from ``FIRST_WAIT_S`` to ``LONGEST_WAIT_S``, each shortened by up
    to half at random, so that many viewers of a server that restarts do not come back at the same
    instant. Its frames' numbers and times go on. The other sources do not notice. A file plays
    at its own pace, once, or again where ``repeats`` says so.

    Args:
        specs: see ``realtime.sources.spec.open_source``.
        options: how live ones are opened.
        policy: what becomes of frames that come too fast.
        at_once: see ``FrameQueue``.
        notify: gets a line when a source is lost and when it is back, from that source's thread.

    Attributes:
        repeats: asked at the end of a file: whether it plays again. One that can be read only once
            does not.
    """

    def __init__(
        self,
        specs: Sequence[str],
        options: SourceOptions = USUAL,
        policy: Policy = LATEST,
        at_once: int = 1,
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.connections = [
            Connection(name, shown(spec)) for name, spec in zip(names_of(specs), specs, strict=True)
        ]
        self._specs = list(specs)
        self._options = options
        self._notify = notify
        self.repeats: Callable[[], bool] = lambda: False
        self._frame_queue = FrameQueue(policy, len(specs), at_once)

    @property
    def captured(self) -> dict[str, int]:
        """Frames that came, by source: each of them ends as one record."""
        return {
            each.name: count
            for each, count in zip(self.connections, self._frame_queue.captured, strict=True)
        }

    def frames(self) -> LoopFrames:
        """Open all sources and give their records until all have ended or ``stop`` is called. Once
        only.

        Raises:
            SourceError: none of them could be opened at first, or a file cannot be read.
        """
        readers = [
            threading.Thread(
                target=self._read, args=(place,), name=f"read {each.name}", daemon=True
            )
            for place, each in enumerate(self.connections)
        ]
        for reader in readers:
            reader.start()
        try:
            yield from self._frame_queue.frames()
        finally:
            self._frame_queue.close()
            for reader in readers:
                reader.join(timeout=2.0)

    def stop(self) -> None:
        """End the records soon; frames that wait become dropped ones. May be called from any thread
        or a signal's handler.
        """
        self._frame_queue.stop()

    def left(self) -> list[FrameRecord]:
        """See ``FrameQueue.left``."""
        return self._frame_queue.left()

    def _read(self, place: int) -> None:
        """Read one source until it ends or the run does; this is a reader's thread."""
        connection = self.connections[place]
        try:
            self._keep_reading(place)
            self._frame_queue.end(None)
        except Exception as error:  # handed to the loop, which raises it where it can be dealt with
            connection.state, connection.trouble = "failed", in_words(error)
            if connection.width_px:
                self._frame_queue.end(error)
            else:  # it never gave a frame: what was typed is wrong
                self._frame_queue.abort(error)

    def _keep_reading(self, place: int) -> None:
        """Read, wait, open again, until the run ends; a file is read once.

        Raises:
            SourceError: a file cannot be read, or no source at all could be opened at first.
        """
        connection = self.connections[place]
        series = Series(connection, self._frame_queue, place)
        wait_s = FIRST_WAIT_S
        notes = set[str]()
        kind = kind_of(self._specs[place])
        again = kind.repeats or kind.can_be_cut

        def notify(note: str) -> None:
            if note not in notes:  # another connection says it again
                notes.add(note)
                self._notify(f"{connection.name}: {note}")

        while not self._frame_queue.closed.is_set():
            begun_s, attempt = (
                time.monotonic(),
                Attempt(self._specs[place], self._options, series, notify),
            )
            try:
                attempt.run()
                trouble = f"{connection.spec} ended"
            except Exception as error:  # whatever it is, a camera may get over it
                if not attempt.live:
                    raise
                trouble = in_words(error)
            if not attempt.live and connection.width_px and again and self.repeats():
                continue
            if not attempt.live:
                connection.state = "ended"
                return
            if self._frame_queue.closed.is_set():
                return
            was_live = connection.state == "live"
            connection.state = "waiting"
            connection.trouble = trouble
            if self._none_could_be_opened():
                raise SourceError(trouble)
            if was_live or wait_s == FIRST_WAIT_S:
                self._notify(f"{connection.name}: {trouble}; trying again")
            wait_s = FIRST_WAIT_S if time.monotonic() - begun_s > SOUND_S else wait_s
            self._frame_queue.closed.wait(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(LONGEST_WAIT_S, 2 * wait_s)

    def _none_could_be_opened(self) -> bool:
        """A camera that is dead from the start is waited for only beside others; alone, it is more
        likely a mistake.
        """
        return all(
            each.state in ("waiting", "failed") and not each.width_px for each in self.connections
        )


def names_of(specs: Sequence[str]) -> list[str]:
    """A name for each source, the second of a name with ``_2`` behind it, or the next number that
    no other has.
    """
    names: list[str] = []
    for spec in specs:
        name = name_of(spec)
        others = (name, *(f"{name}_{number}" for number in range(2, len(specs) + 2)))
        names.append(next(other for other in others if other not in names))
    return names
