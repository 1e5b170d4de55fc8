"""Activation checkpointing: activations that are computed anew in the backward pass, not kept."""

from collections.abc import Callable
from typing import Any, Literal

from torch.utils.checkpoint import checkpoint

from atmossl.model.network import Network

Recompute = Literal["none", "selective", "full"]


def recompute(model: Network, kind: Recompute) -> None:
    """Let `full` blocks, or `selective` their wide parts alone, forget what is inside of them.

    `selective` drops the feedforward layers' activations, most of a block's, and keeps what
    attention made, the dearest to compute.
    Call it on the trained model after its averaged copy was made: a copy would call the original.
    """
    parts = {"none": (), "selective": model.wide_parts, "full": model.blocks}[kind]
    for module in parts:
        module.forward = _forgetting(module.forward)  # type: ignore[method-assign]


def _forgetting(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)

    return call
