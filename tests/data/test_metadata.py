"""What a file says against what it is taken for is refused on every way in, and nothing else is."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from atmossl.cli import main
from atmossl.data.backends import open_store
from atmossl.data.catalog import CatalogEntry, SegmentEntry
from atmossl.data.ingest import ChunkLayout, IngestInput, Workers, ingest
from atmossl.data.inputs import open_input
from atmossl.data.inspect import advice, inspect, refusals
from atmossl.data.store import open_segment
from atmossl.data.variables import SHORT_NAMES, VARIABLES
from atmossl.data.windows import WindowSize
from atmossl.evaluation.forecasts import canonical_forecast, check_same_units
from tests.synthetic import dataset

Change = Callable[[xr.Dataset], xr.Dataset]
_G = 9.80665


def record(variable: str, **attributes: str) -> xr.Dataset:
    """A small record of one variable, on levels where such a variable lies on levels."""
    made = dataset(variables=("temperature",), steps=4, num_lat=4, num_lon=8)
    made = made.rename(temperature=variable)
    if variable.startswith(("2m_", "10m_", "sea_", "mean_", "surface_", "total_", "geopotential_")):
        made = made.isel(level=0, drop=True)
    made[variable].attrs = attributes
    return made


def axis(name: str, values=None, **attributes: str) -> Change:
    """Another coordinate along a dimension, or other attributes of the one that is there."""

    def change(data: xr.Dataset) -> xr.Dataset:
        new = data[name].values if values is None else values
        return data.assign_coords({name: (name, new, attributes)})

    return change


def scalar(name: str, value, **attributes: str) -> Change:
    return lambda data: data.assign_coords({name: ((), value, attributes)})


def beside(name: str, dims: tuple[str, ...], **attributes: str) -> Change:
    def change(data: xr.Dataset) -> xr.Dataset:
        shape = [data.sizes[dim] for dim in dims]
        return data.assign({name: (dims, np.ones(shape), attributes)})

    return change


def rotated(data: xr.Dataset) -> xr.Dataset:
    latitude, longitude = np.meshgrid(data["latitude"] * 0.9, data["longitude"], indexing="ij")
    dims = ("latitude", "longitude")
    return data.assign_coords(lat2=(dims, latitude, {"standard_name": "latitude"}),
                              lon2=(dims, longitude, {"standard_name": "longitude"}))  # fmt: skip


QUANTITIES = [
    ("geopotential", {"standard_name": "geopotential_height"}),
    ("geopotential", {"long_name": "Geopotential height"}),
    ("geopotential", {"units": "m2 s-2", "standard_name": "geopotential_height"}),
    ("geopotential_at_surface", {"standard_name": "surface_altitude"}),
    ("temperature", {"units": "K", "standard_name": "air_potential_temperature"}),
    ("temperature", {"units": "K", "standard_name": "dew_point_temperature"}),
    ("temperature", {"units": "K", "long_name": "Virtual temperature"}),
    ("temperature", {"units": "K", "long_name": "Temperature anomaly"}),
    ("temperature", {"units": "K", "cell_methods": "time: standard_deviation"}),
    ("temperature", {"units": "K", "cell_methods": "time: mean within years time: mean over years"}),  # noqa: E501
    ("temperature", {"units": "K", "grid_mapping": "rotated_pole"}),
    ("temperature", {"units": "K", "GRIB_gridType": "rotated_ll"}),
    ("temperature", {"units": "K", "GRIB_shortName": "q"}),
    ("2m_temperature", {"units": "K", "long_name": "2 metre dewpoint temperature"}),
    ("2m_temperature", {"units": "K", "long_name": "Skin temperature"}),
    ("2m_temperature", {"units": "K", "cell_methods": "area: mean time: maximum"}),
    ("sea_surface_temperature", {"units": "K", "long_name": "Daily SST anomaly"}),
    ("specific_humidity", {"units": "1", "standard_name": "relative_humidity"}),
    ("specific_humidity", {"units": "kg kg-1", "long_name": "Water vapor mixing ratio"}),
    ("u_component_of_wind", {"units": "m s-1", "standard_name": "wind_speed"}),
    ("u_component_of_wind", {"units": "m s-1", "standard_name": "northward_wind"}),
    ("u_component_of_wind", {"units": "m s-1", "standard_name": "grid_eastward_wind"}),
    ("u_component_of_wind", {"units": "m s-1", "standard_name": "x_wind"}),
    ("u_component_of_wind", {"units": "m s-1", "long_name": "Wind direction"}),
    ("total_precipitation", {"units": "m", "long_name": "Convective precipitation"}),
    ("u_component_of_wind", {"units": "m s-1", "long_name": "V component of wind"}),
    ("v_component_of_wind", {"units": "m s-1", "long_name": "Zonal wind"}),
    ("v_component_of_wind", {"units": "m s-1", "long_name": "Wind speed"}),
    ("vorticity", {"units": "s-1", "standard_name": "atmosphere_absolute_vorticity"}),
    ("surface_pressure", {"units": "Pa", "long_name": "Logarithm of surface pressure (log)"}),
    ("mean_sea_level_pressure", {"units": "Pa", "standard_name": "surface_air_pressure"}),
    ("total_precipitation", {"units": "m", "standard_name": "convective_precipitation_amount"}),
]  # fmt: skip
AXES: list[tuple[str, Change]] = [
    ("hybrid", axis("level", standard_name="atmosphere_hybrid_sigma_pressure_coordinate")),
    ("hybrid in hPa", axis("level", units="hPa", long_name="hybrid level at midpoints")),
    ("model levels", axis("level", standard_name="model_level_number", units="1")),
    ("numbers of levels", axis("level", np.arange(1, 4))),
    ("numbers from the ground", axis("level", np.arange(3)[::-1])),
    ("height", axis("level", np.array([300.0, 500.0, 850.0]), units="m")),
    ("altitude", axis("level", units="km", positive="up")),
    ("positive up", axis("level", positive="up")),
    ("depth", axis("level", long_name="depth below the surface", positive="down")),
    ("isentropes", axis("level", units="K", standard_name="air_potential_temperature")),
    ("formula", axis("level", formula_terms="a: hyam b: hybm ps: ps")),
    ("pressure of cells", beside("p", ("time", "level", "latitude", "longitude"),
                                 standard_name="air_pressure")),
    ("coefficients", beside("hyam", ("level",))),
    ("rotated latitude", axis("latitude", standard_name="grid_latitude", units="degrees")),
    ("projected", axis("longitude", standard_name="projection_x_coordinate", units="m")),
    ("metres", axis("latitude", units="m")),
    ("radians", axis("latitude", units="radian")),
    ("west", axis("longitude", units="degrees_west")),
    ("exchanged", axis("latitude", standard_name="longitude", units="degrees_east")),
    ("rotated pole", beside("crs", (), grid_mapping_name="rotated_latitude_longitude")),
    ("Paris", beside("crs", (), grid_mapping_name="latitude_longitude",
                     longitude_of_prime_meridian="2.337")),
    ("curvilinear", rotated),
    ("starts", axis("time", standard_name="forecast_reference_time")),
    ("starts by name", axis("time", long_name="initial time of forecast")),
]  # fmt: skip
STARTS: list[tuple[str, Change]] = [  # open refuses, ingest dates them by valid time
    ("lead", lambda d: scalar("step", np.timedelta64(6, "h"))(
        axis("time", standard_name="forecast_reference_time")(d))),
    ("hours", lambda d: scalar("forecast_period", 6.0, units="hours")(
        axis("time", standard_name="forecast_reference_time")(d))),
    ("unnamed", scalar("step", np.timedelta64(6, "h"))),
    ("valid beside", lambda d: axis("time", standard_name="forecast_reference_time")(d)
        .assign_coords(valid_time=("time", d["time"].values + np.timedelta64(6, "h")))),
]  # fmt: skip
SOUND: list[tuple[str, str, dict[str, str], Change]] = [
    ("plev", "temperature", {"standard_name": "air_temperature", "cell_methods": "time: mean"},
     axis("level", np.array([30000.0, 50000.0, 85000.0]), units="Pa", positive="down", axis="Z",
          standard_name="air_pressure", long_name="pressure")),
    ("GrADS", "temperature", {"long_name": "temperature [k]"},
     axis("level", units="millibar", long_name="altitude")),
    ("MERRA-2", "temperature", {"standard_name": "air_temperature"},
     axis("level", units="hPa", standard_name="PLE_level", long_name="vertical level")),
    ("kPa", "temperature", {}, axis("level", np.array([30.0, 50.0, 85.0]), units="kPa")),
    ("millibars", "geopotential", {"units": "m**2 s**-2", "standard_name": "geopotential"},
     axis("level", units="millibars", long_name="pressure_level")),
    ("UM", "u_component_of_wind", {"standard_name": "x_wind", "grid_mapping": "crs"},
     beside("crs", (), grid_mapping_name="latitude_longitude", longitude_of_prime_meridian="0")),
    ("wind", "v_component_of_wind", {"long_name": "V component of wind"}, lambda d: d),
    ("unknown", "2m_temperature", {"standard_name": "unknown", "long_name": "2 metre temperature"},
     scalar("height", 2.0, units="m")),
    ("screen", "2m_temperature", {"standard_name": "air_temperature"},
     scalar("height", 1.5, units="m")),
    ("SST", "sea_surface_temperature", {"standard_name": "sea_surface_foundation_temperature"},
     axis("time", standard_name="time", long_name="reference time of sst field")),
    ("analysis", "temperature", {}, lambda d: scalar("step", np.timedelta64(0, "h"))(
        axis("time", standard_name="forecast_reference_time")(d))),
    ("CF", "temperature", {}, lambda d: scalar("forecast_period", 6.0, units="hours")(
        axis("time", standard_name="time")(d))),
    ("lead times beside", "temperature", {}, lambda d: axis("time", standard_name="time")(d)
        .assign_coords(forecast_period=("time", [6.0, 12.0, 18.0, 24.0], {"units": "hours"}))),
    ("degrees", "temperature", {}, lambda d: axis("latitude", units="degreesN")(
        axis("longitude", units="degrees_east", long_name="longitude")(d))),
    ("CDO", "temperature", {}, axis("latitude", units="degrees_north", standard_name="latitude",
                                    long_name="latitude", axis="Y")),
    ("on pressure", "specific_humidity", {"long_name": "Specific humidity on pressure levels"},
     lambda d: d),
    ("both rains", "total_precipitation",
     {"long_name": "Large-scale precipitation plus convective precipitation"}, lambda d: d),
    ("direction", "u_component_of_wind",
     {"long_name": "Wind speed in the zonal direction (eastward)"}, lambda d: d),
    ("corrected", "2m_temperature", {"long_name": "bias-corrected temperature"}, lambda d: d),
    ("member", "temperature", {}, scalar("realization", 3, standard_name="realization")),
]  # fmt: skip


def ways(data: xr.Dataset, variable: str, folder: Path) -> dict[str, Callable[[], object]]:
    """All entrances of a record into the program."""
    path = folder / "in.nc"
    data.to_netcdf(path)
    entry = CatalogEntry(
        description="",
        segments={"a": SegmentEntry(location=str(path))},
        splits={},
        variables={variable: variable},
        licence="",
        citation="",
    )

    def inspected() -> None:
        (report,) = inspect(entry, WindowSize(2, 2, 2), samples=1)
        for line in refusals(report.variables[0], "here"):
            raise ValueError(line)

    opened = open_store(SegmentEntry(location=str(path)))
    named = {"variables": [variable], "levels": []}
    return {
        "Python": lambda: open_segment("a", data, "here", **named),
        "catalog": lambda: open_segment("a", opened, "here", **named),
        "ingest": lambda: open_input(str(path), {variable: variable}, {}, {}),
        "reference": lambda: canonical_forecast(data, "here"),
        "inspect": inspected,
    }


@pytest.mark.parametrize(("variable", "attributes"), QUANTITIES)
def test_another_quantity_is_refused_on_every_way_in(variable, attributes, tmp_path) -> None:
    data = record(variable, **attributes)
    if "grid_mapping" in attributes:
        data = beside("rotated_pole", (), grid_mapping_name="rotated_latitude_longitude")(data)
    for name, enter in ways(data, variable, tmp_path).items():
        with pytest.raises(ValueError, match=variable):
            enter()
            pytest.fail(f"{name} takes it")


@pytest.mark.parametrize("change", [change for _, change in AXES], ids=[name for name, _ in AXES])
def test_other_axes_are_refused_on_every_way_in(change: Change, tmp_path) -> None:
    data = change(record("temperature", units="K"))
    for name, enter in ways(data, "temperature", tmp_path).items():
        with pytest.raises(ValueError, match=r"level|geographic|start"):
            enter()
            pytest.fail(f"{name} takes it")


@pytest.mark.parametrize("change", [c for _, c in STARTS], ids=[name for name, _ in STARTS])
def test_starts_are_refused_or_dated_by_valid_time(change: Change, tmp_path) -> None:
    data = change(record("temperature", units="K"))
    for name, enter in ways(data, "temperature", tmp_path).items():
        if name != "ingest":
            with pytest.raises(ValueError, match=r"atmossl data ingest"):
                enter()
            continue
        found = enter()
        assert isinstance(found, xr.Dataset)
        expected = data["time"].values + np.timedelta64(6, "h")
        np.testing.assert_array_equal(found["time"].values, expected)


@pytest.mark.parametrize(
    ("variable", "attributes", "change"), [case[1:] for case in SOUND], ids=[c[0] for c in SOUND]
)
def test_what_says_nothing_else_is_taken_as_it_is(variable, attributes, change, tmp_path) -> None:
    data = change(record(variable, **attributes))
    for enter in ways(data, variable, tmp_path).values():
        enter()
    found = open_input(str(tmp_path / "in.nc"), {variable: variable}, {}, {})
    np.testing.assert_array_equal(found["time"], data["time"])
    if "level" in data.dims:
        assert found["level"].values.tolist() == [300, 500, 850]


def test_every_variable_with_its_own_names_is_taken() -> None:
    """As this program and the files of the CDS name them."""
    for variable, known in VARIABLES.items():
        data = record(
            variable,
            units=known.units,
            standard_name=known.standard_name,
            long_name=known.long_name,
        )
        if "level" in data.dims and variable not in list(SHORT_NAMES.values())[:8]:
            data = data.isel(level=0, drop=True)
        open_segment("a", data, "here", variables=[variable], levels=[])


@pytest.mark.parametrize(
    ("attributes", "factor"),
    [
        ({"standard_name": "geopotential_height", "units": "m"}, _G),
        ({"long_name": "geopotential height", "units": "gpm"}, _G),
        ({"units": "gpm"}, _G),
        ({"units": "gpdm"}, 10 * _G),
        ({"standard_name": "geopotential_height", "units": "dam"}, 10 * _G),
        ({"standard_name": "geopotential_height", "units": "km"}, 1000 * _G),
    ],
)
def test_a_certain_height_becomes_geopotential(attributes, factor, tmp_path, caplog) -> None:
    data = record("geopotential", **attributes)
    enter = ways(data, "geopotential", tmp_path)
    for name in ("Python", "catalog", "inspect"):
        with pytest.raises(ValueError, match="geopotential"):
            enter[name]()
    for name in ("ingest", "reference"):
        found = enter[name]()
        assert isinstance(found, xr.Dataset)
        expected = data["geopotential"].astype(np.float64) * factor
        np.testing.assert_allclose(found["geopotential"].values, expected.values, rtol=1e-12)
        assert found["geopotential"].attrs["units"] == "m2 s-2"
        assert found["geopotential"].attrs["standard_name"] == "geopotential"
    lines: list[str] = [line for line in caplog.messages if line.startswith("here: ")]
    open_input(str(tmp_path / "in.nc"), {}, {}, {}, lines.append)
    assert len(lines) == 2
    assert all("geopotential is geopotential height times 9.80665" in line for line in lines)


def test_a_height_without_units_is_refused_by_the_command(tmp_path, capsys) -> None:
    record("geopotential", standard_name="geopotential_height").to_netcdf(tmp_path / "z.nc")
    command = ["data", "ingest", f"input={tmp_path}/z.nc", f"output={tmp_path}/z.zarr"]
    assert main(command) == 2 and not (tmp_path / "z.zarr").exists()
    assert "standard_name 'geopotential_height'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [("realization", 0, 1), ("number", 0, 1), ("height", 2.0, 1.5)],
)
def test_files_of_different_members_are_no_record(name, first, second, tmp_path) -> None:
    """But files of different variables may say different things of each."""
    data = record("2m_temperature", units="K")
    for number, (value, steps) in enumerate(((first, slice(0, 2)), (second, slice(2, 4)))):
        scalar(name, value)(data.isel(time=steps)).to_netcdf(tmp_path / f"{number}.nc")
    with pytest.raises(ValueError, match=rf"2m_temperature has {name}"):
        open_input(str(tmp_path), {}, {}, {})
    opened = open_store(SegmentEntry(location=str(tmp_path)))
    with pytest.raises(ValueError, match=rf"2m_temperature has {name}"):
        open_segment("a", opened, "here", variables=["2m_temperature"], levels=[])


def test_each_variable_of_a_folder_has_its_own_height(tmp_path) -> None:
    for name, height in (("2m_temperature", 2.0), ("10m_u_component_of_wind", 10.0)):
        data = scalar("height", height)(record(name, units=VARIABLES[name].units))
        data.to_netcdf(tmp_path / f"{name}.nc")
    names = ["2m_temperature", "10m_u_component_of_wind"]
    assert set(open_input(str(tmp_path), {}, {}, {}).data_vars) == set(names)
    opened = open_store(SegmentEntry(location=str(tmp_path)))
    open_segment("a", opened, "here", variables=names, levels=[])
    wrong = scalar("height", 100.0)(record(names[1], units="m s-1"))
    with pytest.raises(ValueError, match=r"10m_u_component_of_wind lies at height=100 m"):
        open_segment("a", wrong, "here", variables=names[1:], levels=[])


def test_dimensions_are_recognised_by_what_they_say(tmp_path, capsys) -> None:
    """cdo's `lev` in Pa, the `date` of monthly means of the CDS, and axes with odd names."""
    data = record("temperature", units="K")
    pascal = axis("level", np.array([3e4, 5e4, 8.5e4]), units="Pa", axis="Z", long_name="pressure")
    dates = axis("time", np.array([20200101, 20200201, 20200301, 20200401]))
    odd = axis("latitude", units="degrees_north")(axis("longitude", units="degrees_east")(data))
    cases = [
        (pascal(data).rename(level="lev"), data["time"].values),
        (dates(data).rename(time="date"), np.arange("2020-01", "2020-05", dtype="M8[M]")),
        (odd.rename(latitude="nlat", longitude="nlon", time="T"), data["time"].values),
        (axis("time", np.array([20200101.25, 20200101.5, 20200101.75, 20200102.0]),
              units="day as %Y%m%d.%f")(data),
         np.datetime64("2020-01-01T06") + np.arange(4) * np.timedelta64(6, "h")),
    ]  # fmt: skip
    for number, (case, times) in enumerate(cases):
        case.to_netcdf(tmp_path / f"{number}.nc")
        found = open_input(str(tmp_path / f"{number}.nc"), {}, {}, {})
        np.testing.assert_array_equal(found["time"].values, times.astype("M8[ns]"))
        assert found["level"].values.tolist() == [300, 500, 850]
        np.testing.assert_array_equal(found["temperature"].values, data["temperature"].values)
    path = tmp_path / "named.nc"
    data.rename(level="p", latitude="row").to_netcdf(path)
    command = ["data", "ingest", f"input={path}", f"output={tmp_path}/out.zarr"]
    assert main(command) == 2 and "coordinates.latitude=NAME" in capsys.readouterr().err
    assert main([*command, "coordinates.latitude=row"]) == 2
    assert "coordinates.level=p" in capsys.readouterr().err
    assert main([*command, "coordinates.latitude=row", "coordinates.level=p"]) == 0


def test_no_advice_leads_into_the_fault() -> None:
    data = record("temperature", units="K")
    rotated_dims = axis("latitude", standard_name="grid_latitude", units="degrees")(data)
    starts = axis("time", standard_name="forecast_reference_time")(data)
    for case, given in ((rotated_dims.rename(latitude="rlat"), {"latitude": "rlat"}),
                        (starts.rename(time="init_time"), {"time": "init_time"})):  # fmt: skip
        for coordinates in ({}, given):
            with pytest.raises(ValueError, match=r"geographic|starts? of forecasts") as refused:
                open_segment("a", case, "here", variables=["temperature"], levels=[],
                             coordinates=coordinates)  # fmt: skip
            assert "coordinates." not in str(refused.value)


def test_means_over_time_are_told_and_not_compared_with_values(tmp_path) -> None:
    mean = record("temperature", units="K", cell_methods="area: mean time: mean")
    point = record("temperature", units="K", cell_methods="time: point")
    path = tmp_path / "in.nc"
    mean.to_netcdf(path)
    entry = CatalogEntry(description="", segments={"a": SegmentEntry(location=str(path))},
                         splits={}, variables={"temperature": "temperature"}, licence="",
                         citation="")  # fmt: skip
    (report,) = inspect(entry, WindowSize(2, 2, 2), samples=1)
    assert any(
        "means over time" in line for line in advice(report.variables[0], WindowSize(2, 2, 2))
    )
    check_same_units({"theirs": mean}, mean)
    check_same_units({"theirs": record("temperature", units="K")}, mean)
    with pytest.raises(ValueError, match="theirs: temperature has cell_methods"):
        check_same_units({"theirs": point}, mean)
    ingest(IngestInput(str(path)), tmp_path / "out.zarr", ChunkLayout(2, 0, 0, 0, 0, 1),
           Workers("threads", 1), max)  # fmt: skip
    assert "time: mean" in xr.open_zarr(tmp_path / "out.zarr").temperature.cell_methods


def test_named_dimensions_need_not_be_those_of_every_variable(tmp_path) -> None:
    """A field at the surface and one without time beside one on levels."""
    air = record("temperature", units="K").rename(level="p", time="T")
    orography = record("geopotential_at_surface", units="m2 s-2").isel(time=0, drop=True)
    surface = record("2m_temperature", units="K").rename(time="T")
    xr.merge([air, surface, orography], compat="override").to_netcdf(tmp_path / "in.nc")
    names = {"level": "p", "time": "T"}
    found = open_input(str(tmp_path / "in.nc"), {}, {}, {}, coordinates=names)
    assert found["temperature"].dims == ("time", "level", "latitude", "longitude")
    assert found["2m_temperature"].dims == ("time", "latitude", "longitude")
    assert found["geopotential_at_surface"].dims == ("latitude", "longitude")


def test_files_that_say_less_or_the_same_in_other_words_join(tmp_path) -> None:
    data = record("temperature", units="K", cell_methods="time: mean")
    says = [{"standard_name": "air_temperature", "cell_methods": "time: mean (interval: 1 hour)"},
            {"cell_methods": "time: mean"}]  # fmt: skip
    for number, (attributes, steps) in enumerate(
        zip(says, (slice(0, 2), slice(2, 4)), strict=True)
    ):
        part = data.isel(time=steps)
        part["temperature"].attrs = {"units": "K", **attributes}
        scalar("depth", np.nan)(part).to_netcdf(tmp_path / f"{number}.nc")
    assert open_input(str(tmp_path), {}, {}, {}).sizes["time"] == 4
    opened = open_store(SegmentEntry(location=str(tmp_path)))
    open_segment("a", opened, "here", variables=["temperature"], levels=[])
    other = tmp_path / "other"
    other.mkdir()
    for number, methods in enumerate(("time: mean", "time: point")):
        data["temperature"].attrs["cell_methods"] = methods
        data.isel(time=[2 * number, 2 * number + 1]).to_netcdf(other / f"{number}.nc")
    with pytest.raises(ValueError, match=r"temperature has cell_methods 'time: point' in 1\.nc"):
        open_input(str(other), {}, {}, {})
