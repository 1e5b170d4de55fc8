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
    values: Float[Tensor, "*batch"],
    weight: Float[Tensor, "*batch"],
    mean_weight: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """This batch's share of the weighted mean over all batches of an optimiser step, on all ranks
    and accumulated one after the other: the mean of the shares is the mean over all values, however
    unequal the batches' weights are; 0 where no weight is left. Gradients are averaged over ranks
    and over accumulated batches, so they are those of one batch that holds all. Where there is one
    batch, it is the plain weighted mean.

    mean_weight: of this rank's accumulated batches; None: there is one.
    """
    total = weight.sum().detach() if mean_weight is None else mean_weight
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        total = total / dist.get_world_size()
        dist.all_reduce(total)
    return weighted_mean(values, weight, total)
