"""Compares forecast stores of several models on the cases, levels and cells that they have in
common."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import PurePosixPath

import numpy as np
import xarray as xr
from rich.progress import track

from atmossl.data.backends import open_store
from atmossl.data.catalog import CatalogEntry, SegmentEntry
from atmossl.data.chunks import Access
from atmossl.data.segment import Segment
from atmossl.data.store import open_split
from atmossl.evaluation import baselines as base
from atmossl.evaluation.alignment import case_times, complete
from atmossl.evaluation.climate import Climate
from atmossl.evaluation.forecasts import (
    Common,
    canonical_forecast,
    cases_within,
    check_same_units,
    common_ground,
    on_grid,
    on_labels,
    parts_of,
    read_part,
    without_further_dims,
)
from atmossl.evaluation.regrid import ConservativeRegridder
from atmossl.evaluation.report.content import Example, Given, TaskReport
from atmossl.geometry import Grid
from atmossl.schema import EvaluateConfig
from atmossl.scorecard.checks import check_calendar, check_rain
from atmossl.scorecard.records import chosen_segments
from atmossl.scorecard.task_report import (
    check_regions,
    empty_tally,
    example_of,
    reported,
    span,
    when,
)
from atmossl.value_faults import as_written, listed

_ANONYMOUS = {"gs": {"token": "anon"}, "s3": {"anon": True}}


def open_forecasts(
    locations: tuple[str, ...], *, pressure_levels: bool = True
) -> dict[str, xr.Dataset]:
    """The forecast stores in one form, unread, by the names of their files.

    Raises:
        ValueError: no such store, two of one name, or no forecast in it.
    """
    forecasts = {}
    for location in locations:
        name = PurePosixPath(location.rstrip("/")).name.removesuffix(".zip")
        name = name.removesuffix(".zarr").removesuffix(".nc")
        if name in forecasts or name in ("persistence", "climatology"):
            raise ValueError(f"forecasts={location}: the name {name} is taken; rename the file")
        options = _ANONYMOUS.get(location.partition("://")[0], {})
        store = open_store(SegmentEntry(location=location, storage_options=options))
        forecasts[name] = canonical_forecast(
            store.dataset, location, pressure_levels=pressure_levels
        )
    return forecasts


def compare_forecasts(config: EvaluateConfig, entry: CatalogEntry) -> TaskReport:
    """Score every configured forecast on the common cases, levels and grid, against the truth of a
    catalog entry. The first forecast is compared with the others, and with persistence and
    climatology.

    Raises:
        ValueError: a store that cannot be read, or nothing in common.
    """
    pressure_levels = entry.levels_are == "pressure"
    forecasts = open_forecasts(config.forecasts, pressure_levels=pressure_levels)
    present = [{str(name) for name in dataset.data_vars} for dataset in forecasts.values()]
    variables = sorted(set(entry.variables).intersection(*present))
    if not variables:
        have = {name: sorted(v) for name, v in zip(forecasts, present, strict=True)}
        raise ValueError(
            f"forecasts: no common variable; {as_written(have)}; data: "
            f"{listed(sorted(entry.variables))}"
        )
    forecasts = {
        name: without_further_dims(dataset[variables], f"forecasts: {name}")
        for name, dataset in forecasts.items()
    }
    levels = _common_levels(forecasts, entry)
    truth, training = (
        open_split(
            entry,
            split,
            variables=variables,
            levels=levels,
            access=Access(input_limits=config.input_limits),
        )
        for split in (config.split, "train")
    )
    return score_forecasts(config, forecasts, chosen_segments(truth, config), training)


def _common_levels(forecasts: Mapping[str, xr.Dataset], entry: CatalogEntry) -> list[int]:
    have = {
        name: sorted({int(level) for level in forecast["level"]})
        for name, forecast in forecasts.items()
        if "level" in forecast.dims
    }
    shared = set(entry.levels).intersection(*have.values())
    if have and not shared:
        raise ValueError(
            f"level: nothing in common; {as_written(have)}; data: {listed(sorted(entry.levels))}"
        )
    return sorted(shared) if len(have) == len(forecasts) else []


def score_forecasts(
    config: EvaluateConfig,
    forecasts: Mapping[str, xr.Dataset],
    truth: Sequence[Segment],
    training: Sequence[Segment],
) -> TaskReport:
    """Score all forecasts, part by part, and every case against one segment of the truth.

    Raises:
        ValueError: segments of the truth that overlap in time, or nothing in common.
    """
    for segment in (*truth, *training):
        check_calendar(config, segment)
    records = [lazy_dataset(s) for s in sorted(truth, key=lambda s: s.times[0])]
    whole = _joined(records, [segment.name for segment in truth])
    check_same_units(forecasts, whole)
    common = common_ground(forecasts, whole, config.every)
    check_regions(config, common.grid)
    _check_climate(training, common.grid)
    times = whole["time"].to_numpy()
    series = _series(records, common, times)
    common = replace(common, cases=np.concatenate([cases for _, cases in series]))
    prepare = partial(_on_common, common=common)
    history = [
        on_labels(lazy_dataset(segment)[list(common.variables)], common) for segment in training
    ]
    climate = Climate.of(history, quantiles=config.tails, prepare=prepare)
    # of all cases or of none, since scores are paired
    persists = bool(np.isin(common.cases, times).all())
    first = next(iter(forecasts))
    tally = empty_tally(config, "forecasts", first)
    examples: dict[str, Example] = {}
    lacking: dict[str, float] = {}
    empty = set(common.variables)  # of which no value can be scored
    middle = common.cases[len(common.cases) // 2]
    parts = [
        (part, record, str(number))
        for number, (record, cases) in enumerate(series)
        for part in parts_of(forecasts, replace(common, cases=cases))
    ]
    for part, record, name_of_series in track(parts, description="forecasts"):
        datasets, name = read_part(forecasts, common, part), part.variable
        ours = datasets.pop(first)
        needed = np.concatenate([ours[common.dim], case_times(ours).to_numpy().ravel()])
        scorable = np.intersect1d(needed, record["time"].to_numpy())
        beside = _on_common(record[[name]].sel(time=scorable), common)
        baselines = datasets | _trivial(ours, beside, climate, persists=persists)
        ours, baselines, share = _where_all_have(ours, baselines)
        lacking[name] = max(lacking.get(name, 0.0), share)
        empty -= {name} if share < 1 else set()
        tally.add(ours, beside, baselines, climate, name_of_series)
        if middle in ours[common.dim]:
            case = ours.sel({common.dim: [middle]})
            example = example_of(case, beside, name, baselines=baselines)
            examples[name] = replace(example, given=_state_at_init(example, beside))
    _check_some_scored(forecasts, empty)
    said = _about(common, first, lacking)
    rng = np.random.default_rng(config.seed)
    cases = tuple(examples.values())
    return reported(config, tally, cases, rng, about=said, spans=[span(common.cases)])


def _state_at_init(example: Example, truth: xr.Dataset) -> Given | None:
    """The truth at the init time of a forecast of others, whose input is not known; None if the
    record does not have it."""
    labels = example.prediction.coords
    if "init_time" not in labels or labels["init_time"].values not in truth["time"]:
        return None
    field = truth[example.variable].sel(time=labels["init_time"].values)
    field = field if example.level is None else field.sel(level=example.level)
    title = f"truth at the init time, {when(-labels['lead_time'].to_numpy())}"
    return Given(title, field.load(), is_predicted=True)


def _check_some_scored(forecasts: Iterable[str], empty: Iterable[str]) -> None:
    if names := sorted(empty):
        raise ValueError(
            f"forecasts={as_written([*forecasts])}: no value of {as_written(names)} can be scored, "
            "as some forecast has none anywhere; leave out that forecast or variable"
        )


def _about(common: Common, first: str, lacking: Mapping[str, float]) -> str:
    """A sentence on what is compared. lacking: by variable, the share of values that some
    forecast lacks."""
    num_lat, num_lon = common.grid.shape
    said = (
        f"Forecasts on what they have in common, on {num_lat} x {num_lon} cells; {first} is "
        "compared with each other one."
    )
    gaps = [f"{name} {share:.1%}" for name, share in lacking.items() if share > 0]
    if gaps:
        said += f" Not scored, as some forecast has no value there: up to {', '.join(gaps)}."
    return said


def _joined(records: Sequence[xr.Dataset], names: Sequence[str]) -> xr.Dataset:
    """The records of the truth, which are in order, as one dataset."""
    ends = [(record["time"].to_numpy()[0], record["time"].to_numpy()[-1]) for record in records]
    if any(start <= end for (_, end), (start, _) in pairwise(ends)):
        raise ValueError(
            f"segment=null: {listed(names)} overlap in time, so that a forecast has more than one "
            "truth; choose one of them"
        )
    first = records[0]
    # the cells of all are the same within a tolerance, which xarray would not take for equal
    cells = {"latitude": first["latitude"], "longitude": first["longitude"]}
    joined = [record.assign_coords(cells) for record in records]
    return first if len(records) == 1 else xr.concat(joined, "time", join="exact")


def _series(
    records: Sequence[xr.Dataset], common: Common, times: np.ndarray
) -> list[tuple[xr.Dataset, np.ndarray]]:
    """The records of the truth, each with the cases that lie in it. times: of all records."""
    series = [
        (record, cases)
        for record in records
        if len(cases := cases_within(common, record["time"].to_numpy(), times))
    ]
    if not series:
        raise ValueError("time: every case runs from one segment of the truth into the next")
    return series


def _check_climate(training: Sequence[Segment], grid: Grid) -> None:
    """Raise ValueError unless the training record gives a climatology on the cells of the
    comparison."""
    first = training[0]  # whose cells all of them have
    check_rain(first)
    try:
        if not first.grid.matches(grid):
            ConservativeRegridder(first.grid, grid)
    except ValueError as error:
        raise ValueError(f"split=train, {first.location}: {error}") from error


def _on_common(dataset: xr.Dataset, common: Common) -> xr.Dataset:
    chosen = on_labels(dataset[[v for v in common.variables if v in dataset]], common)
    return on_grid(chosen, common.grid)


def _where_all_have(
    ours: xr.Dataset, baselines: dict[str, xr.Dataset]
) -> tuple[xr.Dataset, dict[str, xr.Dataset], float]:
    """The forecasts of a variable where every one of them has values in all members, since their
    scores are paired; and the share of values that is left out."""
    (name,) = ours.data_vars
    there = True
    for dataset in (ours, *baselines.values()):
        there = there & complete(dataset[name])
    assert isinstance(there, xr.DataArray)
    share = 1.0 - float(there.mean())
    if share == 0.0:
        return ours, baselines, share
    complete_baselines = {source: dataset.where(there) for source, dataset in baselines.items()}
    return ours.where(there), complete_baselines, share


def _trivial(
    ours: xr.Dataset, truth: xr.Dataset, climate: Climate, *, persists: bool
) -> dict[str, xr.Dataset]:
    """The baselines that need no model: climatology, and persistence where the truth has the
    init times."""
    mean = climate.mean[[str(name) for name in ours.data_vars]]
    if "init_time" not in ours.dims:
        return {"climatology": base.climatology_at(mean, ours["time"])}
    init, lead = ours["init_time"], ours["lead_time"]
    baselines = {"climatology": base.climatology_forecast(mean, init, lead)}
    if persists:
        baselines["persistence"] = base.persistence(truth, init, lead)
    return baselines


def lazy_dataset(segment: Segment) -> xr.Dataset:
    """A segment in canonical form, unread."""
    ordered = segment.dataset[list(segment.variables)].isel(
        latitude=segment.latitude_order, longitude=segment.longitude_order
    )
    if "level" in ordered.dims:
        ordered = ordered.sel(level=list(segment.levels))
    ordered = ordered.assign_coords(
        latitude=segment.grid.latitude, longitude=segment.grid.longitude, time=segment.times
    )
    return ordered.transpose("time", ...)
