"""Truth, prediction, error and spread of one case side by side on the globe."""

from dataclasses import replace

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from atmossl.evaluation.report.figures import readable, units_text
from atmossl.evaluation.report.globe import Scale, draw_globe

_DIVERGING, _SEQUENTIAL, _SPREAD = "RdBu_r", "viridis", "magma_r"
_PERCENTILES = (1.0, 99.0)

Panel = tuple[xr.DataArray, Scale]


def case_panels(
    truth: xr.DataArray,
    prediction: xr.DataArray,
    *,
    num_members: int = 0,
    hidden: xr.DataArray | None = None,
) -> dict[str, Panel]:
    """Fields and colours of one case by title: truth, (ensemble mean of the) prediction, its
    error, the spread of more than one member, and the first members.

    `truth` is [latitude, longitude] and `prediction` the same with an optional `member`; both
    selected by time, lead and level. Error and spread are left blank where nothing was `hidden`.

    Raises:
        ValueError: the arrays have other dims.
    """
    _require_one_case(truth, prediction)
    if hidden is None:
        hidden = xr.ones_like(truth, dtype=bool)
    has_members = "member" in prediction.dims
    mean = prediction.mean("member") if has_members else prediction
    error = (mean - truth).where(hidden)
    shared = field_scale(truth, mean)
    panels = {
        "truth": (truth, shared),
        "prediction (ensemble mean)" if has_members else "prediction": (mean, shared),
        "error (prediction minus truth)": (error, symmetric_scale(error)),
    }
    if prediction.sizes.get("member", 1) > 1:
        spread = prediction.std("member", ddof=1).where(hidden)
        panels["ensemble spread"] = (spread, spread_scale(spread))
        for number in range(min(num_members, prediction.sizes["member"])):
            panels[f"member {number + 1}"] = (prediction.isel(member=number), shared)
    return panels


def case_map(
    truth: xr.DataArray, prediction: xr.DataArray, hidden: xr.DataArray | None = None
) -> Figure:
    """Four panels of one case: truth, ensemble mean, its error, ensemble spread.

    Truth and prediction share their colours; error is centred on zero. Scalar coordinates make
    the title. The spread is left out for one member.

    Raises:
        ValueError: the arrays have other dims.
    """
    figure = Figure(figsize=(10.0, 6.4))
    units = str(truth.attrs.get("units", ""))
    panels = case_panels(truth, prediction, hidden=hidden)
    for number, (title, panel) in enumerate(panels.items()):
        west, bottom = 0.02 + 0.5 * (number % 2), 0.5 - 0.475 * (number // 2)
        axes = figure.add_axes((west, bottom + 0.065, 0.46, 0.355))
        bar = figure.add_axes((west + 0.06, bottom + 0.05, 0.34, 0.016))
        _draw(figure, axes, bar, panel, units=units)
        axes.set_title(title, fontsize=11, parse_math=False)
    figure.suptitle(case_title(truth, prediction), y=0.985, fontsize=12, parse_math=False)
    return figure


def panel_map(title: str, panel: Panel, *, units: str) -> Figure:
    """One panel alone, for pages that lay panels out themselves."""
    figure = Figure(figsize=(3.6, 2.35))
    axes, bar = figure.add_axes((0.01, 0.19, 0.98, 0.7)), figure.add_axes((0.1, 0.165, 0.8, 0.03))
    _draw(figure, axes, bar, panel, units=units)
    axes.set_title(title, fontsize=9, parse_math=False)
    return figure


def field_scale(truth: xr.DataArray, prediction: xr.DataArray) -> Scale:
    """One scale for both; around zero if the field takes both signs about equally."""
    both = np.concatenate([truth.to_numpy().ravel(), prediction.to_numpy().ravel()])
    low, high = _percentiles(both)
    if low < 0 < high and min(-low, high) > 0.2 * max(-low, high):
        limit = max(-low, high)
        return Scale(_DIVERGING, -limit, limit)
    return _widened(_SEQUENTIAL, low, high)


def symmetric_scale(field: xr.DataArray) -> Scale:
    """A scale centred on zero."""
    limit = _percentiles(np.abs(field.to_numpy()))[1]
    return _widened(_DIVERGING, -limit, limit)


def spread_scale(spread: xr.DataArray) -> Scale:
    """A scale from zero up."""
    high = _percentiles(spread.to_numpy())[1]
    return replace(_widened(_SPREAD, 0.0, high), extend="max")


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    """Low and high one of what is there; a variable may be missing wherever a task hid it."""
    there = values[np.isfinite(values)]
    if there.size == 0:
        return 0.0, 0.0
    low, high = np.percentile(there, _PERCENTILES)
    return float(low), float(high)


def _widened(colours: str, low: float, high: float) -> Scale:
    """A constant field would give a scale without width."""
    return Scale(colours, low, high if high > low else low + 1.0)


def case_title(truth: xr.DataArray, prediction: xr.DataArray) -> str:
    """Variable, level, and init, lead and valid time as far as the case has them."""
    parts = [readable(str(prediction.name or truth.name))]
    labels = {**truth.coords, **prediction.coords}
    if "level" in labels:
        parts.append(f"{float(labels['level']):g} hPa")
    if "init_time" in labels and "lead_time" in labels:
        init, lead = labels["init_time"].to_numpy(), labels["lead_time"].to_numpy()
        parts += [f"init {_minute(init)}", f"lead {lead / np.timedelta64(1, 'h'):g} h"]
        parts.append(f"valid {_minute(init + lead)}")
    elif "time" in labels:
        parts.append(f"valid {_minute(labels['time'].to_numpy())}")
    return ", ".join(parts)


def _minute(time: np.ndarray) -> str:
    return str(np.datetime_as_string(time, unit="m")).replace("T", " ") + " UTC"


def _require_one_case(truth: xr.DataArray, prediction: xr.DataArray) -> None:
    cell = {"latitude", "longitude"}
    if set(truth.dims) != cell or set(prediction.dims) - {"member"} != cell:
        raise ValueError(
            "a map shows one case with dims latitude, longitude (and member): select time, lead "
            f"and level first; got truth {truth.dims}, prediction {prediction.dims}"
        )


def _draw(figure: Figure, axes: Axes, bar_axes: Axes, panel: Panel, *, units: str) -> None:
    field, scale = panel
    cells = draw_globe(axes, field, scale)
    bar = figure.colorbar(cells, cax=bar_axes, orientation="horizontal", extend=scale.extend)
    digits = ScalarFormatter()
    digits.set_powerlimits((-2, 4))  # humidity's many zeros would overlap
    bar.locator, bar.formatter = MaxNLocator(6), digits
    bar.update_ticks()
    bar.ax.tick_params(labelsize=8)
    bar.ax.xaxis.get_offset_text().set_fontsize(8)
    bar.set_label(units_text(units), fontsize=8)
