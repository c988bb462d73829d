"""Limits on what a file, an archive or a camera may declare. A header costs its writer nothing, but
us memory.

Each limit lies above what real cameras and archives have, and below what would exhaust a small
machine.
"""

from engines.errors import SourceError

VIDEO_PIXELS = 2**26
"""Of a frame, of which a decoder keeps up to 17: 8K has 33 million, and the H.264, HEVC and AV1
levels up to 6.2 end at 36.
"""
FILE_BYTES = 2**29
"""Of an image's file or an archive's member; it is read whole. 200 million pixels are 0.2 GB as a
JPEG of the best quality.
"""
ARCHIVE_MEMBERS = 1_000_000
"""Of a zip or tar. Each costs about a kilobyte of memory; The largest public sets have 0.1 to 1
million in one.
"""
DIRECTORY_BYTES = 2**26
"""Of a zip's list of members, which has at least 46 bytes and a name for each."""
HEADER_BYTES = 2**20
"""Of one header of a tar, long names and attributes included; it is read whole."""
INFLATION = 1100
"""How many times larger than the archive all members together may be: deflate reaches 1032, more
means that they overlap.
"""
AHEAD_BYTES = 2**28
"""Of pictures that wait for the next stage of the work; at least one may. Four 8K pictures take 0.4
GB.
"""
WRITTEN_SIDE_PX, WRITTEN_PIXELS = 16384, 139_264 * 256
"""Of a video that is written: x264 takes no longer side, and H.264's level 6.2, its highest, no
larger frame.
"""


def check_pixels(what: str, width_px: int, height_px: int, most: int) -> None:
    """Refuse a picture before memory is taken for it.

    Raises:
        SourceError: it has more than ``most`` pixels.
    """
    if not 0 < width_px * height_px <= most:
        size = f"{width_px}x{height_px} pixels"
        raise SourceError(
            f"{what} is {size}: from 1 to {most / 1e6:.0f} million can be read; scale it"
        )


def check_bytes(what: str, size: int, most: int = FILE_BYTES) -> None:
    """Refuse a file before it is read into memory.

    Raises:
        SourceError: it is larger than ``most``.
    """
    if size > most:
        raise SourceError(
            f"{what} has {size / 1e6:.0f} MB: more than {most / 1e6:.0f} MB of one image are not"
            " read"
        )


def written_size(width_px: int, height_px: int) -> tuple[int, int]:
    """(width, height) of a video that shows pictures of this size: even, and smaller where players
    and encoders end.
    """
    scale = min(
        1.0,
        WRITTEN_SIDE_PX / max(width_px, height_px),
        (WRITTEN_PIXELS / (width_px * height_px)) ** 0.5,
    )
    if scale < 1:
        width_px, height_px = int(width_px * scale) // 2 * 2, int(height_px * scale) // 2 * 2
    return max(2, width_px + width_px % 2), max(2, height_px + height_px % 2)
