"""Clips of every kind that users have, made by ffmpeg, and what is read back of results."""

import json
import random
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import pyarrow.parquet as pq

MOVING = "testsrc2=size={size}:rate={rate}:duration={seconds}"
TIMES = (
    "captured_ns",
    *(f"{stage}_ms" for stage in ("read", "wait", "prepare", "engine", "draw", "write", "total")),
)


def ffmpeg(*arguments: object) -> None:
    subprocess.run(
        ["ffmpeg", "-v", "error", "-nostdin", "-y", *map(str, arguments)], check=True, timeout=120
    )


def make_clip(
    path: Path,
    *options: str,
    seconds: float = 22,
    size: str = "160x120",
    rate: str = "10",
    sound: str = "",
) -> Path:
    """A moving test picture in whatever the options and the name's ending say; key frames every 2 s
    unless they say so.
    """
    inputs = ["-f", "lavfi", "-i", MOVING.format(size=size, rate=rate, seconds=seconds)]
    inputs += (
        ["-f", "lavfi", "-i", f"sine=frequency=440:duration={seconds}", "-c:a", sound]
        if sound
        else []
    )
    coding = (
        []
        if "-c:v" in options
        else ["-c:v", "libx264", "-preset", "veryfast", "-sc_threshold", "0"]
    )
    key_frames = [] if "-g" in options else ["-g", "20"]
    pixels = [] if "-pix_fmt" in options else ["-pix_fmt", "yuv420p"]
    ffmpeg(*inputs, *coding, *key_frames, *pixels, "-shortest", *options, path)
    return path


def damaged(path: Path, source: Path, share: float = 0.5, length: int = 3000) -> Path:
    """A copy with noise in its middle."""
    content, begin = bytearray(source.read_bytes()), int(source.stat().st_size * share)
    content[begin : begin + length] = random.Random(1).randbytes(length)
    path.write_bytes(content)
    return path


def cut_off(path: Path, source: Path, share: float = 0.6) -> Path:
    path.write_bytes(source.read_bytes()[: int(source.stat().st_size * share)])
    return path


def packet_times(path: Path, kind: str = "video") -> tuple[list[Fraction], Fraction]:
    """When frames are shown, in seconds, in order; and the unit."""
    with av.open(str(path)) as container:
        stream = container.streams.get(**{kind: 0})[0]
        unit = Fraction(stream.time_base)
        return sorted(
            packet.pts * unit for packet in container.demux(stream) if packet.pts is not None
        ), unit


def rows_of(path: Path) -> list[dict]:
    """A log's rows without what differs from run to run: times."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def table_of(path: Path) -> list[dict]:
    return pq.read_table(path).drop_columns(list(TIMES)).to_pylist()


def sound_of(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


def decoded(path: Path) -> int:
    """Frames that can be decoded, strictly."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.options = {"err_detect": "explode"}
        return sum(1 for _ in container.decode(video=0))
