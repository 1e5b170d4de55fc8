"""Score cards: a model's error over each baseline's, as a coloured table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from atmossl.evaluation.report.content import TaskReport
from atmossl.evaluation.report.figures import readable
from atmossl.evaluation.rows import rows_of_prefix, rows_where
from atmossl.evaluation.verify import CRPS_RATIO_PREFIX, RATIO_PREFIX, WHOLE_YEAR

_MAX_COLUMNS = 10
_FULL_COLOUR = np.log(2.0)  # half or double the baseline's error
_BETTER, _WORSE = (33, 102, 172), (178, 24, 43)


@dataclass(frozen=True)
class Cell:
    """A number with its interval; `open` if there is one and it includes 1."""

    text: str
    title: str
    colour: str
    dark: bool
    open: bool


@dataclass(frozen=True)
class Card:
    """A table of cells with its headings."""

    title: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def ratio_cell(rows: Any) -> Cell:
    """The cell of one row of the table; several rows are averaged and lose their interval."""
    if rows.empty or rows["value"].isna().all():
        return Cell("", "", "transparent", False, False)
    value = float(rows["value"].mean())
    low, high = (float(rows[end].iloc[0]) if len(rows) == 1 else np.nan for end in ("low", "high"))
    open_ = bool(low <= 1.0 <= high)
    title = f"{value:.4f}"
    if np.isfinite(low):
        title += f", 95 % interval {low:.4f} to {high:.4f}, p = {rows['p_value'].iloc[0]:.3f}"
    strength = float(np.clip(abs(np.log(max(value, 1e-9))) / _FULL_COLOUR, 0.0, 1.0))
    base = _BETTER if value < 1.0 else _WORSE
    mixed = [round(255 + strength * (channel - 255)) for channel in base]
    colour = f"rgb({mixed[0]},{mixed[1]},{mixed[2]})"
    return Cell(f"{value:.2f}", title, colour, strength > 0.6, open_)


def score_cards(report: TaskReport) -> list[Card]:
    """RMSE and CRPS over each baseline's by variable, level and lead time.

    With lead times there is a card per baseline, else one card with a column per baseline.
    """
    cards = []
    for prefix, name in ((RATIO_PREFIX, "RMSE"), (CRPS_RATIO_PREFIX, "CRPS")):
        rows = rows_of_prefix(report.table, prefix)
        rows = rows_where(rows, region="global", season=WHOLE_YEAR)
        if rows.empty:
            continue
        if rows["lead_hours"].isna().all():
            cards.append(_card(rows, "baseline", report.baselines, f"{name} over that of"))
            continue
        hours = np.unique(rows["lead_hours"].dropna())
        hours = hours[:: max(1, -(-len(hours) // _MAX_COLUMNS))]
        for baseline in report.baselines:
            chosen = rows_where(rows, baseline=baseline)
            cards.append(
                _card(chosen, "lead_hours", list(hours), f"{name} over that of {baseline}")
            )
    return cards


def region_card(report: TaskReport) -> Card | None:
    """Mean ratio of RMSE over variables, levels and lead times by region and season."""
    rows = rows_of_prefix(report.table, RATIO_PREFIX)
    places = rows[["region", "season"]].drop_duplicates()
    if len(places) < 2:
        return None
    lines = []
    for region, season in places.itertuples(index=False):
        chosen = rows_where(rows, region=region, season=season)
        if chosen["value"].isna().all():
            continue  # nothing of the region was hidden
        cells = [
            ratio_cell(_mean(rows_where(chosen, baseline=baseline)))
            for baseline in report.baselines
        ]
        name = readable(region) if season == WHOLE_YEAR else f"{readable(region)}, {season}"
        lines.append((name, tuple(cells)))
    return Card("RMSE ratio to", "region", tuple(report.baselines), tuple(lines))


def _mean(rows: Any) -> pd.DataFrame:
    """One row without an interval."""
    return pd.DataFrame({"value": [rows["value"].mean()], "low": [np.nan], "high": [np.nan]})


def _card(rows: Any, column: str, labels: Sequence, title: str) -> Card:
    lines = []
    for (variable, level), part in rows.groupby(["variable", "level"], dropna=False, sort=False):
        cells = tuple(ratio_cell(part[part[column] == label]) for label in labels)
        name = readable(str(variable)) + ("" if np.isnan(level) else f" {level:g} hPa")
        lines.append((name, cells))
    columns = [f"{label:g} h" if column == "lead_hours" else str(label) for label in labels]
    return Card(title, "", tuple(columns), tuple(lines))
