"""Inputs whose units and names are not ours, and files that others wrote."""

import os
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import xarray as xr

from atmossl.cli import main
from atmossl.data.backends import open_store
from atmossl.data.catalog import SegmentEntry
from atmossl.data.ingest import ChunkLayout, IngestInput, Workers, ingest
from atmossl.data.inputs import open_input
from atmossl.data.store import open_segment
from atmossl.data.variables import VARIABLES, conversion
from tests.synthetic import dataset

# Any folder with files of the packages hvsampledata and neuralgcm, below or right in it.
SAMPLES = Path(os.environ.get("ATMOSSL_NETCDF_SAMPLES", "nowhere"))
LAYOUT = ChunkLayout(time=3, level=1, lat=0, lon=0, shard=0, compression=3)
ONE = Workers("threads", 1)
AIR, TL31 = "air_temperature_small.nc", "era5_tl31_19590102T00.nc"
needs_samples = pytest.mark.skipif(
    not SAMPLES.is_dir(), reason="set ATMOSSL_NETCDF_SAMPLES to NetCDF files of others"
)


@pytest.mark.parametrize(
    ("variable", "units", "given", "wanted"),
    [
        ("temperature", "degC", -40.0, 233.15),
        ("2m_temperature", "degF", -40.0, 233.15),
        ("sea_surface_temperature", "fahrenheit", 212.0, 373.15),
        ("mean_sea_level_pressure", "hPa", 1013.25, 101325.0),
        ("specific_humidity", "g kg-1", 5.0, 0.005),
        ("total_precipitation", "mm", 12.0, 0.012),
        ("land_sea_mask", "%", 25.0, 0.25),
    ],
)
def test_usual_units_are_converted(variable, units, given, wanted, tmp_path: Path) -> None:
    record = dataset(variables=("temperature",), steps=3).isel(level=0, drop=True)
    record["temperature"] = xr.full_like(record["temperature"], given)
    record["temperature"].attrs["units"] = units
    record.to_netcdf(tmp_path / "in.nc")
    found = open_input(str(tmp_path / "in.nc"), {variable: "temperature"}, {}, {})[variable]
    np.testing.assert_allclose(found.values, wanted, rtol=1e-6)
    assert found.attrs["units"] == VARIABLES[variable].units
    assert conversion(variable, found.attrs["units"]) is None


def test_units_without_a_way_to_ours_are_named(tmp_path: Path) -> None:
    record = dataset(variables=("temperature",), steps=3)
    record["temperature"].attrs["units"] = "furlong"
    record.to_netcdf(tmp_path / "in.nc")
    with pytest.raises(ValueError, match=r"in\.nc: variable temperature has units furlong"):
        open_input(str(tmp_path / "in.nc"), {}, {}, {})


def folder_of(path: Path, *records: xr.Dataset) -> str:
    for number, record in enumerate(records):
        record.to_netcdf(path / f"{number}.nc")
    return str(path)


RECORD = dataset(steps=6)
HALVES = RECORD.isel(time=slice(0, 3)), RECORD.isel(time=slice(3, 6))
PRECISE = [half.assign_coords(longitude=half.longitude + 1 / 3) for half in HALVES]


@pytest.mark.parametrize(
    "files",
    [
        [RECORD.isel(time=[2, 0, 1, 5, 4, 3])],
        [RECORD.assign_coords(level=100.0 * RECORD.level.assign_attrs(units="Pa"))],
        [RECORD.isel(level=n) for n in range(3)],
        [PRECISE[0], PRECISE[1].assign_coords(longitude=PRECISE[1].longitude.astype("f4"))],
    ],
    ids=["unsorted", "pascal", "file_per_level", "float32"],
)
def test_odd_files_read_alike(files, tmp_path: Path) -> None:
    found = open_input(folder_of(tmp_path, *files), {}, {}, {})
    for axis in ("time", "level"):
        np.testing.assert_array_equal(found[axis], RECORD[axis])
    for name in ("temperature", "u_component_of_wind"):
        expected = RECORD[name].transpose(*found[name].dims)
        np.testing.assert_array_equal(found[name].values, expected.values)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([HALVES[0], HALVES[1].isel(level=[0, 2])], r"sizes 2 x 8 x 16, 3 x 8 x 16;"),
        ([HALVES[0].isel(latitude=slice(0, 4)), HALVES[1]], "different level x latitude"),
        ([RECORD.isel(time=slice(0, 5)), HALVES[1]], "files overlap"),
        ([RECORD.isel(time=[0, 1, 1])], r"T06:00:00 is duplicate; .*drop_duplicates\('time'\)"),
        ([xr.concat([RECORD, RECORD.isel(latitude=[0])], "latitude")], "latitude must ascend"),
        ([RECORD.assign_coords(time=range(6))], "time has type int64"),
    ],
)
def test_files_that_make_no_record_are_refused_before_work(files, message, tmp_path: Path) -> None:
    source = IngestInput(folder_of(tmp_path, *files))
    with pytest.raises(ValueError, match=message):
        ingest(source, tmp_path / "out.zarr", LAYOUT, ONE, print)
    assert not list(tmp_path.glob(".out*"))


MASK = xr.ones_like(RECORD["temperature"].isel(time=0, level=0, drop=True)).rename("lsm")
MASK.attrs = {"units": "1"}


@pytest.mark.parametrize(
    "files",
    [
        [RECORD.assign(lsm=MASK)],
        [half.assign(lsm=MASK) for half in HALVES],
        [RECORD, MASK.to_dataset()],
        [RECORD, MASK.expand_dims(time=np.array(["1940-01-01"], "M8[ns]")).to_dataset()],
    ],
    ids=["within", "in_each", "apart", "dated"],
)
def test_what_is_the_same_at_all_times_has_no_time(files, tmp_path: Path) -> None:
    found = open_input(folder_of(tmp_path, *files), {}, {}, {})
    np.testing.assert_array_equal(found["time"], RECORD["time"])
    assert found["land_sea_mask"].dims == ("latitude", "longitude")
    assert bool((found["land_sea_mask"] == 1).all())
    assert not found["temperature"].isnull().any()


def test_variables_may_lie_in_files_of_their_own(tmp_path: Path, capsys) -> None:
    place = folder_of(tmp_path, RECORD[["temperature"]], HALVES[0][["u_component_of_wind"]])
    names = {"temperature": "temperature", "gust": "u_component_of_wind"}
    assert set(open_input(place, names, {}, {}).data_vars) == set(names)
    with pytest.raises(ValueError, match=r"variables.divergence=d is not there; valid: temp"):
        open_input(place, {"temperature": "temperature", "divergence": "d"}, {}, {})
    assert (
        main(["data", "ingest", f"input={place}", f"output={tmp_path}/out.zarr", "end=2001"]) == 0
    )
    assert "missing values: u_component_of_wind 50.00%" in capsys.readouterr().out


LIKE_IT = RECORD["temperature"].isel(time=0, level=0, drop=True)


def test_a_field_without_time_that_differs_between_files_is_refused(tmp_path: Path) -> None:
    """Joining would keep that of the first file."""
    place = folder_of(tmp_path, HALVES[0].assign(lsm=MASK), HALVES[1].assign(lsm=MASK * 0.5))
    with pytest.raises(ValueError, match=r"land_sea_mask has values without time.*1\.nc.*0\.nc"):
        open_input(place, {}, {}, {})
    names = {name: name for name in ("temperature", "u_component_of_wind")}
    assert set(open_input(place, names, {}, {})) == set(names)
    store = open_store(SegmentEntry(location=place))
    with pytest.raises(ValueError, match=r"lsm has values without time.*1\.nc.*0\.nc"):
        open_segment("a", store, place, variables=["lsm"], levels=[])
    open_segment("a", store, place, variables=["temperature"], levels=[300])


def test_what_two_files_both_hold_is_refused_even_if_values_are_missing(tmp_path: Path) -> None:
    """xarray would fill the missing values of one file with those of the other."""
    gappy = HALVES[0].where(HALVES[0].latitude > 0)
    place = folder_of(tmp_path, gappy, HALVES[0] + 1.0)
    with pytest.raises(ValueError, match=r"overlap: temperature of 2001-01-01T00:00, level 300 is"):
        open_input(place, {}, {}, {})


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    bounds = (("latitude", "bnds"), np.zeros((8, 2)))
    record = RECORD.assign(cape=LIKE_IT, lcl=LIKE_IT, lat_bnds=bounds)
    record["latitude"].attrs["bounds"] = "lat_bnds"
    record = xr.concat([record, record], "member").assign_coords(member=[0, 1])
    place = folder_of(tmp_path, record)
    (tmp_path / "README").write_text("about GRIB and NetCDF")
    (tmp_path / "more").mkdir()
    with pytest.raises(ValueError, match=r"dimensions member;"):
        open_input(place, {}, {}, {})
    lines: list[str] = []
    found = open_input(place, {}, {"member": 1}, {}, lines.append)
    assert set(found) == {"temperature", "u_component_of_wind"}
    text = "\n".join(lines)
    assert "passed over: README (neither GRIB nor NetCDF by its first bytes), more (a fold" in text
    assert "left out, as not known here: cape, lcl; variables.NAME=cape reads one" in text
    assert "select.member=1 leaves out 1 of 2 values of member: 0, 1" in text


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (lambda r: r, ({}, {}, {"typeOfLevel": "surface"}), "no file is GRIB"),
        (lambda r: r, ({}, {"number": 0}, {}), "select.number=0: no variable has number"),
        (lambda r: r.assign(t=r["temperature"]), ({}, {}, {}), "several variables that are"),
        (
            lambda r: r.assign(sst=LIKE_IT.isel(latitude=slice(0, 7)).rename(latitude="lat")),
            ({}, {}, {}),
            "lie on different cells: 8 from -78.75 to 78.75 and 7 from",
        ),
    ],
    ids=["filters", "select", "twice", "cells"],
)
def test_choices_that_mean_nothing_are_refused(tmp_path, change, arguments, words: str) -> None:
    place = folder_of(tmp_path, change(RECORD))
    with pytest.raises(ValueError, match=words):
        open_input(place, *arguments)


def test_a_file_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    HALVES[0].to_netcdf(folder / "first.cdf")
    HALVES[1].to_netcdf(folder / "second", format="NETCDF3_64BIT", engine="scipy")
    for name in ("temperature", "u_component_of_wind"):
        found = open_input(str(folder), {}, {}, {})[name]
        np.testing.assert_array_equal(found, RECORD[name].transpose(*found.dims))
    store = open_store(SegmentEntry(location=str(folder)))
    assert store.dataset.sizes["time"] == 6
    with ZipFile(tmp_path / "sent.nc", "w") as archive:
        archive.write(folder / "first.cdf", "data_instant.nc")
    with pytest.raises(ValueError, match=r"sent\.nc: a zip archive .* data_instant\.nc; unpack"):
        open_input(str(tmp_path / "sent.nc"), {}, {}, {})
    (folder / "third.nc").touch()
    for opening in (lambda p: open_input(p, {}, {}, {}),
                    lambda p: open_store(SegmentEntry(location=p))):  # fmt: skip
        with pytest.raises(ValueError, match=r"third\.nc: the file is empty"):
            opening(str(folder))


@pytest.mark.parametrize("unlimited", [[], ["time"]])
def test_a_truncated_file_of_the_old_format_is_named(unlimited: list[str], tmp_path: Path) -> None:
    """The NetCDF library reads zeros beyond its end."""
    path = tmp_path / "old.nc"
    RECORD.to_netcdf(path, format="NETCDF3_64BIT", engine="scipy", unlimited_dims=unlimited)
    (tmp_path / "._old.nc").write_bytes(b"of another system")
    assert open_input(str(tmp_path), {}, {}, {}).sizes["time"] == 6
    path.write_bytes(path.read_bytes()[:-3000])
    for place in (str(path), str(tmp_path)):
        with pytest.raises(ValueError, match=r"old.nc is truncated"):
            open_input(place, {}, {}, {})
        with pytest.raises(ValueError, match=r"old.nc is truncated"):
            open_store(SegmentEntry(location=place))


def test_a_torn_chunk_of_the_input_is_named(tmp_path: Path) -> None:
    RECORD.to_zarr(tmp_path / "in.zarr", consolidated=False)
    chunk = tmp_path / "in.zarr" / "temperature" / "c" / "0" / "0" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-7])
    source = IngestInput(str(tmp_path / "in.zarr"))
    with pytest.raises(ValueError, match=r"in.zarr: cannot read temperature, steps 0 to 2 \(Runt"):
        ingest(source, tmp_path / "out.zarr", LAYOUT, ONE, lambda *_: None)


def test_a_single_date_is_ingested(tmp_path: Path) -> None:
    place = folder_of(tmp_path, RECORD.isel(time=[2]))
    ingest(IngestInput(place), tmp_path / "out.zarr", LAYOUT, ONE, lambda *_: None)
    with xr.open_zarr(tmp_path / "out.zarr") as found:
        np.testing.assert_array_equal(found["time"], RECORD["time"][2:3])


def test_a_wrong_date_and_an_empty_region_are_named(tmp_path: Path) -> None:
    place = folder_of(tmp_path, RECORD)
    for wrong, message in (
        ({"start": "soon"}, "start: 'soon' is no date"),
        ({"region": (-40.0, 40.0, 160.0, -160.0)}, "4 latitudes and 1 longitudes"),
    ):
        with pytest.raises(ValueError, match=message):
            ingest(
                IngestInput(place, **wrong),
                tmp_path / "o.zarr",
                LAYOUT,
                Workers("threads", 1),
                print,
            )


def test_files_of_a_folder_in_mixed_units_are_refused(tmp_path: Path) -> None:
    second = HALVES[1].assign(
        temperature=(HALVES[1]["temperature"] - 273.15).assign_attrs(units="degC")
    )
    place = folder_of(tmp_path, HALVES[0], second)
    store = open_store(SegmentEntry(location=place))
    with pytest.raises(ValueError, match=r"temperature has units K, degC;"):
        open_segment("waves", store, place, variables=["temperature"], levels=[300])
    open_segment("waves", store, place, variables=["u_component_of_wind"], levels=[300])
    values = open_input(place, {}, {}, {})["temperature"].transpose(*RECORD["temperature"].dims)
    np.testing.assert_allclose(values, RECORD["temperature"], atol=1e-4)


def test_a_single_date_is_told_to_be_joined() -> None:
    one = dataset(steps=3).isel(time=0)
    with pytest.raises(ValueError, match="data ingest. joins"):
        open_segment("waves", one, "one.nc", variables=["temperature"], levels=[300])


def test_another_calendar_is_ingested(tmp_path: Path, capsys) -> None:
    times = xr.date_range("0001-02-27", periods=12, freq="6h", calendar="noleap", use_cftime=True)
    record = dataset(variables=("temperature",), steps=12).assign_coords(time=times)
    record.to_netcdf(tmp_path / "in.nc")
    command = ["data", "ingest", f"input={tmp_path / 'in.nc'}", f"output={tmp_path / 'out.zarr'}",
               "start=0001-02-27T12", "end=0001-03-01T00"]  # fmt: skip
    assert main(command) == 0, capsys.readouterr().err
    with xr.open_zarr(tmp_path / "out.zarr", consolidated=False) as store:
        assert store.time.values.tolist() == times[2:9].tolist()
        expected = (
            record["temperature"].isel(time=slice(2, 9)).transpose(*store["temperature"].dims)
        )
        np.testing.assert_array_equal(store["temperature"].values, expected.values)


def sample(name: str) -> Path:
    found = sorted(SAMPLES.rglob(name))
    if not found:
        pytest.skip(f"no {name} below ATMOSSL_NETCDF_SAMPLES")
    return found[0]


@needs_samples
def test_the_air_temperature_of_ncep_is_ingested(tmp_path: Path, capsys) -> None:
    """`air` in degK, latitudes from north to south, no level."""
    file, output = sample(AIR), tmp_path / "air.zarr"
    assert main(["data", "ingest", f"input={file}", f"output={output}"]) == 2
    assert "variables.temperature=air" in capsys.readouterr().err
    named = "variables.2m_temperature=air"
    assert main(["data", "ingest", f"input={file}", f"output={output}", named]) == 0
    segment = open_segment(
        "air", xr.open_zarr(output, consolidated=False), "air", variables=["2m_temperature"],
        levels=[],
    )  # fmt: skip
    values = segment.read("2m_temperature", (0,), 0, 20, segment.whole())[0]
    with xr.open_dataset(file) as source:
        np.testing.assert_allclose(values, source["air"].values[:, ::-1], rtol=1e-6)
    assert not segment.grid.periodic and segment.step_hours == 6.0


@needs_samples
def test_the_gaussian_era5_of_neuralgcm_is_ingested(tmp_path: Path) -> None:
    """One date without a time axis, axes in another order, TL31."""
    file, output = sample(TL31), tmp_path / "era5.zarr"
    assert main(["data", "ingest", f"input={file}", f"output={output}", "levels=[500,850]"]) == 0
    with xr.open_zarr(output, consolidated=False) as store, xr.open_dataset(file) as source:
        assert {"temperature", "sea_ice_cover", "specific_cloud_ice_water_content"} <= set(store)
        assert store.sizes["time"] == 1 and "units" not in store.attrs
        found = store["temperature"].isel(time=0)
        wanted = source["temperature"].sel(level=[500, 850]).transpose(*found.dims)
        np.testing.assert_array_equal(found.values, wanted.values)
