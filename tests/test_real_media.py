"""Every shared video and sequence through ``batch``: frame counts and timestamps are kept. Minutes
long.
"""

import json

import pytest

from tests.command_line import process
from tests.realtime.media import timestamps_s

FRAMES = {
    "videos/bottle-detection.mp4": 1189,
    "videos/car-detection.mp4": 377,
    "videos/one-by-one-person-detection.mp4": 1394,
    "videos/bag.avi": 196,
    "otb/MotorRolling.tar": 164,
    "davis/blackswan.tar": 50,
    "davis/camel.tar": 90,
    "davis/car-roundabout.tar": 75,
    "davis/dance-twirl.tar": 90,
    "davis/dog.tar": 60,
    "davis/horsejump-high.tar": 50,
    "davis/kite-surf.tar": 50,
    "davis/motocross-jump.tar": 40,
    "davis/scooter-black.tar": 43,
}


@pytest.mark.long
@pytest.mark.parametrize("name", FRAMES)
def test_batch_keeps_frames_and_timestamps(data, tmp_path, name):
    result = process("batch", data / name, "--out", tmp_path, "--json", timeout=250)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["frames"] == FRAMES[name]
    stem = name.split("/")[1].rsplit(".", 1)[0]
    written = timestamps_s(tmp_path / f"{stem}.mp4")
    rows = [json.loads(line) for line in (tmp_path / f"{stem}.jsonl").read_text().splitlines()]
    assert [row["frame"] for row in rows] == list(range(FRAMES[name]))
    assert len(written) == FRAMES[name]
    source = (
        [i / 24 for i in range(FRAMES[name])]
        if name.endswith(".tar")
        else timestamps_s(data / name)
    )
    assert written == pytest.approx([t - source[0] for t in source], abs=1e-3)
    assert [row["pts_s"] for row in rows] == pytest.approx(
        [t - source[0] for t in source], abs=1e-3
    )
