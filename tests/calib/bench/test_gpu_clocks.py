"""What is said of a GPU's clocks, on a stand-in for NVIDIA's management library."""

from types import SimpleNamespace

from calib.bench.gpu import REASONS, GpuClocks
from engines.errors import install_packages


class Refused(Exception):
    """NVMLError."""


def library(clocks_mhz, reasons):
    """Answers with the given clocks and reasons, the last again and again."""
    clocks, causes = iter(clocks_mhz), iter(reasons)
    state = {"clock": 0, "cause": 0, "open": 0}

    def clock(_, kind):
        if kind == "sm":
            state["clock"] = next(clocks, state["clock"])
            return state["clock"]
        return 2619

    def cause(_):
        state["cause"] = next(causes, state["cause"])
        return state["cause"]

    constants = {name: 1 << bit for bit, name in enumerate(REASONS)}
    return SimpleNamespace(
        NVMLError=Refused,
        NVML_CLOCK_SM="sm",
        NVML_CLOCK_MEM="memory",
        NVML_TEMPERATURE_GPU=0,
        state=state,
        nvmlInit=lambda: state.update(open=state["open"] + 1),
        nvmlShutdown=lambda: state.update(open=state["open"] - 1),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMaxClockInfo=lambda *_: 1980,
        nvmlDeviceGetClockInfo=clock,
        nvmlDeviceGetTemperature=lambda *_: 61,
        nvmlDeviceGetPowerUsage=lambda _: 412_345,
        nvmlDeviceGetCurrentClocksEventReasons=cause,
        **constants,
    )


def test_clocks_and_what_held_them_back(monkeypatch):
    monkeypatch.setattr("calib.bench.gpu.PERIOD_S", 0.001)
    nvml = library([1980, 1500, 1755], [0, 1 << list(REASONS.values()).index("power cap"), 0])
    with GpuClocks(lambda: nvml) as clocks:
        while len(clocks._samples) < 4:
            pass
    found = clocks.report()
    assert found["sm_mhz"]["least"] == 1500
    assert found["sm_mhz"]["most"] == found["highest_sm_mhz"] == 1980
    assert (found["memory_mhz"]["median"], found["celsius"], found["watts"]) == (2619, 61, 412.3)
    assert found["held_back"] == {"power cap": round(1 / found["samples"], 2)}
    assert nvml.state["open"] == 0


def test_without_a_library_or_a_driver_it_says_so():
    def missing():
        raise ImportError

    def no_driver():
        raise Refused("NVML Shared Library Not Found")

    with GpuClocks(missing) as clocks:
        pass
    assert clocks.report() == {
        "not_available": f"nvidia-ml-py is not installed: {install_packages('nvidia-ml-py')}"
    }
    nvml = library([1], [0])
    nvml.nvmlInit = no_driver
    with GpuClocks(lambda: nvml) as clocks:
        pass
    assert clocks.report() == {"not_available": "NVML Shared Library Not Found"}
