"""What an installed package brings: its names, its own files, and what it imports when."""

import importlib
import json
import re
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path

import pytest

from atmossl import cli
from atmossl.data.catalog import find_file
from atmossl.extras import EXTRAS, missing_extra
from atmossl.refused_words import _line

HEAVY = ("torch", "lightning", "xarray", "dask", "pandas", "scipy", "matplotlib", "cartopy", "zarr")
CODE = f"""
import json, sys
from atmossl.cli import main
code = main(sys.argv[1:])
print(json.dumps([code, [name for name in {HEAVY!r} if name in sys.modules]]))
"""


# where a value is wrong, what checks it is imported, but not what would work with it
OF_CHECKS = ["torch", "xarray", "pandas", "zarr"]


@pytest.mark.parametrize(
    ("command", "code", "imported"),
    [
        ("data list", 0, []),
        ("train model.dmi=3", 2, []),
        ("predict task=forcast checkpoint=default output=out.zarr", 2, []),
        ("train model.dim=101", 2, OF_CHECKS),
    ],
)
def test_command_answers_before_heavy_libraries_are_imported(
    command: str, code: int, imported: list[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, *command.split()], capture_output=True, text=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [code, imported], done.stderr


def test_names_of_the_package_are_those_of_its_interface() -> None:
    import atmossl
    from atmossl import api

    assert {name: getattr(atmossl, name) for name in atmossl.__all__ if name != "__version__"} == {
        "Model": api.Model, "distance": api.distance, "load": api.load, "open_data": api.open_data,
    }  # fmt: skip
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        getattr(atmossl, "lode")  # noqa: B009


def test_the_package_finds_its_own_files_before_those_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "atmossl"
    for conf in (package / "conf", package.parent / "conf"):
        conf.mkdir(parents=True)
    monkeypatch.setattr(resources, "files", lambda name: tmp_path / "site-packages" / name)
    assert find_file("conf") == package / "conf"
    (package / "conf").rmdir()
    assert find_file("conf") == package.parent / "conf"  # of a checkout


def requirements() -> dict[str, set[str]]:
    """Extra -> import names of what it requires; the core's are those of the empty name."""
    path = Path(__file__).resolve().parents[1] / "pyproject.toml"
    project = tomllib.loads(path.read_text())["project"]
    listed = {"": project["dependencies"], **project["optional-dependencies"]}
    return {
        extra: {re.split(r"[\[<>=]", entry)[0].lower().replace("-", "_") for entry in entries}
        for extra, entries in listed.items()
    }


def test_every_package_of_an_extra_is_required_there_and_not_in_the_core() -> None:
    required = requirements()
    others = {
        "aiohttp": "fsspec",
        "mlflow": "mlflow_skinny",
        "sklearn": "scikit_learn",
    }  # distributions that bring them
    for package, extra in EXTRAS.items():
        assert others.get(package, package) in required[extra], (package, extra)
        assert package not in required[""], package


@pytest.mark.parametrize("package", sorted(EXTRAS))
def test_a_missing_package_is_named_in_one_line_with_its_extra(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # so that its import fails
    monkeypatch.setitem(cli._COMMANDS, "train", lambda _: importlib.import_module(package))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == (
        f"atmossl train: needs the package {package}, which is not installed; "
        f"pip install 'atmossl[{EXTRAS[package]}]'\n"
    )


def test_inspection_tells_that_maps_need_an_extra_before_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "cartopy.crs", None)
    monkeypatch.delitem(sys.modules, "atmossl.data.field_map", raising=False)
    assert cli.main(["data", "inspect", "sample", f"output={tmp_path / 'maps'}"]) == 2
    captured = capsys.readouterr()
    assert "pip install 'atmossl[report]'" in captured.err
    assert captured.out == ""


def test_a_missing_launcher_is_named_with_its_extra() -> None:
    """As Hydra tells it where the plugin is not installed, and where only its choice is wrong."""
    text = "Could not find 'hydra/launcher/submitit_slurm'\n\nAvailable options:\n\tbasic\n"
    word = "hydra/launcher=submitit_slurm"
    told, listed = (
        _line("choice", word, choices, {}, find_file("conf"))
        for choices in (text, text + "\tsubmitit_local\n")
    )
    assert told.endswith("pip install 'atmossl[sweep]'")
    assert "valid: basic, submitit_local" in listed


def test_a_missing_package_behind_another_error_is_found() -> None:
    told_in_words = ImportError("Install s3fs to access S3")
    error = ValueError("no store")
    error.__cause__ = told_in_words
    assert missing_extra(error) == (
        "needs the package s3fs, which is not installed; pip install 'atmossl[cloud]'"
    )
    assert missing_extra(ImportError("no module of ours", name="atmossl.nothing")) is None
