"""Options that are said once: a command's parameter becomes an option for each field, with the
field's default.
"""

import inspect
from pathlib import Path

import typer
from typer.testing import CliRunner

from calib.data.choose import OPTIONS as DATA_OPTIONS
from calib.data.choose import DataChoice
from engines.choose import Choice
from engines.options import ENGINE, NETWORK, OPTIONS, takes, takes_choice

DEFAULT = Choice()


def run(command, *arguments):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    return CliRunner().invoke(app, list(arguments))


def test_every_field_of_a_choice_has_an_option_and_none_is_left_over():
    assert set(OPTIONS) == set(Choice.__dataclass_fields__) - {
        "least_confidence"
    }  # --min-score, which trackers read, too
    assert set(DATA_OPTIONS) == set(DataChoice.__dataclass_fields__)
    assert set(ENGINE) | {"wanted_class"} == set(OPTIONS)
    assert set(NETWORK) < set(ENGINE)


def test_options_make_the_choice_and_stand_at_its_place():
    seen = []

    @takes_choice("model", "size_px", "wanted_class")
    def command(first: int, choice: Choice = DEFAULT, last: bool = False) -> None:
        seen.append((first, choice, last))

    assert list(inspect.signature(command).parameters) == [
        "first",
        "model",
        "size_px",
        "wanted_class",
        "last",
    ]
    assert (
        run(command, "3", "--model", "vgg16", "--size", "96", "--class", "cat", "--last").exit_code
        == 0
    )
    assert run(command, "4").exit_code == 0
    assert seen == [
        (3, Choice("vgg16", size_px=96, wanted_class="cat"), True),
        (4, Choice(), False),
    ]


def test_two_groups_of_options_go_together():
    seen = []

    @takes_choice("model")
    @takes("data", DataChoice, DATA_OPTIONS)
    def command(data: DataChoice = DataChoice(), choice: Choice = DEFAULT) -> None:
        """What it does."""
        seen.append((data, choice))

    assert run(command, "labels.csv", "--classes", "dog", "--model", "squeezenet").exit_code == 0
    assert seen == [(DataChoice(Path("labels.csv"), classes="dog"), Choice("squeezenet"))]
    assert "What it does." in run(command, "--help").output
