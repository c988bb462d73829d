"""JPEG pictures out of a stream of bytes, whatever lies between them."""

import re
from collections.abc import Iterator

from engines.base import SourceError

MOST_BYTES = 32 * 2**20
"""A picture that takes more is none."""
SOI, EOI, SOS, TEM = 0xD8, 0xD9, 0xDA, 0x01  # ITU-T T.81, table B.1
RESTARTS = range(0xD0, 0xD8)
_BEGIN = b"\xff\xd8\xff"
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)


class JpegSplitter:
    """Cuts pictures out by their own markers (ITU-T T.81, annex B), as what is said of their length may be wrong.

    Segments of a header are passed by their length, so that a thumbnail inside is not taken for a picture. A picture that
    breaks off is left out, and the next one is looked for.
    """

    def __init__(self) -> None:
        self._held = bytearray()
        self._at, self._in_scan = 0, False  # how far the picture at the start of ``_held`` is read; 0: none has begun

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
