"""Engines and networks. Importing any of Sightline's packages comes through here first.

Some packages that Sightline uses report their use to their makers unless they are told not to. All of them are told here,
before any of them is loaded; processes that are started later inherit it.

- OpenVINO loads ``openvino_telemetry``, which sends an event at every import and writes an identifier into the home folder.
  Marked as absent, it is replaced by OpenVINO's own stub, which sends and writes nothing.
- ONNX Runtime (only ``bench`` uses it) sends from native code since version 1.29, and keeps an identifier.
- Ray (only ``--ray`` uses it) reports each cluster that it starts.

OpenCV reads its limit when it is loaded.
"""

import os
import sys

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # Python's own mark of a module that must not be loaded
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

MOST_IMAGE_PIXELS = 2**28
"""Of an image that is decoded: sensors on sale have up to 200 million. As BGR it takes 0.8 GB, and a drawing on it as much."""
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MOST_IMAGE_PIXELS))
