"""Climatologies of the training period: mean, standard deviation and count by slots of the
calendar, never by the target's own year.

A piece is one variable on some levels in some slots. All years of a piece are read once, block by
block, and merged in float64 about their own means (Chan, Golub and LeVeque 1983), so that memory
holds one piece and one block. A finished piece is noted; a run that was killed goes on with those
that are not.
"""

import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
import zarr

from atmossl import __version__
from atmossl.atomic_files import write_atomically
from atmossl.data.fingerprint import agree, fingerprint, stale_message
from atmossl.data.segment import Segment
from atmossl.data.variables import VARIABLES
from atmossl.names import file_name
from atmossl.value_faults import listed

Kind = Literal["global", "month", "cell_month", "cell_day_hour"]
_SUM_BYTES = 24  # count, mean and squares of one cell in float64
_BLOCK_BYTES = 40  # one value as read, in float64, and what is worked out of it
_PIECE_BYTES = 192 * 2**20  # sums of a piece at most, also where there is more memory
_SHARES = 3  # of the memory: sums, block, and what is worked out of either


@dataclass(frozen=True)
class Slots:
    """The slots of a climatology: the parts of the year that are averaged apart.

    coords: axes of the slots, slowest first. cells: per grid point, else area-weighted.
    """

    coords: Mapping[str, np.ndarray]
    cells: bool

    @classmethod
    def of(cls, kind: Kind, segments: Sequence[Segment]) -> "Slots":
        if kind == "global":
            return cls({}, cells=False)
        if kind == "cell_day_hour":
            hours = np.unique(np.concatenate([_dates(segment).hour for segment in segments]))
            return cls({"dayofyear": np.arange(1, 367), "hour": hours}, cells=True)
        return cls({"month": np.arange(1, 13)}, cells=kind == "cell_month")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(values) for values in self.coords.values())

    def places(self, segment: Segment) -> np.ndarray:
        """The slot of every step of a segment, as positions along the axes of the slots, [axis
        time]."""
        dates = _dates(segment)
        positions = [np.searchsorted(v, getattr(dates, axis)) for axis, v in self.coords.items()]
        return np.array(positions, dtype=np.int64).reshape(len(self.coords), len(segment.times))


def _dates(segment: Segment) -> Any:
    """The parts of a segment's dates by which slots are told apart: `month`, `dayofyear`,
    `hour`."""
    return xr.DataArray(segment.calendar.dates(segment.times), dims="time").dt


def months_of(segments: Sequence[Segment]) -> set[int]:
    """The months, 1 to 12, of all dates of some segments, in their own calendars."""
    return {int(month) for segment in segments for month in np.unique(_dates(segment).month)}


@dataclass(frozen=True)
class Piece:
    """A part of a climatology that is computed at once: one variable on some levels in some
    slots. levels: positions among the segment's. slots: ranges along the calendar's axes."""

    variable: str
    levels: tuple[int, int]
    slots: tuple[tuple[int, int], ...]

    @property
    def note(self) -> str:
        starts = "-".join(str(start) for start, _ in (self.levels, *self.slots))
        return f"{file_name(self.variable)}-{starts}.json"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.slots)


@dataclass(frozen=True)
class Sums:
    """Running count, mean and sum of squared departures from the mean, [slot level lat lon]. The
    object is changed in place, since memory does not hold it twice."""

    count: np.ndarray
    mean: np.ndarray
    square: np.ndarray

    @classmethod
    def zeros(cls, shape: Sequence[int]) -> "Sums":
        return cls(*(np.zeros(shape) for _ in range(3)))

    def add(self, slots: np.ndarray, values: np.ndarray) -> None:
        """Add values [level time lat lon], float64, NaN where missing, to the slots [time] of
        their steps."""
        for slot in np.unique(slots):
            chosen = values[:, slots == slot]
            observed = np.isfinite(chosen)
            count = observed.sum(1)
            mean = np.where(observed, chosen, 0.0).sum(1) / np.maximum(count, 1)
            square = (np.where(observed, chosen - mean[:, None], 0.0) ** 2).sum(1)
            total = self.count[slot] + count
            share = count / np.maximum(total, 1)
            apart = mean - self.mean[slot]
            self.square[slot] += square + apart**2 * self.count[slot] * share
            self.mean[slot] += apart * share
            self.count[slot] = total

    def over_area(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean, standard deviation and count [slot level] of all cells together.

        weights: of the area [lat].
        """
        weight = self.count * weights[:, None]
        total = weight.sum((-2, -1))
        with np.errstate(invalid="ignore"):  # a slot without values has none of either
            mean = (self.mean * weight).sum((-2, -1)) / total
            apart = np.where(weight > 0, self.mean - mean[..., None, None], 0.0)
            square = (self.square * weights[:, None] + apart**2 * weight).sum((-2, -1))
            return mean, np.sqrt(square / total), self.count.sum((-2, -1))

    def per_cell(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean, standard deviation and count [slot level lat lon]."""
        with np.errstate(invalid="ignore"):
            std = np.sqrt(self.square / self.count)
        return np.where(self.count > 0, self.mean, np.nan), std, self.count


def write_climatology(
    segments: Sequence[Segment],
    kind: Kind,
    output: Path,
    *,
    memory_bytes: int,
    force: bool = False,
    progress: Callable[[int, int], object] = max,
) -> bool:
    """Write one climatology as a zarr store, or continue one that was stopped; returns False if it
    was complete already.

    Variables have their own name for the mean, with `_std` and `_count` for the rest; NaN and 0
    where a slot has no values. progress: told (pieces done, pieces in all).

    Raises:
        ValueError: what is there was computed from another state of the store, and no `force`.
    """
    now = fingerprint(segments)
    if _is_current(output, segments, now, force):
        return False
    scheme = Slots.of(kind, segments)
    partial = output.with_name(f".{output.name}.{now}.partial")
    journal, store = partial / "journal", partial / "store.zarr"
    pieces = list(_pieces(segments[0], scheme, memory_bytes))
    _begin(segments, scheme, pieces, kind, now, store, journal)
    group = zarr.open_group(store, mode="r+")
    for done, piece in enumerate(pieces):
        progress(done, len(pieces))
        if not (journal / piece.note).exists():
            _write_piece(group, segments, scheme, piece, memory_bytes)
            (journal / piece.note).touch()
    progress(len(pieces), len(pieces))
    if output.exists():
        shutil.rmtree(output)
    store.replace(output)
    for stale_folder in output.parent.glob(f".{output.name}.*.partial"):  # of other states, too
        shutil.rmtree(stale_folder)
    return True


def _is_current(output: Path, segments: Sequence[Segment], now: str, force: bool) -> bool:
    if not output.exists():
        return False
    try:
        written = str(zarr.open_group(output, mode="r").attrs["fingerprint"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{output} exists and is not a climatology; choose another output"
        ) from error
    current = agree(written, now)
    if not current and not force:
        raise ValueError(stale_message(output, segments, written, now))
    return current


def _pieces(segment: Segment, scheme: Slots, memory_bytes: int) -> Iterator[Piece]:
    """The pieces of a climatology, each small enough for its share of the memory. Levels that
    share a chunk of the store stay in one piece where possible, and so do slots that follow each
    other in time."""
    cells = segment.grid.shape[0] * segment.grid.shape[1]
    room = max(1, min(memory_bytes // _SHARES, _PIECE_BYTES) // (_SUM_BYTES * cells))
    for name in varying(segment):
        num_levels = len(segment.levels_of(name))
        chunk = segment.stored[name].chunk_length("level") or 1
        levels = min(chunk, num_levels, room)
        lengths, free_slots = [], room // levels
        for size in reversed(scheme.shape):  # the fastest axis first
            lengths.append(min(size, max(1, free_slots)))
            free_slots = free_slots // size
        axes = [(num_levels, levels), *zip(scheme.shape, reversed(lengths), strict=True)]
        ranges = [
            [(start, min(start + length, size)) for start in range(0, size, length)]
            for size, length in axes
        ]
        for level, *slots in itertools.product(*ranges):
            yield Piece(name, level, tuple(slots))


def varying(segment: Segment) -> list[str]:
    """Variables that have a time axis in the store: neither static nor computed."""
    return [
        name
        for name in segment.variables
        if name in segment.dataset and "time" in segment.dataset[name].dims
    ]


def _begin(
    segments: Sequence[Segment],
    scheme: Slots,
    pieces: Sequence[Piece],
    kind: Kind,
    now: str,
    store: Path,
    journal: Path,
) -> None:
    """Make the empty store, unless it was begun for the same pieces."""
    names = json.dumps([piece.note for piece in pieces])
    begun = journal / "pieces"
    if begun.exists() and begun.read_text() == names:
        return
    shutil.rmtree(store.parent, ignore_errors=True)  # begun with other pieces, or not even begun
    journal.mkdir(parents=True)
    first = segments[0]
    coords: dict[str, np.ndarray] = dict(scheme.coords)
    if first.levels and any("level" in first.stored[name].dims for name in varying(first)):
        coords["level"] = np.array(first.levels)
    if scheme.cells:
        coords |= {"latitude": first.grid.latitude, "longitude": first.grid.longitude}
    attributes = {
        "source": f"atmossl {__version__} data stats",
        "climatology": kind,
        "period": "; ".join(f"{s.name} {s.period}" for s in segments),
        "fingerprint": now,
        "variables": list(first.variables),
        "levels": list(first.levels),
    }
    xr.Dataset(coords=coords, attrs=attributes).to_zarr(store, mode="w", consolidated=False)
    group = zarr.open_group(store, mode="r+")
    for name in varying(first):
        piece = next(piece for piece in pieces if piece.variable == name)
        _make_arrays(group, first, scheme, piece)
    write_atomically(begun, lambda partial: partial.write_text(names))


def _make_arrays(group: zarr.Group, segment: Segment, scheme: Slots, piece: Piece) -> None:
    """Create the arrays of a variable (mean, standard deviation, count) with chunks as large as
    a piece."""
    dims, shape, chunks = list(scheme.coords), list(scheme.shape), list(piece.shape)
    if "level" in segment.stored[piece.variable].dims:
        dims.append("level")
        shape.append(len(segment.levels))
        chunks.append(piece.levels[1])
    if scheme.cells:
        dims += ["latitude", "longitude"]
        shape += segment.grid.shape
        chunks += segment.grid.shape
    entry = VARIABLES.get(piece.variable)
    units = segment.dataset[piece.variable].attrs.get("units") or (entry.units if entry else "")
    for suffix, dtype, fill in (
        ("", "float32" if scheme.cells else "float64", np.nan),
        ("_std", "float32" if scheme.cells else "float64", np.nan),
        ("_count", "int64", 0),
    ):
        group.create_array(
            f"{piece.variable}{suffix}",
            shape=tuple(shape),
            chunks=tuple(chunks) if shape else (),
            dtype=dtype,
            fill_value=fill,
            dimension_names=dims,
            attributes={"units": "1" if suffix == "_count" else units},
        )


def _write_piece(
    group: zarr.Group, segments: Sequence[Segment], scheme: Slots, piece: Piece, memory_bytes: int
) -> None:
    levels = segments[0].levels_of(piece.variable)[slice(*piece.levels)]
    shape = (int(np.prod(piece.shape)), len(levels), *segments[0].grid.shape)
    sums = Sums.zeros(shape)
    length = max(1, memory_bytes // _SHARES // (_BLOCK_BYTES * int(np.prod(shape[1:]))))
    for segment in segments:
        for steps, slots in _blocks(segment, scheme, piece, length):
            read = segment.read(piece.variable, levels, int(steps[0]), len(steps), segment.whole())
            sums.add(slots, read.astype(np.float64))
    if not sums.count.any():
        return  # as the fill values say
    moments = sums.per_cell() if scheme.cells else sums.over_area(segments[0].grid.weights)
    place = tuple(slice(*r) for r in piece.slots)
    on_levels = "level" in segments[0].stored[piece.variable].dims
    if on_levels:
        place = (*place, slice(*piece.levels))
    for suffix, values in zip(("", "_std", "_count"), moments, strict=True):
        values = values if on_levels else values[:, 0]
        array = group[f"{piece.variable}{suffix}"]
        assert isinstance(array, zarr.Array)
        array[place or Ellipsis] = values.reshape((*piece.shape, *values.shape[1:]))


def _blocks(
    segment: Segment, scheme: Slots, piece: Piece, length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of at most `length` consecutive steps that belong to a piece, with the slot of each
    step within the piece."""
    places = scheme.places(segment)
    bounds = np.array(piece.slots, dtype=np.int64).reshape(-1, 2)
    inside = ((places >= bounds[:, :1]) & (places < bounds[:, 1:])).all(axis=0)
    steps = np.flatnonzero(inside)
    if not len(steps):
        return
    places_in_piece = places[:, steps] - bounds[:, :1]
    slots = np.zeros_like(steps)
    for place, size in zip(places_in_piece, piece.shape, strict=True):
        slots = slots * size + place
    runs = np.flatnonzero(np.diff(steps) != 1) + 1
    for run in np.split(np.arange(len(steps)), runs):
        for start in range(0, len(run), length):
            chosen = run[start : start + length]
            yield steps[chosen], slots[chosen]


def read_monthly(
    path: Path, segments: Sequence[Segment], months: Iterable[int] = range(1, 13)
) -> xr.Dataset:
    """The monthly means [month ... latitude longitude] that `write_climatology` wrote for these
    segments. months: those of which values are needed.

    Raises:
        ValueError: no climatology of kind cell_month, one of other variables, levels or another
            state of the store, or months without values that are needed.
    """
    key, first = f"climatology={path}", segments[0]
    try:
        climatology = xr.open_zarr(path, consolidated=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{key}: no such store") from error
    if climatology.attrs.get("climatology") != "cell_month":
        raise ValueError(
            f"{key} is no climatology by cell and month; make one with `atmossl data stats "
            "climatologies=[cell_month] output=FOLDER` and the keys of the training"
        )
    for attribute, ours in (("variables", first.variables), ("levels", first.levels)):
        theirs = climatology.attrs.get(attribute, [])
        if list(theirs) != list(ours):
            raise ValueError(
                f"{key} has {attribute} {listed(theirs) or 'none'}; needed: {listed(ours)}"
            )
    now = fingerprint(segments)
    if not agree(str(climatology.attrs["fingerprint"]), now):
        raise ValueError(stale_message(path, segments, str(climatology.attrs["fingerprint"]), now))
    names = varying(first)
    count = climatology[f"{names[0]}_count"]
    has_values = (count > 0).any([dim for dim in count.dims if dim != "month"])
    empty = set(climatology["month"].values[~has_values.values].tolist()) & set(months)
    if empty:
        raise ValueError(
            f"{key} has no values in months {listed(sorted(empty))}, which are scored; leave it "
            "out, and the mean over all months stands in their place"
        )
    means = climatology[names].load()
    return means.transpose("month", ...)
