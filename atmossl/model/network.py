"""The contract of every network: views to latents, latents to fields or to other latents, and what
training has to know of its parts. With it, what latents are and where they lie.

Latents have three layouts. Linear layers work on lists of chosen tokens [batch token feature],
attention along axes on the whole token grid, and convolutions on frames: all tokens of one level
and time step of one sample. Absent tokens are zeros.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from atmossl.batch import Prediction, StreamSpec, TokenGrid, TokenIndex, View


@dataclass(frozen=True)
class TokenPlace:
    """Where latents lie: which tokens of the grid they belong to, and the rotary rotations of their
    positions.

    turns: by the width of a head; one stream's keys have the width of the stream that looks at it.
    shape: (level, nt, nlat, nlon) of the token grid; periodic: its longitudes close the circle.
    """

    turns: Mapping[int, Float[Tensor, "2 batch 1 token head_feature"]]
    chosen: TokenIndex
    shape: tuple[int, int, int, int]
    periodic: bool


@dataclass(frozen=True)
class Latent:
    """Latent tokens of one stream, and where they lie."""

    features: Float[Tensor, "batch token feature"]
    place: TokenPlace

    @property
    def valid(self) -> Bool[Tensor, "batch token"] | None:
        """True for tokens that are no padding; None if there is no padding."""
        chosen = self.place.chosen
        return None if chosen.complete else chosen.valid


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Tensors joined along one axis; a single tensor as it is, not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def gather(tokens: Float[Tensor, "batch token feature"], chosen: TokenIndex) -> Tensor:
    """The features of the chosen tokens, [batch chosen feature]."""
    if chosen.complete:
        return tokens
    index = chosen.index[..., None].expand(-1, -1, tokens.shape[-1])
    return tokens.gather(1, index)


def scatter(listed: Float[Tensor, "batch chosen feature"], chosen: TokenIndex) -> Tensor:
    """The features on the whole grid [batch token feature], 0 at tokens that were not chosen. It
    undoes `gather`."""
    if chosen.complete:
        return listed
    index = chosen.index[..., None].expand_as(listed)
    grid = listed.new_zeros(listed.shape[0], chosen.chosen[0].numel(), listed.shape[-1])
    return grid.scatter(1, index, listed * chosen.valid[..., None].to(listed.dtype))


def to_frames(
    listed: Float[Tensor, "batch chosen feature"], chosen: TokenIndex
) -> Float[Tensor, "frame feature nlat nlon"]:
    """The features as frames: those that hold a chosen token, 0 at tokens that were not chosen."""
    num_lat, num_lon = chosen.chosen.shape[-2:]
    if not chosen.complete:
        places, feature = num_lat * num_lon, listed.shape[-1]
        rows = listed.new_zeros(len(chosen.frames.numbers) * places + 1, feature)
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
    """The features of the chosen tokens of the frames. Padding takes the value of some token."""
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
    """Frames with neighbours for the tokens at the window's edges: across the circle where it
    closes, else the nearest token. Features that lie side by side in memory stay so, as
    convolutions on GPUs want it."""
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


def token_coordinates(grid: TokenGrid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coordinates of all tokens, each [batch token]: hours, hPa, degrees, degrees."""
    num_level, num_time, num_lat, num_lon = grid.shape
    sizes = {"level": num_level, "nt": num_time, "nlat": num_lat, "nlon": num_lon}

    def spread(values: Tensor, axis: str) -> Tensor:
        other_sizes = {name: size for name, size in sizes.items() if name != axis}
        return repeat(values, f"batch {axis} -> batch (level nt nlat nlon)", **other_sizes)

    return (
        spread(grid.time_hours, "nt"),
        spread(grid.level_hpa, "level"),
        spread(grid.lat, "nlat"),
        spread(grid.lon, "nlon"),
    )


@dataclass(frozen=True)
class StreamLatents:
    """Latents of chosen tokens of one stream after every layer, first layer first.

    chosen: which tokens of the window they are. grid: physical coordinates of all its tokens.
    """

    layers: tuple[Latent, ...]
    chosen: TokenIndex
    grid: TokenGrid

    @property
    def last(self) -> Float[Tensor, "batch token feature"]:
        return self.layers[-1].features

    def coordinates(self) -> dict[str, Float[Tensor, "batch token"]]:
        """The centre of every latent's token: time in hours since 1970-01-01T00, level in hPa,
        latitude and longitude in degrees."""
        names = ("time_hours", "level_hpa", "lat", "lon")
        values = token_coordinates(self.grid)
        return {
            name: gather(value[..., None], self.chosen)[..., 0]
            for name, value in zip(names, values, strict=True)
        }

    def areas(self) -> Float[Tensor, "batch token"]:
        """The area of every latent's token on the unit sphere; 0 where the list is padded."""
        lat = torch.deg2rad(self.coordinates()["lat"].double())
        height = torch.deg2rad(self.grid.lat_extent.double())[..., None] / 2
        width = torch.deg2rad(self.grid.lon_extent.double())[..., None]
        pole = torch.pi / 2
        north, south = (lat + height).clamp_max(pole), (lat - height).clamp_min(-pole)
        return ((north.sin() - south.sin()) * width * self.chosen.valid).float()


Latents = dict[str, StreamLatents]  # by the stream's name
EVALUATED_MEMBERS = 8  # draws of noise in validation, where the error of their mean counts


class Network(nn.Module):
    """The contract of every network: `encode`, `reconstruct` and `predict`.

    widths: features of a latent, by stream.
    ends: names of the submodules that turn latents into values. They have no square geometry, and
        `objective.train_only` can train them alone.
    exported_dtype: in which `atmossl export` keeps the weights.
    any_member: members are draws of noise, and any number of them can be asked for.
    num_members: of a tail; None: the network does not say.
    low_rank_layers: patterns of names of the layers that `warm_start.low_rank` tunes by default.
    """

    widths: Mapping[str, int]
    ends: tuple[str, ...] = ()
    exported_dtype: ClassVar[torch.dtype] = torch.float16
    any_member: bool = False
    num_members: int | None = None
    low_rank_layers: ClassVar[tuple[str, ...]] = ("encoder.*", "decoder.*")

    @classmethod
    def faults_of(cls, arguments: Mapping[str, Any], streams: Sequence[StreamSpec]) -> list[str]:
        """Keywords of a configuration that do not fit together or with the streams, one line each.
        arguments: checked one by one, defaults included."""
        del arguments, streams
        return []

    def encode(self, view: View) -> Latents:
        """The latents of all tokens that the encoder gets."""
        raise NotImplementedError

    def reconstruct(
        self, latents: Latents, view: View, members: Sequence[int | Tensor] | None = None
    ) -> Prediction:
        """The values of the tokens that the view hides.

        members: numbers of the members, where `any_member` is true; [batch] where every sample has
        its own; None: those of training, and at
        least `EVALUATED_MEMBERS` outside of it.
        """
        raise NotImplementedError

    def predict(self, latents: Latents, view: View) -> Latents:
        """The latents of the tokens that the view hides, from their coordinates alone: neither
        the first guess nor the ends are used."""
        raise NotImplementedError

    def forward(self, view: View, members: Sequence[int | Tensor] | None = None) -> Prediction:
        # by the class: on shards the methods of an object gather its weights and let them go again,
        # which the call of the object has done already
        kind = type(self)
        return kind.reconstruct(self, kind.encode(self, view), view, members)

    def pool(self, latents: Latents) -> Float[Tensor, "batch feature"]:
        """The mean of the last layer over all tokens, weighted by their area on the sphere; the
        features of all streams are put side by side."""
        means = []
        for stream in latents.values():
            weight = stream.areas()[..., None].to(stream.last)
            means.append((stream.last * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1e-12))
        return torch.cat(means, dim=-1)

    def without_position(self) -> "Network":
        """A copy whose encoder is not told where on the globe and when a token is, or the network
        itself where that cannot be withheld."""
        return self

    @property
    def num_pooled(self) -> int:
        """The number of features that `pool` gives if no stream is absent."""
        return sum(self.widths.values())

    @property
    def num_encoder_layers(self) -> int:
        """The number of layers whose latents `encode` gives."""
        raise NotImplementedError

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The layers of the network. Sharded runs gather one at a time; `trainer.recompute=full`
        recomputes their activations."""
        return ()

    @property
    def wide_parts(self) -> tuple[nn.Module, ...]:
        """The parts of the blocks with the largest activations, for
        `trainer.recompute=selective`."""
        return ()

    def depth(self, name: str) -> int | None:
        """How many encoder layers lie above the layer of a parameter, for learning rates that
        fall from layer to layer. None: the parameter is no part of the encoder."""
        del name
        return None

    def patch_axis(self, name: str) -> int | None:
        """The axis of a parameter that runs over the values of a token, perhaps several times;
        None if there is none."""
        del name
        return None

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile the parts of the network that gain by it."""
