"""What of a prediction a task hid: nothing else is scored."""

from typing import Any

import numpy as np
import xarray as xr

from atmossl.geometry import Grid
from atmossl.masking.combined import Combined, Counterfactual
from atmossl.masking.places import CrossVariable, Inpainting


def hidden_cells(task: Any, grid: Grid) -> np.ndarray | None:
    """Hidden cells [lat, lon] of a task that hides places at the time that it writes, else None."""
    match task:
        case Inpainting():
            return task.cells(grid.latitude, grid.longitude)
        case Counterfactual(task=inner):
            return hidden_cells(inner, grid)
    return None


def only_hidden(task: Any, predicted: xr.Dataset) -> xr.Dataset:
    """A prediction without the variables and levels that were given, and, for a union of a
    forecast and others, without lead time 0, where most of the field was."""
    match task:
        case CrossVariable(variables=variables, levels=levels):
            if variables:
                predicted = predicted[[name for name in predicted.data_vars if name in variables]]
            if levels and "level" in predicted.dims:
                predicted = predicted.sel(level=[v for v in predicted["level"] if v in levels])
        case Combined() if "lead_time" in predicted.dims:
            predicted = predicted.sel(lead_time=predicted["lead_time"] != np.timedelta64(0, "ns"))
        case Counterfactual(task=inner):
            return only_hidden(inner, predicted)
    return predicted


def beside(truth: xr.Dataset, hidden: np.ndarray | None) -> xr.Dataset:
    """The truth, missing where cells were given, so that nothing is scored there."""
    if hidden is None:
        return truth
    return truth.where(xr.DataArray(hidden, dims=("latitude", "longitude")))
