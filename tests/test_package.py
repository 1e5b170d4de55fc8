"""What an installed package brings: its names, its own files, and what it imports when."""

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from atmossl.data.catalog import find_file

HEAVY = ("torch", "lightning", "xarray", "dask", "pandas", "scipy", "matplotlib", "cartopy", "zarr")
CODE = f"""
import json, sys
from atmossl.cli import main
code = main(sys.argv[1:])
print(json.dumps([code, [name for name in {HEAVY!r} if name in sys.modules]]))
"""


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("data list", 0),
        ("train model.dmi=3", 2),
        ("predict task=forcast checkpoint=default output=out.zarr", 2),
    ],
)
def test_command_answers_before_heavy_libraries_are_imported(command: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, *command.split()], capture_output=True, text=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [code, []], done.stderr


def test_names_of_the_package_are_those_of_its_interface() -> None:
    import atmossl
    from atmossl import api

    assert {name: getattr(atmossl, name) for name in atmossl.__all__ if name != "__version__"} == {
        "Model": api.Model, "load": api.load, "open_data": api.open_data,
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
