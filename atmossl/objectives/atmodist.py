"""AtmoDist (Hoffmann and Lessig 2022, arXiv 2202.01897): the network learns to tell how much
time lies between two states of the same place."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from atmossl.batch import Batch
from atmossl.losses import Losses
from atmossl.masking.base import hide_nothing
from atmossl.masking.views import ViewSpec
from atmossl.model.network import Latents, Network
from atmossl.objectives.base import Ability, Metric, Monitor, Objective
from atmossl.objectives.pairs import (
    LagHours,
    PairMeasures,
    by_task_and_mean,
    pair_views,
    perceptron,
)


class AtmoDist(Objective):
    """Classifies the lag between two views of a place, out of `lag_hours`, by cross entropy.
    Nothing is hidden in the views.

    Latents of the earlier and the later state are put side by side token by token, compared by two
    layers, averaged over the sphere, and classified. It begins with equal chances for all lags.

    compare_dim: width of the layers that compare.
    """

    monitor = Monitor("pair_loss/mean")
    provides: ClassVar[frozenset[Ability]] = frozenset({"embed", "distance"})
    ends = ("classify",)

    def __init__(
        self,
        *,
        network: Network,
        lag_hours: Annotated[LagHours, Field(min_length=2, alias="lag_time")],
        compare_dim: Annotated[int, Field(gt=0)] = 128,
    ) -> None:
        super().__init__()
        self.lag_hours = lag_hours
        self.compare = nn.ModuleDict(
            {
                name: perceptron(2 * width, compare_dim, compare_dim)
                for name, width in network.widths.items()
            }
        )
        self.classify = nn.Linear(compare_dim, len(lag_hours))
        for parameter in self.classify.parameters():
            nn.init.zeros_(parameter)

    @classmethod
    def views_of(cls, arguments: Mapping[str, Any]) -> tuple[ViewSpec, ...]:
        return pair_views(arguments["lag_hours"], masking=hide_nothing)

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return {"validation": LagMeasures(self.lag_hours)}

    def forward(self, network: Network, batch: Batch) -> Losses:
        first, second = (network.encode(view) for view in batch.views)
        scores = self.classify(self._compared(first, second)).float()
        value = functional.cross_entropy(scores, lag_class(batch, self.lag_hours))
        pooled = tuple(network.pool(latents).float() for latents in (first, second))
        return Losses((("lag", value),), (1.0,), pooled=pooled, scores=scores)

    def _compared(self, first: Latents, second: Latents) -> Float[Tensor, "batch feature"]:
        """The comparison of two sets of latents: the mean over tokens, weighted by area, and
        over streams."""
        means = []
        for name, early in first.items():
            pairs = torch.cat([early.last, second[name].last], dim=-1)
            weight = early.areas()[..., None]
            compared = self.compare[name](pairs).float() * weight
            means.append(compared.sum(dim=1) / weight.sum(dim=1).clamp_min(1e-12))
        return torch.stack(means).mean(dim=0)


def lag_class(batch: Batch, lag_hours: tuple[float, ...]) -> Int[Tensor, "batch"]:
    """The class of every sample: which of the lags it has."""
    lags = batch.lag_hours
    return (lags[:, None] - lags.new_tensor(lag_hours)).abs().argmin(dim=1)


class LagMeasures:
    """How well the network tells the lag, beside the measures that all objectives on pairs log."""

    def __init__(self, lag_hours: tuple[float, ...]) -> None:
        self.lag_hours = lag_hours

    def sums(self, batch: Batch, losses: Losses) -> dict[str, Tensor]:
        """One batch's table `counts` [true predicted] of samples, for every pair of lags."""
        assert losses.scores is not None
        num_lags = len(self.lag_hours)
        true, predicted = lag_class(batch, self.lag_hours), losses.scores.argmax(dim=1)
        counts = torch.bincount(true * num_lags + predicted, minlength=num_lags**2)
        sums = PairMeasures().sums(batch, losses)
        return sums | {"counts": counts.view(num_lags, num_lags).to(sums["totals"])}

    def values(self, sums: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The measures by task, and their mean over tasks.

        lag_accuracy: share of samples whose lag is told. lag_within_one: or the next shorter or
        longer one of the list (ordinal accuracy). lag_error_hours: mean absolute error.
        """
        by_task = {task: self._measures(of_task["counts"]) for task, of_task in sums.items()}
        return PairMeasures().values(sums) | by_task_and_mean(by_task)

    def _measures(self, counts: Tensor) -> dict[str, Tensor]:
        shares = (counts / counts.sum()).float()
        lags = shares.new_tensor(self.lag_hours)
        rank = torch.arange(len(lags), device=lags.device)
        near = (rank[:, None] - rank).abs() <= 1
        return {
            "lag_accuracy": shares.diagonal().sum(),
            "lag_within_one": shares[near].sum(),
            "lag_error_hours": (shares * (lags[:, None] - lags).abs()).sum(),
        }
