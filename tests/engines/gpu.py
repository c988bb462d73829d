"""A GPU that is not there: pycuda's and TensorRT's calls as ``engines.backends.tensorrt`` makes
them, on host memory.

The driver is simulated (``tests.engines.driver``). A "plan" is the ONNX graph itself, run by
OpenVINO, unless a test says otherwise.
"""

import ctypes
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import onnx

from engines.backends import cuda
from engines.backends import tensorrt as backend
from engines.backends.cuda import Gpu
from engines.backends.openvino import OpenVinoEngine
from engines.backends.tensorrt import size_of
from engines.certificate import certificate_path, certify, key_of, subject_of, write_engine
from engines.localizer import Localizer
from engines.typed_graph import typed_graph
from tests.engines.driver import Library, Pycuda, SimulatedDriver

GPU = Gpu("NVIDIA L4", (8, 9), 13000)
SIZE = 64


def memory_at(address, dtype, shape):
    """The array that lies at an address."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * count).from_address(address), dtype).reshape(shape)


class TensorRt:
    """tensorrt_rtx, as much of its runtime as is used.

    Args:
        driver: runs what is put on streams.
        read: gives what has ``inputs``, ``outputs`` and ``infer``, from the bytes of a plan.
    """

    __name__, __version__ = "tensorrt_rtx", "1.7.1.116"
    TensorIOMode = SimpleNamespace(INPUT="i", OUTPUT="o")

    class ILogger:
        ERROR = 1

        def __init__(self): ...

    class IRuntimeCache: ...

    def __init__(self, driver, read):
        self.driver, self.capturable, self.compiled = driver, True, 0
        library = self

        class Runtime:
            def __init__(self, logger):
                self.logger = logger

            def deserialize_cuda_engine(self, plan):
                try:
                    return Plan(read(plan), library)
                except Exception:
                    self.logger.log(
                        1, "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed"
                    )
                    return None

        self.Runtime = Runtime


class Plan:
    """ICudaEngine."""

    def __init__(self, engine, library):
        self.engine, self.library = engine, library
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
    """IExecutionContext. It has memory of its own from its first run on, which no capture allows."""

    def __init__(self, plan):
        self.plan, self.addresses, self.scratch = plan, {}, None

    def __del__(self):
        if self.scratch is not None:
            self.plan.library.driver.cuMemFree(self.scratch)

    def is_stream_capturable(self, handle):
        return self.plan.library.capturable

    def set_tensor_address(self, name, address):
        assert address % 256 == 0
        self.addresses[name] = address
        return True

    def execute_async_v3(self, handle):
        driver, specs = self.plan.library.driver, self.plan.engine
        if self.scratch is None:
            code, scratch = driver.cuMemAlloc(64)
            if code:
                return False
            self.scratch = scratch
        reads = [(self.addresses[s.name], size_of(s)) for s in specs.inputs]
        writes = [(self.addresses[s.name], size_of(s)) for s in specs.outputs]
        return driver.execute(handle, reads, writes, self.run) == 0

    def run(self):
        tensors = {
            spec.name: memory_at(self.addresses[spec.name], spec.dtype, spec.shape)
            for spec in self.plan.specs
        }
        feeds = {spec.name: tensors[spec.name].copy() for spec in self.plan.engine.inputs}
        for name, value in self.plan.engine.infer(feeds).items():
            tensors[name][...] = value


def read_graph(plan):
    """A plan that is the graph itself, which OpenVINO runs."""
    model = onnx.load_from_string(plan)
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    return OpenVinoEngine(model, "int8" if quantized else "fp32")


def machine_with_gpu(monkeypatch, read=read_graph, choose=lambda count: 0, face=Pycuda):
    """A machine with a GPU and its libraries, all simulated: what ``load_pycuda`` gives there.

    Args:
        monkeypatch: of the test.
        read: see ``TensorRt``.
        choose: see ``SimulatedDriver``.
        face: makes the driver's interface: ``Pycuda`` or ``BindingsDriver``.

    ``driver``, ``library`` (TensorRT) and ``libcuda`` hang on it.
    """
    driver = SimulatedDriver(choose)
    machine = face(driver)
    machine.driver, machine.libcuda = driver, Library(driver)
    machine.library = TensorRt(driver, read)
    monkeypatch.setattr(backend, "load_tensorrt", lambda ahead=False: machine.library)
    monkeypatch.setattr(backend, "load_pycuda", lambda: machine)
    for name in ("CapturedGraph", "leave_context", "current_context"):
        real = getattr(cuda, name)
        monkeypatch.setattr(backend, name, partial(real, load=lambda _: machine.libcuda))
    for module in (backend, cuda):
        monkeypatch.setattr(module, "probe_gpu", lambda: GPU)
    return machine


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
