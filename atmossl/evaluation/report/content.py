"""What a report is made of."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import xarray as xr


@dataclass(frozen=True)
class Example:
    """One case of one variable: truth [latitude, longitude], prediction with members if any.

    Attributes:
        hidden: cells that were predicted, [latitude, longitude]; None: all.
    """

    variable: str
    level: float | None
    truth: xr.DataArray
    prediction: xr.DataArray
    hidden: xr.DataArray | None = None


@dataclass(frozen=True)
class TaskReport:
    """All that is known of one task, or of one comparison of forecasts.

    Attributes:
        about: what is given and what is predicted, in a sentence. period: first and last case.
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
    period: str

    @property
    def baselines(self) -> list[str]:
        sources = dict.fromkeys(map(str, self.table["source"]))
        return [source for source in sources if source != self.model_name]


@dataclass(frozen=True)
class Provenance:
    """How to get the same numbers again.

    Attributes:
        command: the line that made the report. facts: versions, checkpoint, data, dates.
    """

    command: str
    facts: Mapping[str, str]
