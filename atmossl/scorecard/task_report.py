"""What one task or comparison leaves for the report."""

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
import xarray as xr

from atmossl import __version__
from atmossl.evaluation.bootstrap import BlockBootstrap
from atmossl.evaluation.diagnostics import Outliers, RankHistogram, Reliability, ZonalSpectrum
from atmossl.evaluation.events import event_scores
from atmossl.evaluation.joint import JOINT_SCORES, area_event_scores, joint_rank_histograms
from atmossl.evaluation.regions import ScoreRegion, boxes, find_regions, stacked_weights
from atmossl.evaluation.report.content import Example, Provenance, TaskReport
from atmossl.evaluation.report.figures import readable
from atmossl.evaluation.scores import DEFAULT_SCORES
from atmossl.evaluation.spherical import SphericalSpectrum
from atmossl.evaluation.verify import Tally
from atmossl.geometry import Grid
from atmossl.inference.checkpoint import TrainedModel
from atmossl.schema import EvaluateConfig


def regions_of(config: EvaluateConfig) -> list[ScoreRegion]:
    """The configured belts and boxes, the globe first."""
    names = ["global", *(name for name in config.regions if name != "global")]
    return [*find_regions(names), *boxes(config.boxes or {})]


def check_regions(config: EvaluateConfig, grid: Grid) -> None:
    """Raise ValueError for an unknown region or a box without cells."""
    cells = xr.Dataset(coords={"latitude": grid.latitude, "longitude": grid.longitude})
    stacked_weights(cells, regions_of(config))


def empty_tally(config: EvaluateConfig, task: str, model_name: str = "model") -> Tally:
    """A tally of all scores and diagnostics."""
    low, high = config.tails
    return Tally(
        task=task,
        model_name=model_name,
        regions=regions_of(config),
        scores=(
            *DEFAULT_SCORES,
            Outliers(),
            *event_scores(low, high),
            *JOINT_SCORES,
            *area_event_scores(high),
        ),
        diagnostics=(
            RankHistogram(),
            *joint_rank_histograms(),
            Reliability(high),
            ZonalSpectrum(),
            SphericalSpectrum(),
        ),
    )


def example_of(
    predicted: xr.Dataset, truth: xr.Dataset, name: str, hidden: np.ndarray | None = None
) -> Example:
    """One variable of the first case at its middle level and last lead time.

    hidden: cells [lat, lon] that were predicted; all by default.
    """
    field = predicted[name]
    dim = "init_time" if "init_time" in field.dims else "time"
    case = field.isel({dim: 0})
    level = None
    if "level" in case.dims:
        case = case.isel(level=case.sizes["level"] // 2)
        level = float(case["level"])
    if "lead_time" in case.dims:
        case = case.isel(lead_time=-1)
    time = case["time"] if dim == "time" else case["init_time"] + case["lead_time"]
    true = truth[name].sel(time=time.values)
    if level is not None:
        true = true.sel(level=level)
    cells = None if hidden is None else xr.DataArray(hidden, dims=("latitude", "longitude"))
    return Example(name, level, true.load(), case.load(), cells)


def period(times: np.ndarray) -> str:
    """First and last of the cases."""
    first, last = (np.datetime_as_string(time, "h") for time in times[[0, -1]])
    return f"from {first} to {last}"


def reported(
    config: EvaluateConfig,
    tally: Tally,
    examples: Sequence[Example],
    rng: np.random.Generator,
    *,
    about: str,
    period: str,
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
        period,
    )


def provenance_of(config: EvaluateConfig, trained: TrainedModel, command: str) -> Provenance:
    """The command and what its numbers depend on."""
    data = config.data.name or trained.data
    if config.forecasts:
        summary = f"Forecasts {', '.join(config.forecasts)} against {data}, split {config.split}."
        source = {"forecasts": ", ".join(config.forecasts)}
    else:
        tasks = ", ".join(readable(task.name) for task in config.tasks)
        summary = f"Zero-shot {tasks} on {data}, split {config.split}: held out from training."
        source = {"checkpoint": f"{config.checkpoint}, digest {trained.digest}"}
    packages = ("scores", "xarray", "numpy", "torch")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    facts = {
        "what": summary,
        **source,
        "data": f"{data}, split {config.split}, every {config.every}",
        "bootstrap": f"{config.bootstrap} resamples, seed {config.seed}",
        "events": f"beyond the quantiles {list(config.tails)} of the training record",
        "versions": f"atmossl {__version__}, {versions}",
    }
    return Provenance(command, facts)
