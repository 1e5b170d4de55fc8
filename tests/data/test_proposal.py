"""A catalog entry for a store that nobody has described, and commands on that store."""

import re
from pathlib import Path

import numpy as np
import pytest

from atmossl.api import find_task, open_data
from atmossl.batch import StreamSpec
from atmossl.build import build_data
from atmossl.cli import main
from atmossl.composition import compose_config, compose_training
from atmossl.data.catalog import OWN_CATALOG, catalog_entry, load_catalog
from atmossl.data.proposal import propose
from atmossl.data.store import open_split
from atmossl.masking.tasks import Forecast
from atmossl.schema import TrainConfig, parse
from tests.synthetic import dataset

NAMES = {"temperature": "t", "u_component_of_wind": "ua", "specific_humidity": "Q"}


def foreign(folder: Path, *, steps: int = 120, step_hours: int = 6, **grid: int) -> Path:
    """NetCDF files as others write them: short names, dimensions, north first, several files."""
    store = dataset(variables=tuple(NAMES), steps=steps, step_hours=step_hours, **grid)
    store["specific_humidity"] = abs(store["specific_humidity"]).assign_attrs(units="kg kg-1")
    store["u_component_of_wind"].attrs["standard_name"] = "eastward_wind"
    near_surface = store["temperature"].isel(level=0, drop=True)
    store["t2m"] = near_surface.assign_attrs(units="K")
    store["z"] = store["temperature"].assign_attrs(units="furlong")
    store["orog"] = near_surface.isel(time=0, drop=True).assign_attrs(units="m")
    short = {"latitude": "lat", "longitude": "lon", "level": "plev", "time": "valid_time"}
    store = store.rename({**NAMES, **short})
    store["plev"].attrs["units"] = "hPa"
    store = store.isel(lat=slice(None, None, -1))
    folder.mkdir()
    half = steps // 2
    for number, part in enumerate((slice(None, half), slice(half, None))):
        store.isel(valid_time=part).to_netcdf(folder / f"part_{number}.nc")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign(tmp_path_factory.mktemp("foreign") / "era5")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    return tmp_path


@pytest.mark.usefixtures("here")
def test_one_command_makes_an_entry_that_training_takes(files, capsys) -> None:
    assert main(["data", "add", str(files), "name=mine"]) == 0
    told = capsys.readouterr().out
    assert "atmossl train data=mine paths.output=runs/mine" in told
    *_, last_doubt, following = told.splitlines()
    assert last_doubt.startswith("left out: variable geopotential has units furlong")
    assert following.startswith("next: ")
    entry = catalog_entry("mine")
    assert entry.variables == {**NAMES, "2m_temperature": "t2m", "orog": "orog"}
    assert entry.levels == (300, 500, 850) and entry.training is not None
    assert Path(entry.segments["record"].location).is_absolute()
    values = compose_config("train", ["data=mine"])
    assert values["data"]["window"] == entry.training.window
    assert list(values["stream"]) == ["atmosphere", "surface"]
    assert main(["config", "validate", "data=mine"]) == 0
    assert main(["data", "list"]) == 0
    assert "mine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("levels", "aloft", "doubted"),
    [
        ((114, 123, 137), 280.0, True),
        ((100, 125, 137), 215.0, False),
        ((100, 101, 102), 215.0, True),  # neighbours
        ((1, 2, 3), 280.0, False),  # usual pressures at the stratopause
        ((300, 500, 850), 280.0, False),
    ],
)
def test_levels_that_may_be_numbers_of_model_levels_are_told(
    tmp_path: Path, levels: tuple[int, ...], aloft: float, doubted: bool
) -> None:
    store = dataset(levels=levels, variables=("temperature",), steps=60, step_hours=6)
    store["temperature"] = store["temperature"] * 0 + np.float32(aloft)
    store["level"].attrs.clear()
    store.to_netcdf(tmp_path / "record.nc")
    doubts = " ".join(propose(str(tmp_path / "record.nc")).doubts)
    assert ("`levels_are: model`" in doubts) == doubted


def test_splits_follow_each_other_and_hold_every_step_once(files) -> None:
    entry = propose(str(files)).entry
    parts = [
        open_split(entry, split, variables=["temperature"], levels=[500])[0].times
        for split in ("train", "validation", "test")
    ]
    every_step = np.datetime64("2001-01-01", "ns") + np.arange(120) * np.timedelta64(6, "h")
    np.testing.assert_array_equal(np.concatenate(parts), every_step)
    assert entry.training is not None
    assert min(map(len, parts)) >= 2 * entry.training.window["time"]


@pytest.mark.parametrize(
    ("step_hours", "num_lat", "num_lon"), [(1, 20, 36), (3, 9, 16), (6, 37, 72), (24, 8, 16)]
)
def test_the_window_is_a_whole_number_of_tokens(
    step_hours: int, num_lat: int, num_lon: int, tmp_path: Path
) -> None:
    path = tmp_path / "store.zarr"
    store = dataset(step_hours=step_hours, num_lat=num_lat, num_lon=num_lon, steps=250)
    store.to_zarr(path, consolidated=False)
    training = propose(str(path)).entry.training
    assert training is not None
    window = training.window
    assert window["lat"] <= num_lat and window["lon"] <= num_lon
    for name, keys in training.stream.items():
        StreamSpec.token_shape(_spec(name, keys), window["time"], window["lat"], window["lon"])


@pytest.mark.parametrize(("step_hours", "lead", "hidden"), [(12, None, "12h"), (24, "48h", "24h")])
def test_long_steps_have_masks_and_tasks_of_whole_steps(
    step_hours: int, lead: str | None, hidden: str, here: Path, capsys, monkeypatch
) -> None:
    """Training reads a sample under every mask and task; predict says which durations are valid."""
    monkeypatch.setenv("ATMOSSL_CACHE", str(here / "cache"))
    store = foreign(here / "era5", step_hours=step_hours)
    assert main(["data", "add", str(store)]) == 0
    told = capsys.readouterr().out
    assert f"tasks.1.hidden_time={hidden}" in told
    choices = dict(re.findall(r" task\.(\w+)=(\w+)", told))
    find_task("forecast", choices).plan(5, step_hours)  # fits, as it is told for predict
    training = catalog_entry("era5").training
    assert training is not None and (training.lead_time, training.hidden_time) == (lead, hidden)
    config = parse(TrainConfig, compose_training(["data=era5"])[0])
    build_data(config)
    values = compose_training(["data=era5", "masking=bert", "tasks=forecast"])[0]
    assert values["tasks"][0]["lead_time"] == "12h"
    with pytest.raises(ValueError, match=f"lead_time=6 h is no .*; valid: {step_hours}h, "):
        Forecast(6).plan(5, step_hours)


@pytest.mark.usefixtures("here")
def test_months_are_refused_in_one_line(tmp_path: Path, capsys) -> None:
    months = np.arange("2001-01", "2006-01", dtype="datetime64[M]").astype("datetime64[ns]")
    dataset(steps=60).assign_coords(time=months).to_netcdf(tmp_path / "monthly.nc")
    assert main(["data", "add", "monthly.nc"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "monthly.nc: " in line and "Resample to even steps first" in line


def _spec(name: str, keys: dict) -> StreamSpec:
    from pydantic import TypeAdapter

    return TypeAdapter(StreamSpec).validate_python({**keys, "name": name})


@pytest.mark.usefixtures("here")
def test_what_the_command_line_says_comes_before_what_fits_the_store(files) -> None:
    words = [f"data={files}", "data.window.lat=4", "stream.surface.role=input"]
    values = compose_config("train", words)
    assert values["data"]["window"]["lat"] == 4
    assert values["stream"]["surface"]["role"] == "input"
    assert list(compose_config("train", [f"data={files}", "stream=atmosphere"])["stream"]) == [
        "atmosphere"
    ]
    assert compose_config("train", [f"data={files}", "experiment=quickstart"])["stream"][
        "atmosphere"
    ]["levels"] == [300, 500, 850]


def test_a_path_is_as_good_as_a_name(files, here, capsys) -> None:
    assert main(["config", "validate", f"data={files}/*.nc"]) == 0
    assert set(open_data(str(files)).data_vars) == {*NAMES, "2m_temperature", "orog"}
    assert main(["config", "validate", "data=no/such.zarr"]) == 2
    assert "no/such.zarr does not exist" in capsys.readouterr().err
    assert list(here.iterdir()) == []


@pytest.mark.usefixtures("here")
def test_an_entry_is_never_written_over(files, capsys) -> None:
    for name in ("mine", "other"):
        assert main(["data", "add", str(files), f"name={name}"]) == 0
    before = OWN_CATALOG.read_bytes()
    for name in ("mine", "sample"):
        assert main(["data", "add", str(files), f"name={name}"]) == 2
        assert f"name={name} is an entry of the catalog already" in capsys.readouterr().err
    assert OWN_CATALOG.read_bytes() == before
    assert {"mine", "other", "sample"} <= set(load_catalog())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "needed: one STORE"),
        (("a.nc", "b.nc"), "pattern in quotes"),
        (("nowhere.zarr",), "nowhere.zarr does not exist"),
        (("nam=x", "nowhere.zarr"), "nam=x is unknown"),
        (("nowhere.zarr", "name=a/b"), "name: 'a/b'"),
    ],
)
@pytest.mark.usefixtures("here")
def test_wrong_words_are_one_line(words, message: str, capsys) -> None:
    assert main(["data", "add", *words]) == 2
    assert message in capsys.readouterr().err
    assert not OWN_CATALOG.exists()


def test_a_store_that_is_too_short_is_refused(tmp_path) -> None:
    dataset(steps=12).to_zarr(tmp_path / "short.zarr", consolidated=False)
    with pytest.raises(ValueError, match="12 time steps are too few .* at least 30"):
        propose(str(tmp_path / "short.zarr"))


def test_missing_values_and_gaps_have_their_settings(tmp_path) -> None:
    store = dataset(steps=80).drop_isel(time=30)
    store["temperature"][0, 0, 0, 0] = np.nan
    store.to_zarr(tmp_path / "gappy.zarr", consolidated=False)
    entry = propose(str(tmp_path / "gappy.zarr")).entry
    assert entry.gaps == "split" and entry.training is not None
    missing = {name: keys["missing"] for name, keys in entry.training.stream.items()}
    assert missing == {"atmosphere_with_gaps": "mask", "atmosphere": "refuse"}


def test_several_zarr_stores_are_made_one_by_the_line_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("temperature", "u_component_of_wind")
    for name in names:
        dataset(variables=(name,), steps=60).to_zarr(f"stores/{name}.zarr", consolidated=True)
    stores = [f"stores/{name}.zarr" for name in names]
    for words in (stores, ["stores"], ["stores/*.zarr"]):
        assert main(["data", "add", *words, "name=mine"]) == 2
        line = capsys.readouterr().err
        assert f"{', '.join(stores)}: 2 zarr stores; needed: one" in line and line.count("\n") == 1
    code = line.partition("in Python: ")[2].strip().replace("STORES", str(stores))
    exec(code)
    assert main(["data", "add", "all.zarr", "name=mine"]) == 0
    assert set(catalog_entry("mine", None).variables) == set(names)
    assert main(["data", "add", stores[0], "name=first"]) == 0
