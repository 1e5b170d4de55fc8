"""Where the latents of a stream lie: lists of chosen tokens, the whole token grid, and frames.

Linear layers work on lists [batch token feature], attention along axes on grids, and convolutions
on frames: all tokens of one level and time step of one sample. Absent tokens are zeros.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from atmossl.batch import TokenIndex


@dataclass(frozen=True)
class TokenPlace:
    """Which tokens of a grid some latents are, and the rotations that their positions ask for.

    turns: by the width of a head; one stream's keys have the width of the stream that looks at it.
    shape: (level, nt, nlat, nlon) of the token grid; periodic: its longitudes close the circle.
    """

    turns: Mapping[int, Float[Tensor, "2 batch 1 token head_feature"]]
    chosen: TokenIndex
    shape: tuple[int, int, int, int]
    periodic: bool


@dataclass(frozen=True)
class Latent:
    """Latent tokens of one stream, and where they are."""

    features: Float[Tensor, "batch token feature"]
    place: TokenPlace

    @property
    def valid(self) -> Bool[Tensor, "batch token"] | None:
        """Which tokens are no padding; None: all."""
        chosen = self.place.chosen
        return None if chosen.complete else chosen.valid


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Along one axis; one part as it is, not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def gather(tokens: Float[Tensor, "batch token feature"], chosen: TokenIndex) -> Tensor:
    """The chosen tokens [batch chosen feature]."""
    if chosen.complete:
        return tokens
    index = chosen.index[..., None].expand(-1, -1, tokens.shape[-1])
    return tokens.gather(1, index)


def scatter(listed: Float[Tensor, "batch chosen feature"], chosen: TokenIndex) -> Tensor:
    """The whole grid [batch token feature], 0 at tokens that were not chosen; undoes `gather`."""
    if chosen.complete:
        return listed
    index = chosen.index[..., None].expand_as(listed)
    grid = listed.new_zeros(listed.shape[0], chosen.chosen[0].numel(), listed.shape[-1])
    return grid.scatter(1, index, listed * chosen.valid[..., None].to(listed.dtype))


def to_frames(
    listed: Float[Tensor, "batch chosen feature"], chosen: TokenIndex
) -> Float[Tensor, "frame feature nlat nlon"]:
    """The frames that hold a chosen token, 0 at tokens that were not chosen."""
    num_lat, num_lon = chosen.chosen.shape[-2:]
    if not chosen.complete:
        places, feature = num_lat * num_lon, listed.shape[-1]
        rows = listed.new_zeros(len(chosen.frames.kept) * places + 1, feature)
        slot = chosen.frames.slot.flatten()[:, None].expand(-1, feature)
        listed = rows.scatter(0, slot, listed.flatten(0, 1))[:-1]
    return rearrange(
        listed.flatten(0, -2),
        "(frame nlat nlon) feature -> frame feature nlat nlon",
        nlat=num_lat,
        nlon=num_lon,
    )


def from_frames(
    frames: Float[Tensor, "frame feature nlat nlon"], chosen: TokenIndex
) -> Float[Tensor, "batch chosen feature"]:
    """The chosen tokens of the frames; padding takes the value of some token."""
    rows = rearrange(frames, "frame feature nlat nlon -> (frame nlat nlon) feature")
    batch = chosen.index.shape[0]
    if chosen.complete:
        return rows.unflatten(0, (batch, -1))
    slot = chosen.frames.slot.clamp_max(len(rows) - 1).flatten()
    return rows.index_select(0, slot).unflatten(0, (batch, -1))


def pad_edges(
    frames: Float[Tensor, "frame feature nlat nlon"],
    lat: int,
    lon: int,
    *,
    periodic: bool,
) -> Float[Tensor, "frame feature padded_nlat padded_nlon"]:
    """Neighbours for the tokens at the window's edges: across the circle where it closes, else the
    nearest token. Features that lie side by side in memory stay so, which convolutions on GPUs
    want."""
    if lon:
        west, east = (
            ([frames[..., -lon:]], [frames[..., :lon]])
            if periodic
            else ([frames[..., :1]] * lon, [frames[..., -1:]] * lon)
        )
        frames = torch.cat([*west, frames, *east], dim=-1)
    if lat:
        south, north = [frames[..., :1, :]] * lat, [frames[..., -1:, :]] * lat
        frames = torch.cat([*south, frames, *north], dim=-2)
    return frames
