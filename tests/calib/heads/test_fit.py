"""A head is fitted to a network that knows nothing."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
from rich.console import Console

from calib.data.datasets import load_dataset
from calib.evaluation.evaluate import evaluate
from calib.evaluation.metrics import constant_boxes
from calib.heads.fit import fit_head
from calib.research.confidence import with_confidence_model
from engines.backends.openvino import OpenVinoEngine
from engines.build import build_graph
from engines.errors import SourceError
from engines.localizer import Localizer
from engines.maps import Feature, MapSpec
from engines.networks.registry import load_classifier

QUIET = Console(quiet=True)


def test_a_head_learns_where_a_square_is(tmp_path):
    """Fitted on 40 made pictures, with a random network: the box must follow the square."""
    names, lines = [f"{i}.png" for i in range(56)], []
    (tmp_path / "sq").mkdir()
    rng = np.random.default_rng(4)
    for name in names:
        image = np.full((64, 64, 3), 30, np.uint8)
        x, y, w, h = (int(v) for v in rng.integers((4, 4, 16, 16), (24, 24, 32, 32)))
        image[y : y + h, x : x + w] = rng.integers(0, 256, (h, w, 3))
        cv2.imwrite(str(tmp_path / "sq" / name), image)
        lines.append(f"{name},square,{x},{y},{x + w},{y + h}")
    (tmp_path / "sq.csv").write_text("file,class,x0,y0,x1,y1\n" + "\n".join(lines))
    samples = load_dataset(tmp_path / "sq.csv")
    classifier = load_classifier("compact", "random", 64)
    features = [
        Feature("quantiles", layer, 9, power)
        for layer in ("pixels", "conv2_2")
        for power in (1.0, 2.0)
    ]
    fitted = fit_head(samples[:40], classifier, MapSpec(), features, QUIET, "squares")
    localizer = Localizer(OpenVinoEngine(build_graph(classifier, head=fitted.head), "fp32"))
    report, cases = evaluate(
        samples[40:], localizer, QUIET, constant_boxes(np.array([[0.2, 0.2, 0.7, 0.7]]))
    )
    assert len(cases) == report["images"] == 16
    assert report["corloc"] > 0.8
    assert report["corloc"] > report["baselines"]["best_constant"]
    bare = replace(fitted.head, confidence_model=None)  # as heads were before there was one
    assert (
        with_confidence_model(bare, samples[:40], classifier, QUIET).confidence_model
        == fitted.head.confidence_model
    )
    assert abs(np.mean([case.confidence for case in cases]) - fitted.cv_corloc) < 0.15
    assert set(report["center_correctness"]) == {"0.0", "0.1", "0.2", "0.3", "0.4", "0.5"}
    with pytest.raises(SourceError, match="needs at least 10"):
        fit_head(samples[:5], classifier, MapSpec(), features, QUIET, "few")
