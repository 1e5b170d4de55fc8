"""The same network written plainly, as the yardstick of a training step: three linear maps for
queries, keys and values instead of one, attention as two products and a softmax instead of a fused
kernel, one linear map for each member of the ensemble instead of one for all."""

import copy

import torch
from einops import rearrange
from torch import Tensor, nn

from atmossl.model.attention import CrossAttention, SelfAttention
from atmossl.model.embedding import Tail
from atmossl.model.layout import Latent
from atmossl.model.multiformer import Multiformer
from atmossl.model.positions import merge_heads, rotate, split_heads


def plain_attention(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
    score = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if valid is not None:
        score = score.masked_fill(~valid[:, None, None, :], -1e30)
    return torch.softmax(score, dim=-1) @ value


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.copy_(bias)
    return made


def split_linear(fused: nn.Linear, parts: int) -> list[nn.Linear]:
    pairs = zip(fused.weight.chunk(parts), fused.bias.chunk(parts), strict=True)
    return [linear(weight, bias) for weight, bias in pairs]


class PlainAttention(nn.Module):
    """Full attention of a stream to itself or to another one."""

    def __init__(self, fused: SelfAttention | CrossAttention) -> None:
        super().__init__()
        self.num_heads = fused.num_heads
        if isinstance(fused, SelfAttention):
            self.query, self.key, self.value = split_linear(fused.project, 3)
        else:
            self.query = fused.query
            self.key, self.value = split_linear(fused.key_value, 2)
        self.out = fused.out

    def forward(self, x: Latent, context: Latent | None = None) -> Tensor:
        context = x if context is None else context
        query = rotate(split_heads(self.query(x.features), self.num_heads), x.turn)
        key = rotate(split_heads(self.key(context.features), self.num_heads), context.turn)
        value = split_heads(self.value(context.features), self.num_heads)
        return self.out(merge_heads(plain_attention(query, key, value, context.valid)))


class PlainProjection(nn.Module):
    """One linear map for each member."""

    def __init__(self, fused: nn.Linear, num_members: int) -> None:
        super().__init__()
        self.members = nn.ModuleList(split_linear(fused, num_members))

    def forward(self, decoded: Tensor) -> Tensor:
        patches = torch.stack([member(decoded) for member in self.members], dim=-2)
        return rearrange(patches, "batch query member patch -> batch query (member patch)")


def unfused(model: Multiformer) -> Multiformer:
    """A copy that computes the same, plainly; `attention=full` only."""
    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        for name, child in module.named_children():
            if isinstance(child, SelfAttention | CrossAttention):
                setattr(module, name, PlainAttention(child))
        if isinstance(module, Tail):
            module.project = PlainProjection(module.project, module.num_members)  # type: ignore
        if isinstance(module, nn.ModuleDict):
            for name, child in module.items():
                if isinstance(child, CrossAttention):
                    module[name] = PlainAttention(child)
    return plain
