"""A run's figures for Prometheus, and its newest picture as a plain JPEG, over HTTP."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any, Self
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from engines.base import OutputError
from engines.install import install_extra
from engines.localizer import ImageBgr
from realtime.frames import FrameRecord
from realtime.hub import Hub

BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.033, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
ADDRESS = "127.0.0.1"


class MetricsSink:
    """Serves ``/metrics`` and ``/snapshot.jpg`` (``?source=NAME`` for one of several) on this machine while it is entered.

    ``sightline_frames_total`` by source, outcome and cause; ``sightline_stage_seconds`` by source and stage;
    ``sightline_age_seconds`` from capture to display and ``sightline_latency_seconds`` from the start of reading, by source;
    ``sightline_reconnects_total`` and ``sightline_up`` by source; ``sightline_objects``, of several that are followed.

    Args:
        port: 0 for any free one; see ``port``.
        hub: of the run.

    Raises:
        OutputError: prometheus-client is missing, or the port is taken.
    """

    needs_picture = False

    def __init__(self, port: int, hub: Hub) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise OutputError(f"--metrics needs prometheus-client: {install_extra('web')}") from error
        registry = prometheus.CollectorRegistry()
        self._frames = prometheus.Counter("sightline_frames", "Frames", ["source", "outcome", "cause"], registry=registry)
        self._stages, self._age, self._latency = (
            prometheus.Histogram(f"sightline_{name}_seconds", text, labels, buckets=BUCKETS_S, registry=registry)
            for name, text, labels in (
                ("stage", "Time of a stage", ["source", "stage"]), ("age", "Capture to display", ["source"]),
                ("latency", "Start of reading to display", ["source"]),
            )
        )  # fmt: skip
        self._objects = prometheus.Gauge("sightline_objects", "Objects followed", ["source"], registry=registry)
        registry.register(_Connections(hub))
        application = _application(prometheus.make_wsgi_app(registry), hub)
        try:
            self._server = make_server(ADDRESS, port, application, _Threading, _Quiet)
        except OSError as error:
            raise OutputError(f"cannot serve metrics on port {port}: {error.strerror}; give another to --metrics") from error
        self.port: int = self._server.server_port

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``."""
        source = record.frame.source
        cause = record.cause if record.outcome == "dropped" else ""  # a failure's words differ from time to time
        self._frames.labels(source, record.outcome, cause).inc()
        if record.objects is not None:
            self._objects.labels(source).set(len(record.objects))
        if record.outcome == "shown":
            for stage, value in record.stages_ms.items():
                self._stages.labels(source, stage).observe(value / 1e3)
            self._age.labels(source).observe(record.age_ms / 1e3)
            self._latency.labels(source).observe(record.total_ms / 1e3)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Connections:
    """Asked at each scrape: how the sources are doing then."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        reconnects = CounterMetricFamily("sightline_reconnects", "Times that a source came back", labels=["source"])
        up = GaugeMetricFamily("sightline_up", "1 while a source gives frames", labels=["source"])
        for each in self._hub.connections:
            reconnects.add_metric([each.name], each.reconnects)
            up.add_metric([each.name], float(each.state == "live"))
        yield from (reconnects, up)


def _application(metrics: Callable[..., Iterable[bytes]], hub: Hub) -> Callable[..., Iterable[bytes]]:
    def serve(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/metrics":
            return metrics(environ, start_response)
        if environ["PATH_INFO"] == "/snapshot.jpg":
            source = parse_qs(environ.get("QUERY_STRING", "")).get("source", [hub.connections[0].name])[0]
            found = hub.snapshot(source)
            if found is not None:
                start_response("200 OK", [("Content-Type", "image/jpeg"), ("Cache-Control", "no-store")])
                return [found]
            start_response("503 Service Unavailable", [("Content-Type", "text/plain")])
            return [f"no picture of {source} now\n".encode()]
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"here are /metrics and /snapshot.jpg\n"]

    return serve


class _Threading(ThreadingMixIn, WSGIServer):
    """A slow reader holds up nobody."""

    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Requests are not the user's affair."""

    def handle(self) -> None:
        with suppress(ConnectionError):  # a viewer that goes away
            super().handle()
