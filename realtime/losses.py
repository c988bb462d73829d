"""What is lost of a live stream on its way, and which pictures that spoils."""

import math
import time

import av


class Losses:
    """Which pictures of a live stream are whole, when data are lost on the way.

    A loss spoils its picture and all that build on it, until the next key picture. Decoders fill the gaps, and own up to few.

    Attributes:
        last_s: how long the present loss has lasted.
    """

    def __init__(self) -> None:
        self._whole_from_pts, self._since_s, self._hole_before = -math.inf, 0.0, False

    @property
    def last_s(self) -> float:
        return time.monotonic() - self._since_s if self._whole_from_pts == math.inf else 0.0

    def begin(self) -> None:
        """Something is lost."""
        if self._whole_from_pts != math.inf:
            self._whole_from_pts, self._since_s = math.inf, time.monotonic()

    def come(self, packet: "av.Packet[av.VideoStream]") -> None:
        """Look at a packet before it is decoded."""
        if packet.is_corrupt or self._hole_before:  # a hole is told of where it begins, and may reach into the next packet
            self.begin()
        elif packet.is_keyframe and self._whole_from_pts == math.inf:
            self._whole_from_pts = -math.inf if packet.pts is None else packet.pts
        self._hole_before = packet.is_corrupt

    def spoil(self, picture: av.VideoFrame) -> bool:
        """Whether this picture is not whole."""
        if picture.is_corrupt:
            self.begin()
        return self._whole_from_pts == math.inf or (picture.pts is not None and picture.pts < self._whole_from_pts)
