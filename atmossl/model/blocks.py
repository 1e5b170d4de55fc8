"""Attention and transformer blocks: self-attention, coupling between streams, cross-attention."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from atmossl.model.positions import merge_heads, rotate, split_heads


@dataclass(frozen=True)
class Latent:
    """Latent tokens of one stream, their rotation, and which of them are no padding."""

    features: Float[Tensor, "batch token feature"]
    turn: Float[Tensor, "2 batch 1 token head_feature"]
    valid: Bool[Tensor, "batch token"] | None  # None: all

    def with_features(self, features: Tensor) -> "Latent":
        return Latent(features, self.turn, self.valid)


def attend(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
    """Exact attention over the valid keys; a row without any valid key gives zeros."""
    if valid is None:
        return functional.scaled_dot_product_attention(query, key, value)
    some = valid.any(dim=-1)[:, None, None, None]
    visible = valid[:, None, None, :] | ~some  # an empty row would give NaN, and NaN gradients
    out = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible.expand(-1, 1, query.shape[2], -1)
    )
    return torch.where(some, out, torch.zeros_like(out))


class Feedforward(nn.Sequential):
    def __init__(self, dim: int, ratio: float) -> None:
        hidden = int(dim * ratio)
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class SelfAttention(nn.Module):
    """Attention of a stream to itself."""

    def __init__(self, *, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.project = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Latent) -> Float[Tensor, "batch token feature"]:
        query, key, value = (
            split_heads(part, self.num_heads) for part in self.project(x.features).chunk(3, dim=-1)
        )
        query = rotate(query, x.turn)
        key = rotate(key, x.turn)
        return self.out(merge_heads(attend(query, key, value, x.valid)))


class CrossAttention(nn.Module):
    """Attention of one set of tokens to another; `zero_init` starts it as a no-op."""

    def __init__(self, *, dim: int, context_dim: int, num_heads: int, zero_init: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(context_dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        if zero_init:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, x: Latent, context: Latent) -> Float[Tensor, "batch token feature"]:
        key, value = (
            split_heads(part, self.num_heads)
            for part in self.key_value(context.features).chunk(2, dim=-1)
        )
        query = rotate(split_heads(self.query(x.features), self.num_heads), x.turn)
        key = rotate(key, context.turn)
        return self.out(merge_heads(attend(query, key, value, context.valid)))


class EncoderBlock(nn.Module):
    """One layer of one stream: self-attention and coupling to every other stream, feedforward.

    `coupled_dims`: width of every other stream, by its name. A stream that is absent at
    inference is left out of the coupling.
    """

    def __init__(
        self, *, dim: int, num_heads: int, ratio: float, coupled_dims: dict[str, int]
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim=dim, num_heads=num_heads)
        self.coupling = nn.ModuleDict(
            {
                name: CrossAttention(
                    dim=dim, context_dim=other, num_heads=num_heads, zero_init=True
                )
                for name, other in coupled_dims.items()
            }
        )
        self.feedforward_norm = nn.LayerNorm(dim)
        self.feedforward = Feedforward(dim, ratio)

    def forward(self, x: Latent, normed: dict[str, Latent]) -> Latent:
        """`normed`: every stream's latents after that stream's `norm` of the same layer."""
        own = x.with_features(self.norm(x.features))
        features = x.features + self.attention(own)
        for name, couple in self.coupling.items():
            if name in normed:
                features = features + couple(own, normed[name])
        return x.with_features(features + self.feedforward(self.feedforward_norm(features)))


class DecoderBlock(nn.Module):
    """One layer of a decoder: queries attend to each other, then to one encoder layer."""

    def __init__(self, *, dim: int, num_heads: int, ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim=dim, num_heads=num_heads)
        self.cross_norm = nn.LayerNorm(dim)
        self.memory_norm = nn.LayerNorm(dim)
        self.cross = CrossAttention(dim=dim, context_dim=dim, num_heads=num_heads, zero_init=False)
        self.feedforward_norm = nn.LayerNorm(dim)
        self.feedforward = Feedforward(dim, ratio)

    def forward(self, queries: Latent, memory: Latent) -> Latent:
        x = queries.features
        x = x + self.attention(queries.with_features(self.norm(x)))
        context = memory.with_features(self.memory_norm(memory.features))
        x = x + self.cross(queries.with_features(self.cross_norm(x)), context)
        return queries.with_features(x + self.feedforward(self.feedforward_norm(x)))
