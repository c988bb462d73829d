"""A real https server on loopback that serves byte ranges, and misbehaves on request."""

import contextlib
import http.server
import os
import ssl
import threading
from pathlib import Path
from typing import Self

import trustme


class FileServer:
    """Serves the files of a folder, in its ``with`` block, in which its certificate counts
    (``SSL_CERT_FILE``).

    Args:
        folder: whose files are served.
        encrypted: speak https; else plain http.

    Attributes:
        address: ``https://127.0.0.1:PORT``.
        ranges: honour the Range header, or ignore it as some servers do.
        hang_up_after: close the connection after so many bytes of a reply; None to send all.
        leads_to: where ``/leads`` redirects to; None for nowhere.
        asked: the Range header of every request, None where there was none.
    """

    def __init__(self, folder: Path, encrypted: bool = True) -> None:
        self.ranges, self.hang_up_after, self.leads_to, self.asked = True, None, None, []
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, folder))
        self._server.handle_error = lambda *_: (
            None
        )  # a reader that refuses our certificate is no news
        self._authority, self._encrypted = trustme.CA(), encrypted
        if encrypted:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._authority.issue_cert("127.0.0.1").configure_cert(context)
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.address = (
            f"{'https' if encrypted else 'http'}://127.0.0.1:{self._server.server_address[1]}"
        )

    def __enter__(self) -> Self:
        self._before = os.environ.get("SSL_CERT_FILE")
        if self._encrypted:
            self._trusted = self._authority.cert_pem.tempfile()
            os.environ["SSL_CERT_FILE"] = self._trusted.__enter__()
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        if self._encrypted:
            self._trusted.__exit__(None, None, None)
            os.environ.pop("SSL_CERT_FILE")
            if self._before is not None:
                os.environ["SSL_CERT_FILE"] = self._before


def _handler(server: FileServer, folder: Path):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers["Range"]
            server.asked.append(wanted)
            if server.leads_to is not None and self.path == "/leads":
                self.send_response(302)
                self.send_header("Location", server.leads_to)
                self.end_headers()
                return
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            content = path.read_bytes()
            start = (
                int(wanted.removeprefix("bytes=").removesuffix("-"))
                if wanted and server.ranges
                else 0
            )
            if start and start >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header(
                    "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
                )
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            with contextlib.suppress(ConnectionError, ssl.SSLError):  # the reader has enough
                self.wfile.write(content[start:][: server.hang_up_after])

        def log_message(self, *_):
            pass

    return Handler
