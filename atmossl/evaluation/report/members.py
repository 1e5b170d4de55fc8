"""The part of a report on single members: what a member is, maps of some of them, means over boxes,
and whether their spread is right for more than one value at a time.

It shows what scores of single values cannot: whether a member is a field that the atmosphere could
have, or a set of values that are each right in their own cell only.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from atmossl.evaluation.report.content import Example, TaskReport
from atmossl.evaluation.report.maps import Panel, field_scale, first_members, symmetric_scale
from atmossl.evaluation.verify import WHOLE_YEAR, are_draws, rows_of_prefix, rows_where

NUM_SHOWN = 3
MAX_LEADS = 6  # columns of the table
_PREFIX = "spread_skill"
_QUANTITIES = {
    "": "single values",
    "_mean_4x4": "means over 4 x 4 cells",
    "_mean_8x8": "means over 8 x 8 cells",
    "_zonal_difference": "differences of neighbours, zonal",
    "_meridional_difference": "differences of neighbours, meridional",
    "_vertical_difference": "differences of levels",
    "_temporal_difference": "differences of lead times",
}
_TAIL = (
    "This ensemble is a tail: a member is a set of values of single cells, each right in its own "
    "cell only, and not a field of weather. Use its members for questions about one cell at a time."
)
_DRAWS = (
    "A member is one draw, a whole field. If the members are right together, the truth looks like "
    "one more of them, and so does its difference from their mean."
)


def ensembles(report: TaskReport) -> list[Example]:
    """The examples with more than one member, of all variables."""
    return [e for e in report.examples if e.prediction.sizes.get("member", 1) > 1]


def what_members_are(example: Example) -> str:
    """A sentence on what one member of a prediction can be asked."""
    return _DRAWS if are_draws(example.prediction) else _TAIL


def most_varied(examples: Sequence[Example]) -> Example:
    """The example whose members differ most beside how much the truth varies on the globe."""

    def variation(example: Example) -> float:
        spread = example.prediction.std("member")
        if example.hidden is not None:
            spread = spread.where(example.hidden)
        return float(spread.mean() / example.truth.std())

    return max(examples, key=lambda example: np.nan_to_num(variation(example)))


def member_panels(example: Example) -> list[Panel]:
    """Three rows of maps: the truth, the ensemble mean and the difference between them; the first
    members; and the differences of these from the mean."""
    truth, mean = example.truth, example.prediction.mean("member")
    members = first_members(example.prediction, NUM_SHOWN)
    fields = {"truth": truth} | members
    departures = {name: _where_hidden(field - mean, example) for name, field in fields.items()}
    alike = field_scale(mean, *fields.values())
    apart = replace(symmetric_scale(*departures.values()), rooted=True)
    units = str(truth.attrs.get("units", ""))
    minus = {name: f"{name} minus ensemble mean" for name in fields}
    return [
        Panel("truth", truth, alike, units),
        Panel("ensemble mean", mean, alike, units),
        Panel(minus["truth"], departures["truth"], apart, units),
        *(Panel(name, field, alike, units) for name, field in members.items()),
        *(Panel(minus[name], departures[name], apart, units) for name in members),
    ]


def _where_hidden(field: xr.DataArray, example: Example) -> xr.DataArray:
    return field if example.hidden is None else field.where(example.hidden)


def spread_table(report: TaskReport) -> pd.DataFrame:
    """Spread over error of single values, box means and differences, which is 1 where they are
    right: by `quantity` and `lead_hours`, the geometric mean over variables and levels as `value`,
    and the least and largest of them as `low` and `high`."""
    rows = rows_of_prefix(report.table, _PREFIX)
    rows = rows_where(rows, source=report.model_name, region="global", season=WHOLE_YEAR)
    logarithms = np.log(rows["value"].where(rows["value"] > 0))
    rows = rows.assign(logarithm=logarithms).dropna(subset="logarithm")
    lines = []
    for suffix, quantity in _QUANTITIES.items():
        chosen = rows_where(rows, score=_PREFIX + suffix)
        for lead, part in chosen.groupby("lead_hours", dropna=False):
            middle = part["logarithm"].mean()
            ends = (part["logarithm"].min(), part["logarithm"].max())
            lines.append((quantity, lead, *np.exp([middle, *ends])))
    return pd.DataFrame(lines, columns=["quantity", "lead_hours", "value", "low", "high"])


def spread_rows(table: pd.DataFrame) -> dict[str, Any]:
    """A table of spread over error as text: a row per quantity, a column for some lead times."""
    leads = np.unique(table["lead_hours"].dropna())
    leads = leads[:: max(1, -(-len(leads) // MAX_LEADS))]
    columns: list[float | None] = list(leads) if len(leads) else [None]
    rows = []
    for quantity, part in table.groupby("quantity", sort=False):
        cells = [_cell(rows_where(part, lead_hours=lead)) for lead in columns]
        rows.append({"quantity": quantity, "cells": cells})
    names = ["spread over error" if lead is None else f"{lead:g} h" for lead in columns]
    return {"columns": names, "rows": rows}


def _cell(rows: pd.DataFrame) -> str:
    if rows.empty:
        return ""
    value, low, high = rows[["value", "low", "high"]].to_numpy()[0]
    return f"{value:.2f} ({low:.2f} to {high:.2f})"
