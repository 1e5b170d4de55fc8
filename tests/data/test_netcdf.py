"""A NetCDF file has one handle in the process, however often it is opened."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from atmossl.data.backends import open_store
from atmossl.data.catalog import SegmentEntry
from atmossl.data.netcdf import open_netcdf_file
from tests.synthetic import dataset

# In a process of its own, as a fault of the library would end it without a word.
_OPEN_AGAIN = """
import sys
import xarray as xr
from atmossl.data.backends import open_store
from atmossl.data.catalog import SegmentEntry
location, *files = sys.argv[1:]
of_user = [xr.open_dataset(file).load() for file in files]  # which are not closed
first = open_store(SegmentEntry(location=location)).dataset
for _ in range(20):
    opened = open_store(SegmentEntry(location=location)).dataset
    opened["temperature"].isel(time=[0, -1]).values
    opened.close()
print("opened", first.sizes["time"])
"""


@pytest.fixture
def with_versions(tmp_path: Path) -> Path:
    """Files of one record with a string for each date, as those of the Climate Data Store."""
    record = dataset(steps=12)
    strings = np.array(["0001"] * 12, dtype=object)
    record = record.assign_coords(expver=("time", strings), number=0)
    for part in range(2):
        record.isel(time=slice(6 * part, 6 * part + 6)).to_netcdf(tmp_path / f"{part}.nc")
    return tmp_path


@pytest.mark.parametrize("users_handles", [False, True])
def test_files_with_strings_are_opened_again_and_again(
    with_versions: Path, users_handles: bool
) -> None:
    files = sorted(map(str, with_versions.glob("*.nc"))) if users_handles else []
    command = [sys.executable, "-c", _OPEN_AGAIN, str(with_versions), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "opened 12"), done.stderr


def test_datasets_of_one_file_share_its_handle(with_versions: Path) -> None:
    path = with_versions / "0.nc"
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("needs /proc")

    def handles() -> int:
        targets = [os.path.realpath(link) for link in descriptors.iterdir()]
        return targets.count(os.path.realpath(path))

    first, second = open_netcdf_file(path), open_netcdf_file(path)
    assert handles() == 1
    first.close()
    expected = dataset(steps=12)["temperature"].isel(time=slice(6))
    np.testing.assert_array_equal(second["temperature"], expected)  # opened again where needed
    second.close()
    assert handles() == 0


def test_a_file_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "waves.nc"
    for steps in (12, 7):
        dataset(steps=steps).to_netcdf(tmp_path / "new.nc")
        (tmp_path / "new.nc").replace(path)
        assert open_store(SegmentEntry(location=str(path))).dataset.sizes["time"] == steps


def test_strings_that_label_an_axis_stay(tmp_path: Path) -> None:
    members = np.array(["first", "second"], dtype=object)
    record = dataset(steps=12).expand_dims(member=members)
    record.to_netcdf(tmp_path / "members.nc")
    opened: xr.Dataset = open_netcdf_file(tmp_path / "members.nc")
    assert opened["member"].values.tolist() == ["first", "second"]
