"""Copies a film's pictures and sound as they are into a Matroska file, with the boxes as a subtitle
track that players draw over the pictures. Nothing is encoded.
"""

import heapq
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error

from engines.errors import OutputError
from engines.files import whole_file
from engines.text import displayable
from realtime.batch.segment import Clip, open_video, time_of
from realtime.events import name_in, shown_in
from realtime.sources.film import Packet
from realtime.sources.video import reason_of

Row = dict[str, Any]
Timed = tuple[Fraction, int, Any]
LINE_SHARE = 0.005
"""Width of a box's lines, as a share of the picture's smaller side."""
TEXT_SHARE = 0.045
COLOURS = ("00FF66", "FFB000", "00B4FF", "FF5AC8", "FFFF3C", "B478FF")
"""Of the objects, in turns: red, green, blue."""
HEADER = """[Script Info]
; Boxes by Sightline
ScriptType: v4.00+
PlayResX: {width}
PlayResY: {height}
ScaledBorderAndShadow: yes

[V4+ Styles]
Format: Name, Fontname, Fontsize, PrimaryColour, OutlineColour, BackColour, Bold, BorderStyle, \
Outline, Shadow, Alignment, MarginL, MarginR, MarginV
Style: Box,sans-serif,{size},&H00FFFFFF,&H00000000,&H00000000,0,1,{line},0,7,0,0,0

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
"""


def subtitles_of(rows: Iterable[Row], clip: Clip, origin_s: Fraction) -> Iterator[str]:
    """The lines of a subtitle file in Advanced SubStation Alpha that draws each row's boxes until
    the next row.

    Args:
        rows: of the log, in order.
        clip: whose.
        origin_s: the source's time at which the file begins.
    """
    side = min(clip.width_px, clip.height_px)
    line, size = max(1, round(LINE_SHARE * side)), max(8, round(TEXT_SHARE * side))
    yield HEADER.format(width=clip.width_px, height=clip.height_px, line=line, size=size)
    shift_s = clip.first_pts * clip.time_base - origin_s
    begun: tuple[float, list[str]] | None = None
    for row in rows:
        now_s = row["pts_s"] + float(shift_s)
        if begun is not None:
            yield from _events(*begun, now_s)
        begun = now_s, [text for part in shown_in(row) for text in drawn(part, size)]
    if begun is not None:
        yield from _events(*begun, begun[0] + 1 / clip.rate_fps)


def drawn(part: Row, size_px: int) -> list[str]:
    """An object's box and its name, in drawing commands."""
    x0, y0, x1, y1 = (round(part[edge]) for edge in ("x0", "y0", "x1", "y1"))
    rgb = COLOURS[(part.get("track_id") or 0) % len(COLOURS)]
    colour = f"&H{rgb[4:]}{rgb[2:4]}{rgb[:2]}&"
    box = f"m {x0} {y0} l {x1} {y0} {x1} {y1} {x0} {y1}"
    sure = part.get("confidence")
    words = name_in(part) + ("" if sure is None else f" {100 * sure:.0f} %")
    safe = displayable(words).replace("\\", "/").replace("{", "(").replace("}", ")")
    place = f"\\an1\\pos({x0},{y0 - 2})" if y0 > size_px else f"\\an7\\pos({x0 + 3},{y0 + 2})"
    return [
        f"{{\\an7\\pos(0,0)\\1a&HFF&\\3c{colour}\\p1}}{box}{{\\p0}}",
        f"{{{place}\\1c{colour}\\bord1}}{safe}",
    ]


def _events(begin_s: float, texts: list[str], end_s: float) -> Iterator[str]:
    begin, end = _time(begin_s), _time(end_s)
    if begin < end:
        yield from (f"Dialogue: 0,{begin},{end},Box,,0,0,0,,{text}\n" for text in texts)


def _time(seconds: float) -> str:
    hundredths = max(0, round(100 * seconds))
    whole_s = hundredths // 100
    return f"{whole_s // 3600}:{whole_s // 60 % 60:02}:{whole_s % 60:02}.{hundredths % 100:02}"


def copy_with_boxes(clip: Clip, rows: Iterable[Row], path: Path) -> None:
    """Write a Matroska file, whole or not at all: the source's pictures and sound from the key
    frame before the selected time on, and the boxes.

    Args:
        clip: whose.
        rows: of its log, in order.
        path: the file.

    Raises:
        OutputError: it cannot be written, or Matroska does not hold the source's kind of pictures.
        SourceError: the source cannot be opened.
    """
    first, last = clip.segments[0], clip.segments[-1]
    begin_pts = clip.first_pts if first.key_pts is None else first.key_pts
    origin_s = begin_pts * clip.time_base
    end_s = None if last.end_pts is None else last.end_pts * clip.time_base
    lines = path.with_name(f".{path.stem}.ass.part")
    try:
        lines.write_text("".join(subtitles_of(rows, clip, origin_s)), encoding="utf-8")
        with whole_file(path) as part, ExitStack() as stack:
            output = stack.enter_context(av.open(str(part), "w", format="matroska"))
            source = stack.enter_context(open_video(clip.spec))
            boxes = stack.enter_context(av.open(str(lines), format="ass"))
            streams = [source.streams.video[0], *source.streams.audio]
            copies = {each.index: output.add_stream_from_template(each) for each in streams}
            track = output.add_stream_from_template(boxes.streams.subtitles[0])
            track.disposition = av.stream.Disposition.default
            packets = _selected(source.demux(*streams), copies, origin_s, end_s)
            drawn_boxes = _packets_of(boxes.demux(), {0: track}, Fraction(0))
            for _, _, packet in heapq.merge(packets, drawn_boxes, key=lambda timed: timed[:2]):
                output.mux(packet)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise OutputError(f"cannot write {path}: {reason_of(error)}") from error
    finally:
        lines.unlink(missing_ok=True)


def _selected(
    packets: Iterable[Packet], copies: dict[int, Any], origin_s: Fraction, end_s: Fraction | None
) -> Iterator[Timed]:
    """The packets within the selected time; pictures are shown in another order than they are
    decoded, so all are copied up to the first key frame behind its end.
    """
    for timed in _packets_of(packets, copies, origin_s):
        packet = timed[2]
        time_s = packet.pts * packet.time_base + origin_s
        if end_s is not None and time_s >= end_s and packet.is_keyframe:
            return
        yield timed


def _packets_of(
    packets: Iterable[Packet], copies: dict[int, Any], origin_s: Fraction
) -> Iterator[Timed]:
    for packet in packets:
        pts = time_of(packet)
        if not packet.size or pts is None or packet.time_base is None:
            continue
        shift = round(origin_s / packet.time_base)
        packet.pts = pts - shift
        packet.dts = packet.pts if packet.dts is None else packet.dts - shift
        if packet.pts < 0:
            continue
        place = packet.stream.index
        packet.stream = copies[place]
        yield packet.dts * packet.time_base, place, packet
