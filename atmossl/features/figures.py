"""Figures of features, for the page and for notebooks."""

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from atmossl.evaluation.report.figures import plain, readable, units_text
from atmossl.evaluation.report.globe import Scale, draw_globe
from atmossl.evaluation.report.maps import Panel, panel_map
from atmossl.features.filters import Filters

_DIRECTIONS = {"km": "along the great circle", "h": "in time", "hPa": "in pressure"}


def attention_distance(attended: Mapping[tuple[str, str], xr.Dataset], unit: str) -> Figure:
    """Mean distance in one of `AXES` to what every head attends, by layer: a dot for each head, a
    dash where it would be if all tokens that the head may see were attended alike. Means over
    places by area."""
    figure = Figure(figsize=(4.4, 3.3), layout="constrained")
    axes = figure.add_subplot()
    for number, ((stream, other), dataset) in enumerate(attended.items()):
        means = means_over_places(dataset).sel(unit=unit)
        label = f"{stream} sees " + ("itself" if stream == other else other)
        _dots(axes, means, f"C{number % 10}", plain(readable(label)))
    axes.set_title(f"distance of attention {_DIRECTIONS[unit]}", fontsize=10)
    axes.set_ylabel(f"mean distance ({unit})", fontsize=9)
    axes.set_xlabel("encoder layer", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylim(0.0, 1.1 * axes.get_ylim()[1])
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)
    if len(attended) > 1:
        axes.legend(fontsize=7, frameon=False)
    return figure


def means_over_places(dataset: xr.Dataset) -> xr.Dataset:
    """Distances of attention, averaged over places by their area."""
    weight = np.cos(np.deg2rad(dataset["place_latitude"].to_numpy())).clip(1e-6)
    means = dataset[["distance", "uniform_distance"]].weighted(xr.DataArray(weight, dims="place"))
    return means.mean("place")


def _dots(axes: Axes, means: xr.Dataset, colour: str, label: str) -> None:
    heads = means.sizes["head"]
    apart = 0.24 * (np.arange(heads) - (heads - 1) / 2) / max(1, heads - 1)
    place = means["layer"].to_numpy()[:, None] + apart
    distance, uniform = (means[name].to_numpy() for name in ("distance", "uniform_distance"))
    style = {"color": colour, "alpha": 0.8}
    axes.scatter(place.ravel(), distance.ravel(), s=24, label=label, linewidths=0, **style)
    axes.scatter(place.ravel(), uniform.ravel(), s=110, marker="_", **style)
    low, high = means["layer"].min() - 0.5, means["layer"].max() + 0.5
    left, right = axes.get_xlim()
    axes.set_xlim(min(float(low), left), max(float(high), right))


def attention_map(dataset: xr.Dataset, layer: int, head: int, place: int) -> Figure:
    """Where one head looks from one place, which the title names: share of its attention by token
    in per cent, at all levels and times together."""
    chosen = dataset.sel(layer=layer).isel(head=head, place=place)
    share = 100.0 * chosen["by_place"]
    high = max(float(share.max()), 1e-9)
    where = f"{float(chosen['place_latitude']):.0f} N, {float(chosen['place_longitude']):.0f} E"
    title = f"layer {layer}, head {head + 1}, from {where}"
    return panel_map(Panel(title, share, Scale("viridis", 0.0, high), "%"))


def lag_map(dataset: xr.Dataset, layer: int, head: int) -> Figure:
    """How far back in time one head looks on average, at every place of a grid of places."""
    chosen = dataset.sel(layer=layer).isel(head=head)
    latitude, longitude = (chosen[f"place_{n}"].to_numpy() for n in ("latitude", "longitude"))
    columns = int((latitude == latitude[0]).sum())
    hours = chosen["distance"].sel(unit="h").to_numpy().reshape(-1, columns)
    high = float(np.ptp(dataset["offset"].to_numpy())) or 1.0
    title = f"layer {layer}, head {head + 1}, mean lag"
    field = _field(hours, latitude[::columns], longitude[:columns])
    return panel_map(Panel(title, field, Scale("viridis", 0.0, high), "h"))


def cosine_map(
    cosine: Float[np.ndarray, "token"],
    latitude: Float[np.ndarray, "row"],
    longitude: Float[np.ndarray, "column"],
    title: str,
) -> Figure:
    """Cosine of one token's latents and all others'."""
    field = _field(cosine.reshape(len(latitude), len(longitude)), latitude, longitude)
    return panel_map(Panel(title, field, Scale("RdBu_r", -1.0, 1.0), "cosine"))


def colour_map(
    colours: Float[np.ndarray, "token rgb"],
    latitude: Float[np.ndarray, "row"],
    longitude: Float[np.ndarray, "column"],
    title: str,
) -> Figure:
    """Tokens in the colours of their principal components on the globe."""
    figure = Figure(figsize=(3.6, 1.95))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.88))
    numbers = np.arange(float(len(colours))).reshape(len(latitude), len(longitude))
    field = _field(numbers, latitude, longitude)
    cells = draw_globe(axes, field, Scale("gray", 0.0, float(len(colours))))
    drawn = colours[np.asarray(cells.get_array()).astype(int)]
    cells.set_array(drawn)  # the cells are of these tokens, some of them on both sides of the map
    axes.set_title(title, fontsize=9, parse_math=False)
    return figure


def plane(
    points: Float[np.ndarray, "date 2"], values: np.ndarray, shown: int, method: str, by: str
) -> Figure:
    """All dates in two dimensions, coloured by names of runs, dates, or degrees. shown: the date
    that is ringed. by: what the colours are."""
    figure = Figure(figsize=(4.4, 3.7), layout="constrained")
    axes = figure.add_subplot()
    _scatter(axes, points, values)
    axes.plot(*points[shown], "o", markersize=11, markerfacecolor="none", color="k")
    axes.set_title(f"days by {by}", fontsize=10)
    axes.set_xlabel(f"first direction of {method}", fontsize=8)
    axes.set_ylabel("second direction", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    return figure


def _scatter(axes: Axes, points: np.ndarray, values: np.ndarray) -> None:
    style = {"s": 20, "alpha": 0.8, "linewidths": 0}
    if values.dtype.kind in "UO":
        for number, run in enumerate(dict.fromkeys(values)):
            x, y = points[values == run].T
            axes.scatter(x, y, color=f"C{number % 10}", label=plain(run), **style)
        axes.legend(fontsize=6, frameon=False)
        return
    is_date = values.dtype.kind == "M"
    numbers = date2num(values) if is_date else values
    drawn = axes.scatter(*points.T, c=numbers, cmap="viridis", **style)
    assert axes.figure is not None
    bar = axes.figure.colorbar(drawn, ax=axes, pad=0.02)
    if is_date:
        dates = AutoDateLocator(maxticks=6)
        bar.ax.yaxis.set_major_locator(dates)
        bar.ax.yaxis.set_major_formatter(ConciseDateFormatter(dates))
    else:
        bar.set_label("degrees north", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def filter_picture(filters: Filters, number: int, levels: Sequence[str], hours: float) -> Figure:
    """One pattern that the first layer reads: a row for each variable with its units, panels by
    level and time step, north up. levels: their names. hours: of one time step."""
    pattern = filters.patterns[number]
    num_variables, num_levels, num_steps, num_lat, num_lon = pattern.shape
    figure = Figure(figsize=(min(9.0, 2.6 + 0.42 * num_levels * num_steps),
                             0.75 + 0.62 * num_variables), layout="constrained")  # fmt: skip
    rows = figure.subplots(num_variables, 1, squeeze=False)[:, 0]
    centres = np.arange(num_levels * num_steps) * (num_lon + 1) + (num_lon - 1) / 2
    for axes, values, name, units in zip(
        rows, pattern, filters.variables, filters.units, strict=True
    ):
        panels = values.reshape(-1, num_lat, num_lon)
        gaps = np.pad(panels, ((0, 0), (0, 0), (0, 1)), constant_values=np.nan)
        joined = np.moveaxis(gaps, 0, 1).reshape(num_lat, -1)[:, :-1]
        limit = float(np.abs(values).max()) or 1.0
        image = axes.imshow(joined, origin="lower", cmap="RdBu_r", vmin=-limit, vmax=limit)
        bar = figure.colorbar(image, ax=axes, aspect=6, pad=0.01, ticks=[-limit, limit])
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.set_yticklabels([f"{-limit:.3g}", f"{limit:.3g}"], fontsize=6)
        shown = "" if units == "1" else f"\n{units_text(units)}"
        axes.set_ylabel(readable(name).replace(" component of ", " ") + shown, fontsize=7,
                        rotation=0, ha="right", va="center")  # fmt: skip
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_frame_on(False)
    times = [f"{hours * step:+g}" if step else "0" for step in filters.steps]
    rows[-1].set_xticks(centres, times * num_levels, fontsize=6)
    if num_levels > 1:
        middles = centres.reshape(num_levels, -1).mean(axis=1)
        top = rows[0].secondary_xaxis("top")
        top.set_xticks(middles, levels, fontsize=7)
        top.tick_params(length=0)
        top.spines["top"].set_visible(False)
    rows[-1].set_xlabel("hours from the token's first time step", fontsize=7)
    return figure


def _field(values: np.ndarray, latitude: np.ndarray, longitude: np.ndarray) -> xr.DataArray:
    coords = {"latitude": latitude, "longitude": longitude}
    return xr.DataArray(values, coords, ("latitude", "longitude"))
