"""Coastlines that come with the package: Natural Earth, 1:110 million, public domain
(https://www.naturalearthdata.com), packed by `scripts/make_coastlines.py`."""

from functools import cache
from importlib import resources

import numpy as np

from atmossl.geometry import degrees_east_of


@cache
def coastlines(middle: float = 0.0) -> tuple[np.ndarray, ...]:
    """Coastlines [point, (longitude, latitude)] in degrees. Longitudes are degrees east of the
    middle of a map, from -180 to 180. A line is cut where it leaves the map on one side and
    comes back on the other."""
    source = resources.files("atmossl") / "assets" / "coastlines.npz"
    with source.open("rb") as stream, np.load(stream) as stored:
        degrees, lengths = stored["centidegrees"] / 100.0, stored["lengths"]
    ends = np.cumsum(lengths)[:-1]
    longitude = degrees[:, 0]
    if middle:
        longitude = degrees_east_of(middle, longitude)
        seam = np.flatnonzero(np.abs(np.diff(longitude)) > 180.0) + 1
        ends = np.union1d(ends, seam)
    return tuple(np.split(np.stack([longitude, degrees[:, 1]], axis=-1), ends))
