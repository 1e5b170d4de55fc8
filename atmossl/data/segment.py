"""A segment: a continuous, evenly spaced record in canonical form, and reading windows from it."""

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any, NamedTuple, Self

import numpy as np
import xarray as xr

from atmossl.batch import PRIMARY
from atmossl.data.axes import STANDARD, Calendar
from atmossl.data.chunks import Access, ChunkedArray, MemoryChunks, SharedChunks
from atmossl.data.variables import Limits
from atmossl.geometry import Alignment, Box, Grid, Nesting, common_alignment
from atmossl.value_faults import listed

# Many windows from one store at once: every touched chunk is read and decoded once.
#
# A chunk is cut into all windows that need it as soon as it is decoded, and then forgotten, so
# memory holds the windows and as many chunks as there are threads.

Index = tuple[slice, ...]
AXES: tuple[str, ...] = ("level", "time", "latitude", "longitude")


@dataclass(frozen=True)
class Target:
    """A request to read a variable: positions in the store along (level, time, latitude,
    longitude), in the order wanted.

    `write(values, index)` takes a piece of values with these axes and its place in the target. An
    axis of the piece has length 1 where its value is to be repeated.
    """

    positions: tuple[np.ndarray, ...]
    write: Callable[[np.ndarray, Index], None]


_Piece = tuple[int, range, slice]  # see `_split`


@dataclass(frozen=True)
class _Part:
    """The share of one target that lies in one chunk."""

    target: Target
    source: tuple[range, ...]  # positions in the store, along AXES
    into: Index  # positions in the target


@dataclass(frozen=True)
class StoredVariable:
    """A chunked array with the canonical names of its axes, and the times of its record. Along
    an axis that it lacks, all positions mean the same values."""

    name: str
    location: str
    array: ChunkedArray
    dims: tuple[str, ...]
    times: np.ndarray
    calendar: Calendar = STANDARD

    def chunk_length(self, axis: str) -> int | None:
        return self.array.chunks[self.dims.index(axis)] if axis in self.dims else None


class UnreadableChunk(ValueError):
    """A chunk that is corrupt or out of reach; names store, variable, chunk and times."""

    @classmethod
    def of(cls, variable: StoredVariable, chunk: tuple[int, ...], cause: Exception) -> Self:
        numbers = dict(zip(AXES, chunk, strict=True))
        place = ", ".join(f"{axis} {numbers[axis]}" for axis in variable.dims)
        when, length = "", variable.chunk_length("time")
        if length is not None:
            steps = variable.times[numbers["time"] * length :][:length]
            first, last = (variable.calendar.show(step, "s") for step in (steps[0], steps[-1]))
            when = f" between {first} and {last}"
        why = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
        return cls(
            f"{variable.location}: cannot read {variable.name}{when}, chunk ({place}) is corrupt "
            f"or out of reach ({why})"
        )


Chunk = tuple[int, ...]
_Member = tuple[StoredVariable, Sequence[_Part]]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="atmossl-read")


def read_targets(
    requests: Sequence[tuple[StoredVariable, Sequence[Target]]], access: Access
) -> None:
    """Read and deliver all targets of all variables; each chunk is decoded once.

    Raises:
        UnreadableChunk: the first chunk that could not be read, after the retries.
        ValueError: whatever a target's `write` refuses.
    """
    pieces = _Pieces()
    members: dict[tuple[Hashable, Chunk], list[_Member]] = {}  # what is decoded together
    for variable, targets in requests:
        array = variable.array
        with_it = array.decoded_with if isinstance(array, SharedChunks) else variable.name
        for chunk, parts in by_chunk(variable, targets, pieces).items():
            members.setdefault((with_it, chunk), []).append((variable, parts))
    jobs = [(chunk, chunk_members, access) for (_, chunk), chunk_members in members.items()]
    if len(jobs) == 1 or access.threads == 1:
        for job in jobs:
            _read_chunk(*job)
        return
    futures = [_pool(access.threads).submit(_read_chunk, *job) for job in jobs]
    done, pending = wait(futures, return_when=FIRST_EXCEPTION)
    for future in pending:
        future.cancel()
    wait(pending)  # no thread may write into a target that the caller has given up
    for future in done:
        future.result()


class _Pieces(dict[tuple[bytes, int | None], list[_Piece]]):
    """Remembers how lists of positions were split into chunks: those of one window are the same
    for all variables."""

    def of(self, positions: np.ndarray, length: int | None) -> list[_Piece]:
        key = (positions.tobytes(), length)
        if key not in self:
            self[key] = _split(positions, length)
        return self[key]


def by_chunk(
    variable: StoredVariable, targets: Sequence[Target], pieces: _Pieces
) -> dict[tuple[int, ...], list[_Part]]:
    """The parts of all targets by the chunk that they lie in, numbered along AXES."""
    lengths = [variable.chunk_length(axis) for axis in AXES]
    parts: dict[tuple[int, ...], list[_Part]] = {}
    for target in targets:
        for combination in itertools.product(*map(pieces.of, target.positions, lengths)):
            chunk, source, into = zip(*combination, strict=True)
            parts.setdefault(chunk, []).append(_Part(target, source, into))
    return parts


def _split(positions: np.ndarray, length: int | None) -> list[_Piece]:
    """Split positions along one axis by chunk, into evenly spaced runs, which need no copy:
    number of the chunk, positions in the store, positions in the target."""
    if length is None:
        return [(0, range(1), slice(0, len(positions)))]
    numbers = positions // length
    steps = np.where(np.diff(numbers) == 0, np.diff(positions), 0)
    pieces, first = [], 0
    while first < len(positions):
        step = int(steps[first]) if first < len(steps) else 0
        uneven = np.flatnonzero(steps[first:] != step)
        last = first if step == 0 else first + int(uneven[0] if len(uneven) else len(steps) - first)
        start, stop = int(positions[first]), int(positions[last])
        run = range(start, stop + (1 if step >= 0 else -1), step or 1)
        pieces.append((int(numbers[first]), run, slice(first, last + 1)))
        first = last + 1
    return pieces


def _read_chunk(chunk: Chunk, members: Sequence[_Member], access: Access) -> None:
    """Read from one chunk what the parts of all variables need, and hand every part its values."""
    first_variable = members[0][0]
    parts = [part for _, variable_parts in members for part in variable_parts]
    ends = np.array([[(run[0], run[-1]) for run in part.source] for part in parts])
    first = ends.min(axis=(0, 2)).tolist()
    stop = (ends.max(axis=(0, 2)) + 1).tolist()
    bounds = dict(zip(AXES, map(slice, first, stop), strict=True))
    regions = [tuple(bounds[dim] for dim in variable.dims) for variable, _ in members]
    arrays = [variable.array for variable, _ in members]
    retries = access.retries_of(first_variable.location)
    try:
        blocks = retries.call(lambda: _read_all(arrays, regions))
    except Exception as error:
        raise UnreadableChunk.of(first_variable, chunk, error) from error
    for (variable, variable_parts), values in zip(members, blocks, strict=True):
        canonical = _canonical(values, variable.dims)
        for part in variable_parts:
            inside = tuple(map(_as_slice, part.source, first))
            part.target.write(canonical[inside], part.into)


def _read_all(arrays: Sequence[ChunkedArray], regions: Sequence[Index]) -> list[np.ndarray]:
    first = arrays[0]
    if isinstance(first, SharedChunks):
        return first.read_all(arrays, regions)
    return [array.read(region) for array, region in zip(arrays, regions, strict=True)]


def _canonical(values: np.ndarray, dims: Sequence[str]) -> np.ndarray:
    """Values with their axes in the order of AXES; axes that they lack get length 1."""
    order = [dims.index(axis) for axis in AXES if axis in dims]
    absent = [number for number, axis in enumerate(AXES) if axis not in dims]
    return np.expand_dims(values.transpose(order), absent)


def _as_slice(run: range, origin: int) -> slice:
    start, stop = run.start - origin, run.stop - origin
    return slice(start, stop if stop >= 0 else None, run.step)


HOUR = np.timedelta64(3_600_000_000_000, "ns")


def hours_since_1970(times: np.ndarray) -> np.ndarray:
    """Times of any calendar as hours since 1970-01-01T00, float64."""
    elapsed = times - np.zeros(1, times.dtype)
    return elapsed / HOUR.astype(elapsed.dtype)  # year 1 in nanoseconds would overflow


class WindowPlace(NamedTuple):
    """A window of a record: `count` steps from `start` on in a box of cells."""

    segment: "Segment"
    start: int
    count: int
    box: Box


@dataclass(frozen=True)
class DataSource:
    """A record under the windows of a primary record. nesting: how its cells lie in those of the
    primary record."""

    segment: "Segment"
    nesting: Nesting

    def steps(self, first: np.datetime64, duration: np.timedelta64) -> range:
        """The steps of this record from time `first` on for a duration, without its end, as
        positions; they may lie outside the record."""
        start, step = self.segment.times[0], self.segment.step
        before = (start - first, start - first - duration)
        return range(*(-int(time // step) for time in before))

    def leads(self, reference: np.datetime64, leads: np.ndarray) -> np.ndarray:
        """The lead times from a reference time at which this record has steps."""
        since = reference + leads - self.segment.times[0]
        return leads[since % self.segment.step == np.timedelta64(0)]

    def place(self, first: np.datetime64, duration: np.timedelta64, box: Box) -> WindowPlace:
        """The part of this record that lies under a window of the primary record."""
        steps = self.steps(first, duration)
        return WindowPlace(self.segment, steps.start, len(steps), self.nesting.box(box))


@dataclass(frozen=True)
class Segment:
    """One continuous record, opened read-only.

    first_step: position of its first time in the store. stored_levels: levels of the store in
    hPa, none if it has no level axis. levels: those that were asked for.
    latitude_order, longitude_order: position in the store of every canonical row and column.
    may_miss: variables whose missing values are marked; those of others are an error.
    auxiliaries: other records of the same air, by the `data` of the streams that read them; see
        `sources`.
    calendar: of its dates; see there what `times` are.
    partial: cut out of a longer record at a gap or by an auxiliary source, so it may be shorter
        than a window.
    part: of a record with gaps, its first date, which is the end of its name; else empty.
    pressure_levels: whether its levels are pressures; else they may be numbers of a model.
    model_levels: whether they surely are such numbers, of L137; networks are then told their
        pressure in the standard atmosphere.
    """

    name: str
    location: str
    dataset: xr.Dataset
    variables: tuple[str, ...]
    levels: tuple[int, ...]
    times: np.ndarray
    grid: Grid
    latitude_order: np.ndarray
    longitude_order: np.ndarray
    stored_levels: tuple[float, ...]
    stored: dict[str, StoredVariable]
    access: Access = Access()
    first_step: int = 0
    may_miss: frozenset[str] = frozenset()
    auxiliaries: Mapping[str, DataSource] = field(default_factory=dict)
    calendar: Calendar = STANDARD
    partial: bool = False
    part: str = ""
    pressure_levels: bool = True
    model_levels: bool = False

    @property
    def record_name(self) -> str:
        """The name of the record in the catalog. All parts of a record with gaps share it."""
        return self.name.removesuffix(f"@{self.part}") if self.part else self.name

    def is_called(self, name: str | None) -> bool:
        """Whether a name means this segment: the segment's own, that of its record, or None for
        any."""
        return name in (None, self.name, self.record_name)

    @property  # not cached: a cycle of references would keep a record's fields in memory
    def sources(self) -> Mapping[str, DataSource]:
        """All records that the streams read, by their `data`; this one comes first."""
        return {PRIMARY: DataSource(self, Nesting.same(self.grid)), **self.auxiliaries}

    @cached_property
    def alignment(self) -> Alignment:
        """Where windows may start so that the windows of all sources share their edges."""
        return common_alignment([source.nesting for source in self.sources.values()])

    def place(self, data: str, start: int, count: int, box: Box) -> WindowPlace:
        """The window in the record of a stream with that `data`, for a window of this record."""
        first = self.times[0] + start * self.step
        return self.sources[data].place(first, count * self.step, box)

    @property
    def step(self) -> np.timedelta64:
        return self.times[1] - self.times[0]

    @property
    def step_hours(self) -> float:
        return float(self.step / HOUR)

    def time_hours(self, start: int, count: int) -> np.ndarray:
        """The times of the steps as hours since 1970-01-01T00, float64."""
        return hours_since_1970(self.times[start : start + count])

    def find_time(self, time: np.datetime64) -> int:
        """Index of a time; ValueError names the covered period if it is not there."""
        index = int(np.searchsorted(self.times, time))
        if index == len(self.times) or self.times[index] != time:
            raise ValueError(
                f"init_time={self.calendar.show(time)} is not in segment {self.name}; valid: "
                f"every {self.step_hours:g} h from {self.period}"
            )
        return index

    @property
    def period(self) -> str:
        """The first and last date, for messages."""
        return f"{self.calendar.show(self.times[0])} to {self.calendar.show(self.times[-1])}"

    def target(
        self,
        variable: str,
        levels: Sequence[int],
        start: int,
        count: int,
        box: Box,
        write: Callable[[np.ndarray, Index], None],
    ) -> Target:
        """A request for the values of a window: where they lie in the store, and `write`, which
        takes them."""
        on_levels = "level" in self.stored[variable].dims
        if on_levels != any(levels):
            raise ValueError(
                f"{self.location}: {variable} has {'levels' if on_levels else 'no levels'}, its "
                f"stream has levels {listed([level for level in levels if level])}"
            )
        rows = [self.stored_levels.index(level) for level in levels] if on_levels else [0]
        positions = (
            np.array(rows),
            self.first_step + np.arange(start, start + count),
            self.latitude_order[box.lat_index()],
            self.longitude_order[box.lon_index(self.grid.shape[1])],
        )
        return Target(positions, write)

    def read_into(self, targets: dict[str, list[Target]]) -> None:
        """Read the targets of every variable, each chunk once.

        Raises:
            ValueError: a chunk that cannot be read, or what a target refuses.
        """
        requests = [(self.stored[name], places) for name, places in targets.items()]
        read_targets(requests, self.access)

    def read(
        self,
        variable: str,
        levels: Sequence[int],
        start: int,
        count: int,
        box: Box,
        *,
        within_limits: bool = False,
    ) -> np.ndarray:
        """Values [level time lat lon] of one variable in one window, float32.

        within_limits: look for values that no atmosphere has, as `access.input_limits` says.
        Raises:
            ValueError: missing values, unless they may be missing, values outside of limits, or a
                chunk that cannot be read; names store and times.
        """
        out = np.empty((len(levels), count, box.lat_size, box.lon_size), np.float32)

        def write(values: np.ndarray, index: Index) -> None:
            out[index] = values

        self.read_into({variable: [self.target(variable, levels, start, count, box, write)]})
        if variable not in self.may_miss and not np.isfinite(out).all():
            raise ValueError(self.missing_message(variable, start, count))
        limits = self.limits(variable, levels, start, count) if within_limits else None
        if limits is not None:
            limits.check(out)
        return out

    def limits(self, variable: str, levels: Sequence[int], start: int, count: int) -> Limits | None:
        """The limits that values of a variable are checked against; None if there is no check."""
        return Limits.physical(
            variable,
            tuple(levels),
            pressure_levels=self.pressure_levels,
            mode=self.access.input_limits,
            notices=self.access.notices,
            place=partial(self._place, start, count),
        )

    def _between(self, start: int, count: int) -> str:
        first, last = (self.calendar.show(self.times[n]) for n in (start, start + count - 1))
        return f"between {first} and {last}"

    def _place(self, start: int, count: int) -> str:
        return f"{self.location} {self._between(start, count)}"

    def missing_message(self, variable: str, start: int, count: int) -> str:
        between = self._between(start, count)
        return (
            f"{self.location}: {variable} has missing values {between}, which are "
            "marked as such or lie in chunks that are not in the store; fill them, or choose "
            "another period. A training takes them with missing=mask of the stream; a prediction "
            "fills them with an inpainting of missing=true, alone or as a part of task=combined"
        )

    def whole(self) -> Box:
        return Box(0, 0, *self.grid.shape)

    def loaded(self) -> Self:
        """The segment with all its variables in memory. Values are checked to be finite unless
        the variable may miss some."""
        stored = {}
        for name in self.variables:
            levels = self.levels_of(name)
            values = self.read(name, levels, 0, len(self.times), self.whole())
            dims = AXES if levels != (0,) else AXES[1:]
            array = MemoryChunks(values if levels != (0,) else values[0])
            variable = StoredVariable(name, self.location, array, dims, self.times, self.calendar)
            stored[name] = variable
        return replace(
            self,
            stored=stored,
            stored_levels=self.levels,
            latitude_order=np.arange(self.grid.shape[0]),
            longitude_order=np.arange(self.grid.shape[1]),
            first_step=0,
            access=replace(self.access, threads=1),
        )

    def levels_of(self, variable: str) -> tuple[int, ...]:
        """The levels of a variable that were asked for; (0,) at the surface."""
        return self.levels if "level" in self.stored[variable].dims else (0,)

    def between(self, start: str, end: str) -> Self:
        """The part of the segment in a period, both ends included, a day as a whole if it is given
        as a day; an empty end is open.

        Raises:
            ValueError: fewer than two steps lie in the period.
        """
        inside = self.inside(start, end)
        if len(inside) < 2:
            raise ValueError(
                f"{self.location}: fewer than two steps between {start or 'its start'} and "
                f"{end or 'its end'}; the segment {self.name} covers {self.period}"
            )
        return self.steps(int(inside[0]), int(inside[-1]) + 1)

    def inside(self, start: str, end: str) -> np.ndarray:
        """The positions of the steps in a period, both ends included; an empty end is open."""
        first = self.calendar.parse(start) if start else self.times[0]
        last = self.calendar.parse_end(end) if end else self.times[-1]
        return np.flatnonzero((self.times >= first) & (self.times <= last))

    def steps(self, start: int, stop: int) -> Self:
        """The part of the segment from one step to another, without the latter."""
        return replace(
            self,
            dataset=self.dataset.isel(time=slice(start, stop)),
            times=self.times[start:stop],
            first_step=self.first_step + start,
        )

    def shared_steps(self, other: "Segment") -> int:
        """How many steps this segment and another read from the same place."""
        if self.location != other.location:
            return 0
        return len(np.intersect1d(self.times, other.times))

    def to_dataset(self) -> xr.Dataset:
        """The record as a canonical dataset in memory; see `dataset_of`."""
        count, everywhere = len(self.times), self.whole()
        fields = {
            name: self.read(name, self.levels_of(name), 0, count, everywhere, within_limits=True)
            for name in self.variables
        }
        return self.dataset_of(fields, self.times)

    def dataset_of(self, fields: Mapping[str, Any], times: np.ndarray) -> xr.Dataset:
        """A canonical dataset, dims (time, level, latitude, longitude), of arrays [level time lat
        lon] of any library on the record's grid and levels, at times of its calendar."""
        canonical = {}
        for name, values in fields.items():
            attributes = self.dataset[name].attrs if name in self.dataset else {}
            if self.levels_of(name) == (0,):
                canonical[name] = (("time", "latitude", "longitude"), values[0], attributes)
            else:
                dims = ("time", "level", "latitude", "longitude")
                canonical[name] = (dims, values.swapaxes(0, 1), attributes)
        coords = {
            "time": self.calendar.dates(times),
            "level": list(self.levels),
            "latitude": self.grid.latitude,
            "longitude": self.grid.longitude,
        }
        return xr.Dataset(canonical, coords)


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
