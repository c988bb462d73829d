"""No command connects to anything that the user did not name, and none leaves an identifier
behind.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import ROOT
from tests.realtime.media import write_images, write_video

WATCH = """
import os, sys

def watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "http.client.connect", "urllib.Request"):
        told = arguments
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg") and isinstance(arguments[1], tuple):
        told = arguments[1]
    else:
        return
    with open(os.environ["WATCHED"], "a") as file:
        print(event, told, file=file)

sys.addaudithook(watch)
"""
"""Runs in every Python process, child processes too, before anything else."""
SEVERAL = """
import sys, cli
for line in sys.stdin.read().splitlines():
    sys.argv = ["sightline", *line.split("\\t")]
    try:
        cli.main()
    except SystemExit as end:
        assert end.code in (None, 0, 1), line
"""


@pytest.fixture
def watched(tmp_path):
    """An environment in which Python notes every connection, with a home of its own; what stops
    reports in CI is taken out.
    """
    for name in ("watch", "home", "cache"):
        (tmp_path / name).mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH)
    kept = {
        key: value
        for key, value in os.environ.items()
        if not re.match(r"CI$|ORT_|RAY_|GITHUB_|TF_BUILD|PYTEST", key)
    }
    return kept | {
        "PYTHONPATH": f"{tmp_path / 'watch'}:{ROOT}",
        "WATCHED": str(tmp_path / "watched.txt"),
        "HOME": str(tmp_path / "home"),
        "SIGHTLINE_CACHE": str(tmp_path / "cache"),
        "MPLCONFIGDIR": str(tmp_path / "cache"),
        "XDG_CACHE_HOME": str(tmp_path / "home"),
    }


def run(watched, *arguments, standard_input=None):
    return subprocess.run(
        arguments,
        input=standard_input,
        env=watched,
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        check=True,
    )


def assert_nothing_was_sent(watched):
    seen = Path(watched["WATCHED"])
    assert not seen.exists(), seen.read_text()
    assert list(Path(watched["HOME"]).rglob("*")) == []


def test_the_watch_sees_what_is_sent(watched):
    code = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'', ('127.0.0.1', 9))"
    run(watched, sys.executable, "-c", code)
    assert "socket.sendto ('127.0.0.1', 9)" in Path(watched["WATCHED"]).read_text()


def test_no_command_sends_anything(watched, tmp_path):
    write_video(tmp_path / "clip.mp4", frames=3)
    write_images(tmp_path / "photos", 20)
    rows = [f"{path.name},cat,4,30,28,54" for path in sorted((tmp_path / "photos").iterdir())]
    (tmp_path / "photos.csv").write_text("\n".join(["file,class,x0,y0,x1,y1", *rows]) + "\n")
    lines = [
        ["--help"],
        ["doctor"],
        ["demo", "--frames", "2", "--out", tmp_path / "demo"],
        ["batch", tmp_path / "clip.mp4", "--out", tmp_path / "batch"],
        ["stream", "demo:5", "--no-window", "--log", tmp_path / "log.jsonl"],
        ["fit", tmp_path / "photos.csv", "--out", tmp_path / "head.safetensors", "--size", "64"],
        ["evaluate", tmp_path / "photos.csv", "--size", "64"],
        ["build", "--out", tmp_path / "map.onnx"],
    ]
    given = "\n".join("\t".join(map(str, line)) for line in lines)
    run(watched, sys.executable, "-c", SEVERAL, standard_input=given)
    assert_nothing_was_sent(watched)


@pytest.mark.parametrize(
    "module",
    ["engines", "realtime.doctor", "calib.bench.machine", "realtime.batch.cluster.worker", "cli"],
)
def test_no_import_of_ours_lets_openvino_send(watched, module):
    code = f"import {module}, openvino.tools.ovc as ovc; assert 'stub' in type(ovc.telemetry).__module__"
    run(watched, sys.executable, "-c", code)
    assert_nothing_was_sent(watched)


def test_onnx_runtime_sends_nothing(watched):
    """It sends from native code, where Python sees nothing; without being told not to, it leaves an
    identifier at once.
    """
    pytest.importorskip("onnxruntime")
    code = (
        "import engines, numpy as np, onnx, onnxruntime\n"
        "from engines.graph import FLOAT\n"
        "node = onnx.helper.make_node('Neg', ['x'], ['y'])\n"
        "values = [onnx.helper.make_tensor_value_info(name, FLOAT, [1]) for name in 'xy']\n"
        "graph = onnx.helper.make_graph([node], 'g', values[:1], values[1:])\n"
        "model = onnx.helper.make_model(graph, ir_version=9, opset_imports=[onnx.helper.make_opsetid('', 17)])\n"
        "session = onnxruntime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])\n"
        "assert session.run(None, {'x': np.ones(1, np.float32)})[0] == -1\n"
    )
    run(watched, sys.executable, "-c", code)
    assert_nothing_was_sent(watched)


def test_the_system_sees_no_connection_either(watched, tmp_path):
    """Native code counts too: every system call that could send is traced."""
    strace = shutil.which("strace")
    if (
        strace is None
        or subprocess.run(
            [strace, "-qq", "-o", "/dev/null", "true"], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("strace is not installed, or not allowed here")
    calls = [
        "-f",
        "-qq",
        "-e",
        "trace=connect,sendto,sendmsg,sendmmsg",
        "-o",
        str(tmp_path / "calls"),
    ]
    run(
        watched,
        strace,
        *calls,
        sys.executable,
        str(ROOT / "cli.py"),
        "demo",
        "--frames",
        "2",
        "--out",
        str(tmp_path / "out"),
    )
    sent = [
        line
        for line in (tmp_path / "calls").read_text(errors="replace").splitlines()
        if "AF_INET" in line
    ]
    assert sent == []
    assert_nothing_was_sent(watched)


@pytest.mark.long
def test_ray_on_this_machine_asks_no_cloud_provider_where_it_runs(watched, tmp_path):
    pytest.importorskip("ray")
    write_video(tmp_path / "clip.mp4", frames=3)
    batch = [
        "batch",
        tmp_path / "clip.mp4",
        "--out",
        tmp_path / "out",
        "--ray",
        "local",
        "--threads",
        "1",
    ]
    run(watched, sys.executable, ROOT / "cli.py", *batch)
    seen = Path(watched["WATCHED"]).read_text()
    assert not re.search(r"metadata|169\.254|urllib|https?:", seen), seen
