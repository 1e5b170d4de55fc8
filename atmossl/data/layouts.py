"""Adapters for zarr layouts that are no CF datasets: AtmoRep's, and that of anemoi-datasets."""

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import dask.array
import numpy as np
import xarray as xr
import zarr
from xarray.conventions import decode_cf_variable

from atmossl.data.chunks import ChunkedArray, Region, SharedChunks, without_absent
from atmossl.names import VARIABLE_OF_FIELD
from atmossl.value_faults import listed

_LOGGER = logging.getLogger(__name__)
Adapted = tuple[xr.Dataset, dict[str, ChunkedArray]]


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
        positions, region = [array.position for array in arrays], regions[0]
        first = min(positions)
        positions_to_read = slice(first, max(positions) + 1)
        block = _block(self.array, (*region[: self.axis], positions_to_read, *region[self.axis :]))
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
        listed = [str(name) for name in attributes[names]]
        _check_names(listed, stored.shape[1], f"attribute {names}")
        for position, name in enumerate(listed):
            canonical = VARIABLE_OF_FIELD.get(name, name)
            if canonical in fields:
                raise ValueError(f"attributes fields and fields_sfc both name {name}")
            arrays[canonical] = OnePosition(stored, 1, position)
            fields[canonical] = (dims, lazy[:, position])
    if not fields:
        raise ValueError("neither data nor data_sfc is there")
    coords = {
        "time": dates_in(group, "time"),
        "latitude": atmorep_latitudes(np.asarray(array_in(group, "lats")[:])),
        "longitude": np.asarray(array_in(group, "lons")[:]),
    }
    if "data" in group:
        coords["level"] = np.array(attributes["levels"])
    return xr.Dataset(fields, coords), arrays


def _check_names(names: Sequence[str], size: int, where: str) -> None:
    """Check that every position of an axis has a name of its own: the last of two equal ones
    would hide the first."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{where} names {listed(twice)} more than once")
    if len(names) != size:
        raise ValueError(f"{where} has {len(names)} names for {size} fields")


def atmorep_latitudes(values: np.ndarray) -> np.ndarray:
    """Degrees north of AtmoRep's latitudes, which may be counted from the north pole."""
    return 90.0 - values if values.min() >= 0.0 and values.max() > 90.0 else values


def dates_in(group: zarr.Group, name: str) -> np.ndarray:
    """The dates of a store: stored as dates, as numbers with CF units, or as nanoseconds since
    1970.

    Raises:
        ValueError: numbers whose unit nothing tells.
    """
    array = array_in(group, name)
    values = np.asarray(array[:])
    if values.dtype.kind != "M" and "units" in array.attrs:
        variable = xr.Variable(("time",), values, dict(array.attrs))
        return decode_cf_variable(name, variable).values
    dates = values if values.dtype.kind == "M" else values.astype("datetime64[ns]")
    if (np.abs(np.diff(dates)) < np.timedelta64(1, "s")).any():
        raise ValueError(f"array {name} of {values.dtype} has no attribute units, nor dates")
    return dates


def array_in(group: zarr.Group, name: str) -> zarr.Array:
    """The array of a group by its name; ValueError if there is none."""
    member = group.get(name)
    if not isinstance(member, zarr.Array):
        raise ValueError(f"array {name} is missing; there are {listed(sorted(group.array_keys()))}")
    return member


@dataclass(frozen=True)
class AnemoiField(SharedChunks):
    """One parameter of an anemoi dataset, [time level lat lon] or [time lat lon].

    positions: of its levels along the axis of variables, None for a level that it lacks: its
    values there are missing. missing_steps: those of dates without data, whose values, whatever is
    stored, are missing, too.
    """

    array: zarr.Array  # [time variable ensemble cell]
    positions: tuple[int | None, ...]
    grid: tuple[int, int]
    on_levels: bool
    member: int = 0
    missing_steps: tuple[int, ...] = ()

    @property
    def chunks(self) -> tuple[int, ...]:
        levels = (len(self.positions),) if self.on_levels else ()
        return (self.array.chunks[0], *levels, *self.grid)

    @property
    def decoded_with(self) -> Hashable:
        places = frozenset(n // self.array.chunks[1] for n in self.positions if n is not None)
        return id(self.array), places

    def read_all(
        self, arrays: Sequence["AnemoiField"], regions: Sequence[Region]
    ) -> list[np.ndarray]:
        time, lat, lon = regions[0][0], regions[0][-2], regions[0][-1]
        num_lon = self.grid[1]
        cells = slice(lat.start * num_lon, lat.stop * num_lon)
        pairs = zip(arrays, regions, strict=True)
        positions_of_arrays = [array._wanted(region) for array, region in pairs]
        stored = [n for positions in positions_of_arrays for n in positions if n is not None] or [0]
        first = min(stored)
        block = np.asarray(self.array[time, first : max(stored) + 1, self.member, cells])
        block = block.reshape(*block.shape[:2], lat.stop - lat.start, num_lon)[..., lon]
        steps = range(self.array.shape[0])[time]
        missing = [n for n, step in enumerate(steps) if step in self.missing_steps]
        fields = []
        for array, positions in zip(arrays, positions_of_arrays, strict=True):
            values = block[:, [0 if n is None else n - first for n in positions]]
            values[:, [n is None for n in positions]] = np.nan
            values[missing] = np.nan
            fields.append(values if array.on_levels else values[:, 0])
        return fields

    def _wanted(self, region: Region) -> tuple[int | None, ...]:
        return self.positions[region[1]] if self.on_levels else self.positions

    def lazy(self, data: dask.array.Array) -> dask.array.Array:
        """The field as a dask array, from the values [time variable ... cell] of the store."""
        values: Any = data[:, [n or 0 for n in self.positions]]
        absent = np.array([n is None for n in self.positions])
        lost = np.isin(np.arange(len(data)), self.missing_steps)
        mask = absent | lost[:, None]
        if mask.any():
            mask = mask.reshape(*mask.shape, *[1] * (values.ndim - 2))
            values = dask.array.where(mask, np.float32(np.nan), values)
        values = values.reshape(*values.shape[:-1], *self.grid)
        return values if self.on_levels else values[:, 0]


def anemoi(group: zarr.Group, member: int | None = None) -> Adapted:
    """Stores of anemoi-datasets: `data[time, variable, ensemble, cell]` with `dates`,
    `latitudes`, `longitudes` and the attribute `variables`: names such as `2t` and `t_500`, which
    become a variable `t` on levels (`t_levels` if there is a `t` at the surface, too). A level that
    a parameter lacks, and dates in the attribute `missing_dates`, are missing values. A store of
    several members has a dimension `number`, unless one is chosen. A chunk that holds several
    parameters is decoded once for all that are wanted.

    Raises:
        ValueError: the cells are no regular latitude-longitude grid, row by row; names that are
            there twice, or no such member.
    """
    data, names = array_in(group, "data"), cast(list[str], group.attrs["variables"])
    _check_names(names, data.shape[1], "attribute variables")
    latitude, longitude, grid = _regular_grid(group)
    dates, members = dates_in(group, "dates"), data.shape[2]
    if member is not None and not 0 <= member < members:
        raise ValueError(f"number={member} is no member; valid: 0 to {members - 1}")
    single = member is not None or members == 1
    chosen = member or 0
    lazy = dask.array.from_zarr(data)
    lazy = lazy[:, :, chosen] if single else lazy
    arrays: dict[str, ChunkedArray] = {}
    fields: dict[str, tuple[Sequence[str], dask.array.Array]] = {}
    parameters, all_levels = _parameters(names)
    missing = _missing_steps(group, dates)
    for parameter, (positions, on_levels) in parameters.items():
        field = AnemoiField(data, positions, grid, on_levels, chosen, missing)
        dims = [*(["level"] if on_levels else []), *([] if single else ["number"])]
        fields[parameter] = (["time", *dims, "latitude", "longitude"], field.lazy(lazy))
        if single:
            arrays[parameter] = field
    coords = {"time": dates, "latitude": latitude, "longitude": longitude}
    if all_levels:
        coords["level"] = np.array(all_levels)
    if not single:
        coords["number"] = np.arange(members)
    return xr.Dataset(fields, coords), arrays


Places = tuple[tuple[int | None, ...], bool]


def _parameters(names: Sequence[str]) -> tuple[dict[str, Places], list[int]]:
    """Positions of every parameter on all levels of the store, and whether it has levels; and those
    levels. Tells which parameters lack some."""
    surface: dict[str, int] = {}
    on_levels: dict[str, dict[int, int]] = {}
    for position, name in enumerate(names):
        parameter, _, level = name.rpartition("_")
        if parameter and level.isdigit():
            on_levels.setdefault(parameter, {})[int(level)] = position
        else:
            surface[name] = position
    levels = sorted({level for places in on_levels.values() for level in places})
    parameters: dict[str, Places] = {name: ((n,), False) for name, n in surface.items()}
    for name, places in on_levels.items():
        lacking = [level for level in levels if level not in places]
        if lacking:
            _LOGGER.warning(
                "%s lacks levels %s of the store: missing values there", name, listed(lacking)
            )
        key = f"{name}_levels" if name in surface else name
        parameters[key] = (tuple(places.get(level) for level in levels), True)
    return parameters, levels


def _missing_steps(group: zarr.Group, dates: np.ndarray) -> tuple[int, ...]:
    """The steps of the dates for which the store says that it has no data; reports how many."""
    listed = cast(list[str], group.attrs.get("missing_dates") or [])
    lost = np.array([np.datetime64(str(date).removesuffix("Z"), "s") for date in listed], "M8[s]")
    steps = np.flatnonzero(np.isin(dates.astype("M8[s]"), lost))
    if len(steps):
        _LOGGER.warning("%d dates are missing values, by missing_dates of the store", len(steps))
    return tuple(map(int, steps))


def _regular_grid(group: zarr.Group) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """The latitudes and longitudes of a regular grid from those of all its cells."""
    latitudes = np.asarray(array_in(group, "latitudes")[:])
    longitudes = np.asarray(array_in(group, "longitudes")[:])
    num_lon = int(np.argmax(latitudes != latitudes[0])) or len(latitudes)
    rows = len(latitudes) // num_lon
    regular = rows * num_lon == len(latitudes)
    if regular:
        lat, lon = latitudes.reshape(rows, num_lon), longitudes.reshape(rows, num_lon)
        regular = bool((lat == lat[:, :1]).all() and (lon == lon[:1]).all())
    if not regular:
        raise ValueError(f"the {len(latitudes)} cells are no regular latitude-longitude grid")
    return lat[:, 0], lon[0], (rows, num_lon)
