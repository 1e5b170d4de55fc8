"""Score cards: ratios of a model's error to each baseline's, as a coloured table."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd

from atmossl.evaluation.report.content import TaskReport
from atmossl.evaluation.report.figures import readable
from atmossl.evaluation.verify import (
    CRPS_RATIO_PREFIX,
    RATIO_PREFIX,
    WHOLE_YEAR,
    rows_of_prefix,
    rows_where,
)

_MAX_COLUMNS = 10
_LEAST_LIMIT = np.log(1.25)
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


@dataclass(frozen=True)
class RatioColours:
    """Colours of ratios: blue below 1, red above, full at the ratio that is furthest from 1.

    They grow with the root of the logarithm's size, so that ratios near 1 can be told from it where
    others are far from it.

    Attributes:
        limit: logarithm of the ratio of full colour.
    """

    limit: float

    @classmethod
    def of(cls, ratios: Iterable[float]) -> Self:
        """Colours that reach as far as the ratios do."""
        sizes = [abs(math.log(ratio)) for ratio in ratios if ratio > 0 and math.isfinite(ratio)]
        return cls(max([_LEAST_LIMIT, *sizes]))

    def strength(self, ratio: float) -> float:
        """From 0, white, to 1, full colour."""
        return min(1.0, abs(math.log(max(ratio, 1e-9))) / self.limit) ** 0.5

    def cell(self, rows: Any) -> Cell:
        """The cell of one row of the table; several rows are averaged and lose their interval."""
        if rows.empty or rows["value"].isna().all():
            return Cell("", "", "transparent", False, False)
        value = float(rows["value"].mean())
        ends = (float(rows[end].iloc[0]) if len(rows) == 1 else np.nan for end in ("low", "high"))
        low, high = ends
        title = f"{value:.4f}"
        if np.isfinite(low):
            title += f", 95 % interval {low:.4f} to {high:.4f}, p = {rows['p_value'].iloc[0]:.3f}"
        return self._coloured(value, f"{value:.2f}", title, is_open=bool(low <= 1.0 <= high))

    def legend(self) -> tuple[Cell, ...]:
        """Some ratios from the best to the worst that the colours reach, as cells."""
        shares = (-1.0, -0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5, 1.0)
        ratios = [math.exp(share * self.limit) for share in shares]
        return tuple(self._coloured(ratio, f"{ratio:.2f}", f"{ratio:.4f}") for ratio in ratios)

    def _coloured(self, ratio: float, text: str, title: str, *, is_open: bool = False) -> Cell:
        strength, base = self.strength(ratio), _BETTER if ratio < 1.0 else _WORSE
        mixed = ",".join(str(round(255 + strength * (channel - 255))) for channel in base)
        return Cell(text, title, f"rgb({mixed})", strength > 0.6, is_open)


def colours_of(reports: Sequence[TaskReport]) -> RatioColours:
    """One set of colours for all cards of a page, which reach as far as these."""
    ratios: list[float] = []
    for report in reports:
        rmse, crps = (rows_of_prefix(report.table, p) for p in (RATIO_PREFIX, CRPS_RATIO_PREFIX))
        means = rmse.groupby(["region", "season", "baseline"])["value"].mean()
        whole = (rows_where(part, region="global", season=WHOLE_YEAR) for part in (rmse, crps))
        ratios += [*means, *(float(value) for part in whole for value in part["value"])]
    return RatioColours.of(ratios)


def score_cards(report: TaskReport, colours: RatioColours) -> list[Card]:
    """Ratios of RMSE and CRPS to each baseline's by variable, level and lead time.

    With lead times there is a card per baseline, else one card with a column per baseline.
    """
    cards = []
    for prefix, name in ((RATIO_PREFIX, "RMSE"), (CRPS_RATIO_PREFIX, "CRPS")):
        rows = rows_of_prefix(report.table, prefix)
        rows = rows_where(rows, region="global", season=WHOLE_YEAR)
        if rows.empty:
            continue
        if rows["lead_hours"].isna().all():
            cards.append(
                _card(rows, "baseline", report.baselines, f"{name} ratio to baseline", colours)
            )
            continue
        hours = np.unique(rows["lead_hours"].dropna())
        hours = hours[:: max(1, -(-len(hours) // _MAX_COLUMNS))]
        for baseline in report.baselines:
            chosen = rows_where(rows, baseline=baseline)
            title = f"{name} ratio to baseline {baseline}"
            cards.append(_card(chosen, "lead_hours", list(hours), title, colours))
    return cards


def region_card(report: TaskReport, colours: RatioColours) -> Card | None:
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
            colours.cell(_mean(rows_where(chosen, baseline=baseline)))
            for baseline in report.baselines
        ]
        name = readable(region) if season == WHOLE_YEAR else f"{readable(region)}, {season}"
        lines.append((name, tuple(cells)))
    return Card("RMSE ratio to baseline", "region", tuple(report.baselines), tuple(lines))


def _mean(rows: Any) -> pd.DataFrame:
    """One row without an interval."""
    return pd.DataFrame({"value": [rows["value"].mean()], "low": [np.nan], "high": [np.nan]})


def _card(rows: Any, column: str, labels: Sequence, title: str, colours: RatioColours) -> Card:
    lines = []
    for (variable, level), part in rows.groupby(["variable", "level"], dropna=False, sort=False):
        cells = tuple(colours.cell(part[part[column] == label]) for label in labels)
        name = readable(str(variable)) + ("" if np.isnan(level) else f" {level:g} hPa")
        lines.append((name, cells))
    columns = [f"{label:g} h" if column == "lead_hours" else str(label) for label in labels]
    return Card(title, "", tuple(columns), tuple(lines))
