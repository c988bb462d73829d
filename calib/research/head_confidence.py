"""Fits the confidence models of the shipped heads:
``python -m calib.research.head_confidence --data DATA``.

Each head is fitted again on four fifths of its training set at a time, as ``fit`` does. The model
is fitted to its boxes in the rest and written into the head's file. The head itself stays as it is.
A user's own heads get their models from ``fit``.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from calib.data.datasets import Sample, load_dataset
from calib.heads.confidence import fit_confidence_model
from calib.heads.features import feature_table
from calib.heads.linear import held_out_boxes
from engines.errors import SightlineError
from engines.head import Head, load_head, shipped_head_names, shipped_head_path
from engines.networks.registry import Classifier, load_classifier
from engines.text import Terminal


def sure(
    data: Annotated[
        Path, typer.Option(help="Folder with animal_pose_voc, which the heads were fitted on.")
    ],
) -> None:
    """Write it into every shipped head."""
    console = Terminal(stderr=True)
    samples = load_dataset(data / "animal_pose_voc" / "train.csv")
    for name in shipped_head_names():
        head = load_head(shipped_head_path(name))
        with_confidence_model(
            head, samples, load_classifier("compact", size_px=head.size_px), console
        ).save(shipped_head_path(name))
        console.print(f"{name}: done")


def with_confidence_model(
    head: Head, samples: Sequence[Sample], classifier: Classifier, console: Console
) -> Head:
    """A head that was fitted on these samples, and with it what says how sure its boxes are."""
    table = feature_table(samples, classifier, head.spec, head.features, console)
    found = held_out_boxes(table, np.arange(len(table.values)), float(str(head.card["strength"])))
    return replace(head, confidence_model=fit_confidence_model(table, found))


if __name__ == "__main__":
    try:
        typer.run(sure)
    except SightlineError as error:
        sys.exit(f"error: {error}")
