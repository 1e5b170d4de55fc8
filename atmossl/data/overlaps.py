"""Files that are joined, and variables of one file, must not contradict each other: what is there
twice is refused, as joining would keep the first without a word."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

_DECIMALS = 3  # of degrees and hPa that make two coordinates differ
_TOLERANCE_DEG = 1e-3
_AXES = ("time", "level", "latitude", "longitude")


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
    holders: dict[tuple[Any, float], list[tuple[xr.DataArray, Origin]]] = {}
    for array, origin in having:
        levels = (
            np.round(array["level"].values, _DECIMALS).tolist() if "level" in array.dims else [0]
        )
        for date in array["time"].values:
            for level in levels:
                others = holders.setdefault((date, level), [])
                for other, other_origin in others:
                    if _share_cells(array, other):
                        at = f"{str(date)[:16]}{f', level {level:g}' if level else ''}"
                        raise ValueError(
                            f"input={location}: files overlap: {name} of {at} is in "
                            f"{other_origin.file} and in {origin.file}"
                            f"{other_origin.differing(origin, name)}. Choose one with select or "
                            "filters, or ingest the files apart"
                        )
                others.append((array, origin))


def _share_cells(one: xr.DataArray, other: xr.DataArray) -> bool:
    for axis in ("latitude", "longitude"):
        mine, others = (np.round(array[axis].values, _DECIMALS) for array in (one, other))
        if not np.isin(mine, others).any():
            return False
    return True


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
