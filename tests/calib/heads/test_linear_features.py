"""The table of features: what it is kept under, and that it holds no image longer than it needs
it.
"""

import hashlib
import json
import weakref
from collections import Counter
from dataclasses import asdict, replace
from io import StringIO

import cv2
import numpy as np
import pytest
from rich.console import Console

from calib.data.datasets import load_dataset
from calib.evaluation.metrics import baselines
from calib.heads.linear import TABLE_FORMAT, feature_table, mirrored_pairs
from engines.downloads import cache_dir
from engines.localizer import Localizer
from engines.maps import Feature, MapSpec
from engines.networks.preprocessing import GivenInput
from engines.networks.registry import load_classifier
from tests.engines.mock import MockEngine
from tests.realtime.media import picture

QUIET = Console(quiet=True)
FEATURES = (Feature("quantiles", "pixels", 5),)


@pytest.fixture
def labels(tmp_path, monkeypatch):
    """Of 12 pictures of different sizes; the cache is empty."""
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    for index in range(12):
        cv2.imwrite(str(tmp_path / "set" / f"{index}.png"), picture(index)[: 96 - index])
    rows = "".join(f"{index}.png,cat,0,0,64,40\n" for index in range(12))
    (tmp_path / "set.csv").write_text("file,class,x0,y0,x1,y1\n" + rows)
    return tmp_path / "set.csv"


class Watch:
    """How often each image of a data set was decoded, and how many of the decoded ones lived at
    once.
    """

    def __init__(self, samples):
        self.reads, self.alive, self.most = Counter(), 0, 0
        self.samples = [replace(sample, read=self._watched(sample)) for sample in samples]

    def _watched(self, sample):
        def read():
            image = sample.read()
            weakref.finalize(image, self._gone)
            self.reads[sample.name] += 1
            self.alive += 1
            self.most = max(self.most, self.alive)
            return image

        return read

    def _gone(self):
        self.alive -= 1


def test_images_are_decoded_one_at_a_time_and_once_when_the_features_are_kept(labels):
    classifier = load_classifier("compact", "random", 64)
    first, again = Watch(load_dataset(labels)), Watch(load_dataset(labels))
    computed = feature_table(first.samples, classifier, MapSpec(), FEATURES, QUIET)
    stored = feature_table(again.samples, classifier, MapSpec(), FEATURES, QUIET)
    np.testing.assert_array_equal(computed.values, stored.values)
    np.testing.assert_allclose(
        computed.boxes_xyxy[:, 3], [40 / (96 - index) for index in range(12)]
    )
    assert set(first.reads.values()) == {2}
    assert set(again.reads.values()) == {1}
    assert max(first.most, again.most) <= 2


def test_constant_boxes_hold_no_image_either(labels):
    watch = Watch(load_dataset(labels))
    assert baselines(Localizer(MockEngine(96)), watch.samples) is not None
    assert watch.most <= 2


def test_features_are_kept_under_a_hash_of_settings_and_pixels(labels):
    """Spelled out: another key would compute every user's features again."""
    samples, classifier, spec = (
        load_dataset(labels),
        load_classifier("compact", "random", 64),
        MapSpec(),
    )
    feature_table(samples, classifier, spec, FEATURES, QUIET)
    settings = [
        TABLE_FORMAT,
        classifier.digest,
        64,
        asdict(spec),
        [asdict(feature) for feature in FEATURES],
    ]
    content = json.dumps(settings).encode()
    for image in (sample.read() for sample in samples):
        content += repr(image.shape).encode() + image.tobytes()
    assert [path.stem for path in (cache_dir() / "features").iterdir()] == [
        hashlib.sha256(content).hexdigest()[:32]
    ]


@pytest.mark.parametrize("resize", ["crop", "letterbox"])
def test_what_is_fitted_are_boxes_of_what_the_network_sees(tmp_path, monkeypatch, resize):
    """Three wide pictures of 100 x 50 pixels with a box inside, across the crop's edge, and beside
    it; the crop is the middle square of 44 pixels, from 28 to 72.
    """
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    for index in range(3):
        cv2.imwrite(str(tmp_path / "set" / f"{index}.png"), picture(index, 100, 50))
    boxes = ["0.png,cat,39,14,61,36", "1.png,cat,0,14,50,36", "2.png,cat,0,14,20,36"]
    (tmp_path / "set.csv").write_text("\n".join(["file,class,x0,y0,x1,y1", *boxes]))
    classifier = load_classifier("compact", "random", 64, GivenInput(resize=resize))
    said = Console(record=True, quiet=False, file=StringIO())
    samples = load_dataset(tmp_path / "set.csv")
    table = feature_table(samples, classifier, MapSpec(), FEATURES, said)
    rows = np.arange(len(table.values))
    if resize == "crop":
        assert "1 of 3 images lie beside the crop" in said.export_text()
        expected = [[0.25, 0.25, 0.75, 0.75], [0, 0.25, 0.5, 0.75]]
    else:
        expected = [[0.39, 0.39, 0.61, 0.61], [0, 0.39, 0.5, 0.61], [0, 0.39, 0.2, 0.61]]
    np.testing.assert_allclose(table.targets(rows), expected, atol=1e-9)
    values, targets = mirrored_pairs(table, rows)
    assert len(values) == len(targets) == 2 * len(rows)
    np.testing.assert_allclose(targets[len(rows) :, 0], 1 - table.targets(rows)[:, 2])
    ious = table.ious(table.targets(rows), rows)  # what the crop hides counts as not found
    assert ious == pytest.approx([1, 22 / 50] if resize == "crop" else [1, 1, 1], abs=1e-9)
