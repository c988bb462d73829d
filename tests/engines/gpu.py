"""A GPU that is not there: pycuda's and TensorRT's calls as ``engines.backends.tensorrt`` makes
them, on host memory.

Work put on a stream is done only when somebody waits for it, so that an output read too early is
still empty. A "plan" is the ONNX graph itself, run by OpenVINO. Whatever is alive is counted, and
every call needs the context to be current.
"""

import ctypes
import itertools
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx

from engines.backends import cuda
from engines.backends import tensorrt as backend
from engines.backends.cuda import Gpu
from engines.backends.openvino import OpenVinoEngine
from engines.certificate import certificate_path, certify, key_of, subject_of, write_engine
from engines.localizer import Localizer
from engines.typed_graph import typed_graph

GPU = Gpu("NVIDIA L4", (8, 9), 13000)
SIZE = 64


class Driver:
    """pycuda.driver, as much of it as is used."""

    Error = type("Error", (Exception,), {})
    event_flags = SimpleNamespace(DEFAULT=0, BLOCKING_SYNC=1, DISABLE_TIMING=2)

    def __init__(self):
        self.log, self.stack, self.alive, self.streams = (
            [],
            [],
            {"context": 0, "stream": 0, "event": 0, "device": 0},
            weakref.WeakValueDictionary(),
        )
        self.handles = itertools.count(0x100)
        driver = self

        class Thing:
            kind = ""

            def __init__(self):
                driver.current()
                driver.alive[self.kind] += 1

            def __del__(self):
                driver.alive[self.kind] -= 1

        class Context:
            def __init__(self):
                driver.alive["context"] += 1

            def push(self):
                driver.stack.append(self)

            @staticmethod
            def pop():
                driver.stack.pop()

            def detach(self):
                assert self not in driver.stack
                driver.alive["context"] -= 1

        class Device:
            def __init__(self, index):
                assert index == 0

            def retain_primary_context(self):
                return Context()

        class Stream(Thing):
            kind = "stream"

            def __init__(self, flags=0):
                super().__init__()
                driver.log.append(f"stream {flags}")
                self.handle, self.queue = next(driver.handles), []
                driver.streams[self.handle] = self

            def synchronize(self):
                driver.current()
                while self.queue:
                    self.queue.pop(0)()

        class Event(Thing):
            kind = "event"

            def __init__(self, flags=0):
                super().__init__()
                driver.log.append(f"event {flags}")
                self.reached, self.stream, self.at_ms = True, None, None

            def record(self, stream):
                driver.current()
                self.reached, self.stream = False, stream
                stream.queue.append(self._reach)

            def _reach(self):
                self.reached, self.at_ms = True, time.perf_counter() * 1e3

            def time_till(self, later):
                driver.current()
                assert self.reached
                assert later.reached
                return later.at_ms - self.at_ms

            def synchronize(self):
                driver.current()
                while not self.reached:
                    self.stream.queue.pop(0)()

            def query(self):
                driver.current()
                if not self.reached:
                    self.stream.queue.pop(0)()
                return self.reached

        class Block(Thing):
            kind = "device"

            def __init__(self, size):
                super().__init__()
                self.memory = np.zeros(size + 256, np.uint8)
                self.size = size

            def __int__(self):
                return -(-self.memory.ctypes.data // 256) * 256

            def array(self):
                return memory_at(int(self), np.uint8, (self.size,))

        self.Context, self.Device, self.Stream, self.Event, self.mem_alloc = (
            Context,
            Device,
            Stream,
            Event,
            Block,
        )

    def current(self):
        assert self.stack, "no context is current"

    def pagelocked_empty(self, shape, dtype):
        self.current()
        return np.full(shape, 0xAB, dtype)

    def memcpy_htod_async(self, device, host, stream):
        self.current()
        stream.queue.append(lambda: device.array().__setitem__(slice(None), host))

    def memcpy_dtoh_async(self, host, device, stream):
        self.current()
        stream.queue.append(lambda: host.__setitem__(slice(None), device.array()))


def memory_at(address, dtype, shape):
    """The array that lies at an address."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * count).from_address(address), dtype).reshape(shape)


class Library:
    """tensorrt, as much of its runtime as is used."""

    __name__, __version__ = "tensorrt_rtx", "1.7.1.116"
    TensorIOMode = SimpleNamespace(INPUT="i", OUTPUT="o")

    class ILogger:
        ERROR = 1

        def __init__(self): ...

    class IRuntimeCache: ...

    def __init__(self, enqueue):
        self.enqueue, self.capturable, self.compiled = enqueue, True, 0
        library = self

        class Runtime:
            def __init__(self, logger):
                self.logger = logger

            def deserialize_cuda_engine(self, plan):
                try:
                    return Plan(onnx.load_from_string(plan), library)
                except Exception:
                    self.logger.log(
                        1, "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed"
                    )
                    return None

        self.Runtime = Runtime


class Plan:
    """ICudaEngine."""

    def __init__(self, model, library):
        self.engine, self.library = OpenVinoEngine(model, "fp32"), library
        self.specs = [*self.engine.inputs, *self.engine.outputs]
        self.num_io_tensors = len(self.specs)
        self._specs = {spec.name: spec for spec in self.specs}

    def get_tensor_name(self, index):
        return self.specs[index].name

    def get_tensor_mode(self, name):
        return "i" if self._specs[name] in self.engine.inputs else "o"

    def get_tensor_shape(self, name):
        return self._specs[name].shape

    def create_runtime_config(self):
        return RuntimeConfig()

    def create_execution_context(self, runtime_config=None):
        """Compiles kernels, where the cache has none."""
        kernels = runtime_config.cache if runtime_config else Kernels()
        if not kernels.compiled:
            kernels.compiled, self.library.compiled = True, self.library.compiled + 1
        return Execution(self)


class RuntimeConfig:
    """IRuntimeConfig."""

    def create_runtime_cache(self):
        return Kernels()

    def set_runtime_cache(self, cache):
        self.cache = cache


class Kernels:
    """IRuntimeCache; refuses what it did not write."""

    CONTENT = b"kernels of this GPU"

    def __init__(self):
        self.compiled = False

    def deserialize(self, content):
        self.compiled = content == self.CONTENT
        return self.compiled

    def serialize(self):
        return self.CONTENT if self.compiled else b""


class Execution:
    """IExecutionContext."""

    def __init__(self, plan):
        self.plan, self.addresses = plan, {}

    def is_stream_capturable(self, handle):
        return self.plan.library.capturable

    def set_tensor_address(self, name, address):
        assert address % 256 == 0
        self.addresses[name] = address
        return True

    def execute_async_v3(self, handle):
        self.plan.library.enqueue(handle, self.run)
        return True

    def run(self):
        tensors = {
            spec.name: memory_at(self.addresses[spec.name], spec.dtype, spec.shape)
            for spec in self.plan.specs
        }
        feeds = {spec.name: tensors[spec.name].copy() for spec in self.plan.engine.inputs}
        for name, value in self.plan.engine.infer(feeds).items():
            tensors[name][...] = value


def captured_graphs(driver):
    """A class in place of ``engines.backends.cuda.CapturedGraph``: what is put on the stream while
    capturing is run at each launch.
    """

    class Graph:
        made, launched, closed = 0, 0, 0

        def __init__(self, handle, enqueue):
            queue = driver.streams[handle].queue
            assert not queue
            enqueue()
            self.handle, self.work = handle, list(queue)
            queue.clear()
            Graph.made += 1

        def launch(self):
            Graph.launched += 1
            driver.streams[self.handle].queue.extend(self.work)

        def close(self):
            Graph.closed += 1

    return Graph


def machine_with_gpu(monkeypatch):
    """The driver of a machine with a GPU and its libraries, all stand-ins; ``library`` and
    ``graphs`` hang on it.
    """
    driver = Driver()
    driver.library = Library(lambda handle, work: driver.streams[handle].queue.append(work))
    driver.graphs = captured_graphs(driver)
    monkeypatch.setattr(backend, "load_tensorrt", lambda ahead=False: driver.library)
    monkeypatch.setattr(backend, "load_pycuda", lambda: driver)
    monkeypatch.setattr(backend, "CapturedGraph", driver.graphs)
    monkeypatch.setattr(backend, "leave_context", lambda: None)
    for module in (backend, cuda):
        monkeypatch.setattr(module, "probe_gpu", lambda: GPU)
    return driver


def plan_of(model):
    """What the stand-in for the runtime reads as a plan."""
    return model.SerializeToString()


def keep_plan(model, gpu, target=str(GPU), precision="fp32"):
    """Put an engine into the cache; its key."""
    typed = typed_graph(model, precision, gpu.library.__name__, GPU.sm)
    key = key_of(model, typed, gpu.library, target, precision)
    write_engine(key.path, key, plan_of(model))
    return key


def certify_plan(model, key, failures=()):
    """Put a certificate beside a kept engine."""
    shape = OpenVinoEngine(model, "fp32").inputs[0].shape
    frames = np.random.default_rng(0).integers(0, 256, (8, *shape[1:])).astype(np.uint8)
    engines = [Localizer(OpenVinoEngine(model, "fp32")) for _ in range(2)]
    found = replace(
        certify(*engines, list(frames)).of(subject_of(key, plan_of(model))), failures=failures
    )
    found.save(certificate_path(key.path))
