"""Reads hidden cells from a user's files, and makes the inpainting task of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import xarray as xr
from pydantic import BeforeValidator, Field

from atmossl.data.backends import NETCDF, kind_of
from atmossl.data.netcdf import open_netcdf_file
from atmossl.geometry import Grid, ascending_longitudes
from atmossl.masking.places import (
    AllButStations,
    CellMask,
    HiddenCells,
    Inpainting,
    LatLonBox,
    described,
)
from atmossl.settings import Hours, NotNegative
from atmossl.value_faults import as_written, listed


def read_cell_mask(path: Path) -> CellMask:
    """Read the hidden cells from a NetCDF or zarr file with one variable on (latitude, longitude),
    which is not 0 where a cell is hidden.

    Raises:
        ValueError: no such file, not one such variable, or one with missing values.
    """
    key = f"task.mask_file={path}"
    if not path.exists():
        raise ValueError(f"{key} does not exist")
    kind = NETCDF if path.is_dir() else kind_of(path)
    if kind != NETCDF:
        raise ValueError(f"{key} cannot be read as NetCDF or zarr: the file is {kind}")
    try:
        with xr.open_zarr(path) if path.is_dir() else open_netcdf_file(path) as dataset:
            dataset = dataset.rename(
                {old: new for old, new in (("lat", "latitude"), ("lon", "longitude"))
                 if old in dataset.dims}
            ).load()  # fmt: skip
    except (OSError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"{key} cannot be read as NetCDF or zarr: {why}") from error
    candidates = [n for n in dataset.data_vars if set(dataset[n].dims) == {"latitude", "longitude"}]
    if len(candidates) != 1:
        raise ValueError(
            f"{key} needs one variable on (latitude, longitude), not 0 where hidden; it has "
            f"{as_written({str(n): dataset[n].dims for n in dataset.data_vars})}"
        )
    lacking = sorted({"latitude", "longitude"} - set(map(str, dataset.coords)))
    if lacking:
        raise ValueError(
            f"{key} has no values of {listed(lacking)}; needed: centres of its cells, degrees"
        )
    if bool(dataset[candidates[0]].isnull().any()):
        raise ValueError(f"{key} has missing values; needed: 0 where given, another where hidden")
    order, longitude = ascending_longitudes(np.asarray(dataset["longitude"], np.float64))
    array = dataset[candidates[0]].isel(longitude=order).sortby("latitude")
    array = array.transpose("latitude", "longitude")
    try:
        grid = Grid(np.asarray(array["latitude"], np.float64), longitude)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return CellMask(grid, array.to_numpy() != 0, key)


@dataclass(frozen=True)
class AllButListed:
    """Every cell without a station of a list. lat, lon: of the stations, degrees."""

    lat: np.ndarray
    lon: np.ndarray
    source: str

    def __repr__(self) -> str:
        return described(self.source, self.lat, self.lon)

    def contains(self, lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
        width = np.median(np.diff(lon) % 360.0)
        columns = ((self.lon - lon[0] + width / 2) % 360.0 // width).astype(int)
        outer = np.diff(lat)[[0, -1]] / 2
        edges = np.concatenate(
            [[lat[0] - outer[0]], lat[:-1] + np.diff(lat) / 2, [lat[-1] + outer[1]]]
        )
        rows = np.searchsorted(edges, self.lat, side="right") - 1
        inside = (rows >= 0) & (rows < len(lat)) & (columns < len(lon))
        hidden = np.ones((len(lat), len(lon)), bool)
        hidden[rows[inside], columns[inside]] = False
        return hidden

    def check(self, grid: Grid) -> None:
        if self.contains(grid.latitude, grid.longitude).all():
            raise ValueError(f"{self.source}: no station lies in a cell of the store's grid")


def read_stations(path: Path) -> AllButListed:
    """Read the positions of stations from a CSV file with columns latitude and longitude in
    degrees.

    Raises:
        ValueError: no such file, or columns or values that do not fit.
    """
    key = f"task.stations={path}"
    if not path.is_file():
        raise ValueError(f"{key} does not exist")
    try:
        table = pd.read_csv(path)
        lacking = [name for name in ("latitude", "longitude") if name not in table]
        if lacking:
            raise ValueError(f"{listed(lacking)} not among {listed(table.columns)}")
        lat, lon = (table[n].to_numpy(np.float64) for n in ("latitude", "longitude"))
    except (ValueError, pd.errors.ParserError) as error:
        raise ValueError(f"{key} needs numeric columns latitude and longitude: {error}") from error
    if not len(table):
        raise ValueError(f"{key} lists no station")
    wrong = np.flatnonzero(~(np.isfinite(lon) & (np.abs(lat) <= 90)))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"{key}: station {row + 1} at latitude {lat[row]:g}, longitude {lon[row]:g}; valid: "
            "latitudes from -90 to 90 and finite longitudes"
        )
    return AllButListed(lat, lon, key)


def _boxes(values: Any) -> tuple[LatLonBox, ...]:
    """Boxes, of which the configuration has the four limits."""
    try:
        limits = [box if isinstance(box, LatLonBox) else [*map(float, box)] for box in values]
        if any(len(box) != 4 for box in limits if isinstance(box, list)):
            raise TypeError("a box has four limits")
    except (TypeError, ValueError) as error:
        raise ValueError("needed: a list of boxes [south, north, west, east] in degrees") from error
    return tuple(box if isinstance(box, LatLonBox) else LatLonBox(*box) for box in limits)


def inpainting(
    boxes: Annotated[tuple[LatLonBox, ...], BeforeValidator(_boxes)] = (),
    mask_file: Path | None = None,
    observed: float | None = None,
    stations: Path | None = None,
    seed: NotNegative = 0,
    regions: Sequence[HiddenCells] = (),
    hidden_hours: Annotated[Hours | None, Field(alias="hidden_time")] = None,
    missing: bool = False,
) -> Inpainting:
    """The task that hides `boxes` [south, north, west, east], the cells of a `mask_file`, all cells
    but a share `observed` or those of the `stations` file, and further `regions`; only for
    `hidden_time`, if given. missing: hide the store's missing values, too.

    Raises:
        ValueError: a file that cannot be read or does not fit, or nothing is named.
    """
    cells: list[HiddenCells] = [*boxes, *regions]
    if mask_file is not None:
        cells.append(read_cell_mask(mask_file))
    if observed is not None:
        cells.append(AllButStations(observed, seed))
    if stations is not None:
        cells.append(read_stations(stations))
    return Inpainting(tuple(cells), hidden_hours, missing)
