"""Truth, prediction, error and spread of one case side by side on the globe."""

from dataclasses import dataclass, replace
from pathlib import Path

import cartopy.crs as ccrs
import numpy as np
import xarray as xr
from cartopy.io.shapereader import Reader
from cartopy.mpl.geoaxes import GeoAxes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from atmossl.evaluation.report.figures import readable, units_text
from atmossl.geometry import latitude_edges

_DIVERGING, _SEQUENTIAL, _SPREAD = "RdBu_r", "viridis", "magma_r"
_PERCENTILES = (1.0, 99.0)


@dataclass(frozen=True)
class Scale:
    """Colour map and limits of a panel."""

    colours: str
    low: float
    high: float
    extend: str = "both"


def case_map(
    truth: xr.DataArray,
    prediction: xr.DataArray,
    *,
    projection: ccrs.Projection | None = None,
    coastlines: Path | None = None,
) -> Figure:
    """Four panels of one case: truth, ensemble mean, its error, ensemble spread.

    Truth and prediction share their colours; error is centred on zero. `truth` is [latitude,
    longitude] and `prediction` the same with an optional `member`; both selected by time, lead
    and level, whose scalar coordinates make the title. The spread is left blank for one member.
    `coastlines` is a shapefile of lines; without it the globe has a grid only, because no map
    data come with the program.

    Raises:
        ValueError: the arrays have other dims, or the coastlines file does not exist.
    """
    _require_one_case(truth, prediction)
    if coastlines is not None and not coastlines.exists():
        raise ValueError(f"coastlines: no file {coastlines}")
    has_members = "member" in prediction.dims
    mean = prediction.mean("member") if has_members else prediction
    spread = prediction.std("member", ddof=1) if prediction.sizes.get("member", 1) > 1 else None
    error = mean - truth
    shared = field_scale(truth, mean)
    panels = {
        "truth": (truth, shared),
        "prediction (ensemble mean)" if has_members else "prediction": (mean, shared),
        "error (prediction minus truth)": (error, symmetric_scale(error)),
    }
    if spread is not None:
        panels["ensemble spread"] = (spread, spread_scale(spread))
    figure = Figure(figsize=(11.0, 6.6), layout="constrained")
    for position, (title, (field, scale)) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(2, 2, position, projection=projection or ccrs.Robinson())
        assert isinstance(axes, GeoAxes), type(axes)
        _draw(figure, axes, field, scale, units=str(truth.attrs.get("units", "")))
        axes.set_title(title)
        _draw_reference_lines(axes, coastlines)
    figure.suptitle(case_title(truth, prediction))
    return figure


def field_scale(truth: xr.DataArray, prediction: xr.DataArray) -> Scale:
    """One scale for both; around zero if the field takes both signs about equally."""
    both = np.concatenate([truth.to_numpy().ravel(), prediction.to_numpy().ravel()])
    low, high = np.nanpercentile(both, _PERCENTILES)
    if low < 0 < high and min(-low, high) > 0.2 * max(-low, high):
        limit = max(-low, high)
        return Scale(_DIVERGING, -limit, limit)
    return _widened(_SEQUENTIAL, low, high)


def symmetric_scale(field: xr.DataArray) -> Scale:
    """A scale centred on zero."""
    limit = float(np.nanpercentile(np.abs(field.to_numpy()), _PERCENTILES[1]))
    return _widened(_DIVERGING, -limit, limit)


def spread_scale(spread: xr.DataArray) -> Scale:
    """A scale from zero up."""
    high = float(np.nanpercentile(spread.to_numpy(), _PERCENTILES[1]))
    return replace(_widened(_SPREAD, 0.0, high), extend="max")


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


def _draw(figure: Figure, axes: GeoAxes, field: xr.DataArray, scale: Scale, *, units: str) -> None:
    field = field.transpose("latitude", "longitude")
    longitude = field["longitude"].to_numpy().astype(np.float64)
    spacing = longitude[1] - longitude[0]
    lon_edges = np.append(longitude, longitude[-1] + spacing) - spacing / 2
    lat_edges = latitude_edges(field["latitude"].to_numpy().astype(np.float64))
    cells = axes.pcolormesh(
        lon_edges,
        lat_edges,
        field.to_numpy(),
        transform=ccrs.PlateCarree(),
        cmap=scale.colours,
        vmin=scale.low,
        vmax=scale.high,
    )
    bar = figure.colorbar(
        cells, ax=axes, orientation="horizontal", shrink=0.8, aspect=35, extend=scale.extend
    )
    digits = ScalarFormatter()
    digits.set_powerlimits((-2, 4))  # humidity's many zeros would overlap
    bar.locator, bar.formatter = MaxNLocator(6), digits
    bar.update_ticks()
    bar.set_label(units_text(units))


def _draw_reference_lines(axes: GeoAxes, coastlines: Path | None) -> None:
    axes.set_global()
    axes.gridlines(
        xlocs=np.arange(-180, 181, 60), ylocs=np.arange(-60, 61, 30), color="0.35", linewidth=0.4
    )
    if coastlines is not None:
        axes.add_geometries(
            Reader(str(coastlines)).geometries(),
            crs=ccrs.PlateCarree(),
            facecolor="none",
            edgecolor="black",
            linewidth=0.6,
        )
