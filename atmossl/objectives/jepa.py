"""Joint-embedding prediction (I-JEPA, Assran et al. 2023, arXiv 2301.08243): predict latents that a
teacher has of the hidden tokens, not their values."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from atmossl.batch import Batch, LatentPrediction, Losses
from atmossl.losses import weighted_mean
from atmossl.masking.base import hide_nothing
from atmossl.model.layout import gather
from atmossl.model.network import Network
from atmossl.objectives.base import Ability, Metric, Monitor, Objective, ViewSpec
from atmossl.objectives.masked import hidden_areas, predicted_streams
from atmossl.objectives.teacher import Momentum, follow, momentum_at, teacher_of


class JointEmbedding(Objective):
    """Smooth L1 distance of predicted latents to the teacher's, which sees the whole window.

    The network encodes the visible tokens and predicts the latents of the hidden ones. The teacher
    is a moving average of the network, without gradients; its latents of the last layer are
    normalised over their features, so that they cannot shrink to nothing.

    momentum: how much of the teacher stays at a step, from the first to the last of
        `momentum_steps` optimiser steps along half a cosine.
    smooth_below: distance below which the loss is quadratic.
    """

    views = (ViewSpec(), ViewSpec(masking=hide_nothing))
    monitor = Monitor("latent_ratio/mean")
    provides: ClassVar[frozenset[Ability]] = frozenset({"embed"})

    def __init__(
        self,
        *,
        network: Network,
        momentum: Momentum,
        momentum_steps: Annotated[int, Field(gt=0)],
        smooth_below: Annotated[float, Field(gt=0.0)] = 1.0,
    ) -> None:
        super().__init__()
        self.teacher = teacher_of(network)
        self.momentum, self.momentum_steps = momentum, momentum_steps
        self.smooth_below = smooth_below

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return {"validation": LatentRatios()}

    @property
    def blocks(self) -> tuple[torch.nn.Module, ...]:
        return self.teacher.blocks

    def forward(self, network: Network, batch: Batch) -> Losses:
        view, whole = batch.views
        predicted = network.predict(network.encode(view), view)
        with torch.no_grad():
            targets = self.teacher.encode(whole)
        pairs, terms = [], []
        for stream in predicted_streams(view):
            name = stream.spec.name
            found, weight = predicted[name].last.float(), hidden_areas(stream)
            target = gather(targets[name].last, predicted[name].chosen).float()
            target = functional.layer_norm(target, target.shape[-1:])
            distance = functional.smooth_l1_loss(
                found, target, reduction="none", beta=self.smooth_below
            )
            terms.append((name, weighted_mean(distance.mean(dim=-1), weight)))
            pairs.append(LatentPrediction(name, found, target, weight))
        factors = tuple(stream.spec.loss_weight for stream in predicted_streams(view))
        return Losses(tuple(terms), factors, latents=tuple(pairs))

    def weights(self, batch: Batch) -> Float[Tensor, "stream"]:
        """Area of all hidden tokens of every predicted stream."""
        return torch.stack([hidden_areas(s).sum() for s in predicted_streams(batch.views[0])])

    def after_step(self, network: Network, step: int) -> None:
        momentum = momentum_at(step, self.momentum_steps, self.momentum)
        follow(self.teacher.parameters(), network.parameters(), momentum)


class LatentRatios:
    """RMSE of predicted latents over the standard deviation of the teacher's over all tokens: 1 for
    a constant, near 1 or above if the latents have collapsed to one."""

    def sums(self, batch: Batch, losses: Losses) -> dict[str, Tensor]:
        """By stream, for every feature: squared errors, targets, their squares, and weights."""
        del batch
        sums = {}
        for pair in losses.latents:
            weight = pair.weight[..., None]
            values = ((pair.predicted - pair.target) ** 2, pair.target, pair.target**2)
            kinds = [(weight * value).sum(dim=(0, 1)) for value in values]
            kinds.append(weight.sum().expand_as(kinds[0]))
            sums[pair.stream] = torch.stack(kinds)
        return sums

    def values(self, sums: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """By task and stream, and the mean over all, `latent_ratio/mean`."""
        values = {}
        for task, by_stream in sums.items():
            for stream, (error, target, square, weight) in by_stream.items():
                variance = (square - target**2 / weight.clamp_min(1e-12)).sum()
                ratio = (error.sum() / variance.clamp_min(1e-12)).sqrt()
                values[f"latent_ratio/{task}/{stream}"] = ratio
        mean = torch.stack(list(values.values())).mean()
        return values | {"latent_ratio/mean": mean}
