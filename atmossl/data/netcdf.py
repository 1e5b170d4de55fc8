"""Opens NetCDF files with one handle per file in the process, and without variables of strings.

The HDF5 library crashes where a file with strings of variable length is open twice, one handle is
closed, and the file is opened again (HDFGroup/hdf5 issue 5359, netcdf-c issue 2510): its cached
conversion of the strings still points to the closed handle. Opening and closing are enough, in one
thread and without any read of ours, since xarray reads a string to learn its type. A record is
opened again for every split, and files from the Climate Data Store hold a string `expver` for each
date. Hence all datasets of a file share one handle, which the last one closes; and strings along an
axis, which nothing here uses, are not read, as a user may hold a handle of the same file.
"""

from pathlib import Path
from typing import Any

import xarray as xr
from xarray.backends import CachingFileManager, NetCDF4DataStore
from xarray.backends.netCDF4_ import NETCDF4_PYTHON_LOCK, NetCDF4BackendEntrypoint
from xarray.backends.store import StoreBackendEntrypoint


class SharedNetcdf(NetCDF4BackendEntrypoint):
    """xarray's engine for NetCDF, with one handle for all datasets of a local file."""

    def open_dataset(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, filename_or_obj: Any, *, drop_variables: Any = None, **decoders: Any
    ) -> xr.Dataset:
        assert drop_variables is None, "which variables are dropped is decided here"
        store = NetCDF4DataStore(_shared_handle(Path(filename_or_obj)), mode="r")
        return StoreBackendEntrypoint().open_dataset(
            store, drop_variables=_strings_along_axes(store), **decoders
        )


def open_netcdf_file(path: Path) -> xr.Dataset:
    """The dataset of a NetCDF file, read lazily."""
    return xr.open_dataset(path, engine=SharedNetcdf)


def _shared_handle(path: Path) -> CachingFileManager:
    """A file manager that shares its handle with all others of the same state of a file: xarray
    counts the managers of one identity, and closes the file with the last one."""
    import netCDF4

    state = path.stat()
    return CachingFileManager(
        netCDF4.Dataset,  # pyright: ignore[reportArgumentType]
        str(path.resolve()),
        mode="r",
        lock=NETCDF4_PYTHON_LOCK,
        manager_id=(state.st_ino, state.st_mtime_ns, state.st_size),
    )


def _strings_along_axes(store: NetCDF4DataStore) -> list[str]:
    """Variables of strings of variable length that have an axis and do not label it."""
    return [
        name
        for name, variable in store.ds.variables.items()
        if variable.dtype is str and variable.dimensions not in ((), (name,))
    ]
