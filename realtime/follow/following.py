"""Followers of a run: one for each source, begun anew where the size of its frames changes."""

from dataclasses import replace

from engines.localizer import SMALLEST_PX, ImageBgr, Localization
from realtime.follow.follower import Follower
from realtime.follow.options import FollowOptions, box_around
from realtime.follow.several import Several
from realtime.follow.trust import Trust, load_trust
from realtime.frames import BoxPx, FrameRecord, Track


class Following:
    """What the frame loop asks of following. One thread uses it, the loop's, but for ``select``.

    Args:
        options: what to follow.
        trust: says how sure a box is; the shipped model if None.

    Raises:
        ModelError: the shipped model is damaged.
    """

    def __init__(self, options: FollowOptions, trust: Trust | None = None) -> None:
        self._options, self._trust = options, trust or load_trust()
        self._followers: dict[str, tuple[tuple[int, ...], Follower | Several]] = {}
        self._points: dict[str, tuple[float, float]] = {}

    def select(self, source: str, point: tuple[float, float]) -> None:
        """Follow what is at a point of a source's next frame, in shares of its width and height. Any thread may ask."""
        self._points[source] = point

    def view(self, record: FrameRecord) -> ImageBgr | None:
        """What the engine is to see of a frame, None for nothing; ``record`` keeps who asked.

        Raises:
            InputError: what was selected lies outside the frame.
        """
        image, frame = record.frame.image_bgr, record.frame
        if image.ndim != 3 or min(image.shape[:2]) < SMALLEST_PX:
            return image  # refused by the localizer
        shape, follower = self._followers.get(frame.source, ((), None))
        if follower is None or shape != image.shape:
            height, width = image.shape[:2]
            selected = self._options.box_in(width, height) if follower is None else None
            follower = self._begun(width, height, selected)
            self._followers[frame.source] = image.shape, follower
        if point := self._points.pop(frame.source, None):
            height, width = image.shape[:2]
            follower.choose(box_around((point[0] * width, point[1] * height), width, height))
        window, record.follower = follower.window(image, frame.pts_s), follower
        if window is None:
            record.carried = True
            return None
        x0, y0, x1, y1 = (int(edge) for edge in window)
        record.view_px = x1 - x0, y1 - y0
        return image[y0:y1, x0:x1]

    def followed(self, record: FrameRecord, found: Localization | None) -> Localization:
        """The answer for a frame, with the followed box, or none where it is not sure enough; ``record.track`` says more,
        and ``record.objects`` of several.

        Args:
            record: of the frame, as ``view`` left it.
            found: the engine's; None where it did not see the frame.
        """
        follower: Follower | Several = record.follower
        if isinstance(follower, Several):
            result, record.track, objects = follower.update(found)
            record.objects = tuple(each if self._sure(each.track) else replace(each, box_xyxy_px=None) for each in objects)
        else:
            result, record.track = follower.update(found)
        return replace(result, confidence=record.track.confidence).sure(self._options.min_score)

    def _begun(self, width_px: int, height_px: int, selected_px: BoxPx | None) -> Follower | Several:
        most = self._options.objects
        if most == 1:
            return Follower(width_px, height_px, self._trust, selected_px, every_frame=self._options.every_frame)
        return Several(width_px, height_px, self._trust, most, selected_px)

    def _sure(self, track: Track) -> bool:
        return track.confidence >= self._options.min_score


WHOLE_FRAMES = FollowOptions()


def opened(options: FollowOptions) -> Following | None:
    """What the loop is given; None where nothing is to be followed."""
    return Following(options) if options.follow else None
