"""Runs all probes of one checkpoint: reads fields, encodes them, fits, scores, and compares with
the baselines."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from atmossl.batch import levels_by_variable
from atmossl.data.segment import Segment
from atmossl.evaluation.bootstrap import BlockBootstrap
from atmossl.inference.checkpoint import TrainedModel
from atmossl.inference.embed import EMBEDDING, Embedder, Layer
from atmossl.latent_losses import rankme
from atmossl.probes.cases import (
    SPLITS,
    Cases,
    Run,
    TokenPlaces,
    chosen_runs,
    draw_places,
    read_cases,
)
from atmossl.probes.features import (
    Features,
    encoded,
    map_components,
    position_and_calendar,
    principal_components,
    random_network,
    raw_values,
    side_by_side,
)
from atmossl.probes.finetuning import HEADS, Finetuner, FinetuneSettings, Fit, Head, num_windows
from atmossl.probes.labels import PROBES, Blind, check_probes
from atmossl.probes.scoring import (
    Outcome,
    Question,
    Scorer,
    UnanswerableError,
    ask,
    best_by_validation,
)
from atmossl.value_faults import as_written

STEADY_TRAIN_DATES, STEADY_TEST_BLOCKS = 50, 8  # with fewer, the scores come with a warning
_SEES_ALL = Blind()
BASELINES = ("climatology", "persistence", "position", "random", "pca", "eofs", "raw")


@dataclass(frozen=True)
class ProbeOptions:
    """How probes are run.

    probes: names of `labels.PROBES`; empty for all that the checkpoint's fields allow. layers: of
    the encoder; empty for all and the embedding. every: of all dates, each n-th. places: per date,
    for labels of a place. withheld: streams that neither the encoder nor the baselines of raw
    values see.
    block_days, resamples: of the bootstrap. overlap, batch_size: of the tiles.
    """

    probes: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    every: int = 3
    places: int = 32
    withheld: tuple[str, ...] = ()
    block_days: float = 4.0
    resamples: int = 500
    finetune: FinetuneSettings = FinetuneSettings()
    seed: int = 0
    overlap: float = 0.0
    batch_size: int = 16
    device: str = "cpu"


@dataclass(frozen=True)
class Tuned:
    """A probe that was fine-tuned. outcome: its source is `latents` where the trained network was
    the start, `random` where random weights were. fraction: of the training dates."""

    outcome: Outcome
    fraction: float
    fit: Fit


@dataclass(frozen=True)
class Probed:
    """The results of the probes of one checkpoint.

    outcomes: of every probe, source, layer and method. headlines: by probe, of linear probes on the
    layer of the latents that validation chose. rank: RankMe of the pooled latents' departures from
    their mean over the test dates, by (source, layer). test_latents: pooled, by layer. tuned: what
    was fine-tuned. without_position: probes whose latents were not told where and when they are.
    """

    outcomes: tuple[Outcome, ...]
    headlines: Mapping[str, Outcome]
    rank: Mapping[tuple[str, int], float]
    test_latents: Mapping[int, Float[np.ndarray, "case feature"]]
    num_cases: Mapping[str, int]
    tuned: tuple[Tuned, ...] = ()
    without_position: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Baselines:
    """Features that do not depend on what a network has learned, and, by probe, what was made of
    them."""

    features: list[Features]
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)


@dataclass(frozen=True)
class ProbeRun:
    """A checkpoint, its dates and its questions, all checked; `run` does the long work.

    embedders: of every run. left_out: probes that nobody named and that these data cannot answer,
    with the reason.
    """

    trained: TrainedModel
    options: ProbeOptions
    layers: tuple[int, ...]
    embedders: tuple[Embedder, ...]
    runs: tuple[Run, ...]
    cases: Cases
    places: TokenPlaces
    questions: tuple[Question, ...]
    left_out: tuple[str, ...] = ()

    @classmethod
    def prepare(
        cls,
        trained: TrainedModel,
        records: Mapping[str, Sequence[Segment]],
        options: ProbeOptions,
    ) -> "ProbeRun":
        """Read the fields and work out the labels.

        records: of the splits train, validation and test.
        Raises:
            ValueError: a checkpoint that cannot embed, an unknown probe or layer, a probe of
                `options` whose label is constant or missing, too few dates.
        """
        trained.require("embed")
        levels = {
            name: tuple(variable_levels)
            for name, variable_levels in levels_by_variable(trained.own_specs).items()
        }
        check_probes(options.probes, levels)
        count = trained.model.num_encoder_layers
        layers = options.layers or tuple(range(count))
        if wrong := [layer for layer in layers if not -count <= layer < count]:
            raise ValueError(f"layers={as_written(wrong)}; valid: {-count} to {count - 1}")
        layers = tuple(sorted({layer % count for layer in layers}))
        runs = chosen_runs(records, window_steps=trained.window.time, every=options.every)
        embedders = tuple(_embedder(trained, run.segment, options) for run in runs)
        cases = read_cases(runs, levels)
        places = _places(embedders[0], runs[0], len(cases.times), options)
        if options.probes:
            questions, left_out = tuple(ask(name, cases, places) for name in options.probes), ()
        else:
            questions, left_out = _all_that_can_be_asked(levels, cases, places)
        seen = _can_be_hidden(trained, embedders[0])
        questions = tuple(replace(one, blind=one.blind.within(seen)) for one in questions)
        _check_finetuned(options.finetune, questions)
        return cls(
            trained, options, layers, embedders, tuple(runs), cases, places, questions, left_out
        )  # fmt: skip

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know before the scores, a line each."""
        return (*self.left_out, *filter(None, [self._warning_of_few_dates]))

    @property
    def _warning_of_few_dates(self) -> str | None:
        """What few dates do to the scores; None where there are enough."""
        train, test = (int(self.cases.of(split).sum()) for split in ("train", "test"))
        blocks = test / self._bootstrap.block_length
        if train >= STEADY_TRAIN_DATES and blocks >= STEADY_TEST_BLOCKS:
            return None
        return (
            f"probes are fitted on {train} dates and scored on {test}, that is {blocks:.1f} blocks "
            f"of {self.options.block_days:g} days: with fewer than {STEADY_TRAIN_DATES} dates or "
            f"{STEADY_TEST_BLOCKS} blocks skills are mostly chance and intervals too narrow; take "
            "more by a smaller every or longer data"
        )

    @property
    def blinds(self) -> tuple[Blind, ...]:
        """What the encoder is not shown, in turn; all dates are encoded once for each."""
        asked = dict.fromkeys(question.blind for question in self.questions)
        return tuple(sorted(asked, key=lambda blind: (blind.position, blind.variables)))

    @property
    def num_windows(self) -> int:
        """Passes over the globe that `run` makes, each step of fine-tuning one of them."""
        settings, fits = self.options.finetune, 0
        for question, _, fraction, head in self._fits:
            fits += num_windows(self.cases, settings, question, fraction, head, self.options.seed)
        return 2 * len(self.blinds) * len(self.cases.times) + fits

    def run(
        self,
        advance: Callable[[float], object] = float,
        shared: dict[str, Baselines] | None = None,
    ) -> Probed:
        """Encode all dates with the trained and a random network, fit and score.

        shared: baselines of other checkpoints, of which those with the same architecture and dates
        are not fitted again; those of this one are added.
        """
        shared = {} if shared is None else shared
        answers: dict[str, tuple[list[Outcome], Outcome]] = {}
        sources: list[Features] = []  # of the first encoding, with which most is shown
        of_fields: dict[tuple[str, ...], list[Features]] = {}  # by the variables that are withheld
        for blind in self.blinds:
            trained = self._encoded(self.trained, "latents", blind, advance)
            key = self._key_of_baselines(blind)
            if key in shared:
                advance(float(len(self.cases.times)))
            else:
                if blind.variables not in of_fields:
                    of_fields[blind.variables] = self._features_of_fields(trained, blind)
                random = random_network(self.trained, self.options.seed)
                untrained = self._encoded(random, "random", blind, advance)
                shared[key] = Baselines([*untrained, *of_fields[blind.variables]])
            sources = sources or [*trained, *shared[key].features]
            for question in self.questions:
                if question.blind == blind:
                    answers[question.name] = self._answers(question, trained, shared[key])
        test = self.cases.of("test")
        pooled = {
            (source.source, source.layer): source.pooled[test]
            for source in sources
            if isinstance(source.layer, int) and source.pooled is not None
        }
        ordered = {question.name: answers[question.name] for question in self.questions}
        return Probed(
            outcomes=tuple(outcome for outcomes, _ in ordered.values() for outcome in outcomes),
            headlines={name: headline for name, (_, headline) in ordered.items()},
            rank={key: _rank(rows) for key, rows in pooled.items()},
            test_latents={layer: rows for (name, layer), rows in pooled.items()
                          if name == "latents"},
            num_cases={name: int(self.cases.of(name).sum()) for name in SPLITS},
            tuned=tuple(self._tuned(advance)) if self.options.finetune.fractions else (),
            without_position=frozenset(q.name for q in self.questions if q.blind.position),
        )  # fmt: skip

    def _key_of_baselines(self, blind: Blind) -> str:
        """The same for checkpoints that differ in what they have learned alone."""
        checkpoint_record = self.trained.checkpoint_record
        statistics = [found["fingerprint"] for found in checkpoint_record["statistics"].values()]
        keys = ("network", "model", "streams", "window", "first_guess")
        records = [(run.segment.location, run.segment.period) for run in self.runs]
        names = [question.name for question in self.questions]
        depends = [
            [checkpoint_record[key] for key in keys],
            statistics,
            records,
            names,
            self.options,
            blind,
        ]
        return repr(depends)

    def _blinded(self, trained: TrainedModel, blind: Blind) -> TrainedModel:
        if not blind.position:
            return trained
        return replace(trained, model=trained.model.without_position())

    def _encoded(
        self,
        trained: TrainedModel,
        source: str,
        blind: Blind,
        advance: Callable[[float], object],
    ) -> list[Features]:
        seeing = self._blinded(trained, blind)
        embedders = [_embedder(seeing, run.segment, self.options, blind) for run in self.runs]
        layers = encoded(embedders, self.runs, self.encoded_layers, self.places, source, advance)
        return [*layers, side_by_side(layers)] if len(layers) > 1 else layers

    @property
    def encoded_layers(self) -> tuple[Layer, ...]:
        """The layers whose latents are probed; the embedding, too, where nobody chose layers and
        the network tells it."""
        embedding = self.trained.model.tells_embedding and not self.options.layers
        return (EMBEDDING, *self.layers) if embedding else self.layers

    def _features_of_fields(self, latents: Sequence[Features], blind: Blind) -> list[Features]:
        """Baselines that see the fields that the encoder sees, and position and calendar. latents:
        principal components have as many features as the last layer has, and as all layers have
        side by side."""
        levels = {
            name: levels
            for name, levels in levels_by_variable(self.embedders[0].shown_specs).items()
            if name not in blind.variables
        }
        raw = raw_values(self.cases, self.places, levels)
        likes = [layer for layer in latents if layer.tokens is not None or layer.layer == "all"]
        return [
            raw.features,
            *(principal_components(raw, self.cases, self.places, like) for like in likes),
            *(map_components(raw, self.cases, like) for like in likes),
            position_and_calendar(self.cases, self.places),
        ]

    def _tuned(self, advance: Callable[[float], object]) -> Iterator[Tuned]:
        """The fine-tuned networks of every probe; the first ones start from random weights and
        have all labels."""
        starts = {
            "random": random_network(self.trained, self.options.seed),
            "latents": self.trained,
        }
        fits = self._fits
        tuners = {blind: self._finetuner(blind) for blind in {fit[0].blind for fit in fits}}
        for question, source, fraction, head in fits:
            model, tuner = (
                self._blinded(starts[source], question.blind).model,
                tuners[question.blind],
            )
            fit = tuner.fitted(model, question, fraction, head, advance)
            outcome = self._scorer(question).outcome(source, "finetuned", fit.predicted.__getitem__)
            yield Tuned(outcome, fraction, fit)

    @property
    def _fits(self) -> list[tuple[Question, str, float, Head]]:
        """Question, source, fraction and head of everything that is fine-tuned: the same heads
        for both sources."""
        settings = self.options.finetune
        if not settings.fractions:
            return []
        parts = [("random", 1.0), *(("latents", fraction) for fraction in settings.fractions)]
        chosen = [question for question in self.questions if question.name in settings.probes]
        return [(q, *part, head) for q in chosen for part in parts for head in HEADS]

    def _finetuner(self, blind: Blind) -> Finetuner:
        """Fits labels to windows on the whole grid."""
        options, whole = self.options, replace(self.trained.window, lat=0, lon=0)
        trained = replace(self.trained, window=whole)
        embedders = [_embedder(trained, run.segment, options, blind) for run in self.runs]
        views = [
            embedder.whole_view(time)
            for embedder, run in zip(embedders, self.runs, strict=True)
            for time in run.times
        ]
        names = [spec.name for spec in self.embedders[0].shown_specs]
        return Finetuner(
            self.cases, self.places, views, names, options.finetune, options.seed, options.device
        )

    @property
    def _bootstrap(self) -> BlockBootstrap:
        steps_a_day = 24.0 / (self.runs[0].segment.step_hours * self.options.every)
        dates_in_block = max(1, round(self.options.block_days * steps_a_day))
        return BlockBootstrap(dates_in_block, self.options.resamples)

    def _scorer(self, question: Question) -> Scorer:
        return Scorer(question, self.cases, self._bootstrap, self.options.seed)

    def _answers(
        self, question: Question, trained: Sequence[Features], baselines: Baselines
    ) -> tuple[list[Outcome], Outcome]:
        scorer = self._scorer(question)

        def fits(sources: Sequence[Features]) -> Iterator[Outcome]:
            for features in filter(question.can_be_asked_of, sources):
                yield from (scorer.linear(features), scorer.neighbours(features))
                if question.is_of_a_sector and features.tokens is not None:
                    yield scorer.attentive(features, self.places)

        if question.name not in baselines.outcomes:
            own = [*scorer.references(), *fits(baselines.features)]
            baselines.outcomes[question.name] = own
        outcomes = [*fits(trained), *baselines.outcomes[question.name]]
        best = best_by_validation(outcomes, "latents", "linear")
        features = next(source for source in trained if source.layer == best.layer)
        headline = scorer.with_refits(best, features)
        return [headline if outcome is best else outcome for outcome in outcomes], headline


def _all_that_can_be_asked(
    levels: Mapping[str, Sequence[int]], cases: Cases, places: TokenPlaces
) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    """The questions of all probes that a checkpoint's fields allow, and a line for each label that
    these data do not have."""
    questions, left_out = list[Question](), list[str]()
    for name in PROBES:
        try:
            check_probes([name], levels)
        except ValueError:  # it belongs to other fields
            continue
        try:
            questions.append(ask(name, cases, places))
        except UnanswerableError as error:
            left_out.append(f"without the probe {name}: {error.reason}")
    if not questions:
        raise ValueError(f"probes=[]: none can be asked; {'; '.join(left_out)}")
    return tuple(questions), tuple(left_out)


def _can_be_hidden(trained: TrainedModel, embedder: Embedder) -> Blind:
    """What the encoder sees and what can be kept from it: encodings without anything else would be
    those with all."""
    shown = {name for spec in embedder.shown_specs for name in spec.variables}
    is_told = trained.model.without_position() is not trained.model
    return Blind(position=is_told, variables=tuple(sorted(shown)))


def _check_finetuned(settings: FinetuneSettings, questions: Sequence[Question]) -> None:
    asked = [question.name for question in questions if question.pairs is None]
    wrong = [name for name in settings.probes if name not in asked]
    if settings.fractions and (wrong or not settings.probes):
        raise ValueError(
            f"finetune.probes={as_written(settings.probes)}; valid: of the probes of this run, "
            f"{', '.join(asked)}"
        )


def _embedder(
    trained: TrainedModel, segment: Segment, options: ProbeOptions, blind: Blind = _SEES_ALL
) -> Embedder:
    return Embedder(
        trained=trained, segments=(segment,), layer=-1, overlap=options.overlap,
        batch_size=options.batch_size, device=options.device, withheld=options.withheld,
        blank=blind.variables,
    )  # fmt: skip


def _places(embedder: Embedder, run: Run, num_cases: int, options: ProbeOptions) -> TokenPlaces:
    """The places of local labels, drawn from the tokens of the first stream."""
    stream = next(iter(embedder.fields(run.times[0]).values()))
    return draw_places(
        stream.latitude, stream.longitude, num_cases, options.places,
        np.random.default_rng(options.seed), embedder.segment.alignment.lon_shift,
    )  # fmt: skip


def _rank(pooled: np.ndarray) -> float:
    return float(rankme(torch.from_numpy(pooled - pooled.mean(axis=0))))


def linear_cka(
    first: Float[np.ndarray, "case feature"], second: Float[np.ndarray, "case other"]
) -> float:
    """Linear centred kernel alignment of two sets of features of the same cases (Kornblith et al.
    2019, equation 3 of section 3): 1 if one is a rotation and scaling of the other."""
    x, y = (rows - rows.mean(axis=0) for rows in (first, second))

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        return float(((a @ a.T) * (b @ b.T)).sum())

    return hsic(x, y) / max(np.sqrt(hsic(x, x) * hsic(y, y)), np.finfo(float).tiny)


def scores(probed: Probed, checkpoint: str, confidence: float = 0.95) -> pd.DataFrame:
    """One row for every probe, source, layer and method."""
    return pd.DataFrame(
        {
            "checkpoint": checkpoint, "probe": outcome.probe, "method": outcome.method,
            "source": outcome.source, "layer": outcome.layer, "skill": outcome.skill,
            **_limits(outcome.samples, confidence), "validation": outcome.validation,
            "penalty": outcome.strength,
            "refits_low": outcome.refits[0], "refits_high": outcome.refits[1],
            "headline": outcome is probed.headlines[outcome.probe],
        }
        for outcome in probed.outcomes
    ).astype({"layer": object})  # fmt: skip


def comparisons(probed: Probed, checkpoint: str, confidence: float = 0.95) -> pd.DataFrame:
    """The headline of every probe against the linear probe on every baseline (its layer chosen by
    validation, too): difference of skill, and its interval over the same draws of dates. `position`
    is not compared with latents that were not told it."""
    rows = []
    for probe, headline in probed.headlines.items():
        of_probe = [outcome for outcome in probed.outcomes if outcome.probe == probe]
        for baseline in BASELINES:
            method = "none" if baseline in ("climatology", "persistence") else "linear"
            if baseline == "position" and probe in probed.without_position:
                continue
            if not any(outcome.source == baseline for outcome in of_probe):
                continue
            other = best_by_validation(of_probe, baseline, method)
            difference = _limits(headline.samples - other.samples, confidence)
            rows.append(
                {
                    "checkpoint": checkpoint, "probe": probe, "layer": headline.layer,
                    "skill": headline.skill, "baseline": baseline, "baseline_skill": other.skill,
                    "difference": headline.skill - other.skill, **difference,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _limits(samples: np.ndarray, confidence: float) -> dict[str, float]:
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(samples, [tail, 1.0 - tail])
    return {"low": float(low), "high": float(high)}


def tunings(probed: Probed, checkpoint: str, confidence: float = 0.95) -> pd.DataFrame:
    """One row for every fine-tuned probe and fraction: its skill, and its loss over those of the
    networks that started from random weights with all labels, with their intervals. `scratch` is
    the one of these with the more skill on validation, `plain` the one whose linear map started
    at 0."""
    rows = []
    for tuned in probed.tuned:
        outcome, fit = tuned.outcome, tuned.fit
        random = [t for t in probed.tuned
                  if t.outcome.source == "random" and t.outcome.probe == outcome.probe]  # fmt: skip
        scratch = max((t.outcome for t in random), key=lambda one: one.validation)
        (plain,) = (t.outcome for t in random if t.fit.head == "zeros")
        rows.append(
            {
                "checkpoint": checkpoint, "probe": outcome.probe,
                "start": "trained" if outcome.source == "latents" else "random",
                "head": fit.head, "fraction": tuned.fraction, "dates": fit.num_dates,
                "learning_rate": fit.learning_rate, "skill": outcome.skill,
                **_limits(outcome.samples, confidence), "validation": outcome.validation,
                **_loss_ratio(outcome, scratch, ("loss_over_scratch", "ratio_low", "ratio_high")),
                **_loss_ratio(outcome, plain, ("loss_over_plain", "plain_low", "plain_high")),
            }
        )  # fmt: skip
    columns = ["checkpoint", "probe", "start", "head", "fraction", "dates", "learning_rate"]
    columns += ["skill", "low", "high", "validation", "loss_over_scratch", "ratio_low"]
    columns += ["ratio_high", "loss_over_plain", "plain_low", "plain_high"]
    return pd.DataFrame(rows, columns=columns)


def _loss_ratio(
    outcome: Outcome, reference: Outcome, names: tuple[str, str, str], confidence: float = 0.95
) -> dict[str, float]:
    """The loss of an outcome over that of another, and the interval of this ratio."""
    limits = _limits((1.0 - outcome.samples) / (1.0 - reference.samples), confidence)
    ratio = (1.0 - outcome.skill) / (1.0 - reference.skill)
    return dict(zip(names, (ratio, limits["low"], limits["high"]), strict=True))
