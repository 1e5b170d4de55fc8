"""How latents order the weather: principal components of tokens and of dates, cosines, analogues.

Latents are those of `atmossl.probes.features`: of the window's last step, normalised over their
features. Token latents hold the place, which position embeddings tell, and the weather; the
anomaly from every place's mean over the dates leaves the weather.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from atmossl.data.segment import Segment, hours_since_1970
from atmossl.evaluation.bootstrap import BlockBootstrap
from atmossl.probes.cases import Run
from atmossl.probes.models import EXCLUDED_DAYS

FEWEST_DATES = 8
STEADY_DATES = 40  # with fewer, means, components and analogues change with the choice of dates
_MOST_ROWS = 60_000  # that principal components of tokens are fitted on


def dated_runs(
    records: Mapping[str, Sequence[Segment]],
    *,
    window_steps: int,
    num_dates: int,
    shown: np.datetime64 | None = None,
) -> list[Run]:
    """So many dates, evenly spread over all that end a whole window. The shown date takes the place
    of the date nearest to it, in the last segment that has it.

    records: by split.
    Raises:
        ValueError: fewer dates than principal components need.
    """
    pairs = [(split, segment) for split, segments in records.items() for segment in segments]
    counts = [max(0, len(segment.times) - window_steps + 1) for _, segment in pairs]
    total = sum(counts)
    if min(num_dates, total) < FEWEST_DATES:
        raise ValueError(
            f"num_dates={num_dates}: {min(num_dates, total)} dates of {total} with a whole window "
            f"are too few for principal components; needed: {FEWEST_DATES} or more"
        )
    chosen = np.unique(np.linspace(0, total - 1, min(num_dates, total)).round().astype(int))
    starts = np.cumsum([0, *counts])  # numbers of the first dates of the segments, among all dates
    if shown is not None:
        ends_window = [segment.times[window_steps - 1 :] == shown for _, segment in pairs]
        for number in np.flatnonzero(np.concatenate(ends_window))[-1:]:
            chosen[np.abs(chosen - number).argmin()] = number
    runs = []
    for (split, segment), start, count in zip(pairs, starts[:-1], counts, strict=True):
        inside = (chosen >= start) & (chosen < start + count)
        steps = chosen[inside] - start + window_steps - 1
        runs += [Run(split, segment, steps)] if len(steps) else []
    return runs


def anomalies(tokens: Float[np.ndarray, "date token feature"]) -> np.ndarray:
    """Departures from every token's mean over all dates, float32."""
    tokens = tokens.astype(np.float32)
    return tokens - tokens.mean(axis=0)


@dataclass(frozen=True)
class TokenComponents:
    """Leading principal components of token anomalies, one basis for all dates. share: of the
    variance. spread: standard deviation of every component over all tokens and dates, by area."""

    scores: Float[np.ndarray, "date token component"]
    axes: Float[np.ndarray, "component feature"]
    share: Float[np.ndarray, "component"]
    spread: Float[np.ndarray, "component"]

    def colours(self, num_spreads: float = 2.5) -> Float[np.ndarray, "date token component"]:
        """Red, green and blue from 0 to 1; grey, 0.5, is the mean of the place, and full or no
        colour that many standard deviations from it."""
        return (0.5 + self.scores / (2 * num_spreads * self.spread)).clip(0.0, 1.0)


def token_components(
    departures: Float[np.ndarray, "date token feature"],
    latitude: Float[np.ndarray, "token"],
    count: int = 3,
) -> TokenComponents:
    """Principal components of anomalies, every token weighted by its area."""
    weight = np.cos(np.deg2rad(latitude)).clip(1e-6)
    rows = (departures * np.sqrt(weight)[:, None]).reshape(-1, departures.shape[-1])
    # the mean is 0 by construction; a thinned sample's own mean is next to nothing
    fitted = PCA(count, random_state=0).fit(rows[:: -(-len(rows) // _MOST_ROWS)])
    axes = np.asarray(fitted.components_)
    scores = departures @ axes.T
    spread = np.sqrt(np.average((scores**2).mean(axis=0), axis=0, weights=weight))
    return TokenComponents(scores, axes, fitted.explained_variance_ratio_, spread.clip(1e-12))


def correlations(
    scores: Float[np.ndarray, "date token component"],
    field: Float[np.ndarray, "date token"],
    latitude: Float[np.ndarray, "token"],
) -> Float[np.ndarray, "component"]:
    """Correlation of components with a field's anomalies from its mean at every token, over all
    dates and tokens, by area."""
    weight = np.cos(np.deg2rad(latitude)).clip(0.0)
    departure = field - field.mean(axis=0)
    product = np.einsum("dtc,dt,t->c", scores, departure, weight)
    squares = np.einsum("dtc,t->c", scores**2, weight) * (departure**2 @ weight).sum()
    return product / np.sqrt(squares).clip(1e-30)


def cosines(
    vectors: Float[np.ndarray, "token feature"], index: Int[np.ndarray, "place"]
) -> Float[np.ndarray, "place token"]:
    """Cosine of the angle between some tokens' vectors and all others'."""
    vectors = vectors.astype(np.float64)
    unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-30)
    return unit[index] @ unit.T


def root_mean_squares(
    values: Float[np.ndarray, "date value"], weights: Float[np.ndarray, "value"]
) -> Float[np.ndarray, "date date"]:
    """Root of the weighted mean square difference of all pairs of dates."""
    values = (values.astype(np.float64) - values.mean(axis=0)) * np.sqrt(weights / weights.sum())
    square = (values**2).sum(axis=1)
    return np.sqrt((square[:, None] + square - 2 * values @ values.T).clip(0.0))


def standardised(pooled: Float[np.ndarray, "date feature"]) -> np.ndarray:
    """Every feature's departure from its mean over the dates, in units of its spread."""
    return StandardScaler().fit_transform(pooled.astype(np.float64))


@dataclass(frozen=True)
class Analogues:
    """The dates most like each date, the most alike first, and how far they are. -1 and NaN where
    there are too few."""

    number: Int[np.ndarray, "date rank"]
    distance: Float[np.ndarray, "date rank"]


def admissible(
    times: np.ndarray, run: Int[np.ndarray, "date"], excluded_days: float = EXCLUDED_DAYS
) -> Bool[np.ndarray, "date date"]:
    """Which dates may be an analogue of which: those of other runs, and those of its own that are
    more than some days away."""
    days = hours_since_1970(times) / 24.0
    return (run[:, None] != run) | (np.abs(days[:, None] - days) > excluded_days)


def analogues(
    distance: Float[np.ndarray, "date date"], allowed: Bool[np.ndarray, "date date"], count: int = 3
) -> Analogues:
    """The nearest dates among those that are allowed."""
    apart = np.where(allowed, distance, np.inf)
    number = np.argsort(apart, axis=1, kind="stable")[:, :count]
    nearest = np.take_along_axis(apart, number, axis=1)
    there = np.isfinite(nearest)
    return Analogues(np.where(there, number, -1), np.where(there, nearest, np.nan))


@dataclass(frozen=True)
class AgainstChance:
    """How much farther the nearest dates are than a date drawn at random: mean over dates, and its
    95 % interval, whose ends are NaN where there are too few dates. Below 0 they are nearer."""

    difference: float
    low: float
    high: float


def against_chance(
    apart: Float[np.ndarray, "date date"],
    nearest: Analogues,
    times: np.ndarray,
    run: Int[np.ndarray, "date"],
) -> AgainstChance:
    """Compares the first analogue of every date with the mean over all dates that could have been
    its analogue. The interval is of a block bootstrap over the dates of every run, in blocks of
    `EXCLUDED_DAYS`.

    apart: the distance that is compared, which need not be the one that `nearest` was found by.
    """
    allowed = admissible(times, run)
    asked = np.flatnonzero(nearest.number[:, 0] >= 0)
    if not len(asked):
        return AgainstChance(np.nan, np.nan, np.nan)
    by_chance = np.where(allowed, apart, 0.0).sum(axis=1)[asked] / allowed[asked].sum(axis=1)
    differences = apart[asked, nearest.number[asked, 0]] - by_chance
    days, runs = hours_since_1970(times)[asked] / 24.0, run[asked]
    steps = np.diff(days)[runs[1:] == runs[:-1]]
    dates_in_block = EXCLUDED_DAYS / np.median(steps) if len(steps) else 1.0
    bootstrap = BlockBootstrap(max(1, round(dates_in_block)), 500)
    mean = float(differences.mean())
    if not bootstrap.is_possible(len(asked)):
        return AgainstChance(mean, np.nan, np.nan)
    lengths = [int((runs == number).sum()) for number in np.unique(runs)]
    counts = bootstrap.draw(lengths, np.random.default_rng(0))
    samples = xr.DataArray(counts @ differences / len(asked), dims="resample")
    low, high = bootstrap.limits(samples)
    return AgainstChance(mean, float(low), float(high))


def planes_of_days(pooled: Float[np.ndarray, "date feature"]) -> dict[str, np.ndarray]:
    """Coordinates [date 2] of all dates in the plane of the two leading principal components of the
    standardised pooled latents, by name; and in that of UMAP, where umap-learn is installed."""
    rows = standardised(pooled)
    fitted = PCA(2, random_state=0).fit(rows)
    share = fitted.explained_variance_ratio_
    planes = {f"PCA ({share[0]:.0%} and {share[1]:.0%} of the variance)": fitted.transform(rows)}
    try:
        from umap import UMAP  # type: ignore[import-not-found]
    except ImportError:
        return planes
    return {**planes, "UMAP": np.asarray(UMAP(random_state=0, n_jobs=1).fit_transform(rows))}
