"""A localizer: an engine with its preparation and its reading. Any BGR image in, a box in that
image's pixels out.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from engines.boxes import distinct, ranked, voted
from engines.build import CANDIDATES, IMAGE, WANTED_CLASS
from engines.confidence import Limits, confidence_model_of, cues_of, limits_of
from engines.dense_names import OBJECT, BoxName, Labeler
from engines.engine import Array, Engine, Ticket
from engines.errors import InputError, ModelError, SightlineError
from engines.networks.network import NO_CLASSES, Shape
from engines.resizing import Resizing, frame_shape

ImageBgr = NDArray[np.uint8]
SMALLEST_PX = 8
TINY = 1e-12
CLASS_BESIDE_NAME = 0.1
"""What the probability of a wanted class counts beside that of its name, such as a breed beside
dog (chosen on VOC 2007 trainval).
"""
MOST_SHAPES = 6
"""Engines for so many shapes of images are kept. Those that were not used for the longest time are
closed.
"""
NAMED_FROM = 0.8
"""Where a head has no names of its own, that of the class is said from this score on."""


def box_name_of(class_name: str, score: float) -> BoxName:
    """The name of a class as that of a box, where it is sure enough."""
    if score < NAMED_FROM or class_name in NO_CLASSES:
        return BoxName(OBJECT, "", 0.0)
    return BoxName(class_name, "", score)


def label_of(box_name: BoxName | None, class_name: str) -> str:
    """What is written for a name; the name of the class where there is none."""
    if box_name is None:
        return class_name
    return f"{box_name.label} ({box_name.finer})" if box_name.finer else box_name.label


class Labelled:
    """What has a class, and perhaps the name of a box."""

    class_name: str
    box_name: BoxName | None

    @property
    def label(self) -> str:
        """What is written beside the box: ``dog (beagle)``, ``dog``, or ``object``."""
        return label_of(self.box_name, self.class_name)


@dataclass(frozen=True)
class Detection(Labelled):
    """One object of possibly several.

    Attributes:
        box_xyxy_px: continuous pixel edges x0, y0, x1, y1 in the image.
        class_index, class_name: what it was found as.
        score: the method's own; only those of one method compare.
        confidence: probability that the box is right; None where nothing tells.
        box_name: what people would call it; None where nothing tells how sure the box is.
        unsure: the box is less sure than ``Limits.sure_from``.
        wanted_share: probability of the name that is looked for; None where none is.
    """

    box_xyxy_px: tuple[float, float, float, float]
    class_index: int
    class_name: str
    score: float
    confidence: float | None = None
    box_name: BoxName | None = None
    unsure: bool = False
    wanted_share: float | None = None


@dataclass(frozen=True)
class Localization(Labelled):
    """What was found in one image.

    Attributes:
        box_xyxy_px: continuous pixel edges x0, y0, x1, y1 in the image; None without a head, and
            where it is not sure enough.
        class_index, class_name: the class whose score was differentiated.
        score: softmax probability of that class.
        map_hw: the sensitivity map, float32, stretched over the whole image, not normalised; 0
            where the network did not see the image, beside a crop.
        detections: every object that was found, best first, by methods that look for several;
            ``box_xyxy_px`` is the first's. Empty where the method finds one box.
        confidence: probability that the box is right (IoU over 0.5), see ``engines.confidence``;
            None where nothing tells. It is known where the box is withheld, too.
        box_name, unsure: of the box, see ``Detection``.
    """

    box_xyxy_px: tuple[float, float, float, float] | None
    class_index: int
    class_name: str
    score: float
    map_hw: NDArray[np.float32]
    detections: tuple[Detection, ...] = ()
    confidence: float | None = None
    box_name: BoxName | None = None
    unsure: bool = False

    @property
    def nothing_sure(self) -> bool:
        """Whether no box is shown because none is sure enough."""
        return self.box_xyxy_px is None and self.confidence is not None

    def sure(self, least: float) -> "Localization":
        """The same, without the box where it is less sure than that."""
        unsure = self.confidence is not None and self.confidence < least
        return replace(self, box_xyxy_px=None, detections=()) if unsure else self


class Outputs(dict[str, Array]):
    """The outputs of a call.

    Attributes:
        localizer: made the call and reads them.
        shape: of the images of the call.
    """

    def __init__(self, outputs: Mapping[str, Array], localizer: "Localizer", shape: Shape) -> None:
        super().__init__(outputs)
        self.localizer, self.shape = localizer, shape


class Localizer:
    """Prepares images for an engine and reads its outputs. As a ``with`` block it closes the engine
    at the end.

    Args:
        engine: of any backend; its batch size is how many images one call takes.
        open_shape: opens the same for images of another shape, which the images of one call then
            have, see ``engines.resizing.frame_shape``. None: all images take the engine's shape.

    Attributes:
        engine: the one that was opened first.
        size_px: side of the input, the longer one where it is no square.
        objects: how many detections a dense head gives at most.
        asked_confidence: see ``abstain_below``; all boxes are given until that is called.
        limits: the head's own limits of confidence; None where nothing tells how sure a box is.
    """

    def __init__(self, engine: Engine, open_shape: Callable[[Shape], Engine] | None = None) -> None:
        self.engine = engine
        self.class_names: tuple[str, ...] = tuple(json.loads(engine.metadata["class_names"]))
        self.batch, rows, columns, _ = engine.inputs[0].shape
        self.size_px = max(rows, columns)
        self._engines = {(rows, columns): engine}  # those that were used last come last
        self._open_shape = open_shape
        self._refused = set[Shape]()
        self._wanted = np.full(self.batch, -1, np.int64)
        self._wanted_name: int | None = None
        self.resizing = Resizing.stored(self.description.get("resizing"))
        self._confidence_model = confidence_model_of(self.description.get("trust"))
        naming = self.description.get("naming")
        self._labeler = Labeler(naming, self.class_names) if naming else None
        self._outputs = {spec.name for spec in engine.outputs}
        tells = self._confidence_model is not None or CANDIDATES in self._outputs
        self.limits: Limits | None = (
            limits_of(self.description.get("shown_from")) if tells else None
        )
        self.asked_confidence: float | None = 0.0
        self.objects = 1

    def close(self) -> None:
        """Free the engines; afterwards nothing more can be localized. Calling it twice is fine."""
        for engine in self._engines.values():
            engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def expect(self, width_px: int, height_px: int) -> None:
        """Open what images of that size need, so that the first one does not wait for it."""
        if min(width_px, height_px) >= SMALLEST_PX:
            self._shape_for(width_px, height_px)

    def _shape_for(self, width_px: int, height_px: int) -> Shape:
        """The shape that an image of that size takes; its engine is open."""
        if self._open_shape is None:
            return next(iter(self._engines))
        return self._use_shape(frame_shape(width_px, height_px, self.size_px))

    def _use_shape(self, wanted: Shape) -> Shape:
        """Have an engine open for a shape, or for the square where there is none for that shape.

        Returns:
            The shape that it takes.

        Raises:
            SightlineError: there is none for the square either.
        """
        square = (self.size_px, self.size_px)
        shape = square if wanted in self._refused else wanted
        if shape not in self._engines:
            assert self._open_shape is not None
            try:
                self._engines[shape] = self._open_shape(shape)
            except SightlineError:
                if shape == square:
                    raise
                self._refused.add(shape)
                return self._use_shape(square)
            self._close_one()
        self._engines[shape] = self._engines.pop(shape)
        return shape

    def _close_one(self) -> None:
        """Close the engine that was not used for the longest time, where there are too many."""
        idle = [
            shape
            for shape, engine in self._engines.items()
            if engine is not self.engine and not engine.under_way
        ]
        if len(self._engines) > MOST_SHAPES and idle[:-1]:
            self._engines.pop(idle[0]).close()

    @property
    def least_confidence(self) -> float:
        """No box is given that is less sure than this."""
        if self.asked_confidence is not None:
            return self.asked_confidence
        return self.limits.shown_from if self.limits else 0.0

    @property
    def description(self) -> dict[str, Any]:
        """What ``engines.build.stamp`` wrote of the graph; empty for engines that were not built by
        it.
        """
        found: dict[str, Any] = json.loads(self.engine.metadata.get("sightline", "{}"))
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """What boxes may be called, see ``Detection.box_name``; empty where nothing names them."""
        return self._labeler.names if self._labeler else ()

    @property
    def finds_boxes(self) -> bool:
        """Whether its answers have boxes: there is something that reads them."""
        return not self._outputs.isdisjoint({"box_xyxy", CANDIDATES})

    @property
    def box_reader(self) -> str:
        """What reads the box off the map, in words: ``none``, ``fitted head``, or the settings of
        the training-free one.
        """
        head = self.description.get("head")
        if head is None:
            return "none"
        return (
            str(head) if ": " in str(head) else "fitted head"
        )  # a fitted head's digest has no words

    @property
    def wanted_class(self) -> int | None:
        """What is looked for, see ``look_for``; None for whichever scores best."""
        if self._wanted_name is not None:
            return len(self.class_names) + self._wanted_name
        return None if self._wanted[0] < 0 else int(self._wanted[0])

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its answers besides the images and ``wanted_class``."""
        return {
            "engine": self.description,
            "backend": self.engine.backend,
            "precision": self.engine.precision,
            "batch": self.batch,
        }

    @property
    def setting(self) -> str:
        """The name of the setting of the next call. Empty here: a plain localizer has one setting.
        One that adapts, such as ``realtime.latency_budget.BudgetLocalizer``, overrides this and
        the four below.
        """
        return ""

    @property
    def heat_map_every(self) -> int:
        """A fresh heat map is to be drawn for one in so many images of the next calls."""
        return 1

    def begin(self) -> None:
        """Start the account of what is adapted."""

    def finished(
        self, setting: str, number: int, engine_ms: float, image_ms: float, now_s: float
    ) -> None:
        """Learn how long an image took, which may change the setting.

        Args:
            setting: that it was localized with.
            number: of the image, for messages.
            engine_ms: of its engine call.
            image_ms: of the whole work on it.
            now_s: of any clock that does not run backwards.
        """

    def summary(self) -> dict[str, Any]:
        """What was adapted since ``begin``; empty where nothing adapts."""
        return {}

    def look_for(self, class_index: int | None) -> None:
        """Look for a class or a name from the next image on.

        Args:
            class_index: of a class, whose score is then differentiated; or, from
                ``len(class_names)`` on, of one of ``names``: only boxes of that name are given, and
                the class that scores best is differentiated. None for whichever scores best.

        Raises:
            InputError: there is no such class or name.
        """
        if class_index is not None and not isinstance(class_index, int | np.integer):
            raise InputError(
                f"a class index is a whole number, not {type(class_index).__name__}:"
                f" {ascii(class_index)[:80]}"
            )
        classes = len(self.class_names)
        count = classes + len(self.names)
        if class_index is not None and not 0 <= class_index < count:
            raise InputError(f"class index {class_index} is outside 0..{count - 1}")
        wanted = -1 if class_index is None else int(class_index)
        self._wanted_name = wanted - classes if wanted >= classes else None
        self._wanted[:] = wanted if wanted < classes else -1

    def abstain_below(self, confidence: float | None) -> None:
        """Give no box that is less sure than this, from the next answer on.

        Args:
            confidence: None for the head's own limit; 0 for all boxes.

        Raises:
            InputError: it is no probability.
            ModelError: nothing says how sure these boxes are.
        """
        if confidence is not None and not 0 <= confidence <= 1:
            raise InputError(f"a least confidence lies in 0 .. 1, not {confidence}")
        if confidence and self.limits is None:
            raise ModelError(
                f"nothing tells how sure these boxes are ({self.box_reader}): use a head, which"
                " 'fit' makes (an old one: fit it again), or follow the object",
                option=("min_score", "follow"),
            )
        self.asked_confidence = confidence

    def prepare(self, image_bgr: ImageBgr) -> ImageBgr:
        """Make an image of any size the engine's input.

        Args:
            image_bgr: the image.

        Raises:
            InputError: it is not a uint8 BGR image, or smaller than ``SMALLEST_PX`` along a side.
        """
        expected = "an image is a NumPy array, uint8 [height, width, 3] in BGR"
        if not isinstance(image_bgr, np.ndarray):
            raise InputError(f"{expected}, got {type(image_bgr).__name__}")
        if (
            image_bgr.dtype != np.uint8
            or image_bgr.ndim != 3
            or image_bgr.shape[2] != 3
            or not image_bgr.size
        ):
            raise InputError(f"{expected}, got {image_bgr.dtype}{list(image_bgr.shape)}")
        height, width = image_bgr.shape[:2]
        if min(height, width) < SMALLEST_PX:
            raise InputError(
                f"the image is {width}x{height} pixels: at least {SMALLEST_PX} a side are needed to"
                " find anything"
            )
        return self.resizing.prepared(image_bgr, self._shape_for(width, height))

    def submit(self, prepared: Sequence[ImageBgr]) -> Ticket:
        """Start the engine on at most ``batch`` prepared images; missing ones are filled up with
        black. Of several shapes, all go into the smallest that holds them.

        Returns:
            The ticket to ``collect``; at most ``engine.slots`` may be out.
        """
        shape = prepared[0].shape[0], prepared[0].shape[1]
        if any(image.shape[:2] != shape for image in prepared):
            rows, columns = (max(image.shape[axis] for image in prepared) for axis in (0, 1))
            shape = rows, columns
        if self._open_shape is not None:
            shape = self._use_shape(shape)
        engine = self._engines[shape]
        feed = np.zeros(engine.inputs[0].shape, np.uint8)
        for place, image in enumerate(prepared):
            feed[place] = self.resizing.within(image, shape)
        return shape, engine, engine.submit({IMAGE: feed, WANTED_CLASS: self._wanted.copy()})

    def collect(self, ticket: Ticket) -> Outputs:
        """Wait for what was submitted first, and take its outputs."""
        shape, engine, its_ticket = ticket
        return Outputs(engine.collect(its_ticket), self, shape)

    def infer(self, prepared: Sequence[ImageBgr]) -> Outputs:
        """Run the engine on at most ``batch`` prepared images, and wait."""
        return self.collect(self.submit(prepared))

    def read(
        self,
        outputs: Outputs,
        place: int,
        width_px: int,
        height_px: int,
        every: bool = False,
    ) -> Localization:
        """The localization of image ``place`` of the batch, in an image of the given size.

        Args:
            outputs: of the engine.
            place: of the image in the batch.
            width_px: of the image.
            height_px: of the image.
            every: give every detection of a dense head, as a tracker needs them, whatever
                ``objects`` and ``least_confidence`` say; the boxes are means of candidates, see
                ``engines.boxes.voted``.
        """
        where, size = self.resizing, ((width_px, height_px), outputs.shape)
        if CANDIDATES in outputs:
            return self._read_candidates(outputs, place, size, every)
        box = where.in_image(outputs["box_xyxy"][place], *size) if "box_xyxy" in outputs else None
        rows = outputs["detections"][place] if "detections" in outputs else ()
        boxes = [(where.in_image(row, *size), row) for row in rows if row[4] >= 0]
        detections = tuple(
            Detection(box_px, int(row[4]), self.class_names[int(row[4])], float(row[5]))
            for box_px, row in boxes
            if box_px is not None
        )
        index = int(outputs["class_index"][place])
        score, map_hw = float(outputs["score"][place]), outputs["map"][place]
        confidence = None
        if self._confidence_model is not None and box is not None:
            confidence = self._confidence_model(
                cues_of(outputs["box_xyxy"][place], map_hw, score, float(outputs["logit"][place]))
            )
        over, name = where.over_image(map_hw, *size), self.class_names[index]
        return Localization(
            box,
            index,
            name,
            score,
            over,
            detections,
            confidence,
            None if confidence is None else box_name_of(name, score),
            self._unsure(confidence),
        ).sure(self.least_confidence)

    def _unsure(self, confidence: float | None) -> bool:
        return bool(self.limits and confidence is not None and confidence < self.limits.sure_from)

    def _wanted_share(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """How much each candidate is of what is looked for: of a name, its probability; of a class,
        its probability, and where the boxes have names, above all that of the name that the class
        is a kind of.
        """
        if self._wanted_name is not None:
            return np.asarray(rows[:, 8])
        kind = self._labeler.kind_of(self.wanted_class) if self._labeler else None
        if kind is None:
            return np.asarray(rows[:, 6])
        return np.asarray(CLASS_BESIDE_NAME * rows[:, 6] + (rows[:, 7] == kind) * rows[:, 8] + TINY)

    def _read_candidates(
        self,
        outputs: Outputs,
        place: int,
        size: tuple[tuple[int, int], Shape],
        every: bool,
    ) -> Localization:
        """The localization by a dense head: its candidates less those of the same object."""
        map_hw = self.resizing.over_image(outputs["map"][place], *size)
        rows = outputs[CANDIDATES][place].astype(np.float64)
        inside, table = self.resizing.inside(rows, *size)
        if self._labeler is not None and self._wanted_name is not None:
            named = self._labeler.are_called(rows[inside], self._wanted_name)
            inside, table = inside[named], table[named]
        worth = rows[inside, 4]
        if self.wanted_class is not None:
            worth = worth * self._wanted_share(rows[inside])
        found = list[Detection]()
        if every and len(table):
            kept = distinct(table, worth)
            left_of, chosen = worth[kept], voted(table, worth, kept)
        else:
            kept, left_of = ranked(table, worth)
            kept, left_of = kept[: self.objects], left_of[: self.objects]
            chosen = table[kept]
        for best, left, (x0, y0, x1, y1) in zip(kept, left_of, chosen.tolist(), strict=True):
            row, box = rows[inside[best]], (x0, y0, x1, y1)
            index = int(row[5])
            name = self.class_names[index]
            score, sure = float(row[6]), float(row[4] * left / max(worth[best], TINY))
            box_name = self._labeler.name_of(row) if self._labeler else box_name_of(name, score)
            share = None if self._wanted_name is None else float(row[8])
            found.append(
                Detection(box, index, name, score, sure, box_name, self._unsure(sure), share)
            )
        if not found:
            index = int(outputs["class_index"][place])
            name, score = self.class_names[index], float(outputs["score"][place])
            return Localization(None, index, name, score, map_hw, confidence=0.0)
        first, least = found[0], self.least_confidence
        others = [each for each in found[1:] if every or (each.confidence or 0) >= least]
        answer = Localization(
            first.box_xyxy_px,
            first.class_index,
            first.class_name,
            first.score,
            map_hw,
            (first, *others) if every or self.objects > 1 else (),
            first.confidence,
            first.box_name,
            first.unsure,
        )
        return answer if every else answer.sure(least)

    def localize(self, images_bgr: Sequence[ImageBgr]) -> list[Localization]:
        """Localize the main object of each image.

        Args:
            images_bgr: a list of images, or one array ``[N, height, width, 3]`` of them.

        Raises:
            InputError: see ``prepare``; or this is one image and not a list.
        """
        if not hasattr(images_bgr, "__len__") or (
            isinstance(images_bgr, np.ndarray) and images_bgr.ndim < 4
        ):
            raise InputError("localize takes a list of images: put one image into brackets")
        found: list[Localization] = []
        for start in range(0, len(images_bgr), self.batch):
            chunk = images_bgr[start : start + self.batch]
            outputs = self.infer([self.prepare(image) for image in chunk])
            found += [
                self.read(outputs, i, image.shape[1], image.shape[0])
                for i, image in enumerate(chunk)
            ]
        return found
