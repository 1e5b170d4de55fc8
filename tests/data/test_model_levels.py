"""Numbers of model levels: their pressures, from GRIB to a store, and what a network is told."""

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from atmossl.batch import StreamSpec, TokenSize
from atmossl.cli import main
from atmossl.data.catalog import catalog_entry
from atmossl.data.inputs import open_input
from atmossl.data.store import open_split
from atmossl.data.windows import Normaliser, Statistics, read_window
from atmossl.geometry import Box
from atmossl.masking.combined import Counterfactual
from atmossl.masking.tasks import Forecast
from atmossl.model_levels import L137_HPA, standard_pressure
from tests.data.test_grib import FIELD, message

LEVELS = (96, 105, 114, 123, 137)
# a (Pa) and b of the half levels above and below each of them, from ECMWF's definition of L137
HALF_LEVELS = {
    96: ((18489.707, 0.308598), (18006.9258, 0.332939)),
    105: ((12668.2578, 0.549301), (11901.3398, 0.576692)),
    114: ((6168.53125, 0.770798), (5564.38281, 0.790717)),
    123: ((1961.5, 0.911448), (1659.47656, 0.922096)),
    137: ((0.0, 0.99763), (0.0, 1.0)),
}
SURFACE_PA = 101325.0


@pytest.mark.parametrize("level", LEVELS)
def test_pressure_of_a_level_is_the_mean_of_its_half_levels(level: int) -> None:
    half = [a + b * SURFACE_PA for a, b in HALF_LEVELS[level]]
    assert standard_pressure(level) == pytest.approx(np.mean(half) / 100, abs=1e-3)


def test_pressures_grow_downwards_and_none_is_a_whole_number() -> None:
    assert len(L137_HPA) == 137 and (np.diff(L137_HPA) > 0).all()
    assert all(pressure != int(pressure) for pressure in L137_HPA)
    for number in (0, 138, 12.5):
        with pytest.raises(ValueError, match="1 to 137"):
            standard_pressure(number)


def write_grib(path: Path, edition: int, days: int = 2) -> None:
    """Days of temperature on all levels, from the lowest upwards; values tell day and level."""
    messages = [
        message(
            FIELD + day + level / 100,
            {"shortName": "t", "typeOfLevel": "hybrid", "level": level,
             "dataDate": 20200101 + day},
            f"regular_ll_pl_grib{edition}",
        )
        for day in range(days)
        for level in reversed(LEVELS)
    ]  # fmt: skip
    path.write_bytes(b"".join(messages))


@pytest.mark.parametrize("edition", [1, 2])
def test_grib_on_hybrid_levels_becomes_a_store_of_model_levels(
    tmp_path: Path, edition: int
) -> None:
    write_grib(tmp_path / "in.grib", edition, days=31)
    output = tmp_path / "era5.zarr"
    arguments = [f"input={tmp_path / 'in.grib'}", f"output={output}", "levels_are=model"]
    assert main(["data", "ingest", *arguments, "levels=[105,137,96]"]) == 0
    store = xr.open_zarr(output)
    assert store["level"].attrs["standard_name"] == "model_level_number"
    for level in (96, 105, 137):
        for day in range(2):
            own = store["temperature"].sel(level=level, longitude=[340, 350, 0, 10, 20])
            ordered = own.isel(time=day, latitude=slice(None, None, -1))
            np.testing.assert_allclose(ordered, FIELD + day + level / 100, atol=1e-4)
    assert main(["data", "add", str(output), "name=ml", f"data.catalog={tmp_path / 'c.yaml'}"]) == 0
    assert catalog_entry("ml", tmp_path / "c.yaml").levels_are == "model"


def test_hybrid_levels_are_refused_where_pressures_are_wanted(tmp_path: Path, capsys) -> None:
    write_grib(tmp_path / "in.grib", 2)
    arguments = [f"input={tmp_path / 'in.grib'}", f"output={tmp_path / 'out.zarr'}"]
    assert main(["data", "ingest", *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert "hybrid" in said and "levels_are=model" in said and "\n" not in said


def test_levels_that_are_no_numbers_of_l137_are_refused(tmp_path: Path, capsys) -> None:
    data = xr.Dataset(
        {"temperature": (("time", "level", "latitude", "longitude"), np.full((2, 2, 3, 4), 250.0))},
        {"time": np.array(["2020-01-01", "2020-01-02"], "M8[ns]"), "level": [137, 500],
         "latitude": [10.0, 20.0, 30.0], "longitude": [0.0, 10.0, 20.0, 30.0]},
    )  # fmt: skip
    data.to_netcdf(tmp_path / "in.nc")
    arguments = [f"input={tmp_path / 'in.nc'}", f"output={tmp_path / 'out.zarr'}"]
    assert main(["data", "ingest", *arguments, "levels_are=model"]) == 2
    assert "levels 500 are no numbers of model levels" in capsys.readouterr().err


def test_single_level_of_a_file_is_a_model_level(tmp_path: Path) -> None:
    path = tmp_path / "in.grib"
    keys = {"shortName": "t", "typeOfLevel": "hybrid", "level": 137}
    path.write_bytes(message(FIELD, keys) + message(FIELD, keys | {"dataDate": 20200102}))
    found = open_input(str(path), {}, {}, {}, pressure_levels=False)
    assert found["temperature"].dims[1] == "level" and found["level"].values.tolist() == [137]


def store_of_levels(folder: Path, levels_are: str) -> Path:
    from tests.synthetic import catalog, dataset

    data = dataset(levels=(123, 137), start="2004-03-01", step_hours=1)
    path = catalog(folder, train=data, validation=data, test=data)
    text = path.read_text().replace("  levels:", f"  levels_are: {levels_are}\n  levels:", 1)
    path.write_text(text)
    return path


@pytest.mark.parametrize("levels_are", ["model", "pressure"])
def test_networks_are_told_the_standard_pressure_of_model_levels(
    tmp_path: Path, levels_are: str
) -> None:
    entry = catalog_entry("waves", store_of_levels(tmp_path, levels_are))
    (segment,) = open_split(entry, "train", variables=("temperature",), levels=(123, 137))
    spec = StreamSpec("t", ("temperature",), (123, 137), TokenSize(1, 2, 2))
    normaliser = Normaliser({"primary": Statistics.neutral(segment)})
    windows = read_window(segment, [spec], normaliser, 0, 2, Box(0, 0, 4, 4))
    expected = [123.0, 137.0] if levels_are == "pressure" else [947.024, 1012.0494]
    torch.testing.assert_close(windows[0].level_hpa, torch.tensor(expected))
    task = Counterfactual(Forecast(lead_hours=1.0), levels=((137, 96),))
    (told,) = task.change_coordinates(windows)
    expected[1] = 96.0 if levels_are == "pressure" else 507.5021
    torch.testing.assert_close(told.level_hpa, torch.tensor(expected))
