"""Zarr layouts that are no CF dataset: AtmoRep's, and that of anemoi-datasets."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import dask.array
import numpy as np
import xarray as xr
import zarr
from xarray.conventions import decode_cf_variable

from atmossl.data.absent_chunks import without_absent
from atmossl.data.chunks import ChunkedArray, Region, SharedChunks

Adapted = tuple[xr.Dataset, dict[str, ChunkedArray]]
_ATMOREP_NAMES = {
    "temperature": "temperature",
    "velocity_u": "u_component_of_wind",
    "velocity_v": "v_component_of_wind",
    "velocity_z": "vertical_velocity",
    "specific_humidity": "specific_humidity",
    "vorticity": "vorticity",
    "divergence": "divergence",
    "t2m": "2m_temperature",
    "u10m": "10m_u_component_of_wind",
    "v10m": "10m_v_component_of_wind",
    "msl": "mean_sea_level_pressure",
    "total_precip": "total_precipitation",
}


@dataclass(frozen=True)
class OnePosition(SharedChunks):
    """A chunked array at one position of one of its axes, which drops out."""

    array: zarr.Array
    axis: int
    position: int

    @property
    def chunks(self) -> tuple[int, ...]:
        return self.array.chunks[: self.axis] + self.array.chunks[self.axis + 1 :]

    @property
    def decoded_with(self) -> Hashable:
        return id(self.array), self.position // self.array.chunks[self.axis]

    def read_all(
        self, arrays: Sequence["OnePosition"], regions: Sequence[Region]
    ) -> list[np.ndarray]:
        positions, region = [one.position for one in arrays], regions[0]
        first = min(positions)
        wanted = slice(first, max(positions) + 1)
        block = _block(self.array, (*region[: self.axis], wanted, *region[self.axis :]))
        return [block.take(position - first, self.axis) for position in positions]


def _block(array: zarr.Array, region: Region) -> np.ndarray:
    """Values of a region, NaN in the chunks that the store does not hold."""
    return without_absent(array, region, np.asarray(array[region]))[0]


def atmorep(group: zarr.Group) -> Adapted:
    """AtmoRep's stores: `data[time, field, level, lat, lon]` and, at the surface,
    `data_sfc[time, field, lat, lon]`, with `time`, `lats`, `lons` and the attributes `fields`,
    `fields_sfc` and `levels`. Fields get their ERA5 names where they are known. `lats` may be
    AtmoRep's mathematical ones, from 0 at the north pole to 180.

    Raises:
        ValueError: an array or an attribute is missing.
    """
    attributes: dict[str, Any] = dict(group.attrs)
    arrays: dict[str, ChunkedArray] = {}
    fields: dict[str, tuple[tuple[str, ...], dask.array.Array]] = {}
    for key, names, dims in (
        ("data", "fields", ("time", "level", "latitude", "longitude")),
        ("data_sfc", "fields_sfc", ("time", "latitude", "longitude")),
    ):
        stored = group.get(key)
        if not isinstance(stored, zarr.Array):
            continue
        if names not in attributes:
            raise ValueError(f"array {key} is there, but no attribute {names}")
        lazy = dask.array.from_zarr(stored)
        for position, name in enumerate(map(str, attributes[names])):
            canonical = _ATMOREP_NAMES.get(name, name)
            arrays[canonical] = OnePosition(stored, 1, position)
            fields[canonical] = (dims, lazy[:, position])
    if not fields:
        raise ValueError("neither data nor data_sfc is there")
    coords = {
        "time": _dates(group, "time"),
        "latitude": _latitudes(np.asarray(_array(group, "lats")[:])),
        "longitude": np.asarray(_array(group, "lons")[:]),
    }
    if "data" in group:
        coords["level"] = np.array(attributes["levels"])
    return xr.Dataset(fields, coords), arrays


def _latitudes(values: np.ndarray) -> np.ndarray:
    return 90.0 - values if values.min() >= 0.0 and values.max() > 90.0 else values


def _dates(group: zarr.Group, name: str) -> np.ndarray:
    """Dates that are stored as such, as numbers with CF units, or as nanoseconds since 1970.

    Raises:
        ValueError: numbers whose unit nothing tells.
    """
    array = _array(group, name)
    values = np.asarray(array[:])
    if values.dtype.kind != "M" and "units" in array.attrs:
        variable = xr.Variable(("time",), values, dict(array.attrs))
        return decode_cf_variable(name, variable).values
    dates = values if values.dtype.kind == "M" else values.astype("datetime64[ns]")
    if (np.abs(np.diff(dates)) < np.timedelta64(1, "s")).any():
        raise ValueError(f"array {name} of {values.dtype} has no attribute units, nor dates")
    return dates


def _array(group: zarr.Group, name: str) -> zarr.Array:
    found = group.get(name)
    if not isinstance(found, zarr.Array):
        raise ValueError(f"array {name} is missing; there are {sorted(group.array_keys())}")
    return found


@dataclass(frozen=True)
class AnemoiField(SharedChunks):
    """One parameter of an anemoi dataset, [time level lat lon] or [time lat lon].

    positions: of its levels along the axis of variables.
    """

    array: zarr.Array  # [time variable ensemble cell]
    positions: tuple[int, ...]
    grid: tuple[int, int]
    on_levels: bool

    @property
    def chunks(self) -> tuple[int, ...]:
        levels = (len(self.positions),) if self.on_levels else ()
        return (self.array.chunks[0], *levels, *self.grid)

    @property
    def decoded_with(self) -> Hashable:
        return id(self.array), frozenset(n // self.array.chunks[1] for n in self.positions)

    def read_all(
        self, arrays: Sequence["AnemoiField"], regions: Sequence[Region]
    ) -> list[np.ndarray]:
        time, lat, lon = regions[0][0], regions[0][-2], regions[0][-1]
        num_lon = self.grid[1]
        cells = slice(lat.start * num_lon, lat.stop * num_lon)
        wanted = [one._wanted(region) for one, region in zip(arrays, regions, strict=True)]
        first = min(min(positions) for positions in wanted)
        last = max(max(positions) for positions in wanted)
        region = (time, slice(first, last + 1), slice(0, 1), cells)
        block = _block(self.array, region)[:, :, 0]
        block = block.reshape(*block.shape[:2], lat.stop - lat.start, num_lon)[..., lon]
        return [
            block[:, [position - first for position in positions]]
            if one.on_levels
            else block[:, positions[0] - first]
            for one, positions in zip(arrays, wanted, strict=True)
        ]

    def _wanted(self, region: Region) -> tuple[int, ...]:
        return self.positions[region[1]] if self.on_levels else self.positions


def anemoi(group: zarr.Group) -> Adapted:
    """Stores of anemoi-datasets: `data[time, variable, ensemble, cell]` with `dates`,
    `latitudes`, `longitudes` and the attribute `variables`: names such as `2t` and `t_500`, which
    become a variable `t` on levels. The first member is taken. A chunk that holds several
    parameters is decoded once for all that are wanted.

    Raises:
        ValueError: the cells are no regular latitude-longitude grid, row by row.
    """
    data, names = _array(group, "data"), cast(list[str], group.attrs["variables"])
    latitude, longitude, grid = _regular_grid(group)
    parameters: dict[str, dict[int, int]] = {}
    for position, name in enumerate(names):
        parameter, _, level = name.rpartition("_")
        if parameter and level.isdigit():
            parameters.setdefault(parameter, {})[int(level)] = position
        else:
            parameters[name] = {0: position}
    all_levels = sorted({level for found in parameters.values() for level in found if level})
    lazy = dask.array.from_zarr(data)[:, :, 0]
    arrays: dict[str, ChunkedArray] = {}
    fields: dict[str, tuple[Sequence[str], dask.array.Array]] = {}
    for parameter, found in parameters.items():
        on_levels = 0 not in found
        if on_levels and sorted(found) != all_levels:
            continue  # xarray has one axis of levels; the parameter lacks some of them
        positions = tuple(found[level] for level in sorted(found))
        arrays[parameter] = AnemoiField(data, positions, grid, on_levels)
        values = lazy[:, list(positions)].reshape(len(lazy), len(positions), *grid)
        dims = ("time", "level", "latitude", "longitude") if on_levels else ()
        fields[parameter] = (dims or ("time", "latitude", "longitude"), values)
        if not on_levels:
            fields[parameter] = (fields[parameter][0], values[:, 0])
    coords = {
        "time": _dates(group, "dates"),
        "latitude": latitude,
        "longitude": longitude,
    }
    if all_levels:
        coords["level"] = np.array(all_levels)
    return xr.Dataset(fields, coords), arrays


def _regular_grid(group: zarr.Group) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Latitudes and longitudes of the axes of the flat grid."""
    latitudes = np.asarray(_array(group, "latitudes")[:])
    longitudes = np.asarray(_array(group, "longitudes")[:])
    num_lon = int(np.argmax(latitudes != latitudes[0])) or len(latitudes)
    rows = len(latitudes) // num_lon
    regular = rows * num_lon == len(latitudes)
    if regular:
        lat, lon = latitudes.reshape(rows, num_lon), longitudes.reshape(rows, num_lon)
        regular = bool((lat == lat[:, :1]).all() and (lon == lon[:1]).all())
    if not regular:
        raise ValueError(f"the {len(latitudes)} cells are no regular latitude-longitude grid")
    return lat[:, 0], lon[0], (rows, num_lon)
