"""How long a batch takes, on how much, from a measured minute: arithmetic only. The minute is ``realtime.batch.minute``'s."""

import math
from dataclasses import asdict, dataclass
from typing import Any

NETWORK_GBIT = 10.0
"""Of shared storage to all machines together, where nothing else is known."""


@dataclass(frozen=True)
class Minute:
    """What one machine does with a piece of the user's own video. Rates are frames a second.

    Attributes:
        rate_fps: frames that are worked on in a second of video.
        decode_fps, engine_fps, encode_fps: each stage with nothing beside it; ``encode_fps`` is infinite without a video.
        whole_fps: all of them together, overlapped, as a batch runs.
        merge_fps: frames of finished segments that become results; one process does this for the whole cluster.
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
        return min(("decode", "engine", "encode"), key=lambda stage: float(getattr(self, f"{stage}_fps")))

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
        limit: what keeps that from being more: ``decode``, ``engine``, ``encode``, ``network`` or ``merge``.
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
        """For ``--json``."""
        return asdict(self)


def estimate(
    minute: Minute, video_h: float, machines: int | None = None, within_h: float | None = None,
    network_gbit: float = NETWORK_GBIT,
) -> Estimate:  # fmt: skip
    """Estimate.

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
        video_h, frames, machine_h, count, hours, fps, limit, video_h * 3600 * minute.in_bytes_s / 1e12,
        video_h * 3600 * minute.out_bytes_s / 1e12, fps / minute.rate_fps * moved_bytes_s * 8 / 1e9,
        math.floor(_network_fps(minute, network_gbit) / minute.whole_fps), math.floor(minute.merged_fps / minute.whole_fps),
        drivers, minute.whole_fps / minute.rate_fps,
    )  # fmt: skip


def throughput(minute: Minute, machines: int, network_gbit: float = NETWORK_GBIT, drivers: int = 1) -> tuple[float, str]:
    """Frames a second of so many machines, and what limits them."""
    limits = {
        minute.limit: machines * minute.whole_fps, "network": _network_fps(minute, network_gbit),
        "merge": drivers * minute.merged_fps,
    }  # fmt: skip
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


def _network_fps(minute: Minute, network_gbit: float) -> float:
    """Sources are read once; results are written twice, in pieces and as a whole."""
    return network_gbit * 1e9 / 8 / ((minute.in_bytes_s + 2 * minute.out_bytes_s) / minute.rate_fps)
