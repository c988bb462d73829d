"""What the page teaches with: frames that are held still, drafts of their boxes, frames worth
labelling, and what is done with the labels.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np

from engines.boxes import overlap
from engines.errors import InputError, OutputError, SightlineError
from engines.localizer import Detection, ImageBgr, Localization
from engines.networks.network import NO_CLASSES
from engines.text import displayable, in_words
from realtime.annotate import heat_map, jpeg_of
from realtime.frames import BoxPx, FrameRecord, Tracked
from realtime.teaching.labels import Box, LabelFolder
from realtime.teaching.learning import Learning
from realtime.teaching.why import (
    SIGNATURE_PX,
    Explain,
    Signature,
    explanation_json,
    nearest,
    percent,
    signature_of,
)

OPEN_S = 8.0
"""The page asks more often while somebody teaches."""
FREEZE_S = 3.0
"""So long a frame is waited for."""
JPEG_QUALITY = 95
THUMB_PX = 168
MAP_SHARE = 0.55
MOST_HELD, MOST_SUGGESTED = 32, 6
MOST_LISTED = 60
ALIKE = 0.02
"""Frames whose small grey pictures differ by less, as a root mean square of 0..1, are alike."""
UNKNOWN_CONFIDENCE = 0.5
FEWEST_BOXES, ENOUGH_BOXES = 5, 12
SAME_IOU = 0.5
"""Two boxes that overlap so much are of one object."""


@dataclass(frozen=True)
class Draft:
    """A box that was found: its name, where it has one, and how sure it is."""

    name: str
    box_xyxy_px: BoxPx
    confidence: float | None


@dataclass
class Held:
    """A frame that is held still.

    Attributes:
        key: names it in requests.
        jpeg: the frame as it came, not drawn on.
        size_px: width and height.
        drafts: what was found in it, the surest first.
        signature: a small grey picture of it, for comparison.
        unsure: how unsure its main box is: 0 (sure) to 1.
        file: its name in the folder of labels; empty until a label of it is saved.
        looked_at_s: when somebody last chose it; 0 where nobody did.
        found: the whole answer for it; None where it was read from the folder.
    """

    key: str
    jpeg: bytes
    size_px: tuple[int, int]
    drafts: tuple[Draft, ...]
    signature: Signature
    unsure: float
    file: str = ""
    looked_at_s: float = 0.0
    found: Localization | None = None


class Teacher:
    """A sink of the loop, and what the page asks about teaching. Every method may be called from
    any thread.

    It does nothing until somebody teaches: ``is_open``.

    Args:
        folder: of the labels.
        learning: fits and swaps heads; None where heads cannot be fitted in this run.
        why_not: why they cannot, in words.
        comes_first: the page opens with teaching.
        explain: explains boxes; None where that cannot be.

    Raises:
        SourceError: the folder holds a table of labels that cannot be read.
    """

    needs_picture = False

    def __init__(
        self,
        folder: Path,
        learning: Learning | None = None,
        why_not: str = "",
        comes_first: bool = False,
        explain: Explain | None = None,
    ) -> None:
        self.comes_first = comes_first
        self._explain = explain
        self.labels = LabelFolder(folder)
        self._table_changed_at = _changed_at(self.labels.table)
        self.learning, self._why_not = learning, why_not
        self._lock = threading.RLock()
        self._came = threading.Condition()
        self._newest: dict[str, FrameRecord] = {}
        self._held: dict[str, Held] = {}
        self._files: dict[str, str] = {}
        self._signatures: dict[str, Signature] = {}
        self._open_s = -OPEN_S

    @property
    def is_open(self) -> bool:
        """Whether somebody is teaching: films then begin again at their end."""
        return time.monotonic() - self._open_s < OPEN_S

    def opened(self) -> None:
        """Somebody is teaching now."""
        with self._came:
            if not self.is_open:
                self._newest.clear()  # of the last time
            self._open_s = time.monotonic()

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``."""
        if self.is_open and record.outcome == "shown" and record.frame.image_bgr.size:
            with self._came:
                self._newest[record.frame.source] = record
                self._came.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.learning is not None:
            self.learning.close()

    @property
    def written(self) -> dict[str, list[Path]]:
        """The table of ``labels``, where any was changed, and each ``head`` that was kept."""
        changed = _changed_at(self.labels.table) != self._table_changed_at
        heads = self.learning.kept if self.learning is not None else []
        return {"labels": [self.labels.table] if changed else [], "head": heads}

    def freeze(self, source: str) -> Held:
        """Hold the newest frame of a source.

        Raises:
            InputError: it has given none lately.
        """
        self.opened()
        with self._came:
            self._came.wait_for(lambda: source in self._newest, FREEZE_S)
            record = self._newest.get(source)
        if record is None:
            raise InputError(f"there is no picture of {source} yet: wait until one is shown")
        return self._hold(record, time.monotonic())

    def look_at(self, key: str) -> Held:
        """A frame that somebody chose: it is kept longer than others.

        Raises:
            InputError: see ``held``.
        """
        found = self.held(key)
        found.looked_at_s = time.monotonic()
        return found

    def held(self, key: str) -> Held:
        """A frame that is held, or an image of the folder.

        Raises:
            InputError: there is no such frame any more.
        """
        with self._lock:
            found = self._held.get(key)
            file = self._files.get(key, key)
            if found is None and (file != key or file in self.labels.all()):
                found = self._read(file)
            if found is None:
                raise InputError("this frame is gone: freeze another one")
            return found

    def boxes_of(self, held: Held) -> tuple[Box, ...] | None:
        """Its labels; None where it has none yet."""
        return self.labels.all().get(held.file) if held.file else None

    def save(self, key: str, boxes: Sequence[Box]) -> Held:
        """Keep the boxes of a frame; none says that nothing is in it.

        Raises:
            InputError: a box or a name cannot be, or the frame is gone.
            OutputError: it cannot be written.
        """
        with self._lock:
            held = self.held(key)
            if not held.file:
                self.labels.check(boxes, held.size_px)
                held.file = self._files[key] = self.labels.add_image(held.key, held.jpeg)
            self.labels.save(held.file, boxes, held.size_px)
            self._signatures[held.file] = held.signature
            return held

    def remove(self, key: str) -> None:
        """Forget the labels of a frame.

        Raises:
            InputError, OutputError: see ``held`` and ``LabelFolder.remove``.
        """
        held = self.held(key)
        if held.file:
            self.labels.remove(held.file)

    def undo(self) -> Held:
        """Take the last change of labels back, and hold the image that it was of.

        Raises:
            InputError: there is none, or the image is gone.
            OutputError: it cannot be written.
        """
        with self._lock:
            file = self.labels.undo()
            if file is None:
                raise InputError("there is nothing to undo")
            for held in self._held.values():
                if held.file == file:
                    return held
            return self._read(file)

    def thumb(self, key: str) -> bytes:
        """A small picture of a frame, as a JPEG.

        Raises:
            InputError: see ``held``.
        """
        held = self.held(key)
        image = _decoded(held.jpeg)
        assert image is not None
        width, height = held.size_px
        scale = THUMB_PX / max(width, 1)
        size = THUMB_PX, max(1, round(height * scale))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        return jpeg_of(small, 80)

    def map_over(self, key: str) -> bytes:
        """A frame under its sensitivity map, as a JPEG.

        Raises:
            InputError: see ``held``; or there is no map of it.
        """
        held = self.held(key)
        image = _decoded(held.jpeg)
        found = held.found
        if image is None or (found is None and self._explain is None):
            raise InputError("there is no map of this frame: freeze a live one")
        if found is not None:
            map_hw = found.map_hw
        else:
            assert self._explain is not None
            map_hw = self._explain(image, None).map_hw
        heat = heat_map(map_hw, *held.size_px)
        drawn = cv2.addWeighted(image, 1 - MAP_SHARE, heat, MAP_SHARE, 0)
        return jpeg_of(drawn, 85)

    def why(self, key: str, box_xyxy_px: BoxPx | None = None) -> dict[str, Any]:
        """Why a frame has its answer.

        Args:
            key: of the frame.
            box_xyxy_px: the box that is asked about; None for the surest.

        Returns:
            ``words``, sentences; ``nearest``, the labelled images that look most like it, with
            their ``names``; ``explanation``, see ``explanation_json``, or None where there is none.

        Raises:
            InputError: see ``held``.
        """
        held = self.held(key)
        words, explanation = list[str](), None
        image = _decoded(held.jpeg)
        if self._explain is not None and image is not None:
            try:
                found = self._explain(image, box_xyxy_px)
                shown = _shown_confidence(held.drafts, found.box_xyxy_px)
                explanation = explanation_json(found, shown)
                words = explanation["words"]
            except SightlineError as error:
                words = [f"It cannot be explained further: {in_words(error)}."]
        if explanation is None and held.found is not None:
            words = [*why_in_words(held.found, held.drafts), *words]
        known = dict(zip(self._listed(), self._labelled_signatures(), strict=True))
        known.pop(held.file, None)
        labels = self.labels.all()
        near = [
            {"file": file, "names": sorted({each.name for each in labels.get(file, ())})}
            for file in nearest(held.signature, known)
        ]
        return {"words": words, "nearest": near, "explanation": explanation}

    def _hold(self, record: FrameRecord, looked_at_s: float = 0.0) -> Held:
        frame = record.frame
        key = f"{frame.source}-{frame.index:06d}"
        with self._lock:
            if key in self._held:
                there = self._held[key]
                there.looked_at_s = max(there.looked_at_s, looked_at_s)
                return there
        image = frame.image_bgr
        height, width = image.shape[:2]
        jpeg = jpeg_of(image, JPEG_QUALITY)
        drafts = drafts_of(record.found, record.objects or ())
        found = drafts[0] if drafts else record.found
        sure = found.confidence if found else None
        unsure = 1 - abs(2 * (UNKNOWN_CONFIDENCE if sure is None else sure) - 1)
        held = Held(key, jpeg, (width, height), drafts, signature_of(image), unsure)
        held.looked_at_s, held.file = looked_at_s, self._files.get(key, "")
        held.found = record.found
        with self._lock:
            self._held[key] = held
            while len(self._held) > MOST_HELD:
                self._drop_one()
        return held

    def _drop_one(self) -> None:
        """Let the frame go that nobody looked at and that says least that is new."""
        worth = self._worth()
        held = self._held.values()
        least = min(held, key=lambda each: (each.looked_at_s, worth.get(each.key, 0.0)))
        del self._held[least.key]

    def _read(self, file: str) -> Held:
        """An image of the folder.

        Raises:
            InputError: it cannot be read.
        """
        path = self.labels.folder / file
        jpeg = _content(path)
        image = _decoded(jpeg)
        if image is None:
            raise InputError(f"{path} cannot be read: put it back, or remove its label")
        height, width = image.shape[:2]
        held = Held(file, jpeg, (width, height), (), signature_of(image), 0.0, file)
        self._held[file] = held
        return held

    def suggest(self) -> list[Held]:
        """The frames that are most worth labelling: those that the head is unsure of, and that
        differ from the labelled ones and from each other.
        """
        if self.is_open:
            for record in self._newest_ones():
                self._hold(record)
        with self._lock:
            chosen: list[Held] = []
            while len(chosen) < MOST_SUGGESTED:
                worth = self._worth(chosen)
                best = max(worth, key=lambda key: worth[key], default=None)
                if best is None or worth[best] <= 0:
                    break
                chosen.append(self._held[best])
            return chosen

    def _newest_ones(self) -> list[FrameRecord]:
        with self._came:
            return list(self._newest.values())

    def _worth(self, beside: Sequence[Held] = ()) -> dict[str, float]:
        """What labelling each held frame is worth, 0 for nothing; of those that are not labelled.

        Args:
            beside: frames that are chosen already.
        """
        known = self._labelled_signatures()
        known = [*known, *(each.signature for each in beside)]
        table = np.stack(known) if known else None
        found = {}
        for each in self._held.values():
            if each.file or each in beside:
                continue
            away = 1.0
            if table is not None:
                away = float(np.sqrt(((table - each.signature) ** 2).mean(axis=1)).min())
            found[each.key] = 0.0 if away < ALIKE else away * (0.25 + each.unsure)
        return found

    def _listed(self) -> list[str]:
        """The images that were labelled last."""
        return list(self.labels.all())[-MOST_LISTED:]

    def _labelled_signatures(self) -> list[Signature]:
        """Of the images that were labelled last."""
        files = self._listed()
        for file in files:
            if file not in self._signatures:
                image = _decoded(_content(self.labels.folder / file))
                self._signatures[file] = (
                    np.zeros(np.prod(SIGNATURE_PX), np.float32)
                    if image is None
                    else signature_of(image)
                )
        return [self._signatures[file] for file in files]

    def state(self) -> dict[str, Any]:
        """What the page shows of teaching."""
        labels = self.labels.all()
        names = self.labels.counts()
        listed = [
            {"file": file, "names": sorted({each.name for each in boxes}), "boxes": len(boxes)}
            for file, boxes in [*labels.items()][-MOST_LISTED:]
        ]
        return {
            "folder": displayable(str(self.labels.folder)),
            "images": len(labels),
            "boxes": sum(names.values()),
            "empty": sum(not boxes for boxes in labels.values()),
            "names": names,
            "can_undo": self.labels.can_undo,
            "labelled": listed[::-1],
            "suggested": [each.key for each in self.suggest()],
            "advice": advice(names, labels),
            "fewest": FEWEST_BOXES,
            "learning": self.learning.state() if self.learning else None,
            "why_not": self._why_not,
        }

    def learn(self, even_if_worse: bool = False) -> None:
        """Fit a head to the labels, in the background.

        Raises:
            InputError: there are too few labels, or nothing is new, or it is learning already.
        """
        learning = self._able()
        boxes = sum(self.labels.counts().values())
        if boxes < FEWEST_BOXES:
            more = FEWEST_BOXES - boxes
            raise InputError(
                f"draw {more} more box{'es' * (more > 1)}: it learns from {FEWEST_BOXES} on, and"
                f" {ENOUGH_BOXES} in different places are better"
            )
        learning.start(self.labels.table, self.labels.all(), even_if_worse)

    def stop(self) -> None:
        """End the fit that is going on."""
        self._able().stop()

    def use(self, taught: bool) -> None:
        """See ``Learning.use``."""
        self._able().use(taught)

    def keep(self, name: str) -> Path:
        """See ``Learning.keep``."""
        return self._able().keep(name)

    def _able(self) -> Learning:
        if self.learning is None:
            raise InputError(f"this run cannot learn: {self._why_not}")
        return self.learning


def advice(names: Mapping[str, int], labels: Mapping[str, Sequence[Box]]) -> str:
    """What to do next, in one line."""
    boxes = sum(names.values())
    if not labels:
        return "Freeze a frame that shows the object, and drag a box round it."
    if boxes < FEWEST_BOXES:
        more = FEWEST_BOXES - boxes
        return f"{more} more box{'es' * (more > 1)}, then it can learn."
    rare = min(names, key=lambda name: names[name])
    if len(names) > 1 and names[rare] < FEWEST_BOXES:
        return f"'{rare}' has {names[rare]} box{'es' * (names[rare] > 1)}: label it more often."
    if boxes < ENOUGH_BOXES:
        return f"It can learn now. {ENOUGH_BOXES} boxes in different places are better."
    if all(labels.values()):
        return "It can learn now. A few frames with nothing in them help, too."
    return "It can learn now."


def why_in_words(found: Localization, drafts: Sequence[Draft]) -> list[str]:
    """What was found in a frame, how sure that is, and what the network sees in it: sentences."""
    lines = []
    sure = drafts[0].confidence if drafts else found.confidence
    likely = "" if sure is None else f"right with a probability of {percent(sure)}"
    if drafts and likely:
        lines.append(f"The box '{drafts[0].name or 'object'}' is {likely}.")
        if found.unsure:
            lines.append("That counts as unsure, so it is drawn dashed.")
    elif not drafts:
        lines.append(f"No box is sure enough{': the best one is ' + likely if likely else ''}.")
    if found.class_name not in NO_CLASSES:
        likeliest = f"'{found.class_name}' ({percent(found.score)})"
        lines.append(f"The likeliest class of the picture is {likeliest}.")
    return lines


def _shown_confidence(drafts: Sequence[Draft], box_xyxy_px: BoxPx | None) -> float | None:
    """The confidence that the run showed for a box; None where it showed none."""
    if box_xyxy_px is None or not drafts:
        return None
    best = max(drafts, key=lambda each: overlap(each.box_xyxy_px, box_xyxy_px))
    return best.confidence if overlap(best.box_xyxy_px, box_xyxy_px) >= SAME_IOU else None


def drafts_of(found: Localization | None, objects: Sequence[Tracked]) -> tuple[Draft, ...]:
    """The boxes that were found in a frame, the surest first."""
    if found is None:
        return ()
    several: Sequence[Localization | Detection | Tracked] = objects or found.detections or (found,)
    drafts = [
        Draft(each.label if each.box_name is not None else "", each.box_xyxy_px, each.confidence)
        for each in several
        if each.box_xyxy_px is not None
    ]
    return tuple(sorted(drafts, key=lambda each: -(each.confidence or 0.0)))


def _changed_at(path: Path) -> int | None:
    """When a file was changed last, in nanoseconds; None where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _content(path: Path) -> bytes:
    """Of a file; nothing where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _decoded(content: bytes) -> ImageBgr | None:
    """The image in a file's content; None where there is none."""
    if not content:
        return None
    found = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    return None if found is None else np.asarray(found, np.uint8)


def check_folder(folder: Path) -> None:
    """Refuse a folder of labels that is a file.

    Raises:
        OutputError: see there.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"labels go into a folder, and {folder} is none", option="labels_dir")
