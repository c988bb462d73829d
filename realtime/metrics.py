"""Serves the figures of a run to Prometheus, and its newest picture as a JPEG, over HTTP."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

from engines.errors import OutputError
from engines.install import install_extra
from engines.localizer import ImageBgr
from realtime.frames import FrameRecord
from realtime.session import Session
from realtime.web.server import Address, GuardedServer

if TYPE_CHECKING:
    from fastapi import FastAPI
    from prometheus_client import CollectorRegistry

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
