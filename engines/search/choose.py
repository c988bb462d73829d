"""Opens the search that ``--method`` names. A search takes several engine calls an image."""

import onnx

from engines.engine import Engine
from engines.errors import EngineError, ModelError
from engines.head import Head
from engines.networks.registry import Classifier
from engines.search.beam import BeamEngine, beam_settings
from engines.search.compound import Compile, CompoundEngine
from engines.search.crops import CropScorer, CropsEngine, CropSettings
from engines.search.dam import DamEngine, dam_settings


def search_engine(
    method: str,
    classifier: Classifier,
    compiled: Compile,
    objects: int = 1,
    layer: str | None = None,
    readers: tuple[Head, CropScorer] | None = None,
) -> CompoundEngine:
    """The engine of a method; with ``readers`` the beam searches crops of the image, see
    ``engines.search.crops``.

    Raises:
        ModelError, EngineError: see ``DamEngine``, ``BeamEngine`` and ``CropsEngine``.
    """
    if readers:
        return CropsEngine(classifier, *readers, CropSettings(objects=objects), compiled)
    if method == "dam":
        return DamEngine(classifier, dam_settings(classifier.network, objects, layer), compiled)
    return BeamEngine(classifier, beam_settings(objects, layer), compiled)


def open_search(
    method: str,
    classifier: Classifier,
    *,
    backend: str = "auto",
    precision: str = "auto",
    threads: int = 0,
    streams: int = 1,
    objects: int = 1,
    layer: str | None = None,
    readers: tuple[Head, CropScorer] | None = None,
) -> Engine:
    """Compile a method's graphs on OpenVINO, which is the only backend that runs them; the
    arguments are those of ``EngineOptions``.

    Raises:
        EngineError: another backend is asked for, or the precision cannot be had.
        ModelError: int8 is asked for, or a graph cannot be built.
    """
    if backend not in ("auto", "openvino"):
        raise EngineError(
            f"method {method} asks several graphs in turn, on OpenVINO only: use backend openvino",
            option=("method", "backend"),
        )
    if precision == "int8":
        raise ModelError(
            f"method {method} is not calibrated for int8: use bf16 or fp32",
            option=("method", "precision"),
        )
    from engines.backends.openvino import OpenVinoEngine  # only where it is used

    def compiled(graph: onnx.ModelProto) -> Engine:
        return OpenVinoEngine(graph, precision, threads, streams)

    return search_engine(method, classifier, compiled, objects, layer, readers)
