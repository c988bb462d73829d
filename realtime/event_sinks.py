"""What becomes of events while a run goes on: a file of them, a command, an address that is told,
an MQTT broker. None of them holds the frame loop up.
"""

import json
import os
import shlex
import subprocess
import threading
import urllib.error
import urllib.request
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import cv2

from engines.errors import EngineError, InputError, install_extra
from engines.localizer import ImageBgr
from engines.text import displayable, in_words, shown
from realtime.annotate import draw, jpeg_of
from realtime.event_clips import EventClips
from realtime.events import Change, Event, EventFinder, EventRules, summed_up, thumbnail
from realtime.file_sinks import JsonlSink
from realtime.frames import FrameRecord

MOST_EVENTS = 100
"""In a summary; the file of events has all."""
MOST_WAITING = 1000
"""Messages, while the receiver is away. The oldest make way, and that is said."""
GRACE_S = 5.0
"""So long a run that ends waits for messages that are not delivered yet."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
REPLY_S, COMMAND_S = 10.0, 60.0
SNAPSHOT_WIDTH_PX, SNAPSHOT_QUALITY, PICTURE_QUALITY = 960, 95, 80
STILL_IN_VIEW_S = 0.5
"""What was not found for so long is not in view now; its event may go on, see ``EventRules``."""
MOST_SIGHTINGS = 50
"""Events of a source that the page lists; each keeps some 70 kB."""
Message = dict[str, Any]


class DeliveryError(Exception):
    """A message was not taken.

    Attributes:
        again: it may be taken later.
    """

    def __init__(self, reason: str, again: bool) -> None:
        super().__init__(reason)
        self.again = again


class Receiver(Protocol):
    """Whoever is told of events."""

    def deliver(self, message: Message) -> None:
        """Hand over one message, and wait until it is taken.

        Raises:
            DeliveryError: it was not taken.
        """

    def close(self) -> None:
        """Let go of connections."""


class Webhook:
    """An address that gets each message as JSON by POST.

    The header ``Idempotency-Key`` is the message's ``id``: where an answer is lost on its way the
    message comes again, and by the key the receiver knows it.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def deliver(self, message: Message) -> None:
        """See ``Receiver.deliver``."""
        request = urllib.request.Request(
            self._url,
            json.dumps(message).encode(),
            {"Content-Type": "application/json", "Idempotency-Key": message["id"]},
            method="POST",
        )
        try:
            urllib.request.urlopen(request, timeout=REPLY_S).close()
        except urllib.error.HTTPError as error:
            error.close()
            later = error.code >= 500 or error.code in (408, 425, 429)
            raise DeliveryError(f"it answers {error.code} {error.reason}", later) from error
        except (OSError, urllib.error.URLError) as error:
            raise DeliveryError(in_words(error), True) from error

    def close(self) -> None:
        """See ``Receiver.close``."""


class Command:
    """A command that is run for each message, which it reads as JSON from its standard input."""

    def __init__(self, command: str) -> None:
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise InputError(f"'{command}' is no command: {error}", option="on_event") from error

    def deliver(self, message: Message) -> None:
        """See ``Receiver.deliver``. A command that fails is not run again."""
        keys = ("change", "name", "source")
        told = {f"SIGHTLINE_{key.upper()}": str(message[key]) for key in keys}
        try:
            done = subprocess.run(
                self._words,
                input=json.dumps(message).encode(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=COMMAND_S,
                check=False,
                env={**os.environ, **told},
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DeliveryError(in_words(error), False) from error
        if done.returncode:
            words = done.stderr.decode(errors="replace").strip().splitlines()
            reason = f": {words[-1]}" if words else ""
            raise DeliveryError(f"it ended with status {done.returncode}{reason}", False)

    def close(self) -> None:
        """See ``Receiver.close``."""


class Broker:
    """An MQTT broker: ``mqtt[s]://[USER:PASSWORD@]HOST[:PORT]/TOPIC``, each message at least once
    (QoS 1).
    """

    def __init__(self, url: str) -> None:
        try:
            from paho.mqtt.client import Client  # an extra
            from paho.mqtt.enums import CallbackAPIVersion
        except ImportError as error:
            raise EngineError(
                f"an MQTT broker needs paho-mqtt: {install_extra('mqtt')}", option="on_event"
            ) from error
        parts = urlsplit(url)
        self._topic = unquote(parts.path.lstrip("/"))
        if not parts.hostname or not self._topic or set("+#") & set(url):
            raise InputError(
                f"{shown(url)} is no topic of a broker: mqtt://HOST/TOPIC", option="on_event"
            )
        secure = parts.scheme == "mqtts"
        name = f"sightline-{uuid4().hex[:12]}"
        self._client = Client(CallbackAPIVersion.VERSION2, name)
        if secure:
            self._client.tls_set()
        if parts.username:
            self._client.username_pw_set(unquote(parts.username), unquote(parts.password or ""))
        self._client.on_publish = lambda _, __, number, *___: self._enter(number)
        self._client.reconnect_delay_set(1, int(LONGEST_PAUSE_S))
        self._client.connect_async(parts.hostname, parts.port or (8883 if secure else 1883))
        self._taken: set[int] = set()
        self._changed = threading.Condition()
        self._id = ""
        self._number = 0
        self._client.loop_start()

    def deliver(self, message: Message) -> None:
        """See ``Receiver.deliver``. What was handed to the client is not handed over again: it
        sends by itself once the broker is back.
        """
        if self._id != message["id"]:
            self._number = self._client.publish(self._topic, json.dumps(message), qos=1).mid
            self._id = message["id"]
        with self._changed:
            self._changed.wait_for(lambda: self._number in self._taken, REPLY_S)
            if self._number not in self._taken:
                raise DeliveryError("the broker has not taken it", True)
            self._taken.clear()

    def _enter(self, number: int) -> None:
        """The broker has taken a message."""
        with self._changed:
            self._taken.add(number)
            self._changed.notify()

    def close(self) -> None:
        """See ``Receiver.close``."""
        self._client.disconnect()
        self._client.loop_stop()


def receiver_of(text: str) -> Receiver:
    """Who is told: an address of http, https or mqtt, or else a command.

    Raises:
        InputError: it is none of them.
        EngineError: a package for it is not installed.
    """
    scheme = text.partition("://")[0].lower()
    if scheme in ("http", "https"):
        return Webhook(text)
    if scheme in ("mqtt", "mqtts"):
        return Broker(text)
    if not text.strip() or "://" in text.split(maxsplit=1)[0]:
        raise InputError(
            f"'{shown(text)}' cannot be told of events: give a command, or an address of http,"
            " https or mqtt",
            option="on_event",
        )
    return Command(text)


class Notifier:
    """A thread that hands messages to a receiver in their order, and tries again while the receiver
    is away.

    Args:
        receiver: is told.
        what: it is called in notices.
        notify: gets a line where something is not delivered.
    """

    def __init__(self, receiver: Receiver, what: str, notify: Callable[[str], None]) -> None:
        self._receiver = receiver
        self._what = what
        self._notify = notify
        self._waiting: deque[Message] = deque()
        self._changed = threading.Condition()
        self._ending = False
        self._stopped = threading.Event()
        self._away = False
        self._thread = threading.Thread(target=self._work, name="events", daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        """Have a message delivered later. This never waits."""
        with self._changed:
            if len(self._waiting) >= MOST_WAITING:
                self._waiting.popleft()
                self._notify(f"{self._what} is away for too long: an event is lost")
            self._waiting.append(message)
            self._changed.notify()

    def close(self) -> None:
        """Wait up to ``GRACE_S`` for what is not delivered, and say what is left."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join(GRACE_S)
        self._stopped.set()
        left = len(self._waiting)
        if left:
            self._notify(f"{self._what} was not told of the last {left} changes")
        self._receiver.close()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._ending:
                        return
                    self._changed.wait()
                message = self._waiting[0]
            if not self._delivered(message):
                return
            with self._changed:
                if self._waiting and self._waiting[0] is message:
                    self._waiting.popleft()

    def _delivered(self, message: Message) -> bool:
        """Try until it is taken or refused; false where the run has ended before."""
        pause_s = FIRST_PAUSE_S
        while not self._stopped.is_set():
            try:
                self._receiver.deliver(message)
            except Exception as error:  # of any kind: the thread must go on with the next one
                if not (isinstance(error, DeliveryError) and error.again):
                    self._notify(f"{self._what} did not take an event: {in_words(error)}")
                    return True
                if not self._away:
                    self._notify(
                        f"{self._what} does not take events: {in_words(error)}; it is tried again"
                    )
                self._away = True
                self._stopped.wait(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                continue
            if self._away:
                self._notify(f"{self._what} takes events again")
            self._away = False
            return True
        return False


@dataclass
class Sighting:
    """An event of a timeline.

    Attributes:
        row: see ``Event.row``, with times of the day and ``in_view``.
        best: the frame that shows it best; None once it has ended.
        thumbnail, picture: JPEGs of that frame, once it has ended.
    """

    row: dict[str, Any]
    best: FrameRecord | None
    thumbnail: bytes = b""
    picture: bytes = b""


class Timeline:
    """The last events of each source, with a picture of each, for the page. The frame loop writes,
    any thread reads. Of an event that goes on, its best frame is held; pictures are made of it
    where somebody asks for one, and when it ends.

    Attributes:
        version: another number whenever there is something new to read.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._best: dict[str, dict[int | str, FrameRecord]] = {}
        self._sightings: dict[str, dict[int, Sighting]] = {}
        self.version = 0

    def add(
        self, record: FrameRecord, in_view: Sequence[Event], row_of: Callable[[Event], Message]
    ) -> None:
        """Take note of what is in view in a frame, as a log counts it."""
        source = record.frame.source
        last = self._best.get(source, {})
        best = {
            each.key: record
            if each.best_frame == record.frame.index
            else last.get(each.key, record)
            for each in in_view
        }
        now_s = record.frame.pts_s
        found = {
            each.number: Sighting(
                {**row_of(each), "in_view": now_s - each.end_s <= STILL_IN_VIEW_S}, best[each.key]
            )
            for each in in_view
            if each.number
        }
        with self._lock:
            self._best[source] = best
            kept = self._sightings.setdefault(source, {})
            for number, new in found.items():
                old = kept.get(number)
                same = old is not None and old.best is new.best
                if not (same and old and old.row["in_view"] == new.row["in_view"]):
                    self.version += 1
                kept[number] = new

    def end(self, event: Event, row: Message) -> None:
        """An event is over: from now on it has its pictures, and not the frame any more."""
        with self._lock:
            found = self._sightings.get(event.source, {}).get(event.number)
        if found is None:
            return
        pictures = self._pictures(found)
        with self._lock:
            kept = self._sightings[event.source]
            kept[event.number] = Sighting({**row, "in_view": False}, None, *pictures)
            while len(kept) > MOST_SIGHTINGS:
                del kept[min(kept)]
            self.version += 1

    def rows(self, source: str) -> list[Message]:
        """The events of a source, the oldest first; ``in_view`` says which are in view now."""
        with self._lock:
            return [each.row for _, each in sorted(self._sightings.get(source, {}).items())]

    def pictures(self, source: str, number: int) -> tuple[bytes, bytes] | None:
        """(the part of the best frame around it, that whole frame with its boxes) of an event, as
        JPEGs; None where there is no such event, or not any more.
        """
        with self._lock:
            found = self._sightings.get(source, {}).get(number)
        return None if found is None else self._pictures(found)

    def _pictures(self, found: Sighting) -> tuple[bytes, bytes]:
        if found.best is None:
            return found.thumbnail, found.picture
        x0, y0, x1, y1 = found.row["box"]
        part = thumbnail(found.best.frame.image_bgr, (x0, y0, x1, y1))
        return b64decode(part), snapshot_of(found.best, PICTURE_QUALITY)


class EventSink:
    """A sink that finds events, writes each to a file when it has ended, and tells a receiver when
    one begins and when it ends.

    Args:
        rules: of each source, by name.
        path: of the file; None for none.
        notifier: is told; None for none.
        live: the file is written in its place and goes on behind what is there; times of the day
            stand in its lines.
        clips: has a clip written of each event, whose file its last line names; None for none.
        timeline: is kept for the page; None for none.

    Raises:
        OutputError: the file cannot be written, or is no such file.
    """

    needs_picture = False

    def __init__(
        self,
        rules: Mapping[str, EventRules],
        path: Path | None = None,
        notifier: Notifier | None = None,
        live: bool = False,
        clips: EventClips | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self._timeline = timeline
        self._clips = clips
        self._photos = {name for name, each in rules.items() if each.photos}
        self._finders = {name: EventFinder(each) for name, each in rules.items()}
        self._file = JsonlSink(path, live=live) if path is not None else None
        self._notifier = notifier
        self._live = live
        self._run = uuid4().hex[:12]
        self._now_s: dict[str, float] = {}
        self._events: deque[Event] = deque(maxlen=MOST_EVENTS)
        self._count = 0

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``."""
        source = record.frame.source
        if record.outcome != "shown":
            return
        self._now_s[source] = record.frame.pts_s
        finder = self._finders[source]
        for change in finder.add(record.row()):
            self._take(change, record)
        if self._timeline is not None:
            self._timeline.add(record, finder.in_view, self._line)

    def summary(self) -> dict[str, Any]:
        """``events``, the last ones, ``seen``, which sums them up, and ``event_count``."""
        rows = [event.row() for event in self._events]
        return {"events": rows, "seen": summed_up(rows), "event_count": self._count}

    def _take(self, change: Change, record: FrameRecord | None) -> None:
        what, event = change
        line = self._line(event)
        if what == "began":
            self._events.append(event)
            self._count += 1
        if what == "ended" and self._timeline is not None:
            self._timeline.end(event, line)
        if self._clips is not None and event.source not in self._photos:
            if what == "began":
                self._clips.begin(event)
            else:
                clip = self._clips.end(event)
                line["clip"] = None if clip is None else displayable(str(clip))
        if what == "ended" and self._file is not None:
            self._file.write_row(line)
        if self._notifier is not None:
            message = {"id": f"{self._run}-{event.source}-{event.number}-{what}", "change": what}
            snapshot = {}
            if record is not None and what == "began":
                snapshot = {"jpeg": b64encode(snapshot_of(record, SNAPSHOT_QUALITY)).decode()}
            self._notifier.send({**message, **line, **snapshot})

    def _line(self, event: Event) -> Message:
        return {**event.row(), **(self._times(event) if self._live else {})}

    def _times(self, event: Event) -> dict[str, str]:
        """When it began and was in view last, as times of the day."""
        now = datetime.now(UTC)
        now_s = self._now_s[event.source]
        return {
            f"{name}_at": (now - timedelta(seconds=now_s - then_s)).isoformat("T", "milliseconds")
            for name, then_s in (("begin", event.begin_s), ("end", event.end_s))
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            for finder in self._finders.values():
                for change in finder.end():
                    self._take(change, None)
        finally:
            if self._notifier is not None:
                self._notifier.close()
            if self._file is not None:
                self._file.__exit__(kind, error, trace)


def snapshot_of(record: FrameRecord, quality: int) -> bytes:
    """A frame with what was found drawn on it, as a JPEG, at most ``SNAPSHOT_WIDTH_PX`` wide."""
    assert record.found is not None
    picture = draw(record.frame.image_bgr, record.found, objects=record.objects or ())
    height, width = picture.shape[:2]
    if width > SNAPSHOT_WIDTH_PX:
        size = SNAPSHOT_WIDTH_PX, max(1, round(height * SNAPSHOT_WIDTH_PX / width))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    return jpeg_of(picture, quality)
