"""On a real GPU (``make test-gpu``): build, certify and run, through the real driver, pycuda and
TensorRT.

None of this has run yet: see docs/tensorrt.md.
"""

import gc
import io

import numpy as np
import pytest
from rich.console import Console

from calib.bench.gpu import bench_gpu
from calib.precision.build import BuildOptions, build_chosen_engine
from engines.backends.cuda import probe_gpu
from engines.backends.openvino import OpenVinoEngine
from engines.backends.tensorrt import TensorRtEngine, load_pycuda, load_tensorrt
from engines.certificate import SUFFIX, engines_dir, read_engine
from engines.choose import build_chosen, open_localizer
from engines.errors import EngineError
from engines.localizer import Localizer
from engines.options import EngineOptions
from tests.virtual_camera import DemoCamera

pytestmark = pytest.mark.gpu


@pytest.fixture
def device(tmp_path, monkeypatch):
    """A GPU on which TensorRT runs."""
    pytest.importorskip("openvino", reason="plans are compared with OpenVINO: pip install openvino")
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path))
    try:
        gpu = probe_gpu()
        load_tensorrt()
        load_pycuda()
    except EngineError as error:
        pytest.skip(str(error))
    return gpu


def certified_engine(precision, batch=1):
    model = build_chosen(EngineOptions(), batch)
    console = Console(file=io.StringIO(), width=300)
    assert build_chosen_engine(
        model, BuildOptions(backend="tensorrt", precision=precision), console
    ).passed
    (path,) = engines_dir().glob(f"*{SUFFIX}")
    return model, read_engine(path)[1]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("batch", [1, 8])
def test_an_engine_is_built_certified_and_chosen(precision, batch):
    certified_engine(precision, batch)
    if batch == 1:
        localizer = open_localizer(EngineOptions(precision=precision), pytest.fail)
        assert localizer.engine.backend == "tensorrt"
        assert localizer.localize([DemoCamera(300).shoot(0)[0]])[0].box_xyxy_px is not None
        localizer.engine.close()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("spin", [True, False])
def test_calls_under_way_keep_apart(capture, spin):
    model, plan = certified_engine("fp32")
    engine, reference = (
        TensorRtEngine(plan, model, "fp32", 3, spin, capture),
        OpenVinoEngine(model, "fp32"),
    )
    camera, prepare = DemoCamera(300), Localizer(reference).prepare
    feeds = [
        {"image_nhwc_bgr": prepare(camera.shoot(50 * i)[0])[None], "wanted_class": np.array([-1])}
        for i in range(3)
    ]
    tickets = [engine.submit(fed) for fed in feeds]
    for fed, ticket in zip(feeds, tickets, strict=True):
        found, exact = engine.collect(ticket), reference.infer(fed)
        assert np.corrcoef(found["map"].ravel(), exact["map"].ravel())[0, 1] > 0.999
        np.testing.assert_allclose(found["box_xyxy"], exact["box_xyxy"], atol=0.01)
    engine.close()


@pytest.mark.usefixtures("device")
def test_it_shares_the_gpu_with_pytorch_in_any_order_of_closing():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no NVIDIA GPU")
    model, plan = certified_engine("fp16")
    feeds = {"image_nhwc_bgr": np.zeros((1, 128, 128, 3), np.uint8), "wanted_class": np.array([-1])}
    first, second = TensorRtEngine(plan, model, "fp16"), TensorRtEngine(plan, model, "fp16")
    values = torch.ones(1000, device="cuda")
    first.infer(feeds)
    first.close()
    assert float(values.sum()) == 1000
    second.infer(feeds)
    del second
    gc.collect()
    assert float((values + torch.ones(1000, device="cuda")).sum()) == 2000


@pytest.mark.parametrize("backend", ["tensorrt", "torch"])
def test_the_bench_in_trtexec_s_words(backend, request):
    if backend == "tensorrt":
        request.getfixturevalue("device")
        certified_engine("fp16")
    elif not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("PyTorch sees no NVIDIA GPU")
    choice = EngineOptions(backend=backend, precision="fp16")
    (times,) = (found := bench_gpu(choice, [], 5.0, Console(quiet=True)))["gpu"]
    assert times["latency_ms"]["p50"] >= times["compute_ms"]["p50"] > 0
    assert times["host_ms"]["p50"] > times["enqueue_ms"]["p50"] > 0
    assert times["throughput_per_s"] > 0
    assert not found["not_available"]
