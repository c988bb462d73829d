"""Why a box is what it is: what else it could be, and what speaks for it and against it.

An ``Explainer`` computes an image once more, by a graph that also gives what the running one keeps
to itself: the probabilities of all names and classes, and the cues of the confidence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.boxes import iou
from engines.build import CANDIDATES, AnyHead, build_graph
from engines.choose import choose_head, chosen_spec, takes_shapes
from engines.confidence import ConfidenceModel, cues_of, softmax
from engines.dense import DenseHead
from engines.dense_names import OBJECT
from engines.engine import Array, Engine
from engines.errors import ModelError
from engines.head import Head
from engines.localizer import ImageBgr, Localizer, Outputs, box_name_of
from engines.maps import method_of
from engines.networks.network import Shape
from engines.networks.registry import Classifier
from engines.options import EngineOptions
from engines.resizing import BoxPx, frame_shape

RIVALS = 4
"""So many names, and so many classes, are given."""
LEAST_PROBABILITY = 0.005
SAME_IOU = 0.3
"""A candidate that overlaps what is pointed at by less is not about it."""
BACKGROUND = "no object"
"""What the names layer calls the background."""
CUE_WORDS = {
    "expected": "how well the box seems to fit an object",
    "objectness": "signs of an object in the middle of the box",
    "area": "its size",
    "aspect": "how long and thin it is",
    "evidence": "how far its name stands out from the background",
    "best_expected": "how well the best box of the image seems to fit",
    "alike": "how many other candidates agree",
    "logit": "the score of its class",
    "probability": "the probability of its class",
    "strength": "how strong the map is",
    "inside": "how much of the map is in the box",
    "spread": "how far the map spreads",
    "off_centre": "how far it is from the middle of the image",
    "size": "its size",
}


@dataclass(frozen=True)
class Rival:
    """What a box could be.

    Attributes:
        name: a name of boxes or a class of the network; ``no object`` is the background.
        probability: of it.
    """

    name: str
    probability: float


@dataclass(frozen=True)
class Cue:
    """What a confidence rests on.

    Attributes:
        name: see ``engines.confidence.CUES`` and ``engines.dense_names.CUES``.
        words: what it is, for people.
        value: of this box.
        usual: its mean over the boxes that the confidence was fitted on.
        share: what it adds to the logit of the confidence, beside a box with all cues as usual;
            negative where it speaks against the box.
    """

    name: str
    words: str
    value: float
    usual: float
    share: float


@dataclass(frozen=True)
class Explanation:
    """Why a box is what it is.

    Attributes:
        box_xyxy_px: the box that is explained: of all candidates the surest that overlaps what was
            asked about; None where there is none.
        label: its name.
        confidence: the probability that it is right, in this image alone; None where nothing
            tells.
        names: what else it could be of the names that boxes have, the likeliest first.
        classes: likewise of the network's classes, as it sees the box.
        cues: what the confidence rests on, the strongest first.
        usual: the confidence of a box with all cues as usual; None without cues.
        input_px: width and height of what the network saw.
        box_input_px: width and height of the box in that.
        map_hw: the sensitivity map over the whole image, see ``Localization``.
    """

    box_xyxy_px: BoxPx | None
    label: str
    confidence: float | None
    names: tuple[Rival, ...]
    classes: tuple[Rival, ...]
    cues: tuple[Cue, ...]
    usual: float | None
    input_px: tuple[int, int]
    box_input_px: tuple[int, int] | None
    map_hw: NDArray[np.float32]

    def to_dict(self) -> dict[str, Any]:
        """All but the map, ready for ``json.dumps``."""
        found = asdict(replace(self, map_hw=np.zeros((0, 0), np.float32)))
        del found["map_hw"]
        return found


class Explainer:
    """Explains the boxes of one head. One thread uses it at a time.

    Its engines compute in fp32 on one thread of the processor, whatever the run uses. They are
    opened when the first image of their shape comes, which takes about a second.

    Args:
        choice: the engine that is explained.
    """

    def __init__(self, choice: EngineOptions) -> None:
        self._choice = choice
        self._localizer: Localizer | None = None
        self._head: AnyHead | None = None
        self._independent = False

    def close(self) -> None:
        """Free its engines."""
        if self._localizer is not None:
            self._localizer.close()
            self._localizer = None

    def explain(self, image_bgr: ImageBgr, box_xyxy_px: BoxPx | None = None) -> Explanation:
        """Explain what is found in a box of an image.

        Args:
            image_bgr: uint8 ``[height, width, 3]``.
            box_xyxy_px: what is pointed at; None for the surest box.

        Raises:
            InputError: see ``Localizer.prepare``.
            ModelError: the method searches with several graphs, or see
                ``engines.choose.open_localizer``.
        """
        if self._localizer is None:
            self._localizer = self._opened(image_bgr)
        localizer = self._localizer
        outputs = localizer.infer([localizer.prepare(image_bgr)])
        height, width = image_bgr.shape[:2]
        found = localizer.read(outputs, 0, width, height)
        if CANDIDATES in outputs:
            about = self._about_candidate(localizer, outputs, (width, height), box_xyxy_px)
        else:
            about = self._about_box(localizer, outputs, (width, height))
        box = about.get("box_xyxy_px")
        rows, columns = outputs.shape
        return Explanation(
            **{**_NOTHING, "label": found.label, **about},
            input_px=(columns, rows),
            box_input_px=_inside_input(localizer, box, (width, height), outputs.shape),
            map_hw=found.map_hw,
        )

    def _opened(self, image_bgr: ImageBgr) -> Localizer:
        """A localizer whose engines also give what is explained."""
        choice = self._choice
        if method_of(choice.method).search:
            raise ModelError(
                f"the boxes of method {choice.method} come of a search in several graphs, and"
                " nothing tells how sure they are: ask for those of a head",
                option="method",
            )
        from engines.backends.openvino import OpenVinoEngine  # only where it is used

        classifier = choice.classifier()
        head = self._head = choose_head(choice, classifier)
        spec = chosen_spec(choice, head, classifier)
        self._independent = classifier.forward_graph()[1].independent
        expose = _exposed(head, classifier.network.classless)

        def opened(network: Classifier) -> Engine:
            graph = build_graph(network, spec, head, expose=expose)
            return OpenVinoEngine(graph, "fp32", threads=1)

        def compiled(shape: Shape) -> Engine:
            return opened(replace(classifier, other_shape=shape))

        if takes_shapes(head, classifier):
            height, width = image_bgr.shape[:2]
            first = frame_shape(width, height, classifier.size_px)
            return Localizer(compiled(first), compiled)
        return Localizer(opened(classifier))

    def _about_candidate(
        self, localizer: Localizer, outputs: Outputs, size_px: tuple[int, int], asked: BoxPx | None
    ) -> dict[str, Any]:
        """What is to be said of a dense head's candidate."""
        rows = outputs[CANDIDATES][0].astype(np.float64)
        inside, table = localizer.resizing.inside(rows, size_px, outputs.shape)
        if asked is not None and len(table):
            near = iou(table, asked) >= SAME_IOU
            inside, table = inside[near], table[near]
        if not len(table):
            return {}
        best = int(rows[inside, 4].argmax())
        place, (x0, y0, x1, y1) = int(inside[best]), table[best].tolist()
        row = rows[place]
        names, cues = tuple[Rival, ...](), tuple[Cue, ...]()
        label, usual = OBJECT, None
        head = self._head
        if isinstance(head, DenseHead) and head.naming is not None:
            known = (*head.naming.names, BACKGROUND)
            names = _rivals(outputs["name_probabilities_out"][0, place], known)
            likeliest = head.naming.names[int(row[7])]
            label = likeliest if row[8] >= head.naming.shown_from else OBJECT
        if isinstance(head, DenseHead) and head.trust is not None:
            cues = cues_by_strength(head.trust, outputs["confidence_cues_out"][0, place].tolist())
            usual = head.trust(head.trust.mean)
        classes = tuple[Rival, ...]()
        if "boxes_of_scores_out" in outputs:
            classes = self._of_scores(outputs["boxes_of_scores_out"][0, :, place], localizer)
        return {
            "box_xyxy_px": (x0, y0, x1, y1),
            "label": label,
            "confidence": float(row[4]),
            "names": names,
            "classes": classes,
            "cues": cues,
            "usual": usual,
        }

    def _about_box(
        self, localizer: Localizer, outputs: Outputs, size_px: tuple[int, int]
    ) -> dict[str, Any]:
        """What is to be said of the one box of another head; of the image where there is none."""
        found: dict[str, Any] = {}
        if "scores_out" in outputs:
            found["classes"] = self._of_scores(outputs["scores_out"][0], localizer)
        if "box_xyxy" not in outputs:
            return found
        box, score = outputs["box_xyxy"][0], float(outputs["score"][0])
        found["box_xyxy_px"] = localizer.resizing.in_image(box, size_px, outputs.shape)
        model = self._head.confidence_model if isinstance(self._head, Head) else None
        if model is not None:
            cues = cues_of(box, outputs["map"][0], score, float(outputs["logit"][0]))
            name = box_name_of(localizer.class_names[int(outputs["class_index"][0])], score)
            found |= {"confidence": model(cues), "label": name.label}
            found |= {"cues": cues_by_strength(model, cues), "usual": model(model.mean)}
        return found

    def _of_scores(self, scores: Array, localizer: Localizer) -> tuple[Rival, ...]:
        """The likeliest classes of scores ``[classes]``."""
        values = scores.astype(np.float64)
        if self._independent:
            return _rivals(1 / (1 + np.exp(-values)), localizer.class_names)
        return _rivals(softmax(values), localizer.class_names)


_NOTHING: Mapping[str, Any] = {
    "box_xyxy_px": None,
    "label": OBJECT,
    "confidence": None,
    "names": (),
    "classes": (),
    "cues": (),
    "usual": None,
}


def cues_by_strength(model: ConfidenceModel, cues: Sequence[float]) -> tuple[Cue, ...]:
    """What each cue adds to a confidence, the strongest first; see ``ConfidenceModel.shares``."""
    parts = zip(model.cue_names, cues, model.mean, model.shares(cues), strict=True)
    found = [Cue(name, CUE_WORDS[name], *numbers) for name, *numbers in parts]
    return tuple(sorted(found, key=lambda each: -abs(each.share)))


def _exposed(head: AnyHead | None, classless: bool) -> list[str]:
    """The tensors of a graph that are to be given, too."""
    if not isinstance(head, DenseHead):
        return [] if classless else ["scores"]
    found = ["name_probabilities"] if head.naming else []
    found += ["confidence_cues"] if head.trust else []
    return found if classless else [*found, "boxes_of_scores"]


def _rivals(probabilities: Array, names: Sequence[str]) -> tuple[Rival, ...]:
    """The likeliest."""
    places = np.argsort(-probabilities, kind="stable")[:RIVALS]
    found = [Rival(names[place], float(probabilities[place])) for place in places]
    return tuple(each for each in found if each.probability >= LEAST_PROBABILITY)


def _inside_input(
    localizer: Localizer, box: BoxPx | None, size_px: tuple[int, int], shape: Shape
) -> tuple[int, int] | None:
    """Width and height of a box in the pixels of the network's input."""
    if box is None:
        return None
    left, top, right, bottom = localizer.resizing.seen(*size_px, shape)
    rows, columns = shape
    wide = (box[2] - box[0]) * columns / (right - left)
    high = (box[3] - box[1]) * rows / (bottom - top)
    return round(wide), round(high)
