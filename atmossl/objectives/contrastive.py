"""Siamese networks: they learn equal latents for one place at times some hours apart, while not
all latents may become the same (SimCLR, VICReg, SimSiam, Barlow twins)."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from atmossl.batch import Batch
from atmossl.latent_losses import barlow_twins, nt_xent, simsiam, vicreg
from atmossl.losses import Losses
from atmossl.masking.views import ViewSpec
from atmossl.model.network import Network
from atmossl.objectives.base import Ability, Metric, Monitor, Objective
from atmossl.objectives.pairs import LagHours, PairMeasures, close_in_time, pair_views, perceptron
from atmossl.settings import Hours

PairLoss = Literal["nt_xent", "vicreg", "simsiam", "barlow_twins"]
Projected = Float[Tensor, "sample feature"]


class Contrastive(Objective):
    """Compares two views of a sample by the projections of their latents, pooled over tokens.

    lag_hours: how much later the second view is, one of them by sample.
    loss: `nt_xent` tells the partner from all other samples of the batch, at `temperature`;
        `vicreg` and `barlow_twins` keep features apart instead of samples; `simsiam` predicts one
        projection from the other, which gets no gradient.
    no_negatives_hours: samples of `nt_xent` that are closer in time do not count as
        different, whatever their run.
    projection_dim: width of the projection, and of the hidden layers before it.
    """

    monitor = Monitor("pair_loss/mean")
    provides: ClassVar[frozenset[Ability]] = frozenset({"embed"})
    compares_samples = True

    def __init__(
        self,
        *,
        network: Network,
        lag_hours: LagHours,
        loss: PairLoss,
        temperature: Annotated[float, Field(gt=0.0)] = 0.5,
        no_negatives_hours: Annotated[Hours, Field(alias="no_negatives_within")] = 120.0,
        projection_dim: Annotated[int, Field(gt=0)] = 128,
    ) -> None:
        super().__init__()
        del lag_hours  # `views_of` reads it
        self.loss: PairLoss = loss
        self.temperature = temperature
        self.no_negatives_hours = no_negatives_hours
        self.projector = perceptron(network.num_pooled, projection_dim, projection_dim)
        if loss == "simsiam":
            self.predictor = perceptron(projection_dim, projection_dim, projection_dim)

    @classmethod
    def views_of(cls, arguments: Mapping[str, Any]) -> tuple[ViewSpec, ...]:
        return pair_views(arguments["lag_hours"])

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return {"validation": PairMeasures()}

    def forward(self, network: Network, batch: Batch) -> Losses:
        pooled = tuple(network.pool(network.encode(view)).float() for view in batch.views)
        first, second = (self.projector(latents).float() for latents in pooled)
        value = self._loss_of(first, second, batch)
        return Losses(((self.loss, value),), (1.0,), pooled=pooled)

    def _loss_of(self, first: Projected, second: Projected, batch: Batch) -> Tensor:
        if self.loss == "simsiam":
            ahead, back = (self.predictor(latents).float() for latents in (first, second))
            return (simsiam(ahead, second) + simsiam(back, first)) / 2
        with torch.autocast(first.device.type, enabled=False):  # sums over features in float32
            if self.loss == "nt_xent":
                close = close_in_time(batch, self.no_negatives_hours)
                return nt_xent(first, second, temperature=self.temperature, no_negatives=close)
            return (vicreg if self.loss == "vicreg" else barlow_twins)(first, second)
