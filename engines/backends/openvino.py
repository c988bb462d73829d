"""OpenVINO: the default engine, on any CPU."""

import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov

from engines.base import Array, EngineError, TensorSpec, Ticket, check_feeds
from engines.quantize import is_quantized

PRECISIONS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
"""What each computes in that is not an 8-bit layer: beside those, fp32 costs no more than bf16 (measured), and is truer."""
BF16_SETS = ("BF16", "FP16", "AMX", "AVX10")
VNNI_SETS = ("VNNI", *BF16_SETS)
VNNI_FLAGS = {"avx512_vnni", "avx_vnni"}
MOST_STREAMS = 4  # each keeps activations of its own


class OpenVinoEngine:
    """One compiled graph, and requests that can be under way at once. See ``engines.base.Engine``.

    Args:
        model: what ``engines.build.build_graph`` made.
        precision: ``fp32``, ``bf16``, ``int8`` for a graph with 8-bit pairs, or ``auto`` for int8 where the graph has them,
            else for the fastest that the processor computes natively.
        threads: processor threads; 0 for all.
        streams: calls that are computed side by side, the threads shared out among them: 1 has each answer soonest; 0, one for
            each thread but at most ``MOST_STREAMS``, gives the most answers a second.

    Raises:
        EngineError: the processor lacks the precision, or OpenVINO refuses the graph.
    """

    backend = "openvino"

    def __init__(self, model: onnx.ModelProto, precision: str = "auto", threads: int = 0, streams: int = 1) -> None:
        core = ov.Core()
        self.precision = _checked_precision(model, precision, core)
        options: dict[str, Any] = {
            "NUM_STREAMS": streams or min(MOST_STREAMS, threads or core.get_property("CPU", "RANGE_FOR_STREAMS")[1]),
            "INFERENCE_PRECISION_HINT": PRECISIONS[self.precision],
            "ENABLE_CPU_PINNING": False,  # a thread bound to a core waits there for the one that reads or draws frames
        }
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", options)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO refuses the graph: {str(error).strip().splitlines()[-1]}") from error
        self.device = str(core.get_property("CPU", "FULL_DEVICE_NAME")).strip()
        self.inputs = tuple(_spec(value) for value in model.graph.input)
        self.outputs = tuple(_spec(value) for value in model.graph.output)
        # Inputs keep their names, but one that nothing reads is gone. Equal outputs may swap names, but keep their order.
        self._ports = {name: index for index, port in enumerate(compiled.inputs) for name in port.names}
        self.metadata: Mapping[str, str] = {p.key: p.value for p in model.metadata_props}
        self.slots = options["NUM_STREAMS"] + 1  # one more than is computed: the next call waits there, not the processor
        self._free = deque(compiled.create_infer_request() for _ in range(self.slots))
        self._under_way: list[ov.InferRequest] = []
        self._closed = False
        self.losses = losses(self.precision)

    def submit(self, feeds: Mapping[str, Array]) -> Ticket:
        """See ``engines.base.Engine.submit``."""
        check_feeds(self.inputs, feeds)
        if self._closed:
            raise EngineError("this engine is closed: build it again")
        if not self._free:
            raise EngineError(f"{self.slots} calls are under way, which is all this engine takes: collect one first")
        ports = {self._ports[name]: np.ascontiguousarray(v) for name, v in feeds.items() if name in self._ports}
        request = self._free[0]
        request.start_async(ports, share_inputs=True)  # the request holds on to the feeds
        self._under_way.append(self._free.popleft())
        return request

    def collect(self, ticket: Ticket) -> dict[str, Array]:
        """See ``engines.base.Engine.collect``."""
        if ticket not in self._under_way:
            raise EngineError("this call was collected before, or the engine was closed")
        try:
            ticket.wait()
            return {spec.name: np.array(ticket.get_output_tensor(i).data) for i, spec in enumerate(self.outputs)}
        except RuntimeError as error:
            raise EngineError(f"OpenVINO failed: {str(error).strip().splitlines()[-1]}") from error
        finally:
            self._under_way.remove(ticket)
            self._free.append(ticket)

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See ``engines.base.Engine.infer``."""
        return self.collect(self.submit(feeds))

    def close(self) -> None:
        """Free the compiled graph, once the calls under way have ended."""
        for request in self._under_way:
            request.wait()
        self._free, self._under_way, self._closed = deque(), [], True


def _checked_precision(model: onnx.ModelProto, precision: str, core: ov.Core) -> str:
    """What ``precision`` comes to for this graph on this processor."""
    quantized = is_quantized(model)
    if precision == "auto":
        return "int8" if quantized else best_precision(core)
    if precision not in PRECISIONS:
        raise EngineError(f"OpenVINO engines run in {', '.join(PRECISIONS)}, not {precision}")
    if quantized != (precision == "int8"):
        raise EngineError(f"a graph {'with' if quantized else 'without'} 8-bit scales does not run in {precision}")
    if precision == "bf16" and best_precision(core) != "bf16":
        raise EngineError("this processor does not compute in bf16: use --precision fp32 or int8")
    return precision


def best_precision(core: ov.Core | None = None) -> str:
    """``bf16`` where the processor computes it natively, else ``fp32``."""
    capabilities = (core or ov.Core()).get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "bf16" if "BF16" in capabilities and _allowed(BF16_SETS) else "fp32"


def losses(precision: str) -> list[str]:
    """What this processor, or the cap on its instruction set (``ONEDNN_MAX_CPU_ISA``), costs an engine, in words."""
    flags = _processor_flags()
    if precision == "int8" and not (flags & VNNI_FLAGS and _allowed(VNNI_SETS)):
        return ["no VNNI instructions here: int8 takes about twice as long as with them, and is still the fastest"]
    if precision == "fp32" and best_precision() == "fp32":
        return ["no bf16 instructions here: fp32 takes about twice as long; 'calibrate' makes int8, which is faster"]
    return []


def _allowed(sets: tuple[str, ...]) -> bool:
    """Whether oneDNN, which computes for OpenVINO, may use one of these instruction sets: it obeys a cap, OpenVINO does not."""
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    return not cap or any(name in cap for name in (*sets, "ALL", "DEFAULT"))


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux: nothing is known, nothing is claimed to be lost
        return VNNI_FLAGS
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_value for dim in tensor.shape.dim)
    return TensorSpec(value.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type), shape)
