"""What is asked of a batch on a cluster, and what cannot be."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from engines.errors import InputError
from engines.networks.sidecars import sidecars_of
from engines.options import EngineOptions
from realtime.batch.cluster.worker import attached, unpacked
from realtime.batch.options import Scale, Settings
from realtime.batch.run import batch_chosen

CONSOLE = Console(quiet=True)


@pytest.mark.parametrize(
    ("specs", "out", "scale", "budget_ms", "said"),
    [
        (
            ["s3://films/a.mp4"],
            "out",
            Scale(),
            None,
            "s3://films/a.mp4 is on shared storage.*use the cluster auto",
        ),
        (["a.mp4"], "s3://results", Scale(), None, "s3://results is on shared storage"),
        (["a.mp4"], "out", Scale(workers=3), None, "workers are for clusters"),
        (["a.mp4"], "out", Scale(ray="auto"), 33.0, "a budget is measured on one machine"),
    ],
)
def test_options_that_contradict_each_other_are_refused_before_any_work(
    specs, out, scale, budget_ms, said
):
    with pytest.raises(InputError, match=said):
        batch_chosen(specs, out, Settings(), scale, EngineOptions(), budget_ms, CONSOLE)


def test_files_that_an_engine_is_made_of_go_along_to_other_machines(tmp_path):
    weights = tmp_path / "mine.safetensors"
    weights.write_bytes(b"weights")
    choice = EngineOptions(weights=str(weights), head="none")
    along = attached(choice)
    assert along == {"weights": ("mine.safetensors", b"weights")}
    weights.unlink()  # another machine does not have it
    found = unpacked(choice, along)
    assert found == replace(choice, weights=found.weights)
    assert (Path(found.weights).name, Path(found.weights).read_bytes()) == (
        "mine.safetensors",
        b"weights",
    )
    assert unpacked(choice, along) == found


def test_what_lies_beside_a_classifier_goes_along_with_it(tmp_path):
    model, labels = tmp_path / "m.onnx", tmp_path / "labels.txt"
    node = helper.make_node("Add", ["x", "w"], ["y"])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    weight = numpy_helper.from_array(np.ones(2, np.float32), "w")
    graph = helper.make_graph([node], "m", ends[:1], ends[1:], [weight])
    onnx.save(
        helper.make_model(graph),
        model,
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    labels.write_text("cat")
    (tmp_path / "config.json").write_text("{}")
    choice = EngineOptions(str(model), labels=str(labels))
    found = unpacked(choice, attached(choice))
    assert Path(found.labels).read_text() == "cat"
    assert Path(found.model).read_bytes() == model.read_bytes()
    assert Path(found.model).with_name("m.data").read_bytes() == np.ones(2, np.float32).tobytes()
    assert [each.name for each in sidecars_of(Path(found.model))] == ["config.json"]
    (tmp_path / "config.json").write_text('{"a": 1}')
    again = unpacked(choice, attached(choice))
    assert again.model != found.model, "another file beside it is another classifier"
    assert sidecars_of(Path(again.model))[0].read_text() == '{"a": 1}'
