"""Video: frames in, results out. The public names are loaded when they are asked for;
``docs/api.md`` shows them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

import engines  # noqa: F401  # switches telemetry off before OpenVINO is loaded

if TYPE_CHECKING:
    from realtime.annotate import Look
    from realtime.api import Box, Result, localize
    from realtime.sources.video import SourceOptions

__all__ = ["Box", "Look", "Result", "SourceOptions", "localize"]
MODULES = {"Look": "realtime.annotate", "SourceOptions": "realtime.sources.video"}
"""Where a public name is, if not in ``realtime.api``."""

if not TYPE_CHECKING:  # else a type checker takes every name for one that exists

    def __getattr__(name: str) -> object:
        """Load a public name."""
        if name not in __all__:
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        return getattr(import_module(MODULES.get(name, "realtime.api")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
