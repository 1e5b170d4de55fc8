"""Positions from physical coordinates: absolute features, and rotary phases for attention."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from atmossl.batch import TokenGrid

HOURS_PER_DAY = 24.0
_WAVENUMBERS = (1, 2, 3, 4, 6, 8)
NUM_FEATURES = 4 * len(_WAVENUMBERS) + 2 + 4 + 3 + 3
Coordinate = Literal["latitude", "longitude", "date", "hour"]
COORDINATES: tuple[Coordinate, ...] = get_args(Coordinate)


def told_features(told: Sequence[Coordinate]) -> Float[Tensor, "feature"]:
    """1 for every one of the `absolute_features` that may be told, 0 for others: functions of
    latitude, longitude, the time of the year (`date`) and local solar time (`hour`) are told where
    they are named, level and extents always."""
    waves = ["longitude"] * len(_WAVENUMBERS) + ["latitude"] * len(_WAVENUMBERS)
    always = [None] * 3
    owners = [*waves, *waves, "date", "hour", "date", "hour", *always, *["latitude"] * 2, *always]
    assert len(owners) == NUM_FEATURES, f"{len(owners)} owners of {NUM_FEATURES} features"
    return torch.tensor([float(owner is None or owner in told) for owner in owners])


def token_coordinates(grid: TokenGrid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coordinates of all tokens, each [batch token]: hours, hPa, degrees, degrees."""
    num_level, num_time, num_lat, num_lon = grid.shape
    sizes = {"level": num_level, "nt": num_time, "nlat": num_lat, "nlon": num_lon}

    def spread(values: Tensor, axis: str) -> Tensor:
        others = {name: size for name, size in sizes.items() if name != axis}
        return repeat(values, f"batch {axis} -> batch (level nt nlat nlon)", **others)

    return (
        spread(grid.time_hours, "nt"),
        spread(grid.level_hpa, "level"),
        spread(grid.lat, "nlat"),
        spread(grid.lon, "nlon"),
    )


def absolute_features(grid: TokenGrid) -> Float[Tensor, "batch token feature"]:
    """Where and when a token is, as bounded features.

    Sine and cosine of multiples of longitude and latitude, of the day of year and of the local
    solar time; functions of pressure; logarithms of the token's extent in hours and degrees.
    """
    hours, level, lat, lon = token_coordinates(grid)
    lon_rad, lat_rad = torch.deg2rad(lon), torch.deg2rad(lat)
    year = 2 * math.pi * (hours % grid.year_hours) / grid.year_hours
    solar = 2 * math.pi * (hours % HOURS_PER_DAY) / HOURS_PER_DAY + lon_rad
    # by numbers, not by a tensor of them, whose way to a device would be waited for
    angles = torch.stack([x * n for x in (lon_rad, lat_rad) for n in _WAVENUMBERS], dim=-1)
    zonal_scale = torch.cos(lat_rad)
    cyclic = torch.stack([year, solar], dim=-1)
    height = torch.log(level.clamp_min(1.0) / 500.0)
    extents = torch.stack(
        [torch.log(x / 6.0) for x in (grid.time_extent, grid.lat_extent, grid.lon_extent)], dim=-1
    )
    parts = [
        angles.sin(),
        angles.cos(),
        cyclic.sin(),
        cyclic.cos(),
        torch.stack([height, height**2, (level > 0).to(height)], dim=-1),
        torch.stack([zonal_scale, zonal_scale**2], dim=-1),
        repeat(extents, "batch feature -> batch token feature", token=lon.shape[-1]),
    ]
    return torch.cat([part.float() for part in parts], dim=-1)


class RotaryPositions(nn.Module):
    """Rotary phases (Su et al. 2021) of longitude, latitude, time and pressure.

    Longitude turns by integer wavenumbers, so that attention sees the circle as closed; the other
    coordinates turn by geometric frequencies. Scores then depend on differences of coordinates
    alone, whatever the shape, place or resolution of the window.
    """

    lon_waves: Tensor
    lat_waves: Tensor
    time_waves: Tensor
    level_waves: Tensor

    def __init__(self, *, head_dim: int, max_wavenumber: int = 32) -> None:
        super().__init__()
        pairs = head_dim // 2
        num_level = max(1, pairs // 8)
        num_time = max(1, pairs // 4)
        num_lat = (pairs - num_level - num_time) // 2
        num_lon = pairs - num_level - num_time - num_lat
        if head_dim % 2 or num_lat < 1:
            raise ValueError(
                f"model.dim / model.num_heads = {head_dim} features per head; rotary positions "
                "need an even number of at least 8"
            )
        lon = torch.logspace(0, math.log2(max_wavenumber), num_lon, base=2.0).round()
        lat = torch.logspace(0, math.log2(max_wavenumber), num_lat, base=2.0)
        days = torch.logspace(-2, 2, num_time, base=2.0) * 2 * math.pi / HOURS_PER_DAY / 4
        level = torch.logspace(0, 2, num_level, base=2.0)
        self.register_buffer("lon_waves", lon, persistent=False)
        self.register_buffer("lat_waves", lat, persistent=False)
        self.register_buffer("time_waves", days, persistent=False)
        self.register_buffer("level_waves", level, persistent=False)

    def forward(self, grid: TokenGrid) -> Float[Tensor, "batch token pair"]:
        """Phase of every token and feature pair, in radians; time counts from the window's start,
        which leaves differences as they are and keeps the phases small."""
        hours, level, lat, lon = token_coordinates(grid)
        start = hours.amin(dim=-1, keepdim=True)
        phases = [
            torch.deg2rad(lon)[..., None] * self.lon_waves,
            torch.deg2rad(lat)[..., None] * self.lat_waves,
            (hours - start).float()[..., None] * self.time_waves,
            torch.log(level.clamp_min(1.0) / 500.0)[..., None] * self.level_waves,
        ]
        return torch.cat([phase.float() for phase in phases], dim=-1)


def rotation(phase: Float[Tensor, "batch token pair"]) -> Float[Tensor, "2 batch 1 token feature"]:
    """Cosine, and sine with the sign of each half, of the phases; computed once per view."""
    cos, sin = phase.cos(), phase.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])[:, :, None]


def rotate(
    x: Float[Tensor, "batch head token feature"],
    turn: Float[Tensor, "2 batch 1 token feature"],
) -> Float[Tensor, "batch head token feature"]:
    """Turn the two halves of the features, taken as pairs, by the token's phases."""
    cos, sin = turn.to(x.dtype)
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """One axis of features to one of heads and one of features within a head."""
    return rearrange(x, "batch token (head feature) -> batch head token feature", head=num_heads)


def merge_heads(x: Tensor) -> Tensor:
    """The inverse of `split_heads`."""
    return rearrange(x, "batch head token feature -> batch token (head feature)")
