"""The facts of a source before any frame is decoded (``Clip``), and its parts (``Segment``)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from typing import Any, Self

Json = dict[str, Any]


@dataclass(frozen=True)
class Segment:
    """A run of frames that can be worked on without the ones before it. Its result depends on
    nothing else.

    Attributes:
        index: its place among the segments.
        start_pts, end_pts: frames with ``start_pts <= pts < end_pts`` are its; None for no limit.
        key_pts, key_dts: of the key frame that decoding begins at; None for the start of the file.
        first_frame: number of its first frame in the source.
        frames: how many it has, as far as the file's packets tell.
    """

    index: int
    start_pts: int | None = None
    end_pts: int | None = None
    key_pts: int | None = None
    key_dts: int | None = None
    first_frame: int = 0
    frames: int = 0


@dataclass(frozen=True)
class Clip:
    """A source's facts. Small, the same on every machine, and JSON.

    Attributes:
        spec: what the user typed.
        name: for logs and files.
        kind: ``video`` or ``images``.
        digest: of the content.
        time_base: unit of the timestamps, in seconds.
        rate_fps: nominal.
        width_px, height_px: of the first picture, upright: all are written in this size.
        pixel_aspect: a pixel's width over its height, upright.
        colour: ``space``, ``range``, ``primaries`` and ``transfer`` as in ITU-T H.273.
        first_pts: of the first frame.
        frames: in the source; the segments may be fewer.
        audio: codecs.
        segments: in order.
        trouble: what is wrong with it, if anything is known before decoding.
        notes: what of it is not read, in words.
        left_out: files among images that are not read, by the reason.
        shifts: see ``realtime.sources.film.Timeline``.
    """

    spec: str
    name: str
    kind: str
    digest: str
    time_base: Fraction
    rate_fps: float
    width_px: int
    height_px: int
    pixel_aspect: Fraction
    colour: Mapping[str, int]
    first_pts: int
    frames: int
    audio: tuple[str, ...]
    segments: tuple[Segment, ...]
    trouble: str = ""
    notes: tuple[str, ...] = ()
    shifts: tuple[int, ...] = (0,)
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def selected_frames(self) -> int:
        """Frames in the segments."""
        return sum(segment.frames for segment in self.segments)

    def pts_s(self, pts: int) -> float:
        """Seconds since the first frame."""
        return float((pts - self.first_pts) * self.time_base)

    def json(self) -> Json:
        """For ``from_json``."""
        return {
            **asdict(self),
            "time_base": str(self.time_base),
            "pixel_aspect": str(self.pixel_aspect),
        }

    @classmethod
    def from_json(cls, found: Json) -> Self:
        """Read what ``json`` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        known = {each.name: found[each.name] for each in fields(cls)}
        known |= {name: Fraction(found[name]) for name in ("time_base", "pixel_aspect")}
        known["segments"] = tuple(Segment(**segment) for segment in found["segments"])
        known |= {name: tuple(found[name]) for name in ("audio", "notes", "shifts")}
        return cls(**known)
