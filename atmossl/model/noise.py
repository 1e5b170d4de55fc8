"""Noise that makes the members of an ensemble differ: smooth random fields over the sphere.

A member is one draw of noise that conditions the whole decoder, as in FGN (Price et al. 2025, arXiv
2506.10772) and AIFS-CRPS (Lang et al. 2024, arXiv 2412.15832). One noise vector for the whole globe
would let regions far apart vary together, and independent noise in every token would let no two
neighbours. So the noise is a Gaussian random field with several correlation lengths, evaluated at
the coordinates of the tokens. It is a sum of cosines with random frequencies (random Fourier
features, Rahimi and Recht 2007), which has a value at any place and time: tiles that overlap,
streams with other tokens and later passes of a rollout all see one and the same field.

The field is a function of (seed, member, coordinates) alone. Its random numbers are hashes of
counters, computed on the device of the tokens, so that no step waits for the host.
"""

import math

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from atmossl.batch import TokenGrid
from atmossl.geometry import EARTH_RADIUS_KM

CHANNELS_PER_LENGTH = 8
_NUM_WAVES = 32  # cosines per channel: the field's kurtosis is 3 - 1.5 / 32
_SPEED_KM_PER_HOUR = 36.0  # 10 m/s turns a correlation length into a correlation time
_SCALE_HEIGHTS = 1.0  # vertical correlation length in the logarithm of pressure
_SURFACE_HPA = 1000.0
_FREQUENCIES = 5  # of one wave: along x, y, z, time and log pressure


def noise_field(
    grid: TokenGrid,
    seeds: Int[Tensor, "batch"],
    member: int | Int[Tensor, "batch"],
    lengths_km: tuple[float, ...],
) -> Float[Tensor, "batch token channel"]:
    """The noise of one member at all tokens of a grid; every channel has mean 0 and variance 1.

    Every correlation length has `CHANNELS_PER_LENGTH` independent channels, whose covariance of two
    places at distance d (km, through the Earth), t (hours) and h (log pressure) is

        exp(-(d / length)^2 / 2 - (t / time)^2 / 2 - h^2 / 2),    time = length / (10 m/s).

    seeds: one number per sample, which the same sample has in all its tiles. member: its number,
    or one per sample.
    """
    channels = CHANNELS_PER_LENGTH * len(lengths_km)
    normal, phase = _draws(seeds, member, channels)
    lengths = torch.tensor(lengths_km, dtype=torch.float64).repeat_interleave(CHANNELS_PER_LENGTH)
    lengths = lengths.to(seeds.device, non_blocking=True)[:, None]
    angle = torch.einsum("bxi,bcki->bxck", _unit_vectors(grid), normal[..., :3])
    angle = angle * (EARTH_RADIUS_KM / lengths)
    hours = grid.time_hours.double()[..., None, None]
    in_time = hours * (normal[..., 3] * _SPEED_KM_PER_HOUR / lengths)[:, None]
    height = torch.log(_pressure(grid) / _SURFACE_HPA)[..., None, None] / _SCALE_HEIGHTS
    other = rearrange(height * normal[:, None, ..., 4], "b l c k -> b l 1 c k")
    other = (other + rearrange(in_time, "b t c k -> b 1 t c k") + phase[:, None, None]).flatten(
        1, 2
    )
    # cos(a + b) = cos a cos b - sin a sin b: sums over waves are products of matrices
    pairs = ((angle.cos(), other.cos()), (angle.sin(), other.sin()))
    even, odd = (torch.einsum("bxck,buck->buxc", x.float(), u.float()) for x, u in pairs)
    return ((even - odd) * math.sqrt(2.0 / _NUM_WAVES)).flatten(1, 2)


def _draws(
    seeds: Int[Tensor, "batch"], member: int | Int[Tensor, "batch"], channels: int
) -> tuple[Float[Tensor, "batch channel wave frequency"], Float[Tensor, "batch channel wave"]]:
    """Random numbers of every wave: normal ones for its frequencies, and a uniform phase in [0,
    2 pi)."""
    shape = (channels, _NUM_WAVES, 2 * _FREQUENCIES + 1)
    counters = torch.arange(math.prod(shape), device=seeds.device).view(shape)
    keys = mixed(mixed(seeds) + member)
    uniform = uniform_of(mixed(keys[:, None, None, None] + counters))
    first, second, phase = uniform.split([_FREQUENCIES, _FREQUENCIES, 1], dim=-1)
    # Box and Muller (1958)
    normal = (-2.0 * torch.log1p(-first)).sqrt() * torch.cos(2.0 * math.pi * second)
    return normal, 2.0 * math.pi * phase[..., 0]


def mixed(numbers: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Pseudo-random 64-bit numbers: for every number as a seed, the first one that SplitMix64
    gives (Steele et al. 2014, doi 10.1145/2660193.2660195). Products wrap around."""
    z = numbers + -0x61C8864680B583EB
    z = (z ^ _shifted(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ _shifted(z, 27)) * -0x6B2FB644ECCEEE15
    return z ^ _shifted(z, 31)


def uniform_of(numbers: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The upper 53 bits of 64-bit numbers as fractions in [0, 1)."""
    return _shifted(numbers, 11).double() * 2.0**-53


def _shifted(numbers: Int[Tensor, "*shape"], bits: int) -> Int[Tensor, "*shape"]:
    """Shift to the right that fills with zeros; torch's own fills with the sign."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)


def _unit_vectors(grid: TokenGrid) -> Float[Tensor, "batch place 3"]:
    """The points of the unit sphere of all tokens of one level and time, row by row."""
    lat = torch.deg2rad(grid.lat.double())[..., :, None]
    lon = torch.deg2rad(grid.lon.double())[..., None, :]
    vectors = (
        lat.cos() * lon.cos(),
        lat.cos() * lon.sin(),
        lat.sin().expand(*lat.shape[:-1], lon.shape[-1]),
    )
    return torch.stack(vectors, dim=-1).flatten(-3, -2)


def _pressure(grid: TokenGrid) -> Float[Tensor, "batch level"]:
    """The pressure of every level in hPa; that of the surface is about 1000."""
    level = grid.level_hpa.double()
    return torch.where(level > 0, level, _SURFACE_HPA)
