"""State dictionaries read without PyTorch are what PyTorch reads."""

import pickle

import numpy as np
import pytest
import torch

from engines.errors import ModelError
from engines.networks.torch_file import read_torch

BASE = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
MODULE = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
STATES = {
    "of a module, with its counter": MODULE.state_dict(),
    "parameters": dict(MODULE.named_parameters()),
    "views of one storage": {
        "whole": BASE,
        "turned": BASE.permute(2, 0, 1),
        "part": BASE[1:, 2],
        "one": BASE[1, 2, 3],
        "spread": BASE[0, 0, :1].expand(4),
    },
    "every type": {
        str(dtype): (BASE * 3).to(dtype)
        for dtype in (
            torch.float64,
            torch.float32,
            torch.float16,
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
            torch.bool,
        )
    },
    "bfloat16": {"w": (BASE / 7).bfloat16()},
    "no values": {"w": torch.zeros(0, 3)},
    "nothing": {},
}


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "of before archives"])
@pytest.mark.parametrize("kind", STATES)
def test_every_tensor_is_as_pytorch_reads_it(tmp_path, kind, archive):
    path = tmp_path / "w.pth"
    torch.save(STATES[kind], path, _use_new_zipfile_serialization=archive)
    expected = torch.load(path, weights_only=True)
    found = read_torch(path)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        plain = tensor.detach()
        plain = plain.float() if plain.dtype == torch.bfloat16 else plain
        assert found[name].dtype == plain.numpy().dtype
        np.testing.assert_array_equal(found[name], plain.numpy(), strict=True)


def test_a_whole_module_is_refused_with_what_to_save(tmp_path):
    torch.save(MODULE, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"save model\.state_dict\(\)"):
        read_torch(tmp_path / "w.pth")


def test_a_place_in_the_memo_that_no_file_has_allocates_nothing(tmp_path):
    """The unpickler in C allocates as many entries as the number says."""
    (tmp_path / "w.pth").write_bytes(b"\x80\x02Nr\xff\xff\xff\xff.")
    with pytest.raises(ModelError, match="no file of PyTorch's"):
        read_torch(tmp_path / "w.pth")


@pytest.mark.parametrize("name", [b"os\nsystem", b"builtins\neval", b"collections\nCounter"])
def test_what_is_no_tensor_is_named_and_not_called(tmp_path, name):
    (tmp_path / "w.pth").write_bytes(b"\x80\x02c" + name + b"\n(U\x04exittR.")
    words = name.decode().replace("\n", ".")
    with pytest.raises(ModelError, match=f"it asks for '{words}'"):
        read_torch(tmp_path / "w.pth")


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"w": BASE}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    shape = pickle.dumps((3, 4, 5), 2)[2:8]
    assert content.count(shape) == 1
    path.write_bytes(content.replace(shape, pickle.dumps((3, 4, 6), 2)[2:8]))
    with pytest.raises(ModelError, match="beyond its values"):
        read_torch(path)
