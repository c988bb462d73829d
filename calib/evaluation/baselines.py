"""Where constant boxes come from: a training set, never the images that are measured."""

import hashlib
from collections.abc import Sequence

from calib.data.datasets import Sample
from calib.data.images import size_of
from calib.evaluation.metrics import ConstantBoxes, constant_boxes
from calib.heads.features import relative_boxes
from engines.base import SourceError
from engines.localizer import Localizer


def baselines(localizer: Localizer, training: Sequence[Sample] | None) -> ConstantBoxes | None:
    """Constant boxes of ``training`` where it is given, else those kept with the localizer's fitted head, else None.

    Raises:
        SourceError: ``training`` has no image with exactly one object, or cannot be read.
    """
    if training is None:
        kept = localizer.description.get("constant_boxes")
        return ConstantBoxes(**kept) if kept else None
    singles = [sample for sample in training if sample.one_box]
    if not singles:
        raise SourceError("--train has no image with exactly one object: constant boxes need some")
    return constant_boxes(relative_boxes(singles, [size_of(sample.read()) for sample in singles]))


def check_disjoint(training: Sequence[Sample], measured: Sequence[Sample], remedy: str) -> None:
    """Refuse to measure on images that something was fitted on; the pixels decide, not the names.

    Raises:
        SourceError: an image is in both sets; ``remedy`` says how to name others.
    """
    seen = {_digest(sample) for sample in training}
    shared = [sample.name for sample in measured if _digest(sample) in seen]
    if shared:
        raise SourceError(f"{len(shared)} images are both fitted on and measured, {shared[0]} among them: {remedy}")


def _digest(sample: Sample) -> bytes:
    image = sample.read()
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()
