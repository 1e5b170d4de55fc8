"""Which dimension of a file is which, by what its coordinates say of themselves.

Usual names come first, in `atmossl.data.store`; here are those whose units, standard name or type
tell, and those that are known to be something else, so that no advice leads to them.
"""

import re
from collections.abc import Mapping

import cftime
import xarray as xr

from atmossl.data.metadata import is_pressure, is_start, says

START_NAMES = re.compile(r"init|reference|reftime|base_?time|run_?time|analysis_time|start", re.I)
_NORTH, _EAST = r"deg(ree)?s?[-_ ]?n(orth)?", r"deg(ree)?s?[-_ ]?e(ast)?"


def dimensions_like(axis: str, dataset: xr.Dataset, others: set[str]) -> list[str]:
    """Dimensions of a dataset's variables, beside others, that say by their attributes or by their
    type that they are one of time, level, latitude and longitude."""
    used = {str(dim) for array in dataset.data_vars.values() for dim in array.dims}
    return [
        name
        for name in sorted(used - others)
        if name in dataset.coords and _is_like(axis, dataset[name])
    ]


def _is_like(axis: str, coordinate: xr.DataArray) -> bool:
    standard, units = (says(coordinate.attrs, key) for key in ("standard_name", "units"))
    if axis == "level":
        return coordinate.dtype.kind in "iuf" and is_pressure(coordinate)
    if axis == "time":
        dates = coordinate.dtype.kind == "M" or isinstance(
            coordinate.values.flat[0], cftime.datetime
        )
        return (dates and not is_start(coordinate)) or standard == "time"
    return standard == axis or bool(
        re.fullmatch(_NORTH if axis == "latitude" else _EAST, units, re.I)
    )


def projected_dimensions(dataset: xr.Dataset) -> list[str]:
    """Dimensions that say that they are those of a rotated or projected grid."""
    said = {
        str(name): says(dataset[name].attrs, "standard_name")
        for name in dataset.dims
        if name in dataset.coords
    }
    known = {"rlat", "rlon", "x", "y", "south_north", "west_east", "i", "j", "nx", "ny", "cell"}
    return sorted(
        str(name)
        for name in dataset.dims
        if re.match("grid_|projection_", said.get(str(name), "")) or str(name) in known
    )


def start_dimensions(dataset: xr.Dataset) -> list[str]:
    """Dimensions that hold the dates at which forecasts start."""
    return sorted(
        str(name)
        for name in dataset.dims
        if START_NAMES.search(str(name)) or (name in dataset.coords and is_start(dataset[name]))
    )


def check_names(names: Mapping[str, str], location: str) -> None:
    """That the dimension taken for time is not called by the start of forecasts.

    names: name in the store -> canonical name.
    """
    for stored, canonical in names.items():
        if canonical == "time" and START_NAMES.search(stored):
            raise ValueError(
                f"{location}: {stored} is called like the start of forecasts; needed for time: the "
                "dates at which fields are valid, which are these plus the lead time"
            )
