"""Means over boxes of cells of one case, of every member and of the truth. Forecasters draw them as
a plume. They are right only if the members are right in several cells together.
"""

from typing import Any

import numpy as np
import xarray as xr

from atmossl.evaluation.joint import AreaMeans
from atmossl.evaluation.report.content import Plume

_WIDEST = 30.0  # degrees of latitude of a box of 8 x 8 cells; of coarser grids boxes have 4 x 4
_LATITUDE, _LONGITUDE = 55.0, 10.0  # the box around this place is drawn, or the nearest one
_LEAD, _BOX = "lead_time", ("latitude", "longitude")


def plume_of(
    prediction: xr.DataArray,
    truth: xr.DataArray,
    hidden: xr.DataArray | None = None,
    box_shift: int = 0,
) -> Plume | None:
    """Box means of one variable and level of a case [lead_time, latitude, longitude], or without
    lead time; of the prediction with `member`.

    With more than one lead time they are those of one box against lead time, else those of all
    boxes of one row against longitude. Boxes have 8 x 8 cells, or 4 x 4 where the former are wide
    or none of them was hidden as a whole. None if no box was, or with one member only. box_shift:
    see `AreaMeans`.
    """
    if prediction.sizes.get("member", 1) < 2:
        return None
    cells = xr.ones_like(truth.isel({_LEAD: -1}, missing_dims="ignore"), dtype=float)
    asked = cells if hidden is None else cells.where(hidden)
    latitude = asked["latitude"]
    spacing = abs(float(latitude[1] - latitude[0])) if len(latitude) > 1 else 180.0
    for size in (8, 4) if 8 * spacing <= _WIDEST else (4,):
        boxes = AreaMeans(size, box_shift)
        if not boxes.fit(asked):
            continue
        is_whole = _means(asked, boxes).notnull()
        if bool(is_whole.any()):
            members, true = (_means(field, boxes).where(is_whole) for field in (prediction, truth))
            return _plume(members, true, is_whole, size)
    return None


def _means(field: xr.DataArray, boxes: AreaMeans) -> xr.DataArray:
    """Box means with the centres and edges of the boxes as coordinates."""
    field = field.transpose(..., *_BOX)
    means = boxes.derive(field)
    coords: dict[str, Any] = {
        str(dim): field[dim] for dim in means.dims if dim not in _BOX and dim in field.coords
    }
    for dim in _BOX:
        values = np.unwrap(field[dim].to_numpy().astype(float), period=360.0)
        half = abs(values[1] - values[0]) / 2.0
        groups = values[boxes.shift :][: means.sizes[dim] * boxes.size].reshape(-1, boxes.size)
        coords[dim] = groups.mean(axis=1)
        coords[f"{dim}_from"] = (dim, groups.min(axis=1) - half)
        coords[f"{dim}_to"] = (dim, groups.max(axis=1) + half)
    return means.assign_coords(coords)


def _plume(members: xr.DataArray, truth: xr.DataArray, is_whole: xr.DataArray, size: int) -> Plume:
    """The plume of the box, or of the row of boxes, that is nearest to the place that is drawn."""
    east = (is_whole["longitude"] - _LONGITUDE + 180.0) % 360.0 - 180.0
    distance = abs(is_whole["latitude"] - _LATITUDE) + abs(east)
    nearest = distance.where(is_whole).argmin(_BOX)
    row = {"latitude": nearest["latitude"]}
    has_leads = members.sizes.get(_LEAD, 1) > 1
    box = nearest if has_leads else row
    members, truth = members.isel(box), truth.isel(box)
    if has_leads:
        positions = (members[_LEAD] / np.timedelta64(1, "h")).to_numpy()
        dim, axis = _LEAD, "lead time (h)"
    else:
        members, truth = (f.squeeze(_LEAD) if _LEAD in f.dims else f for f in (members, truth))
        positions, dim, axis = members["longitude"].to_numpy(), "longitude", "longitude (°E)"
    values = members.transpose(dim, "member").to_numpy()
    place = f"{size} x {size} cells, {_span(members, 'latitude')}"
    place += f", {_span(members, 'longitude')}" if has_leads else ""
    return Plume(place, axis, positions, values, truth.to_numpy())


def _span(box: xr.DataArray, dim: str) -> str:
    """`22 °S to 7 °N` of the edges of a box."""
    low, high = float(box[f"{dim}_from"]), float(box[f"{dim}_to"])
    if dim == "longitude" and low >= 180.0:
        low, high = low - 360.0, high - 360.0
    signs = "SN" if dim == "latitude" else "WE"

    def side(degrees: float) -> str:
        return signs[degrees >= 0.0] if abs(degrees) >= 0.5 else ""

    first, last = side(low), side(high)
    start = f"{abs(low):.0f}" + (f" °{first}" if first and last and first != last else "")
    return f"{start} to {abs(high):.0f} °{last or first}"
