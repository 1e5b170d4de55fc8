"""Objectives on pairs of views have this in common: two views of one place some hours apart, and
measures of their pooled latents."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated

import torch
from jaxtyping import Bool
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.nn import functional

from atmossl.batch import Batch
from atmossl.latent_losses import alignment, gathered, rankme
from atmossl.losses import Losses
from atmossl.masking.base import MaskingSampler
from atmossl.masking.views import ViewSpec
from atmossl.settings import Hours


def _ascending(hours: tuple[float, ...]) -> tuple[float, ...]:
    if any(later <= earlier for earlier, later in pairwise(hours)):
        raise ValueError("give every lag once, the shortest first")
    return hours


LagHours = Annotated[
    tuple[Annotated[Hours, Field(gt=0.0)], ...],
    Field(min_length=1, alias="lag_time"),
    AfterValidator(_ascending),
]


def pair_views(
    lag_hours: Sequence[float], masking: MaskingSampler | None = None
) -> tuple[ViewSpec, ...]:
    """Two views: the sample's window, and the window of the same place some hours later. Their
    dates are not told, since dates alone would tell which states belong together and how far
    apart they are."""
    return ViewSpec(masking), ViewSpec(masking, tuple(lag_hours), tells_time=False)


def perceptron(num_in: int, num_hidden: int, num_out: int) -> nn.Sequential:
    """Two linear layers with LayerNorm between them. (Batch norm would tell a sample of the
    others in its batch.)"""
    return nn.Sequential(
        nn.Linear(num_in, num_hidden),
        nn.LayerNorm(num_hidden),
        nn.GELU(),
        nn.Linear(num_hidden, num_out),
    )


@torch.no_grad()
def close_in_time(batch: Batch, hours: float) -> Bool[Tensor, "sample sample"]:
    """Which samples of all ranks have views less than `hours` apart, whatever their run and
    place."""
    starts = [view.start_hours for view in batch.views]
    assert all(start is not None for start in starts), "the views are of one time"
    times = gathered(torch.stack(starts, dim=1))  # type: ignore[arg-type]  # [sample view]
    apart = (times[:, None, :, None] - times[None, :, None, :]).abs().amin(dim=(2, 3))
    return apart < hours


class PairMeasures:
    """The loss, and measures of the pooled latents of pairs that show a collapse."""

    def sums(self, batch: Batch, losses: Losses) -> dict[str, Tensor]:
        first, second = (pooled.double() for pooled in losses.pooled)
        both = torch.cat([first, second])
        distances = torch.pdist(functional.normalize(first, dim=-1)).pow(2)
        count = torch.ones((), device=both.device, dtype=both.dtype)
        return {
            "loss": torch.stack([losses.total.double(), count]),
            "products": both.mT @ both,
            "totals": both.sum(dim=0),
            "states": count * len(both),
            "alignment": alignment(first, second) * len(first),
            "squares": (first - second).pow(2).sum(),
            "closeness": distances.mul(-2).exp().sum(),
            "others": count * len(distances),
        }

    def values(self, sums: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The measures by task, and their mean over tasks.

        pair_loss: the loss. rank: RankMe of the latents' departures from their mean. pair_distance:
        mean squared distance of pairs over that of any two states, 1 if pairs are nothing special.
        alignment, uniformity: of directions (Wang and Isola 2020).
        """
        return by_task_and_mean({task: _measures(of_task) for task, of_task in sums.items()})


def by_task_and_mean(by_task: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Measures under the keys `NAME/TASK`, and their means over the tasks under `NAME/mean`."""
    names = next(iter(by_task.values()))
    values = {f"{name}/{task}": by_task[task][name] for name in names for task in by_task}
    means = {
        f"{name}/mean": torch.stack([measures[name] for measures in by_task.values()]).mean()
        for name in names
    }
    return values | means


def _measures(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    states, mean = sums["states"], sums["totals"] / sums["states"]
    covariance = sums["products"] / states - torch.outer(mean, mean)
    variances = torch.linalg.eigvalsh(covariance).clamp_min(0.0)
    pairs, tiny = states / 2, torch.finfo(mean.dtype).tiny
    measures = {
        "pair_loss": sums["loss"][0] / sums["loss"][1],
        "rank": rankme(torch.diag(variances.sqrt())),
        "pair_distance": sums["squares"] / pairs / (2 * variances.sum()).clamp_min(tiny),
        "alignment": sums["alignment"] / pairs,
        "uniformity": (sums["closeness"] / sums["others"].clamp_min(1.0)).clamp_min(tiny).log(),
    }
    return {name: value.float() for name, value in measures.items()}
