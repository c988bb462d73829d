"""Which built engine may run: TensorRT's, from the cache, only with a certificate that fits; OpenVINO's unless it failed."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import onnx

from engines.base import Engine, EngineError
from engines.build import stamped
from engines.cache import EngineKey, engines_dir, find_engine, graph_digest
from engines.certificate import certificate_path, load_certificate, require, status
from engines.cuda import probe_gpu
from engines.half import to_half
from engines.quantize import is_quantized
from engines.turing import products_as_convolutions

PRECISIONS = ("fp32", "fp16", "int8")
USUAL_PRECISION = "fp16"
TURING = "sm75"


def checked_precision(precision: str) -> str:
    """What TensorRT is to compute in; ``auto`` is ``USUAL_PRECISION``.

    Raises:
        EngineError: it is none of ``PRECISIONS``.
    """
    if precision == "auto":
        return USUAL_PRECISION
    if precision not in PRECISIONS:
        raise EngineError(f"TensorRT engines run in {', '.join(PRECISIONS)}, not {precision}")
    return precision


def typed_graph(model: onnx.ModelProto, precision: str, library: str, sm: str) -> onnx.ModelProto:
    """The graph as TensorRT is to read it: its types say the precision.

    Args:
        model: from ``engines.build.build_graph``, in float32; for int8 with its pairs of QuantizeLinear and DequantizeLinear.
        precision: one of ``PRECISIONS``.
        library: ``tensorrt`` or ``tensorrt_rtx``.
        sm: the GPU's compute capability.

    Raises:
        EngineError: int8 is asked for, and the graph has no scales.
    """
    quantized = is_quantized(model)
    if quantized != (precision == "int8"):
        raise EngineError(f"a graph {'with' if quantized else 'without'} 8-bit scales cannot be built in {precision}")
    typed = to_half(model) if precision == "fp16" else model
    return products_as_convolutions(typed) if library == "tensorrt_rtx" and sm == TURING else typed


def key_of(model: onnx.ModelProto, typed: onnx.ModelProto, library: Any, target: str, precision: str) -> EngineKey:
    """The cache key of a TensorRT engine.

    Args:
        model: the graph, whose metadata tell the network's name.
        typed: the same as TensorRT reads it.
        library: the module.
        target: GPU in words, or compute capability.
        precision: in words.
    """
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    return EngineKey(
        model_name(model), graph_digest(typed), library.__name__, library.__version__, target, precision, batch
    )  # fmt: skip


def model_name(model: onnx.ModelProto) -> str:
    """As ``engines.build.stamp`` wrote it."""
    return str(stamped({p.key: p.value for p in model.metadata_props})["model"])


def subject_of(key: EngineKey, plan: bytes) -> dict[str, str]:
    """What a certificate is about."""
    return {**{name: str(value) for name, value in asdict(key).items()}, "engine": hashlib.sha256(plan).hexdigest()}


def open_certified(graph: Callable[[], onnx.ModelProto], precision: str = "auto") -> Engine:
    """The TensorRT engine that was built and certified for this GPU and this graph.

    Args:
        graph: makes the graph, once it is known that there is something to run it on.
        precision: ``auto`` or one of ``PRECISIONS``.

    Raises:
        EngineError: driver, GPU, library, engine or certificate is missing, or does not fit; the message says what to do.
    """
    from engines.backends.tensorrt import TensorRtEngine, load_pycuda, load_tensorrt

    precision = checked_precision(precision)
    gpu = probe_gpu()
    library = load_tensorrt()
    load_pycuda()
    model = graph()
    typed = typed_graph(model, precision, library.__name__, gpu.sm)
    command = f"sightline build --backend tensorrt --precision {precision}"
    # Built here, or ahead of time for GPUs of this kind and copied into the cache.
    found = find_engine([key_of(model, typed, library, target, precision) for target in (str(gpu), gpu.sm)])
    if found is None:
        raise EngineError(f"no TensorRT engine of this graph is built for {gpu}: run '{command}' with the same model and head")
    key, plan = found
    require(certificate_path(key.path), subject_of(key, plan), command)
    return TensorRtEngine(plan, model, precision)


def openvino_key(model: onnx.ModelProto, engine: Engine) -> EngineKey:
    """What an OpenVINO certificate is about: there is no plan, the graph is compiled when it is opened."""
    import openvino

    version = openvino.__version__.split("-")[0]
    return EngineKey(
        model_name(model), graph_digest(model), "openvino", version, engine.device, engine.precision, engine.inputs[0].shape[0]
    )  # fmt: skip


def refuse_failed(model: onnx.ModelProto, engine: Engine) -> None:
    """Raise EngineError if ``build`` found that this very engine does not give what its reference gives.

    An OpenVINO engine that was never certified may run: its precisions are held against the reference by our own tests.
    """
    if not any(engines_dir().glob("*-openvino-*")):
        return  # the usual case, in which the graph need not be hashed
    key = openvino_key(model, engine)
    path = certificate_path(key.path)
    if status(path, openvino_subject(key)) == "failed":
        reasons = "; ".join(load_certificate(path).failures)
        raise EngineError(f"OpenVINO in {engine.precision} failed its certificate ({reasons}): use --precision fp32")


def openvino_subject(key: EngineKey) -> Mapping[str, str]:
    """See ``subject_of``."""
    return {name: str(value) for name, value in asdict(key).items()}
