"""Joint-embedding prediction (I-JEPA, Assran et al. 2023, arXiv 2301.08243): for the hidden
tokens, the network predicts latents instead of values."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from atmossl.batch import Batch, View
from atmossl.latent_losses import batch_anomalies, gathered, sigreg
from atmossl.losses import LatentPrediction, Losses, weighted_mean
from atmossl.masking.base import hide_nothing
from atmossl.model.network import Latents, Network, gather
from atmossl.objectives.base import Ability, Metric, Monitor, Objective, ViewSpec
from atmossl.objectives.masked import hidden_areas, predicted_streams
from atmossl.objectives.position_means import (
    position_bins,
    position_ratios,
    position_sums,
    split_positions,
)
from atmossl.objectives.teacher import Momentum, follow, momentum_at, teacher_of

AntiCollapse = Literal["teacher", "sigreg"]
Distance = Literal["smooth_l1", "l1"]
Positive = Annotated[int, Field(gt=0)]


class JointEmbedding(Objective):
    """The distance of predicted latents of the hidden tokens to the latents of the whole window.

    The network encodes the visible tokens and predicts the latents of the hidden ones. Two ways
    keep the latents of the whole window, the targets, from becoming all the same:
    `anti_collapse=teacher`: they are those of a moving average of the network, without gradients,
    normalised over their features. `anti_collapse=sigreg`: they are the network's own, with
    gradients, and their anomalies from the mean of every position over the batch of all devices
    are made standard normal (LeJEPA, Balestriero and LeCun 2025, arXiv 2511.08544). It takes
    anomalies, for latents that depend on the position alone are normal, too.

    distance: `smooth_l1`, which is quadratic below `smooth_below`, or `l1`.
    momentum: how much of the teacher stays at a step, from the first to the last of
        `momentum_steps` optimiser steps along half a cosine.
    sigreg_share: of the regulariser in the loss. num_directions: along which normality is tested;
        drawn anew for every optimiser step. sigreg_tokens: how many tokens of a sample are tested.
    """

    views = (ViewSpec(), ViewSpec(masking=hide_nothing))
    monitor = Monitor("latent_ratio/mean")
    provides: ClassVar[frozenset[Ability]] = frozenset({"embed"})

    steps: Tensor

    def __init__(
        self,
        *,
        network: Network,
        momentum: Momentum,
        momentum_steps: Positive,
        distance: Distance = "smooth_l1",
        smooth_below: Annotated[float, Field(gt=0.0)] = 1.0,
        anti_collapse: AntiCollapse = "teacher",
        sigreg_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05,
        num_directions: Positive = 64,
        sigreg_tokens: Positive = 32,
    ) -> None:
        super().__init__()
        self.momentum, self.momentum_steps = momentum, momentum_steps
        self.distance: Distance = distance
        self.smooth_below = smooth_below
        self.teacher = teacher_of(network) if anti_collapse == "teacher" else None
        self.sigreg_share, self.sigreg_tokens = sigreg_share, sigreg_tokens
        if self.teacher is None:
            for name, width in network.widths.items():
                self.register_buffer(f"directions_{name}", torch.empty(width, num_directions))
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
            self._draw_directions(0)

    @classmethod
    def compares_by(cls, arguments: Mapping[str, Any]) -> bool:
        return arguments["anti_collapse"] == "sigreg"

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return {"validation": LatentRatios()}

    @property
    def blocks(self) -> tuple[torch.nn.Module, ...]:
        return () if self.teacher is None else self.teacher.blocks

    def train(self, mode: bool = True) -> "JointEmbedding":
        """The teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, network: Network, batch: Batch) -> Losses:
        view, whole = batch.views
        predicted = network.predict(network.encode(view), view)
        targets = self._targets(network, whole)
        pairs, terms, factors = [], [], []
        for stream in predicted_streams(view):
            name = stream.spec.name
            latents, weight = predicted[name].last.float(), hidden_areas(stream)
            target = gather(targets[name].last, predicted[name].chosen).float()
            if self.teacher is not None:
                target = functional.layer_norm(target, target.shape[-1:])
            distances = self._distances(latents, target).mean(dim=-1)
            terms.append((name, weighted_mean(distances, weight)))
            factors.append(stream.spec.loss_weight)
            target, bins = target.detach(), position_bins(stream.grid, predicted[name].chosen)
            pairs.append(LatentPrediction(name, latents, target, weight, bins))
        if self.teacher is None:
            terms.append(("sigreg", self._departure_from_normal(targets)))
            factors.append(sum(factors) * self.sigreg_share / (1 - self.sigreg_share))
        return Losses(tuple(terms), tuple(factors), latents=tuple(pairs))

    def _targets(self, network: Network, whole: View) -> Latents:
        if self.teacher is None:
            return network.encode(whole)
        with torch.no_grad():
            return self.teacher.encode(whole)

    def _distances(self, predicted: Tensor, target: Tensor) -> Tensor:
        if self.distance == "l1":
            return functional.l1_loss(predicted, target, reduction="none")
        return functional.smooth_l1_loss(
            predicted, target, reduction="none", beta=self.smooth_below
        )

    def _departure_from_normal(self, targets: Latents) -> Float[Tensor, ""]:
        """The departure of latents from a normal distribution: SIGReg of their anomalies, at
        tokens that change from step to step; the mean over streams."""
        values = []
        for name, latents in targets.items():
            tokens = latents.last
            count = min(self.sigreg_tokens, tokens.shape[1])
            spread = torch.arange(count, device=tokens.device) * (tokens.shape[1] // count)
            with torch.autocast(tokens.device.type, enabled=False):
                chosen = tokens[:, (spread + self.steps) % tokens.shape[1]].float()
                anomalies = batch_anomalies(gathered(chosen)).flatten(0, 1)
                values.append(sigreg(anomalies, getattr(self, f"directions_{name}")))
        return torch.stack(values).mean()

    def weights(self, batch: Batch) -> Float[Tensor, "term"]:
        """The area of all hidden tokens of every predicted stream; for the regulariser all
        batches count the same."""
        areas = [hidden_areas(s).sum() for s in predicted_streams(batch.views[0])]
        return torch.stack(areas if self.teacher is not None else [*areas, areas[0].new_ones(())])

    def after_step(self, network: Network, step: int) -> None:
        if self.teacher is None:
            self._draw_directions(step)
            return
        momentum = momentum_at(step, self.momentum_steps, self.momentum)
        follow(self.teacher.parameters(), network.parameters(), momentum)

    def _draw_directions(self, step: int) -> None:
        """Random directions, a function of the step alone, so that all devices test along the
        same ones."""
        generator = torch.Generator().manual_seed(step)
        for name, buffer in self.named_buffers(recurse=False):
            if name.startswith("directions_"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
        self.steps.fill_(step)


class LatentRatios:
    """The RMSE of predicted latents over the standard deviation of the teacher's latents of all
    tokens: 1 for a constant prediction, near 1 or above if the latents have collapsed."""

    def sums(self, batch: Batch, losses: Losses) -> dict[str, Tensor]:
        """By stream, for every feature: squared errors, targets, squared targets, and weights."""
        sums = {
            f"position:{pair.stream}": position_sums(
                pair.predicted, pair.target, pair.weight, pair.bins
            )
            for pair in losses.latents
        }
        for pair in losses.latents:
            weight = pair.weight[..., None]
            values = ((pair.predicted - pair.target) ** 2, pair.target, pair.target**2)
            kinds = [(weight * value).sum(dim=(0, 1)) for value in values]
            kinds.append(weight.sum().expand_as(kinds[0]))
            sums[pair.stream] = torch.stack(kinds)
        return sums

    def values(self, sums: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """`latent_ratio` by task and stream, and the mean over all, `latent_ratio/mean`.
        `position_ratio` likewise, for the error over that of the mean of every position."""
        by_position, sums = split_positions(sums)
        values = {}
        for task, by_stream in sums.items():
            for stream, (error, target, square, weight) in by_stream.items():
                variance = (square - target**2 / weight.clamp_min(1e-12)).sum()
                ratio = (error.sum() / variance.clamp_min(1e-12)).sqrt()
                values[f"latent_ratio/{task}/{stream}"] = ratio
        mean = torch.stack(list(values.values())).mean()
        return values | {"latent_ratio/mean": mean} | position_ratios(by_position)
