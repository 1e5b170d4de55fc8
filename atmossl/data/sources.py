"""Several stores under the same windows: every stream reads the source that its `data` names.

Windows are cut on the grid and at the steps of the primary source, which is the run's own data.
Every other source contributes its cells and steps that lie in them. `Seen` tells where and when the
records of a training lie, which its checkpoint keeps.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from atmossl.batch import PRIMARY, StreamSpec
from atmossl.data.axes import STANDARD, Calendar
from atmossl.data.catalog import CatalogEntry, Split, catalog_entry
from atmossl.data.chunks import Access
from atmossl.data.segment import HOUR, DataSource, Segment
from atmossl.data.store import open_split
from atmossl.geometry import Box, Grid, Nesting

_DEFAULT_ACCESS = Access()


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


def check_window(segment: Segment, count: int, lat_size: int, lon_size: int) -> None:
    """Raise ValueError if a window does not cut all auxiliary sources at their cells' edges."""
    if segment.auxiliaries:
        segment.alignment.check(lat_size, lon_size)
    for name, auxiliary in segment.auxiliaries.items():
        other = auxiliary.segment
        steps = count * segment.step / other.step
        cells = auxiliary.nesting.box(Box(0, segment.alignment.lon_shift, lat_size, lon_size))
        if steps != round(steps) or steps < 2:
            raise ValueError(
                f"data.window.time={count} steps of {segment.step_hours:g} h hold {steps:g} of the "
                f"{other.step / HOUR:g} h of data={name}; needed: a whole number, at least 2"
            )
        if min(cells.lat_size, cells.lon_size) < 2:
            raise ValueError(
                f"data.window of {lat_size} x {lon_size} cells (latitude x longitude) holds "
                f"{cells.lat_size} x {cells.lon_size} of data={name}; needed: at least 2 of each"
            )


def _periods(segments: Sequence[Segment]) -> str:
    shown = [f"{s.name} {s.period}" for s in segments[:3]]
    more = f" and {len(segments) - 3} more" if len(segments) > 3 else ""
    return "; ".join(shown) + more


DAYS = 365  # equal parts of a year of any calendar
_PERIOD = re.compile(r"(\d{4}-\d\d-\d\dT\d\d) to (\d{4}-\d\d-\d\dT\d\d)")


@dataclass(frozen=True)
class Seen:
    """Dates and places of a training's records; what is None or empty is not known.

    days: of the year, from 0 to 364. cell: degrees of latitude and of longitude. latitudes: the
    southernmost and northernmost. longitudes: the westernmost, and how many degrees eastwards the
    last one lies; 360 where they close the circle.
    """

    days: tuple[int, ...] = ()
    calendar: str | None = None
    cell: tuple[float, float] | None = None
    latitudes: tuple[float, float] | None = None
    longitudes: tuple[float, float] | None = None

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> Self:
        grid, calendar = segments[0].grid, segments[0].calendar
        days = {day for segment in segments for day in days_of(segment.times, calendar)}
        return cls(
            days=tuple(sorted(days)),
            calendar=calendar.name,
            cell=(grid.latitude_spacing, grid.longitude_spacing),
            latitudes=(float(grid.latitude[0]), float(grid.latitude[-1])),
            longitudes=(float(grid.longitude[0]), eastward_extent(grid)),
        )

    @classmethod
    def of_period(cls, text: str) -> Self:
        """The record of an older checkpoint, which tells the period alone."""
        days: set[int] = set()
        for first, last in _PERIOD.findall(text):
            try:
                start, end = (np.datetime64(date, "ns") for date in (first, last))
            except ValueError:  # a date of another calendar
                return cls()
            days.update(days_of(np.arange(start, end, np.timedelta64(6, "h")), STANDARD))
        return cls(days=tuple(sorted(days)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for a checkpoint."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def seen_by_data(segments: Sequence[Segment]) -> dict[str, Seen]:
    """Dates and places of the records of every source, by the `data` of the streams that read
    it."""
    names = segments[0].sources
    return {name: Seen.of([s.sources[name].segment for s in segments]) for name in names}


def days_of(times: np.ndarray, calendar: Calendar) -> list[int]:
    """The days of the year of times, each once."""
    days = (calendar.year_share(times) * DAYS).astype(int)
    return [int(day) for day in np.unique(np.minimum(days, DAYS - 1))]


def eastward_extent(grid: Grid) -> float:
    """Degrees from the first longitude eastwards to the last; 360 if the longitudes close the
    circle."""
    return 360.0 if grid.periodic else float(grid.longitude[-1] - grid.longitude[0])
