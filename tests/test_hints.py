"""Every command that Sightline prints or its texts show for installing something names what exists,
and never a package of another's.

Sightline is on no package index; ``sightline`` there is somebody else's.
"""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import typer.main

import cli
from engines.networks.packages import PACKAGES

ROOT = Path(__file__).parent.parent
CODE = [
    *sorted(
        path for top in ("engines", "realtime", "calib") for path in (ROOT / top).rglob("*.py")
    ),
    ROOT / "cli.py",
]
TEXTS = [
    *(
        ROOT / name
        for name in (
            "README.md",
            "CONTRIBUTING.md",
            "CHANGELOG.md",
            "Makefile",
            "Dockerfile",
            "Dockerfile.nvidia",
            ".ci/run",
        )
    ),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs").glob("*.yaml")),
    *sorted((ROOT / "tests").rglob("*.py")),
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINNED = {
    line.split("==")[0].lower()
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line
}
STATED = {
    re.split(r"[\[<>=;! ]", text)[0].lower()
    for texts in (PROJECT["dependencies"], *EXTRAS.values())
    for text in texts
} - {PROJECT["name"]}
COMMANDS = typer.main.get_command(cli.all_commands()).commands
OF_NETWORKS = {name for package in PACKAGES.values() for name in package.modules.values()}
KNOWN = PINNED | STATED | OF_NETWORKS | {"opencv-python-headless", "pip"}


def calls(path: Path) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_made_in_one_place(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documents = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    written = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and id(node) not in documents
    ]
    if path.name != "errors.py":
        assert not [
            text
            for text in written
            if isinstance(text, str) and re.search(r"pip3? install|conda install", text)
        ]


def test_what_the_code_asks_for_exists():
    asked = []
    for path in CODE:
        for call in calls(path):
            name = getattr(call.func, "id", getattr(call.func, "attr", ""))
            for word in call.args if name in ("install_extra", "install_packages") else []:
                if isinstance(word, ast.Constant):
                    asked.append(word.value)
                    assert word.value.lower() in (EXTRAS if name == "install_extra" else KNOWN), (
                        f"{path.name}: {word.value}"
                    )
    assert {"rtx", "tensorrt", "torch", "web", "cluster", "bench", "openvino"} <= set(asked)


def test_commands_of_our_own_that_the_code_asks_for_exist():
    """``engines.errors.sightline_command`` makes them; each parses as it is."""
    seen = 0
    for path in CODE:
        for call in calls(path):
            if getattr(call.func, "id", "") == "sightline_command":
                command = COMMANDS[call.args[0].value]
                flags = {flag for option in command.params for flag in option.opts}
                assert {f"--{word.arg.replace('_', '-')}" for word in call.keywords} <= flags
                seen += 1
    assert seen >= 3


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_texts_install_from_a_clone_a_wheel_or_packages_that_exist(path):
    if path == Path(__file__):
        return
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\bsightline(-vision)?\[[a-z]", text), "no index has it"
    for line in re.findall(r"pip install ([^\n`\"]+)", text):
        for quoted, bare in re.findall(
            r"'([^']+)'|(?:^|\s)([\w.-]+)", line.split("#")[0].split("(")[0]
        ):
            word = quoted or bare
            if bare and not re.fullmatch(r"[a-z][\w-]+", bare):
                continue  # an option, or the end of a sentence
            if found := re.fullmatch(r"(?:\.|[\w.-]+\.whl)\[([a-z,]+)\]", word):
                assert set(found[1].split(",")) <= set(EXTRAS), f"{path.name}: {word}"
            elif quoted or line.startswith(word):
                name = re.split(r"[\[<>=]", word)[0].lower()
                assert name in KNOWN or name == "ray", f"{path.name}: {word}"
                assert name != "sightline"


def test_no_extra_names_a_package_of_somebody_else():
    for texts in EXTRAS.values():
        for text in texts:
            assert not re.match(r"sightline(?!-vision)\b", text), text
