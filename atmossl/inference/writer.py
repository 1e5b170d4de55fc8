"""CF datasets of predictions, written region by region and moved into place when complete."""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import xarray as xr

from atmossl import __version__
from atmossl.data.variables import VARIABLES
from atmossl.inference.predict import Predictor

_DIMS = ("step", "member", "level", "latitude", "longitude")


def to_dataset(
    predictor: Predictor, time: np.datetime64, fields: dict[str, np.ndarray]
) -> xr.Dataset:
    """One reference time as a CF dataset: (init_time, lead_time, member, level, latitude,
    longitude) for forecasts, (time, member, level, latitude, longitude) otherwise."""
    plan, segment = predictor.plan, predictor.segment
    steps = np.array(plan.offsets) * segment.step
    arrays = {}
    for spec in predictor.trained.specs:
        for name in spec.variables:
            if name in fields:
                arrays[name] = _variable(name, fields[name], spec.level_values)
    dataset = xr.merge([array.to_dataset() for array in arrays.values()], join="outer")
    dataset = dataset.assign_coords(
        member=np.arange(next(iter(fields.values())).shape[1]),
        latitude=segment.grid.latitude,
        longitude=segment.grid.longitude % 360.0,
    )
    if plan.is_forecast:
        dataset = dataset.rename(step="lead_time").assign_coords(lead_time=steps)
        dataset = dataset.expand_dims(init_time=[time])
    else:
        dataset = dataset.rename(step="time").assign_coords(time=time + steps)
    return _with_attributes(dataset, predictor)


def _variable(name: str, values: np.ndarray, levels: tuple[int, ...]) -> xr.DataArray:
    array = xr.DataArray(values, dims=_DIMS, coords={"level": list(levels)}, name=name)
    if levels == (0,):
        array = array.isel(level=0, drop=True)
    known = VARIABLES.get(name)
    if known is not None:
        array.attrs = {
            "units": known.units,
            "standard_name": known.standard_name,
            "long_name": known.long_name,
        }
    return array


def _with_attributes(dataset: xr.Dataset, predictor: Predictor) -> xr.Dataset:
    attributes = {
        "latitude": {"standard_name": "latitude", "units": "degrees_north", "axis": "Y"},
        "longitude": {"standard_name": "longitude", "units": "degrees_east", "axis": "X"},
        "level": {"standard_name": "air_pressure", "units": "hPa", "positive": "down", "axis": "Z"},
        "member": {"standard_name": "realization", "units": "1"},
        "time": {"standard_name": "time", "axis": "T"},
        "init_time": {"standard_name": "forecast_reference_time"},
        "lead_time": {"standard_name": "forecast_period"},
    }
    for name, values in attributes.items():
        if name in dataset.coords:
            dataset[name].attrs = values
    dataset.attrs = {
        "Conventions": "CF-1.11",
        "title": f"atmossl {type(predictor.task).__name__} prediction",
        "source": f"atmossl {__version__}, checkpoint {predictor.trained.digest}",
        "history": f"predicted from segment {predictor.segment.name}",
        "references": "Lessig et al. (2023), arXiv:2308.13280",
    }
    return dataset


def check_output(output: Path) -> None:
    """Raise ValueError, before any work, if the output exists or its folder cannot be written."""
    if output.suffix not in (".zarr", ".nc"):
        raise ValueError(f"output={output} must end in .zarr or .nc")
    if output.exists():
        raise ValueError(f"output={output} exists; choose another path or remove it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        probe = output.parent / f".{output.name}.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output={output} cannot be written: {error.strerror}") from error


def write(datasets: Iterable[xr.Dataset], output: Path, along: str) -> None:
    """Append datasets to a new zarr or NetCDF store; it appears under its name when complete."""
    check_output(output)
    partial = output.with_name(f".{output.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    first = True
    for dataset in datasets:
        if first:
            dataset.to_zarr(partial, mode="w", encoding=_encoding(dataset), consolidated=False)
        else:
            dataset.to_zarr(partial, mode="a", append_dim=along, consolidated=False)
        first = False
    if output.suffix == ".nc":
        packed = output.with_name(f".{output.name}.{os.getpid()}")
        with xr.open_zarr(partial, consolidated=False) as store:
            store.drop_encoding().to_netcdf(packed, engine="netcdf4")
        shutil.rmtree(partial)
        packed.replace(output)
    else:
        partial.replace(output)


def _encoding(dataset: xr.Dataset) -> dict[str, dict[str, object]]:
    encoding: dict[str, dict[str, object]] = {
        name: {"units": "hours since 1900-01-01T00:00:00", "dtype": "int64"}
        for name in ("time", "init_time")
        if name in dataset.coords
    }
    if "lead_time" in dataset.coords:
        encoding["lead_time"] = {"units": "hours", "dtype": "int64"}
    return encoding


def predictions(predictor: Predictor, times: np.ndarray) -> Iterator[xr.Dataset]:
    """One dataset after another, for every reference time."""
    for time, fields in zip(times, predictor.run(list(times)), strict=True):
        yield to_dataset(predictor, time, fields)
