"""The end of a frame's way: drawn, written to every sink, entered in the run's account."""

import time
from collections.abc import Callable, Sequence

from engines.localizer import ImageBgr
from realtime.frames import FrameRecord
from realtime.latency import Run
from realtime.overlay import Look, Painter, clock
from realtime.sinks import Sink


class Output:
    """What the frame loop does with an answer.

    Args:
        sinks: each gets every record, and the drawing where there is one; logs get it last, when all is timed.
        run: the account.
        look: how to draw at the moment.
        alone: a frame that cannot be drawn fails alone.
    """

    def __init__(self, sinks: Sequence[Sink], run: Run, look: Callable[[], Look], alone: bool = False) -> None:
        self._sinks, self._run, self._look, self._alone = sinks, run, look, alone
        self._painter = Painter()

    def draw_and_write(self, record: FrameRecord, heat_map_every: int) -> None:
        """Give a shown frame's picture to the sinks that want one; timed.

        Raises:
            OutputError: as a sink raises.
        """
        if record.outcome != "shown":
            return
        wanting = [sink for sink in self._sinks if sink.needs_picture]
        try:
            picture = self._drawn(record, heat_map_every) if wanting else None
        except Exception as error:
            if not self._alone:
                raise
            record.fail(error)
            return
        mark_ns = record.began_ns["write"] = time.monotonic_ns()
        for sink in wanting:
            sink.write(record, picture)
        done_ns = time.monotonic_ns()
        record.stages_ms["write"] = (done_ns - mark_ns) / 1e6
        self._run.work_ms["sink"] += record.stages_ms["write"]
        record.total_ms = record.frame.read_ms + (done_ns - record.frame.captured_ns) / 1e6

    def enter(self, record: FrameRecord) -> None:
        """Log and count a finished frame, whatever became of it."""
        begin_ns = time.monotonic_ns()
        for sink in self._sinks:
            if not sink.needs_picture:
                sink.write(record, None)
        self._run.work_ms["sink"] += (time.monotonic_ns() - begin_ns) / 1e6
        self._run.add(record)

    def _drawn(self, record: FrameRecord, heat_map_every: int) -> ImageBgr:
        start_ns = record.began_ns["draw"] = time.monotonic_ns()
        assert record.found is not None  # a shown frame has its answer
        status = f"{record.frame.source} {record.frame.index}   {record.stages_ms['engine']:.1f} ms"
        if (track := record.track) is not None:
            numbers = [one.track.track_id for one in record.objects or ()] or [track.track_id]
            status += f"   {track.state} " + ", ".join(str(number or "") for number in numbers)
        if record.frame.pts is not None:  # whole files, whose pictures must not depend on the machine
            status = f"{record.frame.source}   {clock(record.frame.pts_s)}"
        objects = record.objects or ()
        picture = self._painter.paint(record.frame, record.found, status, self._look(), heat_map_every, objects)
        record.stages_ms["draw"] = (time.monotonic_ns() - start_ns) / 1e6
        self._run.work_ms["drawing"] += record.stages_ms["draw"]
        return picture
