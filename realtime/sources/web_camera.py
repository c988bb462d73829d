"""Reads web cameras: MJPEG streams, and addresses that answer with one picture. FFmpeg reads all
else.
"""

import http.client
import re
import ssl
import time
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import PurePosixPath
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import (
    HTTPBasicAuthHandler,
    HTTPDigestAuthHandler,
    HTTPPasswordMgrWithDefaultRealm,
    HTTPRedirectHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    build_opener,
)

import av
import av.error

from engines.errors import SourceError
from engines.localizer import ImageBgr
from engines.text import shown
from realtime.frames import Frame
from realtime.sources.colour import ToBgr
from realtime.sources.film import VIDEO_PIXELS
from realtime.sources.video import (
    LONGEST_LOSS_S,
    OPEN_TIMEOUT_S,
    USUAL,
    Source,
    SourceOptions,
    reason_of,
)

MOST_BYTES = 32 * 2**20
"""A picture that takes more is none."""
SOI, EOI, SOS, TEM = 0xD8, 0xD9, 0xDA, 0x01  # ITU-T T.81, table B.1
RESTARTS = range(0xD0, 0xD8)
_BEGIN = b"\xff\xd8\xff"
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)


class JpegSplitter:
    """Cuts pictures out by their own markers (ITU-T T.81, annex B), as what is said of their length
    may be wrong.

    Segments of a header are passed by their length, so that a thumbnail inside is not taken for a
    picture. A picture that breaks off is left out, and the next one is looked for.
    """

    def __init__(self) -> None:
        self._held = bytearray()
        self._at, self._in_scan = (
            0,
            False,
        )  # how far the picture at the start of ``_held`` is read; 0: none has begun

    def feed(self, content: bytes) -> Iterator[bytes]:
        """Take bytes; whole pictures come out.

        Raises:
            SourceError: a picture does not end.
        """
        self._held += content
        while (picture := self._next()) is not None:
            yield picture
        if len(self._held) > MOST_BYTES:
            raise SourceError(f"a picture does not end within {MOST_BYTES // 2**20} MiB")

    @property
    def begun(self) -> bool:
        """Whether it is inside a picture."""
        return self._at > 0

    def _next(self) -> bytes | None:
        held = self._held
        while True:
            if not self._at:
                place = held.find(_BEGIN)
                if place < 0:
                    del held[:-2]
                    return None
                self._begin(place)
            if self._in_scan:
                found = _MARKER.search(held, self._at)
                if found is None:
                    self._at = max(self._at, len(held) - 1)
                    return None
                self._at, self._in_scan = found.start(), False
            if self._at + 4 > len(held) and held[self._at + 1 : self._at + 2] != bytes([EOI]):
                return None
            if self._step(held[self._at], held[self._at + 1]):
                picture = bytes(held[: self._at + 2])
                del held[: self._at + 2]
                self._at = 0
                return picture

    def _begin(self, place: int) -> None:
        del self._held[:place]
        self._at, self._in_scan = 2, False

    def _step(self, first: int, marker: int) -> bool:
        """Pass a marker and its segment; whether it ends the picture."""
        if first != 0xFF or marker == 0:  # broken
            del self._held[:2]
            self._at = 0
        elif marker == EOI:
            return True
        elif marker == SOI:  # the one before broke off
            self._begin(self._at)
        elif marker == 0xFF:
            self._at += 1
        elif marker == TEM or marker in RESTARTS:
            self._at += 2
        else:
            self._at += 2 + max(2, int.from_bytes(self._held[self._at + 2 : self._at + 4], "big"))
            self._in_scan = marker == SOS
        return False


POLL_S = 1.0
"""How often an address that answers with one picture is asked."""
CHUNK_BYTES = 2**16
Decode = Callable[[str, bytes], ImageBgr]
JPEG = b"\xff\xd8\xff"
NO_CAMERA = frozenset(
    {
        ".mp4",
        ".m4v",
        ".mov",
        ".mkv",
        ".webm",
        ".avi",
        ".flv",
        ".ts",
        ".m3u8",
        ".mpd",
        ".gif",
        ".mpg",
    }
)
"""What FFmpeg is asked for at once."""


class WebPictures(Source):
    """The pictures of a web camera, as they come.

    An address that answers with one picture is asked again and again, with what the server said to
    know it by (``ETag``, ``Last-Modified``); the same picture once more is no new frame.

    Args:
        url: ``http`` or ``https``, with ``user:password@`` where they are needed.
        decode: BGR from the name and bytes of a picture that is no JPEG.
        options: how long silence is borne; whether one picture is all that is wanted.

    Raises:
        SourceError: it does not answer, stops, or gives no whole picture for long.
        NoPicturesError: it answers with something else.
    """

    def __init__(self, url: str, decode: Decode, options: SourceOptions = USUAL) -> None:
        self.name = "camera"
        self.live = True
        self._decode = decode
        self._shown = shown(url)
        self._stall_s = options.stall_s
        self._poll = options.poll
        self._address, self._opener = _address_and_opener(url)
        self._known: dict[str, str] = {}
        self._last = b""
        answer = self._ask(OPEN_TIMEOUT_S)
        assert answer is not None  # nothing was known yet
        self._answer: http.client.HTTPResponse = answer
        self._kind = str(answer.headers.get_content_type())
        if not self._gives_pictures():
            answer.close()
            raise NoPicturesError(self._kind)
        if self._kind.startswith("multipart/"):
            answer.length = None  # cameras say anything
        self._codec = av.CodecContext.create("mjpeg", "r")
        self._codec.options = {"err_detect": "explode", "max_pixels": str(VIDEO_PIXELS)}
        self._to_bgr = ToBgr()

    def __iter__(self) -> Iterator[Frame]:
        index = 0
        first_ns = None
        good_s = time.monotonic()
        for content in self._contents():
            self.heard_s = time.monotonic()
            start_ns = time.monotonic_ns()
            image = self._decoded(content)
            if image is None:
                if time.monotonic() - good_s > LONGEST_LOSS_S:
                    raise SourceError(f"{self._shown} gives no whole picture any more")
                continue
            good_s, now_ns = time.monotonic(), time.monotonic_ns()
            first_ns = now_ns if first_ns is None else first_ns
            yield Frame(
                image,
                self.name,
                index,
                (now_ns - first_ns) / 1e9,
                now_ns,
                (now_ns - start_ns) / 1e6,
            )
            index += 1
        if index == 0:
            raise SourceError(f"{self._shown} gives no picture that can be decoded")

    def _contents(self) -> Iterator[bytes]:
        """Picture files, as long as any come."""
        count = 0
        try:
            for content in self._pictures_of(self._answer):
                count += 1
                yield content
            if count != 1 or not self._kind.startswith("image/"):
                return
            if self._poll:
                self.notes = [f"answers with one picture: it is asked again every {POLL_S:g} s"]
            while self._poll:
                time.sleep(POLL_S)
                answer = self._ask(self._stall_s)
                self.heard_s = time.monotonic()
                if answer is not None:
                    yield from self._pictures_of(answer)
        except TimeoutError as error:
            raise SourceError(
                f"{self._shown} stopped: nothing came for {self._stall_s:g} s"
            ) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise SourceError(f"{self._shown} stopped: {reason_of(error)}") from error

    def _pictures_of(self, answer: http.client.HTTPResponse) -> Iterator[bytes]:
        """Those of one answer that are not the same as the last one."""
        splitter, other = JpegSplitter(), bytearray()
        with answer:
            while chunk := answer.read1(CHUNK_BYTES):
                self.heard_s = time.monotonic()
                if other or (
                    not self._kind.startswith("multipart/")
                    and not splitter.begun
                    and not chunk.startswith(JPEG)
                ):
                    other += chunk
                    if len(other) > MOST_BYTES:
                        raise SourceError(
                            f"{self._shown} answers with more than {MOST_BYTES // 2**20} MiB"
                        )
                    continue
                for picture in splitter.feed(chunk):
                    yield from self._new(picture)
        if other:
            yield from self._new(bytes(other))

    def _new(self, picture: bytes) -> Iterator[bytes]:
        if picture != self._last or self._kind.startswith("multipart/"):
            self._last = picture
            yield picture

    def _decoded(self, content: bytes) -> ImageBgr | None:
        """None for half a picture: its other half would be made up."""
        try:
            if not content.startswith(JPEG):
                return self._decode(self._shown, content)
            for picture in self._codec.decode(av.Packet(content)):
                return self._to_bgr(picture)
        except (av.error.FFmpegError, SourceError):
            pass
        return None

    def _gives_pictures(self) -> bool:
        if self._kind == "multipart/x-mixed-replace" or self._kind.startswith("image/"):
            return self._kind not in ("image/gif", "image/svg+xml")
        try:
            return self._answer.peek(len(JPEG))[: len(JPEG)] == JPEG
        except (OSError, http.client.HTTPException):
            return False

    def _ask(self, timeout_s: float) -> http.client.HTTPResponse | None:
        """The answer, None if the picture is still the same.

        Raises:
            SourceError: there is no good one.
            NoPicturesError: it is not understood, or FFmpeg is less strict.
        """
        try:
            answer: http.client.HTTPResponse = self._opener.open(
                Request(self._address, headers=self._known), timeout=timeout_s
            )
        except HTTPError as error:
            error.close()
            if error.code == http.client.NOT_MODIFIED:
                return None
            hint = (
                ": is the user's name and password right?"
                if error.code == http.client.UNAUTHORIZED
                else ""
            )
            raise SourceError(
                f"cannot open {self._shown}: {error.code} {error.reason}{hint}"
            ) from error
        except TimeoutError as error:
            raise SourceError(
                f"cannot open {self._shown}: no answer within {timeout_s:g} s"
            ) from error
        except URLError as error:
            if isinstance(
                error.reason, ssl.SSLCertVerificationError
            ):  # many cameras sign their own
                raise NoPicturesError(str(error.reason)) from error
            reason = (
                f"no answer within {timeout_s:g} s"
                if isinstance(error.reason, TimeoutError)
                else reason_of(_cause(error))
            )
            raise SourceError(f"cannot open {self._shown}: {reason}") from error
        except OSError as error:
            raise SourceError(f"cannot open {self._shown}: {reason_of(error)}") from error
        except (http.client.HTTPException, ValueError) as error:
            raise NoPicturesError(str(error)) from error
        names = {"ETag": "If-None-Match", "Last-Modified": "If-Modified-Since"}
        self._known = {names[name]: answer.headers[name] for name in names if answer.headers[name]}
        return answer

    def close(self) -> None:
        """Release the connection."""
        self._answer.close()


class NoPicturesError(Exception):
    """An address that is for FFmpeg to read."""


def may_be_camera(url: str) -> bool:
    """Whether to ask an address what it gives."""
    parts = urlsplit(url)
    return (
        parts.scheme.lower() in ("http", "https")
        and PurePosixPath(parts.path).suffix.lower() not in NO_CAMERA
    )


def _cause(error: URLError) -> BaseException:
    return error.reason if isinstance(error.reason, BaseException) else error


def _address_and_opener(url: str) -> tuple[str, OpenerDirector]:
    """The address without user and password, and what opens it: no proxy, and a password only for
    who asked for one.
    """
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    address = quote(
        urlunsplit(parts._replace(netloc=host, fragment="")), safe="%/:=&?~+!$,;'@()*[]"
    )
    passwords = HTTPPasswordMgrWithDefaultRealm()
    if parts.username is not None:
        passwords.add_password(
            None, address, unquote(parts.username), unquote(parts.password or "")
        )
    opener = build_opener(
        ProxyHandler({}),
        _SafeRedirects(),
        HTTPBasicAuthHandler(passwords),
        HTTPDigestAuthHandler(passwords),
    )
    opener.addheaders = [("User-Agent", "sightline"), ("Accept", "*/*")]
    return address, opener


class _SafeRedirects(HTTPRedirectHandler):
    """Never from https to something that anyone can read."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> Request | None:
        """See ``HTTPRedirectHandler.redirect_request``.

        Raises:
            SourceError: it leads where it must not.
        """
        scheme = urlsplit(newurl).scheme.lower()
        if scheme not in ("http", "https") or (req.type == "https" and scheme != "https"):
            raise SourceError(
                f"{shown(req.full_url)} leads from {req.type} to {scheme}, which is not followed"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]
