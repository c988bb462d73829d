"""Serving over HTTP from a thread of its own, behind the guard, for as long as a run goes on: the
page, and the metrics.
"""

import asyncio
import ipaddress
import logging
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from rich.text import Text

from engines.errors import EngineError, OutputError, install_extra
from engines.localizer import ImageBgr
from realtime.event_sinks import Timeline
from realtime.frames import FrameRecord
from realtime.session import Session

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from realtime.session import Session
    from realtime.teaching.teacher import Teacher
if TYPE_CHECKING:
    from fastapi import FastAPI
    from prometheus_client import CollectorRegistry

LOCAL = "127.0.0.1"
SEND_BUFFER_BYTES = 1 << 17
"""For each viewer: what lies in the system's own buffer is late; the usual megabytes would be
seconds of a slow line.
"""
CLOSING_S = 3.0
ANOTHER_PORT = 8001
BACKLOG = 32
"""Connections that are taken at a time, before any of them is counted."""


@dataclass(frozen=True)
class Address:
    """Where to listen.

    Attributes:
        host: a name or address of this machine.
        port: 0 for any that is free.
    """

    host: str = LOCAL
    port: int = 8000

    @classmethod
    def of(cls, text: str) -> Self:
        """Read ``[HOST:]PORT``; IPv6 addresses in brackets.

        Raises:
            OutputError: it is something else.
        """
        host, _, port = text.strip().rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise OutputError(
                f"'{text}' is no address: write PORT or HOST:PORT, like 8000 or 0.0.0.0:8000",
                option="web",
            )
        return cls(host or LOCAL, int(port))

    @property
    def is_loopback(self) -> bool:
        """Whether nobody but this machine reaches it."""
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except OSError:
            return False
        return all(
            str(entry[4][0]) == "::1" or str(entry[4][0]).startswith("127.") for entry in found
        )

    @property
    def is_everywhere(self) -> bool:
        """Whether it stands for all addresses of this machine, as 0.0.0.0 and :: do. It is no
        address that a browser opens.
        """
        try:
            return ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return False

    @property
    def beyond(self) -> list[str]:
        """The addresses at which other machines reach this one, the likeliest first."""
        if self.is_loopback:
            return []
        if not self.is_everywhere:
            return [self.host]
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        found = [_way_out(family)]
        with suppress(OSError):
            named = socket.getaddrinfo(socket.gethostname(), None, family)
            found += [str(entry[4][0]) for entry in named]
        return [each for each in dict.fromkeys(filter(None, found)) if _is_reached(each)]


DOCUMENTATION = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
"""Addresses that nobody has (RFC 5737, RFC 3849)."""


def _way_out(family: socket.AddressFamily) -> str:
    """The address on the network that leads to other machines; empty where there is none.
    Connecting a datagram socket chooses a way, and sends nothing.
    """
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as asked:
        asked.connect((DOCUMENTATION[family], 9))
        return str(asked.getsockname()[0])
    return ""


def _is_reached(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:  # of one interface alone
        return False
    return not (found.is_loopback or found.is_link_local or found.is_unspecified)


def qr_code(url: str, most_columns: int) -> Text | None:
    """A QR code for a terminal, which a phone reads whatever colours the terminal has; None where
    it is too wide, or segno is not installed.
    """
    try:
        import segno  # an extra
    except ImportError:
        return None
    code, lines = segno.make_qr(url, error="l"), StringIO()
    code.terminal(lines, compact=True, border=2)
    if code.symbol_size(border=2)[0] > most_columns:
        return None
    return Text(lines.getvalue().strip("\n"), "bright_white on black", no_wrap=True)


class GuardedServer:
    """An application behind ``Guard``, served in the ``with`` block. Every address that Sightline
    listens on is one of these.

    Args:
        app: what is served.
        address: where to listen.
        token: who has it may look; None for none on this machine alone, and for a new one
            elsewhere.
        failed: gets what ended a request that should have been answered.
        option: the command line's, which messages name.
        most: connections at a time; None for what the limit of open files allows.
        request_s: until a whole request must be here.

    Raises:
        ImportError: FastAPI or uvicorn are not installed.
        OutputError: the address cannot be listened on, or the token cannot be written in an
            address.

    Attributes:
        port: that it listens on.
        url: to open in a browser on this machine, with the token where there is one.
        urls_beyond: to open on other machines, the likeliest first.
    """

    def __init__(
        self,
        app: "ASGIApp",
        address: Address,
        token: str | None = None,
        failed: Callable[[Exception], None] = lambda _: None,
        option: str = "web",
        most: int | None = None,
        request_s: float = 10.0,
    ) -> None:
        import uvicorn

        from realtime.web.guard import Guard, Limits, most_connections

        token = token or (None if address.is_loopback else secrets.token_urlsafe(16))
        if token is not None and not token.isprintable():
            raise OutputError(
                "the token holds characters that cannot be typed; choose letters and digits",
                option="web_token",
            )
        self._socket = _listening(address, option)
        self.port: int = self._socket.getsockname()[1]
        # No access log: a line for every picture. No "Server" header: nobody needs to know.
        protocol: Any = Limits(most or most_connections(), request_s).protocol
        config = uvicorn.Config(
            Guard(app, token, self.port, failed),
            http=protocol,
            log_config=None,
            log_level=logging.CRITICAL + 1,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            backlog=BACKLOG,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name=option, daemon=True)
        here = (
            ("[::1]" if ":" in address.host else LOCAL) if address.is_everywhere else address.host
        )
        self.url = self._url_at(here, token)
        self.urls_beyond = [self._url_at(each, token) for each in address.beyond]

    def _url_at(self, host: str, token: str | None) -> str:
        host = f"[{host}]" if ":" in host and not host.startswith("[") else host
        return f"http://{host}:{self.port}/" + (f"?token={quote(token, safe='')}" if token else "")

    def _run(self) -> None:
        """The thread."""
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, __: None
        )  # broken connections, no free file descriptors
        await self._server.serve([self._socket])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.should_exit = self._server.force_exit = (
            True  # viewers never leave by themselves
        )
        self._thread.join(timeout=CLOSING_S)
        self._socket.close()


class PageServer(GuardedServer):
    """The page, served in its ``with`` block.

    Args:
        session: of the run.
        title: says what runs, in words.
        address: see ``GuardedServer``.
        token: likewise.
        recordings: folder for what is recorded from the page.
        teacher: what the page teaches with; None where it does not.
        timeline: of the run's events; None where none are found.

    Raises:
        EngineError: FastAPI or uvicorn are not installed.
        OutputError: see ``GuardedServer``.
    """

    def __init__(
        self,
        session: "Session",
        title: Callable[[], str],
        address: Address,
        token: str | None = None,
        recordings: Path = Path(),
        teacher: "Teacher | None" = None,
        timeline: Timeline | None = None,
    ) -> None:
        try:
            from realtime.web.app import page_app

            app = page_app(session, title, recordings, teacher, timeline)
            super().__init__(app, address, token, session.page_failed)
        except ImportError as error:
            raise EngineError(
                f"the page needs FastAPI and uvicorn: {install_extra('web')}", option="web"
            ) from error


def _listening(address: Address, option: str) -> socket.socket:
    try:
        family = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((address.host, address.port), family=family)
    except OSError as error:
        where = f"{address.host}:{address.port}"
        raise OutputError(
            f"cannot listen on {where}: {error.strerror or error}; choose another port, such as"
            f" {ANOTHER_PORT}",
            option=option,
        ) from error
    listening.setsockopt(
        socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES
    )  # connections inherit it
    return listening


BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.033, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class MetricsSink:
    """Serves ``/metrics`` and ``/snapshot.jpg`` (``?source=NAME`` for one of several) on this
    machine while it is entered.

    ``sightline_frames_total`` by source, outcome and cause; ``sightline_stage_seconds`` by source
    and stage; ``sightline_age_seconds`` from capture to display and ``sightline_latency_seconds``
    from the start of reading, by source; ``sightline_reconnects_total`` and ``sightline_up`` by
    source; ``sightline_objects``, of several that are followed; ``sightline_page_errors_total``,
    requests here and to the page that ended by a defect of Sightline.

    Args:
        port: 0 for any free one; see ``port``.
        session: of the run.
        token: who has it may look (``Authorization: Bearer``); None for everyone on this machine.

    Raises:
        OutputError: FastAPI, uvicorn or prometheus-client is missing, or the port is taken.

    Attributes:
        port: that it listens on.
    """

    needs_picture = False

    def __init__(self, port: int, session: Session, token: str | None = None) -> None:
        try:
            import fastapi  # noqa: F401
            import prometheus_client as prometheus
            import uvicorn  # noqa: F401
        except ImportError as error:
            raise OutputError(
                f"metrics need FastAPI, uvicorn and prometheus-client: {install_extra('web')}",
                option="metrics",
            ) from error
        registry = prometheus.CollectorRegistry()
        self._frames = prometheus.Counter(
            "sightline_frames", "Frames", ["source", "outcome", "cause"], registry=registry
        )
        self._stages, self._age, self._latency = (
            prometheus.Histogram(
                f"sightline_{name}_seconds", text, labels, buckets=BUCKETS_S, registry=registry
            )
            for name, text, labels in (
                ("stage", "Time of a stage", ["source", "stage"]),
                ("age", "Capture to display", ["source"]),
                ("latency", "Start of reading to display", ["source"]),
            )
        )
        self._objects = prometheus.Gauge(
            "sightline_objects", "Objects followed", ["source"], registry=registry
        )
        registry.register(_Connections(session))
        self._server = GuardedServer(
            _application(registry, session),
            Address(port=port),
            token,
            session.page_failed,
            "metrics",
        )
        self.port = self._server.port

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``."""
        source = record.frame.source
        cause = (
            record.cause if record.outcome == "dropped" else ""
        )  # a failure's words differ from time to time
        self._frames.labels(source, record.outcome, cause).inc()
        if record.objects is not None:
            self._objects.labels(source).set(len(record.objects))
        if record.outcome == "shown":
            for stage, value in record.stages_ms.items():
                self._stages.labels(source, stage).observe(value / 1e3)
            self._age.labels(source).observe(record.age_ms / 1e3)
            self._latency.labels(source).observe(record.total_ms / 1e3)

    def __enter__(self) -> Self:
        self._server.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.__exit__(None, None, None)


class _Connections:
    """Asked at each scrape: how the sources are doing then."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        reconnects = CounterMetricFamily(
            "sightline_reconnects", "Times that a source came back", labels=["source"]
        )
        up = GaugeMetricFamily("sightline_up", "1 while a source gives frames", labels=["source"])
        errors = CounterMetricFamily(
            "sightline_page_errors",
            "Requests that ended by a defect",
            value=self._session.page_errors,
        )
        for each in self._session.connections:
            reconnects.add_metric([each.name], each.reconnects)
            up.add_metric([each.name], float(each.state == "live"))
        yield from (reconnects, up, errors)


def _application(registry: "CollectorRegistry", session: Session) -> "FastAPI":
    from fastapi import FastAPI, Query, Request
    from fastapi.responses import PlainTextResponse, Response
    from prometheus_client.exposition import choose_encoder

    app = FastAPI(title="Sightline", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/metrics")
    def metrics(request: Request) -> Response:
        """All figures; ``?name[]=`` chooses some."""
        try:
            encode, kind = choose_encoder(request.headers.get("accept", ""))
        except (ValueError, TypeError):  # a version that is none
            encode, kind = choose_encoder("")
        names = request.query_params.getlist("name[]")
        return Response(
            encode(registry.restricted_registry(names) if names else registry),
            headers={"Content-Type": kind},
        )

    @app.get("/snapshot.jpg")
    def snapshot(source: str = Query(session.connections[0].name)) -> Response:
        """The newest picture; 503 where none comes."""
        found = session.snapshot(source)
        if found is None:
            return PlainTextResponse(f"no picture of {source} now\n", 503)
        return Response(found, media_type="image/jpeg")

    @app.exception_handler(404)
    async def nothing(_: Any, __: Exception) -> Response:
        return PlainTextResponse("here are /metrics and /snapshot.jpg\n", 404)

    return app
