"""What a TensorRT engine decides without a GPU: where tensors lie, and whether a plan is the
graph's.
"""

import numpy as np
import pytest

from engines.backends.tensorrt import ALIGNMENT, Layout, check_tensors
from engines.engine import TensorSpec
from engines.errors import EngineError

SPECS = (
    TensorSpec("image", np.dtype(np.uint8), (2, 3, 3, 3)),  # 54 bytes
    TensorSpec("class", np.dtype(np.int64), (2,)),
    TensorSpec("map", np.dtype(np.float32), (2, 8, 9)),  # 576 bytes: three times the alignment
    TensorSpec("score", np.dtype(np.float32), (2,)),
)


def test_tensors_lie_aligned_one_behind_the_other():
    layout = Layout.of(SPECS)
    assert layout.offsets == (0, 256, 512, 1280)
    assert layout.size == 1536
    assert layout.addresses(0x7000) == {
        "image": 0x7000,
        "class": 0x7100,
        "map": 0x7200,
        "score": 0x7500,
    }


def test_views_are_the_blocks_memory_and_do_not_overlap():
    layout = Layout.of(SPECS)
    block = np.zeros(layout.size, np.uint8)
    views = layout.views(block)
    rng = np.random.default_rng(0)
    written = {s.name: rng.integers(1, 100, s.shape).astype(s.dtype) for s in SPECS}
    for name, value in written.items():
        views[name][...] = value
    again = layout.views(block)
    for spec in SPECS:
        assert (again[spec.name].dtype, again[spec.name].shape) == (spec.dtype, spec.shape)
        np.testing.assert_array_equal(again[spec.name], written[spec.name])


def test_a_layout_is_never_empty():
    assert Layout.of(()).size == ALIGNMENT


def test_a_plan_is_held_against_its_graph():
    inputs, outputs = SPECS[:2], SPECS[2:]
    fits = {s.name: ("input" if s in inputs else "output", s.shape) for s in SPECS}
    check_tensors(fits, inputs, outputs)
    check_tensors(
        {k: v for k, v in fits.items() if k != "class"}, inputs, outputs
    )  # an input that nothing reads may be gone
    for wrong in (
        {**fits, "map": ("output", (1, 8, 9))},
        {**fits, "map": ("input", (2, 8, 9))},
        {k: v for k, v in fits.items() if k != "map"},
    ):
        with pytest.raises(
            EngineError,
            match=r"another graph \(tensor 'map' does not fit\): run 'sightline build --backend tensorrt",
        ):
            check_tensors(wrong, inputs, outputs)
    with pytest.raises(EngineError, match="tensor 'more'"):
        check_tensors({**fits, "more": ("output", (1,))}, inputs, outputs)
