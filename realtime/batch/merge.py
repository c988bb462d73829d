"""From a clip's finished segments to its results: nothing else goes into them but the source's sound."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from engines.base import SourceError
from engines.files import write_json
from realtime.batch.clip import Clip
from realtime.batch.job import Job
from realtime.batch.join import join_pieces
from realtime.batch.names import with_ending
from realtime.batch.report import plot_latency, write_report
from realtime.batch.rows import read_rows, write_rows
from realtime.batch.settings import Settings
from realtime.batch.tally import Tally
from realtime.latency import verdict_of

Record = dict[str, Any]


class UnsafeCutError(SourceError):
    """Frames behind a key frame are not what they are when the ones before it are decoded: the clip must not be cut."""


def merge_job(job: Job, clip: Clip, settings: Settings, out: Path, facts: dict[str, Any]) -> tuple[dict[str, Any], list[Path]]:
    """Write a job's results; see ``merge``. All its segments must be done.

    Raises:
        OutputError: a piece was damaged, a result's name is taken by now, or a file cannot be written.
    """
    records = job.records()
    job.claim(with_ending(out / job.name, ending) for ending in endings(settings).values())
    return merge(clip, records, settings, job.folder, out, job.name, facts)


def merge(
    clip: Clip, records: Sequence[Record], settings: Settings, folder: Path, out: Path, name: str, facts: dict[str, Any]
) -> tuple[dict[str, Any], list[Path]]:  # fmt: skip
    """Write a clip's results.

    Args:
        clip: whose.
        records: what ``Job.records`` gives, one for each segment.
        settings: what is wanted.
        folder: where the segments' files lie.
        out: for the results.
        name: of the results.
        facts: of the engine, for the summary.

    Returns:
        The summary, and the files written.

    Raises:
        UnsafeCutError: see there; nothing is written.
        SourceError: not one frame could be used.
        OutputError: a file cannot be written.
    """
    _check_cuts(clip, records)
    if not any(record["outcomes"].get("shown") for record in records):
        raise SourceError(next((r["trouble"] for r in records if r["trouble"]), f"{clip.spec} has no frame to work on"))
    files = {kind: with_ending(out / name, ending) for kind, ending in endings(settings).items()}
    tally = Tally(clip)
    rows = read_rows([(folder / record["pieces"]["rows"]["file"], shift) for record, shift in _shifts(clip, records)])
    write_rows(rows, files["log"], files["table"], tally.add)
    for kind in ("video", "heat_video"):
        pieces = [record["pieces"][kind] for record in records if kind in record["pieces"]]
        if pieces:
            join_pieces(
                clip, [(folder / piece["file"], piece["base_pts"]) for piece in pieces], files[kind], settings.start_s > 0
            )
        else:
            files.pop(kind, None)
    plot_latency(tally, files["latency_plot"], f"{name}: time per frame")
    summary = _summary(clip, records, tally, facts, files)
    strip = [picture for record in records for picture in record["strip"]]
    write_report(files["report"], name, clip, summary, tally, strip, files["latency_plot"])
    write_json(files["summary"], summary)
    return summary, list(files.values())


def endings(settings: Settings) -> dict[str, str]:
    """Of a clip's results, by their kind."""
    videos = {"video": ".mp4"} if settings.video else {}
    videos |= {"heat_video": ".heat.mp4"} if settings.heat_video else {}
    data = {"log": ".jsonl", "table": ".parquet", "latency_plot": ".latency.png", "report": ".report.html"}
    return {**videos, **data, "summary": ".summary.json"}


def _check_cuts(clip: Clip, records: Sequence[Record]) -> None:
    """A frame that two segments decoded, one as its first, must be the same."""
    for before, after in pairwise(records):
        if before["next_crc"] is not None and before["next_crc"] != after["first_crc"]:
            raise UnsafeCutError(f"{clip.spec} cannot be cut at segment {after['segment']}")


def _shifts(clip: Clip, records: Sequence[Record]) -> list[tuple[Record, int]]:
    """By how much frame numbers of each segment move: packets that show nothing were counted as frames before it."""
    found, shift = [], 0
    for segment, record in zip(clip.segments, records, strict=True):
        found.append((record, shift))
        shift += record["frames"] - segment.frames
    return found


def _summary(
    clip: Clip, records: Sequence[Record], tally: Tally, facts: dict[str, Any], files: dict[str, Path]
) -> dict[str, Any]:  # fmt: skip
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
        "fps": round(found["frames"] / wall_s, 2) if wall_s else 0.0, **found,
        "verdict": verdict_of(spent["idle_ms"], spent["work_ms"], 1e3 * wall_s), "interrupted": False,
        "segments": len(records), "seconds_worked": round(wall_s, 3), "last_segment": last.index,
        "source_frames": clip.frames, "source_digest": clip.digest, "trouble": trouble, "not_read": list(clip.notes),
        "not_read_files": {reason: list(names) for reason, names in clip.left_out.items()},
        "audio": list(clip.audio),
        "devices": sorted({record["device"] for record in records}), **facts,
        "files": {kind: str(path) for kind, path in files.items()},
    }  # fmt: skip
