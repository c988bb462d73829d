"""A record of what Sightline does, for a change that must change nothing.

``python -m tests.behaviour record FILE.json`` before and after;
``python -m tests.behaviour compare A.json B.json`` names each difference. Times, and numbers that
hang on them, are left out. Both records must come from one machine.
"""

import hashlib
import json
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from tests.command_line import command, process
from tests.conftest import DATA

VIDEOS = ("bag.avi", "bottle-detection.mp4", "car-detection.mp4", "one-by-one-person-detection.mp4")
LIMIT_S = "3"
NETWORKS = {"compact": None, "vgg16": "random", "alexnet": "random", "squeezenet": "random"}
METHODS = ("sensitivity", "gestalt", "heuristic")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def without_times(value: Any) -> Any:
    """The same without what was measured by a clock or names a place."""
    if isinstance(value, dict):
        return {
            key: without_times(each)
            for key, each in value.items()
            if not (
                key.endswith(("_ms", "_s", "fps", "_mb")) and key not in ("pts_s", "recovery_s")
            )
            and key
            not in (
                "captured_ns",
                "ms_per_image",
                "stages",
                "output",
                "files",
                "machine",
                "seconds",
                "log",
                "video",
                "report",
                "latency",
            )
        }
    if isinstance(value, list):
        return [without_times(each) for each in value]
    return value


def batch_rows(folder: Path, *options: str) -> dict[str, Any]:
    """The rows of the shared videos through ``batch``, as a digest and a few of them in full."""
    sources = [DATA / "videos" / name for name in VIDEOS]
    result = command("batch", *sources, "--out", folder, "--no-video", "--end", LIMIT_S, *options)
    assert result.returncode == 0, result.stderr
    found = {}
    for source in sources:
        lines = (folder / f"{source.stem}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [without_times(json.loads(line)) for line in lines]
        found[source.name] = {
            "rows": len(rows),
            "digest": digest(json.dumps(rows).encode()),
            "some": [rows[0], rows[len(rows) // 2], rows[-1]],
        }
    return found


def answer_of(*words: Any) -> Any:
    """What a command prints with ``--json``, without times."""
    result = command(*words, "--json")
    assert result.returncode == 0, result.stderr
    return without_times(json.loads(result.stdout))


def graphs(folder: Path) -> dict[str, str]:
    """The digest of the ONNX graph of each network and method."""
    found = {}
    for model, weights in NETWORKS.items():
        for method in METHODS:
            out = folder / f"{model}_{method}.onnx"
            options = ["--weights", weights] if weights else []
            head = ["--head", "none"] if weights else []
            result = command(
                "build", "--model", model, "--method", method, *options, *head, "--out", out
            )
            assert result.returncode == 0, result.stderr
            found[f"{model} {method}"] = digest(out.read_bytes())
    return found


def shape_of(value: Any) -> Any:
    """Keys and types, without values."""
    if isinstance(value, dict):
        return {key: shape_of(each) for key, each in sorted(value.items())}
    if isinstance(value, list):
        return [shape_of(value[0])] if value else []
    return type(value).__name__


def page_state() -> Any:
    """The shape of what the page asks for while a run goes on."""
    from threading import Thread

    port = "18765"
    run = Thread(
        target=process, args=("stream", "demo:9000", "--web", port, "--no-window", "--seconds", "8")
    )
    run.start()
    state: Any = None
    for _ in range(60):
        time.sleep(0.25)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/state", timeout=5) as answer:
                state = json.load(answer)
        except OSError:
            continue
        if state.get("sources") and "picture" in json.dumps(state):
            break
    run.join()
    return shape_of(state)


def record() -> dict[str, Any]:
    """All of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command(
            "fit",
            DATA / "raccoon" / "train_labels.csv",
            "--images",
            DATA / "raccoon" / "images.tar",
            "--out",
            folder / "head.safetensors",
        )
        return {
            "fit": digest((folder / "head.safetensors").read_bytes()),
            "graphs": graphs(folder),
            "batch": batch_rows(folder / "whole"),
            "batch --follow": batch_rows(folder / "follow", "--follow"),
            "evaluate animals": answer_of("evaluate", DATA / "animal_pose_voc" / "test.csv"),
            "evaluate davis --follow": answer_of(
                "evaluate", DATA / "davis", "--follow", "--limit", "20"
            ),
            "state": page_state(),
        }


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two records differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            line
            for key in {**a, **b}
            for line in differences(a.get(key), b.get(key), f"{where}/{key}")
        ]
    return [] if a == b else [f"{where}: {a} | {b}"]


if __name__ == "__main__":
    if sys.argv[1] == "record":
        Path(sys.argv[2]).write_text(json.dumps(record(), indent=1), encoding="utf-8")
    else:
        one, other = (json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[2:4])
        found = differences(one, other)
        print("\n".join(found) or "no difference")
        sys.exit(bool(found))
