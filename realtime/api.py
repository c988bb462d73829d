"""The public API for video: ``for result in localize(source)``, over the one frame loop."""

import base64
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.choose import chosen, class_index, open_localizer
from engines.errors import InputError, SourceError
from engines.localizer import Detection, ImageBgr, Localization, Localizer
from engines.networks.registry import DEFAULT_MODEL
from engines.options import EngineOptions
from engines.text import displayable, shown
from realtime.annotate import PLAIN, Look, draw, jpeg_of
from realtime.batch.plan import make_plan
from realtime.batch.segment import frames_of
from realtime.capture import Feed, every_frame
from realtime.frames import NO_MAP, BoxPx, FrameRecord, LoopFrames, Tracked
from realtime.pipeline import Live, run_frames
from realtime.session import Settings
from realtime.sources.spec import kind_of, open_source
from realtime.sources.video import USUAL, SourceOptions
from realtime.statistics import WaitingTimes
from realtime.tracking.options import FollowOptions, opened

MOST_OBJECTS = 20
JPEG_QUALITY = 85
Notify = Callable[[str], None]


@dataclass(frozen=True)
class Box:
    """One object in a frame.

    Attributes:
        xyxy_px: edges x0, y0, x1, y1 in the frame, in pixels, not rounded.
        class_index, class_name: what it was found as.
        score: of the class, 0 to 1; what it means is the method's own.
        confidence: probability that the box is right (IoU over 0.5); None where nothing tells.
        track_id: the same number for the same object, from 1; None where nothing is followed, or it
            is not held yet.
        label: what people would call it: a name, or ``object`` where no name is sure enough.
        unsure: it is less sure than what counts as sure, and drawn dashed.
    """

    xyxy_px: BoxPx
    class_index: int
    class_name: str
    score: float
    confidence: float | None = None
    track_id: int | None = None
    label: str = ""
    unsure: bool = False


@dataclass(frozen=True, eq=False)
class Result:
    """What was found in one frame.

    Attributes:
        frame: number of the frame in its source, from 0.
        pts_s: its time in seconds since the source's first frame.
        source: the source's name.
        image_bgr: uint8 ``[height, width, 3]``; empty where the frame could not be decoded. Draw on
            a copy.
        boxes: the objects, the main one first; empty where nothing is sure enough.
        class_name, score: of the frame's main object, also where it has no box; empty and 0 where
            ``error`` is set.
        confidence: probability that the main object's box is right, also where it is withheld; None
            where nothing tells.
        map_hw: the sensitivity map over the whole frame, float32 ``[h, w]``, not normalised; empty
            where ``error`` is set.
        state: ``searching``, ``following``, ``unsure`` or ``lost``, of the main object; None where
            nothing is followed.
        error: why nothing is known of this frame, such as damage; empty where all went well.
    """

    frame: int
    pts_s: float
    source: str
    image_bgr: ImageBgr = field(repr=False)
    _record: FrameRecord = field(repr=False)
    boxes: tuple[Box, ...] = ()
    class_name: str = ""
    score: float = 0.0
    confidence: float | None = None
    map_hw: NDArray[np.float32] = field(default_factory=lambda: NO_MAP, repr=False)
    state: str | None = None
    error: str = ""

    def draw(self, look: Look = PLAIN, **changes: Any) -> ImageBgr:
        """A copy of the image with the result drawn on it, uint8 BGR.

        Args:
            look: how to draw.
            changes: fields of ``Look`` that are to be others, such as ``box=False``,
                ``heat_map="over"`` or ``alpha=0.3``.

        Raises:
            InputError: there is no such heat map, or ``alpha`` is out of its range.
            TypeError: ``Look`` has no such field.
        """
        look = replace(look, **changes)
        record = self._record
        if record.found is None or self.error:  # it may have failed after it was found
            return self.image_bgr.copy()
        truth = record.frame.truth_xyxy_px
        return draw(
            self.image_bgr,
            record.found,
            truth,
            look=look,
            objects=record.objects or (),
        )

    def _repr_html_(self) -> str:
        """The drawing with what was found, as notebooks show it."""
        if not self.image_bgr.size:
            return escape(self.error)
        jpeg = jpeg_of(self.draw(), JPEG_QUALITY)
        found = [
            each.label if each.confidence is None else f"{each.label} {100 * each.confidence:.0f} %"
            for each in self.boxes
        ]
        words = self.error or ", ".join(found) or "nothing sure in view"
        text = escape(displayable(f"{self.source}, {self.pts_s:.2f} s: {words}"))
        data = base64.b64encode(jpeg).decode()
        return f'<img alt="{text}" src="data:image/jpeg;base64,{data}"><br>{text}'

    def to_dict(self) -> dict[str, Any]:
        """The frame's row in the logs that the commands write: flat, and ready for
        ``json.dumps``.
        """
        return self._record.row()


def localize(
    source: str | int | os.PathLike[str],
    model: str | EngineOptions | Localizer = DEFAULT_MODEL,
    *,
    follow: bool | None = None,
    objects: int | None = None,
    min_score: float | None = None,
    select: str | None = None,
    every: int = 1,
    camera: SourceOptions = USUAL,
    notify: Notify | None = None,
    **options: Any,
) -> Generator[Result, None, None]:
    """Localize the frames of one source, in order.

    Of a file, folder or archive every frame comes. Of a live source (a camera, a network stream)
    the newest frame comes, frames that are not taken in time are skipped, and a connection that is
    lost is opened again. Everything is opened when the first result is asked for. Closing the
    generator, or taking it to its end, frees threads and cameras, and the engine where this call
    opened it.

    Args:
        source: a camera's number, a file, folder or pattern, a ``.zip`` or ``.tar`` of images, an
            address (``rtsp://``, ``http(s)://``), ``-``, or ``demo:``. An address that answers with
            one picture is asked again and again.
        model: a network's name or file, ``EngineOptions``, or a ``Localizer`` that is open: it
            stays open, is used by nobody else meanwhile, and as it was.
        follow: follow objects from frame to frame; None for videos and cameras, and not for photos.
        objects: at most so many are looked for; None for the options' own.
        min_score: no box whose confidence is less, 0 for all; None for the options' own, which is
            the head's own limit unless they say another one.
        select: with ``follow``, what on the first frame: ``X0,Y0,X1,Y1`` or ``X,Y`` in pixels, or a
            class.
        every: only one in so many frames.
        camera: how live sources are opened.
        notify: gets lines of what a user should know, such as a connection that is lost; from any
            thread.
        options: any fields of ``EngineOptions``.

    Raises:
        InputError: an argument is out of its range; at once.
        TypeError: there is no such option; at once.
        SourceError: the source cannot be opened, or not be read to its end; as those below, when a
            result is asked for. A frame that is damaged is a result with an ``error``.
        ModelError: the model, weights or head cannot be used.
        EngineError: the backend is missing or failed.
        DownloadError: weights cannot be fetched.
    """
    wanted = _Source(_spec_of(source), every, camera, notify or (lambda _: None))
    _check(every, objects, min_score)
    asked = FollowOptions(follow, min_score, select).for_source(kind_of(wanted.spec).alone)
    engine, following = _chosen(model, options, asked, objects, min_score, notify)
    return _results(wanted, engine, following)


Size = tuple[int, int] | None
Engine = Callable[[int, int, Size], AbstractContextManager[Localizer]]
"""Opens or borrows a localizer, given ``streams``, ``batch`` and ``first_px`` of
``open_localizer``.
"""


@dataclass(frozen=True)
class _Source:
    """A source that is to be opened, see ``localize``."""

    spec: str
    every: int
    camera: SourceOptions
    notify: Notify


def _spec_of(source: object) -> str:
    if isinstance(source, int) and not isinstance(source, bool):
        return str(source)
    if isinstance(source, str | os.PathLike):
        return str(os.fspath(source))
    raise InputError(f"a source is text, a path or a camera's number, not {type(source).__name__}")


def _check(every: int, objects: int | None, min_score: float | None) -> None:
    if not isinstance(every, int) or every < 1:
        raise InputError(f"every is a whole number from 1 on, not {every!r}")
    if objects is not None and not 1 <= objects <= MOST_OBJECTS:
        raise InputError(f"objects goes from 1 to {MOST_OBJECTS}, not {objects}")
    if min_score is not None and not 0 <= min_score <= 1:
        raise InputError(f"min_score goes from 0 to 1, not {min_score}")


def _chosen(
    model: str | EngineOptions | Localizer,
    options: dict[str, Any],
    following: FollowOptions,
    objects: int | None,
    min_score: float | None,
    notify: Notify | None,
) -> tuple[Engine, FollowOptions]:
    """What localizes, and what is followed; where nothing is said of objects and scores, as the
    options of the model say.
    """
    if isinstance(model, Localizer):
        if options:
            raise InputError(
                f"{', '.join(options)}: a Localizer that is open has its options already"
            )
        if objects is not None and not following.follow:
            raise InputError(
                "objects: a Localizer that is open finds as many as it was opened for; open it for"
                " more"
            )
        following = replace(
            following,
            objects=objects or 1,
            min_score=model.asked_confidence if min_score is None else min_score,
        )
        return partial(_borrowed, model, following), following
    choice = chosen(model, options if objects is None else {**options, "objects": objects})
    least = choice.least_confidence if min_score is None else min_score
    following, choice = replace(following, min_score=least).beside(
        replace(choice, least_confidence=0.0)
    )
    return partial(_opened_here, choice, notify), following


@contextmanager
def _opened_here(
    choice: EngineOptions, notify: Notify | None, streams: int, batch: int, first_px: Size
) -> Iterator[Localizer]:
    with open_localizer(choice, notify, streams, batch, first_px) as localizer:
        yield localizer


@contextmanager
def _borrowed(
    localizer: Localizer, following: FollowOptions, _streams: int, _batch: int, first_px: Size
) -> Iterator[Localizer]:
    """The localizer with what is asked for, where no tracker sees to it; afterwards as it was."""
    if first_px is not None:
        localizer.expect(*first_px)
    least, wanted = localizer.asked_confidence, localizer.wanted_class
    asked = 0.0 if following.follow else following.min_score
    if asked != least:
        localizer.abstain_below(asked)
    try:
        if following.class_name is not None:
            localizer.look_for(
                class_index(following.class_name, localizer.class_names, localizer.names)
            )
        yield localizer
    finally:
        if asked != least:
            localizer.abstain_below(least)
        if following.class_name is not None:
            localizer.look_for(wanted)


def _results(
    source: _Source, engine: Engine, following: FollowOptions
) -> Generator[Result, None, None]:
    with ExitStack() as stack:
        frames_for, feed, trouble, first_px = _opened(source, stack)
        kind = kind_of(source.spec)  # frames of a video file share calls, as in ``batch``
        images = 0 if kind.can_be_cut and not kind.alone else 1
        localizer = stack.enter_context(engine(1 if feed else 0, images, first_px))
        tracker = opened(following, localizer)
        live = (
            Live(
                lambda: Settings(class_index=localizer.wanted_class, min_score=following.min_score),
                feed.stop,
            )
            if feed
            else None
        )
        frames = frames_for(localizer.batch)
        loop = run_frames(frames, localizer, (), WaitingTimes(), live=live, following=tracker)
        for record in stack.enter_context(closing(loop)):
            if record.outcome != "dropped":
                yield _result(record)
        if trouble:
            raise SourceError(trouble)


def _opened(
    source: _Source, stack: ExitStack
) -> tuple[Callable[[int], LoopFrames], Feed | None, str, Size]:
    """Frames, given the images that an engine call takes; what reads a live source; what is wrong
    with a file as a whole; the size of the first frame.

    Raises:
        SourceError: the source cannot be opened.
    """
    spec, every = source.spec, source.every
    kind = kind_of(spec)
    if kind.can_be_cut:
        clip = make_plan(spec, "", whole=True)
        for note in clip.notes:
            source.notify(note)
        trouble = f"{shown(spec)} {clip.trouble}" if clip.trouble else ""
        frames = partial(frames_of, clip, clip.segments, every, ends={})
        return frames, None, trouble, (clip.width_px, clip.height_px)
    if not kind.live:
        found = stack.enter_context(open_source(spec, source.camera))
        if not found.live:
            return lambda _: _one_in(every_frame(found), every), None, "", None
        # an address that turned out live is read by what opens it again when it is lost
        found.close()
    feed = Feed([spec], source.camera, notify=source.notify)
    return lambda _: _one_in(feed.frames(), every), feed, "", None


def _one_in(frames: LoopFrames, every: int) -> LoopFrames:
    """Those of one in so many frames; dropped ones do not count."""
    number = 0
    with closing(frames):
        for frame in frames:
            if frame.record.outcome != "shown":
                yield frame
                continue
            if number % every == 0:
                yield frame
            number += 1


def _result(record: FrameRecord) -> Result:
    frame, found = record.frame, record.found if record.outcome == "shown" else None
    result = Result(
        frame.index,
        frame.pts_s,
        frame.source,
        frame.image_bgr,
        record,
        error=displayable(record.cause),
    )
    if found is None:
        return result
    return replace(
        result,
        boxes=_boxes(record),
        class_name=found.class_name,
        score=found.score,
        confidence=found.confidence,
        map_hw=found.map_hw,
        state=record.track.state if record.track else None,
    )


def _boxes(record: FrameRecord) -> tuple[Box, ...]:
    """What is sure enough to be shown: objects that are followed, or else what was found in this
    frame.
    """
    found, track = record.found, record.track
    if record.objects is not None:
        return tuple(
            _box(each.box_xyxy_px, each, each.track.track_id)
            for each in record.objects
            if each.box_xyxy_px is not None
        )
    if found is None or found.box_xyxy_px is None:
        return ()
    main = _box(found.box_xyxy_px, found, (track.track_id or None) if track else None)
    if track is not None:
        return (main,)
    return (main, *(_box(each.box_xyxy_px, each) for each in found.detections[1:]))


def _box(
    xyxy_px: BoxPx, found: Localization | Detection | Tracked, track_id: int | None = None
) -> Box:
    return Box(
        xyxy_px,
        found.class_index,
        found.class_name,
        found.score,
        found.confidence,
        track_id,
        found.label,
        found.unsure,
    )
