"""The ends of the network: tokens to latents, and decoded latents to an ensemble of patches.

A latent knows where its token is from physical coordinates: by absolute features, which its
embedding takes, and by rotary phases, which attention takes.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from atmossl.batch import Corruption, StreamSpec, TokenGrid, TokenIndex
from atmossl.model.network import Linear, from_frames, gather, pad_edges, token_coordinates

HOURS_PER_DAY = 24.0
_WAVENUMBERS = (1, 2, 3, 4, 6, 8)
NUM_FEATURES = 4 * len(_WAVENUMBERS) + 2 + 4 + 3 + 3
Coordinate = Literal["latitude", "longitude", "date", "hour"]
COORDINATES: tuple[Coordinate, ...] = get_args(Coordinate)


def told_features(coordinates: Sequence[Coordinate]) -> Float[Tensor, "feature"]:
    """A factor for each of the `absolute_features`: 1 if the network is told it, else 0.
    Functions of latitude, longitude, the time of the year (`date`) and local solar time (`hour`)
    are told where they are named in `coordinates`; level and extents are always told."""
    waves = ["longitude"] * len(_WAVENUMBERS) + ["latitude"] * len(_WAVENUMBERS)
    always = [None] * 3
    owners = [*waves, *waves, "date", "hour", "date", "hour", *always, *["latitude"] * 2, *always]
    assert len(owners) == NUM_FEATURES, f"{len(owners)} owners of {NUM_FEATURES} features"
    return torch.tensor([float(owner is None or owner in coordinates) for owner in owners])


def absolute_features(grid: TokenGrid) -> Float[Tensor, "batch token feature"]:
    """The place and time of every token as bounded features.

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


# what the encoder is told of a token: nothing, that it is masked, that it is coarse
_TOLD = {Corruption.DROP: 1, Corruption.MASK: 1, Corruption.COARSEN: 2}
_STATES = 3
_STEPS_AROUND = 2


class Embedding(nn.Module):
    """Embeds the tokens of one stream: values, absolute position, and what the encoder is told of
    hidden tokens.

    stencil: (nt, nlat, nlon) tokens whose values enter each token's latent; (1, 1, 1) is AtmoRep's
        embedding of every token on its own, a larger one lets a latent hold gradients and
        tendencies from the start. Beyond the window's edge the nearest token is repeated.
    gradient_features: whether the stencil reads tendencies and spatial gradients of the values
        (function `gradient_features`) instead of the values, which then enter token by token.
    scale [level, patch]: typical residual, the truth minus the first guess, in normalised units.
    causal: the stencil reads a token's own step and as many steps before it, and nothing is told of
        later steps.
    """

    states: Tensor
    scale: Tensor

    def __init__(
        self,
        *,
        spec: StreamSpec,
        dim: int,
        stencil: tuple[int, int, int],
        gradient_features: bool,
        scale: Float[Tensor, "level patch"],
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.reach = tuple(size // 2 for size in stencil)
        self.causal = causal
        self.values = nn.Conv2d(
            spec.patch * (1 if gradient_features else stencil[0]),
            dim,
            (1, 1) if gradient_features else stencil[1:],
        )
        self.details = None  # of the gradient features, by the name that checkpoints have for it
        if gradient_features:
            self.details = nn.Conv2d(2 * spec.patch * stencil[0], dim, stencil[1:])
        context = NUM_FEATURES + _STATES * (2 * _STEPS_AROUND + 1)
        self.position = nn.Sequential(Linear(context, dim), nn.GELU(), Linear(dim, 2 * dim))
        states = torch.zeros(len(Corruption), dtype=torch.int64)
        for corruption, state in _TOLD.items():
            states[int(corruption)] = state
        self.register_buffer("states", states, persistent=False)
        self.register_buffer("scale", scale.clone())
        self.fields = len(spec.variables) * spec.token_size.level

    def forward(
        self,
        tokens: Float[Tensor, "batch level nt nlat nlon patch"],
        features: Float[Tensor, "batch token position"],
        corruption: Int[Tensor, "batch level nt nlat nlon"],
        grid: TokenGrid,
        chosen: TokenIndex,
    ) -> Float[Tensor, "batch chosen feature"]:
        """Latents of the chosen tokens.

        `features`: absolute positions of all tokens. What is told of a token and of the steps
        around it, with its position, sets a gain on its values: how to read them depends on
        whether a neighbouring step is known.
        """
        reach = self.reach if self.details is None else (0, 0, 0)
        values = self._convolve(self.values, tokens, reach, grid, chosen)
        if self.details is not None:
            gradients = gradient_features(tokens, self.scale, self.fields, periodic=grid.periodic)
            values = values + self._convolve(self.details, gradients, self.reach, grid, chosen)
        states = states_around(self.states[corruption], causal=self.causal)
        context = gather(torch.cat([features, states.flatten(1, 4)], dim=-1), chosen)
        gain, shift = self.position(context).chunk(2, dim=-1)
        return values * (1 + gain) + shift

    def _convolve(
        self,
        convolution: nn.Conv2d,
        tokens: Float[Tensor, "batch level nt nlat nlon patch"],
        reach: tuple[int, ...],
        grid: TokenGrid,
        chosen: TokenIndex,
    ) -> Float[Tensor, "batch chosen feature"]:
        """Convolve over (nt, nlat, nlon), only in frames that hold a chosen token. Beyond the
        window's edge the nearest token is repeated."""
        num_times = tokens.shape[2]
        frames = rearrange(
            tokens, "batch level nt nlat nlon patch -> (batch level nt) patch nlat nlon"
        )
        numbers = chosen.frames.numbers
        step = numbers % num_times
        around = [
            frames[numbers - step + (step + shift).clamp(0, num_times - 1)]
            for shift in range(-reach[0] * (1 + self.causal), (0 if self.causal else reach[0]) + 1)
        ]
        padded = pad_edges(torch.cat(around, dim=1), reach[1], reach[2], periodic=grid.periodic)
        return from_frames(convolution(padded), chosen)


def states_around(
    state: Int[Tensor, "batch level nt nlat nlon"], *, causal: bool = False
) -> Float[Tensor, "batch level nt nlat nlon state"]:
    """One-hot states of every token and of the tokens up to two steps before and after it at the
    same place; all 0 beyond the window's edge, and for later steps if `causal`."""
    kinds = torch.arange(_STATES, device=state.device)  # one_hot would read the largest on the host
    one_hot = (state[..., None] == kinds).float()
    padded = functional.pad(one_hot, (0, 0, 0, 0, 0, 0, _STEPS_AROUND, _STEPS_AROUND))
    shifted = [padded[:, :, n : n + state.shape[2]] for n in range(2 * _STEPS_AROUND + 1)]
    if causal:
        shifted[_STEPS_AROUND + 1 :] = [torch.zeros_like(one_hot)] * _STEPS_AROUND
    return torch.cat(shifted, dim=-1)


def gradient_features(
    tokens: Float[Tensor, "batch level nt nlat nlon patch"],
    scale: Float[Tensor, "level patch"],
    num_fields: int,
    *,
    periodic: bool,
) -> Float[Tensor, "batch level nt nlat nlon twice_patch"]:
    """Tendencies and spatial gradients of the values, in units of the typical residual.

    The first half is the change since the step before (0 at the first step), the second half the
    difference from the mean over the 3 x 3 tokens around (halved, as it is about twice as large).
    Normalised values are dominated by the contrast of pole and equator, which hardly changes: for
    geopotential a change within six hours is a fifteenth of their size.
    """
    in_time = torch.diff(tokens, dim=2, prepend=tokens[:, :, :1])
    batch, level = tokens.shape[:2]
    fields = tokens.unflatten(-1, (num_fields, -1))
    means = rearrange(
        fields.mean(dim=-1), "batch level nt nlat nlon field -> (batch level nt) field nlat nlon"
    )
    padded = pad_edges(means, 1, 1, periodic=periodic)
    around = functional.avg_pool2d(padded, 3, 1)
    around = rearrange(
        around,
        "(batch level nt) field nlat nlon -> batch level nt nlat nlon field 1",
        batch=batch,
        level=level,
    )
    in_space = (fields - around).flatten(-2) / 2
    return torch.cat([in_time, in_space], dim=-1) / scale.repeat(1, 2)[:, None, None, None]


class Tail(nn.Module):
    """Maps decoded tokens to an ensemble of patches, as residuals: values minus the first guess.

    A residual is a linear function of the decoded token after its norm, plus one of the query's
    embedding without any norm: what grows with the anomalies, such as advection, keeps its size.
    `scale` [level, patch]: typical size of a residual, in normalised units.
    """

    scale: Tensor

    def __init__(self, *, dim: int, num_members: int, scale: Float[Tensor, "level patch"]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.project = Linear(dim, num_members * scale.shape[-1])
        nn.init.normal_(self.project.weight, std=0.1 * dim**-0.5)
        nn.init.zeros_(self.project.bias)
        self.linear = Linear(dim, scale.shape[-1], bias=False)
        nn.init.zeros_(self.linear.weight)
        self.register_buffer("scale", scale.clone())
        self.num_members = num_members

    def forward(
        self,
        decoded: Float[Tensor, "batch query feature"],
        embedded: Float[Tensor, "batch query feature"],
        guess: Float[Tensor, "batch query patch"],
        level: Int[Tensor, "batch query"],
    ) -> Float[Tensor, "batch query member patch"]:
        residuals = rearrange(
            self.project(self.norm(decoded)).float(),
            "batch query (member patch) -> batch query member patch",
            member=self.num_members,
        )
        scale = self.scale[level]
        mean = torch.addcmul(guess, self.linear(embedded).float(), scale)
        return torch.addcmul(mean[:, :, None], residuals, scale[:, :, None])
