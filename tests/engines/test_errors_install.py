"""Commands that are printed to a user: in any folder, for the Python that runs, and for packages
that exist.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from engines import errors as install
from engines.errors import extra_requirements, install_extra, install_packages, restore

PROJECT = tomllib.loads((install.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_distribution_is_the_one_that_is_built():
    assert PROJECT["name"] == install.DISTRIBUTION
    assert list(PROJECT["scripts"]) == ["sightline"]


@pytest.mark.parametrize("extra", PROJECT["optional-dependencies"])
def test_an_extra_is_printed_as_packages_and_never_as_our_own(extra):
    words = shlex.split(install_extra(extra))
    asked = words[words.index("install") + 1 :]
    assert asked
    assert not any(word.startswith("sightline") for word in asked)


def test_an_extra_that_names_another_brings_its_packages_once():
    torch, bench = extra_requirements("torch"), extra_requirements("bench")
    assert set(torch) < set(bench)
    dev = extra_requirements("dev")
    assert set(bench) | set(extra_requirements("web")) | set(extra_requirements("cluster")) < set(
        dev
    )
    assert len(dev) == len(set(dev))


def test_requirements_for_other_machines_are_left_out(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text(
        "[project.optional-dependencies]\n"
        """odd = ["first ; sys_platform == 'of another kind'", "second>=1 ; python_version >= '3.11'"]\n"""
    )
    monkeypatch.setattr(install, "ROOT", tmp_path)
    assert extra_requirements("odd") == ["second>=1"]


def test_pip_is_named_so_that_it_is_the_one_of_this_python(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert install_packages("ray>=2,<3", "av") == "pip install 'ray>=2,<3' av"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install_packages("av") == f"{sys.executable} -m pip install av"
    monkeypatch.setattr(sys, "executable", "/a folder/python")
    assert install_packages("av") == "'/a folder/python' -m pip install av"


def test_an_environment_without_pip_is_served_by_uv(monkeypatch, tmp_path):
    (tmp_path / "uv").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert install_packages("av") == f"uv pip install --python {sys.executable} av"


def test_what_is_printed_is_what_a_shell_gives_to_pip(monkeypatch, tmp_path):
    """The words as ``sh`` passes them on: a bare ``>`` would have written to a file."""
    (tmp_path / "pip").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "pip").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.defpath}")
    printed = install_extra("web")
    ended = subprocess.run(
        ["sh", "-c", printed], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert ended.stdout.splitlines() == ["install", *extra_requirements("web")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pip"]


def test_a_damaged_file_of_a_clone_comes_back_with_git(tmp_path, monkeypatch):
    clone = tmp_path / "a clone"
    for words in (["init", "--quiet"], ["add", "assets"]):
        (clone / "assets").mkdir(parents=True, exist_ok=True)
        if words[0] == "add":
            (clone / "assets" / "head.json").write_text("whole")
        subprocess.run(["git", *words], cwd=clone, check=True)
    monkeypatch.setattr(install, "ROOT", clone)
    (clone / "assets" / "head.json").write_text("damaged")
    subprocess.run(
        ["sh", "-c", restore(clone / "assets")], cwd=tmp_path, check=True, capture_output=True
    )
    assert (clone / "assets" / "head.json").read_text() == "whole"


def test_a_damaged_file_of_an_installed_wheel_comes_back_from_that_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr(install, "ROOT", tmp_path)

    class Installed:
        def read_text(self, name):
            return f'{{"url": "{(tmp_path / "a wheel.whl").as_uri()}"}}'

    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Installed())
    assert "from the wheel file or the folder" in restore(tmp_path / "assets"), (
        "it is there no more"
    )
    (tmp_path / "a wheel.whl").touch()
    words = shlex.split(restore(tmp_path / "assets"))
    assert words[-3:] == ["--force-reinstall", "--no-deps", str(tmp_path / "a wheel.whl")]


def test_an_installed_wheel_names_the_same_packages_as_the_clone(tmp_path):
    """Built and unpacked for real; what it prints is read from its own metadata."""
    source = tmp_path / "source"
    source.mkdir()
    for name in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "cli.py",
        "engines",
        "realtime",
        "calib",
    ):
        path = install.ROOT / name
        (shutil.copytree if path.is_dir() else shutil.copy)(path, source / name)
    build = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", build, str(tmp_path)],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("sightline_vision-")
    place = tmp_path / "site"
    shutil.unpack_archive(wheel, place, "zip")
    code = "from engines.errors import ROOT, extra_requirements as e; print(ROOT); [print(*e(n)) for n in ('web', 'bench', 'dev')]"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(place)},
        check=True,
        capture_output=True,
        text=True,
    )
    root, *found = ended.stdout.splitlines()
    assert Path(root) == place
    assert found == [" ".join(extra_requirements(name)) for name in ("web", "bench", "dev")]
