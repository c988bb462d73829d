"""Processors with fewer instructions, for which caps on oneDNN's stand in: the kernels that run,
and what is said of it.
"""

import json
import os
import subprocess
import sys

import pytest

from engines.backends import openvino as backend
from engines.backends.openvino import OpenVinoEngine, best_precision, has_vnni, losses, low_cap
from engines.errors import EngineError
from engines.graph import FLOAT, Graph
from tests.command_line import ROOT
from tests.processors import CAPS, X86, has_set_of, processor_flags

EVERY_ENGINE = """
import json
from engines.choose import open_localizer
from engines.options import EngineOptions

found = {}
for precision in ("auto", "fp32", "bf16", "int8"):
    told = []
    engine = open_localizer(EngineOptions(backend="openvino", precision=precision), told.append).engine
    kernels = sorted({kernel for layer, kernel in engine.kernels() if layer == "Convolution"})
    found[precision] = {"runs": engine.precision, "kernels": kernels, "told": told, "device": engine.device}
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=CAPS)
def capped(request):
    """(cap, what each precision runs in under it): in a process of its own, since oneDNN reads the
    cap once.
    """
    if not has_set_of(request.param):
        pytest.skip(
            f"this processor has not what {request.param} allows: the cap would change nothing"
        )
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "ONEDNN_MAX_CPU_ISA": request.param,
        "DNNL_MAX_CPU_ISA": "",
    }
    line = [sys.executable, "-c", EVERY_ENGINE]
    ended = subprocess.run(
        line, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return request.param, json.loads(ended.stdout)


def test_the_cap_decides_which_kernels_compute_the_convolutions(capped):
    """Convolutions take nearly all the time. What oneDNN does not compute (a few small layers) has
    no cap.
    """
    cap, found = capped
    sets = {"AVX2": "avx2", "AVX512_CORE_VNNI": "avx512"}
    for row in found.values():
        assert row["kernels"]
        if cap in sets:
            assert all(f"_{sets[cap]}_" in kernel for kernel in row["kernels"]), row
            assert not any("amx" in kernel for kernel in row["kernels"]), row
        elif "avx512f" in processor_flags():
            assert all("avx512" in kernel for kernel in row["kernels"]), row
    assert any(kernel.endswith("I8") for kernel in found["int8"]["kernels"])
    assert all(kernel.endswith("f32") for kernel in found["fp32"]["kernels"])


def test_what_the_cap_takes_away_is_computed_in_fp32_and_told_in_one_line(capped):
    cap, found = capped
    bf16 = cap == "DEFAULT" and {"avx512_bf16", "amx_bf16"} & processor_flags()
    vnni = cap != "AVX2" and "avx512_vnni" in processor_flags()
    assert found["fp32"]["runs"] == "fp32"
    assert found["bf16"]["runs"] == ("bf16" if bf16 else "fp32")
    assert any(kernel.endswith("bf16") for kernel in found["bf16"]["kernels"]) == bool(bf16)
    assert found["int8"]["runs"] == "int8"
    assert found["auto"]["runs"] == ("int8" if vnni else "fp32")
    words = {
        "bf16": [] if bf16 else ["bf16 instructions: runs in fp32 instead"],
        "int8": [] if vnni else ["VNNI instructions: int8 rounds its weights once more"],
        "auto": [] if vnni else ["bf16 and VNNI instructions: runs in fp32"],
    }
    for precision, expected in words.items():
        notify = [line for line in found[precision]["told"] if "TensorRT" not in line]
        assert len(notify) == len(expected), notify
        assert all(word in line for word, line in zip(expected, notify, strict=True))
    assert ("capped by" in found["fp32"]["device"]) == (cap != "DEFAULT")


@pytest.mark.parametrize(
    ("onednn", "dnnl", "cap"),
    [
        ("", "", ""),
        ("AVX2", "", "ONEDNN_MAX_CPU_ISA=AVX2"),
        ("avx2_vnni", "", "ONEDNN_MAX_CPU_ISA=AVX2_VNNI"),
        ("", "AVX512_CORE", "DNNL_MAX_CPU_ISA=AVX512_CORE"),
        ("AVX512_CORE_AMX", "AVX2", ""),
        ("nonsense", "AVX2", ""),
        ("DEFAULT", "", ""),
    ],
)
def test_the_cap_is_read_as_onednn_reads_it(onednn, dnnl, cap, monkeypatch):
    """The first variable that is not empty, in any case of letters; words that it does not know are
    no cap.
    """
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", onednn)
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", dnnl)
    assert low_cap() == cap
    if cap:
        assert best_precision() == "fp32"


@pytest.mark.parametrize(
    ("flags", "cap", "vnni"),
    [
        ({"avx2"}, "", False),
        ({"avx2", "avx_vnni"}, "", True),
        ({"avx2", "avx_vnni"}, "AVX2", False),
        ({"avx2", "avx_vnni"}, "AVX2_VNNI", True),
        ({"avx512f", "avx512_vnni"}, "AVX2_VNNI", False),
        ({"avx512f", "avx512_vnni"}, "AVX512_CORE", False),
        ({"avx512f", "avx512_vnni"}, "AVX512_CORE_VNNI", True),
    ],
)
def test_vnni_is_what_processor_and_cap_have_in_common(flags, cap, vnni, monkeypatch):
    monkeypatch.setattr(backend, "_processor_flags", lambda: flags)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "")
    assert has_vnni() == vnni
    assert bool(losses("int8", "int8")) != vnni


def test_what_is_not_known_of_a_processor_is_not_held_against_it(monkeypatch, tmp_path):
    """ARM's ``/proc/cpuinfo`` has no line of flags, and other systems have no such file."""
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd asimddp\n")
    for path in (tmp_path / "cpuinfo", tmp_path / "missing"):
        monkeypatch.setattr(backend, "CPUINFO", path)
        assert backend._processor_flags() == backend.VNNI_FLAGS


@X86
def test_a_closed_engine_has_no_kernels():
    graph = Graph()
    x = graph.input("x", FLOAT, (1, 4, 8, 8))
    graph.output(graph.add("Relu", x), "y")
    engine = OpenVinoEngine(graph.model(), "fp32")
    assert engine.kernels()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.kernels()


NORMALIZED = """
import numpy as np
from engines.backends.openvino import OpenVinoEngine
from engines.errors import EngineError
from engines.graph import FLOAT, Graph

graph = Graph()
x = graph.input("x", FLOAT, (1, 3, 5))
ones = graph.constant(np.ones(5))
graph.output(graph.add("LayerNormalization", x, ones, ones), "y")
try:
    values = np.arange(15, dtype=np.float32).reshape(1, 3, 5)
    print(OpenVinoEngine(graph.model(), "fp32").infer({"x": values})["y"].shape)
except EngineError as error:
    print(error)
"""


@X86
def test_normalizations_under_a_cap_run_or_are_refused():
    """In a process of its own: what is neither is a segmentation fault."""
    found = subprocess.run(
        [sys.executable, "-c", NORMALIZED],
        cwd=ROOT,
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("(1, 3, 5)") or "AVX2 caps" in found.stdout
