"""Opening stores: any xarray-readable record becomes a validated `Segment` in canonical form.

Canonical: variables by their ERA5 names, dims (time, level, latitude, longitude), latitudes and
longitudes ascending, longitudes in [0, 360). Nothing is read at open but coordinates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import xarray as xr
import zarr
import zarr.errors
import zarr.storage

from atmossl.data.catalog import CatalogEntry, Period, SegmentEntry, Split, resolve_location
from atmossl.data.variables import check_units
from atmossl.geometry import Box, Grid

_COORDINATES = {
    "time": ("time", "valid_time"),
    "level": ("level", "isobaricInhPa", "pressure_level", "plev"),
    "latitude": ("latitude", "lat"),
    "longitude": ("longitude", "lon"),
}
_HOUR = np.timedelta64(3_600_000_000_000, "ns")


@dataclass(frozen=True)
class Segment:
    """One continuous, evenly spaced record, opened read-only.

    latitude_order, longitude_order: position in the store of every canonical row and column.
    levels: pressure levels in hPa that were asked for. arrays: fields in memory, if loaded.
    """

    name: str
    location: str
    dataset: xr.Dataset
    variables: tuple[str, ...]
    levels: tuple[int, ...]
    times: np.ndarray
    grid: Grid
    latitude_order: np.ndarray
    longitude_order: np.ndarray
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def step(self) -> np.timedelta64:
        return self.times[1] - self.times[0]

    @property
    def step_hours(self) -> float:
        return float(self.step / _HOUR)

    def time_hours(self, start: int, count: int) -> np.ndarray:
        """Hours since 1970-01-01T00 of the steps, float64."""
        chosen = self.times[start : start + count]
        return (chosen - np.datetime64(0, "ns")) / _HOUR

    def find_time(self, time: np.datetime64, key: str = "init_time") -> int:
        """Index of a time; ValueError names the covered period if it is not there."""
        index = int(np.searchsorted(self.times, time))
        if index == len(self.times) or self.times[index] != time:
            raise ValueError(
                f"{key}={np.datetime_as_string(time, 'h')} is not in segment {self.name}; valid: "
                f"every {self.step_hours:g} h from {np.datetime_as_string(self.times[0], 'h')} to "
                f"{np.datetime_as_string(self.times[-1], 'h')}"
            )
        return index

    def read(
        self, variable: str, levels: Sequence[int], start: int, count: int, box: Box
    ) -> np.ndarray:
        """Values [level time lat lon] of one variable in one window, float32.

        Raises:
            ValueError: missing values, or a chunk that cannot be read; names store and times.
        """
        lat, lon = box.lat_index(), box.lon_index(self.grid.shape[1])
        if variable in self.arrays:
            rows = np.array([self.levels.index(level) if level else 0 for level in levels])
            steps = np.arange(start, start + count)
            return self.arrays[variable][np.ix_(rows, steps, lat, lon)]
        times = slice(start, start + count)
        values = self._load(variable, levels, times, lat, lon)
        if not np.isfinite(values).all():
            raise ValueError(
                f"{self.location}: {variable} has missing values between {self.times[start]} and "
                f"{self.times[start + count - 1]}; fill them or choose another period"
            )
        return values

    def _load(
        self,
        variable: str,
        levels: Sequence[int],
        times: slice,
        lat: np.ndarray,
        lon: np.ndarray,
    ) -> np.ndarray:
        array = self.dataset[variable].isel(
            time=times, latitude=self.latitude_order[lat], longitude=self.longitude_order[lon]
        )
        if "level" in array.dims:
            array = array.sel(level=list(levels))
        else:
            array = array.expand_dims("level")
        try:
            array = array.transpose("level", "time", "latitude", "longitude").load()
        except Exception as error:
            raise ValueError(
                f"{self.location}: cannot read {variable} between {self.times[times][0]} and "
                f"{self.times[times][-1]}, the chunk is corrupt or out of reach "
                f"({type(error).__name__}: {error})"
            ) from error
        return array.values.astype(np.float32)

    def whole(self) -> Box:
        return Box(0, 0, *self.grid.shape)

    def loaded(self) -> Self:
        """With all its variables in memory, checked to be finite."""
        arrays = {
            name: self.read(name, self._levels_of(name), 0, len(self.times), self.whole())
            for name in self.variables
        }
        return replace(self, arrays=arrays)

    def _levels_of(self, variable: str) -> tuple[int, ...]:
        return self.levels if "level" in self.dataset[variable].dims else (0,)

    def between(self, start: str, end: str) -> Self:
        """The part of the segment in a period, both ends included; an empty end is open.

        Raises:
            ValueError: fewer than two steps lie in the period.
        """
        first = np.datetime64(start, "ns") if start else self.times[0]
        last = np.datetime64(end, "ns") if end else self.times[-1]
        inside = np.flatnonzero((self.times >= first) & (self.times <= last))
        if len(inside) < 2:
            raise ValueError(
                f"{self.location}: fewer than two steps between {first} and {last}; the segment "
                f"{self.name} covers {self.times[0]} to {self.times[-1]}"
            )
        steps = slice(int(inside[0]), int(inside[-1]) + 1)
        arrays = {name: values[:, steps] for name, values in self.arrays.items()}
        dataset = self.dataset.isel(time=steps)
        return replace(self, dataset=dataset, times=self.times[steps], arrays=arrays)

    def to_dataset(self) -> xr.Dataset:
        """The record as a canonical dataset in memory, dims (time, level, latitude, longitude)."""
        here = self if self.arrays else self.loaded()
        fields = {}
        for name, values in here.arrays.items():
            units = self.dataset[name].attrs
            if self._levels_of(name) == (0,):
                fields[name] = (("time", "latitude", "longitude"), values[0], units)
            else:
                dims = ("time", "level", "latitude", "longitude")
                fields[name] = (dims, values.swapaxes(0, 1), units)
        coords = {
            "time": self.times,
            "level": list(self.levels),
            "latitude": self.grid.latitude,
            "longitude": self.grid.longitude,
        }
        return xr.Dataset(fields, coords)


def open_raw(entry: SegmentEntry) -> xr.Dataset:
    """Open a zarr (folder, zip or URL) or NetCDF store lazily and read-only.

    Raises:
        ValueError: there is no such store, or it cannot be opened.
    """
    location = resolve_location(entry.location)
    remote = "://" in location
    if not remote and not Path(location).exists():
        raise ValueError(f"store {location} does not exist")
    try:
        if location.endswith((".nc", ".nc4")):
            return xr.open_dataset(location)
        if location.endswith(".zip"):
            store: Any = zarr.storage.ZipStore(location, mode="r")
            return xr.open_dataset(store, engine="zarr", consolidated=False)
        options = entry.storage_options or None
        return xr.open_dataset(location, engine="zarr", storage_options=options)
    except (OSError, ValueError, KeyError, zarr.errors.BaseZarrError) as error:
        raise ValueError(
            f"store {location} cannot be opened as zarr or NetCDF ({type(error).__name__}: {error})"
        ) from error


def open_segment(
    name: str,
    dataset: xr.Dataset,
    location: str,
    *,
    variables: Sequence[str],
    levels: Sequence[int],
    variable_names: dict[str, str] | None = None,
    coordinates: dict[str, str] | None = None,
) -> Segment:
    """Bring an opened dataset into canonical form and check it.

    Raises:
        ValueError: names the store and what does not fit: a missing variable, level or
            coordinate, wrong units, duplicate or unevenly spaced times, an irregular grid.
    """
    stored = {v: (variable_names or {}).get(v, v) for v in variables}
    missing = sorted(v for v, s in stored.items() if s not in dataset.data_vars)
    if missing:
        raise ValueError(
            f"{location}: variables {missing} are missing; the store has "
            f"{sorted(map(str, dataset.data_vars))}"
        )
    dataset = dataset[list(stored.values())].rename({s: v for v, s in stored.items() if s != v})
    dataset = _rename_coordinates(dataset, coordinates or {}, location)
    for variable in variables:
        check_units(variable, dataset[variable].attrs.get("units"), location)
    _check_levels(dataset, levels, location)
    times = _checked_times(dataset, location)
    latitude_order, longitude_order, grid = _canonical_grid(dataset, location)
    return Segment(
        name=name,
        location=location,
        dataset=dataset,
        variables=tuple(variables),
        levels=tuple(levels),
        times=times,
        grid=grid,
        latitude_order=latitude_order,
        longitude_order=longitude_order,
    )


def _rename_coordinates(dataset: xr.Dataset, given: dict[str, str], location: str) -> xr.Dataset:
    names = {}
    for canonical, usual in _COORDINATES.items():
        choices = (given[canonical],) if canonical in given else usual
        found = [name for name in choices if name in dataset.dims]
        if found:
            names[found[0]] = canonical
        elif canonical != "level":
            raise ValueError(
                f"{location}: no dimension for {canonical}, tried {list(choices)}; the store has "
                f"{sorted(map(str, dataset.dims))}. Name it under `coordinates` in the catalog"
            )
    return dataset.rename({old: new for old, new in names.items() if old != new})


def _check_levels(dataset: xr.Dataset, levels: Sequence[int], location: str) -> None:
    if not levels or "level" not in dataset.dims:
        return
    have = [int(level) for level in dataset["level"].values]
    missing = sorted(set(levels) - set(have))
    if missing:
        raise ValueError(f"{location}: levels {missing} hPa are missing; the store has {have}")


def _checked_times(dataset: xr.Dataset, location: str) -> np.ndarray:
    times = dataset["time"].values
    if not np.issubdtype(times.dtype, np.datetime64):
        raise ValueError(
            f"{location}: time has type {times.dtype}; needed: standard calendar dates"
        )
    times = times.astype("datetime64[ns]")
    if len(times) < 2:
        raise ValueError(f"{location}: only {len(times)} time steps; at least 2 are needed")
    steps = np.diff(times)
    if (steps == np.timedelta64(0)).any():
        raise ValueError(
            f"{location}: time {times[1:][steps == np.timedelta64(0)][0]} is duplicate"
        )
    if (steps != steps[0]).any() or steps[0] < np.timedelta64(0):
        at = int(np.flatnonzero(steps != steps[0])[0]) if (steps != steps[0]).any() else 0
        raise ValueError(
            f"{location}: time steps are not uniform: {steps[0] / _HOUR:g} h at first, "
            f"{steps[at] / _HOUR:g} h after {times[at]}"
        )
    return times


def _canonical_grid(dataset: xr.Dataset, location: str) -> tuple[np.ndarray, np.ndarray, Grid]:
    latitude = dataset["latitude"].values.astype(np.float64)
    longitude = dataset["longitude"].values.astype(np.float64) % 360.0
    latitude_order, longitude_order = np.argsort(latitude), np.argsort(longitude)
    ordered = longitude[longitude_order]
    gaps = np.diff(ordered)
    if len(gaps) and gaps.max() > 1.5 * np.median(gaps):  # a region across Greenwich
        first = int(gaps.argmax()) + 1
        longitude_order = np.roll(longitude_order, -first)
        ordered = np.concatenate([ordered[first:], ordered[:first] + 360.0])
    try:
        grid = Grid(latitude[latitude_order], ordered)
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from error
    return latitude_order, longitude_order, grid


def open_split(
    entry: CatalogEntry,
    split: Split,
    *,
    variables: Sequence[str],
    levels: Sequence[int],
    in_memory: bool = False,
) -> tuple[Segment, ...]:
    """All periods of one split as segments, checked to share grid and time step.

    Raises:
        ValueError: an unknown variable, level or split, or whatever `open_segment` refuses.
    """
    if split not in entry.splits:
        raise ValueError(
            f"split {split!r} is not in the catalog entry; valid: {sorted(entry.splits)}"
        )
    unknown = sorted(set(variables) - set(entry.variables))
    if unknown:
        raise ValueError(
            f"stream variables {unknown} are not in the catalog entry; valid: "
            f"{sorted(entry.variables)}"
        )
    segments = tuple(
        _open_period(entry, period, variables, levels) for period in entry.splits[split]
    )
    for segment in segments[1:]:
        if segment.step != segments[0].step or not segment.grid.matches(segments[0].grid):
            raise ValueError(
                f"{segment.location} has another grid or time step than {segments[0].location}"
            )
    return tuple(segment.loaded() for segment in segments) if in_memory else segments


def _open_period(
    entry: CatalogEntry, period: Period, variables: Sequence[str], levels: Sequence[int]
) -> Segment:
    source = entry.segments[period.segment]
    segment = open_segment(
        period.segment,
        open_raw(source),
        resolve_location(source.location),
        variables=variables,
        levels=levels,
        variable_names=entry.variables,
        coordinates=entry.coordinates,
    )
    return segment.between(period.start, period.end)
