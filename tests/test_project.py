"""Policies of the project: sizes, layers, what the wheel holds, shell scripts that parse."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zlib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "atmossl").rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "conf" / "experiment").glob("*.yaml"))
SHELL_SCRIPTS = [
    ROOT / ".ci" / "run",
    *sorted((ROOT / "scripts").rglob("*.sh")),
    *sorted((ROOT / "scripts").rglob("*.sbatch")),
]
MODULE_LINES = 600
FUNCTION_LINES = 60
FUNCTION_LINES_P90 = 40
EXPERIMENT_LINES = 30


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def function_lengths() -> dict[str, int]:
    """Lines of every function and method, docstring and signature included."""
    return {
        f"{name(path)}:{node.lineno} {node.name}": (node.end_lineno or node.lineno)
        - node.lineno
        + 1
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


WHEEL = pyproject()["tool"]["hatch"]["build"]["targets"]["wheel"]


def test_no_module_outgrows_its_limit():
    lines = {name(path): len(path.read_text().splitlines()) for path in MODULES}
    assert lines, "no modules found"
    assert {path: count for path, count in lines.items() if count > MODULE_LINES} == {}


def test_no_function_outgrows_its_limit():
    lengths = function_lengths()
    assert {where: count for where, count in lengths.items() if count > FUNCTION_LINES} == {}


def test_nine_functions_of_ten_fit_a_screen():
    p90 = float(np.percentile(list(function_lengths().values()), 90))
    assert p90 <= FUNCTION_LINES_P90


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name)
def test_experiment_is_a_short_diff(path):
    assert len(path.read_text().splitlines()) <= EXPERIMENT_LINES


def test_imports_go_downwards_only():
    # A process of its own, for the linter switches off every logger that exists.
    linter = "from importlinter.cli import lint_imports as lint; "
    linter += "raise SystemExit(lint(no_cache=True, no_logo=True))"
    done = subprocess.run([sys.executable, "-c", linter], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_wheel_stays_below_60_mb():
    """What compresses, compressed; the rest as it is, though a wheel takes some off it, too."""
    excluded = [ROOT / path for path in WHEEL["exclude"]]
    assert all(path.is_dir() for path in excluded)
    files = [path for top in ("atmossl", "conf") for path in (ROOT / top).rglob("*")]
    files = [path for path in files if not any(folder in path.parents for folder in excluded)]
    stored = [path for path in files if path.is_file() and "__pycache__" not in path.parts]
    sizes = {
        path: len(zlib.compress(path.read_bytes())) if size < 200_000 else size
        for path in stored
        if (size := path.stat().st_size)
    }
    assert 30e6 < sum(sizes.values()) < 60e6


def test_wheel_holds_config_and_catalog():
    assert WHEEL["packages"] == ["atmossl"]
    assert WHEEL["force-include"] == {
        "conf": "atmossl/conf",
        "data_catalog.yaml": "atmossl/data_catalog.yaml",
    }
    for source in WHEEL["force-include"]:
        assert (ROOT / source).exists(), source


def test_constraints_meet_the_requirements():
    pins = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    required = {entry.split(">=")[0] for entry in pyproject()["project"]["dependencies"]}
    assert {pin.split("==")[0] for pin in pins} <= required


@pytest.mark.parametrize("path", SHELL_SCRIPTS, ids=name)
def test_shell_script_parses(path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_page_of_the_documentation_is_in_the_navigation_once():
    listed = re.findall(r"[\w/]+\.md$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    pages = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(map(str, pages)), "list new pages under nav of mkdocs.yml"


def test_image_installs_extras_that_there_are():
    (names,) = re.findall(r"extras = \((.*?)\)", (ROOT / "Dockerfile").read_text())
    extras = set(ast.literal_eval(f"({names})"))
    assert (
        {"train", "report", "grib"}
        <= extras
        <= set(pyproject()["project"]["optional-dependencies"])
    )


STUBS = """
for name in srun scontrol module apptainer; do
    eval "$name() { echo $name \\"\\$@\\"; }"
done
"""


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"ATMOSSL_ENV": "{here}/env"}, "srun {here}/env/bin/python scripts/predict.py task=_"),
        (
            {"ATMOSSL_ENV": "{here}/env", "ATMOSSL_MODULES": "Python CUDA"},
            "module load Python CUDA\nsrun {here}/env/bin/python scripts/predict.py task=_",
        ),
        (
            {"ATMOSSL_IMAGE": "a.sif", "ATMOSSL_BIND": "/data"},
            "srun apptainer exec --nv --bind {root},/data --pwd {root} a.sif python "
            "scripts/predict.py task=_",
        ),
    ],
)
def test_job_takes_the_python_that_was_chosen(tmp_path, choice: dict, expected: str) -> None:
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    script = STUBS + (ROOT / "scripts" / "slurm" / "predict.sbatch").read_text()
    chosen = {key: value.format(here=tmp_path) for key, value in choice.items()}
    done = subprocess.run(
        ["bash", "-c", script, "job", "task=_"], capture_output=True, text=True, cwd=ROOT,
        env={"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(ROOT), **chosen},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected.format(here=tmp_path, root=ROOT)
