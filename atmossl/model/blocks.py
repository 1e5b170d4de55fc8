"""Transformer blocks: self-attention, coupling between streams or cross-attention, feedforward."""

from dataclasses import dataclass
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from atmossl.model.attention import Attend, CrossAttention, SelfAttention
from atmossl.model.layout import Latent, TokenPlace, from_frames, pad_edges, to_frames
from atmossl.model.linear import Linear


@dataclass(frozen=True)
class BlockSizes:
    """What all blocks of a network share.

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
    """Weights of one encoder layer of one stream, which `EncoderLayer` puts to work.

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
        """`x`: the queries. Tensors come and go bare, so that FSDP finds them in what comes out."""
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
