"""Computes the statistics of the training period in one streaming pass, saves them with the
fingerprint of the store, and refuses them when the store has changed."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Self
from uuid import uuid4

import numpy as np

from atmossl.at_work import naming_errors, owned_in_turn
from atmossl.checkpoint_files import read_sealed, write_sealed
from atmossl.data.fingerprint import (
    NO_TRANSFORMS,
    Transforms,
    agree,
    fingerprint,
    identity,
    stale_message,
)
from atmossl.data.segment import Segment
from atmossl.data.variables import VARIABLES, Transform, physical_range
from atmossl.data.windows import ARRAYS, Statistics
from atmossl.names import file_name
from atmossl.process_lifetime import is_first_rank

# Area-weighted sums over stored variables in one streaming pass, which can be taken up again.
#
# Blocks of steps are summed up in float64 about their own mean and merged pairwise (Chan, Golub
# and LeVeque 1983), so that neither the length of the record nor a large mean costs precision.

_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class RunningSums:
    """Sums over the observed values of one variable, one number per level each.

    weight: sum of area weights. square: weighted squared departures from `mean`. step_square,
        step_weight: the same for the change over one time step, about 0. missing: number of missing
        values.
    """

    weight: np.ndarray
    mean: np.ndarray
    square: np.ndarray
    step_weight: np.ndarray
    step_square: np.ndarray
    minimum: np.ndarray
    maximum: np.ndarray
    missing: np.ndarray
    count: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, area: np.ndarray, before: np.ndarray | None) -> Self:
        """The sums of values [level time lat lon], NaN where missing. area: weights [lat].
        before: the field [level lat lon] of the step before the first, if there is one."""
        axes = (1, 2, 3)
        observed = np.isfinite(values)
        weights = observed * area[:, None]
        filled = np.where(observed, values, 0.0)
        weight = weights.sum(axes)
        mean = (filled * weights).sum(axes) / np.maximum(weight, np.finfo(float).tiny)
        joined = values if before is None else np.concatenate([before[:, None], values], axis=1)
        steps = np.diff(joined, axis=1)
        both_observed = np.isfinite(steps)
        step_weights = both_observed * area[:, None]
        return cls(
            weight=weight,
            mean=mean,
            square=((filled - mean[:, None, None, None]) ** 2 * weights).sum(axes),
            step_weight=step_weights.sum(axes),
            step_square=(np.where(both_observed, steps, 0.0) ** 2 * step_weights).sum(axes),
            minimum=np.where(observed, values, np.inf).min(axes),
            maximum=np.where(observed, values, -np.inf).max(axes),
            missing=(~observed).sum(axes).astype(float),
            count=np.full(len(values), float(values[0].size)),
        )

    def merged(self, other: Self) -> Self:
        """The sums of both sets of values together."""
        weight = self.weight + other.weight
        share = other.weight / np.maximum(weight, np.finfo(float).tiny)
        apart = other.mean - self.mean
        return replace(
            self,
            weight=weight,
            mean=self.mean + apart * share,
            square=self.square + other.square + apart**2 * self.weight * share,
            step_weight=self.step_weight + other.step_weight,
            step_square=self.step_square + other.step_square,
            minimum=np.minimum(self.minimum, other.minimum),
            maximum=np.maximum(self.maximum, other.maximum),
            missing=self.missing + other.missing,
            count=self.count + other.count,
        )

    def to_dict(self) -> dict[str, list[float]]:
        return {key: values.tolist() for key, values in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, list[float]]) -> Self:
        return cls(**{f.name: np.array(values[f.name]) for f in fields(cls)})


def blocks(segment: Segment, variable: str) -> Iterator[tuple[int, int]]:
    """The first step and number of steps of each piece that is read at once: whole chunks where
    they fit into a bounded memory."""
    num_lat, num_lon = segment.grid.shape
    step_bytes = 8 * len(segment.levels_of(variable)) * num_lat * num_lon
    length = max(1, _BLOCK_BYTES // step_bytes)
    chunk = segment.stored[variable].chunk_length("time") or 1
    length = max(chunk, length // chunk * chunk) if chunk <= 4 * length else length
    start, total = 0, len(segment.times)
    while start < total:
        end = min(total, ((segment.first_step + start) // length + 1) * length - segment.first_step)
        yield start, end - start
        start = end


def read_block(
    segment: Segment, variable: str, start: int, count: int, transform: Transform | None
) -> np.ndarray:
    """Values [level time lat lon] in float64, transformed."""
    levels = segment.levels_of(variable)
    values = segment.read(variable, levels, start, count, segment.whole()).astype(np.float64)
    return transform.forward(values) if transform else values


def segment_sums(
    segment: Segment,
    variable: str,
    transform: Transform | None,
    partial: Path | None,
    progress: Callable[[int], object],
) -> RunningSums:
    """The sums of one variable over a segment, by level.

    partial: the folder that keeps what is done after every block, so that a stopped pass can
        continue. progress: is called with the number of steps of every block.
    """
    sums, done = _resume(partial)
    for start, count in blocks(segment, variable):
        progress(count)
        if start + count <= done:
            continue
        ahead = 1 if start else 0  # one step more, for the change into this block
        values = read_block(segment, variable, start - ahead, count + ahead, transform)
        before = values[:, 0] if ahead else None
        block = RunningSums.of(values[:, ahead:], segment.grid.weights, before)
        sums = block if sums is None else sums.merged(block)
        if partial is not None:
            write_sealed(partial, {"done": start + count, "moments": sums.to_dict()})
    assert sums is not None, f"segment {segment.name} has no steps"
    return sums


def _resume(partial: Path | None) -> tuple[RunningSums | None, int]:
    if partial is None or not partial.exists():
        return None, 0
    try:
        state = read_sealed(partial)
        return RunningSums.from_dict(state["moments"]), int(state["done"])
    except (ValueError, KeyError, TypeError):  # damaged: it is only work that is done again
        return None, 0


def pooled(sums: Sequence[RunningSums]) -> RunningSums:
    """The sums of several segments together; no step leads from one into the next."""
    total = sums[0]
    for other in sums[1:]:
        total = total.merged(other)
    return total


_LOGGER = logging.getLogger(__name__)


def compute_statistics(
    segments: Sequence[Segment],
    transforms: Transforms = NO_TRANSFORMS,
    partial: Path | None = None,
    progress: Callable[[int], object] = int,
) -> Statistics:
    """Compute the statistics of the segments in one streaming pass, in float64.

    partial: folder that holds the state of a pass that was stopped, and of this one.

    Raises:
        ValueError: missing values where none may be, or a variable that never changes.
    """
    first = segments[0]
    rows = []
    for name in first.variables:
        parts = [
            segment_sums(
                segment,
                name,
                transforms.get(name),
                partial / f"{file_name(name)}-{number}.json" if partial else None,
                progress,
            )
            for number, segment in enumerate(segments)
        ]
        rows.append(pooled(parts))
        _check_changes(rows[-1], first, name)
    columns = len(first.levels or (0,))

    def table(values: Callable[[RunningSums], np.ndarray]) -> np.ndarray:
        return np.stack([np.broadcast_to(values(row), (columns,)) for row in rows])

    return Statistics(
        variables=first.variables,
        levels=first.levels or (0,),
        mean=table(lambda m: m.mean),
        std=table(lambda m: np.sqrt(m.square / m.weight)),
        step_std=table(lambda m: np.sqrt(m.step_square / np.maximum(m.step_weight, 1e-300))),
        minimum=table(lambda m: m.minimum),
        maximum=table(lambda m: m.maximum),
        missing=table(lambda m: m.missing / m.count),
        period="; ".join(f"{s.name} {s.period}" for s in segments),
        fingerprint=fingerprint(segments, transforms),
        transforms={n: t for n, t in transforms.items() if n in first.variables},
    )


def outside_limits(statistics: Statistics, *, pressure_levels: bool = True) -> list[str]:
    """A line for every variable with values that the atmosphere does not have: they are in other
    units, or are fill values that are not marked as missing.

    pressure_levels: whether the levels are pressures.
    """
    if statistics.minimum is None or statistics.maximum is None:
        return []
    lines = []
    for row, name in enumerate(statistics.variables):
        if name not in VARIABLES:
            continue
        extremes = np.stack([statistics.minimum[row], statistics.maximum[row]])
        if name in statistics.transforms:
            extremes = statistics.transforms[name].inverse(extremes)
        pressures = [level if pressure_levels else 0 for level in statistics.levels]
        ranges = np.array([physical_range(name, pressure) for pressure in pressures]).T
        outside = (extremes[0] < ranges[0]) | (extremes[1] > ranges[1])
        if outside.any():
            lines.append(_outside_line(name, extremes[:, outside], ranges[:, outside]))
    return lines


def _outside_line(name: str, extremes: np.ndarray, ranges: np.ndarray) -> str:
    """The line on one variable. extremes, ranges: [2 level], lowest and highest, of the levels
    that are outside."""
    low, high = extremes[0].min(), extremes[1].max()
    return (
        f"{name} goes from {low:.4g} to {high:.4g} {VARIABLES[name].units}, physical is "
        f"{ranges[0].min():.4g} to {ranges[1].max():.4g}: other units, or a fill value that is not "
        "marked?"
    )


def _check_changes(sums: RunningSums, segment: Segment, name: str) -> None:
    """Raise ValueError if a variable is constant, so that nothing can be normalised by its
    spread."""
    where = f"{segment.location}: {name}"
    levels = segment.levels_of(name)
    for column, level in enumerate(levels):
        at = f" at {level} hPa" if level else ""
        if sums.weight[column] == 0:
            raise ValueError(f"{where}{at} has no values in the training period")
        std = np.sqrt(sums.square[column] / sums.weight[column])
        if std <= 1e-7 * abs(sums.mean[column]):  # rounding of a sum
            raise ValueError(f"{where}{at} never changes")


def cache_folder() -> Path:
    """The folder where statistics are kept: `ATMOSSL_CACHE`, or the user's cache folder."""
    chosen = os.environ.get("ATMOSSL_CACHE")
    if chosen:
        return Path(chosen)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "atmossl"


def load_or_compute(
    segments: Sequence[Segment],
    folder: Path | None = None,
    transforms: Transforms = NO_TRANSFORMS,
    progress: Callable[[int], object] = int,
    force: bool = False,
) -> Statistics:
    """The statistics of these segments, from the cache or computed now and saved there atomically.

    Statistics of another state of the store are refused, since a store that changes below a
    training is news; with `force` they are computed anew. A pass that was stopped continues, if the
    store is still the same. Of several processes (the ranks of a run, or the runs of a sweep) one
    computes, and the others wait for its file.

    Raises:
        ValueError: the store has changed since; names the file, and what to do.
    """
    now = fingerprint(segments, transforms)
    cache = folder or cache_folder()
    path = cache / f"statistics-{identity(segments, transforms)}.json"
    before = _written(path)
    cached = _agreeing(path, segments, now, force)
    if cached is not None:
        return cached
    partial = path.with_suffix(f".{now}.partial")
    _check_writable(cache)
    with naming_errors(cache, "ATMOSSL_CACHE"), owned_in_turn(path, "statistics", _tell_waiting):
        if _written(path) != before:  # by the process that this one has waited for
            cached = _agreeing(path, segments, now, force)
            if cached is not None:
                return cached
        statistics = compute_statistics(segments, transforms, partial, progress)
        write_sealed(path, statistics.to_dict())
        for stale in cache.glob(f"{path.stem}.*.partial"):  # of other states of the store, too
            shutil.rmtree(stale, ignore_errors=True)
    return statistics


def _written(path: Path) -> tuple[int, int]:
    """A stamp of a file that changes when the file is written anew; zeros without a file."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_ino, status.st_mtime_ns


def _agreeing(path: Path, segments: Sequence[Segment], now: str, force: bool) -> Statistics | None:
    """The statistics in a file, if they are of the present state of the store.

    Raises:
        ValueError: it is of another state, without `force`.
    """
    cached = _cached(path, segments) if path.exists() else None
    if cached is None or agree(cached.fingerprint, now):
        return cached
    if not force:
        raise ValueError(stale_message(path, segments, cached.fingerprint, now))
    return None


def _tell_waiting() -> None:
    if is_first_rank(os.environ):
        _LOGGER.warning("note: another process computes the statistics; this one waits for them")


def _cached(path: Path, segments: Sequence[Segment]) -> Statistics | None:
    """The statistics in a file; None, with a note, if the file is damaged."""
    try:
        statistics = Statistics.from_dict(read_sealed(path))
        first = segments[0]
        shape = (len(first.variables), len(first.levels or (0,)))
        whole = all(
            values.shape == shape and values.dtype.kind in "fi"
            for values in (getattr(statistics, key) for key in ARRAYS)
            if values is not None
        )
        if not whole or statistics.variables != first.variables:
            raise ValueError(f"{path} is damaged: it lacks values of some variables or levels")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = str(error) if "is damaged" in str(error) else f"{path} is damaged"
        _LOGGER.warning("%s; the statistics are computed anew", why)
        return None
    return statistics


def _check_writable(cache: Path) -> None:
    """Raise ValueError, before the pass over the data, if its result could not be saved."""
    probe = cache / f".{uuid4().hex}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        probe.write_text("room for this?")
        probe.unlink()
    except OSError as error:
        with suppress(OSError):
            probe.unlink()
        raise ValueError(
            f"statistics cannot be kept in {cache}: {error.strerror}; set ATMOSSL_CACHE to a "
            "folder that can be written"
        ) from error
