"""Reads files that others wrote (GRIB, NetCDF and zarr, with any of the usual names) as one
canonical dataset, for `atmossl data ingest`."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import xarray as xr

from atmossl.data.axes import SharedLabels, with_regular_axes
from atmossl.data.backends import (
    GRIB,
    REFERENCES,
    data_files,
    is_zarr,
    joining,
    kind_of,
    open_store,
)
from atmossl.data.catalog import SegmentEntry
from atmossl.data.grib import NoSuchMessage, open_grib
from atmossl.data.metadata import (
    FROM_HEIGHT,
    LEAD_NAMES,
    FileStatements,
    as_geopotential,
    check_statements,
    height_factor,
    is_start,
    lead_of,
    valid_time_of,
)
from atmossl.data.store import COORDINATES, MODEL_LEVELS, check_model_levels, rename_coordinates
from atmossl.data.variables import SHORT_NAMES, VARIABLES, check_units, conversion
from atmossl.geometry import TOLERANCE_DEG, ascending_longitudes
from atmossl.value_faults import as_written, listed

# Files that are joined, and variables of one file, must not contradict each other: what is
# there twice is refused, as joining would keep the first without a word.

_DECIMALS = 3  # of degrees and hPa that make two coordinates differ
_AXES = ("level", "latitude", "longitude")


@dataclass(frozen=True)
class Origin:
    """The file that a dataset was read from, and what its variables said of themselves there."""

    file: str
    notes: dict[str, dict[str, str]] = field(default_factory=dict)

    def note(self, variable: str, array: xr.DataArray) -> None:
        """Keep the scalar coordinates and GRIB keys of a variable, which joining would lose."""
        scalars = {
            str(name): str(coord.values) for name, coord in array.coords.items() if not coord.ndim
        }
        keys = {k.removeprefix("GRIB_"): str(v) for k, v in array.attrs.items() if k[:5] == "GRIB_"}
        self.notes[variable] = scalars | keys

    def differing(self, other: "Origin", variable: str) -> str:
        """The notes in which two files differ for a variable, in words; empty if there are none."""
        notes, other_notes = self.notes[variable], other.notes[variable]
        keys = [key for key in notes if key in other_notes and notes[key] != other_notes[key]]
        pairs = [f"{key} ({notes[key]} and {other_notes[key]})" for key in keys]
        return f"; they differ in {', '.join(pairs[:4])}" if pairs else ""


def check_one_grid(arrays: Mapping[str, xr.DataArray], file: str) -> dict[str, xr.DataArray]:
    """The variables of a file on the cells of the first variable, where cells differ by rounding
    alone.

    Raises:
        ValueError: two variables have other cells.
    """
    if not arrays:
        return {}
    first_name, first = next(iter(arrays.items()))
    same = {}
    for name, array in arrays.items():
        for axis in ("latitude", "longitude"):
            usual, cells = first[axis].values, array[axis].values
            if usual.shape != cells.shape or np.abs(usual - cells).max() > TOLERANCE_DEG:
                raise ValueError(
                    f"input {file}: {first_name} and {name} lie on different cells: {_axis(usual)} "
                    f"and {_axis(cells)} of {axis}; ingest them apart, with variables"
                )
        same[name] = array.assign_coords(latitude=first["latitude"], longitude=first["longitude"])
    return same


def _axis(values: np.ndarray) -> str:
    return f"{len(values)} from {values[0]:g} to {values[-1]:g}"


def check_overlaps(parts: Sequence[xr.Dataset], origins: Sequence[Origin], location: str) -> None:
    """Check that no value is given by two files. Fields without time may be, if they are equal.

    Raises:
        ValueError: names variable, date and both files, and what the files say differently.
    """
    if len(parts) == 1:
        return
    for name in dict.fromkeys(str(name) for part in parts for name in part.data_vars):
        having = [
            (part[name], origin)
            for part, origin in zip(parts, origins, strict=True)
            if name in part.data_vars
        ]
        dated = [(array, origin) for array, origin in having if "time" in array.dims]
        _check_dated(name, dated, location)
        _check_static(name, [pair for pair in having if "time" not in pair[0].dims], location)


def _check_dated(name: str, having: Sequence[tuple[xr.DataArray, Origin]], location: str) -> None:
    """Check that files on the same cells and levels have no date in common."""
    places: dict[tuple[bytes, ...], list[tuple[xr.DataArray, Origin]]] = {}
    for array, origin in having:
        places.setdefault(tuple(_labels(array, axis).tobytes() for axis in _AXES), []).append(
            (array, origin)
        )
    for pairs in places.values():
        dates = np.concatenate([array["time"].values for array, _ in pairs])
        which = np.repeat(np.arange(len(pairs)), [array.sizes["time"] for array, _ in pairs])
        order = np.argsort(dates, kind="stable")
        twice = (dates[order][1:] == dates[order][:-1]) & (which[order][1:] != which[order][:-1])
        if twice.any():
            at = int(np.flatnonzero(twice)[0])
            first, second = (pairs[which[order][n]] for n in (at, at + 1))
            _refuse(name, dates[order][at], first, second, location)
    for pairs_here, pairs_there in combinations(places.values(), 2):
        here, there = pairs_here[0][0], pairs_there[0][0]
        if all(np.isin(_labels(here, axis), _labels(there, axis)).any() for axis in _AXES):
            for first, second in product(pairs_here, pairs_there):
                common = np.isin(first[0]["time"].values, second[0]["time"].values)
                if common.any():
                    _refuse(name, first[0]["time"].values[common][0], first, second, location)


def _labels(array: xr.DataArray, axis: str) -> np.ndarray:
    """The coordinates of an axis, rounded so that they can be compared; 0 for the level of a
    field without levels."""
    return np.round(array[axis].values, _DECIMALS) if axis in array.dims else np.zeros(1)


def _refuse(
    name: str,
    date: Any,
    first: tuple[xr.DataArray, Origin],
    second: tuple[xr.DataArray, Origin],
    location: str,
) -> NoReturn:
    level = ""
    if "level" in first[0].dims:
        common = np.intersect1d(_labels(first[0], "level"), _labels(second[0], "level"))
        level = f", level {common[0]:g}"
    raise ValueError(
        f"input={location}: files overlap: {name} of {str(date)[:16]}{level} is in "
        f"{first[1].file} and in {second[1].file}{first[1].differing(second[1], name)}. Choose one "
        "with select or filters, or ingest the files apart"
    )


def _share_cells(first: xr.DataArray, second: xr.DataArray) -> bool:
    axes = ("latitude", "longitude")
    return all(np.isin(_labels(first, axis), _labels(second, axis)).any() for axis in axes)


def _check_static(name: str, having: Sequence[tuple[xr.DataArray, Origin]], location: str) -> None:
    for array, origin in having[1:]:
        first, first_origin = having[0]
        if first.shape != array.shape or not _share_cells(first, array):
            continue  # pieces of the globe
        if not np.array_equal(first.values, array.values, equal_nan=True):
            raise ValueError(
                f"input={location}: {name}, which has no time, differs between "
                f"{first_origin.file} and {origin.file}{first_origin.differing(origin, name)}; "
                "name the other variables under variables, and ingest it from one file"
            )


Tell = Callable[[str], object]
_MAX_SHOWN, _MAX_LINES = 8, 20
_NO_NAMES: Mapping[str, str] = MappingProxyType({})


@dataclass
class _Reading:
    """How an input is read, and what is noted meanwhile: names of variables that are there, those
    that are read, keys of the selection that meant something, lines with the files they hold for.
    """

    names: dict[str, str]
    selection: dict[str, Any]
    filters: dict[str, Any]
    coordinates: Mapping[str, str]
    pressure_levels: bool = True
    have: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    selected: set[str] = field(default_factory=set)
    lines: Counter[str] = field(default_factory=Counter)
    statements: FileStatements = field(default_factory=FileStatements)

    def tell(self, line: str) -> None:
        self.lines[line] += 1

    def canonical(self, stored: str) -> str | None:
        return _canonical_name(stored, self.names)


def _say_nothing(line: str) -> None:
    del line


def input_files(location: str, tell: Tell = _say_nothing) -> list[str]:
    """One path per file: the location itself, or the GRIB and NetCDF files of a folder or pattern.
    tell: is told which files of a folder are passed over.

    Raises:
        ValueError: nothing is there.
    """
    path = Path(location)
    if "://" in location or path.is_file() or is_zarr(path) or path.suffix in REFERENCES:
        return [location]
    if path.suffix in (".zarr", ".zip"):
        raise ValueError(f"input={location}: no such file, or no zarr store")
    there = data_files(location)
    shown = _shown(there.passed_over)
    if not there.files:
        addition = f", but {shown}" if shown else ""
        raise ValueError(f"input={location}: no GRIB or NetCDF file there{addition}")
    if shown:
        tell(f"files passed over: {shown}")
    return [str(file) for file in there.files]


def _shown(words: Sequence[str]) -> str:
    more = f" and {len(words) - _MAX_SHOWN} more" if len(words) > _MAX_SHOWN else ""
    return ", ".join(words[:_MAX_SHOWN]) + more


def open_input(
    location: str,
    names: dict[str, str],
    selection: dict[str, Any],
    filters: dict[str, Any],
    tell: Tell = _say_nothing,
    coordinates: Mapping[str, str] = _NO_NAMES,
    *,
    pressure_levels: bool = True,
) -> xr.Dataset:
    """All files of an input joined along time, lazily; dims (time, level, latitude, longitude),
    latitudes ascending, longitudes from west to east in [0, 360).

    names: variables wanted, canonical -> name in the input; all that are known if it is empty.
    selection: one value for each dimension that the store cannot hold, such as `number`.
    filters: values that keys of GRIB messages must have.
    tell: is told, a line each, what is left out and how to choose it.
    coordinates: canonical coordinate -> name in the input, beside the usual names.
    pressure_levels: whether levels are pressures; else they are numbers of model levels.

    Raises:
        ValueError: a file that cannot be read, or does not fit; names the file.
    """
    files = input_files(location, tell)
    reading = _Reading(names, selection, filters, coordinates, pressure_levels)
    parts: list[xr.Dataset] = []
    origins: list[Origin] = []
    unmatched: NoSuchMessage | None = None
    for file in files:
        try:
            opened = _opened_file(file, reading)
        except NoSuchMessage as error:
            unmatched = error
            reading.tell("filters match no message of a file, which is left out")
            continue
        part, origin = _canonical(opened, reading, file)
        if part.data_vars:
            parts.append(part)
            origins.append(origin)
    if unmatched and not parts:
        raise unmatched
    variables = {str(name) for part in parts for name in part.data_vars}
    _check_found(reading, variables, location, files)
    _tell_left_out(reading, len(files), tell)
    if not any("time" in part.dims for part in parts):
        raise ValueError(f"input={location}: {listed(sorted(variables))} have no time")
    check_overlaps(parts, origins, location)
    joined = with_regular_axes(_joined(parts, location), f"input={location}")
    west_to_east, _ = ascending_longitudes(joined["longitude"].values)
    return joined.isel(longitude=west_to_east)


def _check_found(reading: _Reading, have: set[str], location: str, files: Sequence[str]) -> None:
    """Check that every name, selection and filter of the user had an effect."""
    for canonical, stored in reading.names.items():
        if canonical not in have:
            raise ValueError(
                f"input={location}: variables.{canonical}={stored} is not there; valid: "
                f"{listed(sorted(reading.have))}"
            )
    if not have:
        raise ValueError(f"input={location}: select={as_written(reading.selection)} leaves no data")
    unknown = sorted(set(reading.selection) - reading.selected)
    if unknown:
        raise ValueError(
            f"input={location}: select.{unknown[0]}={as_written(reading.selection[unknown[0]])}: "
            f"no variable has {unknown[0]}"
        )
    if reading.filters and not any(_is_grib(file) for file in files):
        raise ValueError(
            f"input={location}: filters={as_written(reading.filters)} choose GRIB messages, and "
            "no file is GRIB; choose with variables and select"
        )


def _tell_left_out(reading: _Reading, num_files: int, tell: Tell) -> None:
    """Report the noted lines, each with the number of its files, and the variables that are not
    read."""
    unused = sorted(reading.have - reading.used)
    if unused and reading.names:
        tell(f"left out, as variables names others: {_shown(unused)}")
    elif unused:
        tell(f"left out, as not known here: {_shown(unused)}; variables.NAME={unused[0]} reads one")
    for line, count in list(reading.lines.items())[:_MAX_LINES]:
        tell(f"{line} (in {count} files)" if num_files > 1 else line)
    if len(reading.lines) > _MAX_LINES:
        tell(f"and {len(reading.lines) - _MAX_LINES} more lines of that kind")


def _joined(parts: Sequence[xr.Dataset], location: str) -> xr.Dataset:
    if len(parts) == 1:
        return parts[0]
    labels = SharedLabels()
    parts = [labels.applied(part) for part in parts]
    _check_filled(parts, location)
    try:
        with joining():
            joined = xr.combine_by_coords(
                parts,
                combine_attrs="override",
                join="outer",
                data_vars="minimal",
                coords="minimal",
                compat="no_conflicts",
            )
    except ValueError as error:
        raise ValueError(f"input={location}: the files do not join ({error})") from error
    assert isinstance(joined, xr.Dataset)
    return joined


def _check_filled(parts: Sequence[xr.Dataset], location: str) -> None:
    """Check that the files of every variable fill a box of levels and cells. If a file lacked
    some of them, values would be missing. Times may lack."""
    for name in dict.fromkeys(name for part in parts for name in part.data_vars):
        arrays = [part[name] for part in parts if name in part.data_vars]
        axes = [axis for axis in ("level", "latitude", "longitude") if axis in arrays[0].dims]
        if any(set(axes) - set(array.dims) for array in arrays):
            raise ValueError(f"input={location}: {name} has levels in some of the files alone")
        have: dict[str, set[Any]] = {axis: set() for axis in axes}
        places: set[tuple] = set()
        for array in arrays:
            place = tuple(tuple(array[axis].values.tolist()) for axis in axes)
            if place not in places:
                places.add(place)
                for axis, values in zip(axes, place, strict=True):
                    have[axis].update(values)
        filled = sum(prod(map(len, place)) for place in places)
        if filled != prod(map(len, have.values())):
            counts = sorted({tuple(map(len, place)) for place in places})
            sizes = ", ".join(" x ".join(map(str, count)) for count in counts)
            raise ValueError(
                f"input={location}: the files of {name} have different {' x '.join(axes)}, of "
                f"sizes {sizes}; choose what all have with levels and region, or ingest them apart"
            )


def _is_grib(file: str) -> bool:
    return "://" not in file and Path(file).is_file() and kind_of(Path(file)) == GRIB


def _opened_file(file: str, reading: _Reading) -> list[xr.Dataset]:
    """The datasets in one file; of a GRIB file one for every variable."""
    try:
        if _is_grib(file):
            datasets, names = open_grib(file, reading.filters, reading.canonical, reading.tell)
        else:
            datasets = [open_store(SegmentEntry(location=file)).dataset.chunk({})]
            names = _fields(datasets[0])
    except ValueError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:300] or "truncated or corrupt"
        raise ValueError(f"input {file}: {type(error).__name__}: {why}") from error
    reading.have.update(names)
    if not reading.names and not any(map(reading.canonical, names)):
        raise ValueError(
            f"input {file}: variables known here are not among {listed(sorted(names))}; name them, "
            f"such as variables.temperature={min(names, default='t')}"
        )
    return datasets


def _fields(dataset: xr.Dataset) -> list[str]:
    """The variables of a dataset without those that only describe others: bounds, and the grid's
    mapping."""
    said = [about for v in dataset.variables.values() for about in (v.attrs, v.encoding)]
    keys = ("bounds", "grid_mapping", "climatology")
    describing = {about[key] for about in said for key in keys if key in about}
    return [str(name) for name in dataset.data_vars if name not in describing]


def _canonical(
    opened: Sequence[xr.Dataset], reading: _Reading, file: str
) -> tuple[xr.Dataset, Origin]:
    arrays: dict[str, xr.DataArray] = {}
    origin = Origin(file)
    for dataset in opened:
        for stored, array in dataset.data_vars.items():
            canonical = reading.canonical(str(stored))
            if canonical is None:
                continue
            if canonical in arrays:
                raise ValueError(
                    f"input {file}: {stored} is one of several variables that are {canonical}; "
                    f"choose with variables.{canonical}={stored}"
                )
            reading.used.add(str(stored))
            array = _selected(array, reading, file)
            if array is None:
                continue
            origin.note(canonical, array)
            array = _with_canonical_dims(_converted(array, canonical, reading, file), reading, file)
            where, levels = f"input {file}", reading.pressure_levels
            check_statements(canonical, array, dataset, where, pressure_levels=levels)
            if not levels and "level" in array.dims:
                check_model_levels(array["level"].values.tolist(), where)
            if conflict := reading.statements.add(canonical, array, Path(file).name):
                raise ValueError(f"input {file}: {conflict}")
            array = _canonical_array(array, file)
            if canonical in VARIABLES and VARIABLES[canonical].static and _single_date(array):
                array = array.isel(time=0, drop=True)
            arrays[canonical] = array
    arrays = check_one_grid(arrays, file)
    merged = xr.merge([a.rename(n) for n, a in arrays.items()], join="outer", compat="override")
    return merged.drop_attrs(deep=False), origin  # attributes are those of the first variable


def _selected(array: xr.DataArray, reading: _Reading, file: str) -> xr.DataArray | None:
    """A variable at the selected value of every dimension; None if the file holds other values.

    Raises:
        ValueError: no such value; names those that there are.
    """
    selection = {dim: v for dim, v in reading.selection.items() if dim in array.coords}
    chosen = {dim: value for dim, value in selection.items() if dim in array.dims}
    reading.selected.update(selection)
    for dim in set(selection) - set(chosen):
        have = array[dim].values
        if np.ndim(have) == 0 and have != np.asarray(_plain(dim, selection[dim]), have.dtype):
            reading.tell(f"select.{dim}={selection[dim]} leaves out files that hold another {dim}")
            return None
    for dim, value in chosen.items():
        if array.sizes[dim] > 1:
            reading.tell(
                f"select.{dim}={value} leaves out {array.sizes[dim] - 1} of {array.sizes[dim]} "
                f"values of {dim}: {listed(_values(array, dim))}"
            )
    try:
        array = array.sel({dim: _plain(dim, value) for dim, value in chosen.items()})
    except (KeyError, ValueError) as error:
        valid = _by_dimension(array, chosen)
        raise ValueError(
            f"input {file}: select={as_written(chosen)}: no such value; valid: {valid}"
        ) from error
    if array.sizes.get("step", 1) > 1:  # each date would be there once for every lead time
        valid = _values(array, "step")
        raise ValueError(
            f"input {file}: {array.name} has {array.sizes['step']} lead times (step); choose one, "
            f"such as select.step={valid[-1]}; valid: {listed(valid)}"
        )
    return array


def _single_date(array: xr.DataArray) -> bool:
    return array.sizes.get("time") == 1


def _converted(array: xr.DataArray, canonical: str, reading: _Reading, file: str) -> xr.DataArray:
    """A variable in its canonical units; ValueError if there is no conversion."""
    units = array.attrs.get("units")
    if (factor := height_factor(canonical, array)) is not None:
        reading.tell(f"{canonical} is {FROM_HEIGHT}")
        return as_geopotential(canonical, array, factor)
    factor_and_offset = conversion(canonical, units)
    if factor_and_offset is None:
        check_units(canonical, units, f"input {file}")
        return array
    factor, offset = factor_and_offset
    attributes = {**array.attrs, "units": VARIABLES[canonical].units}
    return (array.astype(np.float64) * factor + offset).assign_attrs(attributes)


def _canonical_name(stored: str, names: dict[str, str]) -> str | None:
    if names:
        return next((canonical for canonical, name in names.items() if name == stored), None)
    return SHORT_NAMES.get(stored)


def _with_canonical_dims(array: xr.DataArray, reading: _Reading, file: str) -> xr.DataArray:
    """A variable with canonical dimensions. A single date or level becomes a dimension of length
    1, and forecasts of one lead time are dated by their valid time."""
    coordinates = dict(reading.coordinates)
    if not reading.pressure_levels:
        model = next((name for name in MODEL_LEVELS if name in array.coords), "level")
        coordinates.setdefault("level", model)
    usual = {
        axis: (coordinates[axis],) if axis in coordinates else COORDINATES[axis]
        for axis in ("time", "level")
    }
    for names in usual.values():
        alone = [name for name in names if name in array.coords and array[name].ndim == 0]
        if alone and not set(names) & set(array.dims):
            array = array.expand_dims(alone[:1])
    name = str(array.name)
    timed = any(n in (*array.coords, *array.dims) for n in usual["time"])
    renamed = rename_coordinates(array.to_dataset(), coordinates, f"input {file}", timed=timed)
    return _of_one_step(renamed[name], file)


def _by_dimension(array: xr.DataArray, dims: Iterable[str]) -> str:
    """The values of some dimensions of an array, as a message names them."""
    return "; ".join(f"{dim}: {listed(_values(array, dim))}" for dim in dims)


def _canonical_array(array: xr.DataArray, file: str) -> xr.DataArray:
    """A variable with canonical dimensions alone, in order, with ascending latitudes and
    longitudes in [0, 360)."""
    further = [dim for dim in array.dims if dim not in ("time", "level", "latitude", "longitude")]
    if further:
        sizes = _by_dimension(array, [str(dim) for dim in further if dim in array.coords])
        raise ValueError(
            f"input {file}: {array.name} has further dimensions {listed(further)}; choose one "
            f"value of each under `select`, valid: {sizes}; or say what they are, such as "
            f"coordinates.level={further[0]} for pressure, levels_are=model for numbers of model "
            "levels"
        )
    dims = [dim for dim in ("time", "level", "latitude", "longitude") if dim in array.dims]
    array = array.drop_vars(set(array.coords) - set(dims)).transpose(*dims)
    array = array.assign_coords(longitude=array["longitude"].astype(np.float64) % 360.0)
    return array.sortby(["latitude", "longitude", *dims[:-2]])


def _plain(dim: str, value: Any) -> Any:
    return pd.Timedelta(value).to_numpy() if dim == "step" else value


def _values(array: xr.DataArray, dim: str) -> list[Any]:
    """The first values of a coordinate, as `select` takes them."""
    values = array[dim].values[:6]
    if dim == "step" and values.dtype.kind == "m":
        minutes = values / np.timedelta64(1, "m")
        return [f"{m:g}min" if m % 60 else f"{m / 60:g}h" for m in minutes]
    return values.tolist()


def _of_one_step(array: xr.DataArray, file: str) -> xr.DataArray:
    """A forecast of one lead time, dated by its valid time."""
    if "time" in array.dims and array["time"].attrs.get("standard_name") == "time":
        return array
    steps = [array[name] for name in LEAD_NAMES if name in array.coords and name not in array.dims]
    if any(step.ndim for step in steps) or (steps and "time" not in array.dims):
        raise ValueError(f"input {file}: {array.name} mixes lead times; choose one under `select`")
    if "time" not in array.dims:
        return array
    time, lead, valid = array["time"], lead_of(array), valid_time_of(array)
    if valid is not None and (is_start(time) or lead is not None):
        dates = valid.values
    elif lead is not None:
        dates = time.values + (lead if time.dtype.kind == "M" else pd.Timedelta(lead))
    else:
        return array
    return array.assign_coords(time=("time", dates, {"standard_name": "time"}))
