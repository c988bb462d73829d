"""The rules of the house: who imports whom, how long files get, what a CPU user needs."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("engines", "realtime", "calib")
ALLOWED = {
    "engines": {"engines"},
    "realtime": {"engines", "realtime"},
    "calib": {"engines", "realtime", "calib"},
}
TORCH_FILES = {
    "engines/backends/torch_dense.py",
    "engines/backends/torch_head.py",
    "engines/backends/torch_reference.py",
    "engines/backends/torch_networks.py",
    "engines/networks/packages.py",
    "calib/research/dense_descent.py",
    "calib/research/dense_losses.py",
    "calib/research/networks.py",
    "calib/research/train.py",
    "calib/bench/gpu_day.py",
    "calib/bench/gpu_stand_in.py",
    "calib/bench/gpu_torch.py",
    "calib/bench/torch_peers.py",
}
CALIB = ("calib.bench", "calib.commands", "calib.data", "calib.evaluation", "calib.heads")
COMMANDS_TO_RUN = {"errors.py", "doctor.py", "ray.py"}
"""Where texts show commands that the user is to run."""
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way_and_heavy_libraries_stay_in_their_files(path):
    name = str(path.relative_to(ROOT))
    modules = imported(path)
    ours = {module.split(".")[0] for module in modules} & {*PACKAGES, "cli", "tests"}
    assert ours <= ALLOWED[path.relative_to(ROOT).parts[0]]
    roots = {module.split(".")[0] for module in modules}
    if path.name != "command_options.py":
        assert not roots & {"typer", "click"}, "only cli.py and what makes its options know typer"
    if name != "engines/backends/tensorrt.py":
        assert not roots & {"tensorrt", "tensorrt_rtx"}
    if name != "engines/backends/cuda.py":
        assert not roots & {"pycuda", "cuda"}
    if name != "realtime/batch/cluster/ray.py":
        assert "ray" not in roots
    if name not in TORCH_FILES:
        assert "torch" not in roots


def texts(nodes):
    """The strings in some nodes; neither docstrings nor the help of options."""
    nodes = list(nodes)
    silent = [n for n in nodes if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    silent += [
        n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "Option"
    ]
    left_out = {id(inner) for node in silent for inner in ast.walk(node)}
    return [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in left_out
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_error_names_a_flag_of_the_command_line(path):
    """It says what it is about in words; ``option`` names the fields, and cli.py adds the flags.
    In engines and realtime, neither does any other text, such as a note, but whole commands.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    raised = [n for node in ast.walk(tree) if isinstance(node, ast.Raise) for n in ast.walk(node)]
    said = texts(raised)
    if path.relative_to(ROOT).parts[0] != "calib" and path.name not in COMMANDS_TO_RUN:
        said += texts(ast.walk(tree))
    assert not [text for text in said if re.search(r"--[a-z]", text)]


@pytest.mark.parametrize(
    "path",
    [*FILES, ROOT / "cli.py"],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_files_are_at_most_600_lines_and_the_bodies_of_functions_80(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1:][:1] if ast.get_docstring(node) else node.body[:1]
            lines = (node.end_lineno or 0) - first[0].lineno + 1 if first else 0
            assert lines <= 80, f"{node.name} is too long"


def test_only_one_frame_loop_exists():
    loops = [
        p
        for p in FILES
        if "localizer.submit(" in p.read_text(encoding="utf-8") and p.parent.name == "realtime"
    ]
    assert [p.name for p in loops] == ["pipeline.py"]


def test_running_needs_neither_torch_nor_gpu_libraries():
    """A run in a fresh interpreter in which importing any of them fails."""
    code = (
        "import sys\n"
        "for name in ('torch', 'tensorrt', 'tensorrt_rtx', 'pycuda', 'onnxruntime', 'fastapi', 'uvicorn', 'ray', 'fsspec'): sys.modules[name] = None\n"
        "import cli\n"
        "from engines.choose import open_localizer\n"
        "from engines.options import EngineOptions\n"
        "import numpy as np\n"
        "found = open_localizer(EngineOptions()).localize([np.zeros((48, 64, 3), np.uint8)])\n"
        "assert found[0].nothing_sure, found[0].confidence\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


HEAVY = ("numpy", "cv2", "openvino", "onnx", "av", "PIL", "torch", "matplotlib", "pyarrow", "scipy")


@pytest.mark.parametrize(
    ("command", "absent"),
    [
        ("--help", (*HEAVY, *CALIB, "realtime")),
        ("doctor", (*CALIB, "torch", "matplotlib", "pyarrow", "openvino")),
        (
            "stream",
            (
                *(*CALIB, "openvino", "torch", "matplotlib", "pyarrow", "scipy", "fastapi", "ray"),
                *("jinja2", "onnx.reference"),
            ),
        ),
        ("batch", (*CALIB, "openvino", "torch", "matplotlib", "scipy", "fastapi", "ray")),
    ],
)
def test_a_command_loads_nothing_that_it_does_not_need(command, absent):
    """In a fresh interpreter that builds this command alone, as ``main`` does."""
    code = (
        "import sys, cli\n"
        f"cli.all_commands({command!r})\n"
        "names = {each.partition('.')[0] for each in sys.modules} | {*sys.modules}\n"
        f"print(*(names & {set(absent)!r}))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120, capture_output=True
    )
    assert not found.stdout.split(), f"{command} loads {found.stdout.decode()}"


def test_no_copyleft_package_is_required():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "ultralytics" not in text


def test_every_folder_of_code_or_data_is_installed():
    """``packages`` of pyproject.toml is a list by hand: a folder left out would be missing for
    those who do not work in a clone.
    """
    stated = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
            "packages"
        ]
    )
    folders = {
        path.parent
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file()
    }
    assert stated == {
        ".".join(f.relative_to(ROOT).parts) for f in folders if f.name != "__pycache__"
    }
