"""Tools for several ranks: sharded tensors as whole ones, gradient clipping, errors that all
ranks raise together, and random states."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; a plain tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A full tensor, the same on all ranks, sharded as the parameter is."""
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


@contextmanager
def failing_together(doing: str) -> Generator[None]:
    """A context in which an error on any rank is raised on all of them at its end: ranks would wait
    for ever for one that has left. The block must not contain collectives.

    Raises:
        OSError, ValueError: on every rank, with the first failing rank's number and words.
    """
    failure: OSError | ValueError | None = None
    try:
        yield
    except (OSError, ValueError) as error:
        failure = error
    words = None if failure is None else getattr(failure, "strerror", None) or str(failure)
    reason = None if words is None else (isinstance(failure, ValueError), words)
    reasons: list[tuple[bool, str] | None] = [reason]
    if dist.is_initialized():
        reasons = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, reason)
    for rank, reason_there in enumerate(reasons):
        if reason_there is not None:
            of_value, words = reason_there
            where = f" on rank {rank}" if len(reasons) > 1 else ""
            kind = ValueError if of_value else OSError
            raise kind(f"{doing} failed{where}: {words}") from failure


def random_states() -> list[dict[str, Tensor]]:
    """The states of torch's generators on host and device, for every rank in order."""
    rank_state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rank_state["cuda"] = torch.cuda.get_rng_state()
    if not dist.is_initialized():
        return [rank_state]
    states: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(states, rank_state)
    return states


def set_random_state(states: list[dict[str, Tensor]]) -> None:
    """Continue with this rank's saved state; a rank beyond those that saved keeps its own."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank >= len(states):
        return
    torch.set_rng_state(states[rank]["cpu"].cpu())
    if "cuda" in states[rank] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[rank]["cuda"].cpu())
