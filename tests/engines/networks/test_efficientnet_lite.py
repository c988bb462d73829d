"""EfficientNet-Lite beside its independent module, and the published weights."""

import numpy as np
import pytest
import torch

from engines.backends.torch_networks import torch_network
from engines.errors import ModelError
from engines.networks.efficientnet_lite import EPSILON, SCALES, blocks, renamed, same_padding
from engines.networks.registry import load_classifier
from tests.engines.double import run_in_float64

RNG = np.random.default_rng(8)


@pytest.mark.parametrize("name", sorted(SCALES))
def test_the_graph_computes_what_the_module_does_at_every_layer(name):
    classifier = load_classifier(name, "random", 64)
    graph, forward = classifier.forward_graph()
    for layer, tensor in forward.layers.items():
        graph.output(tensor, f"{layer}_out")
    graph.output(forward.scores, "scores_out")
    x = RNG.standard_normal((1, 3, 64, 64))
    found = run_in_float64(graph.model(), {"pixels": x})
    module = torch_network(classifier).double()
    scores, kept = module.activations(torch.from_numpy(x))
    assert set(kept) == set(forward.layers)
    for layer, expected in {**kept, "scores": scores}.items():
        np.testing.assert_allclose(found[f"{layer}_out"], expected.numpy(), atol=1e-9)


def test_the_published_shapes():
    """Tan & Le (2019), table 1, and the published checkpoints."""
    assert [len(blocks(*SCALES[name][:2])) for name in ("lite0", "lite1", "lite2")] == [16, 21, 21]
    assert [block.channels_out for block in blocks(1.0, 1.0)][-1] == 320
    assert [block.channels_out for block in blocks(1.1, 1.2)][-1] == 352
    weights = load_classifier("lite0", "random").weights
    biases = sum(v.size for k, v in weights.items() if k.endswith("bias") and k != "fc.bias")
    assert sum(v.size for v in weights.values()) + biases == 4_652_008, "scales were folded in"


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "pads"),
    [(224, 3, 2, (0, 1)), (7, 5, 2, (2, 2)), (14, 5, 1, (2, 2)), (14, 5, 2, (1, 2))],
)
def test_padding_is_tensorflows(side, kernel, stride, pads):
    assert same_padding(side, kernel, stride) == pads


def published(*names):
    """A few convolutions under the published names, with their batch normalizations."""
    weights = {"_fc.weight": np.ones((5, 4)), "_fc.bias": np.zeros(5)}
    for conv, norm in names:
        weights[f"{conv}.weight"] = RNG.standard_normal((4, 3, 3, 3))
        for part in ("weight", "bias", "running_mean", "running_var"):
            weights[f"{norm}.{part}"] = RNG.uniform(0.5, 2, 4)
    return weights


STEM, HEAD = ("_conv_stem", "_bn0"), ("_conv_head", "_bn1")
DEPTHWISE = ("_blocks.0._depthwise_conv", "_blocks.0._bn1")


def test_batch_normalizations_of_published_weights_are_folded():
    weights = published(STEM, HEAD, DEPTHWISE)
    found = renamed(weights)
    assert set(found) == {
        f"{name}.{part}"
        for name in ("stem", "head", "block0.depthwise", "fc")
        for part in ("weight", "bias")
    }
    x = torch.from_numpy(RNG.standard_normal((1, 3, 6, 6)))
    kept = {key: torch.from_numpy(value) for key, value in weights.items()}
    expected = torch.nn.functional.batch_norm(
        torch.nn.functional.conv2d(x, kept["_conv_stem.weight"]),
        *(kept[f"_bn0.{part}"] for part in ("running_mean", "running_var", "weight", "bias")),
        eps=EPSILON,
    )
    folded = torch.nn.functional.conv2d(
        x,
        torch.from_numpy(found["stem.weight"]).double(),
        torch.from_numpy(found["stem.bias"]).double(),
    )
    np.testing.assert_allclose(folded.numpy(), expected.numpy(), atol=1e-5)


def test_other_weights_are_refused_in_words():
    with pytest.raises(ModelError, match=r"not EfficientNet-Lite weights: '_bn1\.weight'"):
        renamed(published(STEM))
    classifier = load_classifier("lite0", "random", 64)
    del classifier.weights["block3.expand.bias"]
    with pytest.raises(ModelError, match=r"'block3\.expand' is missing"):
        classifier.forward_graph()


def test_the_shipped_weights_name_photos_rightly(data):
    """Of 60 photos of the validation set at least 40 (75 % of all 50,000 are right)."""
    from calib.data.datasets import load_dataset
    from engines.choose import open_localizer
    from engines.networks.registry import imagenet_classes

    samples = load_dataset(data / "imagenet_val_sample" / "val.csv")[:60]
    index = {wnid: i for i, (wnid, _) in enumerate(imagenet_classes())}
    with open_localizer("lite0", head="none") as localizer:
        found = localizer.localize([sample.read() for sample in samples])
    right = [
        result.class_index == index[sample.truths[0].class_name]
        for result, sample in zip(found, samples, strict=True)
    ]
    assert sum(right) >= 40
