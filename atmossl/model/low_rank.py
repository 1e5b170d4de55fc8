"""Fine-tuning by thin matrices beside frozen layers (LoRA, Hu et al. 2021, arXiv 2106.09685)."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float
from torch import Tensor, nn

from atmossl.model.linear import Linear, linear

_DOWN, _UP = ".down", ".up"  # ends of the names of the two matrices
LOW_RANK = (f"*{_DOWN}", f"*{_UP}")


class LowRankLinear(Linear):
    """x (W + U D)^T + b with D [rank, in] and U [out, rank]; U starts at 0, so that the layer is
    at first what it was."""

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
    """Put thin matrices, whose names match `LOW_RANK`, beside the linear layers that are named.

    Raises:
        ValueError: a pattern that matches no linear layer, or a layer that is not wider than rank.
    """
    found = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    for pattern in layers:
        if not any(fnmatchcase(name, pattern) for name in found):
            rooms = sorted({".".join(name.split(".")[:2]) + ".*" for name in found})
            raise ValueError(
                f"warm_start.low_rank.layers: {pattern!r} matches no linear layer; valid: patterns "
                f"of names such as {rooms}"
            )
    for name, layer in found.items():
        if not any(fnmatchcase(name, pattern) for pattern in layers):
            continue
        narrow = min(layer.in_features, layer.out_features)
        if rank >= narrow:
            raise ValueError(
                f"warm_start.low_rank.rank={rank} is not below the width {narrow} of {name}"
            )
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, LowRankLinear(layer, rank))


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the plain network that computes the same."""
    plain = dict(weights)
    for name in weights:
        if name.endswith(_DOWN):
            layer = name.removesuffix(_DOWN)
            down, up = plain.pop(name), plain.pop(layer + _UP)
            plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + up @ down
    return plain
