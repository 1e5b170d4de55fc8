"""What a report is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from atmossl.evaluation.verify import rows_where


@dataclass(frozen=True)
class Given:
    """What the model saw of a case: a field [latitude, longitude], missing where it saw nothing.

    Attributes:
        title: which field of when it is, for people.
        is_predicted: whether it is the field that is predicted, at another time, coarse or in part;
            else it is another variable or level.
    """

    title: str
    field: xr.DataArray
    is_predicted: bool


@dataclass(frozen=True)
class Plume:
    """Means over boxes of cells of one case: of one box at all lead times, or of a row of boxes.

    Attributes:
        place: the boxes, for people. axis: what `positions` are, with units.
        positions: lead times in hours, or longitudes. members, truth: missing where nothing was
            hidden.
    """

    place: str
    axis: str
    positions: Float[np.ndarray, " position"]
    members: Float[np.ndarray, "position member"]
    truth: Float[np.ndarray, " position"]


@dataclass(frozen=True)
class Example:
    """One case of one variable: truth [latitude, longitude], prediction with members if any.

    Attributes:
        hidden: cells that were predicted, [latitude, longitude]; None: all.
        given: what the model saw, where that is known.
        baselines: of the same case, by name.
        plume: means over boxes of every member, at all lead times; None without members or boxes.
    """

    variable: str
    level: float | None
    truth: xr.DataArray
    prediction: xr.DataArray
    hidden: xr.DataArray | None = None
    given: Given | None = None
    baselines: Mapping[str, xr.DataArray] = field(default_factory=dict)
    plume: Plume | None = None


class Span(NamedTuple):
    """Dates of the first and last case of a record; its name, if it has one."""

    record: str
    first: str
    last: str


@dataclass(frozen=True)
class TaskReport:
    """All that is known of one task, or of one comparison of forecasts.

    Attributes:
        about: what is given and what is predicted, in a sentence.
        spans: of the cases of every record.
        table: as `verify.Tally.table` gives it. overall: as `verify.Tally.overall` does.
        diagnosed: datasets [source, ...] by diagnostic and variable.
    """

    task: str
    model_name: str
    table: pd.DataFrame
    overall: pd.DataFrame
    diagnosed: Mapping[tuple[str, str], xr.Dataset]
    examples: tuple[Example, ...]
    about: str
    spans: tuple[Span, ...]

    @property
    def baselines(self) -> list[str]:
        sources = dict.fromkeys(map(str, self.table["source"]))
        return [source for source in sources if source != self.model_name]

    @property
    def num_cases(self) -> int:
        return max(self.table["num_times"].tolist())

    @property
    def period(self) -> str:
        return "; ".join(f"{record} from {first} to {last}".strip() for record, first, last in
                         self.spans)  # fmt: skip

    @cached_property
    def ranked(self) -> list[str]:
        """Baselines from the best one on, by the overall ratio of RMSE."""
        ratios = rows_where(self.overall, score="rmse_ratio").sort_values("value", ascending=False)
        return [str(name) for name in ratios["baseline"]]

    def baseline_of(self, example: Example) -> str | None:
        """The best baseline that has values for an example, if any does."""
        have = {name for name, field in example.baselines.items() if bool(field.notnull().any())}
        return next((name for name in self.ranked if name in have), None)


@dataclass(frozen=True)
class Provenance:
    """What was scored, and how to get the same numbers again.

    Attributes:
        title: of the report. summary: which model and which data, the first that a reader looks
            for. command: the line that made the report. facts: versions, seeds, settings.
    """

    title: str
    summary: Mapping[str, str]
    command: str
    facts: Mapping[str, str]
