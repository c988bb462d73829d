"""The command line as tests run it: in this process, or in one of its own."""

import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import cli
from engines.text import Terminal

ROOT = Path(__file__).parent.parent
COLUMNS = 200


def command(*arguments, **environment) -> subprocess.CompletedProcess[str]:
    """Run a command from its words to its exit status, in this process: nine tenths of a second
    sooner than ``process``.

    An error that is not the user's, and a warning, come out of here as they are.
    """
    line, out, err, status = ["sightline", *map(str, arguments)], StringIO(), StringIO(), 0
    notify = {"COLUMNS": str(COLUMNS), "SIGHTLINE_TRACEBACK": "1", **environment}
    with (
        patch.object(sys, "argv", line),
        patch.dict(os.environ, notify),
        patch.object(cli, "console", Terminal(stderr=True, width=COLUMNS)),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
    return subprocess.CompletedProcess(line, status, out.getvalue(), err.getvalue())


def process(*arguments, timeout=120, **environment) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own: where the environment is read at the start, and all
    that is printed counts.
    """
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        check=False,
        env={**os.environ, "COLUMNS": str(COLUMNS), "SIGHTLINE_TRACEBACK": "1", **environment},
    )


def refused(*arguments, run=command, **environment) -> str:
    """The one line that a user's mistake gives."""
    result = run(*arguments, **environment)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, result.stderr
    return lines[0]
