"""The backend of ONNX's own evaluator: slow, and a proof of what a new backend takes."""

from collections.abc import Mapping

import onnx
from onnx.reference import ReferenceEvaluator

from engines.backends.registry import EngineRequest
from engines.engine import Array, Engine


class OnnxEngine(Engine):
    """See ``engines.engine.Engine``."""

    backend = "onnx"
    precision = "fp32"
    device = "ONNX's evaluator"

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        self._describe(model)
        self._evaluator = ReferenceEvaluator(model)
        self._answer: list[Array] = []

    def _start(self, place: int, feeds: Mapping[str, Array]) -> None:
        self._answer = self._evaluator.run(None, dict(feeds))

    def _finish(self, place: int) -> dict[str, Array]:
        return {spec.name: value for spec, value in zip(self.outputs, self._answer, strict=True)}

    def _free(self) -> None:
        self._answer = []


def open_engine(request: EngineRequest) -> OnnxEngine:
    """The engine that is asked for."""
    return OnnxEngine(request.graph(None))
