"""The web application of the page: the addresses that show a run and the ones that change it."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import Depends, FastAPI, HTTPException, Query
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, create_model

from engines.errors import SightlineError
from engines.files import numbered
from engines.text import displayable
from realtime.annotate import Switch, switches
from realtime.event_sinks import Timeline
from realtime.file_sinks import Recording, make_writable
from realtime.session import Session, Shown, labels_in
from realtime.teaching.teacher import Teacher
from realtime.web.bodies import in_words, reader
from realtime.web.guard import refused
from realtime.web.teach import add_teaching

ASSETS = Path(__file__).parent / "assets"
FILES = {
    "/": "index.html",
    "/page.css": "page.css",
    "/page.js": "page.js",
    "/charts.js": "charts.js",
    "/icon.svg": "icon.svg",
    "/timeline.js": "timeline.js",
    "/teach.js": "teach.js",
    "/teach.css": "teach.css",
}
LONGEST_WAIT_S = 10.0
MOST_RECORDINGS = 20
"""Files that the page lists: the last ones."""


Share = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]


class Steering(BaseModel):
    """What a viewer may change besides the look.

    Attributes:
        wanted_class: the name of a class or of boxes, or the index of a class; empty for the
            likeliest.
        min_score: no box that is less sure; ``default`` for the head's own limit.
        point: of the object to follow, in shares of the picture of ``source``.
        source: see there.
    """

    model_config = ConfigDict(extra="forbid")

    wanted_class: str | None = None
    min_score: Share | Literal["default"] | None = None
    point: tuple[Share, Share] | None = None
    source: str | None = None


def _kind_of(switch: Switch) -> Any:
    """The type of a field of ``Look`` in JSON, with its limits."""
    if switch.among:
        return Annotated[str, Field(pattern=f"^({'|'.join(switch.among)})$")]
    if switch.most is None:
        return Annotated[bool, Field(strict=True)]
    limits = Field(strict=True, ge=switch.least, le=switch.most, allow_inf_nan=False)
    return Annotated[float, limits]


_LOOK: dict[str, Any] = {name: (_kind_of(each) | None, None) for name, each in switches().items()}
Changes = create_model("Changes", __base__=Steering, **_LOOK)
"""What a viewer may change: that of ``Steering``, and each field of ``realtime.annotate.Look``."""


class ToRecord(BaseModel):
    """Whether to record.

    Attributes:
        on: see there.
        source: the only one to record; None for all.
    """

    model_config = ConfigDict(extra="forbid")

    on: bool = Field(strict=True)
    source: str | None = None


Count = Annotated[int, Query(ge=0, le=1 << 62)]
Seconds = Annotated[float, Query(ge=0, allow_inf_nan=False)]


def page_app(
    session: Session,
    title: Callable[[], str],
    recordings: Path,
    teacher: Teacher | None = None,
    timeline: Timeline | None = None,
) -> FastAPI:
    """The application.

    Args:
        session: of the run.
        title: says what runs, in words.
        recordings: folder for what is recorded from the page; a viewer never names files.
        teacher: what is taught with; None where the page does not teach.
        timeline: of the run's events; None where none are found.
    """
    app = FastAPI(title="Sightline", docs_url=None, redoc_url=None, openapi_url=None)
    broadcasts = {each.name: Broadcast(session, each.name) for each in session.connections}
    for path, name in FILES.items():
        app.get(path)(_file(ASSETS / name))
    _add_pictures(app, broadcasts)
    teaches = None if teacher is None else "first" if teacher.comes_first else "asked"
    timeline = timeline or Timeline()
    state = partial(_state, session, title, teaches, recordings, timeline)
    _add_steering(app, session, state)
    _add_recordings(app, session, recordings, state)
    _add_events(app, timeline)
    if teacher is not None:
        add_teaching(app, teacher)

    @app.exception_handler(SightlineError)
    async def impossible(_: Any, error: SightlineError) -> Response:
        return refused(400, str(error))

    @app.exception_handler(HTTPException)
    async def unreadable(_: Any, error: HTTPException) -> Response:
        return refused(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Any, error: RequestValidationError) -> Response:
        return refused(422, in_words(error.errors()))

    return app


def _file(path: Path) -> Callable[[], Response]:
    def answer() -> Response:
        return FileResponse(path)

    return answer


def _add_pictures(app: FastAPI, broadcasts: "dict[str, Broadcast]") -> None:
    first = next(iter(broadcasts))

    def broadcast_of(source: str) -> Broadcast:
        if source not in broadcasts:
            raise SightlineError(f"there is no source '{source}': there is {', '.join(broadcasts)}")
        return broadcasts[source]

    @app.get("/frame.jpg")
    async def frame(source: str = first, after: Count = 0, wait_s: Seconds = 2.0) -> Response:
        """The newest picture once it is another than ``after``: who asks for the next when it has
        shown the last never lags.
        """
        shown = await broadcast_of(source).newer(after, min(max(wait_s, 0.0), LONGEST_WAIT_S))
        if shown is None:
            return Response(status_code=204)
        about = {
            "X-Number": str(shown.number),
            "X-Frame": str(shown.record.frame.index),
            "X-Seen": json.dumps(labels_in(shown.record)),
        }
        return Response(shown.jpeg, media_type="image/jpeg", headers=about)

    @app.get("/snapshot.jpg")
    async def snapshot(source: str = first) -> Response:
        """The next picture, as a file; 503 where none comes."""
        shown = await broadcast_of(source).newer(0, LONGEST_WAIT_S)
        if shown is None:
            return JSONResponse({"error": f"{source} gives no pictures now"}, 503)
        name = (
            f"{source}-{shown.record.frame.index}.jpg".encode("ascii", "replace")
            .decode()
            .replace('"', "_")
        )
        return Response(
            shown.jpeg,
            media_type="image/jpeg",
            headers={"Content-Disposition": f'inline; filename="{name}"'},
        )

    @app.get("/live.mjpg")
    async def motion(source: str = first) -> Response:
        """Motion JPEG, for other programs."""
        kind = f"multipart/x-mixed-replace; boundary={BOUNDARY}"
        return StreamingResponse(broadcast_of(source).multipart(), media_type=kind)


def _add_steering(app: FastAPI, session: Session, state: Callable[[], dict[str, Any]]) -> None:
    @app.get("/state")
    def told() -> dict[str, Any]:
        return state()

    @app.get("/classes")
    def classes() -> list[str]:
        """What can be looked for: the names of boxes, and then the classes."""
        return list(dict.fromkeys((*session.names, *session.class_names)))

    @app.post("/settings")
    def settings(changes: Annotated[Steering, Depends(reader(Changes))]) -> dict[str, Any]:
        given = changes.model_dump(exclude_unset=True, exclude_none=True)
        if "wanted_class" in given:
            wanted = given.pop("wanted_class").strip()
            given["class_index"] = session.index_of(wanted) if wanted else None
        if given.get("min_score") == "default":
            given["min_score"] = None
        source, point = given.pop("source", None), given.pop("point", None)
        if source is not None and point is None:
            raise SightlineError("a source is named, but no point in it")
        if point is not None:  # all that can be refused comes before anything is changed
            session.select(source, point)
        if given:
            session.change(**given)
        return state()


def _add_recordings(
    app: FastAPI, session: Session, recordings: Path, state: Callable[[], dict[str, Any]]
) -> None:
    given: set[str] = set()

    @app.post("/recording", response_model=None)
    def recording(wanted: Annotated[ToRecord, Depends(reader(ToRecord))]) -> Any:
        """Begin or end the page's own recording; what the run was told to record goes on."""
        known = [each.name for each in session.connections]
        if wanted.source is not None and wanted.source not in known:
            raise SightlineError(
                f"there is no source '{wanted.source}': there is {', '.join(known)}"
            )
        if wanted.on and session.settings.page_recording is None:
            try:
                make_writable(recordings / "sightline.mp4")
            except SightlineError as error:
                return refused(409, str(error))
            names = numbered(time.strftime("sightline-%Y%m%d-%H%M%S"))
            name = next(
                each
                for each in names
                if each not in given and not list(recordings.glob(f"{each}*.mp4"))
            )
            given.add(name)
            path = recordings / f"{name}.mp4"
            session.change(page_recording=Recording(path, wanted.source))
        elif not wanted.on:
            session.change(page_recording=None)
        return state()

    @app.get("/recordings/{name}", response_model=None)
    def recorded(name: str) -> Any:
        """A file of a recording of this page; parts of it, too, as players ask for them."""
        for each in session.recorded:
            if each.path.parent == recordings and each.path.name == name and each.path.is_file():
                return FileResponse(each.path, media_type="video/mp4")
        return refused(404, f"there is no recording {name}")


def _add_events(app: FastAPI, timeline: Timeline) -> None:
    @app.get("/events")
    def events(source: str) -> dict[str, Any]:
        """The last ``events`` of a source, the oldest first, and the time, ``now_at``."""
        now_at = datetime.now(UTC).isoformat("T", "milliseconds")
        return {"now_at": now_at, "events": timeline.rows(source)}

    def picture(source: str, event: Count, whole: bool) -> Response:
        found = timeline.pictures(source, event)
        if found is None:
            return refused(404, f"there is no event {event} of {source} any more")
        return Response(found[whole], media_type="image/jpeg")

    @app.get("/events/thumbnail.jpg")
    def thumbnail(source: str, event: Count) -> Response:
        """The part of the frame that shows it best."""
        return picture(source, event, whole=False)

    @app.get("/events/picture.jpg")
    def whole(source: str, event: Count) -> Response:
        """That frame, with its boxes."""
        return picture(source, event, whole=True)


def _state(
    session: Session,
    title: Callable[[], str],
    teaches: str | None,
    recordings: Path,
    timeline: Timeline,
) -> dict[str, Any]:
    """Everything but pictures: ``title``, ``sources``, ``all``, ``settings``, ``recording`` (of the
    page), ``recordings`` (the files of the run), ``events`` (another number where there are new
    ones), ``follows`` (a click says what), ``teaches`` (None where it does not, ``first`` where
    that comes first).
    """
    rolling, now = session.rolling(), session.settings
    figures = rolling.pop("sources")
    sources = [
        {
            **vars(each),
            **figures.get(each.name, {}),
            "objects": session.objects(each.name),
        }
        for each in session.connections
    ]
    known = (*session.class_names, *session.names)
    wanted = None if now.class_index is None else known[now.class_index]
    settings = {
        "wanted_class": wanted,
        "min_score": now.min_score,
        **{name: getattr(now, name) for name in switches()},
    }
    under_way = [each for each in (now.recording, now.page_recording) if each is not None]
    recorded = [
        {
            "name": displayable(each.path.name),
            "source": each.source,
            "on": each.recording in under_way,
            "link": f"recordings/{quote(each.path.name)}"
            if each.path.parent == recordings
            else None,
        }
        for each in session.recorded
    ]
    return {
        "title": title(),
        "sources": sources,
        "all": rolling,
        "settings": settings,
        "limits": asdict(session.limits) if session.limits else None,
        "recording": now.page_recording is not None,
        "recordings": recorded[-MOST_RECORDINGS:],
        "events": timeline.version,
        "trouble": session.trouble,
        "follows": session.following is not None,
        "teaches": teaches,
    }


IDLE_S = 3.0
WAIT_S = 0.5
BOUNDARY = "picture"


class Broadcast:
    """The newest picture of one source. Its coroutines belong to one event loop.

    Nothing is queued for anyone: who comes late gets the newest picture and never sees those
        between, so a slow viewer costs
    what it takes. While nobody asks, the thread is gone, and the loop does not even draw.
    """

    def __init__(self, session: Session, source: str) -> None:
        self._session, self._source = session, source
        self._shown: Shown | None = None
        self._waiting: set[asyncio.Future[None]] = set()
        self._asked_s, self._running = 0.0, False

    async def newer(self, than: int, timeout_s: float) -> Shown | None:
        """The newest picture as soon as its number differs from ``than``, its JPEG made; None when
        the time is up.
        """
        loop, end_s = asyncio.get_running_loop(), time.monotonic() + timeout_s
        while True:
            self._asked_s = time.monotonic()
            if self._session.closed.is_set():
                return None
            if not self._running:
                self._start(loop)
            elif self._shown is not None and self._shown.number != than:
                return self._shown
            waiter = loop.create_future()
            self._waiting.add(waiter)
            try:
                await asyncio.wait_for(waiter, end_s - time.monotonic())
            except TimeoutError:
                return None
            finally:
                self._waiting.discard(waiter)

    async def multipart(self) -> AsyncIterator[bytes]:
        """Motion JPEG as long as the run goes on, ``multipart/x-mixed-replace``. Who does not read
        is waited for here.
        """
        number = 0
        while not self._session.closed.is_set():
            shown = await self.newer(number, IDLE_S)
            if shown is not None:
                number = shown.number
                head = (
                    f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length:"
                    f" {len(shown.jpeg)}\r\n\r\n"
                )
                yield head.encode() + shown.jpeg + b"\r\n"

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._running, self._shown = True, None  # what was kept from earlier is old
        threading.Thread(
            target=self._run, args=(loop,), name=f"encode {self._source}", daemon=True
        ).start()

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        """The thread."""
        newest = self._session.newest(self._source)
        number = newest.number if newest else 0  # drawn when somebody last looked, perhaps long ago
        try:
            while time.monotonic() - self._asked_s < IDLE_S and not self._session.closed.is_set():
                shown = self._session.wait_newer(self._source, number, WAIT_S)
                if shown is not None:
                    number = shown.number
                    _ = shown.jpeg  # encoded here, once
                    loop.call_soon_threadsafe(self._publish, shown)
            loop.call_soon_threadsafe(self._ended)
        except RuntimeError:
            return  # the event loop has been closed

    def _publish(self, shown: Shown) -> None:
        self._shown = shown
        self._wake()

    def _ended(self) -> None:
        self._running = False
        self._wake()  # somebody may have come in the meantime: they start it anew

    def _wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
