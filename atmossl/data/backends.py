"""Opening what lies at a location: zarr (folder, zip, URL) and NetCDF, lazily and read-only."""

from dataclasses import dataclass
from pathlib import Path

import xarray as xr
import zarr
import zarr.errors
from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore, ZipStore

from atmossl.data.catalog import SegmentEntry, resolve_location


@dataclass(frozen=True)
class OpenedStore:
    """A dataset as xarray sees it, and the zarr group behind it if there is one."""

    dataset: xr.Dataset
    group: zarr.Group | None = None

    def array(self, name: str) -> zarr.Array | None:
        """The zarr array of a variable by its name in the store."""
        found = self.group.get(name) if self.group is not None else None
        return found if isinstance(found, zarr.Array) else None


def open_store(entry: SegmentEntry) -> OpenedStore:
    """Open a store.

    Raises:
        ValueError: there is no such store, or it cannot be opened.
    """
    location = resolve_location(entry.location)
    if "://" not in location and not Path(location).exists():
        raise ValueError(f"store {location} does not exist")
    try:
        if location.endswith((".nc", ".nc4")):
            return OpenedStore(xr.open_dataset(location))
        return _open_zarr(_zarr_store(location, entry.storage_options))
    except (OSError, ValueError, KeyError, zarr.errors.BaseZarrError) as error:
        raise ValueError(
            f"store {location} cannot be opened as zarr or NetCDF ({type(error).__name__}: {error})"
        ) from error


def _zarr_store(location: str, options: dict) -> Store:
    if location.endswith(".zip"):
        return ZipStore(location, mode="r")
    if "://" in location:
        return FsspecStore.from_url(location, storage_options=options, read_only=True)
    return LocalStore(location, read_only=True)


def _open_zarr(store: Store) -> OpenedStore:
    group = zarr.open_group(store, mode="r")
    consolidated = group.metadata.consolidated_metadata is not None
    dataset = xr.open_dataset(store, engine="zarr", consolidated=consolidated)  # pyright: ignore
    return OpenedStore(dataset, group)
