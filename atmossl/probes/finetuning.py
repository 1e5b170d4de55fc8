"""Fine-tuning: the encoder and a linear map together, on the labels of a part of the dates.

Frozen latents say what an encoder holds; fine-tuning says how many labels it saves. The comparison
is a network of the same architecture that starts from random weights and has all labels, with as
many steps of the same batches.

The linear map begins either at 0, or as a linear probe of the frozen features (Kumar et al. 2022,
arXiv 2202.10054, LP-FT), since a map that begins at 0 sends large gradients into the encoder before
it knows anything, and they undo what the encoder has learned. The fits learn from the labels of all
tokens of a date, and are scored at the places of the probes. Of all learning rates, and of the
start and five times on the way, the weights are those that did best on the validation dates.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from atmossl.batch import View, collate_views
from atmossl.data.fraction import blocks_of_time
from atmossl.model.network import Network
from atmossl.probes.cases import Cases, TokenPlaces
from atmossl.probes.scoring import Question
from atmossl.probes.tuned_network import (
    Labelled,
    LinearMap,
    TunedNetwork,
    constant_map,
    linear_maps,
)

Head = Literal["zeros", "probe"]  # what the linear map starts from
HEADS: tuple[Head, ...] = ("zeros", "probe")
_VALIDATIONS = 5
_MOST_ROWS = 16384  # that a linear map is fitted on
_WEIGHT_DECAY = 0.01
_HEAD_RATE = 10.0  # of a linear map that starts at 0, to the learning rate of the network


@dataclass(frozen=True)
class FinetuneSettings:
    """How probes are fine-tuned.

    fractions: of the training dates, in unbroken blocks of time; empty: nothing is fine-tuned.
    probes: which of them. steps: of the optimiser, for every fit. batch_size: dates in a step.
    learning_rate: the highest of AdamW; of several, validation chooses.
    """

    fractions: tuple[float, ...] = ()
    probes: tuple[str, ...] = ("anomaly_24h", "vorticity_extreme")
    steps: int = 200
    batch_size: int = 4
    learning_rate: tuple[float, ...] = (1e-4, 1e-3, 3e-3)


def dates_used(cases: Cases, fraction: float, seed: int) -> np.ndarray:
    """Numbers of the training cases that a fraction of them is, in unbroken blocks of time."""
    train = cases.of("train")
    runs = [np.flatnonzero(train & (cases.run == run)) for run in np.unique(cases.run[train])]
    blocks = blocks_of_time([len(run) for run in runs], fraction, seed)
    return np.concatenate([runs[number][steps] for number, steps in blocks.items()])


def num_windows(
    cases: Cases,
    settings: FinetuneSettings,
    question: Question,
    fraction: float,
    head: Head,
    seed: int,
) -> int:
    """How often `Finetuner.fitted` advances: once for every step and every date that it encodes
    before the first."""
    num_dates = 0
    if head == "probe":
        splits = ("validation",) if question.classes else ("train", "validation")
        num_dates = len(dates_used(cases, fraction, seed)) + sum(cases.of(s).sum() for s in splits)
    return len(settings.learning_rate) * settings.steps + int(num_dates)


def _rate(progress: float) -> float:
    """Factor of the learning rate: it rises over a tenth of the steps and falls as a cosine."""
    return min(1.0, 0.01 + progress / 0.1) * (1.0 + math.cos(math.pi * progress)) / 2.0


@dataclass(frozen=True)
class Fit:
    """A network that was fine-tuned.

    predicted: numbers or probabilities at the rows of a split. num_dates: whose labels were used.
    learning_rate: of those tried the one that did best on validation; 0 where the start did.
    """

    predicted: Mapping[str, Float[np.ndarray, "row target"]]
    num_dates: int
    head: Head
    learning_rate: float


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
        head: Head = "probe",
        advance: Callable[[float], object] = float,  # of no consequence
    ) -> Fit:
        """Predictions for the splits validation and test, by the learning rate and the time of the
        training with the least error on the validation dates."""
        used, labels = dates_used(self.cases, fraction, self.seed), self._labels(question)
        tuned = TunedNetwork(network, question, self.places, self.names).to(self.device)
        start = self._start(tuned, labels, used, head, advance)
        best_rate, least, best = 0.0, math.inf, {}
        for rate in self.settings.learning_rate:
            tuned.network.load_state_dict(network.state_dict())
            tuned.set_linear_map(start)
            tuned.to(self.device)
            rates = (rate, rate * (_HEAD_RATE if head == "zeros" else 1.0))
            error, has_moved = self._train(tuned, labels, used, rates, advance)
            if error < least:
                best_rate, least = (rate if has_moved else 0.0), error
                best = copy.deepcopy(tuned.state_dict())
        tuned.load_state_dict(best)
        predicted = {split: self._predicted_rows(tuned, split) for split in ("validation", "test")}
        return Fit(predicted, len(used), head, best_rate)

    def _predicted_rows(self, tuned: TunedNetwork, split: str) -> Float[np.ndarray, "row target"]:
        """Predictions at the rows of a question."""
        cases = np.flatnonzero(self.cases.of(split))
        by_place = self._predictions(tuned, cases)
        if tuned.question.local:
            by_place = by_place[np.arange(len(cases))[:, None], self._drawn[cases]]
        return rearrange(by_place, "case place target -> (case place) target").double().numpy()

    @property
    def _drawn(self) -> np.ndarray:
        """Numbers of the tokens that are drawn for every date, [case place]."""
        return self.places.rows * len(self.places.longitude) + self.places.columns

    def _area(self, question: Question) -> Float[np.ndarray, "place"]:
        """What every token or sector counts: its area."""
        if not question.local:
            return np.ones(self.places.sectors)
        area = np.cos(np.deg2rad(self.places.latitude)).clip(1e-6)
        return np.repeat(area, len(self.places.longitude))

    def _start(
        self,
        tuned: TunedNetwork,
        labels: Float[Tensor, "case place target"],
        used: np.ndarray,
        head: Head,
        advance: Callable[[float], object],
    ) -> LinearMap:
        """The linear map that training starts from: the probe of frozen features whose penalty
        does best on the validation dates, or a constant."""
        classes = tuned.question.classes
        if head == "zeros":
            return constant_map(self._labelled(tuned, labels, used[:1]), classes=classes)
        train, validation = (np.flatnonzero(self.cases.of(s)) for s in ("train", "validation"))
        fitted = self._labelled(tuned, labels, used, advance)
        held_out = self._labelled(tuned, labels, validation, advance)
        centre = np.zeros((1, fitted.features.shape[-1]))
        if not classes:  # labels are departures from the mean of a place, and so are features
            total = 0.0
            for case in train:
                total = total + self._frozen(tuned, case).astype(np.float64)
                advance(1.0)
            centre = np.asarray(total) / len(train)
        maps = linear_maps(fitted, centre, classes=classes)
        return min(maps, key=lambda linear_map: linear_map.error(held_out, classes=classes))

    def _labelled(
        self,
        tuned: TunedNetwork,
        labels: Float[Tensor, "case place target"],
        cases: np.ndarray,
        advance: Callable[[float], object] = float,
    ) -> Labelled:
        """Frozen features and labels of some dates, at all places, or at some that are drawn for
        each date where all were too many rows."""
        area, rng = self._area(tuned.question), np.random.default_rng(self.seed)
        count = min(len(area), -(-_MOST_ROWS // len(cases)))
        features, places = [], []
        for case in cases:
            places.append(np.sort(rng.choice(len(area), count, replace=False)))
            features.append(self._frozen(tuned, case)[places[-1]])
            advance(1.0)
        place = np.stack(places)
        of_rows = labels.numpy()[cases[:, None], place].astype(np.float64)
        rows = "case place target -> (case place) target"
        return Labelled(
            np.concatenate(features), rearrange(of_rows, rows), area[place].ravel(), place.ravel()
        )

    @torch.no_grad()
    def _frozen(self, tuned: TunedNetwork, case: np.intp) -> Float[np.ndarray, "place feature"]:
        return tuned.features(self._views(np.array([case])))[0].cpu().numpy()

    def _train(
        self,
        tuned: TunedNetwork,
        labels: Float[Tensor, "case place target"],
        used: np.ndarray,
        learning_rates: tuple[float, float],
        advance: Callable[[float], object],
    ) -> tuple[float, bool]:
        """AdamW at rates (of the network, of the linear map) that rise and fall; leaves the weights
        of the best validation. The error there, and whether they are others than at the start."""
        steps = self.settings.steps
        parts = [tuned.network.parameters(), tuned.head.parameters()]
        optimizer = torch.optim.AdamW(
            [{"params": p, "lr": r} for p, r in zip(parts, learning_rates, strict=True)],
            weight_decay=_WEIGHT_DECAY,
        )
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: _rate(n / steps))
        validation = np.flatnonzero(self.cases.of("validation"))
        area = torch.from_numpy(self._area(tuned.question)).float().to(self.device)
        area = area / area.mean()
        has_moved = False
        best, least = copy.deepcopy(tuned.state_dict()), self._error(tuned, labels, validation)
        for step, batch in enumerate(self._batches(used), start=1):
            error = (tuned(self._views(batch)) - labels[batch].to(self.device)) / tuned.scale
            (error.square().sum(-1) * area).mean().backward()
            nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            rates.step()
            advance(1.0)
            if step % max(1, steps // _VALIDATIONS) == 0:
                error_now = self._error(tuned, labels, validation)
                if error_now < least:
                    best, least, has_moved = copy.deepcopy(tuned.state_dict()), error_now, True
        tuned.load_state_dict(best)
        return least, has_moved

    def _labels(self, question: Question) -> Float[Tensor, "case place target"]:
        """The labels of all tokens or sectors of every date."""
        if question.of_tokens is not None:
            return torch.from_numpy(question.of_tokens)
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
        wrong = (self._predictions(tuned, cases) - labels[cases]).square().sum(-1)
        return float(np.average(wrong.mean(0).numpy(), weights=self._area(tuned.question)))

    @torch.no_grad()
    def _predictions(self, tuned: TunedNetwork, cases: np.ndarray) -> Tensor:
        size = self.settings.batch_size
        parts = [cases[first : first + size] for first in range(0, len(cases), size)]
        return torch.cat([tuned(self._views(part)).cpu() for part in parts])
