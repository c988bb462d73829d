"""Decides which requests are answered: this machine's, or those with the token, and none from other
sites' pages. It also limits connections: their number, and how long a request may take to come.
"""

import asyncio
import hashlib
import html
import ipaddress
import json
import math
import re
import secrets
import time
from base64 import b64encode
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import h11
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from engines.text import displayable

HOST = re.compile(r"(?P<name>[\w.-]+|\[[0-9a-fA-F:.]+\])(:\d{0,5})?", re.ASCII)
"""What a Host header may say: a name, or an address, IPv6 in brackets; then a port."""
TARGET_BYTES = 8 << 10
HEADERS_BYTES = 16 << 10
BODY_BYTES = 64 << 10
FEW_FAILURES = 5
FAILURES_S = 60.0
MOST_ADDRESSES = 1024
DAY_S = 24 * 3600
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; base-uri 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware that lets a request through or answers it itself.

    With a token, requests bring it once as ``?token=`` (a cookie keeps it then) or as
    ``Authorization: Bearer``. Without one, the server listens to this machine only; then the
        address that a browser believes to talk to must be this machine's too, or
    a foreign page could have its own name resolved to it.

    Args:
        app: what is guarded.
        token: None for none.
        port: names the cookie: cookies are shared among the ports of a host.
        failed: gets what ended a request that should have been answered.
    """

    def __init__(
        self, app: ASGIApp, token: str | None, port: int, failed: Callable[[Exception], None]
    ) -> None:
        self._app = app
        self._token = token
        self._cookie = f"sightline_{port}"
        self._failed = failed
        self._failures = Failures()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        if scope["type"] != "http":
            return
        request = Request(scope)
        refusal = _malformed(request) or self._refusal(request)
        answer: ASGIApp
        if refusal is None:
            scope.get("state", {}).get("let_in", lambda: None)()
            body = await _body(receive)
            receive, answer = _again(body or b"", receive), self._welcome(request) or self._app
            if body is None:
                answer = refused(413, f"a request holds at most {BODY_BYTES} bytes")
        elif _wants_a_page(request):
            answer = told_on_a_page(refusal, asks_for_token=self._token is not None)
        else:
            answer = refusal
        started = False

        async def send_once(message: Message) -> None:
            nonlocal started
            started = True
            await send_with_headers(message)

        try:
            await answer(scope, receive, send_once)
        except ClientDisconnect:
            return
        except Exception as error:  # a traceback is not for the terminal
            self._failed(error)
            if not started:
                await refused(500, f"this is a defect of Sightline: {type(error).__name__}")(
                    scope, receive, send_with_headers
                )

    def _refusal(self, request: Request) -> Response | None:
        host, origin = request.headers.get("host"), request.headers.get("origin")
        named = HOST.fullmatch("127.0.0.1" if host is None else host)  # browsers always send one
        if named is None:
            return refused(400, "the Host header is no host")
        if origin is not None and _netloc(origin) != (host or "").lower():
            return refused(403, "this comes from another site's page")
        if (
            request.headers.get("sec-fetch-site") in ("cross-site", "same-site")
            and request.url.path != "/"
        ):
            return refused(403, "this comes from another site's page")
        if self._token is None:
            name = named["name"]
            return (
                None
                if _is_loopback(name)
                else refused(403, f"this machine is not called {name} here: use 127.0.0.1")
            )
        if self._is_allowed(request, self._token):
            return None
        wait_s = self._failures.count(request) if self._has_guessed(request) else 0
        if wait_s:
            return refused(
                429, f"too many wrong tokens: wait {wait_s} seconds", {"Retry-After": str(wait_s)}
            )
        return refused(
            401,
            "the token is missing or wrong: open the whole address that was printed when the"
            " stream began",
        )

    def _is_allowed(self, request: Request, token: str) -> bool:
        given = [
            (request.query_params.get("token"), token),
            (request.cookies.get(self._cookie), _kept(token)),
            (_bearer(request), token),
        ]
        return any(
            secrets.compare_digest(_bytes(each), _bytes(wanted))
            for each, wanted in given
            if each is not None
        )

    def _has_guessed(self, request: Request) -> bool:
        return (
            "token" in request.query_params
            or "authorization" in request.headers
            or self._cookie in request.cookies
        )

    def _welcome(self, request: Request) -> Response | None:
        """The page was opened with the token: keep it, and take it out of the address bar."""
        if self._token is None or request.url.path != "/" or "token" not in request.query_params:
            return None
        response = RedirectResponse("/", status_code=303)
        response.set_cookie(
            self._cookie, _kept(self._token), max_age=30 * DAY_S, httponly=True, samesite="lax"
        )
        return response


def _kept(token: str) -> str:
    """What the cookie holds: a cookie takes few kinds of characters, a token any."""
    return hashlib.sha256(_bytes(token)).hexdigest()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _is_loopback(name: str) -> bool:
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _bearer(request: Request) -> str | None:
    kind, _, value = request.headers.get("authorization", "").partition(" ")
    return value.encode("latin-1").decode(errors="replace") if kind.lower() == "bearer" else None


def refused(status: int, why: str, headers: dict[str, str] | None = None) -> Response:
    """An answer that says why not, in ``error``, and closes the connection."""
    return JSONResponse(
        {"error": displayable(why)}, status, {"Connection": "close", **(headers or {})}
    )


PAGE = (Path(__file__).parent / "assets" / "refused.html").read_text(encoding="utf-8")
STYLE = re.search(r"<style>(.*?)</style>", PAGE, re.DOTALL)


def _wants_a_page(request: Request) -> bool:
    """Whether a person has opened the address in a browser."""
    mode = request.headers.get("sec-fetch-mode", "navigate")
    return mode == "navigate" and "text/html" in request.headers.get("accept", "")


def told_on_a_page(refusal: Response, asks_for_token: bool) -> Response:
    """The same refusal for a person: a page that says why not, and asks for the token where there
    is one.
    """
    why = json.loads(bytes(refusal.body))["error"]
    form = asks_for_token and refusal.status_code == 401
    page = PAGE.replace("{why}", html.escape(f"{why[:1].upper()}{why[1:]}."))
    page = page if form else re.sub(r"<form.*?</form>", "", page, flags=re.DOTALL)
    headers = {
        name: value
        for name, value in refusal.headers.items()
        if name not in ("content-length", "content-type")
    }
    assert STYLE is not None
    style = b64encode(hashlib.sha256(STYLE[1].encode()).digest()).decode()
    headers["Content-Security-Policy"] = (
        f"default-src 'none'; style-src 'sha256-{style}'; form-action 'self';"
        " frame-ancestors 'none'; base-uri 'none'"
    )
    return HTMLResponse(page, refusal.status_code, headers)


class Failures:
    """Wrong tokens by network address, of the last minute; the addresses that failed last are
    remembered.
    """

    def __init__(self) -> None:
        self._times_s: dict[str, list[float]] = {}

    def count(self, request: Request) -> int:
        """Enter one; returns the seconds to wait, 0 while there were few."""
        address, now_s = request.client.host if request.client else "", time.monotonic()
        times = [each for each in self._times_s.pop(address, []) if now_s - each < FAILURES_S][
            -FEW_FAILURES:
        ]
        self._times_s[address] = [*times, now_s]
        if len(self._times_s) > MOST_ADDRESSES:
            del self._times_s[next(iter(self._times_s))]
        return 0 if len(times) < FEW_FAILURES else math.ceil(FAILURES_S - (now_s - times[0]))


def _malformed(request: Request) -> Response | None:
    target = request.scope["raw_path"] + b"?" + request.scope["query_string"]
    if len(target) > TARGET_BYTES:
        return refused(414, "the address is too long")
    if sum(len(name) + len(value) for name, value in request.scope["headers"]) > HEADERS_BYTES:
        return refused(431, "the headers are too long")
    decoded = unquote_to_bytes(target)
    try:
        text = decoded.decode()
    except UnicodeDecodeError:
        return refused(400, "the address is not UTF-8")
    if re.search(rb"%(?![0-9a-fA-F]{2})", target) or re.search(r"[\x00-\x1f\x7f]", text):
        return refused(400, "the address is malformed")
    length = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()) or len(length) > 9 or int(length) > BODY_BYTES:
        return refused(413, f"a request holds at most {BODY_BYTES} bytes")
    return None


async def _body(receive: Receive) -> bytes | None:
    """The whole body; None where it is too long."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            break  # the client has gone
        body, more = body + message.get("body", b""), message.get("more_body", False)
        if len(body) > BODY_BYTES:
            return None
    return body


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives the body that has been read, then what else comes."""
    given = False

    async def once() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once


REQUEST_S = 10.0
"""From the connection, or the last answer, until the whole request is here, its body included."""
MOST_CONNECTIONS = 128


def most_connections() -> int:
    """Of one server: a quarter of the files that this process may have open, so that a run can
    always open its own.
    """
    try:
        import resource
    except ImportError:  # Windows
        return MOST_CONNECTIONS
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(8, min(MOST_CONNECTIONS, soft // 4)) if soft > 0 else MOST_CONNECTIONS


class Limits:
    """Of one server: which connections it has, and which of them the guard has not let in yet.

    Half of the connections are for those that the guard has let in. Where too many others are open,
    the oldest of the network address that holds the most of them is closed, so a newcomer with a
    whole request always gets its turn.

    Args:
        most: connections at a time.
        request_s: see ``REQUEST_S``.
    """

    def __init__(self, most: int, request_s: float = REQUEST_S) -> None:
        self.request_s, self._most = request_s, most
        self._known: set[LimitedProtocol] = set()
        self._strangers: dict[str, dict[LimitedProtocol, None]] = {}

    def protocol(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> "LimitedProtocol":
        """What uvicorn makes for each connection."""
        return LimitedProtocol(self, config, server_state, app_state, _loop)

    def enter(self, connection: "LimitedProtocol") -> None:
        """A connection has been made."""
        self._strangers.setdefault(connection.address, {})[connection] = None
        count = sum(map(len, self._strangers.values()))
        if count > self._most // 2 or count + len(self._known) > self._most:
            crowd: dict[LimitedProtocol, None] = max(self._strangers.values(), key=len)
            oldest = next(iter(crowd))  # dictionaries keep their order
            self.leave(oldest)
            oldest.transport.abort()

    def let_in(self, connection: "LimitedProtocol") -> None:
        """The guard has let its request in: it may stay as long as it asks or watches."""
        if connection in self._strangers.get(connection.address, {}):
            self.leave(connection)
            self._known.add(connection)

    def leave(self, connection: "LimitedProtocol") -> None:
        """A connection is gone."""
        self._known.discard(connection)
        of_address = self._strangers.get(connection.address, {})
        of_address.pop(connection, None)
        if not of_address:
            self._strangers.pop(connection.address, None)


class LimitedProtocol(H11Protocol):
    """One connection, closed where a request does not come in time. The guard calls
    ``scope["state"]["let_in"]``.
    """

    def __init__(
        self,
        limits: Limits,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(
            config, server_state, {**app_state, "let_in": partial(limits.let_in, self)}, _loop
        )
        self._limits, self.address = limits, ""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        self._limits.enter(self)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._limits.leave(self)
        self._stop()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        """Let the time run while a request, or a part of it, is waited for."""
        if self.transport.is_closing() or self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(self._limits.request_s, self.transport.abort)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
