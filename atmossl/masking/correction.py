"""The task that corrects another model.

The other model's fields, such as its forecasts of one lead time, are a stream of role `input` with
a store of its own. The streams that are predicted hold what they should have been: an analysis.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atmossl.batch import Corruption, StreamMask, StreamSpec
from atmossl.geometry import Grid
from atmossl.masking.base import StreamMasks, TokenLayouts
from atmossl.masking.cells import other_models
from atmossl.masking.tasks import Task, TimePlan, given_steps


@dataclass(frozen=True)
class Correction(Task):
    """Hide all that is predicted, at all steps: what is given are the fields of another model.

    The last step of the window is written, so that nothing is read that the other model says of a
    later date. The AtmoRep paper names it model correction (Lessig et al. 2023, arXiv 2308.13280).
    """

    hides_whole_fields = True

    def plan(self, num_steps: int, step_hours: float) -> TimePlan:
        return TimePlan(num_steps - 1, (0,), tuple(range(num_steps)))

    def describe(self, plan: TimePlan, step_hours: float, grid: Grid) -> str:
        start = given_steps(plan, step_hours)
        return f"{start} of another model, up to the date. Predicted: the analysis of the date."

    def __call__(self, layouts: TokenLayouts, rng: np.random.Generator) -> StreamMasks:
        check_other_model([layout.spec for layout in layouts], "task=correction")
        masks = []
        for layout in layouts:
            corruption = layout.nothing_hidden().corruption
            if layout.spec.role == "predict":
                corruption[:] = int(Corruption.MASK)
            masks.append(StreamMask(corruption))
        return tuple(masks)


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
