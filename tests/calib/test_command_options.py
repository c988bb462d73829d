"""Options are said once, as fields of dataclasses: each becomes an option of typer with the field's
default, in the same panel of every command.
"""

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer.main

import cli
from calib.data.choose import DataOptions
from engines.errors import InputError, SourceError
from engines.options import LOOK_AT, OUTPUT, PANELS, EngineOptions, Option
from tests.command_line import ROOT, command, refused

COMMANDS = typer.main.get_command(cli.all_commands()).commands


@dataclass(frozen=True)
class Toy:
    size_px: Annotated[int, Option("How large.", OUTPUT, ("size",), min=2)]
    loud: Annotated[bool, Option("Say more.", LOOK_AT)] = False
    colour: Annotated[bool, Option("In colour.", OUTPUT)] = True
    hidden: float = 0.5


@pytest.fixture
def toy(monkeypatch):
    """A command that keeps what it is given."""
    given = []
    monkeypatch.setattr("calib.command_options.REGISTERED", {})

    @cli.command("sightline toy 3")
    def toy(
        first: Annotated[int, Option("A number.", None)],
        toy: Toy,
        data: DataOptions,
        engine: Annotated[EngineOptions, cli.Only(("model", "wanted_class"))],
        last: Annotated[float, Option("The last one.", OUTPUT)] = 1.0,
    ) -> None:
        """What it does."""
        given.append((first, toy, data, engine, last))

    return given


def test_dataclasses_become_options_and_come_back_as_instances(toy):
    words = ("toy", "3", "labels.csv", "--size", 5, "--no-colour", "--class", "cat", "--last", 2)
    assert command(*words).returncode == 0
    assert command("toy", "4", "--size", 2, "--loud", "--model", "vgg16").returncode == 0
    assert toy == [
        (
            3,
            Toy(5, colour=False),
            DataOptions(Path("labels.csv")),
            EngineOptions(wanted_class="cat"),
            2,
        ),
        (4, Toy(2, loud=True), DataOptions(), EngineOptions("vgg16"), 1.0),
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("4",), "Missing option '--size'"),
        (("4", "--size", 1), "Invalid value for '--size'"),
        (("4", "--size", 2, "--last", "nan"), "nan is not a finite number"),
        (("4", "--size", 2, "--hidden", 1), "No such option: --hidden"),
        (("4", "--size", 2, "--head", "none"), "No such option: --head"),
    ],
)
def test_what_does_not_fit_is_refused_by_the_option(toy, words, said):
    assert said in refused("toy", *words)
    assert toy == []


@pytest.fixture
def failing(monkeypatch):
    """A command that fails with the error it is given."""
    raised = []
    monkeypatch.setattr("calib.command_options.REGISTERED", {})

    @cli.command("sightline failing")
    def failing(
        toy: Toy, engine: Annotated[EngineOptions, cli.Only(("model", "wanted_class"))]
    ) -> None:
        raise raised[0]

    return raised


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ("wanted_class", " (--class)"),
        (("size_px", "loud"), " (--size, --loud)"),
        (("colour", "head"), " (--no-colour)"),  # the command has no --head
        ((), ""),
    ],
)
def test_the_command_line_adds_the_flags_that_an_error_is_about(failing, options, flags):
    failing.append(InputError("too much of it", option=options))
    assert refused("failing", "--size", 2) == f"error: too much of it{flags}"


def test_an_error_made_of_another_is_about_the_same(failing):
    failing.append(SourceError("no such class; look at the list"))
    failing[0].__cause__ = InputError("no such class", option="wanted_class")
    assert refused("failing", "--size", 2) == "error: no such class; look at the list (--class)"


def test_errors_are_about_options_that_exist():
    known = {option.name for each in COMMANDS.values() for option in each.params}
    known |= {name[2:] for each in COMMANDS.values() for o in each.params for name in o.opts}
    for path in sorted(
        p for top in ("engines", "realtime", "calib") for p in (ROOT / top).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error"):
                for word in node.keywords:
                    if word.arg == "option":
                        named = [
                            n.value for n in ast.walk(word.value) if isinstance(n, ast.Constant)
                        ]
                        assert set(named) <= known, f"{path}:{node.lineno}"


def test_every_option_is_in_a_panel_and_in_the_same_one_of_every_command():
    panels = {}
    for each in COMMANDS.values():
        for option in each.params:
            if option.opts[0].startswith("--"):
                panels.setdefault(option.opts[0], set()).add(option.rich_help_panel)
    assert len(panels) > 60
    assert {name: found for name, found in panels.items() if len(found) > 1} == {}
    assert set().union(*panels.values()) == set(PANELS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_shows_the_panels_in_their_order_and_no_other(name):
    shown = [
        line.split("─ ")[1].split(" ─")[0]
        for line in command(name, "--help").stdout.splitlines()
        if line.startswith("╭─ ")
    ]
    assert shown == [each for each in ("Arguments", *PANELS) if each in shown]


def test_a_field_of_one_name_has_one_flag_in_every_command():
    flags = {}
    for each in COMMANDS.values():
        for option in each.params:
            flags.setdefault(option.name, set()).add(option.opts[0])
    assert {name: found for name, found in flags.items() if len(found) > 1} == {}


def test_an_earlier_name_of_an_option_works_and_is_not_in_the_help():
    batch = COMMANDS["batch"]
    for name in ("--heat-video", "--heat-map-video"):
        assert batch.make_context("batch", ["film.mp4", name]).params["heat_video"] is True
    shown = command("batch", "--help").stdout
    assert "--heat-map-video" in shown
    assert "--heat-video" not in shown


def test_commands_stand_in_groups():
    shown = command("--help").stdout
    places = [shown.index(f"─ {group} ─") for group in (cli.TEACH, cli.MEASURE, cli.MACHINE)]
    assert places == sorted(places)
