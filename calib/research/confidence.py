"""Fits the confidence models of the shipped heads: ``python -m calib.research.confidence --data
DATA``.

Each head is fitted again on four fifths of its training set at a time, as ``fit`` does. The model
is fitted to its boxes in the rest and written into the head's file. The head itself stays as it is.
A user's own heads get their models from ``fit``; that of tracked boxes comes from
``calib.research.tracking``.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
from rich.console import Console

from calib.data.datasets import Sample, load_dataset
from calib.heads.confidence import head_confidence_model
from calib.heads.linear import feature_table, held_out_boxes
from calib.research.command_line import run
from engines.head import Head, load_head, shipped_head_names, shipped_head_path
from engines.networks.registry import NETWORKS, Classifier, load_classifier
from engines.options import Option
from engines.text import Terminal


def with_confidence_model(
    head: Head, samples: Sequence[Sample], classifier: Classifier, console: Console
) -> Head:
    """A head that was fitted on these samples, with the confidence model of its boxes."""
    table = feature_table(samples, classifier, head.spec, head.features, console)
    found = held_out_boxes(table, np.arange(len(table.values)), float(str(head.card["strength"])))
    return replace(head, confidence_model=head_confidence_model(table, found))


def fit_of_shipped_heads(data: Path, console: Console) -> None:
    """Fit the confidence model of every shipped head whose network ships too, and write it into the
    head's file.
    """
    samples = load_dataset(data / "animal_pose_voc" / "train.csv")
    for name in shipped_head_names():
        head, network = load_head(shipped_head_path(name)), name.split("_")[0]
        if not isinstance(head, Head) or NETWORKS[network].shipped is None:
            continue
        classifier = load_classifier(network, size_px=head.size_px)
        fitted = with_confidence_model(head, samples, classifier, console)
        fitted.save(shipped_head_path(name))
        console.print(f"{name}: done")


def main(data: Annotated[Path, Option("Folder of the data sets.")]) -> None:
    """Fit and save the models of the shipped heads."""
    fit_of_shipped_heads(data, Terminal(stderr=True))


if __name__ == "__main__":
    run(main)
