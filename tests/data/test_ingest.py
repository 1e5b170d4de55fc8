"""What others wrote becomes one store: right values, restartable, verified."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from atmossl.cli import main
from atmossl.data import ingest as module
from atmossl.data.fingerprint import noted
from atmossl.data.ingest import ChunkLayout, IngestInput, Workers, ingest, missing_shares, verify
from tests.synthetic import dataset

RECORD = dataset(steps=10)
NAMES = ("temperature", "u_component_of_wind")
LAYOUT = ChunkLayout(time=3, level=1, lat=0, lon=0, shard=0, compression=3)
THREADS = Workers("threads", 2)
SAMPLES = Path(os.environ.get("ATMOSSL_CFGRIB_SAMPLES", "/nonexistent"))


def quiet(done: int, total: int) -> None:
    assert 0 <= done <= total


def netcdf(folder: Path) -> Path:
    """Two files as the CDS writes them: short names, descending latitudes, -180..180."""
    for part, steps in enumerate((slice(0, 6), slice(6, 10))):
        record = RECORD.isel(time=steps, latitude=slice(None, None, -1))
        record = record.assign_coords(longitude=(record.longitude + 180) % 360 - 180)
        record = record.sortby("longitude").rename(
            temperature="t", u_component_of_wind="u", time="valid_time", level="pressure_level"
        )
        record.to_netcdf(folder / f"{part}.nc")
    return folder


def grib(path: Path) -> Path:
    """Every field of the record as one GRIB 2 message."""
    eccodes = pytest.importorskip("eccodes")
    keys = {"Ni": 16, "Nj": 8, "iDirectionIncrementInDegrees": 22.5}
    keys |= {"jDirectionIncrementInDegrees": 22.5, "jScansPositively": 1}
    keys |= {"latitudeOfFirstGridPointInDegrees": -78.75, "longitudeOfFirstGridPointInDegrees": 0}
    keys |= {"latitudeOfLastGridPointInDegrees": 78.75, "longitudeOfLastGridPointInDegrees": 337.5}
    with path.open("wb") as file:
        for short, name in (("t", NAMES[0]), ("u", NAMES[1])):
            for time in RECORD["time"].values:
                for level in RECORD["level"].values:
                    message = eccodes.codes_grib_new_from_samples("regular_ll_pl_grib2")
                    for key, value in keys.items():
                        eccodes.codes_set(message, key, value)
                    stamp = np.datetime_as_string(time, "m")
                    eccodes.codes_set(message, "dataDate", int(stamp[:10].replace("-", "")))
                    eccodes.codes_set(message, "dataTime", int(stamp[11:].replace(":", "")))
                    eccodes.codes_set(message, "shortName", short)
                    eccodes.codes_set(message, "typeOfLevel", "isobaricInhPa")
                    eccodes.codes_set(message, "level", int(level))
                    eccodes.codes_set(message, "bitsPerValue", 24)
                    values = RECORD[name].sel(time=time, level=level).values.astype(np.float64)
                    eccodes.codes_set_values(message, values.ravel())
                    eccodes.codes_write(message, file)
                    eccodes.codes_release(message)
    return path


def compare(store: Path, expected: xr.Dataset = RECORD, atol: float = 0.0) -> None:
    with xr.open_zarr(store) as found:
        for name in NAMES:
            values = found[name].transpose(*expected[name].dims)
            np.testing.assert_allclose(values, expected[name], rtol=0, atol=atol)
            assert found[name].attrs["units"] == expected[name].attrs["units"]
        for axis in ("time", "level", "latitude", "longitude"):
            np.testing.assert_array_equal(found[axis], expected[axis])


@pytest.mark.parametrize("shard", [0, 2])
def test_netcdf_files_become_one_store(tmp_path, shard: int) -> None:
    layout = ChunkLayout(3, 1, 0, 0, shard, 3)
    ingest(IngestInput(str(netcdf(tmp_path))), tmp_path / "out.zarr", layout, THREADS, quiet)
    compare(tmp_path / "out.zarr")
    array = zarr.open_array(tmp_path / "out.zarr" / "temperature", mode="r")
    assert array.chunks == (3, 1, 8, 16)
    assert array.shards == ((6, 3, 8, 16) if shard else None)
    assert verify(tmp_path / "out.zarr") == (4 if shard else 8)
    assert not list(tmp_path.glob(".out*"))


def test_a_file_without_units_becomes_a_store_with_those_of_the_names(tmp_path) -> None:
    RECORD.drop_attrs().to_netcdf(tmp_path / "in.nc")
    ingest(IngestInput(str(tmp_path / "in.nc")), tmp_path / "out.zarr", LAYOUT, THREADS, quiet)
    opened = xr.open_zarr(tmp_path / "out.zarr")
    units = {name: array.attrs["units"] for name, array in opened.data_vars.items()}
    assert units == {"temperature": "K", "u_component_of_wind": "m s-1"}


def test_grib_messages_become_a_store(tmp_path) -> None:
    path = grib(tmp_path / "era5.grib")
    ingest(IngestInput(str(path)), tmp_path / "out.zarr", LAYOUT, THREADS, quiet)
    expected = RECORD.copy()
    expected["u_component_of_wind"].attrs["units"] = "m s**-1"
    compare(tmp_path / "out.zarr", expected, atol=1e-6)
    cut = tmp_path / "cut.grib"
    cut.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut.grib"):
        ingest(IngestInput(str(cut)), tmp_path / "other.zarr", LAYOUT, THREADS, quiet)


@pytest.mark.parametrize("first", ["eccodes", "xarray"])
def test_eccodes_leaves_map_projections_alone(tmp_path, first: str) -> None:
    """ecCodes brings a second PROJ: projections are right, and the process ends well."""
    pytest.importorskip("eccodes")
    RECORD.to_netcdf(tmp_path / "waves.nc")
    loads = {"eccodes": "import eccodes", "xarray": "xarray.open_dataset('waves.nc')"}[first]
    script = f"""
import atmossl, sys, xarray
{loads}
import cartopy.crs as ccrs
assert "gribapi" in sys.modules
x, y = ccrs.Mercator().transform_point(90.0, 0.0, ccrs.PlateCarree())
assert abs(x - 6378137.0 * 3.141592653589793 / 2) < 1e-3 and abs(y) < 1e-3, (x, y)
"""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


def test_a_stopped_run_writes_only_what_is_missing(tmp_path, monkeypatch) -> None:
    source, output = IngestInput(str(netcdf(tmp_path))), tmp_path / "out.zarr"
    written: list[module.Region] = []
    original = module.write_region

    def stops(job: module.Job) -> str:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(job.region)
        return original(job)

    one = Workers("threads", 1)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_region", stops)
        with pytest.raises(KeyboardInterrupt):
            ingest(source, output, LAYOUT, one, quiet)
    assert not output.exists()
    with pytest.raises(ValueError, match="other settings"):
        ingest(source, output, ChunkLayout(2, 1, 0, 0, 0, 3), one, quiet)

    def counts(job: module.Job) -> str:
        written.append(job.region)
        return original(job)

    monkeypatch.setattr(module, "write_region", counts)
    output.mkdir()  # an empty folder is no output
    ingest(source, output, LAYOUT, one, quiet)
    assert len(written) == len(set(written)) == 8  # every region once over both runs
    compare(output)
    with pytest.raises(ValueError, match="exists"):
        ingest(source, output, LAYOUT, one, quiet)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_killed_process_loses_only_its_open_regions(tmp_path) -> None:
    """SIGKILL in the middle: what was noted is never written again, the result is the same."""
    record = dataset(steps=80)
    record.to_netcdf(tmp_path / "waves.nc")
    source, layout = IngestInput(str(tmp_path / "waves.nc")), ChunkLayout(1, 0, 0, 0, 0, 3)
    ingest(source, tmp_path / "whole.zarr", layout, THREADS, quiet)
    output, folder = tmp_path / "out.zarr", tmp_path / ".out.zarr.partial"
    script = f"""
from pathlib import Path
from atmossl.data.ingest import *
ingest({source}, Path({str(output)!r}), {layout}, {THREADS}, print)
"""
    running = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    while len(list((folder / "journal").glob("*.json"))) < 20:
        assert running.poll() is None, "ended before it could be killed"
        time.sleep(0.001)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    written = [path.stem.rpartition("-") for path in (folder / "journal").glob("*.json")]
    assert 20 <= len(written) < 160 and not output.exists()

    def states(store: Path) -> list[tuple[int, int]]:
        chunks = [
            (store / name / "c" / start / "0" / "0" / "0").stat() for name, _, start in written
        ]
        return [(chunk.st_ino, chunk.st_mtime_ns) for chunk in chunks]

    before = states(folder / "store.zarr")
    ingest(source, output, layout, THREADS, quiet)
    assert states(output) == before
    checksums = [
        noted(zarr.open_group(tmp_path / f"{n}.zarr").attrs, "checksums") for n in ("out", "whole")
    ]
    assert checksums[0] == checksums[1] and verify(output) == len(checksums[0]) == 160
    compare(output, record)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.zarr", "waves.nc", "whole.zarr"]


SBATCH = """#!/bin/bash
# runs the job here and now
job="$(mktemp "$SLURM_STUB/job.XXXXXX")"
cp "${@: -1}" "$job"
setsid bash "$job" >"$job.log" 2>&1 &
echo "Submitted batch job $!"
"""
SCANCEL = """#!/bin/bash
for job in "$@"; do kill -- "-$job"; echo "$job" >>"$SLURM_STUB/cancelled"; done
"""


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # pipes of the stub's jobs
def test_slurm_jobs_write_the_same_store(tmp_path, monkeypatch) -> None:
    """The real dask-jobqueue and real workers, below an sbatch that runs jobs on this machine."""
    pytest.importorskip("dask_jobqueue")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STUB", str(tmp_path / "bin"))
    settings = {"queue": "weather", "cores": 1, "memory": "1GB", "walltime": "00:05:00"}
    workers = Workers("slurm", 2, settings | {"interface": "lo", "local_directory": str(tmp_path)})
    (tmp_path / "in").mkdir()
    ingest(IngestInput(str(netcdf(tmp_path / "in"))), tmp_path / "out.zarr", LAYOUT, workers, quiet)
    compare(tmp_path / "out.zarr")
    jobs = [path for path in programs.glob("job.*") if path.suffix != ".log"]
    assert len([job for job in jobs if "#SBATCH -p weather" in job.read_text()]) == 2
    assert len((programs / "cancelled").read_text().split()) == 2  # none is left behind


def test_a_store_that_was_changed_fails_its_checksums(tmp_path) -> None:
    ingest(IngestInput(str(netcdf(tmp_path))), tmp_path / "out.zarr", LAYOUT, THREADS, quiet)
    array = zarr.open_array(tmp_path / "out.zarr" / "temperature", mode="r+")
    array[4, 0, 0, 0] = 17.0
    with pytest.raises(ValueError, match="temperature differs from its checksum from step 3"):
        verify(tmp_path / "out.zarr")


@pytest.fixture(scope="module")
def ingested(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ingested")
    ingest(IngestInput(str(netcdf(folder))), folder / "out.zarr", LAYOUT, THREADS, quiet)
    return folder / "out.zarr"


def contents(store: Path) -> dict[str, Any]:
    """Everything that xarray reads of a store's variables and coordinates, without decoding."""
    with xr.open_zarr(store, consolidated=False, decode_cf=False) as opened:
        return {
            str(name): (array.dims, array.dtype, repr(array.attrs), array.values.tobytes())
            for name, array in opened.variables.items()
        }


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_changed_byte_passes_the_checksums_of_a_store(data: st.DataObject, ingested) -> None:
    """In metadata, coordinates and fields: refused in one line, or without effect."""
    files = sorted(path for path in ingested.rglob("*") if path.is_file())
    file = data.draw(st.sampled_from(files))
    content = file.read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "out.zarr"
        shutil.copytree(ingested, copy)
        changed = bytearray(content)
        changed[position] ^= data.draw(st.integers(1, 255))
        (copy / file.relative_to(ingested)).write_bytes(changed)
        try:
            verify(copy)
        except ValueError as error:
            assert str(copy) in str(error) and "\n" not in str(error)
        else:
            assert contents(copy) == contents(ingested)


@pytest.mark.parametrize(
    "name", ["time", "level", "latitude", "longitude", "temperature", "attributes of the store"]
)
def test_changed_metadata_fail_their_checksums(ingested, tmp_path, name: str) -> None:
    store = tmp_path / "out.zarr"
    shutil.copytree(ingested, store)
    assert verify(store) == 8
    group = zarr.open_group(store, mode="r+", use_consolidated=False)
    changed = group.get(name, group)
    changed.attrs["source" if changed is group else "units"] = "furlongs"
    with pytest.raises(ValueError, match=f"{name} .*differ"):
        verify(store)


@pytest.mark.parametrize("name", ["time", "level", "latitude", "longitude"])
def test_changed_coordinates_fail_their_checksums(ingested, tmp_path, name: str) -> None:
    store = tmp_path / "out.zarr"
    shutil.copytree(ingested, store)
    array = zarr.open_array(store / name, mode="r+")
    array[0] = array[0] - 1
    with pytest.raises(ValueError, match=f"{name} .*differs"):
        verify(store)


def test_a_store_of_earlier_versions_keeps_its_checksums(ingested, tmp_path) -> None:
    store = tmp_path / "out.zarr"
    shutil.copytree(ingested, store)
    group = zarr.open_group(store, mode="r+", use_consolidated=False)
    del group.attrs["checksums_around"]
    assert verify(store) == 8


def test_a_region_across_the_dateline_and_a_period_are_cut_out(tmp_path) -> None:
    source = IngestInput(
        str(netcdf(tmp_path)),
        levels=(850,),
        start="2001-01-02",
        end="2001-01-02T12",
        region=(-40.0, 60.0, 300.0, 60.0),
    )
    ingest(source, tmp_path / "out.zarr", LAYOUT, THREADS, quiet)
    expected = RECORD.sel(level=[850], latitude=slice(-40, 60)).isel(time=slice(4, 7))
    expected = expected.isel(longitude=[14, 15, 0, 1, 2])
    compare(tmp_path / "out.zarr", expected)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_worker_process_writes_the_same_store(tmp_path) -> None:
    """Two of them are started above, as jobs of Slurm."""
    pytest.importorskip("distributed")
    workers = Workers("local_cluster", 1)
    ingest(IngestInput(str(netcdf(tmp_path))), tmp_path / "out.zarr", LAYOUT, workers, quiet)
    compare(tmp_path / "out.zarr")


def test_the_command_ingests_and_refuses_in_one_line(tmp_path, capsys) -> None:
    folder, output = netcdf(tmp_path), tmp_path / "out.zarr"
    assert main(["data", "ingest", f"input={folder}", f"output={output}", "layout.time=4"]) == 0
    compare(output)
    assert main(["data", "ingest", f"input={folder}", f"output={output}"]) == 2
    assert main(["data", "ingest", "input=/nonexistent", f"output={tmp_path}/b.zarr"]) == 2
    captured = capsys.readouterr()
    assert "regions read again" in captured.out
    assert "exists" in captured.err and "/nonexistent" in captured.err


@pytest.mark.parametrize("region", ["[0]", "[0,9]", "[0,9,20]"])
def test_a_region_that_lacks_numbers_is_refused_in_one_line(region: str, tmp_path, capsys) -> None:
    output = f"output={tmp_path}/out.zarr"
    assert main(["data", "ingest", "input=in.nc", output, f"region={region}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"atmossl data: region={region}: valid: 4 values"


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="set ATMOSSL_CFGRIB_SAMPLES to cfgrib's test data")
@pytest.mark.parametrize(
    ("file", "select", "outcome"),
    [
        ("era5-levels-members.grib", {"number": 3}, ["geopotential", "temperature"]),
        ("era5-levels-members.nc", {"number": 3}, ["geopotential", "temperature"]),
        ("fields_with_missing_values.grib", {}, ["2m_temperature"]),
        ("regular_gg_sfc.grib", {}, ["10m_u_component_of_wind"]),
        ("era5-levels-members.grib", {}, "further dimensions"),
        ("uv_on_different_levels.grib", {}, "step"),
        ("reduced_gg.grib", {}, "reduced_gg"),
        ("spherical_harmonics.grib", {}, "grid of type sh"),
        ("era5-levels-corrupted.grib", {"number": 3}, "corrupted.grib"),
        ("t_on_different_level_types.grib", {}, "filters"),
    ],
)
def test_files_of_others(tmp_path, file: str, select: dict, outcome) -> None:
    source = IngestInput(str(SAMPLES / file), select=select)
    if isinstance(outcome, str):
        with pytest.raises(ValueError, match=outcome):
            ingest(source, tmp_path / "out.zarr", LAYOUT, THREADS, quiet)
        return
    ingest(source, tmp_path / "out.zarr", LAYOUT, THREADS, quiet)
    with xr.open_zarr(tmp_path / "out.zarr") as found:
        assert sorted(found.data_vars) == outcome
        assert np.all(np.diff(found["latitude"]) > 0)
    assert verify(tmp_path / "out.zarr") >= 1


def test_an_ingested_store_can_be_written_to_netcdf(tmp_path) -> None:
    """All attributes are those that NetCDF knows; stores that hold mappings are still read."""
    RECORD.to_netcdf(tmp_path / "in.nc")
    store = tmp_path / "out.zarr"
    ingest(IngestInput(str(tmp_path / "in.nc")), store, LAYOUT, THREADS, quiet)
    with xr.open_zarr(store) as opened:
        for kind in ("NETCDF4", "NETCDF3_64BIT"):
            opened.drop_encoding().to_netcdf(tmp_path / f"{kind}.nc", format=kind)
    count = verify(store)
    group = zarr.open_group(store, mode="r+")
    for key in ("checksums", "missing"):
        group.attrs[key] = noted(group.attrs, key)
        assert isinstance(zarr.open_group(store).attrs[key], dict)
    assert verify(store) == count == 8 and missing_shares(store) == {}


@pytest.mark.parametrize("west", [-30.0, 150.0, 0.0])
def test_a_region_is_stored_from_west_to_east(tmp_path, west: float) -> None:
    """Across Greenwich, across the dateline and elsewhere, as `region` gives it."""
    longitude = west + 7.5 * np.arange(9)
    part = RECORD.isel(longitude=slice(0, 9)).assign_coords(longitude=(longitude + 180) % 360 - 180)
    part.to_netcdf(tmp_path / "in.nc")
    region = (-90.0, 90.0, west, west + 60.0)
    for name, cut in (("whole", None), ("cut", region)):
        source = IngestInput(str(tmp_path / "in.nc"), region=cut)
        ingest(source, tmp_path / f"{name}.zarr", LAYOUT, THREADS, quiet)
        with xr.open_zarr(tmp_path / f"{name}.zarr") as opened:
            np.testing.assert_array_equal(opened["longitude"], longitude % 360)
            np.testing.assert_array_equal(opened["temperature"], part["temperature"])


def changed_content(path: Path) -> None:
    """Another byte in the middle, under the same size and date."""
    about, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def stopped(source: IngestInput, output: Path, monkeypatch, after: int = 1) -> None:
    """An ingest that ends after some regions."""
    original, written = module.write_region, []

    def stops(job: module.Job) -> str:
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(job)
        return original(job)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "write_region", stops)
        ingest(source, output, LAYOUT, Workers("threads", 1), quiet)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: os.utime(folder / "1.nc", ns=(1, 1)), "1.nc has changed since"),
        (lambda folder: changed_content(folder / "0.nc"), "0.nc has changed since"),
        (lambda folder: (folder / "1.nc").unlink(), "1.nc is gone since"),
        (lambda folder: (folder / "note").write_text("x"), ""),
    ],
    ids=["date", "content", "gone", "beside"],
)
def test_an_input_that_changed_is_named_when_ingest_goes_on(
    tmp_path, monkeypatch, change, words: str
) -> None:
    source, output = IngestInput(str(netcdf(tmp_path))), tmp_path / "out.zarr"
    stopped(source, output, monkeypatch)
    change(tmp_path)
    if words:
        with pytest.raises(ValueError, match=words):
            ingest(source, output, LAYOUT, THREADS, quiet)
    else:
        ingest(source, output, LAYOUT, THREADS, quiet)
        compare(output)


def test_an_array_that_changed_is_named_when_ingest_goes_on(tmp_path, monkeypatch) -> None:
    RECORD.to_zarr(tmp_path / "in.zarr", consolidated=False)
    source, output = IngestInput(str(tmp_path / "in.zarr")), tmp_path / "out.zarr"
    stopped(source, output, monkeypatch)
    array = zarr.open_array(tmp_path / "in.zarr" / "temperature", mode="r+")
    array[0, 0, 0, 0] = 250.0
    with pytest.raises(ValueError, match=r"in.zarr/temperature has changed since .*out.zarr.part"):
        ingest(source, output, LAYOUT, THREADS, quiet)


def test_an_input_that_changes_meanwhile_makes_no_store(tmp_path) -> None:
    source, output = IngestInput(str(netcdf(tmp_path))), tmp_path / "out.zarr"

    def touches(done: int, total: int) -> None:
        if done == total - 1:
            os.utime(tmp_path / "0.nc", ns=(1, 1))

    with pytest.raises(ValueError, match=r"0.nc has changed while ingest was reading"):
        ingest(source, output, LAYOUT, THREADS, touches)
    assert not output.exists()


@pytest.mark.parametrize("limit", [100, 1500])
def test_a_full_disk_is_told_with_file_and_key(tmp_path, limit: int) -> None:
    """A limit on the size of files stands for it."""
    source, output = IngestInput(str(netcdf(tmp_path))), tmp_path / "out.zarr"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match=r"output=.*out.zarr: cannot write .*out.zarr.*too large"):
            ingest(source, output, LAYOUT, THREADS, quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    ingest(source, output, LAYOUT, THREADS, quiet)
    compare(output)
