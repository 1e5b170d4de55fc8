"""What `atmossl data inspect` finds in stores whose faults are known."""

import numpy as np
import pytest
import xarray as xr

from atmossl.cli import main
from atmossl.data.catalog import load_catalog
from atmossl.data.field_map import map_of
from atmossl.data.inspect import advice, inspect, refusals, time_axis
from atmossl.data.windows import WindowSize
from tests.synthetic import catalog, dataset


def test_gaps_and_duplicates_are_found() -> None:
    hours = np.array([0, 6, 12, 30, 36, 36, 42, 54])
    times = np.datetime64("2000-02-28", "ns") + hours * np.timedelta64(1, "h")
    axis = time_axis(times)
    assert (axis.step_hours, axis.num_steps, axis.ascending) == (6.0, 8, False)
    assert [(str(t)[:13], n) for t, n in axis.gaps] == [("2000-02-28T12", 2), ("2000-02-29T18", 1)]
    assert [str(t)[:13] for t in axis.duplicates] == ["2000-02-29T12"]
    assert time_axis(times[:3]).ascending


def test_values_limits_and_the_cost_of_windows(tmp_path) -> None:
    store = dataset(steps=24)
    store["temperature"][:, 0, 2, 3] = np.nan
    store["u_component_of_wind"] = store["u_component_of_wind"] + 1000.0
    path = catalog(tmp_path, train=store)
    (report,) = inspect(load_catalog(path)["waves"], WindowSize(6, 4, 4), samples=24)
    temperature, wind = report.variables
    assert temperature.missing == pytest.approx(1 / (3 * 8 * 16))
    assert temperature.minimum == pytest.approx(np.nanmin(store["temperature"]))
    assert not wind.within_limits and wind.maximum == store["u_component_of_wind"].max()
    # xarray's chunk is the whole array here: everything is decoded for any window
    assert wind.decoded_over_needed["time"] == pytest.approx(24 / 6)
    lines = advice(wind, WindowSize(6, 4, 4))
    assert any("along time decode 4.0 times" in line for line in lines)


def test_decoded_over_needed_is_the_mean_over_all_offsets(tmp_path) -> None:
    store = dataset(steps=48)
    for array in store.data_vars.values():
        array.encoding["chunks"] = (5, 3, 8, 16)
    path = catalog(tmp_path, train=store)
    (report,) = inspect(load_catalog(path)["waves"], WindowSize(6, 0, 0), samples=1)
    counts = [len({step // 5 for step in range(start, start + 6)}) for start in range(40)]
    assert report.variables[0].decoded_over_needed["time"] == pytest.approx(np.mean(counts) * 5 / 6)


@pytest.mark.parametrize("calendar", ["standard", "noleap"])
def test_the_report_fits_eighty_columns(tmp_path, capsys, monkeypatch, calendar: str) -> None:
    """Nothing is cut off, and gaps, duplicates and limits come with advice."""
    names = ["toa_incident_solar_radiation", "specific_cloud_liquid_water_content", "temperature"]
    store = dataset(variables=("temperature",), steps=12)
    store = xr.Dataset({name: store["temperature"] + 400.0 * (name == names[2]) for name in names})
    dates = xr.date_range("2000-02-27", periods=20, freq="6h", calendar=calendar)
    store = store.assign_coords(time=dates[[0, 1, 2, 5, 6, 6, 7, 8, 9, 13, 14, 15]])
    path = catalog(tmp_path, train=store)
    monkeypatch.setenv("COLUMNS", "80")
    assert (
        main(["data", "inspect", "waves", f"data.catalog={path}", f"output={tmp_path}/maps"]) == 0
    )
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    for name in (*names, "OUTSIDE", "chunks: 12 x 3 x 8 x 16", "levels: 300, 500, 850"):
        assert any(name in line for line in lines), (name, printed)
    assert "…" not in printed
    assert "gap: 2 steps after 2000-02-27T12" in printed and "duplicate: 2000-02-28T12" in printed
    assert "on the 3 unbroken parts, of which the longest has 5 steps" in " ".join(printed.split())
    assert ("calendar noleap" in printed) == (calendar == "noleap")


@pytest.mark.parametrize("shards", [None, (4, 3, 8, 16)])
def test_lost_chunks_are_counted(tmp_path, shards) -> None:
    store = dataset(steps=8)
    for array in store.data_vars.values():
        array.encoding = {"chunks": (2, 3, 8, 16), "shards": shards}
    path = catalog(tmp_path, train=store)
    folder = tmp_path / "train.zarr" / "temperature" / "c"
    (folder / "1" / "0" / "0" / "0").unlink()
    (report,) = inspect(load_catalog(path)["waves"], WindowSize(2, 0, 0), samples=1)
    temperature, wind = report.variables
    (line,) = advice(temperature, WindowSize(2, 0, 0))
    assert f": {2 if shards else 1} chunks are not there and read as nan" in line
    assert not advice(wind, WindowSize(2, 0, 0))


def test_what_training_will_refuse_is_told(tmp_path) -> None:
    store = dataset(steps=6)
    store["temperature"].attrs["units"] = "degC"
    wind = store["u_component_of_wind"].expand_dims(member=2) * np.nan
    store["u_component_of_wind"] = wind.assign_attrs(units="m s-1")
    path = catalog(tmp_path, train=store)
    (report,) = inspect(load_catalog(path)["waves"], WindowSize(6, 0, 0), samples=1)
    temperature, wind = report.variables
    (line,) = refusals(temperature, "here")
    assert line.startswith("training refuses here: variable temperature has units degC")
    (line,) = refusals(wind, "here")
    assert "further dimensions member;" in line
    assert temperature.has_values and not wind.has_values
    store.isel(time=slice(0, 0)).to_zarr(tmp_path / "train.zarr", mode="w", consolidated=False)
    with pytest.raises(ValueError, match=r"train.zarr: its time axis is empty"):
        inspect(load_catalog(path)["waves"], WindowSize(6, 0, 0), samples=1)


def test_the_command_prints_and_draws(tmp_path, capsys) -> None:
    path = catalog(tmp_path, train=dataset(steps=6))
    output = tmp_path / "maps"
    command = ["data", "inspect", "waves", f"data.catalog={path}", f"output={output}"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "6 steps of 6 h" in printed and "temperature" in printed
    assert sorted(p.name for p in output.iterdir()) == [
        "temperature.png",
        "u_component_of_wind.png",
    ]
    assert main(["data", "inspect"]) == 2
    assert main([*command[:-1], f"output={path}"]) == 2
    assert f"output={path} cannot be written: Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("west", [-20.0, 160.0, 0.0])
def test_the_map_of_a_region_goes_from_west_to_east(tmp_path, west: float) -> None:
    longitude = np.sort((west + 5.0 * np.arange(9)) % 360.0)
    store = dataset(variables=("temperature",), steps=3, num_lon=9)
    store = store.assign_coords(longitude=longitude)
    path = catalog(tmp_path, train=store)
    (report,) = inspect(load_catalog(path)["waves"], WindowSize(2, 2, 2), samples=1)
    axes = map_of(report.variables[0]).axes[0]
    edges = axes.collections[0].get_coordinates()[0, :, 0]
    np.testing.assert_allclose(np.diff(edges), 5.0, atol=1e-6)
    assert np.ptp(axes.get_xlim()) < 60.0
