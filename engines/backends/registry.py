"""The backends, one record each: what each is called, what it computes in, and how it is opened."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pkgutil import resolve_name

import onnx

from engines.build import AnyHead, build_graph
from engines.engine import Engine
from engines.errors import EngineError, install_extra
from engines.int8 import Quantization
from engines.maps import MapSpec
from engines.networks.registry import Classifier

AUTO = "auto"


@dataclass(frozen=True)
class EngineRequest:
    """What a backend is asked to open.

    Attributes:
        classifier, spec, head, batch: as for ``engines.build.build_graph``; a batch of 0 is
            ``Backend.images``.
        precision: ``auto``, or what the engine is to compute in.
        threads: processor threads; 0 for all.
        streams: 1 for the soonest answer, 0 for the most answers a second.
        calibration: finds the calibration for int8 that fits, or None; raises ModelError where
            int8 is asked for and there is none.
        calibration_named: whether the user named a file of it.
    """

    classifier: Classifier
    spec: MapSpec
    head: AnyHead | None
    batch: int
    precision: str
    threads: int
    streams: int
    calibration: Callable[[], Quantization | None]
    calibration_named: bool

    def graph(self, quantization: Quantization | None) -> onnx.ModelProto:
        """The graph that is asked for, in 8 bits where a calibration is given.

        Raises:
            ModelError: see ``build_graph``.
        """
        return build_graph(
            self.classifier, self.spec, self.head, batch=self.batch, quantization=quantization
        )


Open = Callable[[EngineRequest], Engine]


@dataclass(frozen=True)
class Backend:
    """The record of a backend. Its module, and the library, are imported when it is opened.

    Attributes:
        name: what ``--backend`` takes.
        label: what people call it.
        open: opens an engine, or ``module:function`` of what does. It raises EngineError where
            library, machine or precision do not serve.
        precisions: what it can compute in, in words for the help of ``--precision``.
        auto_rank: ``auto`` tries the backends that have one, the smallest first, and takes the
            first that opens. None: only who names it gets it.
        auto_words: when ``auto`` takes it, for the help.
        needs_gpu: whether it computes on a GPU, where there is one.
        extra: of pyproject.toml, with which its library is installed.
        otherwise: what else to do where it cannot be opened; empty where the error says it.
        images: so many in one call give the most answers a second, of what runs everywhere.
        native_precisions: ``module:function`` that gives a latency budget the precisions to go
            through, see ``engines.backends.openvino.native_precisions``. Empty: fp32 alone.
    """

    name: str
    label: str
    open: str | Open
    precisions: tuple[str, ...]
    auto_rank: int | None = None
    auto_words: str = ""
    needs_gpu: bool = False
    extra: str = ""
    otherwise: str = ""
    images: int = 1
    native_precisions: str = ""

    def opened(self, request: EngineRequest) -> Engine:
        """Open an engine.

        Raises:
            EngineError: the library is missing, or the engine cannot be had.
            ModelError: the graph cannot be built.
        """
        try:
            open_ = resolve_name(self.open) if isinstance(self.open, str) else self.open
        except ImportError as error:
            if not self.extra:
                raise
            raise EngineError(
                f"backend {self.name} needs {self.label}: {install_extra(self.extra)}, or use"
                " openvino",
                option="backend",
            ) from error
        engine: Engine = open_(replace(request, batch=request.batch or self.images))
        return engine


_OPENVINO = "engines.backends.openvino"
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "openvino",
            "OpenVINO",
            f"{_OPENVINO}:open_engine",
            ("fp32", "bf16", "int8"),
            auto_rank=2,
            images=2,  # its weights are read once for both: a tenth less time for each (measured)
            native_precisions=f"{_OPENVINO}:native_precisions",
        ),
        Backend(
            "tensorrt",
            "TensorRT",
            "engines.backends.tensorrt:open_engine",
            ("fp32", "fp16", "int8"),
            auto_rank=1,
            auto_words="where it is built and certified",
            needs_gpu=True,
            otherwise="backend openvino needs no GPU",
            native_precisions=f"{_OPENVINO}:native_precisions",
        ),
        Backend(
            "torch",
            "PyTorch",
            "engines.backends.torch_reference:open_engine",
            ("fp32", "bf16", "fp16"),
            needs_gpu=True,
            extra="torch",
        ),
    )
}
"""The record of each backend by its name. ``register_backend`` adds one from outside."""


def register_backend(backend: Backend) -> None:
    """Make a backend known to every command under its name.

    Raises:
        EngineError: there is one of that name.
    """
    if backend.name in (AUTO, *BACKENDS):
        raise EngineError(f"there is a backend '{backend.name}': choose another name")
    BACKENDS[backend.name] = backend


def candidates(name: str) -> list[Backend]:
    """The backends that ``--backend`` names, in the order in which they are tried.

    Raises:
        EngineError: there is no such backend.
    """
    if name == AUTO:
        ranks = {rank: each for each in BACKENDS.values() if (rank := each.auto_rank) is not None}
        return [ranks[rank] for rank in sorted(ranks)]
    if name not in BACKENDS:
        raise EngineError(
            f"unknown backend '{name}': use {', '.join([AUTO, *BACKENDS])}", option="backend"
        )
    return [BACKENDS[name]]


def label_of(name: str) -> str:
    """What people call a backend; the name itself where it is not known."""
    return BACKENDS[name].label if name in BACKENDS else name


def backends_in_words() -> str:
    """What ``--backend`` takes, for its help."""
    tried = [f"{each.label} {each.auto_words}".strip() for each in candidates(AUTO)]
    *names, last = BACKENDS
    return f"{AUTO} ({', else '.join(tried)}), {', '.join(names)} or {last}."


def precisions_in_words() -> str:
    """What ``--precision`` takes, for its help, and which backends compute in it."""
    found: dict[str, list[str]] = {}
    for name, backend in BACKENDS.items():
        for precision in backend.precisions:
            found.setdefault(precision, []).append(name)
    words = [
        precision if len(names) == len(BACKENDS) else f"{precision} ({', '.join(names)})"
        for precision, names in found.items()
    ]
    return f"{AUTO}, {', '.join(words[:-1])} or {words[-1]}. int8 needs a calibration."


def gpu_backends() -> tuple[str, ...]:
    """Names of the backends that compute on a GPU."""
    return tuple(name for name, backend in BACKENDS.items() if backend.needs_gpu)
