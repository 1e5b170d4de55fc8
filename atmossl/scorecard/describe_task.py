"""What a task gave and hid, in a sentence for people."""

from typing import Any

import numpy as np

from atmossl.geometry import Grid
from atmossl.masking.combined import Combined, Counterfactual
from atmossl.masking.places import CrossVariable, Inpainting
from atmossl.masking.tasks import Downscaling, Forecast, Hindcast, TemporalInterpolation, TimePlan
from atmossl.scorecard.scored_cells import hidden_cells


def describe_task(task: Any, plan: TimePlan, step_hours: float, grid: Grid) -> str:
    """Given and predicted, for the tasks that are known here; empty for others."""
    given = f"Given: {len(plan.read)} steps of {step_hours * plan.refine:g} h"
    match task:
        case Forecast(lead_hours=lead):
            return f"{given} up to the init time. Predicted: the {lead:g} h after it."
        case Hindcast(lead_hours=lead):
            return f"{given} from the init time on. Predicted: the {lead:g} h before it."
        case TemporalInterpolation():
            hidden = len(plan.offsets)
            return f"{given}, of which {hidden} in the middle are hidden and predicted."
        case Downscaling(factor=factor):
            return (
                f"{given}, as means over {factor} x {factor} cells. Predicted: every cell at the "
                "middle step."
            )
        case Inpainting():
            cells = hidden_cells(task, grid)
            assert cells is not None, task
            share = (grid.weights[:, None] * cells).sum() / (cells.shape[1] * grid.weights.sum())
            return f"{given} without {share:.1%} of the globe, which alone is predicted and scored."
        case CrossVariable(variables=variables, levels=levels):
            what = ", ".join(name.replace("_", " ") for name in variables) or "all variables"
            where = f" at {', '.join(map(str, levels))} hPa" if levels else ""
            return f"{given}. Hidden at all of them, and predicted: {what}{where}."
        case Combined(parts=parts):
            names = " and ".join(type(part).__name__ for part in parts)
            return f"{given}; hidden is what any of {names} hides."
        case Counterfactual():
            return f"{given}, of another date, level or place than the model is told."
    return ""


def period(times: np.ndarray) -> str:
    """First and last of the cases."""
    first, last = (np.datetime_as_string(time, "h") for time in times[[0, -1]])
    return f"from {first} to {last}"
