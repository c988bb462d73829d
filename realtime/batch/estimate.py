"""Estimates how long a batch takes and on how many machines, from a measured minute of the user's
own video.
"""

import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console

from engines.errors import SourceError
from engines.files import whole_file
from engines.localizer import Localizer
from engines.options import EngineOptions
from realtime.batch.encode import PieceVideo, run_segments
from realtime.batch.merge import join_pieces, merge
from realtime.batch.options import Scale, Settings
from realtime.batch.plan import make_plan
from realtime.batch.report import Tally, read_rows, write_rows
from realtime.batch.segment import Clip, Segment, SegmentEnd, read_segment
from realtime.frames import Frame, FrameRecord
from realtime.latency_budget import open_with_notes
from realtime.sources.spec import can_be_cut

NETWORK_GBIT = 10.0
"""Of shared storage to all machines together, where nothing else is known."""


@dataclass(frozen=True)
class Minute:
    """What one machine does with a piece of the user's own video. Rates are frames a second.

    Attributes:
        rate_fps: frames that are worked on in a second of video.
        decode_fps, engine_fps, encode_fps: each stage with nothing beside it; ``encode_fps`` is
            infinite without a video.
        whole_fps: all of them together, overlapped, as a batch runs.
        merge_fps: frames of finished segments that become results; one process does this for the
            whole cluster.
        file_s: what it spends on each file besides, its report and plots.
        file_frames: frames of a file, on average.
        in_bytes_s, out_bytes_s: of a second of video, source and results.
        device: what the engine ran on.
        frames: worked on to find this out.
    """

    rate_fps: float
    decode_fps: float
    engine_fps: float
    encode_fps: float
    whole_fps: float
    merge_fps: float
    file_s: float
    file_frames: float
    in_bytes_s: float
    out_bytes_s: float
    device: str = ""
    frames: int = 0

    @property
    def limit(self) -> str:
        """The slowest stage: ``decode``, ``engine`` or ``encode``."""
        return min(
            ("decode", "engine", "encode"), key=lambda stage: float(getattr(self, f"{stage}_fps"))
        )

    @property
    def merged_fps(self) -> float:
        """Frames a second that one process merges, files' reports and all."""
        return 1 / (1 / self.merge_fps + self.file_s / self.file_frames)


@dataclass(frozen=True)
class Estimate:
    """What a batch will take.

    Attributes:
        video_h: hours of video.
        frames: to work on.
        machine_h: hours of one machine.
        machines: so many, like the one that was measured.
        hours: it takes them.
        fps: frames a second of all together.
        limit: what keeps that from being more: ``decode``, ``engine``, ``encode``, ``network`` or
            ``merge``.
        in_tb, out_tb: storage of sources and results, in 10^12 bytes.
        network_gbit: that storage gives and takes meanwhile.
        network_machines, merge_machines: more of them than this gain nothing.
        drivers: batches to split the sources into, so that merging keeps up.
        realtime: seconds of video that one machine does in a second.
    """

    video_h: float
    frames: int
    machine_h: float
    machines: int
    hours: float
    fps: float
    limit: str
    in_tb: float
    out_tb: float
    network_gbit: float
    network_machines: int
    merge_machines: int
    drivers: int
    realtime: float

    def json(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def estimate(
    minute: Minute,
    video_h: float,
    machines: int | None = None,
    within_h: float | None = None,
    network_gbit: float = NETWORK_GBIT,
) -> Estimate:
    """How long a batch takes.

    Args:
        minute: what one machine does.
        video_h: hours of video.
        machines: how many there are; None for one, or for as many as ``within_h`` asks for.
        within_h: hours that it may take.
        network_gbit: what storage gives and takes, to and from all together.
    """
    frames = round(video_h * 3600 * minute.rate_fps)
    machine_h = frames / minute.whole_fps / 3600
    count = machines or (max(1, math.ceil(machine_h / within_h - 1e-9)) if within_h else 1)
    drivers = max(1, math.ceil(count * minute.whole_fps / minute.merged_fps - 1e-9))
    fps, limit = throughput(minute, count, network_gbit, drivers)
    hours = frames / fps / 3600
    moved_bytes_s = minute.in_bytes_s + 2 * minute.out_bytes_s
    return Estimate(
        video_h,
        frames,
        machine_h,
        count,
        hours,
        fps,
        limit,
        video_h * 3600 * minute.in_bytes_s / 1e12,
        video_h * 3600 * minute.out_bytes_s / 1e12,
        fps / minute.rate_fps * moved_bytes_s * 8 / 1e9,
        math.floor(_network_fps(minute, network_gbit) / minute.whole_fps),
        math.floor(minute.merged_fps / minute.whole_fps),
        drivers,
        minute.whole_fps / minute.rate_fps,
    )


def throughput(
    minute: Minute, machines: int, network_gbit: float = NETWORK_GBIT, drivers: int = 1
) -> tuple[float, str]:
    """Frames a second of so many machines, and what limits them."""
    limits = {
        minute.limit: machines * minute.whole_fps,
        "network": _network_fps(minute, network_gbit),
        "merge": drivers * minute.merged_fps,
    }
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


def _network_fps(minute: Minute, network_gbit: float) -> float:
    """Sources are read once; results are written twice, in pieces and as a whole."""
    return network_gbit * 1e9 / 8 / ((minute.in_bytes_s + 2 * minute.out_bytes_s) / minute.rate_fps)


MINUTE_S = 60.0
KEPT_BYTES = 400_000_000
"""Decoded frames that are kept, to measure the engine and the encoder on without a decoder beside
them.
"""


def plan_chosen(
    specs: Sequence[str],
    settings: Settings,
    scale: Scale,
    choice: EngineOptions,
    console: Console,
    as_json: bool,
) -> None:
    """Measure a minute of the sources, estimate, and say so; as JSON: ``measured``, a ``Minute``,
    and ``estimate``.

    Raises:
        SourceError: none of them is a file that holds frames.
        SightlineError: the engine cannot be opened.
    """
    settings, choice = settings.beside(choice)
    clips = [make_plan(spec, "", settings.window) for spec in specs if can_be_cut(spec)]
    if not clips:
        raise SourceError(
            "the plan measures a minute of video files of this machine: name one", option="plan"
        )
    first_px = clips[0].width_px, clips[0].height_px
    localizer = open_with_notes(choice, console, 0, settings.images(specs), first_px)
    with console.status("measuring a minute ..."):
        minute = measure(clips, localizer, settings)
    own_h = sum(_seconds(clip) for clip in clips) / 3600
    each_h = scale.hours or (24.0 if scale.cameras else own_h)
    within_h = scale.within_h or (
        each_h if scale.cameras and not scale.machines else None
    )  # to keep up with them
    found = estimate(minute, each_h * (scale.cameras or 1), scale.machines, within_h)
    for line in estimate_lines(minute, found):
        console.print(line, highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps({"measured": asdict(minute), "estimate": found.json()}))


def measure(clips: Sequence[Clip], localizer: Localizer, settings: Settings) -> Minute:
    """Work on up to a minute of them, a part of each, in turns: decoder, engine and encoder alone,
    and all together.

    Raises:
        SourceError: they hold no frame.
    """
    sums = dict.fromkeys(("decode", "engine", "encode", "whole", "merge"), 0.0)
    counts = dict.fromkeys(sums, 0)
    in_bytes = 0.0
    out_bytes = 0.0
    video_s = 0.0
    file_s = list[float]()
    for clip, segments in _sample(clips):
        part = _part(clip, segments)
        localizer.expect(clip.width_px, clip.height_px)
        seconds = _seconds(part)
        video_s += seconds
        in_bytes += _size(clip) * seconds / max(seconds, _seconds(clip))
        kept, ends, count, spent_s = _decoded(part, settings.every)
        _add(sums, counts, "decode", spent_s, count)
        with TemporaryDirectory(prefix="sightline-") as folder:
            quiet = replace(settings, video=False, heat_video=False)
            for name, wanted, read in (
                ("engine", quiet, _KeptFrames(kept, ends)),
                ("whole", settings, read_segment),
            ):
                start_s = time.perf_counter()
                for _ in run_segments(part, part.segments, localizer, wanted, Path(folder), read):
                    pass
                _add(
                    sums,
                    counts,
                    name,
                    time.perf_counter() - start_s,
                    len(kept) if name == "engine" else count,
                )
            if settings.draws:
                _add(
                    sums,
                    counts,
                    "encode",
                    _encoded(part, kept, Path(folder) / "alone.mp4"),
                    len(kept),
                )
            size, grows_s, besides_s = _merged(part, localizer, settings, Path(folder))
            out_bytes += size
            file_s.append(besides_s)
            _add(sums, counts, "merge", grows_s, count)
    if not counts["decode"]:
        raise SourceError("the sources hold no frame to measure")
    rates = {name: counts[name] / sums[name] if sums[name] else math.inf for name in sums}
    file_frames = sum(clip.selected_frames for clip in clips) / len(clips) / settings.every
    return Minute(
        counts["whole"] / video_s,
        rates["decode"],
        rates["engine"],
        rates["encode"],
        rates["whole"],
        rates["merge"],
        float(np.median(file_s)),
        file_frames,
        in_bytes / video_s,
        out_bytes / video_s,
        localizer.engine.device,
        counts["whole"],
    )


def _add(
    sums: dict[str, float], counts: dict[str, int], name: str, spent_s: float, count: int
) -> None:
    sums[name], counts[name] = sums[name] + spent_s, counts[name] + count


def _sample(clips: Sequence[Clip]) -> Iterator[tuple[Clip, Sequence[Segment]]]:
    """From the middle of each, an equal share of a minute; of as many clips as have a segment in
    it.
    """
    left_s = MINUTE_S
    for place, clip in enumerate(clips):
        share_s = left_s / (len(clips) - place)
        middle = len(clip.segments) // 2
        taken = list[Segment]()
        for segment in clip.segments[middle:]:
            taken.append(segment)
            if _seconds(_part(clip, taken)) >= share_s:
                break
        left_s -= _seconds(_part(clip, taken))
        yield clip, taken
        if left_s <= 0:
            return


def _part(clip: Clip, segments: Sequence[Segment]) -> Clip:
    """A clip of these segments alone, without its sound, which is only copied."""
    return replace(clip, segments=tuple(segments), audio=())


def _seconds(clip: Clip) -> float:
    return clip.selected_frames / clip.rate_fps


def _size(clip: Clip) -> float:
    path = Path(clip.spec)
    share = clip.selected_frames / max(1, clip.frames)
    files = [path] if path.is_file() else path.iterdir() if path.is_dir() else []
    return share * sum(file.stat().st_size for file in files)


def _decoded(clip: Clip, every: int) -> tuple[list[Frame], list[SegmentEnd], int, float]:
    """Frames of its segments, as many as may be kept; what ends them; how many there are; and how
    long decoding took.
    """
    kept = list[Frame]()
    ends = list[SegmentEnd]()
    size = 0
    count = 0
    start_s = time.perf_counter()
    for segment in clip.segments:
        for item in read_segment(clip, segment, every):
            if isinstance(item, SegmentEnd):
                ends.append(item)
                continue
            count += 1
            if not item.lost and size < KEPT_BYTES:
                kept.append(item)
                size += item.image_bgr.nbytes
    return kept, ends, count, time.perf_counter() - start_s


class _KeptFrames:
    """Gives frames that were decoded before, in place of ``read_segment``."""

    def __init__(self, frames: Sequence[Frame], ends: Sequence[SegmentEnd]) -> None:
        self._frames, self._ends = frames, {end.segment: end for end in ends}

    def __call__(self, clip: Clip, segment: Segment, every: int) -> Iterable[Frame | SegmentEnd]:
        yield from (frame for frame in self._frames if frame.segment == segment.index)
        yield self._ends[segment.index]


def _encoded(clip: Clip, frames: Sequence[Frame], path: Path) -> float:
    """How long encoding them takes, in seconds."""
    start_s = time.perf_counter()
    if frames:
        with PieceVideo(path, clip, frames[0].pts or 0) as video:
            for frame in frames:
                video.write(FrameRecord(frame), np.ascontiguousarray(frame.image_bgr))
    return time.perf_counter() - start_s


def _merged(
    clip: Clip, localizer: Localizer, settings: Settings, folder: Path
) -> tuple[float, float, float]:
    """Merge what lies there: bytes of the results and seconds that grow with their length, and
    seconds besides.
    """
    records = [
        json.loads((folder / f"{segment.index:05d}.json").read_text()) for segment in clip.segments
    ]
    engine, out = localizer.engine, folder / "out"
    facts = {
        "backend": engine.backend,
        "precision": engine.precision,
        "device": engine.device,
        "size_px": localizer.size_px,
    }
    start_s = time.perf_counter()
    _, files = merge(clip, records, settings, folder, out, "part", facts)
    all_s, start_s = time.perf_counter() - start_s, time.perf_counter()
    rows = [(folder / record["pieces"]["rows"]["file"], 0) for record in records]
    write_rows(read_rows(rows), out / "again.jsonl", out / "again.parquet", Tally(clip).add)
    for kind in ("video", "heat_video"):
        pieces = [record["pieces"][kind] for record in records if kind in record["pieces"]]
        if pieces:
            join_pieces(
                clip,
                [(folder / piece["file"], piece["base_pts"]) for piece in pieces],
                out / "again.mp4",
                False,
            )
    grows_s = time.perf_counter() - start_s
    grown = sum(
        path.stat().st_size for path in files if path.suffix in (".jsonl", ".parquet", ".mp4")
    )  # not the report
    return float(grown), grows_s, max(0.0, all_s - grows_s)


def estimate_lines(minute: Minute, found: Estimate) -> list[str]:
    """What was measured and what follows from it, in words."""
    encoder = "" if math.isinf(minute.encode_fps) else f", encoder {minute.encode_fps:.0f}"
    one = found.drivers == 1
    batches = "one batch will do" if one else f"split it into {found.drivers} batches"
    return [
        (
            f"measured on {minute.frames} frames, {minute.device}: decoder {minute.decode_fps:.0f}"
            f" frames/s, engine {minute.engine_fps:.0f}{encoder}; all together"
            f" {minute.whole_fps:.0f}, {found.realtime:.1f} x real time"
        ),
        (
            f"{found.video_h:,.1f} hours of video, {found.frames:,} frames: {found.machine_h:,.1f}"
            " hours of a machine like this"
        ),
        (
            f"on {found.machines:,}: {found.hours:,.1f} hours, {found.fps:,.0f} frames/s, limited"
            f" by {found.limit}; {found.network_gbit:.2f} Gbit/s to and from storage"
        ),
        f"storage: {1e3 * found.in_tb:,.1f} GB of sources, {1e3 * found.out_tb:,.1f} GB of results",
        (
            f"{NETWORK_GBIT:g} Gbit/s of storage serve {found.network_machines:,} machines, one"
            f" command merges for {found.merge_machines:,}: {batches}"
        ),
    ]


def plot_saturation(minute: Minute, path: Path, network_gbit: float = NETWORK_GBIT) -> None:
    """Draw throughput over machines, with what stops its growth: a picture (``.png``, ``.svg``)."""
    from matplotlib.figure import Figure

    network = throughput(minute, 10**9, network_gbit, 10**9)[0]
    most = 4 * max(2, round(max(network, minute.merged_fps) / minute.whole_fps))
    counts = np.unique(np.geomspace(1, most, 200).round().astype(int))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for drivers, style in ((1, "-"), (4, "--"), (16, ":")):
        rates = [throughput(minute, int(count), network_gbit, drivers)[0] for count in counts]
        axes.plot(counts, rates, style, color="tab:blue", label=f"batches at a time: {drivers}")
    axes.axhline(
        minute.merged_fps,
        color="tab:orange",
        lw=1,
        ls="-.",
        label=f"one merges {minute.merged_fps:,.0f} frames/s",
    )
    axes.axhline(
        network,
        color="tab:red",
        lw=1,
        ls="-.",
        label=f"{network_gbit:g} Gbit/s of storage: {network:,.0f} frames/s",
    )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="machines",
        ylabel="frames/s",
        title="Where more machines stop helping",
    )
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(loc="lower right", fontsize=9)
    with whole_file(path) as part:
        figure.savefig(part, format=path.suffix[1:], dpi=110)
