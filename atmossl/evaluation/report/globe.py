"""Fields on a Robinson projection with coastlines that come with the package.

Everything is projected once, as arrays of points, and drawn by plain matplotlib: much faster than
letting a map axes cut every cell.
"""

from dataclasses import dataclass
from functools import cache

import cartopy.crs as ccrs
import numpy as np
import xarray as xr
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import FuncNorm, Normalize
from matplotlib.patches import Polygon

from atmossl.coastlines import coastlines
from atmossl.geometry import ascending_longitudes, closes_circle, degrees_east_of, latitude_edges

_EDGE = 179.999  # a longitude of 180 could end up on either side
_ROWS = 96
_MISSING = "0.82"
_PROJECTION = ccrs.Robinson()


@dataclass(frozen=True)
class Scale:
    """Colour map and limits of a panel.

    rooted: colours grow with the square root of the distance from zero instead of the distance, so
        that fields share a scale though one of them is far smaller than the other.
    """

    colours: str
    low: float
    high: float
    rooted: bool = False

    def norm(self) -> Normalize:
        """How values become colours."""
        if not self.rooted:
            return Normalize(self.low, self.high)
        return FuncNorm((_signed_root, _signed_square), self.low, self.high)


def _signed_root(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.sqrt(np.abs(values))


def _signed_square(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.square(values)


def project(longitude: np.ndarray, latitude: np.ndarray) -> Float[np.ndarray, "*point xy"]:
    """Robinson coordinates in metres of degrees east (-180..180) and north."""
    points = _PROJECTION.transform_points(
        ccrs.PlateCarree(), np.clip(longitude, -_EDGE, _EDGE), latitude
    )
    return points[..., :2]


def draw_globe(axes: Axes, field: xr.DataArray, scale: Scale) -> QuadMesh:
    """Draw [latitude, longitude] as coloured cells, missing ones in grey, with graticule and
    coastlines."""
    order, longitude = ascending_longitudes(field["longitude"].to_numpy().astype(np.float64))
    field = field.transpose("latitude", "longitude").isel(longitude=order)
    lon_edges, values = _seam_at_date_line(longitude, field.to_numpy())
    # a region across the date line gets a map of its own middle, on which it lies in one piece
    middle = 0.0 if lon_edges[-1] <= 180.0 + 1e-6 else float(lon_edges[[0, -1]].mean())
    lon_edges = lon_edges - middle
    lat_edges = latitude_edges(field["latitude"].to_numpy().astype(np.float64))
    finer = -(-_ROWS // len(values))  # meridians are curved: short cells follow them
    rows = np.interp(
        np.arange(finer * len(values) + 1) / finer, np.arange(len(lat_edges)), lat_edges
    )
    corners = project(*np.meshgrid(lon_edges, rows))
    mesh = axes.pcolormesh(
        corners[..., 0],
        corners[..., 1],
        np.repeat(values, finer, axis=0),
        cmap=colormaps[scale.colours].with_extremes(bad=_MISSING),
        norm=scale.norm(),
        rasterized=True,
    )
    outline = _outline()
    for lines, colour, width in (
        (_graticule(middle), "0.35", 0.3),
        (_coastlines(middle), "0.1", 0.5),
    ):
        drawn = LineCollection(list(lines), colors=colour, linewidths=width)
        axes.add_collection(drawn, autolim=False)
    if lon_edges[-1] - lon_edges[0] > 359.0:
        frame = Polygon(outline, closed=True, fill=False, edgecolor="0.3", linewidth=0.7)
        axes.add_patch(frame)
        mesh.set_clip_path(frame)
        limits = outline
    else:
        limits = corners.reshape(-1, 2)
    (west, south), (east, north) = limits.min(axis=0), limits.max(axis=0)
    margin_x, margin_y = 0.0025 * (east - west), 0.0025 * (north - south)
    axes.set_xlim(west - margin_x, east + margin_x)
    axes.set_ylim(south - margin_y, north + margin_y)
    axes.set_aspect("equal")
    axes.set_axis_off()
    return mesh


def _seam_at_date_line(longitude: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges from -180 to 180 and the cells between them; a cell across the seam is on both sides.

    Longitudes of a region keep their order, moved so that its west end lies in -180..180.
    """
    spacing = (longitude[-1] - longitude[0]) / (len(longitude) - 1)
    west = longitude[0] - spacing / 2
    if not closes_circle(longitude):
        west = degrees_east_of(0.0, west)
        return west + spacing * np.arange(len(longitude) + 1), values
    first = int(np.ceil((180.0 + west) / spacing - 1e-6)) % len(longitude)
    edges = degrees_east_of(0.0, west - first * spacing + 360.0)
    edges = edges + spacing * np.arange(len(longitude) + 1)
    rolled = np.roll(values, first, axis=1)
    if edges[0] < -180.0 + 1e-6 or edges[0] > -180.0 + spacing - 1e-6:
        return np.linspace(-180.0, 180.0, len(longitude) + 1), rolled
    inner = edges[edges < 180.0]
    count = len(inner)
    split = np.concatenate([rolled[:, -1:], rolled[:, : count - 1], rolled[:, -1:]], axis=1)
    return np.concatenate([[-180.0], inner, [180.0]]), split


@cache
def _outline() -> np.ndarray:
    side = np.linspace(-90.0, 90.0, 181)
    longitude = np.concatenate([np.full(181, 180.0), np.full(181, -180.0)])
    return project(longitude, np.concatenate([side, side[::-1]]))


@cache
def _graticule(middle: float) -> tuple[np.ndarray, ...]:
    along = np.linspace(-90.0, 90.0, 91)
    degrees = [degrees_east_of(middle, float(lon)) for lon in range(-180, 180, 60)]
    meridians = [project(np.full(91, lon), along) for lon in degrees if abs(lon) < _EDGE]
    parallels = [project(2 * along, np.full(91, float(lat))) for lat in range(-60, 61, 30)]
    return (*meridians, *parallels)


@cache
def _coastlines(middle: float) -> tuple[np.ndarray, ...]:
    lines = coastlines(middle)
    points = np.concatenate(lines)
    ends = np.cumsum([len(line) for line in lines])[:-1]
    return tuple(np.split(project(points[:, 0], points[:, 1]), ends))
