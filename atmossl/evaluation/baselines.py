"""Baselines that need no fit: persistence, climatology and linear interpolation in time.

Each returns a dataset in the prediction contract without `member`. One dataset is one run, so
that nothing is looked up across the gap between runs. Spatial ones are in `spatial`, the fitted
one in `ridge`.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import xarray as xr

from atmossl.evaluation.alignment import require_labels, select_times

_MONTHS = np.arange(1, 13)
_BLOCK_BYTES = 256 * 2**20

Prepare = Callable[[xr.Dataset], xr.Dataset]


def as_times(times: xr.DataArray | np.ndarray, dim: str) -> xr.DataArray:
    """Times as a coordinate along `dim`."""
    values = np.atleast_1d(np.asarray(times))
    return xr.DataArray(values, {dim: values}, (dim,), name=dim)


def persistence(
    truth: xr.Dataset, init_time: xr.DataArray | np.ndarray, lead_time: xr.DataArray | np.ndarray
) -> xr.Dataset:
    """The state at init time for every lead time.

    Raises:
        ValueError: an init time is missing from the truth.
    """
    start = select_times(truth, as_times(init_time, "init_time"), "the truth")
    leads = as_times(lead_time, "lead_time")
    forecast = start.expand_dims(lead_time=leads)
    return forecast.transpose("init_time", "lead_time", ...)


def climatology(
    segments: Sequence[xr.Dataset], *, monthly: bool = True, prepare: Prepare = lambda block: block
) -> xr.Dataset:
    """Mean over the training segments per cell and calendar month, dims (month, ...).

    Give it training segments only: a month's mean then never holds the target's own date. Months
    without data are missing. With `monthly=False` (records too short for a season) every month
    holds the mean of all times. Segments are read a block of times after the other, each of which
    goes through `prepare` (such as regridding).

    Raises:
        ValueError: no segments.
    """
    if not segments:
        raise ValueError("segments: a climatology needs one training segment or more, got none")
    blocks = (prepare(block) for segment in segments for block in time_blocks(segment))
    total, count = _sums_by_month(next(blocks), monthly)
    for block in blocks:
        one_total, one_count = _sums_by_month(block, monthly)
        total = total + one_total
        count = count + one_count
    mean = (total / count.where(count > 0)).astype(np.float32)
    for name in mean.data_vars:
        mean[name].attrs = segments[0][name].attrs
    return mean.transpose("month", ...)


def time_blocks(segment: xr.Dataset) -> Iterator[xr.Dataset]:
    """The record in parts along time that take little memory each, loaded."""
    step = max(1, int(_BLOCK_BYTES * segment.sizes["time"] // max(1, segment.nbytes)))
    for start in range(0, segment.sizes["time"], step):
        yield segment.isel(time=slice(start, start + step)).load()


def _sums_by_month(segment: xr.Dataset, monthly: bool) -> tuple[xr.Dataset, xr.Dataset]:
    """Sums and counts of valid values by calendar month, [month, ...]."""
    month = segment["time"].dt.month
    belongs = (month == xr.DataArray(_MONTHS, {"month": _MONTHS}, ("month",))) | (not monthly)
    belongs = belongs.drop_vars("time").astype(np.float64)

    def total(field: xr.DataArray) -> xr.DataArray:
        return xr.dot(field.fillna(0.0).astype(np.float64), belongs, dim="time")

    def count(field: xr.DataArray) -> xr.DataArray:
        return xr.dot(field.notnull().astype(np.float64), belongs, dim="time")

    bare = segment.drop_vars("time")
    return bare.map(total), bare.map(count)


def climatology_at(monthly: xr.Dataset, times: xr.DataArray | np.ndarray) -> xr.Dataset:
    """The climatology at times of any dims, by calendar month (a bare array gets dim `time`).

    Raises:
        ValueError: a month that the training segments did not cover.
    """
    if not isinstance(times, xr.DataArray):
        times = as_times(times, "time")
    month = times.dt.month
    cell_dims = [dim for dim in next(iter(monthly.data_vars.values())).dims if dim != "month"]
    covered = next(iter(monthly.data_vars.values())).notnull().any(cell_dims)
    present = monthly["month"].to_numpy()[covered.to_numpy()]
    require_labels(month.to_numpy(), present, "month", "the climatology (see monthly=False)")
    chosen = monthly.sel(month=xr.DataArray(month.to_numpy(), dims=times.dims))
    chosen = chosen.drop_vars("month").assign_coords({d: times[d] for d in times.dims})
    return chosen.transpose(*times.dims, ...)


def climatology_forecast(
    monthly: xr.Dataset, init_time: xr.DataArray | np.ndarray, lead_time: xr.DataArray | np.ndarray
) -> xr.Dataset:
    """The climatology of every valid time, dims (init_time, lead_time, ...)."""
    init, lead = as_times(init_time, "init_time"), as_times(lead_time, "lead_time")
    return climatology_at(monthly, init + lead)


def linear_in_time(
    truth: xr.Dataset,
    time: xr.DataArray | np.ndarray,
    *,
    before: np.timedelta64,
    after: np.timedelta64,
) -> xr.Dataset:
    """The straight line in time between the states `before` and `after` each hidden time.

    Raises:
        ValueError: one of the two states is missing from the truth.
    """
    zero = np.timedelta64(0, "ns")
    if before <= zero or after <= zero:
        raise ValueError(f"before and after must be positive, got {before} and {after}")
    hidden = as_times(time, "time")
    earlier = select_times(truth, hidden - before, "the truth (known state before)")
    later = select_times(truth, hidden + after, "the truth (known state after)")
    share = float(before / (before + after))
    # Labels of both ends differ from the hidden time's: put all on the hidden time first.
    earlier, later = earlier.assign_coords(time=hidden), later.assign_coords(time=hidden)
    line = earlier + (later - earlier) * np.float32(share)
    for name in line.data_vars:
        line[name].attrs = truth[name].attrs
    return line
