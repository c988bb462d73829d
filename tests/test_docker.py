"""The images' recipes name what there is: files, extras, commands. Building them needs a Docker
daemon, and is not done here.
"""

import contextlib
import importlib.metadata
import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
RECIPES = [ROOT / "Dockerfile", ROOT / "Dockerfile.nvidia"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def instructions(path: Path) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", path.read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_all_that_is_copied_exists_and_is_not_ignored(path):
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [
        name for word, rest in instructions(path) if word == "COPY" for name in rest.split()[:-1]
    ]
    assert copied
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in ignored


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_everything_that_is_installed_is_copied(path):
    copied = {
        name for word, rest in instructions(path) if word == "COPY" for name in rest.split()[:-1]
    }
    packages = {name.split(".")[0] for name in PROJECT["tool"]["setuptools"]["packages"]}
    modules = {f"{name}.py" for name in PROJECT["tool"]["setuptools"]["py-modules"]}
    project = {
        PROJECT["project"]["readme"],
        *PROJECT["project"]["license-files"],
        "pyproject.toml",
        "constraints.txt",
    }
    assert packages | modules | project == copied


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_extras_and_entry_point_exist(path):
    asked = [
        extra
        for _, rest in instructions(path)
        for found in re.findall(r"\.\[([a-z,]+)\]", rest)
        for extra in found.split(",")
    ]
    assert asked
    assert set(asked) <= set(PROJECT["project"]["optional-dependencies"])
    (entry,) = [json.loads(rest) for word, rest in instructions(path) if word == "ENTRYPOINT"]
    assert entry[0] in PROJECT["project"]["scripts"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_images_run_as_a_plain_user(path):
    steps = instructions(path)
    (user,) = [rest for word, rest in steps if word == "USER"]
    assert not re.match(r"(root|0)\b", user)
    assert any(re.search(rf"\buseradd\b.* {user}\b", rest) for word, rest in steps if word == "RUN")
    words = [word for word, _ in steps]
    assert "RUN" not in words[words.index("USER") :], "what needs root comes before"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_base_images_are_named_by_version(path):
    names = [
        rest.partition("=")[2]
        for word, rest in instructions(path)
        if word == "ARG" and rest.startswith("BASE=")
    ]
    names += [rest for word, rest in instructions(path) if word == "FROM" and "$" not in rest]
    assert names
    for name in names:
        assert re.search(r":(\d+\.\d+\.\d+|\d\d\.\d\d)-", name), f"{name}: a tag that does not move"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_packages_are_pinned_and_no_cache_is_left(path):
    runs = [rest for word, rest in instructions(path) if word == "RUN"]
    for run in runs:
        if "pip install" in run:
            assert "--no-cache-dir --constraint constraints.txt" in run
        if "apt-get install" in run:
            assert "--no-install-recommends" in run
            assert "rm -rf /var/lib/apt/lists/*" in run


def test_every_package_of_an_image_has_a_pin():
    """Those of Sightline, of the extras, and of ray[default], as far as this environment knows what
    they need.
    """
    todo = [f"{PROJECT['project']['name']}[cluster,web,tensorrt]", "ray[default]"]
    pinned = {
        canonicalize_name(line.split("==")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    seen = set()
    while todo:
        wanted = Requirement(todo.pop())
        name = canonicalize_name(wanted.name)
        if wanted.marker is not None and not any(
            wanted.marker.evaluate({"extra": e})
            for e in ("", "cluster", "web", "tensorrt", "default")
        ):
            continue
        if (name, *wanted.extras) in seen:
            continue
        seen.add((name, *wanted.extras))
        if name == PROJECT["project"]["name"]:
            stated = PROJECT["project"]
            todo += [
                *stated["dependencies"],
                *(text for e in wanted.extras for text in stated["optional-dependencies"][e]),
            ]
            continue
        assert name in pinned, f"{name} has no pin in constraints.txt"
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for text in importlib.metadata.requires(name) or []:
                marker = Requirement(text).marker
                if marker is None or any(
                    marker.evaluate({"extra": e}) for e in ({""} | wanted.extras)
                ):
                    todo.append(text)
    assert len(seen) > 50


def test_the_cluster_that_docs_show_is_one_that_ray_takes():
    pytest.importorskip("ray", reason="Ray is not installed: pip install '.[cluster]'")
    import jsonschema
    import ray
    import yaml

    schema = json.loads(
        (Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8")
    )
    found = yaml.safe_load((ROOT / "docs" / "cluster.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(found, schema)
    assert found["head_node_type"] in found["available_node_types"]
