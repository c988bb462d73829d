"""The command that streams with a page, as a user runs it, and what a test asks of it."""

import contextlib
import http.client
import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parent.parent.parent.parent
PATIENCE_S = 40.0


@dataclass
class Run:
    url: str
    log: Path
    recordings: Path

    @property
    def host(self):
        return urlsplit(self.url).netloc

    def ask(self, path, method="GET", body=None, headers=None):
        connection = http.client.HTTPConnection(self.host, timeout=10)
        given = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(
            method, path, None if body is None else json.dumps(body), given | (headers or {})
        )
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        return reply, content

    def state(self):
        return json.loads(self.ask("/state")[1])

    def rows(self):
        """All that are whole."""
        path = self.log if self.log.exists() else self.log.with_name(f".{self.log.name}.part")
        return [json.loads(line) for line in path.read_text().rpartition("\n")[0].splitlines()]

    def last_row(self):
        return self.rows()[-1]


@contextlib.contextmanager
def streaming(folder, *options, source="demo:100000"):
    """The command itself, as a user runs it; ended by Ctrl-C."""
    log, recordings = folder / "log.jsonl", folder / "recordings"
    command = [
        sys.executable,
        "-m",
        "cli",
        "stream",
        source,
        "--web",
        "0",
        "--no-window",
        "--log",
        str(log),
        "--web-dir",
        str(recordings),
        *options,
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("watch on "):
                break
        else:
            pytest.fail("".join(said))
        rest = threading.Thread(target=lambda: said.extend(process.stderr))
        rest.start()
        yield Run(line.removeprefix("watch on ").strip(), log, recordings)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(timeout=20) == 130
            rest.join()
            process.stderr.close()
            assert "Traceback" not in "".join(said), "Ctrl-C with a page open ends quietly"
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def wait_for(condition):
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.1)
