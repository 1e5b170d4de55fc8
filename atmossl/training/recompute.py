"""Activation checkpointing: activations are computed again in the backward pass instead of kept."""

from functools import cache
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

from atmossl.model.network import Network

Recompute = Literal["none", "selective", "full"]


def recompute(model: Network, kind: Recompute) -> None:
    """Turn on activation checkpointing for blocks (`full`), or for their wide parts alone
    (`selective`).

    `selective` drops the feedforward layers' activations, most of a block's, and keeps what
    attention made, the dearest to compute.
    A module becomes one of a subclass, as torch's `fully_shard` does it: names of parameters stay,
    and a copy of the model calls its own parts.
    """
    parts = {"none": (), "selective": model.wide_parts, "full": model.blocks}[kind]
    for module in parts:
        module.__class__ = _recomputed(type(module))


@cache
def _recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    """The same kind of module, with a forward pass that keeps nothing but its arguments."""

    def forward(self: nn.Module, *args: Any) -> Any:
        return checkpoint(kind.forward, self, *args, use_reentrant=False, preserve_rng_state=False)

    return type(f"Recomputed{kind.__name__}", (kind,), {"forward": forward})
