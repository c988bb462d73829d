"""The OpenVINO backend: the default, on any CPU."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from engines.backends.registry import EngineRequest
from engines.certificate import refuse_failed
from engines.engine import Array, Engine
from engines.errors import EngineError, install_packages
from engines.int8 import is_quantized

if TYPE_CHECKING:
    import openvino as ov

PRECISIONS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
"""What each computes in that is not an 8-bit layer: beside those, fp32 costs no more than bf16
(measured), and is truer.
"""
CPUINFO = Path("/proc/cpuinfo")
VNNI_FLAGS = {"avx512_vnni", "avx_vnni"}
CAP_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""What caps the instruction sets of oneDNN, which computes for OpenVINO: the first that is not
empty counts.
"""
LOW_CAPS: dict[str, set[str]] = {
    "SSE41": set(),
    "AVX": set(),
    "AVX2": set(),
    "AVX2_VNNI": {"avx_vnni"},
    "AVX2_VNNI_2": {"avx_vnni"},
    "AVX512_CORE": set(),
    "AVX512_CORE_VNNI": VNNI_FLAGS,
}
"""The caps under which bf16 is not computed natively, each with what is left of VNNI. oneDNN
ignores words it does not know.
"""
WIDTHS = {"bf16": 2, "f16": 2, "u8": 1, "i8": 1, "i64": 8, "f64": 8, "boolean": 1}
"""Bytes of an element, where they are not 4."""
MOST_STREAMS = 4  # each keeps activations of its own


@dataclass(frozen=True)
class NodeTime:
    """A node of the compiled graph in one call.

    Attributes:
        name: of the node.
        kind: its kind of layer.
        kernel: what computes it: instructions and type.
        sources: names of the nodes of the given graph that it computes; OpenVINO may add endings.
        ms: what it took.
        precision: what it computes in, such as ``f32``, ``bf16`` or ``u8``.
        moved_bytes: of its inputs, weights and outputs.
    """

    name: str
    kind: str
    kernel: str
    sources: tuple[str, ...]
    ms: float
    precision: str = ""
    moved_bytes: int = 0


class OpenVinoEngine(Engine):
    """One compiled graph, and requests that can be under way at once. See
    ``engines.engine.Engine``.

    Args:
        model: what ``engines.build.build_graph`` made.
        precision: ``fp32``, ``bf16``, ``int8`` for a graph with 8-bit pairs, or ``auto`` for int8
            where the graph has them, else for the fastest that the processor computes natively.
            ``bf16`` runs as fp32 where the processor lacks it.
        threads: processor threads; 0 for all.
        streams: calls that are computed side by side, the threads shared out among them: 1 has each
            answer soonest; 0, one for each thread but at most ``MOST_STREAMS``, gives the most
            answers a second.
        with_times: measure every node in every call, which costs time, for ``node_times``.

    Attributes:
        precision: what is computed in, ``auto`` and the fall-back resolved.
        losses: what this processor costs the engine, in words for the user.

    Raises:
        EngineError: the graph does not run in the precision, or OpenVINO refuses the graph.
    """

    backend = "openvino"

    def __init__(
        self,
        model: onnx.ModelProto,
        precision: str = "auto",
        threads: int = 0,
        streams: int = 1,
        with_times: bool = False,
    ) -> None:
        core = shared_core()
        computed = streams or min(
            MOST_STREAMS, threads or core.get_property("CPU", "RANGE_FOR_STREAMS")[1]
        )
        # One more than is computed: the next call waits there, not the processor.
        super().__init__(computed + 1)
        self.precision = _checked_precision(model, precision)
        options: dict[str, Any] = {
            "NUM_STREAMS": computed,
            "INFERENCE_PRECISION_HINT": PRECISIONS[self.precision],
            # a thread bound to a core waits there for the one that reads or draws frames
            "ENABLE_CPU_PINNING": False,
        }
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        if with_times:
            options["PERF_COUNT"] = True
        try:
            compiled = core.compile_model(
                core.read_model(model.SerializeToString()), "CPU", options
            )
        except RuntimeError as error:
            raise EngineError(
                f"OpenVINO refuses the graph: {str(error).strip().splitlines()[-1]}"
            ) from error
        capped = f", capped by {low_cap()}" if low_cap() else ""
        self.device = str(core.get_property("CPU", "FULL_DEVICE_NAME")).strip() + capped
        self._describe(model)
        # Inputs keep their names, but one that nothing reads is gone. Equal outputs may swap names,
        # but keep their order.
        self._ports = {
            name: index for index, port in enumerate(compiled.inputs) for name in port.names
        }
        self._requests = [compiled.create_infer_request() for _ in range(self.slots)]
        self._fed: list[list[Array]] = [[] for _ in self._requests]
        self._results = [_own_outputs(request, len(self.outputs)) for request in self._requests]
        self._refuse_crashing_kernels()
        self.losses = losses(self.precision, precision)

    def _refuse_crashing_kernels(self) -> None:
        """Under a cap without AVX-512 OpenVINO (2026.4) takes its AVX-512 kernel for normalizations
        all the same, and fills its last register by a shorter one: a segmentation fault.
        """
        cap = low_cap()
        if not cap or cap.partition("=")[2].startswith("AVX512"):
            return
        if any(kind == "MVN" and name.startswith("jit_avx512") for kind, name in self.kernels()):
            raise EngineError(
                f"{cap} caps the instruction sets, and OpenVINO would crash in this network's"
                " normalizations, where it does not keep to the cap: unset it"
            )

    def _start(self, place: int, feeds: Mapping[str, Array]) -> None:
        request = self._requests[place]
        fed = {
            self._ports[name]: np.ascontiguousarray(value)
            for name, value in feeds.items()
            if name in self._ports
        }
        self._fed[place] = list(fed.values())  # the request does not hold on to them
        for port, value in fed.items():  # given to start_async, they would take twice as long
            request.set_input_tensor(port, _tensor(value))
        request.start_async()

    def _finish(self, place: int) -> dict[str, Array]:
        try:
            self._requests[place].wait()
            found = zip(self.outputs, self._results[place], strict=True)
            return {spec.name: result.copy() for spec, result in found}
        except RuntimeError as error:
            raise EngineError(f"OpenVINO failed: {str(error).strip().splitlines()[-1]}") from error

    def _free(self) -> None:
        for place in self._under_way.values():
            self._requests[place].wait()
        self._requests = []
        self._fed, self._results = [], []

    def kernels(self) -> "Counter[tuple[str, str]]":
        """How often each (kind of layer, kernel) runs, such as
        ``("Convolution", "brgconv_avx512_I8")``: instructions and type.

        Raises:
            EngineError: the engine is closed.
        """
        self._check_open()
        request = self._requests[0]
        facts = [
            node.get_rt_info()
            for node in request.get_compiled_model().get_runtime_model().get_ops()
        ]
        return Counter(
            (fact["layerType"].astype(str), fact["primitiveType"].astype(str)) for fact in facts
        )

    def node_times(self) -> list[NodeTime]:
        """What each node that ran took in the last call, with ``with_times``.

        Raises:
            EngineError: the engine is closed.
        """
        import openvino as ov

        self._check_open()
        request, facts = self._requests[0], self._node_facts
        return [
            NodeTime(
                each.node_name,
                each.node_type,
                each.exec_type,
                *_facts_of(each.node_name, facts, each.real_time.total_seconds() * 1e3),
            )
            for each in request.get_profiling_info()
            if each.status == ov.ProfilingInfo.Status.EXECUTED
        ]

    @cached_property
    def _node_facts(self) -> dict[str, tuple[tuple[str, ...], str, int]]:
        """Sources, precision and moved bytes of each node of the compiled graph, by its name."""
        found = {}
        for node in self._requests[0].get_compiled_model().get_runtime_model().get_ops():
            fact = {
                key: node.get_rt_info()[key].astype(str)
                for key in ("originalLayersNames", "runtimePrecision")
            }
            sources = tuple(name for name in fact["originalLayersNames"].split(",") if name)
            ends = [*(each.get_source_output() for each in node.inputs()), *node.outputs()]
            moved = sum(_bytes_of(end, fact["runtimePrecision"]) for end in ends)
            found[node.get_friendly_name()] = sources, fact["runtimePrecision"], moved
        return found


def _facts_of(
    name: str, facts: Mapping[str, tuple[tuple[str, ...], str, int]], ms: float
) -> tuple[tuple[str, ...], float, str, int]:
    sources, precision, moved = facts.get(name, ((), "", 0))
    return sources, ms, precision, moved


def _bytes_of(end: Any, precision: str) -> int:
    """Of a tensor between nodes of a compiled graph. Constants are kept in the precision of the
    node that reads them.
    """
    node, shape = end.get_node(), end.get_partial_shape()
    if not shape.is_static:
        return 0
    facts = node.get_rt_info()
    if facts["layerType"].astype(str) != "Const":
        each = facts["outputPrecisions"].astype(str).split(",")
        precision = each[min(end.get_index(), len(each) - 1)]
    return int(np.prod(shape.to_shape(), dtype=np.int64)) * WIDTHS.get(precision, 4)


def _tensor(values: Array) -> "ov.Tensor":
    """These very values, as OpenVINO takes them."""
    import openvino as ov

    return ov.Tensor(values, shared_memory=True)


def _own_outputs(request: "ov.InferRequest", count: int) -> list[Array]:
    """Arrays of ours, in the outputs' order, that a request writes its answers to: to ask it for
    its own takes longer than to copy them.
    """
    results = [np.array(request.get_output_tensor(place).data) for place in range(count)]
    for place, result in enumerate(results):
        request.set_output_tensor(place, _tensor(result))
    return results


def open_engine(request: EngineRequest) -> OpenVinoEngine:
    """The engine that is asked for; in 8 bits where that is asked for, or pays, and there is a
    calibration.

    Raises:
        EngineError: the precision cannot be had, OpenVINO refuses the graph, or the engine failed
            its certificate.
        ModelError: the graph cannot be built, or int8 is asked for and there is no calibration.
    """
    wanted = request.precision == "int8" or request.calibration_named or has_vnni()
    graph = request.graph(request.calibration() if wanted else None)
    engine = OpenVinoEngine(graph, request.precision, request.threads, request.streams)
    refuse_failed(graph, engine)
    return engine


def native_precisions(
    precision: str, calibrated: bool, calibration_named: bool
) -> tuple[str, list[str]]:
    """What a latency budget may choose from.

    Args:
        precision: what the user chose.
        calibrated: whether there is a calibration for int8.
        calibration_named: whether the user named it.

    Returns:
        (the precision that the choice comes to, all that this processor computes natively).

    Raises:
        EngineError: OpenVINO does not compute in it.
    """
    if precision not in (*PRECISIONS, "auto"):
        raise EngineError(f"OpenVINO engines run in {', '.join(PRECISIONS)}, not {precision}")
    best = best_precision()
    native = ["fp32"]
    if best == "bf16":
        native.append("bf16")
    if calibrated:
        native.append("int8")
    if precision == "auto":
        return (native[-1] if has_vnni() or calibration_named else best), native
    return (best if precision == "bf16" else precision), native


@cache
def shared_core() -> "ov.Core":
    """The one core of the process, which is never freed.

    A core gives the thread that makes it a stack for signals, and takes it back when it is freed.
    Cores that are freed in another order, or by another thread, leave a stack that is gone, and
    Ctrl-C ends in a segmentation fault (OpenVINO 2026.4).
    """
    try:
        import openvino as ov  # only where it is used: a machine with a GPU may lack it
    except ImportError as error:
        raise EngineError(f"OpenVINO is not installed: {install_packages('openvino')}") from error
    return ov.Core()


def _checked_precision(model: onnx.ModelProto, precision: str) -> str:
    """What ``precision`` comes to for this graph on this processor."""
    quantized = is_quantized(model)
    if precision == "auto":
        return "int8" if quantized else best_precision()
    if precision not in PRECISIONS:
        raise EngineError(f"OpenVINO engines run in {', '.join(PRECISIONS)}, not {precision}")
    if quantized != (precision == "int8"):
        raise EngineError(
            f"a graph {'with' if quantized else 'without'} 8-bit scales does not run in {precision}"
        )
    return best_precision() if precision == "bf16" else precision


def best_precision() -> str:
    """``bf16`` where the processor computes it natively, else ``fp32``."""
    capabilities = shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "bf16" if "BF16" in capabilities and not low_cap() else "fp32"


def losses(precision: str, asked: str = "auto") -> list[str]:
    """What this processor, or a cap on its instruction sets, costs an engine, in words.

    Args:
        precision: what the engine computes in.
        asked: what the user asked for.
    """
    whose = f"{low_cap()} leaves no" if low_cap() else "this processor has no"
    if precision == "int8" and not has_vnni():
        return [
            f"{whose} VNNI instructions: int8 rounds its weights once more and is less true;"
            " precision fp32 is slower"
        ]
    if precision != "fp32" or best_precision() != "fp32":
        return []
    if asked == "bf16":
        return [
            f"{whose} bf16 instructions: runs in fp32 instead, which takes about twice as long as"
            " bf16 with them"
        ]
    if not has_vnni():
        return [
            f"{whose} bf16 and VNNI instructions: runs in fp32; precision int8 is faster, and"
            " less true there"
        ]
    return [
        f"{whose} bf16 instructions: fp32 takes about twice as long; 'calibrate' makes int8, which"
        " is faster"
    ]


def low_cap() -> str:
    """The cap on oneDNN's instruction sets, as ``VARIABLE=VALUE``, where it leaves no native bf16;
    else empty.

    oneDNN obeys it; OpenVINO, which is asked for its capabilities, does not.
    """
    variable = next((name for name in CAP_VARIABLES if os.environ.get(name)), "")
    value = os.environ.get(variable, "").upper()
    return f"{variable}={value}" if value in LOW_CAPS else ""


def has_vnni() -> bool:
    """Whether 8-bit products are exact here. Without VNNI oneDNN halves the weights, so that sums
    of two fit 16 bits.
    """
    flags, cap = _processor_flags() & VNNI_FLAGS, low_cap().partition("=")[2]
    return bool(flags & LOW_CAPS[cap] if cap else flags)


def _processor_flags() -> set[str]:
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux: nothing is known, nothing is claimed to be lost
        return VNNI_FLAGS
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    return flags or VNNI_FLAGS  # not x86: likewise
