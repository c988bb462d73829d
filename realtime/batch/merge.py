"""Merges a clip's finished segments: one table of rows, one video with the source's own sound, one
summary.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import av.error
from av.container import InputContainer, OutputContainer

from engines.errors import OutputError, SourceError
from engines.files import whole_file, write_json
from realtime.batch.copied import copy_with_boxes
from realtime.batch.encode import piece_time_base
from realtime.batch.job import Job, with_ending
from realtime.batch.options import Settings
from realtime.batch.report import (
    Tally,
    course_of,
    read_rows,
    write_events,
    write_report,
    write_rows,
)
from realtime.batch.segment import Clip, open_video
from realtime.documents import plot_latency
from realtime.event_clips import clips_of, cut_clips
from realtime.sources.film import LONGEST_STEP_S, Packet
from realtime.sources.video import reason_of
from realtime.statistics import verdict_of

LATEST_START_S = 10.0
"""Timestamps are the source's own, unless it begins later than this, as broadcasts do, or at
``--start``: then from 0.
"""
COPIED_AUDIO = frozenset({"aac", "mp3", "ac3", "eac3", "opus", "flac", "alac"})
"""What MP4 holds and players play. Other sound is encoded to AAC."""
Timed = tuple[Fraction, int, Any]


def join_pieces(
    clip: Clip, pieces: Sequence[tuple[Path, int]], path: Path, from_zero: bool
) -> None:
    """Write an MP4, whole or not at all; its index is at the front, so that a browser plays it
    while it loads.

    Args:
        clip: whose.
        pieces: each with the source's timestamp of its first frame; at least one.
        path: the MP4.
        from_zero: begin at 0, whatever the source's timestamps say.

    Raises:
        OutputError: it cannot be written.
        SourceError: the source's sound cannot be opened.
    """
    first_s = clip.first_pts * clip.time_base
    origin_s = (
        Fraction(0)
        if not from_zero and 0 <= first_s <= LATEST_START_S
        else pieces[0][1] * clip.time_base
    )
    unit = piece_time_base(clip)
    options = {"movflags": "faststart", "movie_timescale": str(unit.denominator)}
    try:
        with whole_file(path) as part, ExitStack() as stack:
            output = stack.enter_context(av.open(str(part), "w", format="mp4", options=options))
            with av.open(str(pieces[0][0])) as first:
                video = output.add_stream_from_template(first.streams.video[0])
            video.time_base = unit
            sounds: list[Iterator[Timed]] = []
            if clip.audio:
                source = stack.enter_context(open_video(clip.spec))
                sounds = [_sound(source, output, clip, origin_s)]
            for _, _, packet in heapq.merge(
                _pictures(pieces, video, clip, origin_s), *sounds, key=lambda timed: timed[:2]
            ):
                output.mux(packet)
    except av.error.FFmpegError as error:
        raise OutputError(f"cannot write {path}: {reason_of(error)}") from error


def _pictures(
    pieces: Sequence[tuple[Path, int]], video: av.VideoStream, clip: Clip, origin_s: Fraction
) -> Iterator[Timed]:
    unit = piece_time_base(clip)
    for path, base_pts in pieces:
        start = round((base_pts * clip.time_base - origin_s) / unit)
        with av.open(str(path)) as piece:
            for packet in piece.demux(piece.streams.video[0]):
                if packet.pts is None or packet.dts is None or packet.time_base is None:
                    continue
                finer = round(unit / packet.time_base)  # MP4 may count in parts of it
                packet.pts, packet.dts = start + packet.pts // finer, start + packet.dts // finer
                packet.duration = (packet.duration or 0) // finer
                packet.time_base, packet.stream = unit, video
                yield packet.dts * unit, 0, packet


def _sound(
    source: InputContainer, output: OutputContainer, clip: Clip, origin_s: Fraction
) -> Iterator[Timed]:
    """The source's packets of sound within the selected time, as far as they can be read."""
    first, last = clip.segments[0], clip.segments[-1]
    begin_s = None if first.start_pts is None else max(origin_s, first.start_pts * clip.time_base)
    end_s = None if last.end_pts is None else last.end_pts * clip.time_base
    joined = len(clip.shifts) > 1  # then the steps of one track only are known
    streams = source.streams.audio[:1] if joined else source.streams.audio
    tracks = {stream.index: _track(stream, output) for stream in streams}

    def packets() -> Iterator[Timed]:
        with suppress(av.error.FFmpegError):
            given = source.demux(*streams)
            for packet in _moved(given, clip) if joined else given:
                for found in tracks[packet.stream.index](packet):
                    if found.pts is None or found.time_base is None:
                        continue
                    time_s = found.pts * found.time_base
                    if (begin_s is None or time_s >= begin_s) and (end_s is None or time_s < end_s):
                        shift = round(origin_s / found.time_base)
                        found.pts, found.dts = (
                            found.pts - shift,
                            (found.pts if found.dts is None else found.dts) - shift,
                        )
                        yield found.dts * found.time_base, 1 + packet.stream.index, found

    return packets()


def _moved(packets: Iterator[Packet], clip: Clip) -> Iterator[Packet]:
    """Sound of a joined file, moved as its pictures are where time begins anew; what overlaps there
    is left out.
    """
    run = 0
    before = None
    last = None
    for packet in packets:
        if packet.dts is None or packet.pts is None or packet.time_base is None:
            yield packet
            continue
        step_s = 0.0 if before is None else float((packet.dts - before) * packet.time_base)
        if step_s < 0 or step_s > LONGEST_STEP_S:
            run = min(run + 1, len(clip.shifts) - 1)
        before, shift = packet.dts, round(clip.shifts[run] * clip.time_base / packet.time_base)
        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
        if last is None or packet.dts > last:
            last = packet.dts
            yield packet


def _track(stream: av.AudioStream, output: OutputContainer) -> Callable[[Packet], list[Packet]]:
    """What becomes of a packet of that sound: it goes to the output as it is, or is encoded again
    as AAC.
    """
    if stream.codec_context.codec.canonical_name in COPIED_AUDIO:
        copy = output.add_stream_from_template(stream)

        def copied(packet: Packet) -> list[Packet]:
            packet.stream = copy
            return [packet] if packet.size else []

        return copied
    encoder = output.add_stream(
        "aac", rate=stream.codec_context.sample_rate, layout=stream.codec_context.layout
    )
    resampler = av.AudioResampler(
        "fltp", stream.codec_context.layout, stream.codec_context.sample_rate
    )

    def encoded(packet: Packet) -> list[Packet]:
        found: list[Packet] = []
        with suppress(av.error.FFmpegError):  # damaged sound is left out
            for frame in packet.decode():
                for part in resampler.resample(frame):  # type: ignore[arg-type]
                    found += encoder.encode(part)
            if not packet.size:
                found += encoder.encode(None)
        return found

    return encoded


Record = dict[str, Any]


class UnsafeCutError(SourceError):
    """Frames behind a key frame are not what they are when the ones before it are decoded: the clip
    must not be cut.
    """


def merge_job(
    job: Job, clip: Clip, settings: Settings, out: Path, facts: dict[str, Any]
) -> tuple[dict[str, Any], list[Path]]:
    """Write a job's results; see ``merge``. All its segments must be done.

    Raises:
        OutputError: a piece was damaged, a result's name is taken by now, or a file cannot be
            written.
    """
    records = job.records()
    job.claim(with_ending(out / job.name, ending) for ending in endings(settings).values())
    return merge(clip, records, settings, job.folder, out, job.name, facts, job.claim)


def merge(
    clip: Clip,
    records: Sequence[Record],
    settings: Settings,
    folder: Path,
    out: Path,
    name: str,
    facts: dict[str, Any],
    claim: Callable[[Sequence[Path]], None] = lambda _: None,
) -> tuple[dict[str, Any], list[Path]]:
    """Write a clip's results.

    Args:
        clip: whose.
        records: what ``Job.records`` gives, one for each segment.
        settings: what is wanted.
        folder: where the segments' files lie.
        out: for the results.
        name: of the results.
        facts: of the engine, for the summary.
        claim: gets all results before clips of events are written, see ``Job.claim``.

    Returns:
        The summary, and the files written, that of the summary last.

    Raises:
        UnsafeCutError: see there; nothing is written.
        SourceError: not one frame could be used.
        OutputError: a file cannot be written.
    """
    _check_cuts(clip, records)
    if not any(record["outcomes"].get("shown") for record in records):
        raise SourceError(
            next(
                (r["trouble"] for r in records if r["trouble"]),
                f"{clip.spec} has no frame to work on",
            )
        )
    files = {kind: with_ending(out / name, ending) for kind, ending in endings(settings).items()}
    tally = Tally(clip)
    rows = read_rows(
        [
            (folder / record["pieces"]["rows"]["file"], shift)
            for record, shift in _shifts(clip, records)
        ]
    )
    write_rows(rows, files["log"], files["table"], tally.add)
    tally.add_pictures(each for record in records for each in record.get("events", ()))
    for kind in ("video", "heat_video"):
        pieces = [record["pieces"][kind] for record in records if kind in record["pieces"]]
        if pieces:
            join_pieces(
                clip,
                [(folder / piece["file"], piece["base_pts"]) for piece in pieces],
                files[kind],
                settings.start_s > 0,
            )
        else:
            files.pop(kind, None)
    clips: dict[int, Path] = {}
    if settings.event_clips and "video" in files and clip.kind != "images":
        clips = clips_of(tally.events, out / name)
        claim([*files.values(), *clips.values()])
        cut_clips(tally.events, clips, files["video"], tally.first_s)
    write_events(files["events"], tally.events, clips)
    if settings.copy_video:
        copy_with_boxes(clip, read_rows([(files["log"], 0)]), files["copied_video"])
    plot_latency(tally.times, course_of(tally), files["latency_plot"], f"{name}: time per frame")
    summary = _summary(clip, records, tally, facts, files)
    if clips:
        summary["clips"] = [path.name for path in clips.values()]
    strip = [picture for record in records for picture in record["strip"]]
    write_report(files["report"], name, clip, summary, tally, strip, files["latency_plot"], clips)
    write_json(files["summary"], summary)
    return summary, [*clips.values(), *files.values()]


def endings(settings: Settings) -> dict[str, str]:
    """The endings of a clip's results, by their kind."""
    videos = {"video": ".mp4"} if settings.draws else {}
    videos |= {"copied_video": ".boxes.mkv"} if settings.copy_video else {}
    videos |= {"heat_video": ".heat.mp4"} if settings.heat_video else {}
    data = {
        "log": ".jsonl",
        "table": ".parquet",
        "events": ".events.jsonl",
        "latency_plot": ".latency.png",
        "report": ".report.html",
    }
    return {**videos, **data, "summary": ".summary.json"}


def _check_cuts(clip: Clip, records: Sequence[Record]) -> None:
    """Raise an error where a frame that two segments decoded is not the same in both."""
    for before, after in pairwise(records):
        if before["next_crc"] is not None and before["next_crc"] != after["first_crc"]:
            raise UnsafeCutError(f"{clip.spec} cannot be cut at segment {after['segment']}")


def _shifts(clip: Clip, records: Sequence[Record]) -> list[tuple[Record, int]]:
    """By how much frame numbers of each segment move: packets that show nothing were counted as
    frames before it.
    """
    found, shift = [], 0
    for segment, record in zip(clip.segments, records, strict=True):
        found.append((record, shift))
        shift += record["frames"] - segment.frames
    return found


def _summary(
    clip: Clip,
    records: Sequence[Record],
    tally: Tally,
    facts: dict[str, Any],
    files: dict[str, Path],
) -> dict[str, Any]:
    wall_s = sum(record["wall_s"] for record in records)
    spent: dict[str, Counter[str]] = {kind: Counter() for kind in ("idle_ms", "work_ms")}
    for record in records:
        for kind, sides in spent.items():
            sides.update(record[kind])
    found = tally.summary()
    last = clip.segments[-1]
    trouble = [clip.trouble] if clip.trouble else []
    trouble += [f"{count} frames are lost: {cause}" for cause, count in tally.causes.items()]
    return {
        "fps": round(found["frames"] / wall_s, 2) if wall_s else 0.0,
        **found,
        "verdict": verdict_of(spent["idle_ms"], spent["work_ms"], 1e3 * wall_s),
        "interrupted": False,
        "segments": len(records),
        "seconds_worked": round(wall_s, 3),
        "last_segment": last.index,
        "source_frames": clip.frames,
        "source_digest": clip.digest,
        "trouble": trouble,
        "not_read": list(clip.notes),
        "not_read_files": {reason: list(names) for reason, names in clip.left_out.items()},
        "audio": list(clip.audio),
        "devices": sorted({record["device"] for record in records}),
        "shown_from": records[0]["shown_from"],
        **facts,
        "files": {kind: str(path) for kind, path in files.items()},
    }
