"""What of a prediction a task hid: nothing else is scored."""

from typing import Any

import numpy as np
import xarray as xr

from atmossl.geometry import Grid
from atmossl.masking.combined import Combined, Counterfactual
from atmossl.masking.places import CrossVariable, Inpainting
from atmossl.masking.tasks import Downscaling, Forecast, Hindcast, TemporalInterpolation


def hidden_cells(task: Any, grid: Grid) -> np.ndarray | None:
    """Hidden cells [lat, lon] of a task that hides places at the time that it writes, else None."""
    match task:
        case Inpainting():
            return task.cells(grid.latitude, grid.longitude)
        case Counterfactual(task=inner):
            return hidden_cells(inner, grid)
        case Combined(parts=parts):
            found = [hidden_cells(part, grid) for part in parts]
            cells = [own for own in found if own is not None]
            return np.any(cells, axis=0) if len(cells) == len(found) else None
    return None


def check_scorable(task: Any, name: str) -> None:
    """Raise ValueError for a task without truth, or a union of which it is not known here what it
    hides where it writes."""
    why = None
    if task.fills_missing:
        why = (
            "missing=true fills what has no truth; to score it, hide cells that are known: boxes, "
            "mask_file, observed or stations"
        )
    elif task.downscaling is not None and task.downscaling.coarse_input:
        why = "coarse_input=true has no truth; to score it, give a fine store and leave it out"
    elif isinstance(task, TemporalInterpolation) and task.refine > 1:
        why = (
            f"refine={task.refine} writes steps of which the store has no truth; to score it, hide "
            "steps that are known: hidden_time or steps"
        )
    elif isinstance(task, Counterfactual):
        check_scorable(task.task, name)
    elif isinstance(task, Combined):
        for part in task.parts:
            check_scorable(part, name)
        kinds = {type(part) for part in task.parts}
        whole = kinds & {Forecast, Hindcast, Downscaling} or len(kinds) == 1
        if not whole or kinds == {CrossVariable}:
            names = sorted(kind.__name__ for kind in kinds)
            why = f"what a union of {names} hides differs from step to step; score its parts"
    if why is not None:
        raise ValueError(f"tasks: {name} with {why}")


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
