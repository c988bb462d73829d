"""Engines and networks. Importing any of Sightline's packages comes through here first.

Some packages that Sightline uses report their use to their makers unless they are told not to. All
of them are told here, before any of them is loaded; processes that are started later inherit it.

- OpenVINO loads ``openvino_telemetry``, which sends an event at every import and writes an
  identifier into the home folder. Marked as absent, it is replaced by OpenVINO's own stub, which
  sends and writes nothing.
- ONNX Runtime (only ``bench`` uses it) sends from native code since version 1.29, and keeps an
  identifier.
- Ray (only ``--ray`` uses it) reports each cluster that it starts.

OpenCV reads its limit when it is loaded.

The public names are loaded when they are asked for, so that importing a package loads no library;
``docs/api.md`` shows them.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # Python's own mark of a module that must not be loaded
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

MOST_IMAGE_PIXELS = 2**28
"""Of an image that is decoded: sensors on sale have up to 200 million. As BGR it takes 0.8 GB, and
a drawing on it as much.
"""
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MOST_IMAGE_PIXELS))

if TYPE_CHECKING:
    from engines.backends.registry import Backend, EngineRequest, register_backend
    from engines.choose import open_localizer
    from engines.engine import Engine
    from engines.errors import (
        DownloadError,
        EngineError,
        InputError,
        ModelError,
        OutputError,
        SightlineError,
        SourceError,
    )
    from engines.graph import Graph
    from engines.localizer import Detection, Localization, Localizer
    from engines.maps import Method, register_method
    from engines.networks.network import Forward, Network
    from engines.networks.registry import register_network
    from engines.options import EngineOptions

__all__ = [
    "Backend",
    "Detection",
    "DownloadError",
    "Engine",
    "EngineError",
    "EngineOptions",
    "EngineRequest",
    "Forward",
    "Graph",
    "InputError",
    "Localization",
    "Localizer",
    "Method",
    "ModelError",
    "Network",
    "OutputError",
    "SightlineError",
    "SourceError",
    "open_localizer",
    "register_backend",
    "register_method",
    "register_network",
]
_MODULES = {
    "open_localizer": "engines.choose",
    "EngineOptions": "engines.options",
    "Localizer": "engines.localizer",
    "Localization": "engines.localizer",
    "Detection": "engines.localizer",
    "register_network": "engines.networks.registry",
    "Network": "engines.networks.network",
    "Forward": "engines.networks.network",
    "Graph": "engines.graph",
    "register_method": "engines.maps",
    "Method": "engines.maps",
    "register_backend": "engines.backends.registry",
    "Backend": "engines.backends.registry",
    "EngineRequest": "engines.backends.registry",
    "Engine": "engines.engine",
}
"""Where a public name is defined; all others are errors."""

if not TYPE_CHECKING:  # else a type checker takes every name for one that exists

    def __getattr__(name: str) -> object:
        """Load a public name."""
        if name not in __all__:
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        return getattr(import_module(_MODULES.get(name, "engines.errors")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
