"""Fits the dense head that is shipped with EfficientNet-Lite0, on VOC 2007 trainval and
animal_pose_voc train.

Run it as ``python -m calib.research.dense --data FOLDER --out HEAD``.
"""

from pathlib import Path
from typing import Annotated

from rich.console import Console

from calib.data.datasets import load_dataset
from calib.heads.dense import default_spec, fit_dense
from calib.research.command_line import run
from engines.networks.preprocessing import GivenInput
from engines.networks.registry import load_classifier
from engines.options import Option

SIZE_PX = 320
SETS = ("voc2007/trainval.csv", "animal_pose_voc/train.csv")


def main(
    data: Annotated[Path, Option("Folder with the data sets.")],
    out: Annotated[Path, Option("The head to write (.safetensors).")],
    model: Annotated[str, Option("The network.")] = "lite0",
    size: Annotated[int, Option("Input side in pixels.", min=32)] = SIZE_PX,
) -> None:
    """Fit the head and say what it reaches on images that it was not fitted on."""
    classifier = load_classifier(model, None, size, GivenInput(resize="letterbox"))
    samples = [sample for name in SETS for sample in load_dataset(data / name)]
    console = Console()
    fitted = fit_dense(
        samples, classifier, default_spec(classifier), console, "VOC 2007 trainval, animal_pose_voc"
    )
    fitted.head.save(out)
    console.print(fitted.held_out)


if __name__ == "__main__":
    run(main)
