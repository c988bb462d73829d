"""Serving the page from a thread of its own, for as long as a run goes on."""

import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from engines.base import EngineError, OutputError
from engines.install import install_extra

if TYPE_CHECKING:
    from realtime.hub import Hub

LOCAL = "127.0.0.1"
SEND_BUFFER_BYTES = 1 << 17
"""For each viewer: what lies in the system's own buffer is late; the usual megabytes would be seconds of a slow line."""
CLOSING_S = 3.0


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
            raise OutputError(f"--web {text}: write PORT or HOST:PORT, like 8000 or 0.0.0.0:8000")
        return cls(host or LOCAL, int(port))

    @property
    def is_loopback(self) -> bool:
        """Whether nobody but this machine reaches it."""
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except OSError:
            return False
        return all(str(entry[4][0]) == "::1" or str(entry[4][0]).startswith("127.") for entry in found)


class PageServer:
    """The page, served in its ``with`` block.

    Args:
        hub: of the run.
        title: says what runs, in words.
        address: where to listen.
        token: who has it may look; None for none on this machine alone, and for a new one elsewhere.
        recordings: folder for what is recorded from the page.

    Raises:
        EngineError: FastAPI or uvicorn are not installed.
        OutputError: the address cannot be listened on.

    Attributes:
        url: to open in a browser, with the token where there is one.
    """

    def __init__(
        self, hub: "Hub", title: Callable[[], str], address: Address, token: str | None = None, recordings: Path = Path()
    ) -> None:
        try:
            import uvicorn

            from realtime.web.app import page_app
            from realtime.web.guard import Guard
        except ImportError as error:
            raise EngineError(f"--web needs FastAPI and uvicorn: {install_extra('web')}") from error
        token = token or (None if address.is_loopback else secrets.token_urlsafe(16))
        self._socket = _listening(address)
        port = self._socket.getsockname()[1]
        app = Guard(page_app(hub, title, recordings), token, port)
        # No access log: a line for every picture. No "Server" header: nobody needs to know.
        config = uvicorn.Config(app, log_level="error", access_log=False, lifespan="off", ws="none", server_header=False)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="page", daemon=True)
        shown_host = f"[{address.host}]" if ":" in address.host else address.host
        self.url = f"http://{shown_host}:{port}/" + (f"?token={token}" if token else "")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.should_exit = self._server.force_exit = True  # viewers never leave by themselves
        self._thread.join(timeout=CLOSING_S)
        self._socket.close()


def _listening(address: Address) -> socket.socket:
    try:
        family = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((address.host, address.port), family=family)
    except OSError as error:
        where = f"{address.host}:{address.port}"
        raise OutputError(f"cannot listen on {where}: {error.strerror or error}; choose another port: --web 8001") from error
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # connections inherit it
    return listening
