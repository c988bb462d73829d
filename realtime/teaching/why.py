"""Why a frame has its answer, for people: in words, and by the labelled images that are nearest."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.explain import BACKGROUND, Cue, Explainer, Explanation
from engines.localizer import ImageBgr
from engines.options import EngineOptions
from realtime.frames import BoxPx
from realtime.teaching.learning import yielding

SIGNATURE_PX = (16, 12)
Signature = NDArray[np.float32]
Explain = Callable[[ImageBgr, BoxPx | None], Explanation]
"""See ``engines.explain.Explainer.explain``."""
MOST_NEAREST = 3
SMALL_PX = 16
"""A box of a shorter side than that, in the network's input, is small for every head."""
NOTABLE_SHARE, MOST_CUES = 0.25, 2
"""A cue is said in words where it moves the logit by so much; so many of each kind are."""
CLOSE = 0.1
"""A rival of such a probability is said in words."""
APART = 0.05
"""Two confidences that differ by less are one for people."""


class Explaining:
    """Explains with the head that a run uses at the moment. Any thread may ask.

    Args:
        in_use: the engine of now, and a number that grows whenever that is another one.
    """

    def __init__(self, in_use: Callable[[], tuple[EngineOptions, int]]) -> None:
        self._in_use = in_use
        self._lock = threading.Lock()
        self._number = -1
        self._explainer: Explainer | None = None

    def __call__(self, image_bgr: ImageBgr, box_xyxy_px: BoxPx | None = None) -> Explanation:
        """See ``engines.explain.Explainer.explain``."""
        with self._lock, yielding():
            choice, number = self._in_use()
            if self._explainer is None or number != self._number:
                self.close()
                self._explainer, self._number = Explainer(choice), number
            return self._explainer.explain(image_bgr, box_xyxy_px)

    def close(self) -> None:
        """Free its engines."""
        if self._explainer is not None:
            self._explainer.close()
            self._explainer = None


def signature_of(image_bgr: ImageBgr) -> Signature:
    """A small grey picture as values 0..1, ``[192]``."""
    small = cv2.resize(image_bgr, SIGNATURE_PX, interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(small, cv2.COLOR_BGR2GRAY)
    return np.asarray(grey, np.float32).ravel() / np.float32(255)


def nearest(signature: Signature, known: Mapping[str, Signature]) -> list[str]:
    """The images whose signatures are nearest, the nearest first; at most ``MOST_NEAREST``."""
    away = {file: float(((each - signature) ** 2).mean()) for file, each in known.items()}
    return sorted(away, key=lambda file: away[file])[:MOST_NEAREST]


def percent(share: float) -> str:
    """A probability as people read it."""
    return f"{100 * share:.0f} %"


def explained_in_words(found: Explanation, shown: float | None = None) -> list[str]:
    """What an explanation says, in sentences.

    Args:
        found: the explanation.
        shown: the confidence that the run showed, where it showed one: following may have changed
            it.
    """
    if found.box_xyxy_px is None:
        return [
            "The head has no candidate there. Draw the right box and name it, and it can learn it."
        ]
    name, said = found.label, list[str]()
    if found.confidence is not None:
        sure = percent(found.confidence)
        said.append(f"In this frame alone, the box '{name}' is right with a probability of {sure}.")
        if shown is not None and abs(shown - found.confidence) > APART:
            said.append(f"Followed over frames, it counts as {percent(shown)}.")
    said += _cues_in_words(found.cues)
    rivals = [each for each in found.names if each.name != name and each.probability >= CLOSE]
    if rivals:
        first = rivals[0]
        what = "no object at all" if first.name == BACKGROUND else f"'{first.name}'"
        said.append(f"It could be {what} ({percent(first.probability)}).")
    if found.box_input_px is not None and min(found.box_input_px) < SMALL_PX:
        wide, high = found.box_input_px
        said.append(
            f"The network sees it with {wide} x {high} pixels only: go nearer, or start it with a"
            " larger input size."
        )
    return said


def _cues_in_words(cues: Sequence[Cue]) -> list[str]:
    """What speaks for and against a box."""
    said = []
    for what, sign in (("For", 1), ("Against", -1)):
        strong = [each for each in cues if sign * each.share >= NOTABLE_SHARE][:MOST_CUES]
        if strong:
            parts = " and ".join(
                f"{each.words} ({'more' if each.value > each.usual else 'less'} than usual)"
                for each in strong
            )
            said.append(f"{what} it speaks {parts}.")
    return said


def explanation_json(found: Explanation, shown: float | None = None) -> dict[str, Any]:
    """An explanation with its words, as pages and reports show it."""
    return {**found.to_dict(), "words": explained_in_words(found, shown)}
