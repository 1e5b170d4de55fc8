"""Masked token modelling: predict the hidden tokens of every stream (BERT, AtmoRep; MAE when the
hidden tokens are dropped instead of masked)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from atmossl.batch import Batch, Losses, StreamPrediction, StreamTokens, View
from atmossl.losses import LOSSES, Ensemble
from atmossl.objectives.base import global_mean
from atmossl.tokens import patch_weights

Weighting = Literal["departure", "uniform"]


class MaskedModelling:
    """Weighted sum of losses over the hidden tokens of all predicted streams.

    losses: weight by name of a loss in `atmossl.losses.LOSSES`.
    weighting: `departure` measures every variable and level in units of its typical departure
        from the first guess (as GraphCast weighs by the inverse variance of time differences,
        Lam et al. 2023), `uniform` in units of its standard deviation.
    latitude_weighted: weigh every value by the area of its cell.
    scales: per predicted stream [level, patch], what `departure` divides by.
    """

    def __init__(
        self,
        *,
        losses: Mapping[str, float],
        weighting: Weighting = "departure",
        latitude_weighted: bool = True,
        scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        unknown = sorted(set(losses) - set(LOSSES))
        if unknown or not losses:
            raise ValueError(f"objective.losses has unknown {unknown}; valid: {sorted(LOSSES)}")
        self.losses = dict(losses)
        self.latitude_weighted = latitude_weighted
        self.scales = dict(scales or {}) if weighting == "departure" else {}
        self._values = self._elementwise

    def compile(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile what goes over all members, which are large: a few passes instead of many."""
        self._values = torch.compile(self._elementwise, backend=backend)

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        (view,) = batch.views
        prediction = model(view)
        parts, total, weights = [], 0.0, 0.0
        streams = predicted_streams(view)
        means = [None] * len(streams) if batch.mean_weight is None else batch.mean_weight.unbind()
        for stream, predicted, mean in zip(streams, prediction.streams, means, strict=True):
            loss = self.stream_loss(stream, predicted, mean)
            parts.append((stream.spec.name, loss))
            total = total + stream.spec.loss_weight * loss
            weights += stream.spec.loss_weight
        assert isinstance(total, Tensor), "no stream with role predict"
        return Losses(total / weights, tuple(parts), prediction)

    def stream_loss(
        self, stream: StreamTokens, predicted: StreamPrediction, mean_weight: Tensor | None = None
    ) -> Tensor:
        """Mean loss over the valid hidden values of one stream, weighted by cell area."""
        target, weight, level = hidden_values(stream, latitude_weighted=self.latitude_weighted)
        scale = self.scales.get(stream.spec.name)
        if scale is not None:
            scale = scale.to(target, non_blocking=True)[level]
        weight = weight * predicted.queries.valid[..., None].to(weight)
        return global_mean(self._values(predicted.members, target, scale), weight, mean_weight)

    def _elementwise(
        self,
        members: Float[Tensor, "batch query member patch"],
        target: Float[Tensor, "batch query patch"],
        scale: Float[Tensor, "batch query patch"] | None,
    ) -> Float[Tensor, "batch query patch"]:
        """Weighted sum of the losses of every value, in units of `scale`."""
        if scale is not None:
            members, target = members / scale[:, :, None], target / scale
        ensemble = Ensemble(members)
        values = sum(share * LOSSES[name](ensemble, target) for name, share in self.losses.items())
        assert isinstance(values, Tensor)
        return values


def predicted_streams(view: View) -> tuple[StreamTokens, ...]:
    return tuple(stream for stream in view.streams if stream.spec.role == "predict")


def hidden_values(
    stream: StreamTokens, *, latitude_weighted: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Truth [batch query patch], weights [batch query patch] and token level [batch query] of the
    stream's queries. The weight of what was never observed is 0."""
    assert stream.queries is not None, "collate the view first: token indices are missing"
    index = stream.queries.index
    flat = rearrange(
        stream.target, "batch level nt nlat nlon patch -> batch (level nt nlat nlon) patch"
    )
    target = flat.gather(1, index[..., None].expand(-1, -1, flat.shape[-1]))
    level = index // (stream.grid.num_tokens // stream.grid.shape[0])
    return target, _weights(stream, index, latitude_weighted), level


def _weights(stream: StreamTokens, index: Tensor, latitude_weighted: bool) -> Tensor:
    """Relative cell area, or 1, of the values of chosen tokens; 0 of what was never observed or
    is not asked for."""
    num_lon, num_lat = stream.grid.shape[3], stream.grid.shape[2]
    rows = patch_weights(stream.weight, stream.spec)
    row = index // num_lon % num_lat
    weight = rows.gather(1, row[..., None].expand(-1, -1, rows.shape[-1]))
    if not latitude_weighted:
        weight = torch.ones_like(weight)
    for counts in (stream.valid, stream.asked):
        if counts is not None:
            weight = weight * counts.flatten(1, 4).gather(1, index[..., None].expand_as(weight))
    return weight


def weigh_together(batches: Sequence[Batch], *, latitude_weighted: bool) -> list[Batch]:
    """Batches of one optimiser step, each of which knows the mean weight of all of them."""
    sums = []
    for batch in batches:
        (view,) = batch.views
        sums.append([hidden_weight(s, latitude_weighted) for s in predicted_streams(view)])
    mean = torch.tensor(sums).mean(dim=0)
    return [replace(batch, mean_weight=mean) for batch in batches]


def hidden_weight(stream: StreamTokens, latitude_weighted: bool) -> float:
    """Weight of all that a stream hides."""
    queries = stream.queries
    assert queries is not None, "collate the view first: token indices are missing"
    weight = _weights(stream, queries.index, latitude_weighted)
    return float((weight * queries.valid[..., None]).sum())
