"""A case, that is, one init or valid time, in memory: what the model predicts, and what it saw.

What it saw is one map of each variable: the step of its window nearest to what it predicts of which
anything is visible, blank where it is not. The maps of reports show it beside the prediction.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float

from atmossl.batch import PRIMARY, StreamTokens, detokenise
from atmossl.data.windows import Normaliser
from atmossl.inference.plan import Fields, Plan
from atmossl.inference.tiles import predict_parts, views
from atmossl.inference.writer import LayoutName, OutputLayout

Field = tuple[str, int]  # a variable and its level in hPa, 0 at the surface


def predict_fields(
    plan: Plan, times: Sequence[np.datetime64], data: str = PRIMARY
) -> Iterator[Fields]:
    """For every reference time each variable's blended ensemble, over all written steps of the
    streams with that `data`."""
    whole: Fields = {}
    for part in predict_parts(plan, times):
        for name, values in part.fields.items() if part.data == data else ():
            leads = plan.leads_of(data, times[part.case], plan.leads)
            shape = (len(leads), *values.shape[1:3], *plan.grid_of(data).shape)
            target = whole.setdefault(name, np.full(shape, np.nan, np.float32))
            target[np.isin(leads, part.leads), :, :, part.rows] = values
        if part.completes:
            yield whole
            whole = {}


def predictions(
    plan: Plan, times: np.ndarray, names: LayoutName = "cf", data: str = PRIMARY
) -> Iterator[xr.Dataset]:
    """Predictions as datasets in memory, one for every reference time at which the streams with
    that `data` have steps."""
    for number, fields in enumerate(predict_fields(plan, list(times), data)):
        if fields:
            case, num_members = times[number : number + 1], next(iter(fields.values())).shape[1]
            yield OutputLayout(plan, case, num_members, names, data).dataset(fields)


@dataclass(frozen=True)
class VisibleInput:
    """One field as the encoder saw it.

    offset: of its step from the one that is predicted. values: in the variable's units, NaN where
    the encoder saw nothing.
    """

    variable: str
    level: int
    offset: np.timedelta64
    values: Float[np.ndarray, "lat lon"]


def visible_inputs(
    plan: Plan, time: np.datetime64, lead: np.timedelta64, levels: Mapping[str, int]
) -> dict[str, VisibleInput]:
    """What was visible of every variable at its level near the step that is predicted `lead` after
    a reference time. A variable of which nothing was visible has another level of it, or else
    another variable, and none where nothing at all was visible."""
    step = plan.steps.reference + round(lead / plan.step)
    predicted = plan.trained.predicted_levels(PRIMARY)
    shown = _shown(plan, time, set(levels.items()))
    inputs = {}
    for name, level in levels.items():
        fields = [(name, level)]
        if not _steps(shown[name, level]):
            beside = {v: level if level in have else have[-1] for v, have in predicted.items()}
            fields = [*((name, other) for other in predicted[name]), *beside.items()]
            shown |= _shown(plan, time, set(fields) - set(shown))
        steps, field = next(((s, f) for f in fields if (s := _steps(shown[f]))), ([], fields[0]))
        if steps:
            nearest = min(steps, key=lambda other: (abs(other - step), other))
            values = shown[field][nearest]
            inputs[name] = VisibleInput(*field, (nearest - step) * plan.step, values)
    return inputs


def _steps(shown: Float[np.ndarray, "time lat lon"]) -> list[int]:
    """Steps of the window of which anything is visible."""
    return [step for step, values in enumerate(shown) if np.isfinite(values).any()]


def _shown(
    plan: Plan, time: np.datetime64, fields: Iterable[Field]
) -> dict[Field, Float[np.ndarray, "time lat lon"]]:
    """Fields over all steps of the window of a reference time; tiles that overlap agree."""
    shape = (plan.trained.window.time, *plan.grid.shape)
    shown = {field: np.full(shape, np.nan, np.float32) for field in fields}
    for box, view in views(plan, time) if shown else ():
        place = np.ix_(box.lat_index(), box.lon_index(plan.grid.shape[1]))
        for stream in view.streams:
            if stream.spec.role != "predict" or stream.spec.data != PRIMARY:
                continue
            values = _visible(stream, plan.trained.normaliser)
            for row, name in enumerate(stream.spec.variables):
                for column, level in enumerate(stream.spec.level_values):
                    if (name, level) in shown:
                        shown[name, level][:, *place] = values[row, column]
    return shown


def _visible(
    stream: StreamTokens, normaliser: Normaliser
) -> Float[np.ndarray, "variable level time lat lon"]:
    source = stream.source.masked_fill(stream.unseen, torch.nan)
    return normaliser.inverse(detokenise(source, stream.spec), stream.spec).numpy()
