"""Questions to probes, the fit of every probe on every source of features, and its skill.

Skill is 1 - loss / loss of climatology, where the loss is the squared error of a number or the
Brier score of a class (the squared error of its probabilities, summed over classes; Brier 1950).
It is 1 for what is always right and 0 for what knows no more than the mean (of numbers, which are
departures from every place's or sector's mean) or the frequencies of the dates of training and
validation. Intervals are of a block bootstrap over the test dates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import xarray as xr
from einops import rearrange
from jaxtyping import Float, Int

from atmossl.evaluation.bootstrap import BlockBootstrap, resampled_means
from atmossl.inference.embed import Layer
from atmossl.probes.attentive import fit_attentive
from atmossl.probes.cases import Cases, TokenPlaces
from atmossl.probes.features import Features
from atmossl.probes.labels import (
    DISTANCE,
    LABELS,
    Blind,
    Label,
    LabelError,
    blind_of,
    date_pairs,
)
from atmossl.probes.models import Rows, chosen_linear, fit_linear, nearest_neighbours

EXTREME_QUANTILE = 0.95
_ROUNDING = 1e-9  # of the largest label; a smaller departure from the mean is none


@dataclass(frozen=True)
class Question:
    """One label as rows on which a probe is fitted.

    case: that a row belongs to. persistence: the label of a day earlier. pairs: earlier and later
    case of a row, for labels of two dates. of_tokens: for labels of a place, those of all tokens,
    row after row. blind: what the encoder is not shown.
    """

    name: str
    classes: bool
    local: bool
    targets: Float[np.ndarray, "row target"]
    case: Int[np.ndarray, "row"]
    persistence: Float[np.ndarray, "row target"] | None = None
    pairs: tuple[np.ndarray, np.ndarray] | None = None
    of_tokens: Float[np.ndarray, "case token target"] | None = None
    blind: Blind = Blind()

    @property
    def is_of_a_sector(self) -> bool:
        return not self.local and self.pairs is None

    def can_be_asked_of(self, features: Features) -> bool:
        return not self.local or features.local is not None

    def inputs(self, features: Features, cases: Cases) -> Float[np.ndarray, "row feature"]:
        """The features that a probe sees in every row. For labels of two dates, the mean over
        sectors of the distance in every feature; for numbers of a sector or a place, which are
        departures from its mean, departures too, so that no probe has to learn the climate of
        every place first."""
        if self.pairs is not None:
            first, second = self.pairs
            return np.abs(features.sectors[first] - features.sectors[second]).mean(axis=1)
        if self.local:
            of_places = features.local if self.classes else features.departures
            assert of_places is not None, "ask can_be_asked_of first"
            return rearrange(of_places, "case place feature -> (case place) feature")
        departures = features.sectors - features.sectors[cases.of("train")].mean(axis=0)
        return rearrange(departures, "case sector feature -> (case sector) feature")

    def rows(self, features: Features, cases: Cases) -> Rows:
        return Rows(
            self.inputs(features, cases),
            self.targets,
            cases.run[self.case],
            cases.times[self.case],
        )


class UnanswerableError(ValueError):
    """These data do not have a label, or always the same one. reason: in words."""

    def __init__(self, probe: str, reason: str) -> None:
        super().__init__(
            f"probes: {probe}: {reason}; leave it out, or choose another every or other data"
        )
        self.reason = reason


def ask(name: str, cases: Cases, places: TokenPlaces) -> Question:
    """The rows of one probe.

    Raises:
        UnanswerableError: its label is constant over the training dates, or missing somewhere.
    """
    try:
        question = (
            _of_pairs(cases) if name == DISTANCE else _of_label(name, LABELS[name], cases, places)
        )
    except LabelError as error:
        raise UnanswerableError(name, str(error)) from error
    train = question.targets[cases.of("train")[question.case]]
    if len(train) == 0 or np.allclose(train, train[:1], rtol=1e-6, atol=0.0):
        dates = cases.of("train").sum()
        raise UnanswerableError(name, f"its label is constant over the {dates} training dates")
    return question


def _of_pairs(cases: Cases) -> Question:
    first, second, hours = date_pairs(cases.times, cases.run)
    return Question(
        DISTANCE, False, False, hours[:, None], first, pairs=(first, second),
        blind=blind_of(DISTANCE),
    )  # fmt: skip


def _of_label(name: str, label: Label, cases: Cases, places: TokenPlaces) -> Question:
    train = cases.of("train")

    def values(hours: int) -> np.ndarray:
        """[case row column part] of places, [case sector 1] of sectors."""
        states = cases.states[hours], cases.states[max(hours - 24, -24)]
        if label.local:
            return _by_place(label.of(*states), places)
        return _by_sector(label, states, places)

    asked_values = values(label.lead_hours)
    is_known = np.isfinite(asked_values).reshape(len(asked_values), -1).all(axis=1)
    if missing := int((~is_known).sum()):
        raise LabelError(
            f"its label is missing on {missing} of {len(asked_values)} dates, where fields have "
            "gaps or the grid does not reach"
        )

    def everywhere(hours: int) -> np.ndarray:
        return _as_targets(label, values(hours), asked_values, train, places)

    def targets(of_all: np.ndarray) -> np.ndarray:
        by_place = places.at_places(of_all) if label.local else of_all
        return rearrange(by_place, "case place target -> (case place) target")

    of_all = everywhere(label.lead_hours)
    asked_targets, flat = targets(of_all), "case row column target -> case (row column) target"
    return Question(
        name=name,
        classes=label.kind != "number",
        local=label.local,
        targets=asked_targets,
        case=np.repeat(np.arange(len(cases.times)), len(asked_targets) // len(cases.times)),
        persistence=targets(everywhere(label.lead_hours - 24)) if label.persists else None,
        of_tokens=rearrange(of_all, flat).astype(np.float32) if label.local else None,
        blind=label.blind,
    )


def _by_sector(
    label: Label, states: tuple[xr.Dataset, xr.Dataset], places: TokenPlaces
) -> Float[np.ndarray, "case sector target"]:
    """The label of every sector, as if there were nothing else."""
    parts = [
        label.of(*(state.isel(longitude=cells) for state in states)).to_numpy()
        for cells in places.cells_of_sectors(states[0].sizes["longitude"])
    ]
    return np.stack(parts, axis=1)[..., None]


def _by_place(cells: xr.DataArray, places: TokenPlaces) -> np.ndarray:
    """The means of cells over tokens, [case row column part]."""
    if "part" not in cells.dims:
        cells = cells.expand_dims("part", axis=-1)
    cells = cells.transpose("case", "latitude", "longitude", "part")
    parts = [places.token_means(cells.isel(part=n).to_numpy()) for n in range(cells.sizes["part"])]
    return np.stack(parts, axis=-1)


def _as_targets(
    label: Label,
    values: np.ndarray,
    asked_values: np.ndarray,
    train: np.ndarray,
    places: TokenPlaces,
) -> Float[np.ndarray, "case *place target"]:
    """The targets of a label, of all tokens [row column] or sectors. Numbers are departures from
    the training mean of the place or sector, classes have one column each. The limit of an extreme
    is that of the drawn places, which are evenly spread over the sphere.

    asked_values: values of which mean and limit are taken, at the cases `train`.
    """
    if label.kind == "number":
        values = values - asked_values[train].mean(axis=0)
        values = np.where(np.abs(values) > _ROUNDING * np.abs(asked_values).max(), values, 0.0)
    elif label.kind == "extreme":
        limit = np.quantile(places.at_places(asked_values)[train], EXTREME_QUANTILE)
        values = np.eye(2)[(values[..., 0] > limit).astype(int)]
    else:
        values = np.eye(round(float(asked_values.max())) + 1)[np.rint(values[..., 0]).astype(int)]
    return values


@dataclass(frozen=True)
class Outcome:
    """How well one probe did with one source of features.

    samples: skill in every draw of the bootstrap. validation: skill of linear probes on runs that
        the fit lacks, of others on the validation dates, by
    which layers are chosen. refits: lowest and highest skill of fits that each lack one training
    run.
    """

    probe: str
    source: str
    layer: Layer | Literal["all"] | None
    method: str
    skill: float
    samples: Float[np.ndarray, "resample"]
    validation: float
    strength: float | None = None
    refits: tuple[float, float] = (np.nan, np.nan)


@dataclass(frozen=True)
class Scorer:
    """Fits probes to one question and scores them.

    seed: of the bootstrap's draws, which are the same for all sources, so that differences are
        paired.
    """

    question: Question
    cases: Cases
    bootstrap: BlockBootstrap
    seed: int = 0

    def _part(self, split: str) -> np.ndarray:
        return self.cases.of(split)[self.question.case]

    @cached_property
    def _counts(self) -> np.ndarray:
        runs = self.cases.run[self.cases.of("test")]
        lengths = [int((runs == run).sum()) for run in np.unique(runs)]
        return self.bootstrap.draw(lengths, np.random.default_rng(self.seed))

    @cached_property
    def _climatology(self) -> np.ndarray:
        return self.question.targets[~self._part("test")].mean(axis=0)

    def _losses(self, predicted: np.ndarray, split: str) -> np.ndarray:
        """Mean loss of every case of a split; NaN without rows."""
        part = self._part(split)
        error = ((predicted - self.question.targets[part]) ** 2).sum(axis=1)
        numbers = np.flatnonzero(self.cases.of(split))
        case = np.searchsorted(numbers, self.question.case[part])
        count = np.bincount(case, minlength=len(numbers)).astype(float)
        total = np.bincount(case, error, minlength=len(numbers))
        return np.divide(total, count, out=np.full(len(numbers), np.nan), where=count > 0)

    def _skill(self, predicted: np.ndarray, split: str) -> float:
        reference = np.nanmean(self._losses(self._climatology, split))
        return float(1.0 - np.nanmean(self._losses(predicted, split)) / reference)

    def _samples(self, predicted: np.ndarray) -> np.ndarray:
        if not self.bootstrap.is_possible(int(self.cases.of("test").sum())):
            return np.full(self.bootstrap.num_resamples, np.nan)
        losses = xr.Dataset(
            {
                "loss": ("case", self._losses(predicted, "test")),
                "reference": ("case", self._losses(self._climatology, "test")),
            }
        )
        means = resampled_means(losses, "case", self._counts)
        return (1.0 - means["loss"] / means["reference"]).to_numpy()

    def outcome(
        self, source: str, method: str, predict: Callable[[str], np.ndarray], **more: object
    ) -> Outcome:
        """The outcome of predictions, which are given by split."""
        test = predict("test")
        return Outcome(
            probe=self.question.name, source=source, method=method,
            skill=self._skill(test, "test"), samples=self._samples(test),
            validation=self._skill(predict("validation"), "validation"),
            **{"layer": None, **more},
        )  # pyright: ignore  # fmt: skip

    def references(self) -> list[Outcome]:
        """Climatology, and persistence where it makes sense."""
        targets, outcomes = self.question.targets, []

        def climatology(split: str) -> np.ndarray:
            return np.broadcast_to(self._climatology, targets[self._part(split)].shape)

        outcomes.append(self.outcome("climatology", "none", climatology))
        persistence = self.question.persistence
        if persistence is not None:
            outcomes.append(
                self.outcome("persistence", "none", lambda split: persistence[self._part(split)])
            )
        return outcomes

    def linear(self, features: Features) -> Outcome:
        """Ridge or logistic regression on the dates of training and validation, its penalty chosen
        by fits that each lack one run."""
        rows = self.question.rows(features, self.cases)
        chosen = chosen_linear(rows.where(~self._part("test")), classes=self.question.classes)
        outcome = self.outcome(
            features.source, "linear",
            lambda name: chosen.predict(rows.where(self._part(name)).features),
            layer=features.layer, strength=chosen.strength,
        )  # fmt: skip
        return replace(outcome, validation=chosen.skill)

    def neighbours(self, features: Features) -> Outcome:
        """The mean of the nearest training rows."""
        rows = self._by_split(features)
        return self.outcome(
            features.source, "neighbours",
            lambda name: nearest_neighbours(rows["train"], rows[name]), layer=features.layer,
        )  # fmt: skip

    def attentive(self, features: Features, places: TokenPlaces) -> Outcome:
        """One query that attends to all tokens of a sector."""
        assert features.tokens is not None and self.question.is_of_a_sector
        into_sectors = "case (row sector column) feature -> (case sector) (row column) feature"
        sizes = {"row": len(places.latitude[:: places.every]), "sector": places.sectors}
        tokens, part = rearrange(features.tokens, into_sectors, **sizes), self._part
        targets, (latitudes, _) = self.question.targets, places.spread_out()
        latitude = rearrange(latitudes, "(row sector column) -> sector (row column)", **sizes)[0]
        train, validation = (
            (tokens[part(split)], targets[part(split)]) for split in ("train", "validation")
        )
        area = np.cos(np.deg2rad(latitude)).clip(0.0)
        predict = fit_attentive(train, validation, area, seed=self.seed)
        return self.outcome(
            features.source, "attentive", lambda split: predict(tokens[part(split)]),
            layer=features.layer,
        )  # fmt: skip

    def with_refits(self, outcome: Outcome, features: Features) -> Outcome:
        """An outcome with the skills of fits that each lack one run, with the chosen penalty."""
        assert outcome.strength is not None
        rows, is_test = self.question.rows(features, self.cases), self._part("test")
        known, asked, skills = rows.where(~is_test), rows.where(is_test), []
        for run in np.unique(known.run):
            predict = fit_linear(
                known.where(known.run != run), outcome.strength, classes=self.question.classes
            )
            skills.append(self._skill(predict(asked.features), "test"))
        return replace(outcome, refits=(min(skills), max(skills)))

    def _by_split(self, features: Features) -> dict[str, Rows]:
        rows = self.question.rows(features, self.cases)
        split = self.cases.split[self.question.case]
        return {name: rows.where(split == name) for name in np.unique(split)}


def best_by_validation(outcomes: Sequence[Outcome], source: str, method: str) -> Outcome:
    """The best outcome of a source over all its layers, by the skill on validation."""
    of_source = [o for o in outcomes if o.source == source and o.method == method]
    return max(of_source, key=lambda outcome: outcome.validation)
