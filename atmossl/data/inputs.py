"""What others wrote, as one canonical dataset: GRIB, NetCDF and zarr, any usual names."""

import warnings
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from atmossl.data.axes import SharedLabels, with_regular_axes
from atmossl.data.backends import joining, open_store
from atmossl.data.catalog import SegmentEntry
from atmossl.data.store import COORDINATES, rename_coordinates
from atmossl.data.variables import SHORT_NAMES, VARIABLES, check_units, conversion
from atmossl.geometry import ascending_longitudes

_GRIB = (".grib", ".grib2", ".grb", ".grb2")


def input_files(location: str) -> list[str]:
    """One path per file: the location itself, the files of a folder, or those of a pattern.

    Raises:
        ValueError: nothing is there.
    """
    path = Path(location)
    if "://" in location or path.suffix in (".zarr", ".zip") or path.is_file():
        if "://" not in location and not path.exists():
            raise ValueError(f"input={location}: no such file")
        return [location]
    if path.is_dir() and ((path / "zarr.json").exists() or (path / ".zgroup").exists()):
        return [location]
    files = path.glob("*") if path.is_dir() else path.parent.glob(path.name)
    suffixes = (*_GRIB, ".nc", ".nc4")
    found = sorted(str(f) for f in files if f.suffix in suffixes and f.name[0] != ".")
    if not found:
        raise ValueError(f"input={location}: no GRIB or NetCDF file there")
    return found


def open_input(
    location: str, names: dict[str, str], selection: dict[str, Any], filters: dict[str, Any]
) -> xr.Dataset:
    """All files of an input joined along time, lazily; dims (time, level, latitude, longitude),
    latitudes ascending, longitudes from west to east in [0, 360).

    names: variables wanted, canonical -> name in the input; all that are known if it is empty.
    selection: one value for each dimension that the store cannot hold, such as `number`.
    filters: cfgrib's `filter_by_keys`.

    Raises:
        ValueError: a file that cannot be read, or does not fit; names the file.
    """
    parts, have = [], set[str]()
    for file in input_files(location):
        try:
            opened = _open_file(file, filters)
        except ValueError:
            raise
        except Exception as error:
            why = " ".join(str(error).split())[:300] or "truncated or corrupt"
            raise ValueError(f"input {file}: {type(error).__name__}: {why}") from error
        part = _canonical(opened, names, selection, file)
        if part.data_vars:
            parts.append(part)
        have.update(str(name) for dataset in opened for name in dataset.data_vars)
    found = {str(name) for part in parts for name in part.data_vars}
    for canonical, stored in names.items():
        if canonical not in found:
            raise ValueError(
                f"input={location}: variables.{canonical}={stored} is not there; valid: "
                f"{sorted(have)}"
            )
    if not any("time" in part.dims for part in parts):
        raise ValueError(f"input={location}: {sorted(found)} have no time")
    joined = with_regular_axes(_joined(parts, location), f"input={location}")
    west_to_east, _ = ascending_longitudes(joined["longitude"].values)
    return joined.isel(longitude=west_to_east)


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
    """That the files of every variable fill a box of levels and cells: a file that lacks some of
    them would leave missing values. Times may lack."""
    for name in dict.fromkeys(name for part in parts for name in part.data_vars):
        arrays = [part[name] for part in parts if name in part.data_vars]
        axes = [axis for axis in ("level", "latitude", "longitude") if axis in arrays[0].dims]
        if any(set(axes) - set(array.dims) for array in arrays):
            raise ValueError(f"input={location}: {name} has levels in some of the files alone")
        have: dict[str, set[Any]] = {axis: set() for axis in axes}
        places: set[tuple] = set()
        for array in arrays:
            own = tuple(tuple(array[axis].values.tolist()) for axis in axes)
            if own not in places:
                places.add(own)
                for axis, values in zip(axes, own, strict=True):
                    have[axis].update(values)
        filled = sum(prod(map(len, own)) for own in places)
        if filled != prod(map(len, have.values())):
            counts = sorted({tuple(map(len, own)) for own in places})
            raise ValueError(
                f"input={location}: the files of {name} have different {' x '.join(axes)}, of "
                f"sizes {counts}; choose what all have with levels and region, or ingest them apart"
            )


def _open_file(file: str, filters: dict[str, Any]) -> list[xr.Dataset]:
    """The datasets in one file: a GRIB file can hold several."""
    if not file.endswith(_GRIB):
        return [open_store(SegmentEntry(location=file)).dataset.chunk({})]
    import cfgrib

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of cfgrib about xarray's merge
        found = cfgrib.open_datasets(
            file, backend_kwargs={"indexpath": "", "filter_by_keys": filters, "errors": "raise"}
        )
    if not found or not any(dataset.data_vars for dataset in found):
        raise ValueError(f"input {file}: no GRIB message could be read")
    return [dataset.chunk({}) for dataset in found]


def _canonical(
    opened: Sequence[xr.Dataset], names: dict[str, str], selection: dict[str, Any], file: str
) -> xr.Dataset:
    found: dict[str, xr.DataArray] = {}
    for dataset in opened:
        for stored, array in dataset.data_vars.items():
            canonical = _canonical_name(str(stored), names)
            if canonical is None:
                continue
            if canonical in found:
                raise ValueError(
                    f"input {file}: {stored} is there more than once; choose with filters, such "
                    "as filters.typeOfLevel=isobaricInhPa"
                )
            array = _converted(array, canonical, file)
            array = _canonical_array(array, selection, file)
            if canonical in VARIABLES and VARIABLES[canonical].static and _single_date(array):
                array = array.isel(time=0, drop=True)
            found[canonical] = array
    if not found and not names:
        have = sorted(str(name) for dataset in opened for name in dataset.data_vars)
        raise ValueError(
            f"input {file}: variables known here are not among {have}; name them, such as "
            f"variables.temperature={have[0] if have else 't'}"
        )
    merged = xr.merge([a.rename(n) for n, a in found.items()], join="outer", compat="override")
    return merged.drop_attrs(deep=False)  # those of the first variable


def _single_date(array: xr.DataArray) -> bool:
    return array.sizes.get("time") == 1


def _converted(array: xr.DataArray, canonical: str, file: str) -> xr.DataArray:
    """In the units of the variable; ValueError if there is no way to them."""
    units = array.attrs.get("units")
    known = conversion(canonical, units)
    if known is None:
        check_units(canonical, units, f"input {file}")
        return array
    factor, offset = known
    attributes = {**array.attrs, "units": VARIABLES[canonical].units}
    return (array.astype(np.float64) * factor + offset).assign_attrs(attributes)


def _canonical_name(stored: str, names: dict[str, str]) -> str | None:
    if names:
        return next((canonical for canonical, own in names.items() if own == stored), None)
    return SHORT_NAMES.get(stored)


def _canonical_array(array: xr.DataArray, selection: dict[str, Any], file: str) -> xr.DataArray:
    """Known dims alone, in order, ascending latitudes and longitudes in [0, 360)."""
    if array.attrs.get("GRIB_gridType") not in (None, "regular_ll", "regular_gg"):
        raise ValueError(
            f"input {file}: {array.name} lies on a grid of type {array.attrs['GRIB_gridType']}; "
            "valid: regular_ll, regular_gg. Regrid it first, with cdo or earthkit for example"
        )
    chosen = {dim: value for dim, value in selection.items() if dim in array.dims}
    try:
        array = array.sel({dim: _plain(dim, value) for dim, value in chosen.items()})
    except (KeyError, ValueError) as error:
        valid = {dim: _values(array, dim) for dim in chosen}
        raise ValueError(f"input {file}: select={chosen}: no such value; valid: {valid}") from error
    if "time" in array.coords and not {"time", "valid_time"} & set(array.dims):
        array = array.expand_dims("time")
    if not set(COORDINATES["level"]) & set(array.dims):
        alone = [name for name in COORDINATES["level"] if name in array.coords]
        array = array.expand_dims(alone[:1])
    name = str(array.name)
    timed = any(dim in array.coords or dim in array.dims for dim in COORDINATES["time"])
    array = rename_coordinates(array.to_dataset(), {}, f"input {file}", timed=timed)[name]
    array = _of_one_step(array, file)
    others = [dim for dim in array.dims if dim not in ("time", "level", "latitude", "longitude")]
    if others:
        sizes = {dim: _values(array, str(dim)) for dim in others if dim in array.coords}
        raise ValueError(
            f"input {file}: {array.name} has further dimensions {others}; choose one value of each "
            f"under `select`, valid: {sizes}"
        )
    kept = [dim for dim in ("time", "level", "latitude", "longitude") if dim in array.dims]
    array = array.drop_vars(set(array.coords) - set(kept)).transpose(*kept)
    array = array.assign_coords(longitude=array["longitude"].astype(np.float64) % 360.0)
    return array.sortby(["latitude", "longitude", *kept[:-2]])


def _plain(dim: str, value: Any) -> Any:
    return pd.Timedelta(value).to_numpy() if dim == "step" else value


def _values(array: xr.DataArray, dim: str) -> list[Any]:
    """The first values of a coordinate, as `select` takes them."""
    values = array[dim].values[:6]
    if dim == "step":
        return [f"{hours:g}h" for hours in values / np.timedelta64(1, "h")]
    return values.tolist()


def _of_one_step(array: xr.DataArray, file: str) -> xr.DataArray:
    """Forecasts of one lead time are dated by their valid time."""
    if "step" not in array.coords or "step" in array.dims:
        return array
    step = array["step"].values
    if np.ndim(step) or "time" not in array.dims:
        raise ValueError(f"input {file}: {array.name} mixes lead times; choose one under `select`")
    if not np.issubdtype(step.dtype, np.timedelta64):
        step = pd.Timedelta(hours=float(step)).to_numpy()
    return array.assign_coords(time=array["time"].values + step)
