"""The contract of every network: views to latents, latents to fields or to other latents, and what
training has to know of its parts. With it, what latents are and where they lie.

Latents have three layouts. Linear layers work on lists of chosen tokens [batch token feature],
attention along axes on the whole token grid, and convolutions on frames: all tokens of one level
and time step of one sample. Absent tokens are zeros.

The linear layers use all of a CPU. In float32 torch asks its BLAS, which leaves half of the vector
units idle on some processors with AVX-512; oneDNN, whose kernels torch brings along, does not.
Without AVX-512 the BLAS is the faster one by a tenth to a third. Sums are taken in another order,
so that results agree to float32's rounding, not bit for bit. Everything else (GPUs, bfloat16,
compiled graphs, small products) goes torch's own way. For fine-tuning, thin matrices can be added
beside frozen ones (LoRA, Hu et al. 2021, arXiv 2106.09685).
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, ClassVar

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from atmossl.batch import Prediction, StreamSpec, TokenGrid, TokenIndex, View
from atmossl.value_faults import listed


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
    frames: Float[Tensor, "frame feature nlat nlon"], lat: int, lon: int, *, periodic: bool
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
    embedded: what the first layer gets; None where the network does not tell
        (`Network.tells_embedding`).
    """

    layers: tuple[Latent, ...]
    chosen: TokenIndex
    grid: TokenGrid
    embedded: Latent | None = None

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
    tells_embedding: latents hold the embedded tokens, too, which probes can read.
    """

    widths: Mapping[str, int]
    ends: tuple[str, ...] = ()
    exported_dtype: ClassVar[torch.dtype] = torch.float16
    any_member: bool = False
    num_members: int | None = None
    low_rank_layers: ClassVar[tuple[str, ...]] = ("encoder.*", "decoder.*")
    tells_embedding: ClassVar[bool] = False

    @classmethod
    def faults_of(cls, arguments: Mapping[str, Any], streams: Sequence[StreamSpec]) -> list[str]:
        """Keywords of a configuration that do not fit together or with the streams, one line each.
        arguments: checked one by one, defaults included."""
        return []

    def encode(self, view: View) -> Latents:
        """The latents of all tokens that the encoder gets."""
        raise NotImplementedError

    def reconstruct(
        self, latents: Latents, view: View, members: Sequence[int | Tensor] | None = None
    ) -> Prediction:
        """The values of the tokens that the view hides.

        members: numbers of the members, where `any_member` is true; [batch] where every sample has
        its own; None: those of training, and at least `EVALUATED_MEMBERS` outside of it.
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
        return None

    def patch_axis(self, name: str) -> int | None:
        """The axis of a parameter that runs over the values of a token, perhaps several times;
        None if there is none."""
        return None

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile the parts of the network that gain by it."""


AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
FASTER = torch.backends.cpu.get_cpu_capability() == "AVX512"
_WORTH_IT = 2**22  # multiplications; below, the call costs more than the product


class Linear(nn.Linear):
    """`torch.nn.Linear`, by oneDNN where that is faster."""

    def forward(self, input: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch out"]:
        return linear(input, self.weight, self.bias)


def device_memory(device: str | None = None) -> int:
    """The memory in bytes of a device, `cuda` or `cpu`; None: of the visible GPU, or of this
    machine."""
    if torch.cuda.is_available() and device != "cpu":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def half_is_fast(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster than in float32. They are on GPUs and on CPUs with
    instructions for bfloat16; on other CPUs they take a hundred times as long."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, differentiable once."""
    if _by_onednn(x, weight):
        _limit_kernels()
        return _OneDnn.apply(x, weight, bias)
    return functional.linear(x, weight, bias)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= _WORTH_IT
        and AVAILABLE
        and FASTER
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


@cache
def _limit_kernels() -> None:
    """Let oneDNN, and torch's layer over it, keep 128 compiled kernels instead of 1024 each.
    There is a kernel for each shape, and masks hide another number of tokens in every batch:
    kernels would fill gigabytes and not be used again. Both libraries read these variables at
    their first product."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")


_multiply: Any = torch.ops.mkldnn._linear_pointwise if AVAILABLE else None  # x @ weight.T + bias
_PLAIN = ("none", [], "")  # no function of the products after them


class _OneDnn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x.contiguous(), weight, bias, *_PLAIN)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].flatten(0, -2).contiguous()
        for_x = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = _multiply(gradient, weight.T, None, *_PLAIN).view_as(x)
        if ctx.needs_input_grad[1]:
            for_weight = _multiply(gradient.T, x.flatten(0, -2).T, None, *_PLAIN)
        if ctx.needs_input_grad[2]:
            for_bias = gradient.sum(dim=0)
        return for_x, for_weight, for_bias


_DOWN, _UP = ".down", ".up"  # ends of the names of the two matrices
LOW_RANK = (f"*{_DOWN}", f"*{_UP}")


class LowRankLinear(Linear):
    """A linear layer with a thin correction: x (W + U D)^T + b with D [rank, in] and U [out,
    rank]. U starts at 0, so that the layer starts as it was."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        width, out = layer.in_features, layer.out_features
        super().__init__(width, out, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.down = nn.Parameter(torch.empty_like(layer.weight[:rank]))
        self.up = nn.Parameter(layer.weight.new_zeros(out, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, input: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch out"]:
        return super().forward(input) + linear(linear(input, self.down, None), self.up, None)


def add_low_rank(model: nn.Module, layers: Sequence[str], rank: int) -> None:
    """Add thin matrices, whose names match `LOW_RANK`, to the linear layers whose names match a
    pattern.

    Raises:
        ValueError: a pattern that matches no linear layer, or a layer that is not wider than rank.
    """
    linears = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    for pattern in layers:
        if not any(fnmatchcase(name, pattern) for name in linears):
            rooms = sorted({".".join(name.split(".")[:2]) + ".*" for name in linears})
            raise ValueError(
                f"warm_start.low_rank.layers: {pattern!r} matches no linear layer; valid: patterns "
                f"of names such as {listed(rooms)}"
            )
    for name, layer in linears.items():
        if not any(fnmatchcase(name, pattern) for pattern in layers):
            continue
        narrow = min(layer.in_features, layer.out_features)
        if rank >= narrow:
            raise ValueError(
                f"warm_start.low_rank.rank={rank} is not below the width {narrow} of {name}"
            )
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, LowRankLinear(layer, rank))


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the plain network that computes the same."""
    plain = dict(weights)
    for name in weights:
        if name.endswith(_DOWN):
            layer = name.removesuffix(_DOWN)
            down, up = plain.pop(name), plain.pop(layer + _UP)
            plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + up @ down
    return plain
