"""A real web server on loopback that serves byte ranges, and misbehaves on request."""

import http.server
import threading
from pathlib import Path
from typing import Self


class FileServer:
    """Serves the files of a folder, in its ``with`` block.

    Attributes:
        address: ``http://127.0.0.1:PORT``.
        ranges: honour the Range header, or ignore it as some servers do.
        hang_up_after: close the connection after so many bytes of a reply; None to send all.
        asked: the Range header of every request, None where there was none.
    """

    def __init__(self, folder: Path) -> None:
        self.ranges, self.hang_up_after, self.asked = True, None, []
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, folder))
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(server: FileServer, folder: Path):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers["Range"]
            server.asked.append(wanted)
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            content = path.read_bytes()
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
            if start and start >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:][: server.hang_up_after])

        def log_message(self, *_):
            pass

    return Handler
