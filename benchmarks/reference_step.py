"""The same network written plainly, as the yardstick of a training step: three linear maps for
queries, keys and values instead of one, attention as two products and a softmax instead of a fused
kernel, one linear map for each member of the ensemble instead of one for all, one stream after the
other, torch's own linear layer, and losses as their formulas read."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from atmossl.batch import StreamPrediction, StreamTokens
from atmossl.model.blocks import (
    CrossAttention,
    EncoderLayer,
    SelfAttention,
    merge_heads,
    rotate,
    split_heads,
)
from atmossl.model.embedding import Tail
from atmossl.model.multiformer import Multiformer
from atmossl.model.network import Latent, Linear, TokenPlace
from atmossl.objectives.masked import MaskedModelling, hidden_values


def plain_attention(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
    score = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if valid is not None:
        score = score.masked_fill(~valid[:, None, None, :], -1e30)
    return torch.softmax(score, dim=-1) @ value


def split_linear(fused: nn.Linear, parts: int) -> list[nn.Linear]:
    """torch's own linear layers, each with its part of the rows."""
    size, has_bias = fused.out_features // parts, fused.bias is not None
    made = [nn.Linear(fused.in_features, size, bias=has_bias) for _ in range(parts)]
    with torch.no_grad():
        for layer, weight in zip(made, fused.weight.chunk(parts), strict=True):
            layer.weight.copy_(weight)
        for layer, bias in zip(made, fused.bias.chunk(parts) if has_bias else (), strict=False):
            layer.bias.copy_(bias)
    return made


class PlainAttention(nn.Module):
    """Full attention of a stream to itself or to another one."""

    def __init__(self, fused: SelfAttention | CrossAttention) -> None:
        super().__init__()
        self.num_heads = fused.num_heads
        if isinstance(fused, SelfAttention):
            self.query, self.key, self.value = split_linear(fused.project, 3)
        else:
            (self.query,) = split_linear(fused.query, 1)
            self.key, self.value = split_linear(fused.key_value, 2)
        (self.out,) = split_linear(fused.out, 1)

    def forward(self, x: Latent, context: Latent | None = None) -> Tensor:
        context = x if context is None else context
        query = split_heads(self.query(x.features), self.num_heads)
        key = split_heads(self.key(context.features), self.num_heads)
        width = query.shape[-1]
        query, key = rotate(query, x.place.turns[width]), rotate(key, context.place.turns[width])
        value = split_heads(self.value(context.features), self.num_heads)
        return self.out(merge_heads(plain_attention(query, key, value, context.valid)))


class PlainTail(nn.Module):
    """One linear map for each member."""

    scale: Tensor

    def __init__(self, fused: Tail) -> None:
        super().__init__()
        self.norm, self.linear = fused.norm, split_linear(fused.linear, 1)[0]
        self.members = nn.ModuleList(split_linear(fused.project, fused.num_members))
        self.register_buffer("scale", fused.scale)

    def forward(self, decoded: Tensor, embedded: Tensor, guess: Tensor, level: Tensor) -> Tensor:
        normed = self.norm(decoded)
        departures = torch.stack([member(normed) for member in self.members], dim=2)
        departures = departures + self.linear(embedded)[:, :, None]
        return guess[:, :, None] + departures * self.scale[level][:, :, None]


class PlainLoss(MaskedModelling):
    """AtmoRep's two losses of an ensemble (their weights are 1), each as its formula reads."""

    def stream_loss(self, stream: StreamTokens, predicted: StreamPrediction) -> tuple[Tensor, None]:
        target, weight, _ = hidden_values(stream)
        members, valid = predicted.members, predicted.queries.valid[..., None]
        squared = ((members - target[:, :, None]) ** 2).mean(dim=2)
        std = (members.var(dim=2) + 1e-6).sqrt()
        likelihood = torch.exp(-0.5 * ((target - members.mean(dim=2)) / std) ** 2)
        values = squared + (1 - likelihood) ** 2 + std.sqrt()
        return (values * weight * valid).sum() / (weight * valid).sum(), None


class PlainLayer(nn.Module):
    """One encoder layer, stream by stream."""

    def __init__(self, fused: EncoderLayer) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(dict(fused.items()))

    def forward(
        self, features: dict[str, Tensor], places: Mapping[str, TokenPlace]
    ) -> dict[str, Tensor]:
        normed = {}
        for name, x in features.items():
            block: Any = self.blocks[name]
            normed[name] = Latent(block.norm(x), places[name])
        return {name: self._block(name, x, normed) for name, x in features.items()}

    def _block(self, name: str, x: Tensor, normed: dict[str, Latent]) -> Tensor:
        block: Any = self.blocks[name]
        x = x + block.attention(normed[name])
        for other, couple in block.coupling.items():
            if other in normed:
                x = x + couple(normed[name], normed[other])
        inner = Latent(block.feedforward_norm(x), normed[name].place)
        return x + block.feedforward(inner)


def unfused(model: Multiformer) -> Multiformer:
    """A copy that computes the same, plainly; `attention=full` only."""
    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        for name, child in module.named_children():
            if isinstance(child, EncoderLayer):
                module.register_module(name, PlainLayer(child))
            elif isinstance(child, SelfAttention | CrossAttention):
                module.register_module(name, PlainAttention(child))
            elif isinstance(child, Tail):
                module.register_module(name, PlainTail(child))
            elif isinstance(child, Linear):
                module.register_module(name, split_linear(child, 1)[0])
    return plain
