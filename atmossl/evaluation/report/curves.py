"""Scores against lead time, with their confidence intervals."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from atmossl.evaluation.report.figures import plain, readable, score_label


def lead_curves(
    table: pd.DataFrame,
    *,
    variable: str,
    level: float | None = None,
    region: str = "global",
    scores: Sequence[str] = ("rmse", "crps", "acc"),
) -> Figure:
    """One panel per score, one line with a shaded interval per source.

    A task without lead time has one point with a bar per source.

    Raises:
        ValueError: the table has no such rows.
    """
    figure = Figure(figsize=(4.0 * len(scores), 3.4), layout="constrained")
    colours = source_colours(table)
    for axes, score in zip(np.atleast_1d(figure.subplots(1, len(scores))), scores, strict=True):
        rows = select_rows(table, variable=variable, level=level, region=region, score=score)
        for source, part in rows.groupby("source", sort=False):
            _draw_source(axes, part, str(source), colours[str(source)])
        _label(axes, rows, score)
    figure.suptitle(_title(variable, level, region), parse_math=False)
    _legend_below(figure)
    return figure


def spread_skill_curve(
    table: pd.DataFrame, *, variable: str, level: float | None = None, region: str = "global"
) -> Figure:
    """Spread-skill ratio of every ensemble; the dashed line is a reliable one."""
    figure = lead_curves(
        table, variable=variable, level=level, region=region, scores=("spread_skill",)
    )
    for axes in figure.axes:
        axes.axhline(1.0, color="0.4", linestyle="--", linewidth=1.0)
        axes.set_ylim(bottom=0.0)
    return figure


def source_colours(table: pd.DataFrame) -> dict[str, str]:
    """One colour for each source, whatever scores it has."""
    return {str(name): f"C{n % 10}" for n, name in enumerate(table["source"].unique())}


def select_rows(
    table: pd.DataFrame, *, variable: str, level: float | None, region: str, score: str
) -> pd.DataFrame:
    """Rows of one curve panel; level None means a variable without levels.

    Raises:
        ValueError: naming the first key that has no row, with its choices.
    """
    rows = table
    for column, label in (("variable", variable), ("region", region), ("score", score)):
        chosen = rows.loc[rows[column] == label]
        if chosen.empty:
            choices = sorted(rows[column].unique())
            raise ValueError(f"{column} {label!r} is not in the table; choices are {choices}")
        rows = chosen
    chosen = rows.loc[rows["level"].isna() if level is None else rows["level"] == level]
    if chosen.empty:
        choices = sorted(rows["level"].unique())
        raise ValueError(f"level {level} of {variable} is not in the table; choices are {choices}")
    return chosen


def _draw_source(axes: Axes, rows: pd.DataFrame, source: str, colour: str) -> None:
    if np.isnan(rows["value"].to_numpy()).all():
        return  # such as the anomaly correlation of the climatology itself
    if np.isnan(rows["lead_hours"].to_numpy()).all():
        value = rows["value"].to_numpy()
        ends = np.abs(rows[["low", "high"]].to_numpy().T - value)
        style = {"fmt": "o", "capsize": 4, "color": colour}
        axes.errorbar([plain(source)] * len(rows), value, yerr=ends, label=plain(source), **style)
        return
    rows = rows.sort_values("lead_hours")
    hours = rows["lead_hours"].to_numpy()
    values = rows["value"].to_numpy()
    axes.plot(hours, values, marker="o", markersize=4, label=plain(source), color=colour)
    axes.fill_between(
        hours,
        rows["low"].to_numpy(),
        rows["high"].to_numpy(),
        color=colour,
        alpha=0.2,
        linewidth=0.0,
    )


def _label(axes: Axes, rows: pd.DataFrame, score: str) -> None:
    axes.set_ylabel(score_label(score, str(rows["units"].iloc[0])))
    axes.grid(alpha=0.3)
    axes.ticklabel_format(axis="y", scilimits=(-2, 4))
    hours = np.unique(rows["lead_hours"].dropna().to_numpy())
    if hours.size:
        axes.set_xlabel("lead time (h)")
        axes.set_xticks(hours[:: max(1, hours.size // 8)])
    else:
        axes.tick_params(axis="x", rotation=25)


def _title(variable: str, level: float | None, region: str) -> str:
    place = readable(region)
    where = place if level is None else f"{level:g} hPa, {place}"
    return f"{readable(variable)}, {where}"


def _legend_below(figure: Figure) -> None:
    """One legend for all panels, with each source once."""
    entries = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=max(1, min(len(entries), 3 * len(figure.axes))),
        fontsize=8,
        frameon=False,
    )
