"""The protocol of objectives."""

from typing import Protocol

from torch import nn

from atmossl.batch import Batch, Losses


class Objective(Protocol):
    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        """Losses of the model on one batch; `total` is minimised."""
        ...
