"""Many windows from one store at once: every touched chunk is read and decoded once.

A chunk is cut into all windows that need it as soon as it is decoded, and then forgotten, so
memory holds the windows and as many chunks as there are threads.
"""

import itertools
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from typing import Self

import numpy as np

from atmossl.data.calendars import STANDARD, Calendar
from atmossl.data.chunks import Access, ChunkedArray, SharedChunks

Index = tuple[slice, ...]
AXES: tuple[str, ...] = ("level", "time", "latitude", "longitude")


@dataclass(frozen=True)
class Target:
    """What to read of a variable: positions in the store along (level, time, latitude,
    longitude), in the order wanted. `write(values, index)` takes a piece with these axes, which
    has length 1 where it is to be repeated, and its place in the target."""

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
    """A chunked array with the canonical names of its axes, and the times of its record. All
    positions along an axis that it lacks mean the same values."""

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


def read_targets(wanted: Sequence[tuple[StoredVariable, Sequence[Target]]], access: Access) -> None:
    """Fill all targets of all variables.

    Raises:
        UnreadableChunk: the first chunk that could not be read, after the retries.
        ValueError: whatever a target's `write` refuses.
    """
    pieces = _Pieces()
    members: dict[tuple[Hashable, Chunk], list[_Member]] = {}  # what is decoded together
    for variable, targets in wanted:
        array = variable.array
        with_it = array.decoded_with if isinstance(array, SharedChunks) else variable.name
        for chunk, parts in by_chunk(variable, targets, pieces).items():
            members.setdefault((with_it, chunk), []).append((variable, parts))
    jobs = [(chunk, found, access) for (_, chunk), found in members.items()]
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
    """Pieces of positions that were split before: those of one window are the same for all
    variables."""

    def of(self, positions: np.ndarray, length: int | None) -> list[_Piece]:
        key = (positions.tobytes(), length)
        if key not in self:
            self[key] = _split(positions, length)
        return self[key]


def by_chunk(
    variable: StoredVariable, targets: Sequence[Target], pieces: _Pieces
) -> dict[tuple[int, ...], list[_Part]]:
    """Parts of all targets by the number of their chunk along AXES."""
    lengths = [variable.chunk_length(axis) for axis in AXES]
    parts: dict[tuple[int, ...], list[_Part]] = {}
    for target in targets:
        for combination in itertools.product(*map(pieces.of, target.positions, lengths)):
            chunk, source, into = zip(*combination, strict=True)
            parts.setdefault(chunk, []).append(_Part(target, source, into))
    return parts


def _split(positions: np.ndarray, length: int | None) -> list[_Piece]:
    """Positions along one axis by chunk, as evenly spaced runs, which copy nothing: number of the
    chunk, positions in the store and in the target."""
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
    """Read what the parts of all variables need of one chunk, and hand every part its values."""
    first_variable = members[0][0]
    parts = [part for _, own in members for part in own]
    ends = np.array([[(run[0], run[-1]) for run in part.source] for part in parts])
    first = ends.min(axis=(0, 2)).tolist()
    stop = (ends.max(axis=(0, 2)) + 1).tolist()
    bounds = dict(zip(AXES, map(slice, first, stop), strict=True))
    regions = [tuple(bounds[dim] for dim in variable.dims) for variable, _ in members]
    arrays = [variable.array for variable, _ in members]
    retries = access.retries_of(first_variable.location)
    try:
        found = retries.call(lambda: _read_all(arrays, regions))
    except Exception as error:
        raise UnreadableChunk.of(first_variable, chunk, error) from error
    for (variable, own), values in zip(members, found, strict=True):
        canonical = _canonical(values, variable.dims)
        for part in own:
            inside = tuple(map(_as_slice, part.source, first))
            part.target.write(canonical[inside], part.into)


def _read_all(arrays: Sequence[ChunkedArray], regions: Sequence[Index]) -> list[np.ndarray]:
    first = arrays[0]
    if isinstance(first, SharedChunks):
        return first.read_all(arrays, regions)
    return [array.read(region) for array, region in zip(arrays, regions, strict=True)]


def _canonical(values: np.ndarray, dims: Sequence[str]) -> np.ndarray:
    """Axes in the order of AXES, absent ones of length 1."""
    order = [dims.index(axis) for axis in AXES if axis in dims]
    absent = [number for number, axis in enumerate(AXES) if axis not in dims]
    return np.expand_dims(values.transpose(order), absent)


def _as_slice(run: range, origin: int) -> slice:
    start, stop = run.start - origin, run.stop - origin
    return slice(start, stop if stop >= 0 else None, run.step)
