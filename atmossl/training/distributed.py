"""Tensors that may be spread over ranks, seen as whole ones."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; a plain one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A full tensor, the same on all ranks, spread as the parameter is."""
    if not isinstance(parameter, DTensor):
        return tensor
    mesh = parameter.device_mesh
    replicated = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=parameter.placements)


@torch.no_grad()
def clip_gradients(parameters: Iterable[torch.nn.Parameter], limit: float) -> Tensor:
    """Scale the gradients to a total norm of at most `limit`; returns the norm before.

    A norm that is not finite makes all gradients 0: one bad batch must not ruin the weights. The
    device is not waited for.
    """
    chosen = [p for p in parameters if p.grad is not None]
    gradients = [p.grad for p in chosen if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients))
    torch.nn.utils.clip_grads_with_norm_(chosen, limit, norm)
    bad = ~torch.isfinite(norm)
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.masked_fill_(bad, 0.0)
    return norm


def random_states() -> list[dict[str, Tensor]]:
    """State of torch's generators on every rank, in their order: of the host and of the device."""
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    if not dist.is_initialized():
        return [own]
    states: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(states, own)
    return states


def set_random_state(states: list[dict[str, Tensor]]) -> None:
    """Go on from this rank's saved state; a rank beyond those that saved keeps its own."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank >= len(states):
        return
    torch.set_rng_state(states[rank]["cpu"].cpu())
    if "cuda" in states[rank] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[rank]["cuda"].cpu())
