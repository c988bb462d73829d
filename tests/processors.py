"""What tests need to know of the processor: its instruction sets, and the caps under which they are
run.
"""

import platform
from pathlib import Path

import pytest

from engines.backends.openvino import low_cap

CAPS = ("AVX2", "AVX512_CORE_VNNI", "DEFAULT")
"""Values of ``ONEDNN_MAX_CPU_ISA``; ``make test-caps`` repeats the engine tests under the first
two.
"""
CAP_FLAGS = {"AVX2": "avx2", "AVX512_CORE": "avx512f", "AVX512_CORE_VNNI": "avx512_vnni"}


def processor_flags() -> set[str]:
    """The instruction sets in the words of Linux; empty where that is not known."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


def has_set_of(cap: str) -> bool:
    """Whether this processor has what a cap allows: without it, the cap changes nothing."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and CAP_FLAGS.get(cap, "avx2") in processor_flags()
    )


NORMALIZES = pytest.mark.skipif(
    low_cap().partition("=")[2] in ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2"),
    reason="engines refuse normalizations under this cap: OpenVINO would crash in them",
)

X86 = pytest.mark.skipif(
    not has_set_of("AVX2"),
    reason="caps on oneDNN are about x86 processors with AVX2, and need Linux",
)
