"""The images' recipes name what there is: files, extras, commands. Building them needs a Docker daemon, and is not done here."""

import json
import re
import tomllib
from pathlib import Path

import pytest

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
    copied = [name for word, rest in instructions(path) if word == "COPY" for name in rest.split()[:-1]]
    assert copied
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in ignored


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_everything_that_is_installed_is_copied(path):
    copied = {name for word, rest in instructions(path) if word == "COPY" for name in rest.split()[:-1]}
    packages = {name.split(".")[0] for name in PROJECT["tool"]["setuptools"]["packages"]}
    modules = {f"{name}.py" for name in PROJECT["tool"]["setuptools"]["py-modules"]}
    project = {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], "pyproject.toml", "constraints.txt"}
    assert packages | modules | project == copied


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_extras_and_entry_point_exist(path):
    asked = [
        extra for _, rest in instructions(path) for found in re.findall(r"\.\[([a-z,]+)\]", rest) for extra in found.split(",")
    ]
    assert asked
    assert set(asked) <= set(PROJECT["project"]["optional-dependencies"])
    (entry,) = [json.loads(rest) for word, rest in instructions(path) if word == "ENTRYPOINT"]
    assert entry[0] in PROJECT["project"]["scripts"]


def test_the_cluster_that_docs_show_is_one_that_ray_takes():
    pytest.importorskip("ray", reason="Ray is not installed: pip install '.[cluster]'")
    import jsonschema
    import ray
    import yaml

    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))
    found = yaml.safe_load((ROOT / "docs" / "cluster.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(found, schema)
    assert found["head_node_type"] in found["available_node_types"]
