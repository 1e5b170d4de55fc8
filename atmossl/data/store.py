"""Opening stores: any xarray-readable record becomes a validated `Segment` in canonical form.

Canonical: variables by their ERA5 names, dims (time, level, latitude, longitude), latitudes and
longitudes ascending, longitudes in [0, 360). Nothing is read at open but coordinates.

Several stores may lie under the same windows: every stream reads the source that its `data` names.
Windows are cut on the grid and at the steps of the primary source, which is the run's own data.
Every other source contributes its cells and steps that lie in them (`paired`).
"""

import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import xarray as xr

from atmossl.batch import PRIMARY, StreamSpec
from atmossl.data.axes import (
    Calendar,
    check_names,
    check_order,
    dimensions_like,
    projected_dimensions,
    read_times,
    regular_levels,
    regular_longitudes,
    start_dimensions,
    usual_step,
    why_uneven,
    with_dates,
    with_regular_axes,
)
from atmossl.data.backends import OpenedStore, is_missing, open_store
from atmossl.data.catalog import CatalogEntry, Gaps, Split, catalog_entry, resolve_location
from atmossl.data.chunks import Access, chunked_array
from atmossl.data.forcings import FORCINGS, ComputedChunks
from atmossl.data.metadata import REGRID, check_statements, hpa_per_unit
from atmossl.data.segment import DataSource, Segment, StoredVariable
from atmossl.data.variables import check_units, renaming_advice
from atmossl.geometry import Grid, Nesting, ascending_longitudes
from atmossl.model_levels import L137_HPA, is_model_level
from atmossl.value_faults import listed

COORDINATES = {
    "time": ("time", "valid_time", "date"),
    "level": ("level", "isobaricInhPa", "isobaricInPa", "pressure_level", "plev"),
    "latitude": ("latitude", "lat"),
    "longitude": ("longitude", "lon"),
}
MODEL_LEVELS = ("hybrid", "model_level", "ml", "lev")  # usual names of model levels
_DEFAULT_ACCESS = Access()
_HIGHEST_HPA = 1100.0
_LOGGER = logging.getLogger(__name__)


def open_segment(
    name: str,
    store: OpenedStore | xr.Dataset,
    location: str,
    *,
    variables: Sequence[str],
    levels: Sequence[int],
    variable_names: dict[str, str] | None = None,
    coordinates: dict[str, str] | None = None,
    access: Access = _DEFAULT_ACCESS,
    may_miss: Sequence[str] = (),
) -> Segment:
    """Bring an opened dataset into canonical form and check it.

    Raises:
        ValueError: names the store and what does not fit: a missing variable, level or
            coordinate, wrong units, duplicate or unevenly spaced times, an irregular grid.
    """
    (segment,) = open_parts(
        name,
        store,
        location,
        variables=variables,
        levels=levels,
        variable_names=variable_names,
        coordinates=coordinates,
        access=access,
        may_miss=may_miss,
    )
    return segment


def open_parts(
    name: str,
    store: OpenedStore | xr.Dataset,
    location: str,
    *,
    variables: Sequence[str],
    levels: Sequence[int],
    variable_names: dict[str, str] | None = None,
    coordinates: dict[str, str] | None = None,
    access: Access = _DEFAULT_ACCESS,
    may_miss: Sequence[str] = (),
    gaps: Gaps = "error",
) -> tuple[Segment, ...]:
    """Like `open_segment`, but several segments where `gaps` is `split`: the unbroken parts of
    the record, each named by record and first date, `NAME@2001-01-05T00`."""
    opened = store if isinstance(store, OpenedStore) else OpenedStore(store)
    names = {v: (variable_names or {}).get(v, v) for v in variables if v not in FORCINGS}
    dataset = _chosen(opened.dataset, names, location)
    dataset = rename_coordinates(dataset, coordinates or {}, location)
    dataset = with_regular_axes(dataset, location)
    _check_variables(names, dataset, opened, location)
    stored_levels = _checked_levels(dataset, levels, location, opened.pressure_levels)
    if opened.model_levels:
        check_model_levels(stored_levels, location)
    times, calendar = _checked_times(dataset, location)
    parts = _unbroken(times, gaps, calendar, location)
    latitude_order, longitude_order, grid = _canonical_grid(dataset, location)

    def stored(variable: str) -> StoredVariable:
        if variable not in names:
            latitude, longitude = dataset["latitude"].values, dataset["longitude"].values
            computed = ComputedChunks(variable, times, latitude, longitude, calendar)
            dims = ("time", "latitude", "longitude")
            return StoredVariable(variable, location, computed, dims, times, calendar)
        array, chunks = dataset[variable], opened.arrays.get(names[variable])
        if chunks is None:
            chunks = chunked_array(array, opened.array(names[variable]), access, location)
        dims = tuple(map(str, array.dims))
        return StoredVariable(variable, location, chunks, dims, times, calendar)

    whole = Segment(
        name=name,
        location=location,
        dataset=dataset,
        variables=tuple(variables),
        levels=tuple(levels),
        times=times,
        grid=grid,
        latitude_order=latitude_order,
        longitude_order=longitude_order,
        stored_levels=stored_levels,
        stored={variable: stored(variable) for variable in variables},
        access=access,
        may_miss=frozenset(may_miss),
        calendar=calendar,
        partial=len(parts) > 1,
        pressure_levels=opened.pressure_levels,
        model_levels=opened.model_levels,
    )
    return _named_parts(whole, parts)


def _check_variables(
    names: Iterable[str], dataset: xr.Dataset, opened: OpenedStore, location: str
) -> None:
    """Check that every variable, by its canonical name, is what it is taken for."""
    for name in names:
        array, are_pressures = dataset[name], opened.pressure_levels
        check_statements(name, array, opened.dataset, location, pressure_levels=are_pressures)
        check_units(name, array.attrs.get("units"), location)
        check_dims(name, array.dims, location)


def _named_parts(whole: Segment, parts: Sequence[tuple[int, int]]) -> tuple[Segment, ...]:
    """Parts of a segment, each from one step to another without the latter. If there are
    several, names end with the first date."""
    if len(parts) == 1:
        return (whole.steps(*parts[0]),)
    segments = []
    for part in parts:
        date = whole.calendar.show(whole.times[part[0]], "m").removesuffix(":00")
        segments.append(replace(whole.steps(*part), name=f"{whole.name}@{date}", part=date))
    return tuple(segments)


def _chosen(dataset: xr.Dataset, names: dict[str, str], location: str) -> xr.Dataset:
    """The wanted variables by their canonical names, with all coordinates."""
    missing = sorted(
        variable if variable == stored else f"{variable} (called {stored})"
        for variable, stored in names.items()
        if stored not in dataset.data_vars
    )
    if missing:
        raise ValueError(
            f"{location}: variables {listed(missing)} are missing; the store has "
            f"{listed(sorted(map(str, dataset.data_vars)))}"
            f"{renaming_advice(dataset.data_vars, names)}"
        )
    unused = set(dataset.data_vars) - set(names.values())
    return dataset.drop_vars(unused).rename({s: v for v, s in names.items() if s != v})


def rename_coordinates(
    dataset: xr.Dataset, aliases: Mapping[str, str], location: str, *, timed: bool = True
) -> xr.Dataset:
    """Dimensions by their canonical names: those of `given`, those with usual names, and those
    whose attributes say what they are. Levels become hPa, dates as integers become dates.

    Raises:
        ValueError: there is none for place, or for time where it is needed, or there are several.
    """
    names: dict[str, str] = {}
    for canonical, usual in COORDINATES.items():
        choices = (aliases[canonical],) if canonical in aliases else usual
        stored = [name for name in choices if name in dataset.dims]
        if not stored and canonical not in aliases:
            stored = dimensions_like(canonical, dataset, set(names))
        if len(stored) > 1 and stored[0] not in choices:
            raise ValueError(
                f"{location}: dimensions {listed(stored)} could all be {canonical}; say which one: "
                f"coordinates.{canonical}={stored[0]}"
            )
        if stored:
            names[stored[0]] = canonical
        elif canonical == "time" and any(n in dataset.coords for n in choices):
            raise ValueError(
                f"{location}: its time is a single date, not a dimension; `atmossl data ingest` "
                "joins a folder of such files to one store"
            )
        elif canonical != "level" and (timed or canonical != "time"):
            raise ValueError(_no_dimension(canonical, choices, dataset, location))
    check_names(names, location)
    by_name_in_pa = names.get("isobaricInPa") == "level"
    dataset = dataset.rename({old: new for old, new in names.items() if old != new})
    without = [name for name in names.values() if name not in dataset.coords]
    if without:
        raise ValueError(
            f"{location}: dimensions {listed(without)} have no coordinates; add their values"
        )
    return with_dates(_in_hpa(dataset, by_name_in_pa), location)


def _no_dimension(
    canonical: str, choices: Sequence[str], dataset: xr.Dataset, location: str
) -> str:
    tried = f"{location}: no dimension for {canonical}, tried {listed(choices)}; the store has "
    tried += f"{listed(sorted(map(str, dataset.dims)))}"
    if canonical in ("latitude", "longitude") and (projected := projected_dimensions(dataset)):
        return f"{tried}, of which {listed(projected)} are not geographic. {REGRID}"
    if canonical == "time" and (starts := start_dimensions(dataset)):
        return (
            f"{tried}, of which {listed(starts)} are the starts of forecasts; valid dates are "
            "needed, which are these plus the lead time"
        )
    return (
        f"{tried}. Name it under `coordinates`, in the catalog entry or for `atmossl data ingest`: "
        f"coordinates.{canonical}=NAME"
    )


def canonical_axes(dataset: xr.Dataset, location: str) -> xr.Dataset:
    """A dataset with canonical dimensions, its levels in hPa, its dates as dates, neither with
    rounding errors."""
    return with_regular_axes(with_dates(_in_hpa(dataset, False), location), location)


def _in_hpa(dataset: xr.Dataset, by_name_in_pa: bool) -> xr.Dataset:
    """A dataset with levels in hPa, where other units of pressure were given, such as Pa for
    CMIP's `plev`."""
    if "level" not in dataset.coords or dataset["level"].dtype.kind not in "iuf":
        return dataset
    factor = hpa_per_unit(dataset["level"])
    if factor is None and by_name_in_pa and "units" not in dataset["level"].attrs:
        factor = 0.01
    if factor in (None, 1.0):
        return dataset
    hpa = regular_levels(dataset["level"].values * factor)
    return dataset.assign_coords(level=dataset["level"].copy(data=hpa).assign_attrs(units="hPa"))


def check_record(dataset: xr.Dataset, location: str) -> None:
    """Check that a canonical dataset can be opened as a segment, apart from gaps or a single date.

    Raises:
        ValueError: names what does not fit: times, levels or grid.
    """
    _checked_levels(dataset, (), location)
    _checked_times(dataset, location, at_least=1)
    _canonical_grid(dataset, location)


def check_dims(name: str, dims: Sequence[Hashable], location: str) -> None:
    """Raise ValueError if a variable has dimensions beside the canonical ones."""
    extra_dims = sorted(map(str, set(dims) - set(COORDINATES)))
    if extra_dims:
        raise ValueError(
            f"{location}: {name} has further dimensions {listed(extra_dims)}; keep one value of "
            "each, with `select` of `atmossl data ingest` for example; a member of an anemoi store "
            "also with storage_options: {number: 0} in the catalog"
        )


def _checked_levels(
    dataset: xr.Dataset, levels: Sequence[int], location: str, pressure_levels: bool = True
) -> tuple[float, ...]:
    """Levels of the store, in its order."""
    if not any("level" in array.dims for array in dataset.data_vars.values()):
        return ()
    have = [float(level) for level in dataset["level"].values]
    shown = ", ".join(f"{level:g}" for level in have)
    if max(have) > _HIGHEST_HPA:
        raise ValueError(
            f"{location}: levels {shown} are no hPa; if they are Pa, set their attribute "
            "`units`, with `ncatted -a units,level,o,c,Pa FILE` of NCO, or with xarray: "
            "dataset.level.attrs['units'] = 'Pa'"
        )
    if len(set(have)) < len(have):
        raise ValueError(f"{location}: levels {shown} are there more than once")
    missing = sorted(set(levels) - set(have))
    if missing:
        unit = " hPa" if pressure_levels else ""
        raise ValueError(
            f"{location}: levels {listed(missing)}{unit} are missing; the store has {shown}"
        )
    return tuple(have)


def check_model_levels(levels: Sequence[float], location: str) -> None:
    """Raise ValueError for levels that are no numbers of model levels."""
    odd_levels = [f"{level:g}" for level in levels if not is_model_level(level)]
    if odd_levels:
        raise ValueError(
            f"{location}: levels {', '.join(odd_levels)} are no numbers of model levels, 1 to "
            f"{len(L137_HPA)}; leave `levels_are: model` out if they are pressures"
        )


def _checked_times(
    dataset: xr.Dataset, location: str, at_least: int = 2
) -> tuple[np.ndarray, Calendar]:
    """Times in ascending order, each of them once."""
    times, calendar = read_times(dataset["time"].values, location)
    if len(times) < at_least:
        raise ValueError(
            f"{location}: only {len(times)} time steps; at least {at_least} are needed"
        )
    check_order(times, calendar, location)
    return times, calendar


def _unbroken(
    times: np.ndarray, gaps: Gaps, calendar: Calendar, location: str
) -> list[tuple[int, int]]:
    """The first step, and the step after the last, of every part with uniform time steps.

    Raises:
        ValueError: there are several, and gaps are errors, or none has two steps.
    """
    fault = why_uneven(times, calendar)
    if fault is None:
        return [(0, len(times))]
    if gaps == "error":
        raise ValueError(f"{location}: {fault}")
    breaks = usual_step(times)[1]
    bounds = [0, *(int(n) + 1 for n in breaks), len(times)]
    parts = [part for part in pairwise(bounds) if part[1] - part[0] > 1]
    lost = len(times) - sum(end - start for start, end in parts)
    if lost:
        _LOGGER.warning("%s: %d steps have a gap on either side and are left out", location, lost)
    return parts


def _canonical_grid(dataset: xr.Dataset, location: str) -> tuple[np.ndarray, np.ndarray, Grid]:
    latitude = dataset["latitude"].values.astype(np.float64)
    longitude = dataset["longitude"].values.astype(np.float64)
    if min(len(latitude), len(longitude)) < 2 or not np.all(np.abs(latitude) <= 90.001):
        raise ValueError(
            f"{location}: {len(latitude)} latitudes and {len(longitude)} longitudes; needed: at "
            "least 2 of each, latitudes from -90 to 90 degrees"
        )
    latitude_order = np.argsort(latitude)
    longitude_order, ordered = ascending_longitudes(longitude)
    try:
        grid = Grid(latitude[latitude_order], regular_longitudes(ordered))
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from error
    return latitude_order, longitude_order, grid


def open_split(
    entry: CatalogEntry,
    split: Split,
    *,
    variables: Sequence[str],
    levels: Sequence[int],
    in_memory: bool = False,
    access: Access = _DEFAULT_ACCESS,
    may_miss: Sequence[str] = (),
) -> tuple[Segment, ...]:
    """All periods of one split as segments, checked to share grid and time step.

    Raises:
        ValueError: an unknown variable, level or split, or whatever `open_segment` refuses.
    """
    if split not in entry.splits:
        raise ValueError(
            f"split {split!r} is not in the catalog entry; valid: {listed(sorted(entry.splits))}"
        )
    valid = sorted({*entry.variables, *FORCINGS})
    unknown = sorted(set(variables) - set(valid))
    if unknown:
        raise ValueError(
            f"stream variables {listed(unknown)} are not in the catalog entry; valid: "
            f"{listed(valid)}"
        )
    segments: list[Segment] = []
    for period in entry.splits[split]:
        parts = open_parts(
            period.segment,
            open_entry(entry, period.segment, access),
            resolve_location(entry.segments[period.segment].location),
            variables=variables,
            levels=levels,
            variable_names=entry.variables,
            coordinates=entry.coordinates,
            access=access,
            may_miss=may_miss,
            gaps=entry.gaps,
        )
        overlapping = [part for part in parts if len(part.inside(period.start, period.end)) > 1]
        for part in overlapping or parts[:1]:  # the first one says what it covers
            segments.append(part.between(period.start, period.end))
    for segment in segments[1:]:
        first = segments[0]
        alike = segment.step == first.step and segment.calendar == first.calendar
        differs = segment.grid.difference(first.grid)
        if not alike or differs:
            raise ValueError(
                f"{segment.location} has another grid, time step or calendar than {first.location}"
                + (f": {differs}" if differs else "")
            )
    return tuple(segment.loaded() if in_memory else segment for segment in segments)


def only_segment(segments: Sequence[Segment], name: str | None, split: str) -> Segment:
    """The segment of that name, or the only one there is; a record with gaps has several.

    Raises:
        ValueError: no such segment, or several and no name.
    """
    chosen = [segment for segment in segments if segment.is_called(name)]
    if len(chosen) != 1:
        have = [segment.name for segment in chosen or segments]
        raise ValueError(f"segment={name}: split={split} has {listed(have)}; choose one of them")
    return chosen[0]


def open_entry(entry: CatalogEntry, segment: str, access: Access = _DEFAULT_ACCESS) -> OpenedStore:
    """The opened store of a segment; the catalog entry decides whether its levels are pressures."""
    source = entry.segments[segment]
    if entry.made_by and is_missing(source):
        raise ValueError(
            f"store {source.location} does not exist; `{entry.made_by}` makes the stores of this "
            "catalog entry"
        )
    opened = open_store(source, access)
    if entry.levels_are == "model":
        return replace(opened, pressure_levels=False, model_levels=True)
    return opened


@dataclass(frozen=True)
class StoreRequest:
    """Variables and levels that streams read of one store."""

    variables: list[str]
    levels: list[int]
    may_miss: list[str]

    @classmethod
    def of(cls, specs: Sequence[StreamSpec]) -> "StoreRequest":
        return cls(
            sorted({name for spec in specs for name in spec.variables}),
            sorted({level for spec in specs for level in spec.levels}),
            [name for spec in specs if spec.missing == "mask" for name in spec.variables],
        )


def entries_of(
    specs: Sequence[StreamSpec], name: str, catalog: Path | None
) -> dict[str, CatalogEntry]:
    """The catalog entries of all sources that the streams read, by their `data`. The primary
    source, `name`, comes first.

    Raises:
        ValueError: an unknown entry.
    """
    return {
        data: catalog_entry(name if data == PRIMARY else data, catalog)
        for data in [PRIMARY, *sorted({spec.data for spec in specs} - {PRIMARY})]
    }


def open_records(
    specs: Sequence[StreamSpec],
    entries: Mapping[str, CatalogEntry],
    split: Split,
    *,
    in_memory: bool = False,
    access: Access = _DEFAULT_ACCESS,
) -> dict[str, tuple[Segment, ...]]:
    """The segments of one split for every source, in the order of the entries.

    Raises:
        ValueError: whatever `open_split` refuses.
    """
    records = {}
    for data, entry in entries.items():
        needs = StoreRequest.of([spec for spec in specs if spec.data == data])
        records[data] = open_split(
            entry,
            split,
            variables=needs.variables,
            levels=needs.levels,
            in_memory=in_memory,
            access=access,
            may_miss=needs.may_miss,
        )
    return records


def paired(records: Mapping[str, Sequence[Segment]]) -> tuple[Segment, ...]:
    """The segments of the primary source, each with the auxiliary sources that lie under it, cut to
    the periods that all sources cover.

    Where both entries name segments alike, as those of an ensemble, a segment goes with the one of
    its name; otherwise with all that overlap in time.

    Raises:
        ValueError: grids that do not nest, steps that do not fit, or no common period.
    """
    primary = list(records[PRIMARY])
    for name, segments in records.items():
        if name == PRIMARY:
            continue
        by_name = bool({o.record_name for o in segments} & {s.record_name for s in primary})
        pairs = [
            (segment, other)
            for segment in primary
            for other in segments
            if other.record_name == segment.record_name or not by_name
        ]
        joined = [_with_source(segment, name, other) for segment, other in pairs]
        overlapping = [segment for segment in joined if segment is not None]
        if not overlapping:
            raise ValueError(
                f"data={name}: its periods ({_periods(segments)}) have no two steps in common with "
                f"those of the run's own data ({_periods(primary)})"
            )
        primary = overlapping
    for segment in primary:
        _ = segment.alignment  # refused here if there is none
    return tuple(primary)


def _with_source(segment: Segment, name: str, other: Segment) -> Segment | None:
    """The part of a segment that a segment of another source covers, with that source; None if
    they do not overlap."""
    if other.calendar != segment.calendar:
        raise ValueError(
            f"data={name}: {other.location} has calendar {other.calendar.name}; needed: that of "
            f"{segment.location}, {segment.calendar.name}"
        )
    ratio = other.step / segment.step
    phase = (other.times[0] - segment.times[0]) % segment.step
    if ratio != round(ratio) or phase != np.timedelta64(0):
        raise ValueError(
            f"data={name}: {other.location} has steps of {other.step_hours:g} h, "
            f"{other.period}; needed: a multiple of the {segment.step_hours:g} h of "
            f"{segment.location}, at its times, {segment.period}"
        )
    try:
        nesting = Nesting.of(segment.grid, other.grid)
    except ValueError as error:
        raise ValueError(f"data={name}: {other.location}: {error}") from error
    # windows from here on hold all steps of the other that their length has room for
    before, end = other.times[0] - other.step, other.times[-1] + other.step
    inside = np.flatnonzero((segment.times > before) & (segment.times < end))
    if len(inside) < 2:
        return None
    whole = len(inside) == len(segment.times)
    part = segment if whole else segment.steps(int(inside[0]), int(inside[-1]) + 1)
    auxiliaries = {**segment.auxiliaries, name: DataSource(other, nesting)}
    return replace(part, auxiliaries=auxiliaries, partial=segment.partial or not whole)


def _periods(segments: Sequence[Segment]) -> str:
    shown = [f"{s.name} {s.period}" for s in segments[:3]]
    more = f" and {len(segments) - 3} more" if len(segments) > 3 else ""
    return "; ".join(shown) + more
