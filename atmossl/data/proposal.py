"""A catalog entry for a store that nobody has described: variables, levels, periods and a window.

The entry is made from names, attributes and coordinates, and from the values of a few steps. What
was guessed is told in words, so that a user can correct it in the catalog. What training would
refuse (other units, a height for a geopotential) is left out, with the reason.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import xarray as xr

from atmossl.data.axes import read_times, with_regular_axes
from atmossl.data.backends import OpenedStore, open_store
from atmossl.data.catalog import (
    CatalogEntry,
    Period,
    SegmentEntry,
    Split,
    TrainingSettings,
    absolute,
)
from atmossl.data.inspect import TimeAxis, time_advice, time_axis
from atmossl.data.metadata import check_statements, says
from atmossl.data.store import check_dims, open_split, rename_coordinates
from atmossl.data.variables import SHORT_NAMES, VARIABLES, check_units
from atmossl.model_levels import L137_HPA

SEGMENT = "record"
_USUAL_LEVELS = (300, 500, 850)
_MOST_LEVELS = 5  # of which all are proposed for training
_TOKEN_DEGREES = 2.25
_LONG_HOURS, _NUM_STEPS = 36, 5  # of a window, of steps up to 3 h and of longer ones
_USUAL_LEAD_HOURS, _USUAL_HIDDEN_HOURS = 12, 6  # of the tasks in conf/
_LAST_NEIGHBOURS_HPA = 3  # 1, 2, 3, 5, 7, 10 hPa are usual; no pressures above differ by 1
_STRATOPAUSE_HPA = 20  # above, air can be as warm as at the surface
_WARM_ALOFT_K = 265.0  # no median of a field up to 137 hPa, where air has some 200 to 230 K
_SHARE = 0.1  # of the steps, for validation and for test each


@dataclass(frozen=True)
class Proposal:
    """A proposed catalog entry, and what was guessed for it, a line each. doubts: lines on what
    is left out of training, or may be taken for something else than it is."""

    entry: CatalogEntry
    lines: tuple[str, ...]
    doubts: tuple[str, ...]


@cache
def propose(location: str) -> Proposal:
    """The catalog entry that fits a store: a zarr store, a NetCDF file, a folder or a pattern.

    Raises:
        ValueError: there is none, it cannot be opened, or training would refuse all of it.
    """
    source = SegmentEntry(location=absolute(location))
    opened = open_store(source)
    dataset = rename_coordinates(opened.dataset, {}, location)
    dataset = with_regular_axes(dataset, location)
    time = time_axis(dataset["time"].values, location)
    if time.step_range_hours is not None or time.duplicates or not time.ascending:
        raise ValueError(f"{location}: {'; '.join(time_advice(time))}")
    names, refused, pressure = _usable(dataset, opened, location)
    if not names:
        why = "; ".join(refused) or "none has latitude and longitude"
        raise ValueError(f"{location}: no variable can be used: {why}")
    levels = _levels(dataset, names)
    try:
        chosen, gappy, notes = _for_training(dataset, names)
        groups = _grouped(dataset, names, chosen, gappy)
        training = _settings(dataset, groups, levels, time.step_hours)
        splits = _splits(dataset["time"].values, training.window["time"])
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from error
    entry = CatalogEntry(
        description=f"{len(names)} variables of {location}, {time.step_hours:g}-hourly",
        segments={SEGMENT: source},
        splits=splits,
        variables=names,
        levels=levels,
        levels_are="pressure" if pressure else "model",
        gaps="split" if time.gaps else "error",
        training=training,
        licence="not stated",
        citation="not stated",
    )
    _check(entry)
    doubts = [*notes, *(f"left out: {line}" for line in refused)]
    if pressure and (doubt := _doubt_of_levels(dataset, names)):
        doubts.append(doubt)
    return Proposal(entry, tuple(_told(dataset, entry, time)), tuple(doubts))


def _usable(
    dataset: xr.Dataset, opened: OpenedStore, location: str
) -> tuple[dict[str, str], list[str], bool]:
    """The variables that training takes (canonical name -> name in the store), why it refuses
    the others, and whether levels are pressures. Levels count as numbers of model levels where
    more variables fit then."""
    kinds = (True, False) if opened.pressure_levels else (False,)
    readings = [(*_named(dataset, opened, location, pressure), pressure) for pressure in kinds]
    return max(readings, key=lambda reading: len(reading[0]))  # of equal ones the first


def _named(
    dataset: xr.Dataset, opened: OpenedStore, location: str, pressure: bool
) -> tuple[dict[str, str], list[str]]:
    names: dict[str, str] = {}
    refused: list[str] = []
    for stored, array in dataset.data_vars.items():
        if not {"latitude", "longitude"} <= set(array.dims):
            continue
        canonical = canonical_name(str(stored), array)
        canonical = str(stored) if canonical in names else canonical
        try:
            check_dims(canonical, array.dims, location)
            check_statements(canonical, array, opened.dataset, location, pressure_levels=pressure)
            check_units(canonical, array.attrs.get("units"), location)
        except ValueError as error:
            refused.append(str(error).removeprefix(f"{location}: "))
            continue
        names[canonical] = str(stored)
    return names, refused


def canonical_name(stored: str, array: xr.DataArray) -> str:
    """The ERA5 name of a stored variable: by its name, else by its `standard_name`. The stored
    name if neither is known."""
    for name in (stored, stored.lower()):
        if name in SHORT_NAMES:
            return SHORT_NAMES[name]
    standard = says(array.attrs, "standard_name")
    for name, entry in VARIABLES.items():
        at_height = re.match(r"\d+m_", name) is not None
        if standard and entry.standard_name == standard and at_height != ("level" in array.dims):
            return name
    return stored


def _for_training(
    dataset: xr.Dataset, names: Mapping[str, str]
) -> tuple[list[str], set[str], list[str]]:
    """The variables to train on, which of them have missing values, and notes on the variables
    that are left to the user."""
    dated = [name for name, stored in names.items() if "time" in dataset[stored].dims]
    candidates = [name for name in dated if name in VARIABLES] or dated
    left_to_user = [name for name in names if name not in candidates]
    notes = [f"in the catalog but in no stream: {', '.join(left_to_user)}"] if left_to_user else []
    chosen, gappy = [], set()
    for name in candidates:
        values = _some_values(dataset[names[name]])
        low, high = VARIABLES[name].physical_range if name in VARIABLES else (-np.inf, np.inf)
        finite = values[np.isfinite(values)]
        if finite.size and low <= finite.min() and finite.max() <= high:
            chosen.append(name)
            gappy |= {name} if finite.size < values.size else set()
            continue
        extent = f"{finite.min():.4g} to {finite.max():.4g}" if finite.size else "no value"
        notes.append(
            f"in no stream: {name} has {extent}; valid: {low:g} to {high:g}. If its units are "
            "others, say so by its attribute `units`; `atmossl data ingest` converts usual ones"
        )
    if not chosen:
        raise ValueError("; ".join(notes) or "no variable has a time axis")
    return chosen, gappy, notes


def _grouped(
    dataset: xr.Dataset, names: Mapping[str, str], chosen: Sequence[str], gappy: set[str]
) -> dict[str, list[str]]:
    """The variables of each proposed stream, by the stream's name."""
    groups: dict[str, list[str]] = {}
    for name in chosen:
        stream = "atmosphere" if "level" in dataset[names[name]].dims else "surface"
        groups.setdefault(f"{stream}_with_gaps" if name in gappy else stream, []).append(name)
    return groups


def _some_values(array: xr.DataArray) -> np.ndarray:
    """Values of the first, middle and last step at the lowest and the highest level."""
    last = {dim: array.sizes[dim] - 1 for dim in ("time", "level") if dim in array.dims}
    places = {dim: sorted({0, end}) for dim, end in last.items()}
    places["time"] = sorted({0, last["time"] // 2, last["time"]})
    return array.isel(places).values


def _doubt_of_levels(dataset: xr.Dataset, names: Mapping[str, str]) -> str | None:
    """A line on levels that are taken for pressures and look like numbers of model levels: whole
    numbers up to 137 without attributes, of which neighbours follow each other, or where air is
    warmer than it is at such a pressure."""
    if not any("level" in dataset[stored].dims for stored in names.values()):
        return None
    level = dataset["level"]
    values = np.sort(level.values.astype(float))
    said = any(says(level.attrs, key) for key in ("units", "standard_name", "long_name"))
    if said or (values != np.round(values)).any() or values[0] < 1 or values[-1] > len(L137_HPA):
        return None
    follow = (np.diff(values[values > _LAST_NEIGHBOURS_HPA]) == 1.0).any()
    aloft = values[values > _STRATOPAUSE_HPA]
    if not follow and "temperature" in names and aloft.size:
        array = dataset[names["temperature"]].isel(time=0, missing_dims="ignore")
        follow = "level" in array.dims and array.sel(level=aloft[-1]).median() > _WARM_ALOFT_K
    if not follow:
        return None
    return (
        f"levels {', '.join(f'{value:g}' for value in values)} are taken for hPa, as nothing says "
        "otherwise; if they are numbers of model levels, set `levels_are: model` in the entry"
    )


def _levels(dataset: xr.Dataset, names: Mapping[str, str]) -> tuple[int, ...]:
    """The levels of all variables; a level that is no whole number cannot be named in a
    configuration and is left out."""
    if not any("level" in dataset[stored].dims for stored in names.values()):
        return ()
    values = dataset["level"].values.astype(float)
    return tuple(sorted(int(value) for value in values if value == round(value)))


def _settings(
    dataset: xr.Dataset, groups: Mapping[str, list[str]], levels: Sequence[int], step_hours: float
) -> TrainingSettings:
    """A window of whole tokens, and a stream for each group of variables: `atmosphere` has levels,
    `surface` none, `_with_gaps` missing values. A token has some 2.25 degrees, at least two cells,
    and all levels; the window at most 16 x 8 of them, and 36 h of hourly data or five steps."""
    for axis in ("latitude", "longitude"):
        if dataset.sizes[axis] < 2:
            raise ValueError(
                f"one {axis}; needed: a grid with several, to learn from windows of it"
            )
    if not step_hours:
        raise ValueError("one time step; needed: a record for training, validation, test")
    spacing = abs(float(np.diff(dataset["latitude"].values[:2])[0]))
    cells = next((size for size in (8, 4) if size * spacing <= _TOKEN_DEGREES), 2)
    time = round(_LONG_HOURS / step_hours) if step_hours <= 3 else _NUM_STEPS
    token_time = 3 if step_hours <= 1 and time % 3 == 0 else 1
    window: dict[Any, int] = {"time": time}
    for axis, name, most in (("lat", "latitude", 16), ("lon", "longitude", 8)):
        block = max(cells, 4)  # that the task of downscaling has whole coarse cells
        window[axis] = min(most * cells, dataset.sizes[name]) // block * block
        if window[axis] == 0:
            raise ValueError(f"{dataset.sizes[name]} points of {name}; needed: at least {block}")
    some = _some_levels(levels)
    token = {"time": token_time, "lat": cells, "lon": cells}
    streams = {
        name: {
            "variables": variables,
            "levels": some if name.startswith("atmosphere") else [],
            "token_size": {**token, "level": len(some) if name.startswith("atmosphere") else 1},
            "role": "predict",
            "loss_weight": 1.0,
            "missing": "mask" if name.endswith("_with_gaps") else "refuse",
        }
        for name, variables in groups.items()
    }
    lead, hidden = (
        None if usual % step_hours == 0 else f"{steps * step_hours:g}h"
        for usual, steps in ((_USUAL_LEAD_HOURS, 2), (_USUAL_HIDDEN_HOURS, 1))
    )
    return TrainingSettings(window=window, stream=streams, lead_time=lead, hidden_time=hidden)


def _some_levels(levels: Sequence[int]) -> list[int]:
    """All levels if there are few; else the usual ones, or three far apart."""
    if len(levels) <= _MOST_LEVELS:
        return list(levels)
    usual = [level for level in _USUAL_LEVELS if level in levels]
    apart = [levels[0], levels[len(levels) // 2], levels[-1]]
    return usual if len(usual) == len(_USUAL_LEVELS) else apart


def _splits(dates: np.ndarray, window: int) -> dict[Split, tuple[Period, ...]]:
    """The periods of the splits: the last tenth of the steps for test, the tenth before for
    validation. They end with whole years, months or days where each split keeps two windows."""
    times, calendar = read_times(dates, "the record")
    needed = 2 * window
    if len(times) < 3 * needed:
        raise ValueError(
            f"{len(times)} time steps are too few for training, validation and test with windows "
            f"of {window}; needed: at least {3 * needed}"
        )
    held = max(needed, round(_SHARE * len(times)))
    bounds = [len(times) - 2 * held, len(times) - held]
    for unit in ("Y", "M", "D") if calendar.plain else ():
        starts = [times[n].astype(f"datetime64[{unit}]") for n in bounds]
        cuts = [0, *np.searchsorted(times, [s.astype(times.dtype) for s in starts]), len(times)]
        if min(np.diff(cuts)) >= needed:
            first, second = map(str, starts)
            ends = [str(start - 1) for start in starts]
            break
    else:
        first, second = (calendar.show(times[n], "m") for n in bounds)
        ends = [calendar.show(times[n - 1], "m") for n in bounds]
    return {
        "train": (Period(segment=SEGMENT, end=ends[0]),),
        "validation": (Period(segment=SEGMENT, start=first, end=ends[1]),),
        "test": (Period(segment=SEGMENT, start=second),),
    }


def _check(entry: CatalogEntry) -> None:
    """Check that every split opens with everything that the streams read, as training will open
    it."""
    assert entry.training is not None
    streams = entry.training.stream.values()
    levels = sorted({level for stream in streams for level in stream["levels"]})
    variables = [name for stream in streams for name in stream["variables"]]
    for split in entry.splits:
        open_split(entry, split, variables=variables, levels=levels)


def _told(dataset: xr.Dataset, entry: CatalogEntry, time: TimeAxis) -> Iterator[str]:
    """Lines on what was found in the store, and what was guessed from it."""
    assert entry.training is not None
    show = time.calendar.show
    yield (
        f"{time.num_steps} steps of {time.step_hours:g} h, {show(time.start)} to {show(time.end)}, "
        f"{dataset.sizes['latitude']} x {dataset.sizes['longitude']} points"
    )
    if time.gaps:
        yield f"{len(time.gaps)} gaps in time: gaps: split trains on the unbroken parts"
    for name, stored in entry.variables.items():
        array = dataset[stored]
        units = array.attrs.get("units") or "no units stated, taken for those of the name"
        static = "" if "time" in array.dims else ", the same at all times"
        yield f"{name} = {stored} [{units}]{static}"
    if entry.levels:
        kind = "hPa" if entry.levels_are == "pressure" else "numbers of model levels"
        yield f"levels: {', '.join(map(str, entry.levels))} ({kind})"
    for split, (period,) in entry.splits.items():
        yield f"split {split}: {period.start or show(time.start)} to {period.end or show(time.end)}"
    for name, stream in entry.training.stream.items():
        size = stream["token_size"]
        yield (
            f"stream {name}: {', '.join(stream['variables'])}, levels {stream['levels']}, a token "
            f"is {size['time']} x {size['lat']} x {size['lon']} (time, lat, lon)"
        )
    window = entry.training.window
    yield f"window: {window['time']} steps x {window['lat']} x {window['lon']} points"
    lead, hidden = entry.training.lead_time, entry.training.hidden_time
    durations = {"tasks.0.lead_time": lead, "tasks.1.hidden_time": hidden}
    words = " ".join(f"{key}={value}" for key, value in durations.items() if value)
    if words:
        yield (
            f"steps of {time.step_hours:g} h: training has {words}; give evaluate these words, too"
            + (f", and predict task.lead_time={lead} task.rollout_time={lead}" if lead else "")
        )
