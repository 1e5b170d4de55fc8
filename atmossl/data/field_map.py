"""The map of one variable that `atmossl data inspect` draws.

A module of its own, since it alone of the data room needs Cartopy and Matplotlib, which come with
`pip install 'atmossl[report]'`.
"""

from typing import Any

import cartopy.crs as ccrs
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from atmossl.data.axes import Calendar
from atmossl.data.inspect import VariableReport
from atmossl.geometry import ascending_longitudes


def _date(time: np.ndarray) -> str:
    calendar = Calendar.of(time)
    return "" if calendar is None else calendar.show(calendar.encode(time.reshape(1))[0])


def map_of(variable: VariableReport) -> Figure:
    """A map of the first sampled field, longitudes from west to east."""
    order, longitude = ascending_longitudes(variable.picture["longitude"].values)
    field = variable.picture.isel(longitude=order)
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    middle = (longitude[0] + longitude[-1]) / 2  # no cell crosses the edge of the map
    axes: Any = figure.add_subplot(projection=ccrs.PlateCarree(central_longitude=middle))
    shown = axes.pcolormesh(
        longitude,
        field["latitude"].values,
        field.values,
        transform=ccrs.PlateCarree(),
        shading="nearest",
    )
    lines = axes.gridlines(draw_labels=True, linewidth=0.3, color="0.5")
    lines.top_labels = lines.right_labels = False
    level = f", {field['level'].item():g} hPa" if "level" in field.coords else ""
    when = f", {_date(field['time'].values)}" if "time" in field.coords else ""
    axes.set_title(f"{variable.name}{level}{when}", fontsize=10, parse_math=False)
    units = field.attrs.get("units", "")
    figure.colorbar(shown, ax=axes, shrink=0.8, label=units)
    return figure
