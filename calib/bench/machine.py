"""Describes this machine, measures its best compute rate and memory bandwidth, and compares a graph
with that bound.
"""

import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, shape_inference

from engines.backends.openvino import OpenVinoEngine, best_precision, low_cap, shared_core
from engines.graph import FLOAT, Graph, attributes_of

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
"""Of one element."""
MOVING = {
    "Conv",
    "ConvTranspose",
    "Gemm",
    "MatMul",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "LRN",
    "ReduceMax",
    "ReduceMean",
    "ReduceSum",
    "CumSum",
    "TopK",
}
"""Nodes that read their inputs and write their outputs; an engine fuses the others with their
neighbours.
"""


@dataclass(frozen=True)
class Work:
    """What one call of a graph must compute and move, on any backend.

    Attributes:
        flop: two for each multiply-add of convolutions and matrix products; all else is nothing
            beside them.
        values: elements of weights and activations that the nodes in ``MOVING`` read and write.
    """

    flop: int
    values: int


@dataclass(frozen=True)
class Peaks:
    """The highest rates that one core of this machine reached.

    Attributes:
        gflop_per_s: by precision, of a large convolution or matrix product, whichever is faster.
        gbyte_per_s: read and written, copying an array that no cache holds.
        cached_gbyte_per_s: the same of an array that the core's own cache holds.
    """

    gflop_per_s: dict[str, float]
    gbyte_per_s: float
    cached_gbyte_per_s: float = 0.0

    def report(self) -> dict[str, Any]:
        """The peaks for the JSON."""
        return asdict(self)


def count_work(model: onnx.ModelProto) -> Work:
    """Count FLOP and moved elements, from the nodes and their static shapes.

    Constants count as read at every call.
    """
    shapes = tensor_shapes(model)
    flop = values = 0
    for node in model.graph.node:
        flop += 2 * multiply_adds(node, shapes)
        if node.op_type in MOVING:
            values += sum(
                prod(shapes[name]) for name in (*node.input, *node.output) if name in shapes
            )
    return Work(flop, values)


def multiply_adds(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    """Count those of a convolution or matrix product, as ONNX defines it. Others have 0."""
    if (
        node.op_type == "Conv"
    ):  # each output element: one for every weight of its filter, [M, C / group, kh, kw]
        return prod(shapes[node.output[0]]) * prod(shapes[node.input[1]][1:])
    if (
        node.op_type == "ConvTranspose"
    ):  # each input element: one for every weight it is spread by, [C, M / group, kh, kw]
        return prod(shapes[node.input[0]]) * prod(shapes[node.input[1]][1:])
    if node.op_type == "Gemm":
        summed = shapes[node.input[0]][0 if attributes_of(node).get("transA") else 1]
        return prod(shapes[node.output[0]]) * summed
    if node.op_type == "MatMul":
        return prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
    return 0


def tensor_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """The static shape of every tensor, by name.

    Large weights are left out of the inference, which would copy them.
    """
    known = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    large = [tensor for tensor in model.graph.initializer if prod(tensor.dims) > 4096]
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    light.graph.name = model.graph.name
    light.graph.node.extend(model.graph.node)
    light.graph.output.extend(model.graph.output)
    light.graph.input.extend(model.graph.input)
    light.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in large
    )
    light.graph.initializer.extend(t for t in model.graph.initializer if prod(t.dims) <= 4096)
    inferred = shape_inference.infer_shapes(light, strict_mode=True, data_prop=True).graph
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        known[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    return known


def roofline_point(work: Work, precision: str, peaks: Peaks, achieved_ms: float) -> dict[str, Any]:
    """Compute the bounds of a graph on this machine, and how far from them it ran.

    Returns:
        ``compute_ms`` and ``memory_ms`` (the two bounds), ``roofline_ms`` (the longer), ``bound``
        (its name), ``achieved_ms``, ``gap`` (achieved over roofline), ``flop``, ``bytes``,
        ``flop_per_byte``, ``gflop_per_s`` (achieved).
    """
    moved = work.values * BYTES[precision]
    compute_ms = work.flop / peaks.gflop_per_s[precision] / 1e6
    memory_ms = moved / peaks.gbyte_per_s / 1e6
    return {
        "precision": precision,
        "flop": work.flop,
        "bytes": moved,
        "flop_per_byte": round(work.flop / max(moved, 1), 3),
        "compute_ms": round(compute_ms, 4),
        "memory_ms": round(memory_ms, 4),
        "roofline_ms": round(max(compute_ms, memory_ms), 4),
        "bound": "compute" if compute_ms >= memory_ms else "memory",
        "achieved_ms": achieved_ms,
        "gap": round(achieved_ms / max(compute_ms, memory_ms), 3),
        "gflop_per_s": round(work.flop / achieved_ms / 1e6, 2),
    }


STAT = Path("/proc/stat")
PEAK_S = 0.4
"""How long each kernel is tried: the fastest call counts, so that a moment without neighbours is
enough.
"""
CACHED_VALUES = 1 << 14  # 128 KiB, and as much for the copy
COPIED_VALUES = 1 << 25  # float64: 256 MiB, far more than any cache holds


def machine() -> str:
    """Describe processor, cores and system in words."""
    import openvino

    name = str(shared_core().get_property("CPU", "FULL_DEVICE_NAME")).strip()
    versions = f"Python {platform.python_version()}, OpenVINO {openvino.__version__.split('-')[0]}"
    cap = f", capped by {low_cap()}" if low_cap() else ""
    return f"{name}, {os.cpu_count()} cores{cap}, {platform.system()}, {versions}"


class Neighbours:
    """Measures how much of the processors other programs take, from now on.

    With them, times are longer and peaks look lower.
    """

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float | None:
        """The share of all processor time since the beginning that other programs took, 0..1.

        It is None where the system does not say (no ``/proc``).
        """
        if self._start is None or (now := self._now()) is None:
            return None
        busy_s, own_s, passed_s = (
            after - before for after, before in zip(now, self._start, strict=True)
        )
        return round(
            min(1.0, max(0.0, (busy_s - own_s) / max(passed_s * (os.cpu_count() or 1), 1e-9))), 3
        )

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds of all processors' work, of this program's work, and of the clock."""
        try:
            ticks = [int(value) for value in STAT.read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        user, nice, system, _, _, interrupts, soft, stolen = ticks
        busy_s = (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")
        return busy_s, sum(os.times()[:4]), time.perf_counter()


TASKS = Path("/proc/self/task")


class ThreadTimes:
    """Sums up the processor time of this program's threads, by what they do, from now on.

    Args:
        kind_of: what a thread of this name does; it is given None for threads that libraries began.
    """

    def __init__(self, kind_of: Callable[[str | None], str]) -> None:
        self._kind_of = kind_of
        self._last_ns = self._now()
        self._sums_ns: Counter[str] = Counter()

    def look(self) -> None:
        """Count what each thread has taken since the last look. One that has ended since is left
        out, so look often.
        """
        now_ns = self._now()
        names = {each.native_id: each.name for each in threading.enumerate()}
        for thread, spent_ns in now_ns.items():
            self._sums_ns[self._kind_of(names.get(thread))] += spent_ns - self._last_ns.get(
                thread, 0
            )
        self._last_ns = now_ns

    def shares(self) -> dict[str, float]:
        """Share of each kind, the largest first; empty where the system does not say it."""
        total_ns = sum(self._sums_ns.values())
        return {k: round(v / total_ns, 3) for k, v in self._sums_ns.most_common() if total_ns > 0}

    @staticmethod
    def _now() -> dict[int, int]:
        found = {}
        for folder in TASKS.iterdir() if TASKS.is_dir() else ():
            with suppress(OSError, ValueError, IndexError):  # a thread may end meanwhile
                found[int(folder.name)] = int((folder / "schedstat").read_text().split()[0])
        return found


def measure_peaks() -> Peaks:
    """Time large convolutions and matrix products in each precision, and a large copy, each on one
    thread, in processor time.

    Of the calls the fastest counts: a peak is what the machine can do, not what it does while
    others use it.
    """
    core = shared_core()
    precisions = ["fp32", *(["bf16"] if best_precision() == "bf16" else [])]
    precisions += (
        ["int8"] if "INT8" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else []
    )
    kernels = large_convolution, large_product
    peaks = {
        precision: max(_peak_gflop_per_s(kernel(precision), precision) for kernel in kernels)
        for precision in precisions
    }
    return Peaks(
        {precision: round(peak, 1) for precision, peak in peaks.items()},
        round(_copied_gbyte_per_s(COPIED_VALUES), 2),
        round(_copied_gbyte_per_s(CACHED_VALUES), 2),
    )


def large_convolution(precision: str) -> onnx.ModelProto:
    """Build two 3 x 3 convolutions of 256 channels on 28 x 28, as in the middle of VGG16.

    They are 1.8 GFLOP, and fit into the cache.
    """
    return _twice("Conv", (1, 256, 28, 28), (256, 256, 3, 3), precision, pads=[1, 1, 1, 1])


def large_product(precision: str) -> onnx.ModelProto:
    """Build two matrix products of 1024 x 1024 x 1024. They are 4.3 GFLOP."""
    return _twice("MatMul", (1024, 1024), (1024, 1024), precision)


def _twice(
    op: str,
    shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    precision: str,
    **attributes: Any,
) -> onnx.ModelProto:
    """Build a graph with the same node twice.

    So the second node reads what the engine wrote in its own layout and precision.
    """
    graph = Graph(f"large_{op.lower()}")
    x = graph.input("x", FLOAT, shape)
    weight = np.random.default_rng(0).uniform(-1, 1, weight_shape)
    for _ in range(2):
        if precision == "int8":
            kernel = _dequantized(
                graph, graph.constant(np.rint(127 * weight), np.int8, "weight"), 1 / 127
            )
            x = graph.add(op, _quantized(graph, x), kernel, **attributes)
        else:
            x = graph.add(op, x, graph.constant(weight, hint="weight"), **attributes)
    graph.output(x, "y")
    return graph.model()


def _quantized(graph: Graph, x: str) -> str:
    scale, zero = graph.constant(0.05), graph.constant(0, np.uint8)
    return graph.add("DequantizeLinear", graph.add("QuantizeLinear", x, scale, zero), scale, zero)


def _dequantized(graph: Graph, values: str, scale: float) -> str:
    return graph.add("DequantizeLinear", values, graph.constant(scale), graph.constant(0, np.int8))


def _peak_gflop_per_s(model: onnx.ModelProto, precision: str) -> float:
    engine = OpenVinoEngine(model, precision, threads=1)
    feed = {"x": np.random.default_rng(0).random(engine.inputs[0].shape, np.float32)}
    return count_work(model).flop / _fastest_s(lambda: engine.infer(feed)) / 1e9


def _copied_gbyte_per_s(values: int) -> float:
    source = np.ones(values)
    target = np.empty_like(source)
    repeats = max(1, COPIED_VALUES // values // 64)  # a call that is long enough to be timed

    def copy() -> None:
        for _ in range(repeats):
            np.copyto(target, source)

    return 2 * repeats * source.nbytes / _fastest_s(copy) / 1e9


def _fastest_s(call: Callable[[], object]) -> float:
    call()
    fastest_s, end = float("inf"), time.perf_counter() + PEAK_S
    while time.perf_counter() < end or fastest_s == float("inf"):
        before = time.process_time()
        call()
        fastest_s = min(fastest_s, time.process_time() - before)
    return fastest_s
