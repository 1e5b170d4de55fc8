"""Small pictures of one variable: scores against lead time, rank histogram, reliability, spectrum,
ratios to baselines, members' means over boxes; and the spread of such means over their error."""

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from atmossl.evaluation.report.content import Plume
from atmossl.evaluation.report.figures import plain, readable, score_label, units_text
from atmossl.evaluation.verify import rows_where

_SIZE = (3.6, 2.9)
_JOINED = 4  # values in a row from which on a plume is drawn as lines
# of members, ensemble mean and truth of a plume
_JOINED_STYLES: tuple[dict[str, Any], ...] = (
    {"linewidth": 0.8},
    {"linewidth": 2.2},
    {"linestyle": "--", "marker": "o", "markersize": 3},
)
_SINGLE_STYLES: tuple[dict[str, Any], ...] = (
    {"linestyle": "", "marker": "_", "markersize": 12, "markeredgewidth": 1.0},
    {"linestyle": "", "marker": "D", "markersize": 6},
    {"linestyle": "", "marker": "o", "markersize": 6, "markerfacecolor": "none"},
)
_REFERENCE = {"color": "0.4", "linestyle": "--", "linewidth": 1.0}


def lead_curve(table: pd.DataFrame, *, variable: str, level: float | None, score: str) -> Figure:
    """A score on the globe against lead time: a line with a shaded interval for every source that
    has it. The dashed line of a spread-skill ratio is that of a reliable ensemble."""
    figure = Figure(figsize=(4.0, 3.4), layout="constrained")
    axes = figure.add_subplot()
    rows = rows_where(table, variable=variable, level=level, region="global", score=score)
    colours = {name: f"C{n % 10}" for n, name in enumerate(table["source"].unique())}
    for source, part in rows.groupby("source", sort=False):
        part = part.sort_values("lead_hours")
        if part["value"].isna().all():
            continue  # such as the anomaly correlation of the climatology itself
        hours, colour = part["lead_hours"], colours[source]
        axes.plot(hours, part["value"], marker="o", markersize=4, label=plain(source), color=colour)
        axes.fill_between(hours, part["low"], part["high"], color=colour, alpha=0.2, linewidth=0.0)
    axes.set_ylabel(score_label(score, str(rows["units"].iloc[0])))
    axes.grid(alpha=0.3)
    axes.ticklabel_format(axis="y", scilimits=(-2, 4))
    hours = np.unique(rows["lead_hours"].dropna())
    axes.set_xlabel("lead time (h)")
    axes.set_xticks(hours[:: max(1, hours.size // 8)])
    if score == "spread_skill":
        axes.axhline(1.0, **_REFERENCE)
        axes.set_ylim(bottom=0.0)
    where = "global" if level is None else f"{level:g} hPa, global"
    figure.suptitle(f"{readable(variable)}, {where}", parse_math=False)
    columns = max(1, min(3, len(axes.get_legend_handles_labels()[0])))
    figure.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return figure


def pick(diagnosed: xr.Dataset, level: float | None) -> xr.Dataset:
    """The globe, one level and the longest lead time of a diagnostic."""
    chosen = diagnosed.isel(region=0)
    if level is not None and "level" in chosen.dims:
        chosen = chosen.sel(level=level)
    return chosen.isel(lead_time=-1) if "lead_time" in chosen.dims else chosen


def rank_panel(diagnosed: xr.Dataset, title: str) -> Figure:
    """Share of truths of each rank, one outline per ensemble; the dashed line is a flat one."""
    figure, axes = _panel(title)
    for source in diagnosed["source"].to_numpy():
        shares = diagnosed["frequency"].sel(source=source).dropna("rank").to_numpy()
        edges = np.arange(len(shares) + 1) / len(shares)
        axes.stairs(
            shares * len(shares), edges, label=plain(str(source)), fill=False, linewidth=1.6
        )
    axes.axhline(1.0, **_REFERENCE)
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("share of members below the truth")
    axes.set_ylabel("frequency over expected")
    return _finished(figure, axes)


def reliability_panel(diagnosed: xr.Dataset, title: str) -> Figure:
    """Observed frequency against forecast probability; larger points were forecast more often."""
    figure, axes = _panel(title)
    axes.plot([0, 1], [0, 1], **_REFERENCE)
    for source in diagnosed["source"].to_numpy():
        curve = diagnosed.sel(source=source)
        forecast, observed = curve["forecast_probability"], curve["observed_frequency"]
        (line,) = axes.plot(forecast, observed, linewidth=1.2, label=plain(str(source)))
        area = 8.0 + 120.0 * np.sqrt(curve["share"].fillna(0.0).to_numpy())
        axes.scatter(forecast, observed, s=area, color=line.get_color(), alpha=0.6, linewidth=0)
    axes.set_xlabel("forecast probability")
    axes.set_ylabel("observed frequency")
    return _finished(figure, axes)


def spectrum_panel(diagnosed: xr.Dataset, title: str, model_name: str, axis: str) -> Figure:
    """Power by wavenumber over that of the truth: 1 is as rough as the truth."""
    figure, axes = _panel(title)
    wave = slice(1, None)  # wavenumber 0 is the mean, not variance
    for source in diagnosed["source"].to_numpy():
        curve = diagnosed.sel(source=source)
        power = curve / curve["truth"]  # the truth of its own cases
        numbers = curve["wavenumber"][wave]
        is_model = source == model_name
        label = f"{source}, members" if is_model else str(source)
        axes.plot(numbers, power["members"][wave], label=plain(label))
        if is_model:
            mean = f"{source}, ensemble mean"
            axes.plot(numbers, power["ensemble_mean"][wave], label=plain(mean))
    axes.axhline(1.0, **_REFERENCE)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-3), top=min(axes.get_ylim()[1], 30.0))
    axes.set_xlabel(axis)
    axes.set_ylabel("power over the truth's")
    return _finished(figure, axes)


def ratio_panel(rows: pd.DataFrame, title: str) -> Figure:
    """Ratios of RMSE with their intervals: a point per baseline, in the order of the rows.

    `rows` has columns baseline, value, low, high of one variable and level.
    """
    figure, axes = _panel(title)
    for number, row in enumerate(rows.to_dict("records")):
        ends = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
        ends = np.nan_to_num(np.array(ends))
        axes.errorbar([row["value"]], [number], xerr=ends, fmt="o", capsize=3, color=f"C{number}")
    axes.axvline(1.0, **_REFERENCE)
    axes.set_yticks(range(len(rows)), [plain(readable(str(name))) for name in rows["baseline"]])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0.0)
    axes.set_xlabel("RMSE ratio to the baseline (below 1 is better)")
    return _finished(figure, axes, legend=False)


def plume_panel(plume: Plume, title: str, units: str) -> Figure:
    """Box means of every member, of their mean and of the truth, against lead time or longitude.

    They are joined by lines where at least `_JOINED` neighbours are there. With fewer, a line would
    show a course that nothing tells; each value is then a marker of its own.
    """
    figure, axes = _panel(title)
    drawn = np.flatnonzero(np.isfinite(plume.truth))
    is_joined = _longest_run(drawn) >= _JOINED
    members, mean, truth = _JOINED_STYLES if is_joined else _SINGLE_STYLES
    lines = axes.plot(plume.positions, plume.members, color="C0", alpha=0.55, **members)
    lines[0].set_label("members")
    average = plume.members.mean(axis=1)
    axes.plot(plume.positions, average, color="C0", label="ensemble mean", **mean)
    axes.plot(plume.positions, plume.truth, color="0.1", label="truth", **truth)
    if len(drawn) < _JOINED:
        axes.set_xticks(plume.positions[drawn], [f"{x:.4g}" for x in plume.positions[drawn]])
        axes.margins(x=0.3)
    axes.ticklabel_format(axis="y", scilimits=(-2, 4), useOffset=False)
    axes.set_xlabel(plume.axis)
    axes.set_ylabel(units_text(units))
    axes.set_title(title, fontsize=9, pad=14, parse_math=False)  # above a power of ten
    return _finished(figure, axes)


def _longest_run(numbers: np.ndarray) -> int:
    """The largest number of consecutive integers among rising ones."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return max(map(len, runs))


def spread_panel(spreads: pd.DataFrame) -> Figure:
    """Spread over error against lead time, a line per quantity; the dashed line is a reliable
    ensemble. `spreads` has columns quantity, lead_hours and value."""
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for quantity, part in spreads.groupby("quantity", sort=False):
        hours, values = part["lead_hours"], part["value"]
        axes.plot(hours, values, marker="o", markersize=3, label=plain(str(quantity)))
    axes.axhline(1.0, **_REFERENCE)
    axes.set_yscale("log")
    drawn = spreads["value"].to_numpy()
    low, high = float(drawn.min()), float(drawn.max())
    axes.set_ylim(min(0.5, low / 1.2), max(2.0, high * 1.2))
    ticks = [tick for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if low / 2 < tick < high * 2]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.set_xlabel("lead time (h)")
    axes.set_ylabel("spread over error")
    return _finished(figure, axes)


def _panel(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.grid(alpha=0.3)
    return figure, axes


def _finished(figure: Figure, axes: Axes, legend: bool = True) -> Figure:
    axes.tick_params(labelsize=8)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(9)
    if legend and axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    return figure
