"""Area-weighted moments of stored variables in one streaming pass, which can be taken up again.

Blocks of steps are summed up in float64 about their own mean and merged pairwise (Chan, Golub and
LeVeque 1983), so that neither the length of the record nor a large mean costs precision.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Self

import numpy as np

from atmossl.data.segment import Segment
from atmossl.data.transforms import Transform
from atmossl.sealed import read_sealed, write_sealed

_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Moments:
    """Sums over the observed values of one variable, [level] each.

    weight: sum of area weights. square: weighted squared departures from `mean`.
    step_square, step_weight: the same for changes over one step, about 0. missing: their number.
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
        """values: [level time lat lon], NaN where missing. area: weights [lat].
        before: the field [level lat lon] of the step before the first, if there is one."""
        axes = (1, 2, 3)
        observed = np.isfinite(values)
        weights = observed * area[:, None]
        filled = np.where(observed, values, 0.0)
        weight = weights.sum(axes)
        mean = (filled * weights).sum(axes) / np.maximum(weight, np.finfo(float).tiny)
        joined = values if before is None else np.concatenate([before[:, None], values], axis=1)
        steps = np.diff(joined, axis=1)
        known = np.isfinite(steps)
        step_weights = known * area[:, None]
        return cls(
            weight=weight,
            mean=mean,
            square=((filled - mean[:, None, None, None]) ** 2 * weights).sum(axes),
            step_weight=step_weights.sum(axes),
            step_square=(np.where(known, steps, 0.0) ** 2 * step_weights).sum(axes),
            minimum=np.where(observed, values, np.inf).min(axes),
            maximum=np.where(observed, values, -np.inf).max(axes),
            missing=(~observed).sum(axes).astype(float),
            count=np.full(len(values), float(values[0].size)),
        )

    def merged(self, other: Self) -> Self:
        """The moments of both together."""
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
    """First step and number of steps of the pieces to be read at once: whole chunks where they
    fit into a bounded memory."""
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


def segment_moments(
    segment: Segment,
    variable: str,
    transform: Transform | None,
    partial: Path | None,
    progress: Callable[[int], object],
) -> Moments:
    """Moments of one variable over a segment, [level].

    partial: where to keep what is done after every block, to go on from there.
    progress: told the number of steps of every block.
    """
    found, done = _resume(partial)
    for start, count in blocks(segment, variable):
        progress(count)
        if start + count <= done:
            continue
        ahead = 1 if start else 0  # one step more, for the change into this block
        values = read_block(segment, variable, start - ahead, count + ahead, transform)
        before = values[:, 0] if ahead else None
        block = Moments.of(values[:, ahead:], segment.grid.weights, before)
        found = block if found is None else found.merged(block)
        _save(partial, {"done": start + count, "moments": found.to_dict()})
    assert found is not None, f"segment {segment.name} has no steps"
    return found


def _resume(partial: Path | None) -> tuple[Moments | None, int]:
    if partial is None or not partial.exists():
        return None, 0
    try:
        state = read_sealed(partial)
        return Moments.from_dict(state["moments"]), int(state["done"])
    except (ValueError, KeyError, TypeError):  # damaged: it is only work that is done again
        return None, 0


def _save(partial: Path | None, state: dict) -> None:
    if partial is None:
        return
    write_sealed(partial, state)


def pooled(moments: Sequence[Moments]) -> Moments:
    """The moments of several segments together; no step leads from one into the next."""
    total = moments[0]
    for other in moments[1:]:
        total = total.merged(other)
    return total
