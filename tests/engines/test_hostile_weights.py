"""Weights files of every format, damaged and hostile: each loads, or is refused in one true
line.
"""

import contextlib
import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from engines.build import build_graph
from engines.errors import SightlineError
from engines.files import read_safetensors
from engines.networks.registry import load_classifier
from engines.networks.vgg import COMPACT_CHANNELS, random_weights
from tests.command_line import refused
from tests.hostile import message_of, with_header, written

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
SMALL = {"a.weight": np.ones((2, 3), np.float32), "a.bias": np.zeros(2, np.float32)}
NAME = "features.0.weight"


def load(path, model="compact"):
    return build_graph(load_classifier(model, str(path), 64))


def npz(packing=np.savez, **arrays):
    stream = io.BytesIO()
    packing(stream, **arrays)
    return stream.getvalue()


def archive(*members, packing=zipfile.ZIP_DEFLATED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", packing) as file:
        for name, content in members:
            file.writestr(name, content)
    return stream.getvalue()


def npy(shape, dtype="<f4", values=b"", version=(1, 0)):
    """A member of a NumPy archive with any header."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(header)) + header + values


def pth(state, **options):
    stream = io.BytesIO()
    torch.save(state, stream, **options)
    return stream.getvalue()


class Opens:
    """A pickle that would run a command."""

    def __reduce__(self):
        return print, ("this must not run",)


def compact(**changed):
    weights = {**random_weights(COMPACT_CHANNELS, hidden=0), **changed}
    return {name: value for name, value in weights.items() if value is not None}


FIRST = compact()[NAME]


def of_compact(value):
    return save({k: np.ascontiguousarray(v) for k, v in compact(**{NAME: value}).items()})


def nan_like(array, value=np.nan):
    changed = array.copy()
    changed.flat[3] = value
    return changed


def named(names):
    return save({k: np.ascontiguousarray(v) for k, v in compact().items()}, {"class_names": names})


BAD = {
    ".safetensors": {
        "empty": (b"", "is empty"),
        "one byte": (b"x", "cannot read weights"),
        "garbage": (b"garbage " * 9, "cannot read weights"),
        "git lfs pointer": (LFS, "Git LFS pointer"),
        "web page": (b"<!DOCTYPE html>", "a web page"),
        "cut off": (save(SMALL)[:-3], "cannot read weights"),
        "a header of 2^63": (with_header(b"{}", length=2**63), "cannot read weights"),
        "a header of 2^40": (with_header(b"{}", length=2**40), "cannot read weights"),
        "a pickle": (pickle.dumps(SMALL), "cannot read weights"),
        "a zip": (npz(**SMALL), "cannot read weights"),
        "another's": (save(SMALL), "not VGG16 weights"),
        "NaN": (of_compact(nan_like(FIRST)), "not finite"),
        "infinity": (of_compact(nan_like(FIRST, np.inf)), "not finite"),
        "integers": (of_compact(FIRST.astype(np.int8)), "holds int8"),
        "one weight is missing": (of_compact(None), "is missing"),
        "of another shape": (of_compact(FIRST[:, :2]), "shape"),
        "of five axes": (of_compact(FIRST[None]), "shape"),
        "of no values": (of_compact(FIRST[:0]), "is empty"),
        "beyond float32": (of_compact(FIRST.astype(np.float64) * 1e300), "not finite"),
        "a type that nobody has": (
            with_header(b'{"w":{"dtype":"F7","shape":[1],"data_offsets":[0,1]}}', b"x"),
            "cannot read weights",
        ),
        "float8": (
            with_header(b'{"w":{"dtype":"F8_E4M3","shape":[8],"data_offsets":[0,8]}}', bytes(8)),
            "holds F8_E4M3",
        ),
        "names that are no JSON": (named("{oops"), "class names"),
        "deep names": (named("[" * 99_999), "class names"),
        "names that are numbers": (named("[1, 2]"), "class names"),
        "names twice": (named('["a", "a"]'), "class names"),
        "too few names": (named('["a", "b"]'), "there are names for 2"),
    },
    ".npz": {
        "empty": (b"", "is empty"),
        "garbage": (b"garbage", "cannot read weights"),
        "git lfs pointer": (LFS, "Git LFS pointer"),
        "cut off": (npz(**SMALL)[:-30], "cannot read weights"),
        "one array": (npy((2,), values=bytes(8)), "cannot read weights"),
        "objects": (npz(a=np.array([None, {}], object)), "only numbers"),
        "text": (npz(a=np.array(["a", "b"])), "only numbers"),
        "a bomb": (npz(np.savez_compressed, a=np.zeros(50_000_000, np.int8)), "would unpack to"),
        "a shape of 2^40": (archive(("a.npy", npy((2**40,)))), "does not fit its shape"),
        "a shape of 2^120": (archive(("a.npy", npy((2**60, 2**60)))), "does not fit its shape"),
        "a negative shape": (
            archive(("a.npy", npy((-1,), values=bytes(4)))),
            "does not fit its shape",
        ),
        "a member that is no array": (archive(("a.npy", b"hello")), "cannot read weights"),
        "a version of the future": (
            archive(("a.npy", npy((1,), values=bytes(4), version=(9, 0)))),
            "format",
        ),
        "another's": (npz(**SMALL), "not VGG16 weights"),
        "NaN": (npz(**compact(**{NAME: nan_like(FIRST)})), "not finite"),
        "complex numbers": (npz(a=np.ones(3, np.complex64)), "only numbers"),
    },
    ".pth": {
        "empty": (b"", "is empty"),
        "garbage": (b"garbage", "cannot read weights"),
        "git lfs pointer": (LFS, "Git LFS pointer"),
        "code": (pickle.dumps(Opens()), "cannot read weights"),
        "code in PyTorch's own archive": (pth({"a": Opens()}), "cannot read weights"),
        "cut off": (pth({"a": torch.ones(9)})[:-40], "cannot read weights"),
        "a list": (pth([torch.ones(2)]), "not a state dictionary"),
        "a number": (pth(7), "not a state dictionary"),
        "a dictionary of dictionaries": (
            pth({"model": {"a": torch.ones(2)}}),
            "not a state dictionary",
        ),
        "names that are numbers": (pth({1: torch.ones(2)}), "names are not text"),
        "sparse": (pth({"a": torch.ones(2, 2).to_sparse()}), "not a dense tensor"),
        "complex numbers": (pth({"a": torch.ones(2, dtype=torch.complex64)}), "not a dense tensor"),
        "2^40 values of one": (pth({"a": torch.ones(1).expand(2**20, 2**20)}), "claim more values"),
        "a bomb": (
            archive(("x/data.pkl", bytes(50_000_000)), ("x/version", b"3")),
            "would unpack to",
        ),
        "another's": (pth({"a": torch.ones(2)}), "not VGG16 weights"),
        "NaN": (
            pth(
                {
                    k: torch.from_numpy(np.array(v))
                    for k, v in compact(**{NAME: nan_like(FIRST)}).items()
                }
            ),
            "not finite",
        ),
        "of before archives, cut off": (
            pth({"a": torch.ones(9)}, _use_new_zipfile_serialization=False)[:-8],
            "cannot read weights",
        ),
    },
    ".net": {
        "empty": (b"", "is empty"),
        "garbage": (b"garbage", "SqueezeNet's compressed weights"),
        "counts of 2^32": (b"\xff" * 4000, "SqueezeNet's compressed weights"),
        "zeros": (bytes(4000), "SqueezeNet's compressed weights"),
        "too much of it": (bytes(1 << 25), "at most"),
        "git lfs pointer": (LFS, "Git LFS pointer"),
    },
    ".caffemodel": {"of Caffe": (b"\x0a\x00", "Caffe's files are not read")},
}
KINDS = [(ending, kind) for ending, kinds in BAD.items() for kind in kinds]


@pytest.mark.parametrize(
    ("ending", "kind"), KINDS, ids=[f"{kind} {ending}" for ending, kind in KINDS]
)
def test_bad_weights_are_one_line(tmp_path, capsys, ending, kind):
    content, words = BAD[ending][kind]
    path = written(tmp_path / f"w{ending}", content)
    assert words in message_of(load, path, "squeezenet" if ending == ".net" else "compact")
    assert "must not run" not in capsys.readouterr().out


def test_places_that_are_no_files(tmp_path):
    for ending in (".safetensors", ".npz", ".pth", ".net"):
        (tmp_path / f"f{ending}").mkdir()
        assert "is a folder" in message_of(load, tmp_path / f"f{ending}")
    assert "do not exist" in message_of(load, tmp_path / "absent.npz")


def test_sound_weights_of_every_format_load(tmp_path):
    weights = {name: np.ascontiguousarray(value) for name, value in compact().items()}
    tensors = {name: torch.from_numpy(value.copy()) for name, value in weights.items()}
    halves = {name: value.astype(np.float16) for name, value in weights.items()}
    for name, content in (
        ("a.safetensors", save(weights)),
        ("a.npz", npz(**weights)),
        ("b.npz", npz(np.savez_compressed, **weights)),
        ("a.pth", pth(tensors)),
        ("b.pth", pth(tensors, _use_new_zipfile_serialization=False)),
    ):
        found = load_classifier("compact", str(written(tmp_path / name, content)), 64)
        assert (
            found.digest
            == load_classifier(
                "compact", str(written(tmp_path / "a.safetensors", save(weights))), 64
            ).digest
        )
    assert load(written(tmp_path / "h.safetensors", save(halves)))


def test_bfloat16_is_read_as_float32(tmp_path):
    data = struct.pack("<2H", 0x3F80, 0xC000)
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    tensors, _ = read_safetensors(
        written(tmp_path / "b.safetensors", with_header(header, data)), "weights"
    )
    np.testing.assert_array_equal(tensors["w"], [1.0, -2.0])


def test_from_the_command_line(tmp_path):
    for ending, kind in (
        (".safetensors", "NaN"),
        (".npz", "a bomb"),
        (".pth", "code"),
        (".net", "garbage"),
    ):
        content, words = BAD[ending][kind]
        model = "squeezenet" if ending == ".net" else "compact"
        path = written(tmp_path / f"w{ending}", content)
        assert words in refused(
            "build", "--model", model, "--weights", path, "--out", tmp_path / "o.onnx"
        )


SOUND = {
    ".safetensors": save(SMALL),
    ".npz": npz(**SMALL),
    ".pth": pth({"a": torch.ones(2, 3)}),
    ".net": bytes(300),
}


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, 40),
)
def test_changed_bytes_are_one_line(tmp_path_factory, changes, cut):
    for ending, content in SOUND.items():
        changed = bytearray(content)
        for place, value in changes:
            changed[place % len(content)] = value
        path = written(
            tmp_path_factory.getbasetemp() / f"changed{ending}",
            bytes(changed[: len(content) - cut]),
        )
        with contextlib.suppress(SightlineError):
            load(path, "squeezenet" if ending == ".net" else "compact")
