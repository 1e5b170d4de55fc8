"""Transformer layers: attention, encoder blocks with coupling between streams, decoder blocks with
cross-attention, feedforward layers, and one encoder layer of all streams.

Attention goes to all tokens, along the grid's axes, or within windows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import permutations, repeat
from typing import Any, Literal, cast

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional

from atmossl.model.network import (
    Latent,
    Linear,
    TokenPlace,
    from_frames,
    gather,
    pad_edges,
    scatter,
    to_frames,
)


def rotation(phase: Float[Tensor, "batch token pair"]) -> Float[Tensor, "2 batch 1 token feature"]:
    """Cosine, and sine with the sign of each half, of rotary phases; computed once per view."""
    cos, sin = phase.cos(), phase.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])[:, :, None]


def rotate(
    x: Float[Tensor, "batch head token feature"], turn: Float[Tensor, "2 batch 1 token feature"]
) -> Float[Tensor, "batch head token feature"]:
    """Features turned by the token's phases; the two halves of the features are taken as pairs."""
    cos, sin = turn.to(x.dtype)
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Split the axis of features into one of heads and one of features within a head."""
    return rearrange(x, "batch token (head feature) -> batch head token feature", head=num_heads)


def merge_heads(x: Tensor) -> Tensor:
    """The inverse of `split_heads`."""
    return rearrange(x, "batch head token feature -> batch token (head feature)")


Attention = Literal["full", "factorised", "temporal", "windowed"]
Attend = Callable[[Tensor, Tensor, Tensor, Latent, Latent], Tensor]
# Of which time steps a token sees others, by their distance to its own: any, its own and earlier
# ones, its own alone, or earlier ones alone.
Steps = Literal["any", "until", "same", "before"]
_FEW_KEYS = 16  # below, plain products are several times as fast as a fused kernel
_MOST_ROWS = 2**16 - 1  # samples in one launch of a GPU's fused kernels


def attend(
    query: Float[Tensor, "batch head query feature"],
    key: Float[Tensor, "batch head key feature"],
    value: Float[Tensor, "batch head key feature"],
    valid: Bool[Tensor, "batch key"] | None,
    order: Bool[Tensor, "rows query key"] | None = None,
) -> Float[Tensor, "batch head query feature"]:
    """Exact attention over the valid keys; a row without any valid key gives zeros.

    order: which keys each query may see, for every sample or the same for all of them.
    """
    visible = None if valid is None else valid[:, None, None, :]
    if order is not None:
        visible = order[:, None] if visible is None else visible & order[:, None]
    some = None
    if visible is not None:
        some = visible.any(dim=-1, keepdim=True)
        visible = visible | ~some  # an empty row would give NaN, and NaN gradients
    if key.shape[-2] <= _FEW_KEYS:
        score = query @ key.mT * query.shape[-1] ** -0.5
        if visible is not None:
            score = score.masked_fill(~visible, -torch.inf)
        out = score.softmax(dim=-1).to(value.dtype) @ value
    elif len(query) <= _MOST_ROWS:
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
    else:
        masks = repeat(None) if visible is None else visible.split(_MOST_ROWS)
        parts = zip(*(x.split(_MOST_ROWS) for x in (query, key, value)), masks, strict=False)
        out = torch.cat([functional.scaled_dot_product_attention(*part) for part in parts])
    return out if some is None else torch.where(some, out, torch.zeros_like(out))


def _may_see(query: Tensor, key: Tensor, steps: Steps) -> Tensor:
    """Whether a token at step `query` may attend to a token at step `key`."""
    if steps == "same":
        return query == key
    return query >= key if steps == "until" else query > key


def attend_fully(
    query: Tensor, key: Tensor, value: Tensor, x: Latent, context: Latent, steps: Steps = "any"
) -> Tensor:
    """Attention of every token to all tokens of the context at the steps that it may see."""
    if steps == "any":
        return attend(query, key, value, context.valid)
    query_steps, key_steps = (_step_of_tokens(latent) for latent in (x, context))
    order = _may_see(query_steps[:, :, None], key_steps[:, None, :], steps)
    return attend(query, key, value, context.valid, order)


def _step_of_tokens(x: Latent) -> Int[Tensor, "batch token"]:
    _, num_times, num_lat, num_lon = x.place.shape
    return x.place.chosen.index // (num_lat * num_lon) % num_times


# heads of the whole grid, and the same with one sequence per column or per plane
_GRID = "b h (level nt nlat nlon) f"
_COLUMNS = "(b nlat nlon) h (level nt) f"
_PLANES = "(b level nt) h (nlat nlon) f"


def attend_factorised(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    x: Latent,
    context: Latent,
    steps: Steps = "any",
    *,
    in_planes: bool = True,
) -> Tensor:
    """Attention in which half of the heads see all levels and times of a token's place, and half
    see all places of its level and time (factorised dot-product attention, Arnab et al. 2021,
    ViViT, model 4). The cost grows with tokens times (levels x times + places). Grids of
    different shapes attend fully.

    in_planes: whether there is the second half; else all heads see the token's place alone, and
        space is left to the convolutions. Where heads may see earlier steps alone, they see the
        places of the step before.
    """
    num_columns = query.shape[1] // 2 if in_planes else query.shape[1]
    if x.place.shape != context.place.shape:
        return attend_fully(query, key, value, x, context, steps)
    sizes = _sizes(x.place.shape)
    grids = [_whole(query, x), _whole(key, context), _whole(value, context)]
    present = None
    if not context.place.chosen.complete:
        present = context.place.chosen.chosen.flatten(1)[:, None, :, None]
    if steps == "before":
        if present is None:
            present = torch.ones_like(grids[0][:, :1, :, :1], dtype=torch.bool)
        grids[1:] = [_one_step_later(grid, sizes) for grid in grids[1:]]
        present, steps = _one_step_later(present, sizes), "until"
    attended = []
    for axes, heads in ((_COLUMNS, slice(num_columns)), (_PLANES, slice(num_columns, None))):
        q, k, v = (rearrange(grid[:, heads], f"{_GRID} -> {axes}", **sizes) for grid in grids)
        if q.shape[1] == 0:
            continue
        valid = None
        if present is not None:
            valid = rearrange(present, f"{_GRID} -> {axes}", **sizes)[:, 0, :, 0]
        order = None
        if steps != "any" and axes == _COLUMNS:
            step = torch.arange(q.shape[2], device=q.device) % sizes["nt"]
            order = _may_see(step[:, None], step[None], steps)[None]
        attended.append(rearrange(attend(q, k, v, valid, order), f"{axes} -> {_GRID}", **sizes))
    out = torch.cat(attended, dim=1)
    return split_heads(gather(merge_heads(out), x.place.chosen), out.shape[1])


attend_temporally = partial(attend_factorised, in_planes=False)


def _one_step_later(
    grid: Shaped[Tensor, "batch head token feature"], sizes: dict[str, int]
) -> Shaped[Tensor, "batch head token feature"]:
    """The tokens moved on by one time step, so that every token has what was one step before; 0
    at the first step."""
    axes = grid.unflatten(2, (sizes["level"], sizes["nt"], -1))
    return functional.pad(axes[:, :, :, :-1], (0, 0, 0, 0, 1, 0)).flatten(2, 4)


def _sizes(shape: tuple[int, int, int, int]) -> dict[str, int]:
    return dict(zip(("level", "nt", "nlat", "nlon"), shape, strict=True))


def _whole(heads: Float[Tensor, "batch head token feature"], x: Latent) -> Tensor:
    """The heads on the whole token grid, 0 where a token is absent."""
    if x.place.chosen.complete:
        return heads
    return split_heads(scatter(merge_heads(heads), x.place.chosen), heads.shape[1])


@dataclass(frozen=True)
class Cut:
    """How a token grid falls into windows of `size` (time, lat, lon) tokens, all levels in each.

    shift: tokens that the grid moves up before it is cut. Along an axis that does not close, the
    first window is the smaller for it; on a closed circle the last tokens come first.
    """

    shape: tuple[int, int, int, int]
    size: tuple[int, int, int]
    shift: tuple[int, int, int]
    periodic: bool

    @classmethod
    def of(cls, x: Latent, size: tuple[int, int, int], *, shifted: bool) -> "Cut":
        """The cut for the tokens' grid. An axis that fits into one window is not cut."""
        axes = x.place.shape[1:]
        fitting = tuple(min(pair) for pair in zip(size, axes, strict=True))
        shift = tuple(
            length // 2 if shifted and tokens > length else 0
            for length, tokens in zip(fitting, axes, strict=True)
        )
        return cls(x.place.shape, fitting, shift, x.place.periodic)  # type: ignore[arg-type]

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """Empty places before and after the tokens along time, lat and lon."""
        before = (*self.shift[:2], 0 if self.periodic else self.shift[2])
        axes = zip(before, self.shape[1:], self.size, strict=True)
        return tuple((empty, -(empty + tokens) % size) for empty, tokens, size in axes)

    @property
    def exact(self) -> bool:
        return not any(map(any, self.edges))

    def split(
        self, grid: Shaped[Tensor, "batch head token feature"]
    ) -> Shaped[Tensor, "windows head place feature"]:
        """Every window as a sample of its own; empty places hold 0."""
        axes = rearrange(grid, f"{_GRID} -> b h level nt nlat nlon f", **_sizes(self.shape))
        if self.periodic and self.shift[2]:
            axes = axes.roll(self.shift[2], dims=5)
        if not self.exact:
            time, lat, lon = self.edges
            axes = functional.pad(axes, (0, 0, *lon, *lat, *time))
        return rearrange(axes, f"{_CUT} -> {_WINDOWS}", **self._places)

    def join(
        self, windows: Shaped[Tensor, "windows head place feature"]
    ) -> Shaped[Tensor, "batch head token feature"]:
        """Undoes `split`."""
        counts = (
            (sum(edge) + tokens) // size
            for edge, tokens, size in zip(self.edges, self.shape[1:], self.size, strict=True)
        )
        named = dict(zip(("nt", "nlat", "nlon"), counts, strict=True))
        axes = rearrange(windows, f"{_WINDOWS} -> {_CUT}", **self._places, **named)
        for dim, ((before, _), tokens) in enumerate(zip(self.edges, self.shape[1:], strict=True)):
            axes = axes.narrow(dim + 3, before, tokens)
        if self.periodic and self.shift[2]:
            axes = axes.roll(-self.shift[2], dims=5)
        return rearrange(axes, f"b h level nt nlat nlon f -> {_GRID}")

    @property
    def _places(self) -> dict[str, int]:
        sizes = zip(("wt", "wlat", "wlon"), self.size, strict=True)
        return {"level": self.shape[0], **dict(sizes)}


_CUT = "b h level (nt wt) (nlat wlat) (nlon wlon) f"
_WINDOWS = "(b nt nlat nlon) h (level wt wlat wlon) f"


def attend_in_windows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    x: Latent,
    context: Latent,
    *,
    size: tuple[int, int, int],
) -> Tensor:
    """Attention in which half of the heads see a window of `size` (time, lat, lon) tokens, and
    half a window shifted by half of it, so that each layer joins neighbouring windows (shifted
    windows after Liu et al. 2021, Swin Transformer, there in alternate layers). The cost grows
    with tokens times a window. Grids of different shapes attend fully."""
    if x.place.shape != context.place.shape:
        return attend_fully(query, key, value, x, context)
    grids = (_whole(query, x), _whole(key, context), _whole(value, context))
    half = query.shape[1] // 2
    attended = []
    for heads, shifted in ((slice(half), False), (slice(half, None), True)):
        cut = Cut.of(x, size, shifted=shifted)
        q, k, v = (cut.split(grid[:, heads]) for grid in grids)
        valid = None
        if not (cut.exact and context.place.chosen.complete):
            present = context.place.chosen.chosen.flatten(1)[:, None, :, None]
            valid = cut.split(present)[:, 0, :, 0]
        attended.append(cut.join(attend(q, k, v, valid)))
    out = torch.cat(attended, dim=1)
    return split_heads(gather(merge_heads(out), x.place.chosen), out.shape[1])


def attend_by(attention: Attention, window: tuple[int, int, int], steps: Steps = "any") -> Attend:
    """The attention function of a name. `window` (time, lat, lon) counts for `windowed` alone,
    which sees any step."""
    if attention == "windowed":
        # sizes of windows, as symbols, would keep the compiler busy without end
        return cast(Attend, torch.compiler.disable(partial(attend_in_windows, size=window)))
    kinds: dict[str, Any] = {
        "full": attend_fully,
        "factorised": attend_factorised,
        "temporal": attend_temporally,
    }
    return kinds[attention] if steps == "any" else partial(kinds[attention], steps=steps)


class SelfAttention(nn.Module):
    """Attention of a stream to itself."""

    def __init__(self, *, dim: int, num_heads: int, attend: Attend) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attend = attend
        self.project = Linear(dim, 3 * dim)
        self.out = Linear(dim, dim)

    def forward(self, x: Latent) -> Float[Tensor, "batch token feature"]:
        projected = self.project(x.features)
        query, key, value = (
            split_heads(part, self.num_heads) for part in projected.chunk(3, dim=-1)
        )
        turn = x.place.turns[query.shape[-1]]
        attended = self.attend(rotate(query, turn), rotate(key, turn), value, x, x)
        return self.out(merge_heads(attended))


class CrossAttention(nn.Module):
    """Attention of one set of tokens to another; `zero_init` starts it as a no-op."""

    def __init__(
        self, *, dim: int, context_dim: int, num_heads: int, attend: Attend, zero_init: bool
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attend = attend
        self.query = Linear(dim, dim)
        self.key_value = Linear(context_dim, 2 * dim)
        self.out = Linear(dim, dim)
        if zero_init:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, x: Latent, context: Latent) -> Float[Tensor, "batch token feature"]:
        queries = self.query(x.features)
        pairs = self.key_value(context.features)
        key, value = (split_heads(part, self.num_heads) for part in pairs.chunk(2, dim=-1))
        width = key.shape[-1]
        query = rotate(split_heads(queries, self.num_heads), x.place.turns[width])
        key = rotate(key, context.place.turns[width])
        attended = self.attend(query, key, value, x, context)
        return self.out(merge_heads(attended))


@dataclass(frozen=True)
class BlockSizes:
    """The sizes that all blocks of a network share.

    attend: which tokens see which (`model.attention`). attend_queries, attend_memory: the same
        among the queries of a decoder, and from them to the encoder; as `attend` if not given.
    ratio: width of a feedforward layer over that of the latents.
    kernel_size: tokens along latitude and longitude that a feedforward layer sees, an odd number;
        1 is the plain layer of a transformer, more the gated convolution of `GatedConvolution`.
    """

    num_heads: int
    ratio: float
    attend: Attend
    kernel_size: int
    attend_queries: Attend | None = None
    attend_memory: Attend | None = None

    def feedforward(self, dim: int) -> nn.Module:
        hidden = int(dim * self.ratio)
        if self.kernel_size == 1:
            return Feedforward(dim, hidden)
        return GatedConvolution(dim, hidden, self.kernel_size)


class Feedforward(nn.Module):
    """Two linear layers, token by token."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.expand = Linear(dim, hidden)
        self.contract = Linear(hidden, dim)

    def forward(self, x: Latent) -> Float[Tensor, "batch token feature"]:
        return self.contract(functional.gelu(self.expand(x.features)))


class GatedConvolution(nn.Module):
    """A feedforward layer that sees neighbours: one convolution over (nlat, nlon) gates another.

    GELU-gated linear units (Shazeer 2020, arXiv 2002.05202) with convolutions in place of linear
    maps. Products of neighbouring values are what advection is made of: wind times gradient.
    Longitude wraps where the window closes the circle; absent tokens are zeros.
    """

    def __init__(self, dim: int, hidden: int, kernel_size: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(dim, 2 * hidden, kernel_size)
        self.contract = Linear(hidden, dim)
        self.reach = kernel_size // 2

    def forward(self, x: Latent) -> Float[Tensor, "batch token feature"]:
        chosen = x.place.chosen
        frames = to_frames(x.features, chosen)
        frames = pad_edges(frames, self.reach, self.reach, periodic=x.place.periodic)
        gate, values = self.expand(frames).chunk(2, dim=1)
        return self.contract(from_frames(functional.gelu(gate) * values, chosen))


class EncoderBlock(nn.Module):
    """The weights of one encoder layer for one stream; `EncoderLayer` applies them. coupled_dims:
    the width of every other stream, by its name.

    `coupled_dims`: width of every other stream, by its name.
    """

    def __init__(self, *, dim: int, sizes: BlockSizes, coupled_dims: dict[str, int]) -> None:
        super().__init__()
        heads, attend = sizes.num_heads, sizes.attend
        self.norm = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim=dim, num_heads=heads, attend=attend)
        self.coupling = nn.ModuleDict(
            {
                name: CrossAttention(
                    dim=dim, context_dim=other, num_heads=heads, attend=attend, zero_init=True
                )
                for name, other in coupled_dims.items()
            }
        )
        self.feedforward_norm = nn.LayerNorm(dim)
        self.feedforward = sizes.feedforward(dim)


class Modulation(nn.Module):
    """Gains and shifts of normalised latents by noise: conditional layer norm (Perez et al. 2018,
    arXiv 1709.07871; of noise: Price et al. 2025, arXiv 2506.10772), token by token.

    count: layer norms that are conditioned.
    """

    def __init__(self, dim: int, num_channels: int, *, count: int) -> None:
        super().__init__()
        self.project = Linear(num_channels, 2 * count * dim)
        self.count = count
        # small, so that training starts near the network without noise, but not zero: two equal
        # members have no gradient that would part them
        nn.init.normal_(self.project.weight, std=0.1 * num_channels**-0.5)
        nn.init.zeros_(self.project.bias)

    def forward(
        self, noise: Float[Tensor, "batch query channel"]
    ) -> list[tuple[Float[Tensor, "batch query feature"], Float[Tensor, "batch query feature"]]]:
        """A gain near 1 and a shift near 0 for every layer norm."""
        gains, shifts = self.project(noise).chunk(2, dim=-1)
        return list(
            zip((1 + gains).chunk(self.count, -1), shifts.chunk(self.count, -1), strict=True)
        )


class DecoderBlock(nn.Module):
    """One layer of a decoder: queries attend to each other, then to one encoder layer.

    num_channels: of the noise that conditions the layer norms of the queries; 0: none does.
    """

    def __init__(self, *, dim: int, sizes: BlockSizes, num_channels: int = 0) -> None:
        super().__init__()
        heads, attend = sizes.num_heads, sizes.attend_queries or sizes.attend
        self.modulation = Modulation(dim, num_channels, count=3) if num_channels else None
        self.norm = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim=dim, num_heads=heads, attend=attend)
        self.cross_norm = nn.LayerNorm(dim)
        self.memory_norm = nn.LayerNorm(dim)
        self.cross = CrossAttention(
            dim=dim,
            context_dim=dim,
            num_heads=heads,
            attend=sizes.attend_memory or sizes.attend,
            zero_init=False,
        )
        self.feedforward_norm = nn.LayerNorm(dim)
        self.feedforward = sizes.feedforward(dim)

    def forward(
        self,
        x: Float[Tensor, "batch query feature"],
        memory: Float[Tensor, "batch token feature"],
        place: TokenPlace,
        memory_place: TokenPlace,
        noise: Float[Tensor, "batch query channel"] | None = None,
    ) -> Float[Tensor, "batch query feature"]:
        """Update the queries `x`. Inputs and outputs are bare tensors, so that FSDP finds them."""
        norms = [self.norm, self.cross_norm, self.feedforward_norm]
        if self.modulation is None or noise is None:
            attention_norm, cross_norm, feedforward_norm = norms
        else:
            attention_norm, cross_norm, feedforward_norm = (
                partial(_conditioned, norm, *factors)
                for norm, factors in zip(norms, self.modulation(noise), strict=True)
            )
        x = x + self.attention(Latent(attention_norm(x), place))
        context = Latent(self.memory_norm(memory), memory_place)
        x = x + self.cross(Latent(cross_norm(x), place), context)
        return x + self.feedforward(Latent(feedforward_norm(x), place))


def _conditioned(norm: nn.Module, gain: Tensor, shift: Tensor, x: Tensor) -> Tensor:
    return norm(x) * gain + shift


Features = dict[str, Float[Tensor, "batch token feature"]]  # by the name of a stream


class EncoderLayer(nn.ModuleDict):
    """One encoder layer of all streams: self-attention and coupling to the other streams, then
    feedforward, with a block for each stream by its name."""

    def __init__(self, widths: Mapping[str, int], sizes: BlockSizes) -> None:
        blocks = {}
        for name, width in widths.items():
            other_widths = {other: size for other, size in widths.items() if other != name}
            blocks[name] = EncoderBlock(dim=width, sizes=sizes, coupled_dims=other_widths)
        super().__init__(blocks)

    def forward(self, features: Features, places: Mapping[str, TokenPlace]) -> Features:
        """The features of every stream that is present. Coupling to an absent stream is left
        out."""
        blocks = {name: cast(EncoderBlock, self[name]) for name in features}
        normed: dict[str, Latent] = {}
        after: Features = {}
        for name, block in blocks.items():
            normed[name] = Latent(block.norm(features[name]), places[name])
            after[name] = features[name] + block.attention(normed[name])
        for name, other in permutations(blocks, 2):
            after[name] = after[name] + blocks[name].coupling[other](normed[name], normed[other])
        for name, block in blocks.items():
            inner = Latent(block.feedforward_norm(after[name]), places[name])
            after[name] = after[name] + block.feedforward(inner)
        return after
