"""Scripts of calib.research are called with what their command line says."""

from pathlib import Path
from typing import Annotated

import pytest

from calib.research.command_line import run
from engines.errors import SourceError
from engines.options import Option


def script(given):
    def main(
        data: Annotated[Path, Option("Where 100 % of it lies.")],
        frames_count: Annotated[int, Option("How many.", names=("frames",), min=1)] = 3,
        loud: Annotated[bool, Option("Say more.")] = True,
    ) -> None:
        """What it does."""
        if data.name == "missing":
            raise SourceError("it is not there")
        given.append((data, frames_count, loud))

    return main


def test_parameters_are_options():
    given = []
    run(script(given), ["--data", "d"])
    run(script(given), ["--data", "d", "--frames", "7", "--no-loud"])
    assert given == [(Path("d"), 3, True), (Path("d"), 7, False)]


def test_help_says_what_it_does_and_what_each_option_is(capsys):
    with pytest.raises(SystemExit) as end:
        run(script([]), ["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "What it does." in shown
    assert "How many. (default: 3)" in shown
    assert "Where 100 % of it lies.\n" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required: --data"),
        (["--data", "d", "--frames", "0"], "0 is smaller than 1"),
        (["--data", "d", "--frames", "x"], "invalid"),
    ],
)
def test_words_that_do_not_fit_are_refused(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        run(script([]), words)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_an_error_is_one_line():
    with pytest.raises(SystemExit) as end:
        run(script([]), ["--data", "missing"])
    assert end.value.code == "error: it is not there"
