"""Brings forecast stores of any origin into one form, and finds what several of them have in
common.

Read are this program's own predictions, WeatherBench-X (`init_time`, `lead_time`) and
WeatherBench 2 (`time` is the init time, `prediction_timedelta` the lead time; Rasp et al. 2024,
https://weatherbench2.readthedocs.io), which its public Pangu-Weather, GraphCast and IFS stores
use. Nothing is read at once but coordinates.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from atmossl.data.metadata import (
    FROM_HEIGHT,
    as_geopotential,
    check_statements,
    durations,
    height_factor,
    is_mean,
)
from atmossl.data.store import MODEL_LEVELS, canonical_axes
from atmossl.data.variables import VARIABLES, check_units, conversion
from atmossl.evaluation.alignment import grid_of, time_dim
from atmossl.evaluation.regrid import covered, regridder
from atmossl.geometry import Grid, ascending_longitudes
from atmossl.value_faults import as_written, listed

_LOGGER = logging.getLogger(__name__)
_CHUNK_BYTES = 64 * 2**20
_LEAD_NAMES = ("lead_time", "prediction_timedelta", "step")
_NAMES = {
    "member": ("member", "number", "realization", "sample", "ensemble"),
    "level": ("level", "isobaricInhPa", "pressure_level", "plev", *MODEL_LEVELS),
    "latitude": ("latitude", "lat"),
    "longitude": ("longitude", "lon"),
}


def canonical_forecast(
    dataset: xr.Dataset, where: str, *, pressure_levels: bool = True
) -> xr.Dataset:
    """A forecast with dims (init_time, lead_time, ...) or, without lead times, (time, ...).

    Latitudes and longitudes ascend, longitudes from 0; lead times are durations, units those of
    the variables. pressure_levels: whether levels are pressures; else numbers of model levels.

    Raises:
        ValueError: names the store and the dimension that is missing, not understood or holds a
            label twice, an uneven grid, or units that are not known.
    """
    names = {old: new for new, usual in _NAMES.items() for old in usual if old in dataset.dims}
    lead = next((name for name in _LEAD_NAMES if name in dataset.dims), None)
    if lead is not None:
        names[lead] = "lead_time"
        if "init_time" not in dataset.dims:
            names["time"] = "init_time"
    time = "init_time" if lead is not None else "time"
    lacking = {"latitude", "longitude", time} - {names.get(str(d), str(d)) for d in dataset.dims}
    if "time" in lacking and "init_time" in dataset.dims:
        raise ValueError(
            f"{where}: no dimension for lead times beside init_time, tried {listed(_LEAD_NAMES)}; "
            f"it has {listed(sorted(map(str, dataset.dims)))}"
        )
    if lacking:
        raise ValueError(
            f"{where}: no dimension for {listed(sorted(lacking))}; it has "
            f"{listed(sorted(map(str, dataset.dims)))}"
        )
    _check_coordinates(dataset, names, where)
    whole, dataset = dataset, dataset.rename({o: n for o, n in names.items() if o != n})
    for name, array in dataset.data_vars.items():
        if {time, "latitude", "longitude"} <= set(array.dims):
            _check_statements(str(name), array, whole, where, pressure_levels)
    dataset = canonical_axes(dataset.reset_coords(drop=True), where)
    needed = {time, "latitude", "longitude"}
    dataset = dataset[[name for name, v in dataset.data_vars.items() if needed <= set(v.dims)]]
    if lead is not None:
        dataset = dataset.assign_coords(lead_time=durations(dataset["lead_time"], where))
    order, longitude = ascending_longitudes(np.asarray(dataset["longitude"], np.float64))
    dataset = dataset.isel(longitude=order).assign_coords(longitude=longitude)
    dataset = dataset.sortby(["latitude", time])
    _check_labels(dataset, where)
    fields = {str(v): _in_usual_units(dataset[v], time, where) for v in dataset.data_vars}
    return dataset.assign(fields)


def _check_statements(
    name: str, array: xr.DataArray, whole: xr.Dataset, where: str, pressure_levels: bool
) -> None:
    """Check what the file says of a variable, as where stores are opened; geopotential height is
    converted afterwards."""
    if (factor := height_factor(name, array)) is not None:
        array = as_geopotential(name, array.chunk(), factor)
    check_statements(name, array, whole, where, pressure_levels=pressure_levels)


def _check_coordinates(dataset: xr.Dataset, names: Mapping[str, str], where: str) -> None:
    """Raise ValueError unless dates are dates, and places and levels are numbers. A dimension
    without coordinates would count from 0, and be compared with the wrong cells."""
    for old, new in {**{str(dim): str(dim) for dim in dataset.dims}, **names}.items():
        kinds = {"init_time": "M", "time": "M", "lead_time": "miuf"}.get(new, "iuf")
        if new not in ("init_time", "time", "lead_time", "level", "latitude", "longitude"):
            continue
        if old not in dataset.coords:
            raise ValueError(f"{where}: dimension {old} has no coordinates; add its values")
        if dataset[old].dtype.kind not in kinds:
            needed = "dates of the standard calendar" if kinds == "M" else "numbers with units"
            shown = dataset[old].to_numpy().ravel()[:1].tolist()
            raise ValueError(f"{where}: {old} is {listed(shown)}, for example; needed: {needed}")


def _check_labels(dataset: xr.Dataset, where: str) -> None:
    for dim in (str(dim) for dim in dataset.dims if dim not in ("member", "longitude")):
        labels, counts = np.unique(dataset[dim].to_numpy(), return_counts=True)
        if pd.isnull(labels).any():
            raise ValueError(f"{where}: {dim} has labels that are missing")
        if (counts > 1).any():
            raise ValueError(f"{where}: {dim} {labels[counts > 1][0]} is there twice")
    if min(dataset.sizes["latitude"], dataset.sizes["longitude"]) < 2:
        raise ValueError(f"{where}: one latitude or longitude alone; needed: at least 2 of each")
    try:
        grid_of(dataset)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _in_usual_units(field: xr.DataArray, time: str, where: str) -> xr.DataArray:
    """The field in its variable's canonical units, unread, if it states other units that are
    known."""
    name, units = str(field.name), field.attrs.get("units")
    height = height_factor(name, field)
    if height is not None:
        _LOGGER.warning("%s: %s is %s", where, name, FROM_HEIGHT)
        return as_geopotential(name, field.chunk({time: 1}), height)
    factor_and_offset = conversion(name, units)
    if factor_and_offset is None:
        check_units(name, units, where)
        return field
    factor, offset = factor_and_offset
    converted = field.chunk({time: 1}).astype(np.float64) * factor + offset
    return converted.assign_attrs(field.attrs, units=VARIABLES[name].units)


def without_further_dims(dataset: xr.Dataset, where: str) -> xr.Dataset:
    """A canonical forecast without unknown dimensions of a single label.

    Raises:
        ValueError: a variable has several labels along such a dimension, members under another
            name say.
    """
    usual_dims = {"init_time", "lead_time", "time", *_NAMES}
    for name, field in dataset.data_vars.items():
        further = [str(d) for d in field.dims if d not in usual_dims and field.sizes[d] > 1]
        if further:
            raise ValueError(
                f"{where}: {name} has further dimensions {listed(further)}; members are known as "
                f"{', '.join(_NAMES['member'])}: rename the dimension, or keep one label of it"
            )
    return dataset.squeeze([d for d in dataset.dims if d not in usual_dims], drop=True)


@dataclass(frozen=True)
class Common:
    """Cases, levels, variables and grid that all sources share.

    Attributes:
        cases: init times, or times if there are no lead times.
    """

    variables: tuple[str, ...]
    cases: np.ndarray
    lead_times: np.ndarray | None
    levels: np.ndarray
    grid: Grid

    @property
    def dim(self) -> str:
        return "time" if self.lead_times is None else "init_time"


def common_ground(forecasts: Mapping[str, xr.Dataset], truth: xr.Dataset, every: int = 1) -> Common:
    """The labels that all forecasts have and the truth can check.

    The grid is the coarsest among them, or it would ask more of one model than of another, as far
    as all of them cover it.

    Raises:
        ValueError: nothing in common, naming the dimension and what each store has.
    """
    kinds = {name: time_dim(forecast) for name, forecast in forecasts.items()}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"forecasts: some have lead times and some have not: {as_written(kinds)}")
    dim = next(iter(kinds.values()))
    stores = {**forecasts, "the truth": truth}
    variables = _shared({k: list(v.data_vars) for k, v in stores.items()}, "variables")
    levels = np.empty(0)
    if any("level" in store[list(variables)].dims for store in stores.values()):
        levels = _shared(
            {
                k: np.asarray(v["level"], dtype=float)
                for k, v in stores.items()
                if "level" in v.dims
            },
            "level",
        )
    leads = None
    if dim == "init_time":
        leads = _shared({k: v["lead_time"].to_numpy() for k, v in forecasts.items()}, "lead_time")
    cases = _shared({k: v[dim].to_numpy() for k, v in forecasts.items()}, dim)
    cases, leads = _checkable(cases, leads, truth["time"].to_numpy())
    grid = covered({name: grid_of(store) for name, store in stores.items()})
    return Common(tuple(map(str, variables)), cases[::every], leads, levels, grid)


def check_same_units(forecasts: Mapping[str, xr.Dataset], truth: xr.Dataset) -> None:
    """Raise ValueError for a variable of which a forecast and the truth state different units,
    or the forecast means over time and the truth values at dates."""
    for name, forecast in forecasts.items():
        for variable in forecast.data_vars:
            if variable not in truth:
                continue
            stated = [d[variable].attrs.get("cell_methods") for d in (forecast, truth)]
            if all(stated) and is_mean(forecast[variable]) != is_mean(truth[variable]):
                raise ValueError(
                    f"{name}: {variable} has cell_methods {stated[0]!r}, the truth {stated[1]!r}: "
                    "means over time and values at the dates do not compare"
                )
            theirs, ours = (d[variable].attrs.get("units") for d in (forecast, truth))
            if theirs is None or ours is None or variable in VARIABLES:
                continue  # the units of known variables are looked at where stores are opened
            if _spelled(theirs) != _spelled(ours):
                raise ValueError(
                    f"{name}: {variable} is in {theirs!r}, the truth in {ours!r}; convert one of "
                    "them"
                )


def _spelled(units: str) -> str:
    """Units in one spelling, for example `m s**-1` as `m s-1`."""
    return "".join(character for character in units if character not in " *^.")


def _shared(labels: Mapping[str, Any], dim: str) -> np.ndarray:
    values = [np.unique(np.asarray(dates)) for dates in labels.values()]
    shared = values[0]
    for other in values[1:]:
        shared = np.intersect1d(shared, other)
    if not len(shared):
        have = ", ".join(f"{k} has {_span(v)}" for k, v in zip(labels, values, strict=True))
        raise ValueError(f"{dim}: nothing in common; {have}")
    return shared


def _span(values: np.ndarray) -> str:
    if len(values) <= 5:
        return str([str(value) for value in values])
    return f"{values[0]} to {values[-1]}"


def _checkable(
    cases: np.ndarray, leads: np.ndarray | None, times: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """The cases whose valid times the truth has all. Lead times without any such case are
    removed first."""
    has_truth = _known(cases, leads, times)
    reached = has_truth.any(axis=0)
    whole = has_truth[:, reached].all(axis=1)
    if not reached.any() or not whole.any():
        raise ValueError(
            f"time: the truth covers {times[0]} to {times[-1]}, which has no whole case of the "
            f"forecasts from {cases[0]} to {cases[-1]}; choose another split or data"
        )
    return cases[whole], None if leads is None else leads[reached]


def _known(cases: np.ndarray, leads: np.ndarray | None, times: np.ndarray) -> np.ndarray:
    """Which valid times [case lead] are among the given times."""
    offsets = np.array([0], "timedelta64[ns]") if leads is None else leads
    return np.isin(cases[:, None] + offsets[None, :], times)


def cases_within(common: Common, times: np.ndarray, elsewhere: np.ndarray) -> np.ndarray:
    """The cases whose valid times are all among the given ones. A case that starts at a time of
    another record, `elsewhere`, and runs into this one does not count."""
    inside = _known(common.cases, common.lead_times, times).all(axis=1)
    return common.cases[inside & ~np.isin(common.cases, np.setdiff1d(elsewhere, times))]


@dataclass(frozen=True)
class ForecastPart:
    """One variable of a few cases, small enough for memory in all stores at once."""

    variable: str
    cases: np.ndarray


def parts_of(forecasts: Mapping[str, xr.Dataset], common: Common) -> list[ForecastPart]:
    """All parts to be compared, variable by variable."""
    parts = []
    for variable in common.variables:
        chosen = [on_labels(forecast[[variable]], common) for forecast in forecasts.values()]
        case_bytes = max(4 * f[variable].size // f.sizes[common.dim] for f in chosen)
        size = max(1, _CHUNK_BYTES // case_bytes)
        parts += [
            ForecastPart(variable, common.cases[start : start + size])
            for start in range(0, len(common.cases), size)
        ]
    return parts


def read_part(
    forecasts: Mapping[str, xr.Dataset], common: Common, part: ForecastPart
) -> dict[str, xr.Dataset]:
    """The part in every store, in memory, on the common grid and labels."""
    datasets = {}
    for name, forecast in forecasts.items():
        chosen = on_labels(forecast[[part.variable]], common).sel({common.dim: part.cases})
        datasets[name] = on_grid(chosen, common.grid)
    return datasets


def on_labels(dataset: xr.Dataset, common: Common) -> xr.Dataset:
    """The common levels and lead times of a store, as far as it has these dimensions."""
    if "level" in dataset.dims:
        dataset = dataset.assign_coords(level=np.asarray(dataset["level"], dtype=float))
        dataset = dataset.sel(level=common.levels)
    if "lead_time" in dataset.dims:
        dataset = dataset.sel(lead_time=common.lead_times)
    return dataset


def on_grid(dataset: xr.Dataset, grid: Grid) -> xr.Dataset:
    """A dataset in memory on a grid, with exactly the labels of that grid."""
    regrid = regridder(dataset, grid)
    dataset = dataset.load()
    if regrid is not None:
        return regrid(dataset)
    return dataset.assign_coords(latitude=grid.latitude, longitude=grid.longitude)
