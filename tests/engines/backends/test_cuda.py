"""Asking the driver: every answer it can give becomes a GPU or one line. The library is stood in
for.
"""

import ctypes
import importlib.metadata

import pytest

from engines.backends.cuda import (
    LIBRARY,
    CapturedGraph,
    Gpu,
    check_driver,
    leave_context,
    probe_gpu,
)
from engines.errors import EngineError


class Library:
    """libcuda, as much of it as is used; ``codes`` are what its calls return."""

    def __init__(self, count=1, **codes):
        self.calls, self.count, self.codes = [], count, codes

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(name)
            self.answer(name, arguments)
            return self.codes.get(name, 0)

        return call

    def answer(self, name, arguments):
        if name == "cuDeviceGetCount":
            arguments[0]._obj.value = self.count
        elif name == "cuDriverGetVersion":
            arguments[0]._obj.value = 13020
        elif name == "cuDeviceGetName":
            arguments[0].value = b"NVIDIA L4"
        elif name == "cuDeviceGetAttribute":
            arguments[0]._obj.value = {75: 8, 76: 9}[arguments[1]]
        elif name == "cuStreamEndCapture":
            arguments[1]._obj.value = 0x77
        elif name == "cuGraphInstantiateWithFlags":
            arguments[0]._obj.value = 0x88


def no_library(name):
    assert name == LIBRARY
    raise OSError("cannot open shared object file")


def test_a_gpu_is_described():
    gpu = probe_gpu(load=lambda name: Library())
    assert gpu == Gpu("NVIDIA L4", (8, 9), 13020)
    assert (gpu.sm, str(gpu)) == ("sm89", "NVIDIA L4 sm89")
    assert Gpu("RTX 5090", (12, 0), 13000).sm == "sm120"


@pytest.mark.parametrize(
    ("library", "words"),
    [
        (no_library, "no NVIDIA driver"),
        (lambda name: Library(cuInit=100), "no NVIDIA GPU is visible"),
        (
            lambda name: Library(cuInit=803),
            "answers cuInit with error 803: check it with nvidia-smi",
        ),
        (lambda name: Library(count=0), "no NVIDIA GPU is visible"),
        (lambda name: Library(cuDeviceGetName=101), "answers cuDeviceGetName with error 101"),
    ],
)
def test_what_is_missing_is_one_line(library, words):
    with pytest.raises(EngineError, match=words) as caught:
        probe_gpu(load=library)
    assert "\n" not in str(caught.value)


def test_a_second_gpu_that_is_not_there():
    with pytest.raises(EngineError, match="there is no NVIDIA GPU 1"):
        probe_gpu(1, load=lambda name: Library())


def test_this_machines_answer_is_a_gpu_or_one_line():
    try:
        gpu = probe_gpu()
    except EngineError as error:
        gpu, words = None, str(error)
    assert gpu.sm.startswith("sm") if gpu else "NVIDIA" in words


def test_work_is_captured_between_begin_and_end_and_freed_once():
    library = Library()
    graph = CapturedGraph(0x55, lambda: library.calls.append("work"), lambda name: library)
    assert library.calls == [
        "cuInit",
        "cuStreamBeginCapture_v2",
        "work",
        "cuStreamEndCapture",
        "cuGraphInstantiateWithFlags",
    ]
    graph.launch()
    graph.close()
    graph.close()
    assert library.calls[5:] == ["cuGraphLaunch", "cuGraphExecDestroy", "cuGraphDestroy"]


@pytest.mark.parametrize("call", ["cuStreamEndCapture", "cuGraphInstantiateWithFlags"])
def test_a_capture_that_fails_leaves_nothing(call):
    library = Library(**{call: 900})
    with pytest.raises(EngineError, match="error 900"):
        CapturedGraph(0x55, lambda: None, lambda name: library)
    assert library.calls[-1] == "cuGraphDestroy"


def test_work_that_fails_while_it_is_captured_ends_the_capture():
    library = Library()

    def fails():
        raise EngineError("no")

    with pytest.raises(EngineError, match="no"):
        CapturedGraph(0x55, fails, lambda name: library)
    assert library.calls[-2:] == ["cuStreamEndCapture", "cuGraphDestroy"]


def test_handles_are_passed_as_pointers():
    seen = []

    class Sees(Library):
        def answer(self, name, arguments):
            super().answer(name, arguments)
            seen.append((name, [type(a) for a in arguments]))

    CapturedGraph(2**40 + 1, lambda: None, lambda name: Sees()).launch()
    launched = dict(seen)["cuGraphLaunch"]
    assert launched == [ctypes.c_void_p, ctypes.c_void_p]


class Stack(Library):
    """libcuda with a stack of contexts."""

    def __init__(self, *contexts):
        super().__init__()
        self.contexts = [*contexts]

    def cuCtxPopCurrent_v2(self, out):
        out._obj.value = self.contexts.pop()
        return 0

    def cuCtxPushCurrent_v2(self, context):
        self.contexts.append(context.value)
        return 0


@pytest.mark.parametrize(
    ("before", "after"), [([5, 7], [5]), ([7], []), ([7, 5], [5]), ([7, 7], [7])]
)
def test_a_context_is_left_wherever_pycuda_put_it(before, after):
    driver = Stack(*before)
    leave_context(7, lambda name: driver)
    assert driver.contexts == after


def test_a_driver_that_is_too_old_for_the_packages_is_told(monkeypatch):
    installed = {"tensorrt_rtx_cu13_bindings": "1.7.1", "tensorrt_cu12_bindings": "10.16"}

    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    check_driver(Gpu("NVIDIA L4", (8, 9), 13000), "tensorrt_rtx")
    check_driver(Gpu("NVIDIA L4", (8, 9), 12080), "tensorrt")
    with pytest.raises(
        EngineError,
        match=r"driver serves CUDA 12\.8, and tensorrt_rtx 1\.7\.1 needs driver 580 or newer: install",
    ):
        check_driver(Gpu("NVIDIA L4", (8, 9), 12080), "tensorrt_rtx")
    with pytest.raises(EngineError, match="needs driver 535 or newer"):
        check_driver(Gpu("NVIDIA L4", (8, 9), 11080), "tensorrt")
    installed.clear()  # a library of the system, of which nothing is known
    check_driver(Gpu("NVIDIA L4", (8, 9), 11080), "tensorrt")
