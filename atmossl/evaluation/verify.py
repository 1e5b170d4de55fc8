"""Verifies predictions and baselines against truth, a few cases at a time, and makes one tidy
table.

A `Tally` takes cases as they come and keeps only their area means, so memory does not grow with
the size of the fields; the table and the diagnostics are worked out at the end.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from atmossl.evaluation.alignment import (
    case_times,
    complete,
    match_baseline,
    require_same_grid,
    time_dim,
    truth_for,
)
from atmossl.evaluation.baselines import climatology_at
from atmossl.evaluation.bootstrap import BlockBootstrap, ratio_samples, resampled_means
from atmossl.evaluation.climate import Climate
from atmossl.evaluation.diagnostics import Outliers, RankHistogram, Reliability, ZonalSpectrum
from atmossl.evaluation.joint import OfDerived, quantities_of
from atmossl.evaluation.regions import REGIONS, ScoreRegion, stacked_weights
from atmossl.evaluation.scores import (
    DEFAULT_SCORES,
    Case,
    Crps,
    Rmse,
    Score,
    SpreadSkill,
    unlabelled,
)
from atmossl.evaluation.spherical import SphericalSpectrum
from atmossl.names import ENSEMBLE

COLUMNS = (
    "task",
    "source",
    "variable",
    "units",
    "level",
    "lead_hours",
    "region",
    "season",
    "score",
    "value",
    "low",
    "high",
    "p_value",
    "num_times",
)
RATIO_PREFIX = "rmse_ratio_vs_"
CRPS_RATIO_PREFIX = "crps_ratio_vs_"
WHOLE_YEAR = "all"
SEASONS = {"DJF": (12, 1, 2), "MAM": (3, 4, 5), "JJA": (6, 7, 8), "SON": (9, 10, 11)}

Diagnostic = RankHistogram | OfDerived | Reliability | ZonalSpectrum | SphericalSpectrum
_Samples = tuple[xr.DataArray, xr.DataArray]  # a score, and it in every resample
_COMPARED = ((RATIO_PREFIX, Rmse()), (CRPS_RATIO_PREFIX, Crps()))
_SCORES = (*DEFAULT_SCORES, Outliers())


@dataclass
class Tally:
    """Area means of every score, case by case, of one task's predictions and their baselines.

    Attributes:
        model_name: the source that the ratios compare with every other one.
        regions: belts that the grid does not reach are left out.
        diagnostics: worked out for every source that has what they need.
    """

    task: str
    model_name: str = "model"
    regions: Sequence[ScoreRegion] = (REGIONS["global"],)
    scores: Sequence[Score] = _SCORES
    diagnostics: Sequence[Diagnostic] = ()
    _parts: dict[tuple[str, str, str], list[xr.Dataset]] = field(default_factory=dict)
    _labels: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    _units: dict[str, str] = field(default_factory=dict)
    _months: dict[str, list[xr.DataArray]] = field(default_factory=dict)
    _lengths: dict[str, dict[str, int]] = field(default_factory=dict)
    _dim: str = ""

    def add(
        self,
        predictions: xr.Dataset,
        truth: xr.Dataset,
        baselines: Mapping[str, xr.Dataset],
        climate: Climate | None = None,
        series: str = "",
    ) -> None:
        """Add some cases of some variables; all sources are scored on the predictions' cases.

        series: the record that the cases are from; those of one record come one after another.
        Where the truth or a source is missing nothing of it is scored. Without a climate, the
        anomaly correlation and all that needs quantiles are left out.

        Raises:
            ValueError: variables, times, levels or cells that do not match; a baseline called
                like the model.
        """
        if self.model_name in baselines:
            raise ValueError(f"baselines: {self.model_name!r} is the model's name; choose another")
        beside = truth_for(predictions, truth)
        if climate is not None:
            require_same_grid(predictions, climate.mean, "the climatology")
        sources = {self.model_name: predictions} | {
            name: match_baseline(baseline, predictions, name)
            for name, baseline in baselines.items()
        }
        self._dim = time_dim(predictions)
        weights = stacked_weights(beside, self.regions)
        month = unlabelled(case_times(predictions).dt.month)
        for name in map(str, predictions.data_vars):
            self._units[name] = str(beside[name].attrs.get("units", ""))
            self._labels[name] = _labels_of(beside[name], weights)
            self._months.setdefault(name, []).append(month)
            lengths = self._lengths.setdefault(name, {})
            lengths[series] = lengths.get(series, 0) + month.sizes[self._dim]
            for source, dataset in sources.items():
                case = _case(dataset[name], beside[name], climate)
                self._add_case(name, source, case, weights)

    def _add_case(self, variable: str, source: str, case: Case, weights: xr.DataArray) -> None:
        """Add the scores of one case. Scores of the same derived quantity follow one another, so
        that it is computed once and no more than two are in memory."""
        chosen = [s for s in (*self.scores, *self.diagnostics) if s.applies(case)]
        in_order = sorted(chosen, key=lambda s: [q.name for q in quantities_of(s)])
        last = {q: number for number, s in enumerate(in_order) for q in quantities_of(s)}
        means = {}
        for number, statistic in enumerate(in_order):
            means[statistic.name] = statistic.per_time(case, weights)
            case.forget(q for q in quantities_of(statistic) if last[q] == number)
        for statistic in chosen:
            key = (variable, source, statistic.name)
            self._parts.setdefault(key, []).append(means[statistic.name])

    def table(self, bootstrap: BlockBootstrap, rng: np.random.Generator) -> pd.DataFrame:
        """A table of every score of every source with its interval, and the ratios of the model's
        RMSE and CRPS to those of its baselines. All share the draws of the bootstrap.

        Level is NaN for surface variables, lead_hours for tasks without lead time. Scores that a
        source cannot have (spread of one member) have no row. Seasons have rows of their own if
        the cases cover more than one.
        """
        frames = []
        draws = self._draws(bootstrap, rng)
        for variable, units in self._units.items():
            months = xr.concat(self._months[variable], self._dim)
            means = self._means(variable)
            for season, chosen in _seasons(months).items():
                plan = _Plan(self._dim, chosen, draws[variable], bootstrap, self._labels[variable])
                same = {"task": self.task, "variable": variable, "units": units, "season": season}
                frames += [rows | same for rows in self._rows(plan, means)]
        return _as_table(frames)

    def _draws(self, bootstrap: BlockBootstrap, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The draws of the bootstrap for every variable. Variables with the same cases share
        their draws."""
        drawn: dict[tuple[int, ...], np.ndarray] = {}
        for lengths in self._lengths.values():
            key = tuple(lengths.values())
            if key not in drawn:
                drawn[key] = bootstrap.draw(key, rng)
        return {name: drawn[tuple(counts.values())] for name, counts in self._lengths.items()}

    def _rows(
        self, plan: "_Plan", means: Mapping[tuple[str, str], xr.Dataset]
    ) -> Iterator["_Columns"]:
        scores = {score.name: score for score in self.scores}
        for (source, name), per_time in means.items():
            if name in scores:
                rows = plan.score_rows(scores[name], per_time)
                yield rows | {"source": source, "score": name}
        baselines = [s for s in dict.fromkeys(s for s, _ in means) if s != self.model_name]
        for prefix, score in _COMPARED:
            ours = means.get((self.model_name, score.name))
            if ours is None:
                continue
            for baseline in baselines:
                rows = plan.ratio_rows(score, ours, means[baseline, score.name])
                yield rows | {"source": self.model_name, "score": prefix + baseline}

    def overall(self, bootstrap: BlockBootstrap, rng: np.random.Generator) -> pd.DataFrame:
        """The model in one number per score, with its interval (columns score, baseline, value,
        low, high, p_value): means over variables, levels and lead times on the globe. The scores
        are `rmse_ratio` and `crps_ratio` to each baseline, and `spread_skill` of an ensemble."""
        draws = self._draws(bootstrap, rng)
        parts: dict[tuple[str, str], list[_Samples]] = {}
        for variable in self._units:
            plan = _Plan(self._dim, None, draws[variable], bootstrap, self._labels[variable])
            for key, samples in self._overall_of(plan, variable):
                parts.setdefault(key, []).append(samples)
        enough = bootstrap.is_possible(min(counts.shape[1] for counts in draws.values()))
        rows = []
        for key, of_variables in parts.items():
            value, samples = (
                xr.concat([_mean_of_globe(part) for part in both], "variable").mean("variable")
                for both in zip(*of_variables, strict=True)
            )
            low, high = (float(limit) for limit in bootstrap.limits(samples))
            ends = (low, high, float(bootstrap.p_value(samples, null=1.0)))
            rows.append((*key, float(value), *(ends if enough else (np.nan,) * 3)))
        return pd.DataFrame(rows, columns=["score", "baseline", "value", "low", "high", "p_value"])

    def _overall_of(
        self, plan: "_Plan", variable: str
    ) -> Iterator[tuple[tuple[str, str], _Samples]]:
        """One variable's part of the overall scores, by score and baseline."""
        means = self._means(variable)
        for prefix, score in _COMPARED:
            for (source, name), theirs in means.items():
                if name == score.name and source != self.model_name:
                    ratio = plan.ratio(score, means[self.model_name, name], theirs)
                    yield (prefix.removesuffix("_vs_"), source), ratio
        spread = SpreadSkill()
        if (self.model_name, spread.name) in means:
            yield (spread.name, ""), plan.score(spread, means[self.model_name, spread.name])

    def _means(self, variable: str) -> dict[tuple[str, str], xr.Dataset]:
        """Area means of all cases by source and score."""
        return {
            (source, name): _joined(parts, self._dim)
            for (owner, source, name), parts in self._parts.items()
            if owner == variable
        }

    def diagnosed(self) -> dict[tuple[str, str], xr.Dataset]:
        """Means over all cases, [source, ...], by the names of diagnostic and variable."""
        datasets: dict[tuple[str, str], list[xr.Dataset]] = {}
        for diagnostic in self.diagnostics:
            for (variable, source, name), parts in self._parts.items():
                if name == diagnostic.name:
                    value = diagnostic.value(_joined(parts, self._dim).mean(self._dim))
                    labels = {
                        dim: values[: value.sizes[dim]]
                        for dim, values in self._labels[variable].items()
                        if dim in value.dims and dim not in value.coords
                    }
                    value = value.assign_coords(labels).expand_dims(source=[source])
                    datasets.setdefault((name, variable), []).append(value)
        return {key: xr.concat(parts, "source", join="outer") for key, parts in datasets.items()}


def verify(
    predictions: xr.Dataset,
    truth: xr.Dataset,
    baselines: Mapping[str, xr.Dataset],
    climate: Climate | None = None,
    *,
    task: str,
    rng: np.random.Generator,
    model_name: str = "model",
    regions: Sequence[ScoreRegion] = (REGIONS["global"],),
    scores: Sequence[Score] = _SCORES,
    bootstrap: BlockBootstrap | None = None,
) -> pd.DataFrame:
    """The table of predictions that are all in memory; see `Tally`."""
    tally = Tally(task=task, model_name=model_name, regions=regions, scores=scores)
    tally.add(predictions, truth, baselines, climate)
    return tally.table(bootstrap or BlockBootstrap(), rng)


def are_draws(prediction: xr.DataArray) -> bool:
    """Whether the members of a prediction, if it has any, are random draws: not those of a tail."""
    member = prediction.coords.get("member")
    return member is None or member.attrs.get(ENSEMBLE) != "tail"


def _case(prediction: xr.DataArray, truth: xr.DataArray, climate: Climate | None) -> Case:
    """One variable's prediction with what the climate knows of its cells."""
    name = str(truth.name)
    there = complete(prediction)
    truth = truth if bool(there.all()) else truth.where(there)
    if climate is None or name not in climate.mean:
        return Case(prediction, truth, are_draws=are_draws(prediction))
    normal = climatology_at(climate.mean[[name]], case_times(truth.to_dataset()))[name]
    quantiles, rain = climate.quantiles[name], climate.rain.get(name)
    if "level" in truth.dims:
        normal, quantiles = normal.sel(level=truth["level"]), quantiles.sel(level=truth["level"])
    cells = {"latitude": truth["latitude"], "longitude": truth["longitude"]}
    normal, quantiles = normal.assign_coords(cells), quantiles.assign_coords(cells)
    normal = normal.transpose(*truth.dims)
    return Case(prediction, truth, normal, quantiles, rain, are_draws(prediction))


def _mean_of_globe(ratio: xr.DataArray) -> xr.DataArray:
    """The mean of a ratio over levels and lead times, in the first region."""
    globe = ratio.isel(region=0, drop=True)
    return globe.mean([dim for dim in globe.dims if dim != "resample"])


def _seasons(months: xr.DataArray) -> dict[str, xr.DataArray | None]:
    """The cases of each season, and None for all cases. If there is one season only, it is left
    out."""
    cases_of = {name: months.isin(of_season) for name, of_season in SEASONS.items()}
    present = {name: chosen for name, chosen in cases_of.items() if bool(chosen.any())}
    return {WHOLE_YEAR: None} | (present if len(present) > 1 else {})


def _labels_of(truth: xr.DataArray, weights: xr.DataArray) -> dict[str, np.ndarray]:
    """The lead times and levels of a variable, and the regions."""
    labels = {dim: truth[dim].to_numpy() for dim in ("lead_time", "level") if dim in truth.dims}
    return labels | {"region": weights["region"].to_numpy().astype(object)}


def _joined(parts: Sequence[xr.Dataset], dim: str) -> xr.Dataset:
    """The area means of all cases, in the order in which they came."""
    first = parts[0]
    if len(parts) == 1:
        return first
    fields = {
        name: xr.Variable.concat([part.variables[name] for part in parts], dim)
        for name in first.data_vars
    }
    return xr.Dataset(fields, first.coords)


_Columns = dict[str, Any]  # of some rows: an array each, or what all of them share


def _as_table(parts: Sequence[_Columns]) -> pd.DataFrame:
    """The rows one after another. One array for each column: a DataFrame for every score would
    take longer than the scores."""
    lengths = [len(part["value"]) for part in parts]

    def column(name: str) -> np.ndarray:
        values = [
            np.full(length, part[name], dtype=object) if isinstance(part[name], str)
            else np.broadcast_to(part[name], (length,))
            for part, length in zip(parts, lengths, strict=True)
        ]  # fmt: skip
        return np.concatenate(values)

    return pd.DataFrame({name: column(name) for name in COLUMNS})


@dataclass(frozen=True)
class _Plan:
    """The cases that count, the draws of the bootstrap, and the labels of lead times, levels and
    regions."""

    dim: str
    chosen: xr.DataArray | None
    counts: np.ndarray
    bootstrap: BlockBootstrap
    labels: Mapping[str, np.ndarray]

    def _only_chosen(self, per_time: xr.Dataset) -> xr.Dataset:
        """Differences between lead times are fewer than those; each belongs to its first one."""
        if self.chosen is None:
            return per_time
        sizes = {str(dim): slice(per_time.sizes[dim]) for dim in self.chosen.dims}
        return per_time.where(self.chosen.isel(sizes))

    @cached_property
    def num_times(self) -> int:
        if self.chosen is None:
            return self.counts.shape[1]
        other_dims = [dim for dim in self.chosen.dims if dim != self.dim]
        return int(self.chosen.any(other_dims).sum())

    def score_rows(self, score: Score, per_time: xr.Dataset) -> _Columns:
        value, samples = self.score(score, per_time)
        return self._rows(value, self.bootstrap.limits(samples), None)

    def score(self, score: Score, per_time: xr.Dataset) -> _Samples:
        """A score over all cases, and the same score in every resample."""
        per_time = self._only_chosen(per_time)
        samples = score.value(resampled_means(per_time, self.dim, self.counts))
        return score.value(per_time.mean(self.dim)), samples

    def ratio(self, score: Score, ours: xr.Dataset, theirs: xr.Dataset) -> _Samples:
        """Our score over that of a baseline, and the same in every resample."""
        ours, theirs = self._only_chosen(ours), self._only_chosen(theirs)
        error = score.value(theirs.mean(self.dim))
        value = score.value(ours.mean(self.dim)) / error.where(error > 0)
        return value, ratio_samples(ours, theirs, score.value, self.dim, self.counts)

    def ratio_rows(self, score: Score, ours: xr.Dataset, theirs: xr.Dataset) -> _Columns:
        value, samples = self.ratio(score, ours, theirs)
        limits = self.bootstrap.limits(samples)
        return self._rows(value, limits, self.bootstrap.p_value(samples, null=1.0))

    def _rows(
        self,
        value: xr.DataArray,
        limits: tuple[xr.DataArray, xr.DataArray],
        p_value: xr.DataArray | None,
    ) -> _Columns:
        """Rows over level, lead time and region. Values that need draws are NaN in a short
        record."""
        numbers: dict[str, xr.DataArray | None] = {"low": limits[0], "high": limits[1]}
        numbers["p_value"] = p_value
        if not self.bootstrap.is_possible(self.num_times):
            numbers = dict.fromkeys(numbers)
        columns: _Columns = {
            name: np.nan if array is None else array.transpose(*value.dims).to_numpy().ravel()
            for name, array in numbers.items()
        }
        labels = dict(zip(value.dims, np.indices(value.shape), strict=True))
        of_row = {str(dim): self.labels[str(dim)][at.ravel()] for dim, at in labels.items()}
        level, lead = of_row.get("level", np.nan), of_row.get("lead_time")
        columns["lead_hours"] = np.nan if lead is None else lead / np.timedelta64(1, "h")
        columns |= {"level": np.asarray(level, dtype=np.float64), "region": of_row["region"]}
        return columns | {"value": value.to_numpy().ravel(), "num_times": self.num_times}


def rows_where(table: pd.DataFrame, **labels: Any) -> Any:
    """The rows (a data frame) with all of these labels; None stands for a missing one."""
    rows: Any = table
    for column, label in labels.items():
        rows = rows[rows[column].isna() if label is None else rows[column] == label]
    return rows


def rows_of_prefix(table: pd.DataFrame, prefix: str) -> Any:
    """The rows (a data frame) whose score begins with `prefix`; the rest of the score's name is
    the column `baseline`."""
    scores: Any = table["score"]
    rows: Any = table[scores.str.startswith(prefix)]
    return rows.assign(baseline=rows["score"].str.removeprefix(prefix))
