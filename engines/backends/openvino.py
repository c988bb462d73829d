"""OpenVINO: the default engine, on any CPU."""

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import openvino as ov

from engines.base import Array, EngineError, TensorSpec, Ticket, check_feeds

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
MOST_STREAMS = 4  # each keeps activations of its own


class OpenVinoEngine:
    """One compiled graph, and requests that can be under way at once. See ``engines.base.Engine``.

    Args:
        model: what ``engines.build.build_graph`` made.
        precision: ``fp32``, ``bf16``, or ``auto`` for the fastest that the processor computes natively.
        threads: processor threads; 0 for all.
        streams: calls that are computed side by side, the threads shared out among them: 1 has each answer soonest; 0, one for
            each thread but at most ``MOST_STREAMS``, gives the most answers a second.

    Raises:
        EngineError: the processor lacks the precision, or OpenVINO refuses the graph.
    """

    backend = "openvino"

    def __init__(self, model: onnx.ModelProto, precision: str = "auto", threads: int = 0, streams: int = 1) -> None:
        core = ov.Core()
        self.precision = best_precision(core) if precision == "auto" else precision
        if self.precision not in PRECISIONS:
            raise EngineError(f"OpenVINO engines run in {' or '.join(PRECISIONS)}, not {precision}")
        if self.precision == "bf16" and best_precision(core) != "bf16":
            raise EngineError("this processor does not compute in bf16: use --precision fp32")
        options: dict[str, Any] = {
            "NUM_STREAMS": streams or min(MOST_STREAMS, threads or core.get_property("CPU", "RANGE_FOR_STREAMS")[1]),
            "INFERENCE_PRECISION_HINT": PRECISIONS[self.precision],
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


def best_precision(core: ov.Core | None = None) -> str:
    """``bf16`` where the processor computes it natively, else ``fp32``."""
    capabilities = (core or ov.Core()).get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "bf16" if "BF16" in capabilities else "fp32"


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_value for dim in tensor.shape.dim)
    return TensorSpec(value.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type), shape)
