"""A prediction's places, dates and values against those of the training of its checkpoint."""

from functools import cache

import numpy as np

from atmossl.batch import PRIMARY, StreamWindow, View
from atmossl.data.catalog import catalog_entry
from atmossl.data.statistics import Seen, days_of
from atmossl.data.store import open_split
from atmossl.data.windows import read_window
from atmossl.geometry import Grid
from atmossl.inference.checkpoint import TrainedModel
from atmossl.inference.out_of_training_warnings import (
    unseen_calendar,
    unseen_dates,
    unseen_levels,
    unseen_place,
    unseen_values,
)
from atmossl.inference.predict import Predictor
from atmossl.masking.combined import Counterfactual

_SAMPLE = "sample"  # the only data in the package, of which older checkpoints have no record
_NUM_READ = 3  # times whose values are looked at beforehand
_HOUR_US = 3.6e9


def unseen_by_training(predictor: Predictor, times: np.ndarray, view: View) -> list[str]:
    """Sentences on cells, places, dates, calendar, levels and values that the training never had;
    none on what its record does not tell. view: what the network is shown at the first time."""
    trained, segment = predictor.trained, predictor.segment
    by_data = seen_in_training(trained)
    seen, lines = by_data.get(PRIMARY, Seen()), []
    for data, source in segment.sources.items():
        is_primary = data == PRIMARY
        grid = _told_grid(predictor) if is_primary else source.segment.grid
        where = "" if is_primary else f" (data={data})"
        lines += [line + where for line in unseen_place(by_data.get(data, Seen()), grid)]
    lines += unseen_calendar(seen, segment.calendar.name)
    lines += unseen_dates(seen, _told_days(predictor, times, view))
    lines += unseen_levels(view)
    if segment.access.input_limits == "off":
        return lines
    return lines + unseen_values(_windows(predictor, times), trained.normaliser.statistics)


def seen_in_training(trained: TrainedModel) -> dict[str, Seen]:
    """By the streams' `data`. Checkpoints before version 0.2 tell the period alone, and those of
    the package's own data, which do not change, the rest."""
    record = trained.record
    if record.get("seen"):
        return {data: Seen.from_dict(values) for data, values in record["seen"].items()}
    period = str(record.get("statistics", {}).get(PRIMARY, {}).get("period", ""))
    if trained.data == _SAMPLE:
        of_sample, seen = _sample(trained.variables, trained.levels)
        if of_sample == period:
            return {PRIMARY: seen}
    return {PRIMARY: Seen.of_period(period)}


@cache
def _sample(variables: tuple[str, ...], levels: tuple[int, ...]) -> tuple[str, Seen]:
    """Period and places of the sample's training split."""
    segments = open_split(catalog_entry(_SAMPLE), "train", variables=variables, levels=levels)
    return "; ".join(f"{s.name} {s.period}" for s in segments), Seen.of(segments)


def _told_grid(predictor: Predictor) -> Grid:
    """The cells as the network is told them."""
    grid, task = predictor.grid, predictor.task
    if not isinstance(task, Counterfactual):
        return grid
    return Grid(grid.latitude + task.shift_lat, grid.longitude + task.shift_lon)


def _told_days(predictor: Predictor, times: np.ndarray, view: View) -> list[int]:
    """Days of the year of all windows and leads, as the network is told them."""
    hours = view.streams[0].grid.time_hours.double().numpy()
    last = float(predictor.leads.max() / np.timedelta64(1, "h")) + hours[0]
    told = np.append(hours, max(last, hours[-1])) * _HOUR_US
    since = (times - times[0]).astype("timedelta64[us]").astype(np.float64)
    every = np.add.outer(since, told).ravel().astype("datetime64[us]")
    return days_of(every.astype(predictor.segment.times.dtype), predictor.segment.calendar)


def _windows(predictor: Predictor, times: np.ndarray) -> list[StreamWindow]:
    """The streams of the run's own data on the whole grid, at some of the times."""
    trained = predictor.trained
    specs = [spec for spec in trained.specs_for(predictor.task) if spec.data == PRIMARY]
    chosen = times[np.unique(np.linspace(0, len(times) - 1, _NUM_READ).astype(int))]
    windows = []
    for time in chosen:
        source = predictor.find(time)
        segment, count = source.segment, len(predictor.plan.read)
        windows += read_window(
            segment, specs, trained.normaliser, source.start, count, segment.whole()
        )
    return windows
