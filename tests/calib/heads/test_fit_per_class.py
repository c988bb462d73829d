"""Heads per class: corrections where the classes differ, routes that the network's classes
decide.
"""

from dataclasses import replace

import numpy as np

from calib.heads.fit import fit_kinds
from calib.heads.linear import FeatureTable, choose_strength, held_out_boxes
from engines.boxes import iou


def two_kinds(differ):
    """Cats follow the feature; dogs follow it too, or (``differ``) run against it. The network
    tells them apart by 7 and 3.
    """
    rng = np.random.default_rng(0)
    x = rng.random((200, 1)).astype(np.float32)
    cat = rng.random(200) < 0.5
    start = 0.6 * np.where(cat | (not differ), x[:, 0], 1 - x[:, 0])
    boxes = np.stack([start, np.full(200, 0.2), start + 0.3, np.full(200, 0.8)], axis=1)
    values = np.concatenate([x, rng.random((200, 3)).astype(np.float32)], axis=1)
    flipped = values.copy()
    flipped[:, 0] = (
        np.where(cat | (not differ), 7 / 6, 5 / 6) - x[:, 0]
    )  # what gives the mirrored box
    names = tuple("cat" if c else "dog" for c in cat)
    indices = np.where(cat, 7, 3)
    indices[np.flatnonzero(cat)[:3]] = indices[np.flatnonzero(~cat)[:3]] = (
        9  # both kinds are seen as 9: nobody is sure
    )
    return FeatureTable(values, flipped, boxes, names, indices, tuple(map(str, range(200))))


def test_kinds_that_differ_get_layers_of_their_own():
    table = two_kinds(differ=True)
    rows, strength = np.arange(200), 1.0
    kinds, boxes = fit_kinds(table, rows, strength, classes=10)
    shared = iou(held_out_boxes(table, rows, strength), table.boxes_xyxy)
    assert kinds.names == ("any", "cat", "dog")
    assert kinds.routes.tolist() == [0, 0, 0, 2, 0, 0, 0, 1, 0, 0]
    assert iou(boxes, table.boxes_xyxy).mean() > shared.mean() + 0.05


def test_kinds_that_do_not_differ_cost_little():
    table = two_kinds(differ=False)
    rows = np.arange(200)
    strength = choose_strength(table, rows)
    _, boxes = fit_kinds(table, rows, strength, classes=10)
    shared = iou(held_out_boxes(table, rows, strength), table.boxes_xyxy)
    assert iou(boxes, table.boxes_xyxy).mean() > shared.mean() - 0.02


def test_classes_with_few_images_are_served_by_the_shared_layer():
    table = two_kinds(differ=True)
    names = tuple("cow" if place < 10 else name for place, name in enumerate(table.class_names))
    few = replace(table, class_names=names)
    kinds, _ = fit_kinds(few, np.arange(200), 1.0, classes=10)
    assert "cow" not in kinds.names
