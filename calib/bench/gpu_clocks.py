"""What the GPU's clocks did meanwhile, and whether anything held them back: NVIDIA's management library, asked now and then."""

import threading
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from engines.install import install_packages

PERIOD_S = 0.2
REASONS = {
    "nvmlClocksEventReasonGpuIdle": "idle",
    "nvmlClocksEventReasonApplicationsClocksSetting": "clocks set by an application",
    "nvmlClocksEventReasonSwPowerCap": "power cap",
    "nvmlClocksEventReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonSyncBoost": "sync boost",
    "nvmlClocksEventReasonSwThermalSlowdown": "heat (driver)",
    "nvmlClocksEventReasonHwThermalSlowdown": "heat (hardware)",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "power brake",
    "nvmlClocksEventReasonDisplayClockSetting": "display clock",
}
"""Why a GPU runs below its highest clock: constant of the library to words."""


class GpuClocks:
    """Watches GPU 0 from a thread of its own, from entering to leaving.

    Args:
        load: gives the management library (package nvidia-ml-py); for tests.
    """

    def __init__(self, load: Callable[[], ModuleType] | None = None) -> None:
        self._load = load or _pynvml
        self._samples: list[tuple[int, int, int, int, int]] = []
        self._stop = threading.Event()
        self._why_not: str | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "GpuClocks":
        try:
            self._library = self._load()
        except ImportError:
            self._why_not = f"nvidia-ml-py is not installed: {install_packages('nvidia-ml-py')}"
            return self
        try:
            self._library.nvmlInit()
            self._gpu = self._library.nvmlDeviceGetHandleByIndex(0)
            self._highest_mhz = self._library.nvmlDeviceGetMaxClockInfo(self._gpu, self._library.NVML_CLOCK_SM)
            self._sample()
        except self._library.NVMLError as error:
            self._why_not = str(error)
            return self
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._library.nvmlShutdown()

    def report(self) -> Mapping[str, Any]:
        """``sm_mhz``, ``memory_mhz`` (least, median, most), ``highest_sm_mhz``, ``celsius``, ``watts`` (most), ``held_back``.

        ``held_back`` maps a reason in words to the share of samples in which it was there. ``not_available`` alone where the
        library is missing or does not answer.
        """
        if self._why_not is not None:
            return {"not_available": self._why_not}
        sm_mhz, memory_mhz, celsius, milliwatts, reasons = np.array(self._samples, np.int64).T
        held_back = {words: float(np.mean(reasons & getattr(self._library, name) != 0)) for name, words in REASONS.items()}
        return {
            "sm_mhz": _spread(sm_mhz), "memory_mhz": _spread(memory_mhz), "highest_sm_mhz": self._highest_mhz,
            "celsius": int(celsius.max()), "watts": round(float(milliwatts.max()) / 1e3, 1),
            "held_back": {words: round(share, 2) for words, share in held_back.items() if share},
            "samples": len(self._samples),
        }  # fmt: skip

    def _watch(self) -> None:
        while not self._stop.wait(PERIOD_S):
            try:
                self._sample()
            except self._library.NVMLError:
                return  # what was seen before still holds

    def _sample(self) -> None:
        nvml, gpu = self._library, self._gpu
        self._samples.append((
            nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM), nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
            nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU), nvml.nvmlDeviceGetPowerUsage(gpu),
            nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu),
        ))  # fmt: skip


def _spread(values: Any) -> dict[str, int]:
    return {"least": int(values.min()), "median": int(np.median(values)), "most": int(values.max())}


def _pynvml() -> ModuleType:
    import pynvml  # the optional package nvidia-ml-py

    return pynvml  # type: ignore[no-any-return]
