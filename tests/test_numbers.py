"""Every number that the command line takes: what is no number, not finite or far outside is refused
before any work.
"""

import pytest
import typer.main

import cli
from tests.command_line import command

NEEDED = {
    "batch": ["x.mp4"],
    "stream": ["x.mp4"],
    "fit": ["x.csv", "--out", "h.safetensors"],
    "calibrate": ["x.csv"],
    "finetune": ["x.csv", "--out", "w.safetensors"],
    "evaluate": ["x.csv"],
}
NONSENSE = ("nan", "inf", "-inf", "-1", "1e400", "9" * 400, "0x10", "", "½")
TIMES = {"--start", "--end"}  # written as 1:02:03, and so read by a parser of their own


def numeric_options():
    for name, each in typer.main.get_command(cli.all_commands()).commands.items():
        for option in each.params:
            kinds = str(getattr(option.type_descriptor, "annotation", ""))
            if option.opts[0].startswith("--") and (
                "int" in kinds or "float" in kinds or option.opts[0] in TIMES
            ):
                yield name, option.opts[0]


OPTIONS = list(numeric_options())


def test_the_walk_finds_them():
    assert {
        ("demo", "--size"),
        ("batch", "--every"),
        ("stream", "--smooth"),
        ("stream", "--fps"),
        ("batch", "--min-score"),
    } < set(OPTIONS)
    assert len(OPTIONS) > 40


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=[" ".join(each) for each in OPTIONS])
def test_nonsense_is_refused_by_the_option_itself(name, option):
    for value in NONSENSE:
        result = command(name, *NEEDED.get(name, []), f"{option}={value}")
        assert result.returncode == 2, (value, result.stderr)
        assert "Traceback" not in result.stderr
        assert option in result.stderr, (value, result.stderr)
