"""The network that is fine-tuned: an encoder, and a linear map on the features of all its layers.

The features are those of the linear probes: normalised over themselves, for the last step of the
window, of a sector as means over bands of latitude and over levels. Those of all layers stand side
by side, since the layer that knows most of a label is seldom the last one. The linear map begins as
a linear probe of the frozen features (`fit_linear_map`), or at 0.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from scipy.special import softmax
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from atmossl.batch import View
from atmossl.geometry import nearest_cells
from atmossl.model.network import Latent, Network, StreamLatents
from atmossl.probes.cases import TokenPlaces
from atmossl.probes.features import band_weights, sector_weights
from atmossl.probes.models import PENALTIES, fitted_logistic
from atmossl.probes.scoring import Question

LOGISTIC_STRENGTHS = tuple(10.0 ** (half / 2) for half in range(-2, 11))
_RARE = 1e-3  # the least share of a class


@dataclass(frozen=True)
class LinearMap:
    """answer = weight @ (features - centre) / spread + bias, in units of `scale`; of classes the
    logarithms of probabilities, but for a constant.

    centre: by place where the label is a departure from the mean of the place.
    """

    weight: Float[np.ndarray, "target feature"]
    bias: Float[np.ndarray, "target"]
    centre: Float[np.ndarray, "place_or_1 feature"]
    spread: Float[np.ndarray, "feature"]
    scale: Float[np.ndarray, "target"]

    def error(self, held_out: "Labelled", *, classes: bool) -> float:
        """The mean squared error of answers, by area."""
        answer = held_out.departures(self.centre) / self.spread @ self.weight.T + self.bias
        answer = softmax(answer, axis=-1) if classes else answer * self.scale
        wrong = ((answer - held_out.labels) ** 2).sum(axis=-1)
        return float(np.average(wrong, weights=held_out.area))


class TunedNetwork(nn.Module):
    """Predictions of a label at all tokens of the first stream, or of all sectors."""

    weight: Tensor
    centre: Tensor
    spread: Tensor
    scale: Tensor

    def __init__(
        self, network: Network, question: Question, places: TokenPlaces, names: Sequence[str]
    ) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(True)
        self.question, self.places, self.names = question, places, tuple(names)

    def set_linear_map(self, linear_map: LinearMap) -> None:
        """Start from a linear map."""
        for name in ("centre", "spread", "scale"):
            self.register_buffer(name, torch.from_numpy(getattr(linear_map, name)).float())
        targets, features = linear_map.weight.shape
        self.head = nn.Linear(features, targets)
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(linear_map.weight))
            self.head.bias.copy_(torch.from_numpy(linear_map.bias))

    def features(self, view: View) -> Float[Tensor, "case place feature"]:
        """The features of all tokens or sectors, of all layers side by side."""
        encoded = self.network.encode(view)
        parts = [
            self._of_places(_last_step(layer.features, encoded[name]), encoded[name])
            for name in self.names
            for layer in _all_layers(encoded[name])
        ]
        return torch.cat(parts, dim=-1)

    def _of_places(
        self, tokens: Float[Tensor, "case level row column feature"], stream: StreamLatents
    ) -> Float[Tensor, "case place feature"]:
        if not self.question.local:
            return _by_sector(tokens, stream, self.places.sectors)
        latitude, longitude = np.meshgrid(
            self.places.latitude, self.places.longitude, indexing="ij"
        )
        return _nearest(tokens, stream, latitude.ravel(), longitude.ravel())

    def forward(self, view: View) -> Float[Tensor, "case place target"]:
        """Numbers in units of the label, or probabilities of every class."""
        answer = self.head((self.features(view) - self.centre) / self.spread)
        return answer.softmax(-1) if self.question.classes else answer * self.scale


def _all_layers(stream: StreamLatents) -> list[Latent]:
    embedded = [] if stream.embedded is None else [stream.embedded]
    return [*embedded, *stream.layers]


def _last_step(
    features: Float[Tensor, "case token feature"], stream: StreamLatents
) -> Float[Tensor, "case level row column feature"]:
    level, steps, rows, columns = stream.grid.shape
    latents = rearrange(
        features, "case (level time row column) feature -> case level time row column feature",
        level=level, time=steps, row=rows, column=columns,
    )[:, :, -1]  # fmt: skip
    return layer_norm(latents, latents.shape[-1:])


def _by_sector(
    tokens: Float[Tensor, "case level row column feature"], stream: StreamLatents, sectors: int
) -> Float[Tensor, "case sector feature"]:
    bands = torch.from_numpy(band_weights(stream.grid.lat[0].cpu().numpy()))
    columns = torch.from_numpy(sector_weights(stream.grid.lon.shape[-1], sectors))
    tokens = reduce(tokens, "case level row column f -> case row column f", "mean")
    means = torch.einsum("nrcf,br,sc->nsbf", tokens, bands.to(tokens), columns.to(tokens))
    return rearrange(means, "case sector band f -> case sector (band f)")


def _nearest(
    tokens: Float[Tensor, "case level row column feature"],
    stream: StreamLatents,
    latitude: Float[np.ndarray, "place"],
    longitude: Float[np.ndarray, "place"],
) -> Float[Tensor, "case place feature"]:
    """Latents of all levels of the tokens whose centres are nearest."""
    centres, meridians = (axis[0].cpu().numpy() for axis in (stream.grid.lat, stream.grid.lon))
    rows, columns = map(torch.from_numpy, nearest_cells(centres, meridians, latitude, longitude))
    return rearrange(tokens[:, :, rows, columns], "case level place f -> case place (level f)")


@dataclass(frozen=True)
class Labelled:
    """Frozen features with their labels, a row for every date and place. area: what a row counts.
    place: number of the token or sector."""

    features: Float[np.ndarray, "row feature"]
    labels: Float[np.ndarray, "row target"]
    area: Float[np.ndarray, "row"]
    place: Int[np.ndarray, "row"]

    def departures(self, centre: Float[np.ndarray, "place_or_1 feature"]) -> np.ndarray:
        """Features as departures from the centre of their place."""
        return self.features - (centre if len(centre) == 1 else centre[self.place])


def constant_map(fitted: Labelled, *, classes: bool) -> LinearMap:
    """What is known without features: the mean of the labels, or the frequencies of classes."""
    mean, scale = _mean_and_scale(fitted.labels, fitted.area, classes=classes)
    features = fitted.features.shape[-1]
    return LinearMap(
        weight=np.zeros((len(mean), features)),
        bias=np.log(mean.clip(_RARE)) if classes else mean / scale,
        centre=np.zeros((1, features)),
        spread=np.ones(features),
        scale=scale,
    )


def linear_maps(
    fitted: Labelled, centre: Float[np.ndarray, "place_or_1 feature"], *, classes: bool
) -> list[LinearMap]:
    """Ridge or logistic regression with every penalty, of features as departures from `centre`,
    scaled by their mean and spread."""
    rows, area = fitted.departures(centre).astype(np.float64), fitted.area / fitted.area.mean()
    row_mean = np.average(rows, axis=0, weights=area)
    spread = np.sqrt(np.average((rows - row_mean) ** 2, axis=0, weights=area)) + 1e-12
    scaled, centre = (rows - row_mean) / spread, centre + row_mean
    mean, scale = _mean_and_scale(fitted.labels, area, classes=classes)
    if not classes:
        weights = _ridge(scaled, (fitted.labels - mean) / scale, area)
        return [LinearMap(one.T, mean / scale, centre, spread, scale) for one in weights]
    fits = (_logistic(scaled, fitted.labels, area, strength) for strength in LOGISTIC_STRENGTHS)
    return [LinearMap(weight, bias, centre, spread, scale) for weight, bias in fits]


def _mean_and_scale(
    labels: np.ndarray, area: np.ndarray, *, classes: bool
) -> tuple[np.ndarray, np.ndarray]:
    mean = np.average(labels, axis=0, weights=area)
    if classes:
        return mean, np.ones_like(mean)
    return mean, np.sqrt(np.average((labels - mean) ** 2, axis=0, weights=area)).clip(1e-12)


def _ridge(rows: np.ndarray, labels: np.ndarray, area: np.ndarray) -> list[np.ndarray]:
    """Weights [feature target] for every penalty, which is counted as in `models.fit_linear`."""
    weighted = rows * area[:, None]
    values, vectors = np.linalg.eigh(rows.T @ weighted)
    projected = vectors.T @ (weighted.T @ labels)
    penalties = [penalty * rows.shape[1] for penalty in PENALTIES]
    return [vectors @ (projected / (values.clip(0.0) + p)[:, None]) for p in penalties]


def _logistic(
    rows: np.ndarray, labels: np.ndarray, area: np.ndarray, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Weights [class feature] and bias of a multinomial logistic regression."""
    numbers = labels.argmax(axis=1)
    weight = np.zeros((labels.shape[1], rows.shape[1]))
    bias = np.full(labels.shape[1], np.log(_RARE))
    if (numbers == numbers[0]).all():
        bias[numbers[0]] = 0.0
        return weight, bias
    logistic = fitted_logistic(rows, numbers, strength, area)
    coefficients, intercepts = logistic.coef_, logistic.intercept_
    if len(logistic.classes_) == 2:  # sklearn has one column: the logarithm of the ratio
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercepts = np.concatenate([-intercepts, intercepts]) / 2
    weight[logistic.classes_], bias[logistic.classes_] = coefficients, intercepts
    return weight, bias
