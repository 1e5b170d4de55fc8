"""Linear layers that use all of a CPU, and thin matrices beside frozen ones.

In float32 torch asks its BLAS, which leaves half of the vector units idle on some processors with
AVX-512; oneDNN, whose kernels torch brings along, does not. Without AVX-512 the BLAS is the faster
one by a tenth to a third. Sums are taken in another order, so that results agree to float32's
rounding, not bit for bit. Everything else (GPUs, bfloat16, compiled graphs, small products) goes
torch's own way.

The thin matrices are for fine-tuning (LoRA, Hu et al. 2021, arXiv 2106.09685).
"""

import math
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
FASTER = torch.backends.cpu.get_cpu_capability() == "AVX512"
_WORTH_IT = 2**22  # multiplications; below, the call costs more than the product


class Linear(nn.Linear):
    """`torch.nn.Linear`, by oneDNN where that is faster."""

    def forward(self, input: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch out"]:
        return linear(input, self.weight, self.bias)


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
                f"of names such as {rooms}"
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
