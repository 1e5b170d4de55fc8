"""Puts truth, prediction and baseline on the same labels: times, levels and cells.

Everything is found by label. What is missing is one ValueError that lists it; nothing is dropped.
"""

import numpy as np
import xarray as xr

from atmossl.geometry import Grid
from atmossl.value_faults import listed

_NUM_LISTED = 5


def complete(field: xr.DataArray) -> xr.DataArray:
    """True where a field has a value; for an ensemble, where every member has one."""
    there = field.notnull()
    return there.all("member") if "member" in there.dims else there


def time_dim(dataset: xr.Dataset) -> str:
    """The dimension over which cases are counted: `init_time` of a forecast, else `time`.

    Raises:
        ValueError: neither dimension is there.
    """
    for name in ("init_time", "time"):
        if name in dataset.dims:
            return name
    raise ValueError(
        f"dims {listed(dataset.dims)}: a prediction needs init_time (with lead_time) or time"
    )


def grid_of(dataset: xr.Dataset) -> Grid:
    """The dataset's grid."""
    return Grid(
        np.asarray(dataset["latitude"], dtype=np.float64),
        np.asarray(dataset["longitude"], dtype=np.float64),
    )


def case_times(dataset: xr.Dataset) -> xr.DataArray:
    """Valid time of every case: [init_time, lead_time] of a forecast, else [time]."""
    if time_dim(dataset) == "init_time":
        return dataset["init_time"] + dataset["lead_time"]
    return dataset["time"]


def require_labels(needed: np.ndarray, present: np.ndarray, dim: str, where: str) -> None:
    """Raise ValueError listing the labels of `needed` that `present` lacks."""
    missing = np.setdiff1d(np.unique(needed), present)
    if missing.size:
        shown = ", ".join(str(label) for label in missing[:_NUM_LISTED])
        more = f" and {missing.size - _NUM_LISTED} more" if missing.size > _NUM_LISTED else ""
        span = f"it has {present.min()} to {present.max()}" if present.size else "it is empty"
        raise ValueError(f"{dim}: {where} lacks {shown}{more}; {span}")


def select_times(dataset: xr.Dataset, times: xr.DataArray, where: str) -> xr.Dataset:
    """The dataset at `times` (any dimensions, which replace `time`).

    Raises:
        ValueError: a time is missing or appears twice.
    """
    present = dataset["time"].to_numpy()
    if np.unique(present).size != present.size:
        raise ValueError(f"time: {where} has the same time twice; pass independent runs apart")
    require_labels(times.to_numpy(), present, "time", where)
    # Plain labels: an indexer's own coordinates would come along and clash.
    chosen = dataset.sel(time=xr.DataArray(times.to_numpy(), dims=times.dims))
    chosen = chosen.drop_vars("time") if "time" not in times.dims else chosen
    return chosen.assign_coords({dim: times[dim] for dim in times.dims})


def truth_for(prediction: xr.Dataset, truth: xr.Dataset) -> xr.Dataset:
    """Truth beside every case of the prediction, on its variables, levels and cells.

    Raises:
        ValueError: variables, times or levels are missing, or the grids differ.
    """
    where = "the truth"
    truth = _same_variables(truth, prediction, where)
    chosen = select_times(truth, case_times(prediction), where)
    return _on_labels(chosen, prediction, ("level",), where)


def match_baseline(baseline: xr.Dataset, prediction: xr.Dataset, name: str) -> xr.Dataset:
    """The baseline on the prediction's cases, levels and cells.

    Raises:
        ValueError: a variable, case or level is missing, or the grids differ.
    """
    where = f"baseline {name}"
    baseline = _same_variables(baseline, prediction, where)
    return _on_labels(baseline, prediction, ("init_time", "lead_time", "time", "level"), where)


def _same_variables(dataset: xr.Dataset, prediction: xr.Dataset, where: str) -> xr.Dataset:
    """The variables of the prediction, of a dataset on the same cells that has them all."""
    require_same_grid(prediction, dataset, where)
    have = {*map(str, dataset.data_vars)}
    if missing := sorted({*map(str, prediction.data_vars)} - have):
        raise ValueError(
            f"variables: {where} lacks {listed(missing)}; it has {listed(sorted(have))}"
        )
    return dataset[list(prediction.data_vars)]


def require_same_grid(prediction: xr.Dataset, other: xr.Dataset, where: str) -> None:
    """Raise ValueError unless both have the same cells."""
    differs = grid_of(other).difference(grid_of(prediction))
    if differs:
        raise ValueError(f"latitude, longitude: {where} is on other cells: {differs}")


def _on_labels(
    dataset: xr.Dataset, prediction: xr.Dataset, dims: tuple[str, ...], where: str
) -> xr.Dataset:
    for dim in dims:
        if dim not in prediction.dims:
            continue
        if dim not in dataset.dims:
            raise ValueError(f"dims: {where} has {listed(dataset.dims)}, needs {dim}")
        labels = prediction[dim].to_numpy()
        require_labels(labels, dataset[dim].to_numpy(), dim, where)
        dataset = dataset.sel({dim: labels})
    # Same cells within tolerance: take the prediction's labels, or xarray would drop cells.
    return dataset.assign_coords(latitude=prediction["latitude"], longitude=prediction["longitude"])
