"""Images and archives that are damaged, or whose headers lie, made on the spot; each is a few
kilobytes on the disk.
"""

import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2

from tests.realtime.media import picture

SUFFIXES = (".png", ".jpg", ".bmp", ".webp", ".tiff")


def encoded(suffix: str) -> bytes:
    """A good image."""
    return cv2.imencode(suffix, picture(0))[1].tobytes()


def png(width: int, height: int, rows: int = 1) -> bytes:
    """A valid PNG of gray pixels, as far as it goes: fewer rows than it says."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((min(width, 2**20) + 1) * rows))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def resized(suffix: str, width: int, height: int) -> bytes:
    """A good image whose header says another size."""
    content = bytearray(encoded(suffix))
    old = struct.pack(">HH", 96, 128), struct.pack("<ii", 128, 96), struct.pack("<HH", 128, 96)
    if suffix == ".jpg":
        place = content.index(b"\xff\xc0") + 5
        assert content[place : place + 4] == old[0]
        content[place : place + 4] = struct.pack(">HH", min(height, 65535), min(width, 65535))
    elif suffix == ".bmp":
        assert content[18:26] == old[1]
        content[18:26] = struct.pack("<ii", width, height)
    elif suffix == ".png":
        content[16:24] = struct.pack(">II", width, height)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    elif suffix == ".webp":
        place = content.index(b"\x9d\x01\x2a") + 3 if b"\x9d\x01\x2a" in content else 21
        content[place : place + 4] = struct.pack("<HH", width & 0x3FFF, height & 0x3FFF)
    else:
        for tag, value in ((256, width), (257, height)):
            place = next(
                at
                for at in range(len(content) - 12)
                if content[at : at + 2] == struct.pack("<H", tag)
            )
            content[place : place + 12] = struct.pack("<HHII", tag, 4, 1, value)
    return bytes(content)


def images() -> Iterator[tuple[str, bytes]]:
    """(name, content) of images of which none can be decoded."""
    for suffix in SUFFIXES:
        good, kind = encoded(suffix), suffix[1:]
        yield f"empty{suffix}", b""
        yield f"one_byte{suffix}", good[:1]
        yield f"magic_only_{kind}{suffix}", good[:8]
        yield f"cut_in_header_{kind}{suffix}", good[:24]
        yield f"text{suffix}", b"not an image\n" * 9
        yield f"zeros{suffix}", bytes(500)
        yield f"wide_{kind}{suffix}", resized(suffix, 60_000, 60_000)
        yield f"header_then_noise_{kind}{suffix}", good[:12] + b"\xa5" * 400
    yield "huge60k.png", png(60_000, 60_000)
    yield "largest.png", png(2**31 - 1, 2**31 - 1)
    yield "line.png", png(2**31 - 1, 1)
    yield "nothing.png", png(0, 0)
    yield "huge.ppm.png", b"P6\n60000 60000\n255\n" + bytes(99)
    yield (
        "huge.gif.png",
        b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"\x2c" + bytes(20),
    )
    yield "negative.bmp", resized(".bmp", -(2**31), -(2**31))


def archives(folder: Path) -> Iterator[Path]:
    """Archives none of whose images can be read, written into a folder."""
    for name, make in ARCHIVES.items():
        path = folder / name
        make(path)
        yield path


def archive(suffix: str) -> bytes:
    """A good archive of one image."""
    content = encoded(".png")
    return _zip({"a.png": content}) if suffix == ".zip" else _tar("a.png", content)


def _written(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def _zip(entries: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return stored.getvalue()


def _zip_patched(
    offset_central: int, layout: str, value: int, offset_local: int | None = None
) -> bytes:
    """A zip with a good image, one field of its headers changed."""
    content = bytearray(_zip({"a.png": encoded(".png")}))
    place = content.index(b"PK\x01\x02") + offset_central
    struct.pack_into(layout, content, place, value)
    if offset_local is not None:
        struct.pack_into(layout, content, offset_local, value)
    return bytes(content)


def _overlapping() -> bytes:
    """Many entries of one member that inflates a thousandfold."""
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(4_000_000))
        member = archive.infolist()[0]
        for number in range(1, 500):
            other = zipfile.ZipInfo(f"{number}.png")
            for field in (
                "compress_type",
                "CRC",
                "compress_size",
                "file_size",
                "header_offset",
                "flag_bits",
            ):
                setattr(other, field, getattr(member, field))
            archive.filelist.append(other)
            archive.NameToInfo[other.filename] = other
    return stored.getvalue()


def _tar(name: str, content: bytes, **fields: object) -> bytes:
    stored = io.BytesIO()
    with tarfile.open(fileobj=stored, mode="w", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        for field, value in fields.items():
            setattr(member, field, value)
        tar.addfile(member, io.BytesIO(content) if member.isreg() else None)
    return stored.getvalue()


def _tar_of_size(size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """One header that declares so many bytes, and little behind it."""
    member = tarfile.TarInfo("a.png")
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT) + bytes(2048)


def _sparse_tar(path: Path) -> None:
    """What GNU tar writes of a file that is all hole: 8 TB in one header (old GNU format)."""
    member = tarfile.TarInfo("hole.png")
    member.size = 0
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[386:398], header[398:410] = b"%011o\0" % (2**33 - 1), b"%011o\0" % 0
    header[483:495] = b"%011o\0" % (2**33 - 1)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    path.write_bytes(bytes(header) + bytes(1024))


def _hole(size: int, start: bytes) -> Callable[[Path], None]:
    """A file that is as large as it says, but takes no room on the disk."""

    def write(path: Path) -> None:
        path.write_bytes(start)
        os.truncate(path, size)

    return write


ARCHIVES: dict[str, Callable[[Path], None]] = {
    "empty.zip": _written(b""),
    "no_members.zip": _written(_zip({})),
    "no_images.zip": _written(_zip({"a.txt": b"text"})),
    "text.zip": _written(b"text\n" * 99),
    "cut.zip": _written(_zip({"a.png": encoded(".png")})[:-30]),
    "end_only.zip": _written(b"PK\x05\x06" + bytes(18)),
    "bad_image.zip": _written(_zip({"a.png": b"x"})),
    "bomb.zip": _written(_zip({"a.png": bytes(600_000_000 // 8)})),
    "declared_4_gb.zip": _written(_zip_patched(24, "<I", 2**32 - 2, 22)),
    "declared_little.zip": _written(_zip_patched(24, "<I", 4, 22)),
    "wrong_crc.zip": _written(_zip_patched(16, "<I", 1, 14)),
    "unknown_method.zip": _written(_zip_patched(10, "<H", 77, 8)),
    "encrypted.zip": _written(_zip_patched(8, "<H", 1, 6)),
    "far_offset.zip": _written(_zip_patched(42, "<I", 2**31)),
    "overlapping.zip": _written(_overlapping()),
    "folder_inside.zip": _written(_zip({"a.png/": b""})),
    "empty.tar": _written(b""),
    "zeros.tar": _written(bytes(10240)),
    "text.tar": _written(b"text\n" * 400),
    "cut.tar": _written(_tar("a.png", encoded(".png"))[:600]),
    "bad_image.tar": _written(_tar("a.png", b"x")),
    "link.tar": _written(_tar("a.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")),
    "pipe.tar": _written(_tar("a.png", b"", type=tarfile.FIFOTYPE)),
    "declared_8_gb.tar": _written(_tar_of_size(2**33 - 1)),
    "declared_8_eb.tar": _written(_tar_of_size(2**62)),
    "negative.tar": _written(_tar_of_size(-512)),
    "long_header.tar": _written(_tar_of_size(2**33 - 1, tarfile.XHDTYPE)),
    "long_header_hole.tar": _hole(2**32, _tar_of_size(2**32 - 4096, tarfile.XHDTYPE)),
    "long_name_hole.tar": _hole(2**32, _tar_of_size(2**32 - 4096, tarfile.GNUTYPE_LONGNAME)),
    "member_hole.tar": _hole(2**32, _tar_of_size(2**32 - 4096)),
    "sparse.tar": _sparse_tar,
    "directory_hole.zip": _hole(2**32, b"PK\x05\x06"),
}
