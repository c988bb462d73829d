"""The shipped confidence model of tracked boxes, and the names of its cues.

``python -m calib.research.tracking --fit`` fits it.
"""

from functools import lru_cache
from pathlib import Path

from engines.confidence import ConfidenceModel, confidence_model_of
from engines.errors import ModelError, restore
from engines.files import read_json_object

SHIPPED = Path(__file__).parent / "confidence.json"
CUES = ("found", "agreement", "looks", "missed", "size", "edges", "share")
"""Of an object: the mean confidence of its detections, their mean overlap with where it was
expected, the logarithm of how often it was found, how often in a row it was not, the logarithm of
its share of the frame, how many edges of the frame it reaches (false boxes are often around all),
and the logarithm of its share of the scores of all objects.
"""


@lru_cache(maxsize=2)
def load_confidence_model(path: Path = SHIPPED) -> ConfidenceModel:
    """Read the confidence model of tracked boxes.

    Raises:
        ModelError: the file is missing or damaged, or its model needs other cues.
    """
    try:
        model = confidence_model_of(read_json_object(path, "confidence model"), CUES)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"cannot read {path}: {error or type(error).__name__}; {restore(path)}"
        ) from error
    if model is None:
        raise ModelError(
            f"{path} needs other cues than this version has: make it again with 'python -m"
            " calib.research.tracking'"
        )
    return model
