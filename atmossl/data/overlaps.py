"""Files that are joined, and variables of one file, must not contradict each other: what is there
twice is refused, as joining would keep the first without a word."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any, NoReturn

import numpy as np
import xarray as xr

_DECIMALS = 3  # of degrees and hPa that make two coordinates differ
_TOLERANCE_DEG = 1e-3
_AXES = ("level", "latitude", "longitude")


@dataclass(frozen=True)
class Origin:
    """The file that a dataset was read from, and what its variables said of themselves there."""

    file: str
    notes: dict[str, dict[str, str]] = field(default_factory=dict)

    def note(self, variable: str, array: xr.DataArray) -> None:
        """Keep scalar coordinates and GRIB keys: joining does not see them."""
        scalars = {
            str(name): str(coord.values) for name, coord in array.coords.items() if not coord.ndim
        }
        keys = {k.removeprefix("GRIB_"): str(v) for k, v in array.attrs.items() if k[:5] == "GRIB_"}
        self.notes[variable] = scalars | keys

    def differing(self, other: "Origin", variable: str) -> str:
        """What the variable says in one file alone, in words; empty if nothing."""
        mine, others = self.notes[variable], other.notes[variable]
        keys = [key for key in mine if key in others and mine[key] != others[key]]
        pairs = [f"{key} ({mine[key]} and {others[key]})" for key in keys]
        return f"; they differ in {', '.join(pairs[:4])}" if pairs else ""


def check_one_grid(arrays: Mapping[str, xr.DataArray], file: str) -> dict[str, xr.DataArray]:
    """The variables of a file with the cells of the first one, where they differ by rounding.

    Raises:
        ValueError: two variables have other cells.
    """
    if not arrays:
        return {}
    first_name, first = next(iter(arrays.items()))
    same = {}
    for name, array in arrays.items():
        for axis in ("latitude", "longitude"):
            mine, others = first[axis].values, array[axis].values
            if mine.shape != others.shape or np.abs(mine - others).max() > _TOLERANCE_DEG:
                raise ValueError(
                    f"input {file}: {first_name} and {name} lie on different cells: {_axis(mine)} "
                    f"and {_axis(others)} of {axis}; ingest them apart, with variables"
                )
        same[name] = array.assign_coords(latitude=first["latitude"], longitude=first["longitude"])
    return same


def _axis(values: np.ndarray) -> str:
    return f"{len(values)} from {values[0]:g} to {values[-1]:g}"


def check_overlaps(parts: Sequence[xr.Dataset], origins: Sequence[Origin], location: str) -> None:
    """That no value is given by two files; fields without time may be, if they are equal.

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
    """That files on the same cells and levels have no date in common."""
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
    for one, other in combinations(places.values(), 2):
        if all(np.isin(_labels(one[0][0], a), _labels(other[0][0], a)).any() for a in _AXES):
            for first, second in product(one, other):
                common = np.isin(first[0]["time"].values, second[0]["time"].values)
                if common.any():
                    _refuse(name, first[0]["time"].values[common][0], first, second, location)


def _labels(array: xr.DataArray, axis: str) -> np.ndarray:
    """Coordinates but for rounding; 0 for the level of a field that has none."""
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


def _share_cells(one: xr.DataArray, other: xr.DataArray) -> bool:
    axes = ("latitude", "longitude")
    return all(np.isin(_labels(one, axis), _labels(other, axis)).any() for axis in axes)


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
