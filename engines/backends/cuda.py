"""Asks the NVIDIA driver through ctypes which GPU there is, and makes the few driver calls that
pycuda lacks.

Creating a TensorRT runtime without a driver ends the process, so nothing of it is touched until
``probe_gpu`` has answered.
Calls and constants: CUDA Driver API, ``cuda.h`` 13.0.
"""

import ctypes
import importlib.metadata
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import EngineError, install_extra, install_packages

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
CAPTURE_THREAD_LOCAL = (
    1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may use the driver meanwhile
)
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
NOT_READY = 600  # CUDA_ERROR_NOT_READY
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


def current_context(load: Load = ctypes.CDLL) -> int:
    """Handle of the context that is current in this thread; 0 where none is."""
    context = ctypes.c_void_p()
    _check(_driver(load).cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    return context.value or 0


def leave_context(handle: int, load: Load = ctypes.CDLL) -> None:
    """Take a context off this thread's stack: what gives a primary context back leaves it there.

    Args:
        handle: of the context. pycuda may have put the one that was current before upon it.
        load: opens a shared library; for tests.
    """
    driver = _driver(load)
    upper = ctypes.c_void_p()
    driver.cuCtxPopCurrent_v2(ctypes.byref(upper))
    if upper.value != handle:
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        driver.cuCtxPushCurrent_v2(upper)


def load_pycuda() -> Any:
    """The driver's interface: pycuda where it is installed, else the same of cuda-bindings.

    Raises:
        EngineError: neither is installed, or it does not start.
    """
    try:
        import pycuda.driver as cuda
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else "unknown"
    else:
        try:
            cuda.init()
        except cuda.Error as error:
            raise EngineError(f"pycuda does not start: {str(error).splitlines()[0]}") from error
        return cuda
    try:
        from cuda.bindings import driver

        return BindingsDriver(driver)
    except ImportError as error:
        raise EngineError(
            f"pycuda cannot be loaded ({reason}): {install_packages('pycuda')}, which is compiled"
            " then and needs nvcc and the headers of NVIDIA's CUDA toolkit; or without a compiler:"
            f" {install_extra('bindings')}"
        ) from error
    except BindingsDriver.Error as error:
        raise EngineError(f"cuda-bindings does not start: {error}") from error


class BindingsDriver:
    """The driver through NVIDIA's package cuda-bindings, whose wheels need no compiler.

    It has as much of the interface of ``pycuda.driver`` as is used.

    What is made is freed with its last reference, and the context must be current then.

    Args:
        driver: the module ``cuda.bindings.driver``.

    Raises:
        BindingsDriver.Error: a call failed; this one and every other.
    """

    event_flags = SimpleNamespace(DEFAULT=0, BLOCKING_SYNC=1)

    class Error(Exception):
        """A call of the driver failed."""

    def __init__(self, driver: Any) -> None:
        self._module = driver
        self.call("cuInit", 0)
        self.Context = SimpleNamespace(pop=lambda: self.call("cuCtxPopCurrent"))

    def call(self, name: str, *arguments: Any) -> Any:
        """What a call gives besides its code."""
        code, *values = getattr(self._module, name)(*arguments)
        if int(code):
            raise self.Error(f"{name} failed: {getattr(code, 'name', f'error {int(code)}')}")
        return values[0] if values else None

    def Device(self, index: int) -> Any:  # noqa: N802  # as pycuda calls it
        """Holds ``retain_primary_context``, which gives what has ``push`` and ``detach``."""

        def retain_primary_context() -> Any:
            device = self.call("cuDeviceGet", index)
            context = self.call("cuDevicePrimaryCtxRetain", device)
            return SimpleNamespace(
                push=lambda: self.call("cuCtxPushCurrent", context),
                detach=lambda: self.call("cuDevicePrimaryCtxRelease", device),
            )

        return SimpleNamespace(retain_primary_context=retain_primary_context)

    def Stream(self, flags: int) -> "_Stream":  # noqa: N802
        """A stream; ``flags`` as of ``cuStreamCreate``."""
        return _Stream(self, self.call("cuStreamCreate", flags), "cuStreamDestroy")

    def Event(self, flags: int) -> "_Event":  # noqa: N802
        """An event; ``flags`` as of ``cuEventCreate``."""
        return _Event(self, self.call("cuEventCreate", flags), "cuEventDestroy")

    def mem_alloc(self, size: int) -> "_Held":
        """Memory of the device, whose address is its ``int``."""
        return _Held(self, self.call("cuMemAlloc", size), "cuMemFree")

    def pagelocked_empty(self, size: int, dtype: type) -> NDArray[Any]:
        """Memory of the host that copies reach by themselves, as bytes."""
        address = self.call("cuMemHostAlloc", size, 0)
        held = _Held(self, address, "cuMemFreeHost")
        return np.asarray(held.as_array(int(address), size)).view(dtype)

    def memcpy_htod_async(self, device: "_Held", host: NDArray[Any], stream: "_Stream") -> None:
        """Put a copy to the device on a stream."""
        place = device.handle, host.ctypes.data, host.nbytes
        self.call("cuMemcpyHtoDAsync", *place, stream.handle)

    def memcpy_dtoh_async(self, host: NDArray[Any], device: "_Held", stream: "_Stream") -> None:
        """Put a copy from the device on a stream."""
        place = host.ctypes.data, device.handle, host.nbytes
        self.call("cuMemcpyDtoHAsync", *place, stream.handle)


class _Held:
    """Something of the driver's, freed with its last reference."""

    def __init__(self, driver: BindingsDriver, handle: Any, free: str) -> None:
        self._driver, self.handle, self._free = driver, handle, free

    def __int__(self) -> int:
        return int(self.handle)

    def __del__(self) -> None:
        with suppress(BindingsDriver.Error):
            self._driver.call(self._free, self.handle)

    def as_array(self, address: int, size: int) -> "_Held":
        """What NumPy makes an array of without a copy."""
        data = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 3}
        self.__array_interface__ = data
        return self


class _Stream(_Held):
    def synchronize(self) -> None:
        self._driver.call("cuStreamSynchronize", self.handle)

    def wait_for_event(self, event: "_Event") -> None:
        self._driver.call("cuStreamWaitEvent", self.handle, event.handle, 0)


class _Event(_Held):
    def record(self, stream: _Stream) -> None:
        self._driver.call("cuEventRecord", self.handle, stream.handle)

    def synchronize(self) -> None:
        self._driver.call("cuEventSynchronize", self.handle)

    def query(self) -> bool:
        (code,) = self._driver._module.cuEventQuery(self.handle)
        if int(code) not in (0, NOT_READY):
            raise BindingsDriver.Error(f"cuEventQuery failed: error {int(code)}")
        return not int(code)

    def time_till(self, later: "_Event") -> float:
        return float(self._driver.call("cuEventElapsedTime", self.handle, later.handle))


CUDA_13 = 13000
"""As the driver says it. Drivers 580 and newer serve it, and packages whose name has ``cu13`` need
it: docs.nvidia.com/deeplearning/tensorrt, Prerequisites.
"""
CUDA_12 = 12020
"""Served by drivers 535 and newer, which packages with ``cu12`` need."""


def check_driver(gpu: Gpu, library: str) -> None:
    """Raise EngineError where the driver is older than the installed packages of a library need.

    Args:
        gpu: what there is.
        library: ``tensorrt`` or ``tensorrt_rtx``.
    """
    for tag, needed, driver in (("cu13", CUDA_13, 580), ("cu12", CUDA_12, 535)):
        try:
            version = importlib.metadata.version(f"{library}_{tag}_bindings")
        except importlib.metadata.PackageNotFoundError:
            continue
        if gpu.cuda_version < needed:
            served = f"{gpu.cuda_version // 1000}.{gpu.cuda_version % 1000 // 10}"
            raise EngineError(
                f"the NVIDIA driver serves CUDA {served}, and {library} {version} needs driver"
                f" {driver} or newer: install that driver"
            )
        return
