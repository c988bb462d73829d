"""Secrets of addresses come out nowhere: not printed, not in a file or its name, not on the page or
in the figures.
"""

import socket
import threading
import time
import urllib.request
from urllib.parse import quote

from tests.command_line import command, process
from tests.realtime.media import web_server, write_video

SECRETS = ("hunter2", "hunter3", "hunter4", "hunter5")
DEAD = [
    "http://127.0.0.1:9/cgi?user=admin&pwd=hunter2",
    "http://127.0.0.1:9/user=admin&password=hunter3&channel=1",
    "rtsp://admin:hunter4@127.0.0.1:9/live",
    f"http://127.0.0.1:9/?to={quote('rtsp://a:hunter5@camera/1', safe='')}",
]


def assert_no_secret(folder, *texts):
    for text in texts:
        assert not [secret for secret in SECRETS if secret in text], text
    for path in folder.rglob("*"):
        assert not [secret for secret in SECRETS if secret in path.name], path
        if path.is_file():
            content = path.read_bytes()
            assert not [secret for secret in SECRETS if secret.encode() in content], path


def test_addresses_that_do_not_answer(tmp_path):
    logs = ("--log", tmp_path / "l.jsonl", "--trace", tmp_path / "t.json")
    for run in (
        command("stream", *DEAD, "--no-window", *logs, "--json"),
        command("stream", *DEAD, "demo:9", "--no-window", *logs, "--seconds", "1", "--json"),
        command("batch", *DEAD, "demo:2", "--out", tmp_path / "out", "--json"),
        command("batch", *DEAD, "--out", tmp_path / "out2"),
    ):
        assert_no_secret(tmp_path, run.stdout, run.stderr)
        assert "***" in run.stderr
    assert (tmp_path / "out" / "summary.json").exists()


def test_a_camera_that_answers(tmp_path):
    write_video(tmp_path / "user=admin&password=hunter3.mp4", 50)
    (made := tmp_path / "made").mkdir()
    with web_server(tmp_path) as base:
        with_user = base.replace("://", "://admin:hunter4@")
        sources = [
            f"{with_user}/{quote('user=admin&password=hunter3.mp4')}?pwd=hunter2&n={n}"
            for n in range(2)
        ]
        sources[0] = sources[0].replace("%3D", "=").replace("%26", "&")
        said = {}
        with (
            socket.create_server(("127.0.0.1", 0)) as one,
            socket.create_server(("127.0.0.1", 0)) as other,
        ):
            ports = {"state": one.getsockname()[1], "metrics": other.getsockname()[1]}

        def look():
            for name in ("state", "metrics"):
                for _ in range(100):
                    time.sleep(0.1)
                    try:
                        text = (
                            urllib.request.urlopen(
                                f"http://127.0.0.1:{ports[name]}/{name}", timeout=2
                            )
                            .read()
                            .decode()
                        )
                    except OSError:
                        continue
                    said[name] = text
                    break

        viewer = threading.Thread(target=look)
        viewer.start()
        run = process(
            "stream",
            *sources,
            "--no-window",
            "--web",
            ports["state"],
            "--metrics",
            ports["metrics"],
            "--record",
            made / "cam.mp4",
            "--log",
            made / "l.jsonl",
            "--trace",
            made / "t.json",
            "--json",
            "--size",
            "64",
        )
        viewer.join()
        batch = command("batch", sources[0], "--out", made / "out", "--json")
    assert run.returncode == 0, run.stderr
    assert batch.returncode == 0, batch.stderr
    assert set(said) == {"state", "metrics"}
    assert_no_secret(made, run.stdout, run.stderr, batch.stdout, batch.stderr, *said.values())
    assert len(list(made.glob("cam_*.mp4"))) == 2
