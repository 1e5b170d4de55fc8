"""The protocol of objectives, and the mean over what all ranks hide."""

from typing import Protocol

import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from atmossl.batch import Batch, Losses
from atmossl.losses import weighted_mean


class Objective(Protocol):
    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        """Losses of the model on one batch; `total` is minimised."""
        ...


def global_mean(
    values: Float[Tensor, "*batch"], weight: Float[Tensor, "*batch"]
) -> Float[Tensor, ""]:
    """This rank's share of the weighted mean over the batches of all ranks: the mean of the shares
    over the ranks is the mean over all values, however unequal the ranks' weights are; 0 where no
    weight is left. DDP and FSDP average gradients over ranks, which then are those of one rank
    with the whole batch. On one rank it is the plain weighted mean.
    """
    total = weight.sum().detach()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        total = total / dist.get_world_size()
        dist.all_reduce(total)
    return weighted_mean(values, weight, total)
