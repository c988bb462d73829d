"""Limits on connections: how many there are, how long a request may take to come, how large it may
be.
"""

import asyncio
from functools import partial
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

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
