"""Fields to tokens and exactly back, and the physical coordinates of every token."""

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Shaped
from torch import Tensor

from atmossl.batch import StreamSpec, StreamWindow, TokenGrid, TokenSize

_TOLERANCE_DEG = 1e-2
_PATTERN = (
    "... variable (level pl) (nt pt) (nlat plat) (nlon plon)",
    "... level nt nlat nlon (variable pl pt plat plon)",
)


def _sizes(size: TokenSize) -> dict[str, int]:
    return {"pl": size.level, "pt": size.time, "plat": size.lat, "plon": size.lon}


def tokenise(
    window: Shaped[Tensor, "*batch variable level time lat lon"], size: TokenSize
) -> Shaped[Tensor, "*batch nlevel nt nlat nlon patch"]:
    """Cut a window into tokens; the inverse of `detokenise`."""
    return rearrange(window, " -> ".join(_PATTERN), **_sizes(size))


def detokenise(
    tokens: Shaped[Tensor, "*batch nlevel nt nlat nlon patch"], spec: StreamSpec
) -> Shaped[Tensor, "*batch variable level time lat lon"]:
    """Put tokens back into a window; the inverse of `tokenise`."""
    pattern = " -> ".join(reversed(_PATTERN))
    return rearrange(tokens, pattern, variable=len(spec.variables), **_sizes(spec.token_size))


def token_grid(window: StreamWindow) -> TokenGrid:
    """Coordinates of the token centres and what a token spans.

    Longitudes are unwrapped along the window, so that a window across the date line or the
    meridian of Greenwich has centres between its own points.
    """
    size = window.spec.token_size
    start = window.lon[..., :1]
    lon = start + (window.lon - start) % 360.0
    spacing = _spacing(lon)
    turn = float(spacing.flatten()[0]) * lon.shape[-1]
    return TokenGrid(
        time_hours=_centres(window.time_hours, size.time),
        level_hpa=_centres(window.level_hpa, size.level),
        lat=_centres(window.lat, size.lat),
        lon=_centres(lon, size.lon) % 360.0,
        time_extent=_spacing(window.time_hours) * size.time,
        lat_extent=_spacing(window.lat) * size.lat,
        lon_extent=spacing * size.lon,
        periodic=abs(turn - 360.0) < _TOLERANCE_DEG,
        year_hours=window.year_hours,
    )


def _centres(values: Float[Tensor, "*batch point"], size: int) -> Float[Tensor, "*batch token"]:
    return reduce(values, "... (token size) -> ... token", "mean", size=size)


def _spacing(values: Float[Tensor, "*batch point"]) -> Float[Tensor, "*batch"]:
    """Mean distance between neighbours; 1 where there is a single point."""
    count = values.shape[-1]
    if count == 1:
        return torch.ones_like(values[..., 0])
    return (values[..., -1] - values[..., 0]) / (count - 1)


def patch_weights(
    weight: Float[Tensor, "*batch lat"], spec: StreamSpec
) -> Float[Tensor, "*batch nlat patch"]:
    """Area weight of every value of a token, by the token's row of latitudes."""
    size = spec.token_size
    rows = rearrange(weight, "... (nlat plat) -> ... nlat plat", plat=size.lat)
    repeats = len(spec.variables) * size.level * size.time
    expanded = rows[..., None, :, None].expand(*rows.shape[:-1], repeats, size.lat, size.lon)
    return rearrange(expanded, "... nlat r plat plon -> ... nlat (r plat plon)")


def patch_values(
    values: Float[Tensor, "variable level"], spec: StreamSpec
) -> Float[Tensor, "nlevel patch"]:
    """Spread one value per variable and level over the tokens' patches, by token level."""
    size = spec.token_size
    shape = (*values.shape, size.time, size.lat, size.lon)
    tokens = tokenise(values[..., None, None, None].expand(shape), size)
    return tokens[:, 0, 0, 0]
