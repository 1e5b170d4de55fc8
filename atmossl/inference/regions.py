"""Hidden cells from a user's files."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from atmossl.geometry import Grid
from atmossl.masking.places import CellMask


def read_cell_mask(path: Path) -> CellMask:
    """A NetCDF or zarr file with one variable on (latitude, longitude), not 0 where hidden.

    Raises:
        ValueError: no such file, or not one such variable.
    """
    key = f"task.mask_file={path}"
    if not path.exists():
        raise ValueError(f"{key} does not exist")
    try:
        with xr.open_dataset(path, engine="zarr" if path.is_dir() else None) as dataset:
            dataset = dataset.rename(
                {old: new for old, new in (("lat", "latitude"), ("lon", "longitude"))
                 if old in dataset.dims}
            ).load()  # fmt: skip
    except (OSError, ValueError) as error:
        raise ValueError(f"{key} cannot be read as NetCDF or zarr: {error}") from error
    found = [n for n in dataset.data_vars if set(dataset[n].dims) == {"latitude", "longitude"}]
    if len(found) != 1:
        raise ValueError(
            f"{key} needs one variable on (latitude, longitude), not 0 where hidden; it has "
            f"{ {str(n): dataset[n].dims for n in dataset.data_vars} }"
        )
    dataset = dataset.assign_coords(longitude=dataset["longitude"] % 360.0)
    array = dataset.sortby(["latitude", "longitude"])[found[0]].transpose("latitude", "longitude")
    try:
        grid = Grid(*(np.asarray(array[n], np.float64) for n in ("latitude", "longitude")))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return CellMask(grid, array.to_numpy() != 0, key)


@dataclass(frozen=True)
class AllButListed:
    """Every cell in which no station of a list lies. lat, lon: of the stations, degrees."""

    lat: np.ndarray
    lon: np.ndarray
    source: str

    def contains(self, lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
        height, width = np.diff(lat).mean() / 2, np.median(np.diff(lon) % 360.0) / 2
        rows = np.abs(self.lat[:, None] - lat) <= height
        columns = np.abs((self.lon[:, None] - lon + 180.0) % 360.0 - 180.0) <= width
        return ~np.einsum("ny,nx->yx", rows, columns).astype(bool)

    def check(self, grid: Grid) -> None:
        if self.contains(grid.latitude, grid.longitude).all():
            raise ValueError(f"{self.source}: no station lies in a cell of the store's grid")


def read_stations(path: Path) -> AllButListed:
    """A CSV file with columns latitude and longitude in degrees.

    Raises:
        ValueError: no such file, or columns or values that do not fit.
    """
    key = f"task.stations={path}"
    if not path.is_file():
        raise ValueError(f"{key} does not exist")
    try:
        table = pd.read_csv(path)
        lat, lon = (table[n].to_numpy(np.float64) for n in ("latitude", "longitude"))
    except (KeyError, ValueError, pd.errors.ParserError) as error:
        raise ValueError(f"{key} needs numeric columns latitude and longitude: {error}") from error
    if not len(lat) or not (np.isfinite(lon).all() and (np.abs(lat) <= 90).all()):
        raise ValueError(f"{key}: no station, or latitudes outside -90 to 90")
    return AllButListed(lat, lon, key)
