"""Masked token modelling: the network predicts the hidden tokens of every stream (BERT, AtmoRep;
MAE when hidden tokens are dropped instead of masked)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from atmossl.batch import (
    PRIMARY,
    Batch,
    StreamPrediction,
    StreamSpec,
    StreamTokens,
    View,
    detokenise,
    patch_weights,
)
from atmossl.losses import (
    FIELD_LOSSES,
    LOSSES,
    Ensemble,
    FieldEnsemble,
    Losses,
    LossName,
    weighted_mean,
)
from atmossl.model.network import StreamLatents, gather
from atmossl.objectives.base import Ability, Metric, Monitor, Objective
from atmossl.objectives.position_means import (
    position_bins,
    position_ratios,
    position_sums,
    split_positions,
)

Weighting = Literal["residual", "uniform"]
T = TypeVar("T")


class MaskedModelling(Objective):
    """A weighted sum of losses over the hidden tokens of all predicted streams.

    losses: weight by name of a loss in `atmossl.losses`: of single values, or of fields.
    weighting: `residual` measures every variable and level in units of its typical residual
        from the first guess (as GraphCast weighs by the inverse variance of time differences,
        Lam et al. 2023), `uniform` in units of its standard deviation.
    latitude_weighted: weigh every value by the area of its cell.
    scales: per predicted stream [level, patch], what `residual` divides by.
    """

    monitor = Monitor("rmse_ratio/mean")
    provides: ClassVar[frozenset[Ability]] = frozenset({"reconstruct", "embed"})

    def __init__(
        self,
        *,
        losses: Annotated[Mapping[LossName, float], Field(min_length=1)],
        weighting: Weighting = "residual",
        latitude_weighted: bool = True,
        scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.losses = dict(losses)
        self._field_losses = _chosen(FIELD_LOSSES, losses)
        self._elementwise_losses = _chosen(LOSSES, losses)
        self.latitude_weighted = latitude_weighted
        if weighting == "residual":  # in no checkpoint: its statistics tell them
            for name, scale in (scales or {}).items():
                self.register_buffer(f"scale_{name}", scale, persistent=False)
        self._values = self._elementwise

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return {"train": LevelErrors(), "validation": ErrorRatios()}

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile the losses that go over all members: the tensors are large, so a few passes
        instead of many count."""
        self._values = torch.compile(self._elementwise, backend=backend)

    def forward(self, network: Any, batch: Batch) -> Losses:
        (view,) = batch.views
        prediction = network(view)
        streams = predicted_streams(view)
        losses = [
            self.stream_loss(stream, predicted)
            for stream, predicted in zip(streams, prediction.streams, strict=True)
        ]
        terms = tuple((s.spec.name, loss) for s, (loss, _) in zip(streams, losses, strict=True))
        factors = tuple(stream.spec.loss_weight for stream in streams)
        weighted = [values for _, values in losses if values is not None]
        tells_samples = view.mask_kind is not None and bool(weighted)
        by_sample = _sums_by_sample(weighted) if tells_samples else None
        return Losses(terms, factors, prediction, by_sample=by_sample)

    def weights(self, batch: Batch) -> Float[Tensor, "stream"]:
        """The total weight of the hidden values of every predicted stream."""
        (view,) = batch.views
        return torch.stack([self._hidden_weight(stream) for stream in predicted_streams(view)])

    def _hidden_weight(self, stream: StreamTokens) -> Tensor:
        queries = stream.queries
        assert queries is not None, "collate the view first: token indices are missing"
        weight = _weights(stream, queries.index, self.latitude_weighted)
        return (weight * queries.valid[..., None].to(weight)).sum()

    def stream_loss(
        self, stream: StreamTokens, predicted: StreamPrediction
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Mean loss over the valid hidden values of one stream, weighted by cell area; and the
        losses of single values with their weights [batch query patch], None without such losses."""
        target, weight, level = hidden_values(stream, latitude_weighted=self.latitude_weighted)
        scale_of_level = getattr(self, f"scale_{stream.spec.name}", None)
        if scale_of_level is not None:
            scale_of_level = scale_of_level.to(target, non_blocking=True)
        scale = None if scale_of_level is None else scale_of_level[level]
        weight = weight * predicted.queries.valid[..., None].to(weight)
        loss, elementwise = torch.zeros((), device=target.device), None
        if self._elementwise_losses:
            elementwise = self._values(predicted.members, target, scale), weight
            loss = weighted_mean(*elementwise)
        if self._field_losses:
            completed = completed_fields(stream, predicted, weight, scale_of_level)
            for field_loss, share in self._field_losses:
                loss = loss + share * weighted_mean(*field_loss(completed))
        return loss, elementwise

    def _elementwise(
        self,
        members: Float[Tensor, "batch query member patch"],
        target: Float[Tensor, "batch query patch"],
        scale: Float[Tensor, "batch query patch"] | None,
    ) -> Float[Tensor, "batch query patch"]:
        """The weighted sum of the losses of every value, in units of `scale`."""
        if scale is not None:
            members, target = members / scale[:, :, None], target / scale
        ensemble = Ensemble(members)
        values = sum(share * loss(ensemble, target) for loss, share in self._elementwise_losses)
        assert isinstance(values, Tensor)
        return values


@torch.no_grad()
def _sums_by_sample(weighted: Sequence[tuple[Tensor, Tensor]]) -> Float[Tensor, "batch term two"]:
    """The sum of weighted losses, and the sum of weights, of every sample and stream. weighted: of
    every stream, losses and weights [batch query patch].

    weighted: of every stream, losses and weights [batch query patch].
    """
    axes = (1, 2)
    sums = [
        torch.stack([(values * weight).sum(axes), weight.sum(axes)], dim=-1)
        for values, weight in weighted
    ]
    return torch.stack(sums, dim=1)


class ErrorRatios:
    """The RMSE of the ensemble mean over that of the first guess, for every variable. Below 1
    the network knows more than its first guess."""

    def sums(self, batch: Batch, losses: Losses) -> dict[str, Tensor]:
        """Squared errors of the ensemble mean and of the first guess, by variable."""
        (view,), prediction, sums = batch.views, losses.prediction, {}
        assert prediction is not None
        for stream, predicted in zip(predicted_streams(view), prediction.streams, strict=True):
            target, weight, _ = hidden_values(stream)
            weight = weight * predicted.queries.valid[..., None]
            index = predicted.queries.index[..., None].expand_as(target)
            guess = stream.guess.flatten(1, 4).gather(1, index)
            mean = predicted.members.mean(dim=2)
            squares = [
                (weight * (field - target) ** 2).unflatten(-1, (len(stream.spec.variables), -1))
                for field in (mean, guess)
            ]
            for number, name in enumerate(stream.spec.variables):
                key = name if stream.spec.data == PRIMARY else f"{stream.spec.name}_{name}"
                errors = torch.stack([square[..., number, :].sum() for square in squares])
                sums[key] = sums[key] + errors if key in sums else errors  # of other levels
            bins = position_bins(stream.grid, predicted.queries)
            sums[f"position:{stream.spec.name}"] = position_sums(mean, target, weight, bins)
        return sums

    def values(self, sums: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """`rmse_ratio` by task and variable, its mean by task, and the mean over tasks,
        `rmse_ratio/mean`. `position_ratio` by task and stream, the RMSE over that of the mean of
        every position."""
        by_position, sums = split_positions(sums)
        values, means = position_ratios(by_position), []
        for task, by_variable in sums.items():
            ratios = {
                f"rmse_ratio/{task}/{name}": (square[0] / square[1]).sqrt()
                for name, square in by_variable.items()
                if square[1] > 0  # else the task gives this stream as it is
            }
            if ratios:
                means.append(torch.stack(list(ratios.values())).mean())
                values |= ratios | {f"rmse_ratio/{task}": means[-1]}
        return values | ({"rmse_ratio/mean": torch.stack(means).mean()} if means else {})


class LevelErrors:
    """The RMSE of the ensemble mean by stream and level, in standard deviations."""

    def sums(self, batch: Batch, losses: Losses) -> dict[str, Tensor]:
        (view,), prediction = batch.views, losses.prediction
        assert prediction is not None
        return {
            f"{stream.spec.name}_{level}": sums
            for stream, predicted in zip(predicted_streams(view), prediction.streams, strict=True)
            for level, sums in zip(
                stream.spec.level_values, level_sums(stream, predicted).mT, strict=True
            )
        }

    def values(self, sums: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {
            f"train/rmse_{name}": (square / weight).sqrt()
            for by_level in sums.values()
            for name, (square, weight) in by_level.items()
        }


def level_sums(
    stream: StreamTokens, predicted: StreamPrediction
) -> Float[Tensor, "two num_levels"]:
    """Weighted squared errors of the ensemble mean, and the weights, both summed by level."""
    spec = stream.spec
    target, weight, token_level = hidden_values(stream)
    weight = weight * predicted.queries.valid[..., None]
    squared = weight * (predicted.members.float().mean(dim=2) - target) ** 2
    inside = spec.token_size.level
    values = torch.stack([squared, weight.expand_as(squared)])
    values = reduce(
        values, "kind batch query (variable level point) -> (batch query) (kind level)", "sum",
        variable=len(spec.variables), level=inside,
    )  # fmt: skip
    sums = values.new_zeros(spec.num_levels // inside, values.shape[-1])
    sums.index_add_(0, token_level.flatten(), values)
    return rearrange(sums, "token (kind level) -> kind (token level)", kind=2)


def predicted_streams(view: View) -> tuple[StreamTokens, ...]:
    """The streams of a view whose hidden tokens are predicted."""
    return tuple(stream for stream in view.streams if stream.spec.role == "predict")


def hidden_areas(stream: StreamTokens) -> Float[Tensor, "batch query"]:
    """The area of the hidden tokens of a stream; 0 where the list is padded."""
    assert stream.queries is not None, "collate the view first: token indices are missing"
    return StreamLatents((), stream.queries, stream.grid).areas()


def hidden_values(
    stream: StreamTokens, *, latitude_weighted: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The truth [batch query patch], weights [batch query patch] and token level [batch query]
    of a stream's queries. Values that were never observed have weight 0."""
    assert stream.queries is not None, "collate the view first: token indices are missing"
    target = gather(stream.target.flatten(1, 4), stream.queries)
    weight = _weights(stream, stream.queries.index, latitude_weighted)
    return target, weight, stream.query_level


def _chosen(kinds: Mapping[Any, T], shares: Mapping[LossName, float]) -> list[tuple[T, float]]:
    """The losses of one kind whose share is not 0."""
    return [(kinds[name], share) for name, share in shares.items() if name in kinds]


def completed_fields(
    stream: StreamTokens,
    predicted: StreamPrediction,
    weight: Float[Tensor, "batch query patch"],
    scale: Float[Tensor, "level patch"] | None,
) -> FieldEnsemble:
    """The window of one stream with every member's values where something is hidden, and the truth
    elsewhere.

    weight: what every hidden value counts. scale: what the values of a token are divided by, by
    its level, as in the losses of single values; None: 1.
    """
    queries, target = predicted.queries, stream.target
    shape, tokens = target.shape, target.flatten(1, 4)
    index = queries.index[..., None].expand_as(weight)

    def on_window(values: Float[Tensor, "batch query patch"]) -> Tensor:
        """Values of the queries at their cells, 0 at all others. Padding counts 0, wherever it is
        put."""
        blank = torch.zeros_like(tokens, dtype=values.dtype)
        return _window(blank.scatter_add(1, index, values).view(shape), stream.spec)

    truth = tokens.gather(1, index)
    errors = [(member - truth) * (weight > 0) for member in predicted.members.float().unbind(2)]
    rows = patch_weights(stream.weight, stream.spec)[:, None, None, :, None].expand(shape)
    area = rows if stream.valid is None else rows * stream.valid
    unit = 1.0
    if scale is not None:
        unit = _window(scale[None, :, None, None, None].expand(shape), stream.spec)
    field = _window(target, stream.spec)
    return FieldEnsemble(
        members=torch.stack([(field + on_window(error)) / unit for error in errors], dim=1),
        target=field / unit,
        weight=on_window(weight),
        area=_window(area, stream.spec),
        periodic=stream.grid.periodic,
    )


def _window(
    tokens: Float[Tensor, "batch level nt nlat nlon patch"], spec: StreamSpec
) -> Float[Tensor, "batch field time lat lon"]:
    """Tokens as a window, with variables and levels along one axis."""
    return detokenise(tokens, spec).flatten(1, 2)


def _weights(stream: StreamTokens, index: Tensor, latitude_weighted: bool) -> Tensor:
    """The weights of the values of chosen tokens: relative cell area, or 1; 0 for values that
    were never observed or are no target points."""
    num_lon, num_lat = stream.grid.shape[3], stream.grid.shape[2]
    rows = patch_weights(stream.weight, stream.spec)
    row = index // num_lon % num_lat
    weight = rows.gather(1, row[..., None].expand(-1, -1, rows.shape[-1]))
    if not latitude_weighted:
        weight = torch.ones_like(weight)
    for counts in (stream.valid, stream.target_points):
        if counts is not None:
            weight = weight * counts.flatten(1, 4).gather(1, index[..., None].expand_as(weight))
    return weight
