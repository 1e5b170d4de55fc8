"""One class of each kind that a plugin can add to atmossl.

Each is small, and each can be used alone. What a class must do is said by the class or protocol of
atmossl that it follows, which is named in its first line.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from einops import rearrange
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from atmossl.batch import (
    Batch,
    Corruption,
    Prediction,
    StreamMask,
    StreamPrediction,
    StreamSpec,
    TokenIndex,
    View,
)
from atmossl.losses import Losses, weighted_mean
from atmossl.masking.base import TokenLayout
from atmossl.masking.tasks import Task, TimePlan
from atmossl.model.embedding import NUM_FEATURES, absolute_features
from atmossl.model.network import (
    Latent,
    Latents,
    Network,
    StreamLatents,
    TokenPlace,
    gather,
    scatter,
)
from atmossl.objectives.base import Metric, Monitor, Objective
from atmossl.objectives.masked import ErrorRatios, hidden_values, predicted_streams


@dataclass(frozen=True)
class Checkerboard:
    """A masking sampler (`atmossl.masking.base.MaskingSampler`): hides every second field of a
    checkerboard, at all times and levels.

    size: tokens along the edge of a field. Which colour is hidden is drawn for each sample.
    """

    size: PositiveInt = 1

    def __call__(
        self, layouts: tuple[TokenLayout, ...], rng: np.random.Generator
    ) -> tuple[StreamMask, ...]:
        colour = int(rng.integers(2))  # the same in all streams
        masks = []
        for layout in layouts:
            corruption = layout.nothing_hidden().corruption  # [level nt nlat nlon]
            if layout.spec.role == "predict":
                row = torch.arange(corruption.shape[2])[:, None] // self.size
                column = torch.arange(corruption.shape[3]) // self.size
                corruption[:, :, (row + column) % 2 == colour] = int(Corruption.MASK)
            masks.append(StreamMask(corruption))
        return tuple(masks)


@dataclass(frozen=True)
class LatitudeBand(Task):
    """A task (`atmossl.masking.tasks.Task`): hide all tokens whose centre lies between two
    latitudes, at all times, and predict the middle step of the window.

    south, north: degrees.
    """

    south: float
    north: float

    def __post_init__(self) -> None:
        if not -90 <= self.south < self.north <= 90:
            raise ValueError(
                f"task.south={self.south:g} and task.north={self.north:g}; valid: "
                "-90 <= south < north <= 90"
            )

    def plan(self, num_steps: int, step_hours: float) -> TimePlan:
        del step_hours
        return TimePlan(num_steps // 2, (0,), tuple(range(num_steps)))

    def __call__(
        self, layouts: tuple[TokenLayout, ...], rng: np.random.Generator
    ) -> tuple[StreamMask, ...]:
        del rng  # a task is the same every time
        masks = []
        for layout in layouts:
            corruption = layout.nothing_hidden().corruption
            if layout.spec.role == "predict":
                lat = layout.grid.lat
                corruption[:, :, (lat >= self.south) & (lat <= self.north)] = int(Corruption.MASK)
            masks.append(StreamMask(corruption))
        return tuple(masks)


class HuberLoss(Objective):
    """An objective (`atmossl.objectives.base.Objective`): the Huber loss of the ensemble mean at
    hidden tokens (Huber 1964).

    delta: error, in standard deviations, from which on the loss grows in proportion to the error.
    """

    monitor = Monitor("rmse_ratio/mean")
    provides = frozenset({"reconstruct", "embed"})

    def __init__(self, *, delta: float = 1.0) -> None:
        super().__init__()
        if delta <= 0:
            raise ValueError(f"delta={delta:g} must be positive")
        self.delta = delta

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return {"validation": ErrorRatios()}

    def forward(self, network: Any, batch: Batch) -> Losses:
        (view,) = batch.views
        prediction, terms = network(view), []
        for stream, predicted in zip(predicted_streams(view), prediction.streams, strict=True):
            target, weight, _ = hidden_values(stream)
            weight = weight * predicted.queries.valid[..., None]
            mean = predicted.members.mean(dim=2)
            values = functional.huber_loss(mean, target, reduction="none", delta=self.delta)
            terms.append((stream.spec.name, weighted_mean(values, weight)))
        return Losses(tuple(terms), (1.0,) * len(terms), prediction)


class MeanNetwork(Network):
    """A network (`atmossl.model.network.Network`): every token sees itself and the mean of all
    tokens of its stream (Zaheer et al. 2017, Deep Sets).

    dim: features of a latent. num_members: of the predicted ensemble.
    """

    ends = ("tail",)

    def __init__(
        self,
        *,
        streams: tuple[StreamSpec, ...],
        dim: PositiveInt,
        num_layers: PositiveInt,
        num_members: PositiveInt,
    ) -> None:
        super().__init__()
        self.widths = {spec.name: dim for spec in streams}
        self.num_members = num_members
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * dim, dim), nn.GELU()) for _ in range(num_layers)
        )
        self.embedding, self.query, self.tail = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for spec in streams:
            self.embedding[spec.name] = nn.Linear(spec.patch + NUM_FEATURES, dim)
            if spec.role == "predict":
                self.query[spec.name] = nn.Linear(2 * dim + NUM_FEATURES, dim)
                self.tail[spec.name] = nn.Linear(dim, num_members * spec.patch)

    @property
    def num_encoder_layers(self) -> int:
        return len(self.layers)

    def encode(self, view: View) -> Latents:
        encoded = {}
        for stream in view.streams:
            chosen = stream.encoder_tokens
            assert chosen is not None, "collate the view first: token indices are missing"
            tokens = torch.cat([stream.source.flatten(1, 4), absolute_features(stream.grid)], -1)
            x = self.embedding[stream.spec.name](gather(tokens, chosen))  # [batch token feature]
            place = TokenPlace({}, chosen, stream.grid.shape, stream.grid.periodic)
            layers = []
            for layer in self.layers:
                x = x + layer(torch.cat([x, _mean(x, chosen)], dim=-1))
                layers.append(Latent(x, place))
            encoded[stream.spec.name] = StreamLatents(tuple(layers), chosen, stream.grid)
        return encoded

    def predict(self, latents: Latents, view: View) -> Latents:
        decoded = {}
        for stream in predicted_streams(view):
            name, queries = stream.spec.name, stream.queries
            assert queries is not None, "collate the view first: token indices are missing"
            known = latents[name]
            own = gather(scatter(known.last, known.chosen), queries)
            features = gather(absolute_features(stream.grid), queries)
            x = self.query[name](
                torch.cat([own, _mean(known.last, known.chosen, own), features], -1)
            )
            place = TokenPlace({}, queries, stream.grid.shape, stream.grid.periodic)
            decoded[name] = StreamLatents((Latent(x, place),), queries, stream.grid)
        return decoded

    def reconstruct(
        self, latents: Latents, view: View, members: Sequence[int] | None = None
    ) -> Prediction:
        del members  # they are no draws of noise
        decoded, predictions = self.predict(latents, view), []
        for stream in predicted_streams(view):
            x = decoded[stream.spec.name]
            change = rearrange(
                self.tail[stream.spec.name](x.last),
                "batch query (member patch) -> batch query member patch",
                member=self.num_members,
            )
            guess = gather(stream.guess.flatten(1, 4), x.chosen)
            predictions.append(StreamPrediction(guess[:, :, None] + change, x.chosen))
        return Prediction(tuple(predictions))


def _mean(x: Tensor, chosen: TokenIndex, like: Tensor | None = None) -> Tensor:
    """The mean over all chosen tokens, once for every token of `like`, by default of x."""
    valid = chosen.valid[..., None].to(x)
    mean = (x * valid).sum(dim=1, keepdim=True) / valid.sum(dim=1, keepdim=True).clamp_min(1.0)
    return mean.expand(-1, (x if like is None else like).shape[1], -1)


class WeightNorm(L.Callback):
    """A callback (`lightning.pytorch.Callback`): logs the norm of all weights as `norm/weights`.

    every: optimiser steps between two logs.
    """

    def __init__(self, *, every: PositiveInt = 1) -> None:
        self.every = every

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        del outputs, batch, batch_idx
        if trainer.global_step % self.every == 0:
            norms = [weight.detach().norm() for weight in pl_module.model.parameters()]
            pl_module.log("norm/weights", torch.stack(norms).norm())


class JsonLines(Logger):
    """A logger (`lightning.pytorch.loggers.Logger`): one line of JSON for each call in a file.

    keys: only of values whose name begins so; none: all.
    """

    def __init__(self, *, path: Path, keys: Sequence[str] = ()) -> None:
        super().__init__()
        self.path, self.keys = path, tuple(keys)

    @property
    def name(self) -> str:
        return "json_lines"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        chosen = {k: v for k, v in metrics.items() if not self.keys or k.startswith(self.keys)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **chosen}) + "\n")
