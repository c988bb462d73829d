"""The detector that is compared with: what its output means, which boxes stay, and the bench."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calib.bench.detector import (
    COCO_CLASSES,
    Detector,
    cells,
    decoded,
    detector_calls,
)
from engines.build import CANDIDATES
from engines.errors import ModelError
from engines.options import EngineOptions

SIDE = 64
CELLS = 8 * 8 + 4 * 4 + 2 * 2
CAT, DOG = COCO_CLASSES.index("cat"), COCO_CLASSES.index("dog")


def silent():
    """An output in which no cell sees anything."""
    return np.zeros((CELLS, 85), np.float32)


def cell(rows, place, centre, size, objectness, class_index, score):
    """Let a cell see an object; centre and size as the network writes them."""
    rows[place, :5] = [*centre, *np.log(size), objectness]
    rows[place, 5 + class_index] = score


def test_the_classes_are_coco_s_in_its_order():
    assert len(COCO_CLASSES) == 80
    assert (COCO_CLASSES[0], COCO_CLASSES[10], COCO_CLASSES[16], COCO_CLASSES[79]) == (
        "person",
        "fire hydrant",
        "dog",
        "toothbrush",
    )


def test_boxes_are_decoded_at_every_stride():
    rows = silent()
    cell(rows, 8 * 3 + 2, (0.5, 0.25), (2, 1), 0.9, CAT, 0.8)  # stride 8, row 3, column 2
    cell(rows, 64 + 4 * 1 + 3, (0, 0), (1, 2), 0.5, DOG, 1.0)  # stride 16, row 1, column 3
    cell(rows, 64 + 16 + 2 * 1 + 0, (0.5, -0.5), (0.5, 0.5), 0.1, 0, 0.05)  # too low a score
    found = decoded(rows, *cells(SIDE))
    # centre (2 + 0.5, 3 + 0.25) * 8 = (20, 26), size (16, 8); centre (48, 16), size (16, 32)
    np.testing.assert_allclose(found.boxes_xyxy, [[12, 22, 28, 30], [40, 0, 56, 32]], rtol=1e-6)
    np.testing.assert_allclose(found.scores, [0.72, 0.5], rtol=1e-6)
    assert found.classes.tolist() == [CAT, DOG]


def test_where_nothing_is_likely_the_best_box_stays():
    rows = silent()
    cell(rows, 80, (0.5, 0.5), (1, 1), 0.004, DOG, 0.5)
    cell(rows, 81, (0.5, 0.5), (1, 1), 0.002, DOG, 0.5)
    found = decoded(rows, *cells(SIDE))
    np.testing.assert_allclose(found.boxes_xyxy, [[0, 0, 32, 32]], rtol=1e-6)


def detector_file(path, rows=None, outputs=85):
    """An ONNX file of a detector that answers the same whatever it sees, but reads its image."""
    rows = silent() if rows is None else rows
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        helper.make_node("Add", ["rows", "nothing"], ["output"]),
    ]
    image = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, SIDE, SIDE])
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, CELLS, outputs])
    constants = [
        numpy_helper.from_array(rows[None, :, :outputs], "rows"),
        numpy_helper.from_array(np.float32(0), "zero"),
    ]
    graph = helper.make_graph(nodes, "detector", [image], [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)])
    model.ir_version = 8
    onnx.save(model, path)
    return path


def test_a_whole_call_gives_boxes_in_the_image(tmp_path):
    rows = silent()
    cell(rows, 64 + 4 * 1 + 1, (0.5, 0.5), (2, 2), 0.9, CAT, 1.0)  # 8..40 of the square along x, y
    cell(rows, 64 + 4 * 1 + 2, (-0.5, 0.5), (2, 2), 0.8, DOG, 1.0)  # the same box, as a dog
    cell(rows, 64 + 4 * 3 + 3, (0.5, 0.5), (2, 2), 0.7, DOG, 1.0)  # reaches out of the square
    detector = Detector(detector_file(tmp_path / "small.onnx", rows), "fp32")
    wide = np.zeros((32, 128, 3), np.uint8)  # half as large in the square: its upper 16 rows
    found = detector.detect(wide)
    assert [each.class_name for each in found] == ["cat", "dog"]
    np.testing.assert_allclose(found[0].box_xyxy_px, [16, 16, 80, 32], atol=1e-3)
    np.testing.assert_allclose(found[1].box_xyxy_px[2:], [128, 32], atol=1e-3)
    assert found[0].score == pytest.approx(0.9)
    assert [each.class_name for each in detector.detect(wide, by_class=True)] == [
        "cat",
        "dog",
        "dog",
    ]


def test_an_image_lies_in_the_upper_left_of_a_grey_square(tmp_path):
    detector = Detector(detector_file(tmp_path / "small.onnx"), "fp32")
    prepared = detector.prepare(np.full((32, 128, 3), (10, 20, 30), np.uint8))
    assert prepared.shape == (1, SIDE, SIDE, 3)
    assert (prepared[0, :16] == (10, 20, 30)).all()
    assert (prepared[0, 16:] == 114).all()


def test_the_bench_times_it_beside_ours(tmp_path):
    rows = silent()
    cell(rows, 70, (0.5, 0.5), (1, 1), 0.9, CAT, 0.9)
    detector = Detector(detector_file(tmp_path / "small.onnx", rows), "fp32")
    calls = detector_calls(detector, EngineOptions("lite0", precision="fp32"))
    assert list(calls) == [
        "small fp32, forward only",
        "small fp32, image to boxes",
        "Sightline, image to box",
        "Sightline fp32, 192 x 320 for 16:9",
        "Sightline fp32, 256 x 320 for 4:3",
    ]
    rows, boxes, (ours,), wide, _ = (call() for call in calls.values())
    assert wide[CANDIDATES].shape[0] == 1
    assert rows.shape == (CELLS, 85)
    assert len(boxes) == 1
    assert ours.map_hw.ndim == 2


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no YOLOX detector .* 1 x cells x 85"):
        Detector(detector_file(tmp_path / "classes.onnx", outputs=25))
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ModelError, match=r"text\.onnx"):
        Detector(tmp_path / "text.onnx")
    with pytest.raises(ModelError, match=r"absent\.onnx"):
        Detector(tmp_path / "absent.onnx")


def test_the_real_detector_finds_animals(data):
    """Three test photos of one animal, which it knows."""
    from calib.data.datasets import load_dataset
    from engines.boxes import overlap

    path = data / "detector_yolox_nano" / "yolox_nano_416.onnx"
    if not path.is_file():
        pytest.skip(f"the detector is absent: put it at {path}")
    detector = Detector(path, "fp32")
    photos = [s for s in load_dataset(data / "animal_pose_voc" / "test.csv") if s.single][-3:]
    for sample in photos:
        best = detector.detect(sample.read())[0]
        assert best.class_name == sample.truths[0].class_name
        assert overlap(best.box_xyxy_px, sample.truths[0].box_xyxy_px) > 0.5
