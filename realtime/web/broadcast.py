"""Encodes each picture once, for any number of viewers. A thread encodes; viewers wait in the event
loop.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator

from realtime.session import Session, Shown

IDLE_S = 3.0
WAIT_S = 0.5
BOUNDARY = "picture"


class Broadcast:
    """The newest picture of one source. Its coroutines belong to one event loop.

    Nothing is queued for anyone: who comes late gets the newest picture and never sees those
        between, so a slow viewer costs
    what it takes. While nobody asks, the thread is gone, and the loop does not even draw.
    """

    def __init__(self, session: Session, source: str) -> None:
        self._session, self._source = session, source
        self._shown: Shown | None = None
        self._waiting: set[asyncio.Future[None]] = set()
        self._asked_s, self._running = 0.0, False

    async def newer(self, than: int, timeout_s: float) -> Shown | None:
        """The newest picture as soon as its number differs from ``than``, its JPEG made; None when
        the time is up.
        """
        loop, end_s = asyncio.get_running_loop(), time.monotonic() + timeout_s
        while True:
            self._asked_s = time.monotonic()
            if self._session.closed.is_set():
                return None
            if not self._running:
                self._start(loop)
            elif self._shown is not None and self._shown.number != than:
                return self._shown
            waiter = loop.create_future()
            self._waiting.add(waiter)
            try:
                await asyncio.wait_for(waiter, end_s - time.monotonic())
            except TimeoutError:
                return None
            finally:
                self._waiting.discard(waiter)

    async def multipart(self) -> AsyncIterator[bytes]:
        """Motion JPEG as long as the run goes on, ``multipart/x-mixed-replace``. Who does not read
        is waited for here.
        """
        number = 0
        while not self._session.closed.is_set():
            shown = await self.newer(number, IDLE_S)
            if shown is not None:
                number = shown.number
                head = (
                    f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length:"
                    f" {len(shown.jpeg)}\r\n\r\n"
                )
                yield head.encode() + shown.jpeg + b"\r\n"

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._running, self._shown = True, None  # what was kept from earlier is old
        threading.Thread(
            target=self._run, args=(loop,), name=f"encode {self._source}", daemon=True
        ).start()

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        """The thread."""
        newest = self._session.newest(self._source)
        number = newest.number if newest else 0  # drawn when somebody last looked, perhaps long ago
        try:
            while time.monotonic() - self._asked_s < IDLE_S and not self._session.closed.is_set():
                shown = self._session.wait_newer(self._source, number, WAIT_S)
                if shown is not None:
                    number = shown.number
                    _ = shown.jpeg  # encoded here, once
                    loop.call_soon_threadsafe(self._publish, shown)
            loop.call_soon_threadsafe(self._ended)
        except RuntimeError:
            return  # the event loop has been closed

    def _publish(self, shown: Shown) -> None:
        self._shown = shown
        self._wake()

    def _ended(self) -> None:
        self._running = False
        self._wake()  # somebody may have come in the meantime: they start it anew

    def _wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
