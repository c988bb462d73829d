"""What this machine is, and what it reaches at its best."""

import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino

from calib.bench.roofline import Peaks, count_work
from engines.backends.openvino import OpenVinoEngine, best_precision, low_cap
from engines.graph import FLOAT, Graph

STAT = Path("/proc/stat")
PEAK_S = 0.7
"""How long each kernel is tried: the fastest call counts, so that a moment without neighbours is enough."""
COPIED_VALUES = 1 << 25  # float64: 256 MiB, far more than any cache holds


def machine() -> str:
    """Processor, cores and system in words."""
    name = str(openvino.Core().get_property("CPU", "FULL_DEVICE_NAME")).strip()
    versions = f"Python {platform.python_version()}, OpenVINO {openvino.__version__.split('-')[0]}"
    cap = f", capped by {low_cap()}" if low_cap() else ""
    return f"{name}, {os.cpu_count()} cores{cap}, {platform.system()}, {versions}"


class Neighbours:
    """How much of the processors other programs take, from now on; with them, times are longer and peaks look lower."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float | None:
        """Of all processor time since the beginning, 0..1; None where the system does not tell (no ``/proc``)."""
        if self._start is None or (now := self._now()) is None:
            return None
        busy_s, own_s, passed_s = (after - before for after, before in zip(now, self._start, strict=True))
        return round(min(1.0, max(0.0, (busy_s - own_s) / max(passed_s * (os.cpu_count() or 1), 1e-9))), 3)

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds: of all processors' work, of this program's, of the clock."""
        try:
            ticks = [int(value) for value in STAT.read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        user, nice, system, _, _, interrupts, soft, stolen = ticks
        busy_s = (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")
        return busy_s, sum(os.times()[:4]), time.perf_counter()


def measure_peaks() -> Peaks:
    """Time large convolutions and matrix products in each precision that the processor computes, and a large copy.

    Of the calls the fastest counts: a peak is what the machine can do, not what it does while others use it.
    """
    core = openvino.Core()
    precisions = ["fp32", *(["bf16"] if best_precision(core) == "bf16" else [])]
    precisions += ["int8"] if "INT8" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else []
    kernels = large_convolution, large_product
    peaks = {precision: max(_peak_gflop_per_s(kernel(precision), precision) for kernel in kernels) for precision in precisions}
    return Peaks({precision: round(peak, 1) for precision, peak in peaks.items()}, round(_copied_gbyte_per_s(), 2))


def large_convolution(precision: str) -> onnx.ModelProto:
    """Two 3 x 3 convolutions of 256 channels on 28 x 28, as in the middle of VGG16: 1.8 GFLOP, in cache."""
    return _twice("Conv", (1, 256, 28, 28), (256, 256, 3, 3), precision, pads=[1, 1, 1, 1])


def large_product(precision: str) -> onnx.ModelProto:
    """Two matrix products of 1024 x 1024 x 1024: 4.3 GFLOP."""
    return _twice("MatMul", (1024, 1024), (1024, 1024), precision)


def _twice(
    op: str, shape: tuple[int, ...], weight_shape: tuple[int, ...], precision: str, **attributes: Any
) -> onnx.ModelProto:
    """Twice in a row, so that the second reads what the engine wrote in its own layout and precision."""
    graph = Graph(f"large_{op.lower()}")
    x = graph.input("x", FLOAT, shape)
    weight = np.random.default_rng(0).uniform(-1, 1, weight_shape)
    for _ in range(2):
        if precision == "int8":
            kernel = _dequantized(graph, graph.constant(np.rint(127 * weight), np.int8, "weight"), 1 / 127)
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
    engine = OpenVinoEngine(model, precision)
    feed = {"x": np.random.default_rng(0).random(engine.inputs[0].shape, np.float32)}
    return count_work(model).flop / _fastest_s(lambda: engine.infer(feed)) / 1e9


def _copied_gbyte_per_s() -> float:
    source = np.ones(COPIED_VALUES)
    target, parts = np.empty_like(source), os.cpu_count() or 1
    cuts = np.linspace(0, COPIED_VALUES, parts + 1).astype(int)

    def copy(part: int) -> None:
        np.copyto(target[cuts[part] : cuts[part + 1]], source[cuts[part] : cuts[part + 1]])

    with ThreadPoolExecutor(parts) as pool:  # a single core does not always fill the memory's lanes
        return 2 * source.nbytes / _fastest_s(lambda: list(pool.map(copy, range(parts)))) / 1e9


def _fastest_s(call: Callable[[], object]) -> float:
    call()
    fastest_s, end = float("inf"), time.perf_counter() + PEAK_S
    while (start := time.perf_counter()) < end:
        call()
        fastest_s = min(fastest_s, time.perf_counter() - start)
    return fastest_s
