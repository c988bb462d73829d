"""OpenVINO: the default engine, on any CPU."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import openvino as ov

from engines.base import Array, EngineError, TensorSpec, check_feeds

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoEngine:
    """One compiled graph with one request. See ``engines.base.Engine``.

    Args:
        model: what ``engines.build.build_graph`` made.
        precision: ``fp32``, ``bf16``, or ``auto`` for the fastest that the processor computes natively.
        threads: processor threads; 0 for all.

    Raises:
        EngineError: the processor lacks the precision, or OpenVINO refuses the graph.
    """

    backend = "openvino"

    def __init__(self, model: onnx.ModelProto, precision: str = "auto", threads: int = 0) -> None:
        core = ov.Core()
        self.precision = best_precision(core) if precision == "auto" else precision
        if self.precision not in PRECISIONS:
            raise EngineError(f"OpenVINO engines run in {' or '.join(PRECISIONS)}, not {precision}")
        if self.precision == "bf16" and best_precision(core) != "bf16":
            raise EngineError("this processor does not compute in bf16: use --precision fp32")
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
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
        self._request: ov.InferRequest | None = compiled.create_infer_request()

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See ``engines.base.Engine.infer``."""
        check_feeds(self.inputs, feeds)
        if self._request is None:
            raise EngineError("this engine is closed: build it again")
        ports = {self._ports[name]: np.ascontiguousarray(v) for name, v in feeds.items() if name in self._ports}
        results = self._request.infer(ports, share_inputs=True)
        return {spec.name: results[i] for i, spec in enumerate(self.outputs)}

    def close(self) -> None:
        """Free the compiled graph."""
        self._request = None


def best_precision(core: ov.Core | None = None) -> str:
    """``bf16`` where the processor computes it natively, else ``fp32``."""
    capabilities = (core or ov.Core()).get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "bf16" if "BF16" in capabilities else "fp32"


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_value for dim in tensor.shape.dim)
    return TensorSpec(value.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type), shape)
