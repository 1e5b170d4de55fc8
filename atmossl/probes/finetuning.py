"""Fine-tuning: the encoder and a linear map together, on the labels of a part of the dates.

Frozen latents say what an encoder holds; fine-tuning says how many labels it saves. The comparison
is a network of the same architecture that starts from random weights and has all labels, with as
many steps of the same batches. Labels are those of the probes, at the same dates and places, and in
both cases the weights are those of the start or of five times on the way, whichever did best on the
validation dates.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from atmossl.batch import View, collate_views
from atmossl.data.fraction import blocks_of_time
from atmossl.geometry import nearest_cells
from atmossl.model.network import Network, StreamLatents
from atmossl.probes.cases import Cases, TokenPlaces
from atmossl.probes.features import band_weights, sector_weights
from atmossl.probes.scoring import Question

_VALIDATIONS = 5
_WEIGHT_DECAY = 0.01
_HEAD_RATE = 10.0  # of the linear map's learning rate to that of the network
_RARE = 1e-3  # the least share of a class at the start


@dataclass(frozen=True)
class FinetuneSettings:
    """How probes are fine-tuned.

    fractions: of the training dates, in unbroken blocks of time; empty: nothing is fine-tuned.
    probes: which of them. steps: of the optimiser, for every fraction. batch_size: dates in a step.
    """

    fractions: tuple[float, ...] = ()
    probes: tuple[str, ...] = ("anomaly_24h", "vorticity_extreme")
    steps: int = 200
    batch_size: int = 4
    learning_rate: float = 1e-3


def dates_used(cases: Cases, fraction: float, seed: int) -> np.ndarray:
    """Numbers of the training cases that a fraction of them is, in unbroken blocks of time."""
    train = cases.of("train")
    runs = [np.flatnonzero(train & (cases.run == run)) for run in np.unique(cases.run[train])]
    blocks = blocks_of_time([len(run) for run in runs], fraction, seed)
    return np.concatenate([runs[number][steps] for number, steps in blocks.items()])


class TunedNetwork(nn.Module):
    """Predictions of a label from the last layer of an encoder, for the last step of a window.

    Features are those of the linear probes (`features.encoded`): normalised over themselves, and
    of a sector the means over bands of latitude and over levels. The linear map begins at 0, and
    its bias at the mean of the training labels that are used, or at the frequencies of classes.
    """

    scale: Tensor

    def __init__(
        self, network: Network, question: Question, places: TokenPlaces, names: Sequence[str]
    ) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(True)
        self.question, self.places, self.names = question, places, tuple(names)
        self.register_buffer("scale", torch.ones(question.targets.shape[-1]))
        self.head = nn.LazyLinear(question.targets.shape[-1])

    @torch.no_grad()
    def begin(self, view: View, labels: Float[Tensor, "case place target"]) -> None:
        """Start as what is known without the encoder: the mean of these labels."""
        self.head(self.features(view, np.zeros(1, int)))  # learns its width
        nn.init.zeros_(self.head.weight)
        mean = reduce(labels, "case place target -> target", "mean")
        if self.question.classes:
            self.head.bias.copy_(mean.clamp_min(_RARE).log())
            return
        self.scale.copy_(labels.std((0, 1), correction=0).clamp_min(1e-12))
        self.head.bias.copy_(mean / self.scale)

    def features(self, view: View, cases: np.ndarray) -> Float[Tensor, "case place feature"]:
        """The features of the places or sectors of every case. cases: numbers of
        the samples."""
        encoded = self.network.encode(view)
        streams = [encoded[name] for name in self.names]
        if not self.question.local:
            sectors = self.places.sectors
            return torch.cat([_by_sector(stream, sectors) for stream in streams], dim=-1)
        latitude = self.places.latitude[self.places.rows[cases]]
        longitude = self.places.longitude[self.places.columns[cases]]
        return torch.cat([_nearest(stream, latitude, longitude) for stream in streams], dim=-1)

    def forward(self, view: View, cases: np.ndarray) -> Float[Tensor, "case place target"]:
        """Numbers in units of the label, or probabilities of every class."""
        answer = self.head(self.features(view, cases))
        return answer.softmax(-1) if self.question.classes else answer * self.scale


def _last_step(stream: StreamLatents) -> Float[Tensor, "case level row column feature"]:
    level, steps, rows, columns = stream.grid.shape
    latents = rearrange(
        stream.last, "case (level time row column) feature -> case level time row column feature",
        level=level, time=steps, row=rows, column=columns,
    )[:, :, -1]  # fmt: skip
    return layer_norm(latents, latents.shape[-1:])


def _by_sector(stream: StreamLatents, sectors: int) -> Float[Tensor, "case sector feature"]:
    bands = torch.from_numpy(band_weights(stream.grid.lat[0].cpu().numpy()))
    columns = torch.from_numpy(sector_weights(stream.grid.lon.shape[-1], sectors))
    tokens = reduce(_last_step(stream), "case level row column f -> case row column f", "mean")
    means = torch.einsum("nrcf,br,sc->nsbf", tokens, bands.to(tokens), columns.to(tokens))
    return rearrange(means, "case sector band f -> case sector (band f)")


def _nearest(
    stream: StreamLatents, latitude: np.ndarray, longitude: np.ndarray
) -> Float[Tensor, "case place feature"]:
    """Latents of all levels of the tokens whose centres are nearest to [case place]."""
    grid = _last_step(stream)
    centres, meridians = (axis[0].cpu().numpy() for axis in (stream.grid.lat, stream.grid.lon))
    rows, columns = nearest_cells(centres, meridians, latitude, longitude)
    case = torch.arange(len(grid))[:, None]
    chosen = rearrange(grid, "case level row column f -> case row column level f")[
        case, torch.from_numpy(rows), torch.from_numpy(columns)
    ]
    return rearrange(chosen, "case place level f -> case place (level f)")


def _rate(progress: float) -> float:
    """Factor of the learning rate: it rises over a tenth of the steps and falls as a cosine."""
    return min(1.0, 0.01 + progress / 0.1) * (1.0 + math.cos(math.pi * progress)) / 2.0


@dataclass(frozen=True)
class Finetuner:
    """Fits one label from any starting weights.

    views: of every case the window that ends at its date, on the whole grid. names: of the streams
    whose latents count.
    """

    cases: Cases
    places: TokenPlaces
    views: Sequence[View]
    names: Sequence[str]
    settings: FinetuneSettings
    seed: int
    device: str

    def fitted(
        self,
        network: Network,
        question: Question,
        fraction: float,
        advance: Callable[[float], object] = float,  # of no consequence
    ) -> tuple[dict[str, Float[np.ndarray, "row target"]], int]:
        """Predictions for the splits validation and test, and how many dates the fit has used."""
        used, labels = dates_used(self.cases, fraction, self.seed), self._labels(question)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            tuned = TunedNetwork(network, question, self.places, self.names).to(self.device)
            tuned.begin(self._views(used[:1]), labels[used].to(self.device))
        self._train(tuned, labels, used, advance)
        predictions = {}
        for split in ("validation", "test"):
            by_place = self._predictions(tuned, np.flatnonzero(self.cases.of(split)))
            rows = rearrange(by_place, "case place target -> (case place) target")
            predictions[split] = rows.double().numpy()
        return predictions, len(used)

    def _train(
        self,
        tuned: TunedNetwork,
        labels: Float[Tensor, "case place target"],
        used: np.ndarray,
        advance: Callable[[float], object],
    ) -> None:
        """AdamW at a rate that rises and falls; leaves the weights of the best validation."""
        settings = self.settings
        rate, steps = settings.learning_rate, settings.steps
        parts = [tuned.network.parameters(), tuned.head.parameters()]
        optimizer = torch.optim.AdamW(
            [{"params": p, "lr": r} for p, r in zip(parts, (rate, _HEAD_RATE * rate), strict=True)],
            weight_decay=_WEIGHT_DECAY,
        )
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: _rate(n / steps))
        validation = np.flatnonzero(self.cases.of("validation"))
        best, least = copy.deepcopy(tuned.state_dict()), self._error(tuned, labels, validation)
        for step, batch in enumerate(self._batches(used), start=1):
            error = tuned(self._views(batch), batch) - labels[batch].to(self.device)
            (error / tuned.scale).square().sum(-1).mean().backward()
            nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            rates.step()
            advance(1.0)
            if step % max(1, steps // _VALIDATIONS) == 0:
                error_now = self._error(tuned, labels, validation)
                if error_now < least:
                    best, least = copy.deepcopy(tuned.state_dict()), error_now
        tuned.load_state_dict(best)

    def _labels(self, question: Question) -> Float[Tensor, "case place target"]:
        rows = torch.from_numpy(question.targets).float()
        return rearrange(
            rows, "(case place) target -> case place target", case=len(self.cases.times)
        )

    def _batches(self, used: np.ndarray) -> list[np.ndarray]:
        """The batches of all steps: permutation after permutation of the dates that are used."""
        rng, size = np.random.default_rng(self.seed), min(self.settings.batch_size, len(used))
        num_dates = size * self.settings.steps
        order = np.concatenate([rng.permutation(used) for _ in range(-(-num_dates // len(used)))])
        return list(order[:num_dates].reshape(-1, size))

    def _views(self, cases: np.ndarray) -> View:
        samples = [(self.views[case],) for case in cases]
        return collate_views(samples, list(range(len(cases)))).views[0].to(self.device)

    def _error(self, tuned: TunedNetwork, labels: Tensor, cases: np.ndarray) -> float:
        wrong = self._predictions(tuned, cases) - labels[cases]
        return float(wrong.square().sum(-1).mean())

    @torch.no_grad()
    def _predictions(self, tuned: TunedNetwork, cases: np.ndarray) -> Tensor:
        size = self.settings.batch_size
        parts = [cases[first : first + size] for first in range(0, len(cases), size)]
        return torch.cat([tuned(self._views(part), part).cpu() for part in parts])
