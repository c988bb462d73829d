"""The history of a machine's benches."""

import json

import cv2
import pytest

from calib.bench.history import FRAME, check_history, go_on, read_history
from engines.errors import OutputError

MACHINE = "A processor, 2 cores, Linux, Python 3.11.7, OpenVINO 2026.4.1"


def result(scale=1.0):
    rows = [
        {"name": "Sightline bf16", "p50_ms": 8 * scale, "samples_ms": [8 * scale] * 9},
        {"name": "torch", "ratio": 4.0, "ratio_low": 3.8, "ratio_high": 4.3},
    ]
    return {
        "machine": MACHINE,
        "processor_ms_per_frame": {"p50": 12 * scale, "low": 11 * scale, "high": 13 * scale},
        "stability": {"busy_elsewhere": 0.5},
        "engines": [{"engine": "lite0", "peers": rows}],
    }


def test_a_history_grows_and_is_drawn_again(tmp_path):
    path = tmp_path / "here.jsonl"
    check_history(path, MACHINE)
    go_on(path, result())
    check_history(path, MACHINE.replace("3.11.7", "3.13.0"))
    log, picture = go_on(path, result(0.5))
    first, second = read_history(log)
    assert (first["ms"][FRAME], second["ms"][FRAME]) == ([12, 11, 13], [6, 5.5, 6.5])
    assert second["ms"]["lite0: Sightline bf16"] == [4, 4, 4]
    assert second["times_ours"] == {"lite0: torch": [4, 3.8, 4.3]}
    assert min(cv2.imread(str(picture)).shape[:2]) > 300


def test_what_is_no_history_of_this_machine_is_left_alone(tmp_path):
    path = tmp_path / "here.jsonl"
    go_on(path, result())
    with pytest.raises(OutputError, match="is that of another machine"):
        check_history(path, MACHINE.replace("2 cores", "4 cores"))
    with pytest.raises(OutputError, match=r"must end in \.jsonl"):
        check_history(tmp_path / "here.txt", MACHINE)
    other = tmp_path / "log.jsonl"
    other.write_text(json.dumps({"frame": 1}))
    with pytest.raises(OutputError, match="no history of 'sightline bench'"):
        check_history(other, MACHINE)
    other.write_text("words")
    with pytest.raises(OutputError, match="is not JSON"):
        check_history(other, MACHINE)
    (tmp_path / "mine.png").write_bytes((tmp_path / "here.png").read_bytes()[:20])
    with pytest.raises(OutputError, match=r"mine\.png: another file has that name"):
        check_history(tmp_path / "mine.jsonl", MACHINE)
