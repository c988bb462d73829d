"""Asks the NVIDIA driver through ctypes which GPU there is, and makes the few driver calls that
pycuda lacks.

Creating a TensorRT runtime without a driver ends the process, so nothing of it is touched until
``probe_gpu`` has answered.
Calls and constants: CUDA Driver API, ``cuda.h`` 13.0.
"""

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engines.errors import EngineError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
CAPTURE_THREAD_LOCAL = (
    1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may use the driver meanwhile
)
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
Load = Callable[[str], Any]


@dataclass(frozen=True)
class Gpu:
    """A GPU and its driver.

    Attributes:
        name: as the driver says it.
        capability: compute capability, major and minor.
        cuda_version: the newest CUDA that the driver serves, as 13000 for 13.0.
    """

    name: str
    capability: tuple[int, int]
    cuda_version: int

    @property
    def sm(self) -> str:
        """``sm89`` and the like."""
        return f"sm{self.capability[0]}{self.capability[1]}"

    def __str__(self) -> str:
        return f"{self.name} {self.sm}"


def probe_gpu(index: int = 0, load: Load = ctypes.CDLL) -> Gpu:
    """The GPU of that number.

    Args:
        index: as the driver counts.
        load: opens a shared library; for tests.

    Raises:
        EngineError: there is no driver, it does not start, or it has no such GPU.
    """
    driver = _driver(load)
    count, version = ctypes.c_int(), ctypes.c_int()
    _check(driver.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
    if count.value <= index:
        raise EngineError(
            "no NVIDIA GPU is visible to the driver"
            if not count.value
            else f"there is no NVIDIA GPU {index}"
        )
    name, major, minor = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
    _check(driver.cuDriverGetVersion(ctypes.byref(version)), "cuDriverGetVersion")
    _check(driver.cuDeviceGetName(name, len(name), index), "cuDeviceGetName")
    for value, attribute in ((major, CAPABILITY_MAJOR), (minor, CAPABILITY_MINOR)):
        _check(
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, index),
            "cuDeviceGetAttribute",
        )
    return Gpu(name.value.decode(errors="replace"), (major.value, minor.value), version.value)


def _driver(load: Load) -> Any:
    try:
        driver = load(LIBRARY)
    except OSError as error:
        raise EngineError(f"no NVIDIA driver ({LIBRARY} is not there)") from error
    code = driver.cuInit(0)
    if code == NO_DEVICE:
        raise EngineError("no NVIDIA GPU is visible to the driver")
    _check(code, "cuInit")
    return driver


def _check(code: int, call: str) -> None:
    if code:
        raise EngineError(
            f"the NVIDIA driver answers {call} with error {code}: check it with nvidia-smi"
        )


class CapturedGraph:
    """Work of a stream, recorded once and launched again with one call.

    Args:
        stream: handle of a stream that is not the default one, with nothing left to do.
        enqueue: puts the work on the stream; it must have run once before, since libraries set
            themselves up at first use.
        load: opens a shared library; for tests.

    Raises:
        EngineError: the work cannot be captured; the stream is as before.
    """

    def __init__(self, stream: int, enqueue: Callable[[], None], load: Load = ctypes.CDLL) -> None:
        self._driver, self._stream = _driver(load), ctypes.c_void_p(stream)
        self._graph, self._executable = ctypes.c_void_p(), ctypes.c_void_p()
        _check(
            self._driver.cuStreamBeginCapture_v2(self._stream, CAPTURE_THREAD_LOCAL),
            "cuStreamBeginCapture",
        )
        try:
            try:
                enqueue()
            finally:  # a capture that was begun must be ended, or the stream stays unusable
                code = self._driver.cuStreamEndCapture(self._stream, ctypes.byref(self._graph))
            _check(code, "cuStreamEndCapture")
            arguments = ctypes.byref(self._executable), self._graph, ctypes.c_ulonglong(0)
            _check(self._driver.cuGraphInstantiateWithFlags(*arguments), "cuGraphInstantiate")
        except BaseException:
            self.close()
            raise

    def launch(self) -> None:
        """Put the recorded work on the stream again.

        Raises:
            EngineError: the driver refuses.
        """
        _check(self._driver.cuGraphLaunch(self._executable, self._stream), "cuGraphLaunch")

    def close(self) -> None:
        """Free the recording. Calling it twice is fine."""
        if self._executable:
            self._driver.cuGraphExecDestroy(self._executable)
        if self._graph:
            self._driver.cuGraphDestroy(self._graph)
        self._executable, self._graph = ctypes.c_void_p(), ctypes.c_void_p()


def leave_context(load: Load = ctypes.CDLL) -> None:
    """Take the current context off this thread's stack: releasing a primary context, pycuda leaves
    it there.
    """
    _driver(load).cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
