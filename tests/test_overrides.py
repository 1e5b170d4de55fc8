"""Paths of any characters through Hydra's grammar, whose own syntax stays as it is."""

from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import get_args, get_type_hints

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from atmossl.cli import compose_config, main
from atmossl.overrides import PATHS, for_hydra, joined, split, unquoted
from atmossl.schema import EvaluateConfig, IngestConfig, InspectConfig, PredictConfig, StatsConfig
from tests.inference.test_command import save_tiny

ODD = (
    "runs/lr=0.1/last.ckpt",
    "with space/a  b.zarr",
    "runs/a,b=c,d/x.zarr",
    "[x]/(y)/{z}.nc",
    "[x]",
    "ünï/大気.zarr",
    "it's.zarr",
    'quo"te.zarr',
    "a#b%20+c@d!e&f.zarr",
    "~/a;b.zarr",
    "C:\\data\\a.zarr",
    "1e5",
    "007",
    "nullable",
)


@pytest.mark.parametrize("path", ODD)
@pytest.mark.parametrize("key", sorted(PATHS))
def test_a_path_keeps_every_character(key: str, path: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([for_hydra(f"{key}={path}")])
    assert str(override.value()) == path


@given(path=st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1))
def test_any_text_is_a_path_unless_it_has_quotes_of_its_own(path: str) -> None:
    if path in ("null", "true", "false") or path[0] in "'\"" or "${" in path:
        return
    override = OverridesParser.create().parse_override(for_hydra(f"output={path}"))
    assert str(override.value()) == path


@pytest.mark.parametrize("path", ODD)
def test_paths_in_lists(path: str) -> None:
    """As they are, but for what divides or closes a list, or is a number, which needs quotes."""
    plain = set(path).isdisjoint(",[](){}'\"") and path not in ("1e5", "007")
    quote = "'" if '"' in path else '"'
    for element in [f"{quote}{path}{quote}", *([path] if plain else [])]:
        values = compose_config("evaluate", ["output=o", f"forecasts=[{element},b.zarr]"])
        assert values["forecasts"] == [path, "b.zarr"]


@pytest.mark.parametrize(
    "override",
    [
        "checkpoint=null",
        "checkpoint='\"runs/lr=0.1\"'",
        "init_time=[2020-01-01,2020-01-02T06]",
        "boxes={europe: [35, 75, -12.5, 42.5]}",
        "tails=[0.1, 0.9]",
        "model.dim=64,128",
        "~stream.humidity",
        "++stream.s.token_size={time: 1, lat: 2, lon: 2}",
        "resume=true",
        "task.lead_time=12h",
        "optimizer.learning_rate=1e-3",
        "model.dim=range(1,3)",
        "name=${paths.output}",
        "-m",
        "--config-name=x",
    ],
)
def test_what_hydra_can_read_keeps_its_meaning(override: str) -> None:
    for sweep in (False, True):
        assert for_hydra(override, sweep=sweep) == override


def test_a_multirun_goes_through_values_of_paths() -> None:
    override = for_hydra("data.catalog=runs/a=1.yaml,runs/a=2.yaml", sweep=True)
    parsed = OverridesParser.create().parse_override(override)
    assert parsed.is_sweep_override()
    assert [v.text for v in parsed.sweep_iterator()] == ["runs/a=1.yaml", "runs/a=2.yaml"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a,b", ["a", "b"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("[a,b],{c: 1,d: 2}", ["[a,b]", "{c: 1,d: 2}"]),
        ("", [""]),
    ],
)
def test_commas_divide_outside_quotes_and_brackets(text: str, parts: list[str]) -> None:
    assert list(split(text)) == parts


def test_quotes_are_taken_off_as_hydra_does() -> None:
    assert unquoted("'a=b'") == unquoted('"a=b"') == unquoted("a=b") == "a=b"
    assert unquoted("'it\\'s'") == unquoted("it's") == "it's"


def _paths_of(kind: type, before: str = "") -> Iterator[str]:
    for name, annotation in get_type_hints(kind).items():
        kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
        if Path in kinds:
            yield before + name
        for one in kinds:
            if isinstance(one, type) and (issubclass(one, BaseModel) or is_dataclass(one)):
                yield from _paths_of(one, f"{before}{name}.")


def test_every_key_that_holds_a_path_is_known() -> None:
    kinds = (StatsConfig, PredictConfig, EvaluateConfig, IngestConfig, InspectConfig)
    found = {key for kind in kinds for key in _paths_of(kind)}
    assert {"data.catalog", "paths.output", "climatology"} <= found <= PATHS


def test_commands_take_such_paths(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "runs" / "lr=0.1, [new] ü"
    folder.mkdir(parents=True)
    save_tiny(folder / "last.ckpt")
    (folder / "my=task.yaml").write_text("{_target_: forecast, lead_time: 12h}")
    checkpoint = f"checkpoint={folder}/last.ckpt"
    assert main(["info", checkpoint]) == 0
    assert main(["export", checkpoint, f"output={folder}/small.ckpt"]) == 0
    assert (folder / "small.ckpt").exists()
    capsys.readouterr()
    for command in (
        ["predict", checkpoint, f"task={folder}/my=task.yaml", f"data.catalog={folder}/c.yaml",
         f"output={folder}/o.zarr"],
        ["predict", checkpoint, "task=inpainting", f"task.mask_file={folder}/c.yaml",
         f"output={folder}/o.zarr"],
        ["calibrate", checkpoint, f"data.catalog={folder}/c.yaml", f"output={folder}/c.ckpt"],
        ["evaluate", checkpoint, f"data.catalog={folder}/c.yaml", f"output={folder}/report",
         f'tasks=["{folder}/my=task.yaml"]'],
        ["train", f"data.catalog={folder}/c.yaml", f"paths.output={folder}/run"],
        ["data", "stats", f"data.catalog={folder}/c.yaml"],
        ["data", "ingest", f"input={folder}/c.yaml", f"output={folder}/o.zarr"],
    ):  # fmt: skip
        assert main(command) == 2, command
        error = capsys.readouterr().err
        assert str(folder / "c.yaml") in error, (command, error)


def test_what_cannot_be_read_says_how_to_quote(capsys: pytest.CaptureFixture) -> None:
    told = "model.dims={a:: cannot be read; put quotes inside of quotes around a value"
    assert main(["config", "validate", "model.dims={a:"]) == 2
    assert told in capsys.readouterr().err
    # what a shell has cut at spaces is one word again
    assert main(["config", "validate", "model.dims={strange:", "64}", "seed=-1"]) == 2
    assert capsys.readouterr().err == "atmossl config: seed=-1: valid: 0 or above\n"


def test_spaces_around_the_equals_sign_are_taken() -> None:
    words = ["predict", "output", "=", "o.zarr", "seed=1", "--config-dir", "mine"]
    assert joined(words) == ["predict", "output=o.zarr", "seed=1", "--config-dir=mine"]
    assert joined(["checkpoint=", "output=o.zarr"]) == ["checkpoint=", "output=o.zarr"]
