"""The task that corrects another model, and the first guess that this model's fields give.

The other model's fields, such as its forecasts of one lead time, are a stream of role `input` with
a store of its own. The streams that are predicted hold what they should have been: an analysis.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from atmossl.batch import PRIMARY, Corruption, StreamMask, StreamSpec, StreamWindow, token_grid
from atmossl.geometry import Grid
from atmossl.masking.base import TokenLayout, interpolate_cells
from atmossl.masking.tasks import Task, TimePlan, given_steps

_HALO = 2  # coarse columns that the cubic interpolation reads on each side
_WHOLE = 0.999  # share of observed values below which an interpolated value counts as missing


@dataclass(frozen=True)
class Correction(Task):
    """Hide all that is predicted, at all steps: what is given are the fields of another model.

    The last step of the window is written, so that nothing is read that the other model says of a
    later date. The AtmoRep paper names it model correction (Lessig et al. 2023, arXiv 2308.13280).
    """

    @property
    def hides_whole_fields(self) -> bool:
        return True

    def plan(self, num_steps: int, step_hours: float) -> TimePlan:
        del step_hours
        return TimePlan(num_steps - 1, (0,), tuple(range(num_steps)))

    def describe(self, plan: TimePlan, step_hours: float, grid: Grid) -> str:
        del grid
        start = given_steps(plan, step_hours)
        return f"{start} of another model, up to the date. Predicted: the analysis of the date."

    def __call__(
        self, layouts: tuple[TokenLayout, ...], rng: np.random.Generator
    ) -> tuple[StreamMask, ...]:
        del rng
        check_other_model([layout.spec for layout in layouts], "task=correction")
        masks = []
        for layout in layouts:
            corruption = layout.nothing_hidden().corruption
            if layout.spec.role == "predict":
                corruption[:] = int(Corruption.MASK)
            masks.append(StreamMask(corruption))
        return tuple(masks)


def other_models(specs: Sequence[StreamSpec]) -> tuple[StreamSpec, ...]:
    """The streams that give what another model says of a field that is predicted."""
    predicted = {
        (name, level)
        for spec in specs
        if spec.role == "predict" and spec.data == PRIMARY
        for name in spec.variables
        for level in spec.level_values
    }
    return tuple(
        spec
        for spec in specs
        if spec.role == "input"
        and spec.data != PRIMARY
        and any((n, level) in predicted for n in spec.variables for level in spec.level_values)
    )


def check_other_model(specs: Sequence[StreamSpec], key: str) -> None:
    """Raise ValueError if no stream gives another model's fields. key: the setting that needs
    them."""
    if other_models(specs):
        return
    have = [f"{s.name} (role {s.role}, data {s.data})" for s in specs]
    raise ValueError(
        f"{key} needs the fields of another model, but no stream gives them: streams are "
        f"{', '.join(have)}; needed: a stream of role input whose data is a catalog entry with "
        "variables and levels that are predicted, as in experiment=correction"
    )


def other_model_guess(
    window: StreamWindow, windows: Sequence[StreamWindow]
) -> Float[Tensor, "variable level time lat lon"]:
    """What other models say of the fields of a window, on its cells and steps, in standard
    deviations from their own mean; 0, the climatological mean, of what none of them has."""
    guess = torch.zeros_like(window.fields)
    if window.spec.role != "predict":
        return guess
    chosen = {spec.name for spec in other_models([w.spec for w in windows])}
    for other in windows:
        if other.spec.name not in chosen:
            continue
        fields = _on_window(other, window)
        for row, name in enumerate(window.spec.variables):
            for column, level in enumerate(window.spec.level_values):
                if name in other.spec.variables and level in other.spec.level_values:
                    place = other.spec.variables.index(name), other.spec.level_values.index(level)
                    guess[row, column] = fields[place]
    return guess


def _on_window(other: StreamWindow, window: StreamWindow) -> Tensor:
    """The fields of a window on the cells and steps of another one of the same air; 0 where values
    are missing."""
    if other.valid is None:
        return _on_cells(_at_times(other.fields, other, window), window)
    there = other.valid.to(other.fields)
    fields, share = (
        _on_cells(_at_times(values, other, window), window)
        for values in (other.fields * there, there.expand_as(other.fields))
    )
    return torch.where(share > _WHOLE, fields, 0.0)


def _at_times(fields: Tensor, other: StreamWindow, window: StreamWindow) -> Tensor:
    """Linear in time between the steps of the other window; the first and last are repeated."""
    have, wanted = other.time_hours.double(), window.time_hours.double()
    if have.shape == wanted.shape and bool(torch.equal(have, wanted)):
        return fields
    late = torch.searchsorted(have, wanted).clamp(1, len(have) - 1)
    share = ((wanted - have[late - 1]) / (have[late] - have[late - 1])).clamp(0.0, 1.0)
    before, after = fields[..., late - 1, :, :], fields[..., late, :, :]
    return torch.lerp(before, after, share.to(fields)[:, None, None])


def _on_cells(fields: Tensor, window: StreamWindow) -> Tensor:
    """Cubic interpolation to finer cells, with edges repeated but for a closed circle of longitude;
    means over cells that are finer than those of the window."""
    num_lat, num_lon = window.fields.shape[-2:]
    if fields.shape[-2:] == (num_lat, num_lon):
        return fields
    if fields.shape[-1] > num_lon:
        flat = fields.flatten(0, -4)
        means = functional.interpolate(flat, size=(num_lat, num_lon), mode="area")
        return means.unflatten(0, fields.shape[:-3])
    if not token_grid(window).periodic:
        return interpolate_cells(fields, (num_lat, num_lon))
    wide = torch.cat([fields[..., -_HALO:], fields, fields[..., :_HALO]], dim=-1)
    beyond = _HALO * num_lon // fields.shape[-1]
    fine = interpolate_cells(wide, (num_lat, num_lon + 2 * beyond))
    return fine[..., beyond : beyond + num_lon]
