"""What one task or comparison leaves for the report."""

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import numpy as np
import xarray as xr

from atmossl import __version__
from atmossl.batch import PRIMARY
from atmossl.evaluation.alignment import match_baseline, time_dim, truth_for
from atmossl.evaluation.bootstrap import BlockBootstrap
from atmossl.evaluation.diagnostics import Outliers, RankHistogram, Reliability, ZonalSpectrum
from atmossl.evaluation.events import event_scores
from atmossl.evaluation.joint import area_event_scores, joint_rank_histograms, joint_scores
from atmossl.evaluation.regions import ScoreRegion, boxes, find_regions, stacked_weights
from atmossl.evaluation.report.content import Example, Provenance, Span, TaskReport
from atmossl.evaluation.report.plumes import plume_of
from atmossl.evaluation.scores import DEFAULT_SCORES
from atmossl.evaluation.spherical import SphericalSpectrum
from atmossl.evaluation.verify import Tally
from atmossl.geometry import Grid
from atmossl.inference.checkpoint import TrainedModel
from atmossl.schema import EvaluateConfig
from atmossl.value_faults import listed


def regions_of(config: EvaluateConfig) -> list[ScoreRegion]:
    """The configured belts and boxes, the globe first."""
    names = ["global", *(name for name in config.regions if name != "global")]
    return [*find_regions(names), *boxes(config.boxes or {})]


def check_regions(config: EvaluateConfig, grid: Grid) -> None:
    """Raise ValueError for an unknown region or a box without cells."""
    cells = xr.Dataset(coords={"latitude": grid.latitude, "longitude": grid.longitude})
    stacked_weights(cells, regions_of(config))


def empty_tally(
    config: EvaluateConfig, task: str, model_name: str = "model", box_shift: int = 0
) -> Tally:
    """A tally of all scores and diagnostics. box_shift: see `AreaMeans`."""
    low, high = config.tails
    return Tally(
        task=task,
        model_name=model_name,
        regions=regions_of(config),
        scores=(
            *DEFAULT_SCORES,
            Outliers(),
            *event_scores(low, high),
            *joint_scores(box_shift),
            *area_event_scores(high, box_shift),
        ),
        diagnostics=(
            RankHistogram(),
            *joint_rank_histograms(box_shift),
            Reliability(high),
            ZonalSpectrum(),
            SphericalSpectrum(),
        ),
    )


def example_of(
    predicted: xr.Dataset,
    truth: xr.Dataset,
    name: str,
    *,
    hidden: np.ndarray | None = None,
    baselines: Mapping[str, xr.Dataset] | None = None,
    box_shift: int = 0,
) -> Example:
    """One variable of the first case at its middle level and last lead time, without the input.

    hidden: cells [lat, lon] that were predicted; all by default. baselines: of the same cases.
    box_shift: see `AreaMeans`.
    """
    dim = time_dim(predicted)

    def at_level(field: xr.DataArray) -> xr.DataArray:
        case = field.isel({dim: 0})
        return case.isel(level=case.sizes["level"] // 2) if "level" in case.dims else case

    def chosen(field: xr.DataArray) -> xr.DataArray:
        return at_level(field).isel(lead_time=-1, missing_dims="ignore")

    case = chosen(predicted[name])
    level = float(case["level"]) if "level" in case.coords else None
    first = predicted[[name]].isel({dim: [0]})
    true = truth_for(first, truth)[name]
    beside = {
        source: chosen(match_baseline(answer[[name]], predicted[[name]], source)[name]).load()
        for source, answer in (baselines or {}).items()
    }
    cells = None if hidden is None else xr.DataArray(hidden, dims=("latitude", "longitude"))
    plume = plume_of(at_level(first[name]), at_level(true), cells, box_shift)
    return Example(
        name, level, chosen(true).load(), case.load(), cells, baselines=beside, plume=plume
    )


def valid_time(case: xr.DataArray) -> xr.DataArray:
    """Of a prediction of one time."""
    return case["time"] if "time" in case.coords else case["init_time"] + case["lead_time"]


def span(times: np.ndarray, record: str = "") -> Span:
    """First and last of the cases of a record."""
    first, last = (str(np.datetime_as_string(time, "h")) for time in times[[0, -1]])
    return Span(record, first, last)


def when(offset: np.timedelta64) -> str:
    """`6 h before` of an offset of -6 h."""
    hours = float(offset / np.timedelta64(1, "h"))
    if hours == 0:
        return "at the same time"
    return f"{abs(hours):g} h {'before' if hours < 0 else 'after'}"


def reported(
    config: EvaluateConfig,
    tally: Tally,
    examples: Sequence[Example],
    rng: np.random.Generator,
    *,
    about: str,
    spans: Sequence[Span],
) -> TaskReport:
    """The table and diagnostics of a full tally."""
    bootstrap = BlockBootstrap(num_resamples=config.bootstrap)
    return TaskReport(
        tally.task,
        tally.model_name,
        tally.table(bootstrap, rng),
        tally.overall(bootstrap, rng),
        tally.diagnosed(),
        tuple(examples),
        about,
        tuple(spans),
    )


def provenance_of(
    config: EvaluateConfig, trained: TrainedModel, command: str, reports: Sequence[TaskReport]
) -> Provenance:
    """Which model was scored on what, the command, and what its numbers depend on."""
    data = config.data.name or trained.data
    split = f"{data}, split {config.split}"
    spans = [span for report in reports for span in report.spans]
    names = ", ".join(dict.fromkeys(span.record for span in spans if span.record))
    first, last = min(span.first for span in spans), max(span.last for span in spans)
    counts = [report.num_cases for report in reports]
    cases = " to ".join(dict.fromkeys((str(min(counts)), str(max(counts)))))
    scored = f"{split}{f' ({names})' if names else ''}, {first} to {last}: {cases} cases"
    if config.forecasts:
        title = f"Forecasts on {split}"
        summary = {"forecasts": ", ".join(config.forecasts)}
    else:
        title = f"Zero-shot tasks of {config.checkpoint} on {split}"
        summary = {
            "checkpoint": f"{config.checkpoint}, digest {trained.digest}",
            "trained on": trained_on(trained),
        }
        scored += ", held out from training"
    packages = ("scores", "xarray", "numpy", "torch")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    facts = {
        "dates": f"every {config.every}",
        "bootstrap": f"{config.bootstrap} resamples, seed {config.seed}",
        "events": f"beyond the quantiles {listed(config.tails)} of the training record",
        "versions": f"atmossl {__version__}, {versions}",
    }
    return Provenance(title, {**summary, "scored on": scored}, command, facts)


def trained_on(trained: TrainedModel) -> str:
    """Data, their parts and dates; where a network is imported from."""
    first, last = trained.training_dates
    parts = re.findall(r"(?:^|; )(\S+) \d{4}-", trained.normaliser.statistics[PRIMARY].period)
    named = f" ({', '.join(parts)})" if len(parts) > 1 else ""
    data = f"{trained.data}{named}, {first} to {last}"
    if origin := trained.checkpoint_record.get("imported_from"):
        return f"{origin}; normalised by {data}"
    return data
