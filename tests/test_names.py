"""Whatever a variable is called, files lie where they belong."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atmossl.cli import main
from atmossl.data.catalog import check_name, load_catalog
from atmossl.names import file_name
from tests.synthetic import catalog, dataset

HOSTILE = [
    "../../x",
    "..",
    ".",
    "/etc/x",
    "a/b",
    "",
    " ",
    ".hidden",
    "a\\b",
    "x\0y",
    "CON ",
    "é" * 300,
]


@settings(max_examples=200)
@given(st.text(max_size=400) | st.sampled_from(HOSTILE))
def test_a_name_is_one_visible_file(name: str) -> None:
    safe = file_name(name)
    path = Path("folder") / safe
    assert path.parent == Path("folder") and path.name == safe != ""
    assert not safe.startswith(".") and len(safe.encode()) <= 150 and "\0" not in safe


@settings(max_examples=200)
@given(st.lists(st.text("./%_a2F-", max_size=6) | st.sampled_from(HOSTILE), unique=True))
def test_two_names_are_two_files(names: list[str]) -> None:
    assert len({file_name(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    "name", ["2m_temperature", "geopotential", "wind (10 m)", "Temperatur_höhe"]
)
def test_usual_names_stay_as_they_are(name: str) -> None:
    assert file_name(name) == name
    check_name(name, "variables")


@pytest.mark.parametrize("key", ["variables", "segments"])
def test_a_name_that_leaves_its_folder_is_refused(key: str, tmp_path, capsys) -> None:
    path = catalog(tmp_path, train=dataset(steps=6))
    text = path.read_text()
    if key == "variables":
        text = text.replace("temperature: temperature", "../../x: temperature")
    else:
        text = text.replace("    train: {location", "    ../../x: {location")
        text = text.replace("segment: train", "segment: ../../x")
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{key}: .../../x. cannot be a name"):
        load_catalog(path)
    output = tmp_path / "a" / "b" / "maps"
    assert main(["data", "inspect", "waves", f"data.catalog={path}", f"output={output}"]) == 2
    assert "cannot be a name in a store" in capsys.readouterr().err
    store = tmp_path / "train.zarr"
    command = ["data", "ingest", f"input={store}", f"output={tmp_path}/out.zarr"]
    assert main([*command, "variables={../../x: temperature}"]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["catalog.yaml", "train.zarr"]


def test_markup_in_names_is_shown_as_it_is(tmp_path, capsys) -> None:
    """Rich takes [red] for a colour, matplotlib $x$ for a formula."""
    name = "[red]$\\frac{$<b>"
    store = dataset(variables=("temperature",), steps=6).rename(temperature=name)
    path = catalog(tmp_path, train=store.rename({name: "t"}))
    text = path.read_text().replace("{t: t}", f"{{'{name}': t}}")
    path.write_text(text)
    output = tmp_path / "maps [bold]"
    assert main(["data", "inspect", "waves", f"data.catalog={path}", f"output='{output}'"]) == 0
    printed = "".join(capsys.readouterr().out.split())
    assert name in printed and "maps[bold]" in printed
    (picture,) = output.iterdir()
    assert picture.name == f"{file_name(name)}.png"
