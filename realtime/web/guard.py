"""Who may look: everyone on this machine, or whoever has the token; no other site through somebody's browser."""

import hashlib
import ipaddress
import re
import secrets
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOST = re.compile(r"(?P<name>[\w.-]+|\[[0-9a-fA-F:.]+\])(:\d{0,5})?", re.ASCII)
"""What a Host header may say: a name, or an address, IPv6 in brackets; then a port."""
DAY_S = 24 * 3600
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; base-uri 'none'",
    "Cross-Origin-Resource-Policy": "same-origin", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}  # fmt: skip


class Guard:
    """ASGI middleware that lets a request through or answers it itself.

    With a token, requests bring it once as ``?token=`` (a cookie keeps it then) or as ``Authorization: Bearer``. Without one,
    the server listens to this machine only; then the address that a browser believes to talk to must be this machine's too, or
    a foreign page could have its own name resolved to it.

    Args:
        app: what is guarded.
        token: None for none.
        port: names the cookie: cookies are shared among the ports of a host.
    """

    def __init__(self, app: ASGIApp, token: str | None, port: int) -> None:
        self._app, self._token, self._cookie = app, token, f"sightline_{port}"

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
        answer: ASGIApp = self._refusal(request) or self._welcome(request) or self._app
        await answer(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> Response | None:
        host, origin = request.headers.get("host"), request.headers.get("origin")
        named = HOST.fullmatch("127.0.0.1" if host is None else host)  # browsers always send one
        if named is None:
            return refused(400, "the Host header is no host")
        if origin is not None and _netloc(origin) != (host or "").lower():
            return refused(403, "this comes from another site's page")
        if request.headers.get("sec-fetch-site") in ("cross-site", "same-site") and request.url.path != "/":
            return refused(403, "this comes from another site's page")
        if self._token is None:
            name = named["name"]
            return None if _is_loopback(name) else refused(403, f"this machine is not called {name} here: use 127.0.0.1")
        if self._is_allowed(request, self._token):
            return None
        return refused(401, "the token is missing or wrong: open the address that was printed when the stream began")

    def _is_allowed(self, request: Request, token: str) -> bool:
        given = [
            (request.query_params.get("token"), token),
            (request.cookies.get(self._cookie), _kept(token)),
            (_bearer(request), token),
        ]
        return any(secrets.compare_digest(_bytes(each), _bytes(wanted)) for each, wanted in given if each is not None)

    def _welcome(self, request: Request) -> Response | None:
        """The page was opened with the token: keep it, and take it out of the address bar."""
        if self._token is None or request.url.path != "/" or "token" not in request.query_params:
            return None
        response = RedirectResponse("/", status_code=303)
        response.set_cookie(self._cookie, _kept(self._token), max_age=30 * DAY_S, httponly=True, samesite="lax")
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


def refused(status: int, why: str) -> Response:
    """An answer that says why not, in ``error``."""
    return JSONResponse({"error": why}, status)
