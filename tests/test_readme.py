"""Every command that the README shows can be parsed as written, and every file it names exists."""

import re
import shlex
from pathlib import Path

import pytest
import typer

import cli

ROOT = Path(__file__).parent.parent
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    block
    for path in TEXTS
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
]
LINES = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
EPILOGS = [
    part.strip()
    for command in cli.all_commands().registered_commands
    for part in re.findall(r"`([^`#]+)", command.epilog or "")
]
COMMANDS = [line for line in (*LINES, *EPILOGS) if line.startswith("sightline ")]


def test_there_are_commands():
    assert len(COMMANDS) > 12


@pytest.mark.parametrize("line", sorted(set(COMMANDS)))
def test_commands_parse(line):
    name, *arguments = shlex.split(line)[1:]
    command = typer.main.get_command(cli.all_commands(name)).commands[name]
    command.make_context(name, arguments)


def test_every_command_has_an_example():
    assert all(
        "Examples:" in (command.epilog or "") for command in cli.all_commands().registered_commands
    )
    shown = {part.split()[1] for part in EPILOGS if part.startswith("sightline ")}
    assert shown == set(typer.main.get_command(cli.all_commands()).commands)


def test_make_targets_exist():
    targets = re.findall(
        r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    for line in LINES:
        if line.startswith("make "):
            assert line.split()[1] in targets


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize(
    "path", [*TEXTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda p: p.name
)
def test_paths_that_are_named_exist(path):
    """Names in backticks with one of the repository's folders before them, and modules to run;
    nothing else is a path of ours.
    """
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"`((?:calib|docs|engines|realtime|tests|\.ci)/[\w./-]+)`", text)
    named += [
        name
        for name in re.findall(r"`([\w.-]+)`", text)
        if re.fullmatch(r"[A-Z]+\.md|Dockerfile[\w.]*|Makefile|\w+\.toml", name)
    ]
    named += [
        f"{module.replace('.', '/')}.py"
        for module in re.findall(r"python -m ((?:calib|realtime|engines)[\w.]+\w)", text)
    ]
    for name in named:
        assert (ROOT / name).exists() or (ROOT / name).with_suffix("").is_dir(), name


def test_documents_that_the_code_names_exist():
    for folder in ("engines", "realtime", "calib"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in re.findall(
                r"\bdocs/[\w./-]+\w|\b(?!FILE\b)[A-Z]{3,}\.md\b", path.read_text(encoding="utf-8")
            ):
                assert (ROOT / name).exists(), f"{path.name} names {name}"


def test_the_architecture_names_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = [
        p
        for package in ("engines", "realtime", "calib")
        for p in (ROOT / package).rglob("*.py")
        if p.stem != "__init__"
    ]
    assert [str(p.relative_to(ROOT)) for p in files if f"`{p.stem}`" not in text] == []
