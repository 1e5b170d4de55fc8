"""Transformer blocks: self-attention, coupling between streams or cross-attention, feedforward."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from atmossl.model.attention import Attend, CrossAttention, SelfAttention
from atmossl.model.layout import Latent, from_frames, pad_edges, to_frames
from atmossl.model.linear import Linear


@dataclass(frozen=True)
class BlockSizes:
    """What all blocks of a network share.

    attend: which tokens see which (`model.attention`).
    ratio: width of a feedforward layer over that of the latents.
    neighbourhood: tokens along latitude and longitude that a feedforward layer sees, an odd number;
        1 is the plain layer of a transformer, more the gated convolution of `GatedConvolution`.
    """

    num_heads: int
    ratio: float
    attend: Attend
    neighbourhood: int

    def feedforward(self, dim: int) -> nn.Module:
        hidden = int(dim * self.ratio)
        if self.neighbourhood == 1:
            return Feedforward(dim, hidden)
        return GatedConvolution(dim, hidden, self.neighbourhood)


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

    def __init__(self, dim: int, hidden: int, neighbourhood: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(dim, 2 * hidden, neighbourhood)
        self.contract = Linear(hidden, dim)
        self.reach = neighbourhood // 2

    def forward(self, x: Latent) -> Float[Tensor, "batch token feature"]:
        frames = to_frames(x.features, x.chosen)
        frames = pad_edges(frames, self.reach, self.reach, periodic=x.periodic)
        gate, values = self.expand(frames).chunk(2, dim=1)
        return self.contract(from_frames(functional.gelu(gate) * values, x.chosen))


class EncoderBlock(nn.Module):
    """One layer of one stream: self-attention and coupling to every other stream, feedforward.

    `coupled_dims`: width of every other stream, by its name. A stream that is absent at
    inference is left out of the coupling.
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

    def forward(self, x: Latent, own: Latent, others: dict[str, Latent]) -> Latent:
        """`own`, `others`: the streams' latents after each one's `norm` of the same layer."""
        features = x.features + self.attention(own)
        for name, couple in self.coupling.items():
            if name in others:
                features = features + couple(own, others[name])
        inner = x.with_features(self.feedforward_norm(features))
        return x.with_features(features + self.feedforward(inner))


class DecoderBlock(nn.Module):
    """One layer of a decoder: queries attend to each other, then to one encoder layer."""

    def __init__(self, *, dim: int, sizes: BlockSizes) -> None:
        super().__init__()
        heads, attend = sizes.num_heads, sizes.attend
        self.norm = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim=dim, num_heads=heads, attend=attend)
        self.cross_norm = nn.LayerNorm(dim)
        self.memory_norm = nn.LayerNorm(dim)
        self.cross = CrossAttention(
            dim=dim, context_dim=dim, num_heads=heads, attend=attend, zero_init=False
        )
        self.feedforward_norm = nn.LayerNorm(dim)
        self.feedforward = sizes.feedforward(dim)

    def forward(self, queries: Latent, memory: Latent) -> Latent:
        x = queries.features
        x = x + self.attention(queries.with_features(self.norm(x)))
        context = memory.with_features(self.memory_norm(memory.features))
        x = x + self.cross(queries.with_features(self.cross_norm(x)), context)
        inner = queries.with_features(self.feedforward_norm(x))
        return queries.with_features(x + self.feedforward(inner))
