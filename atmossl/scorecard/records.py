"""Records as datasets: small ones in memory, large ones read where and when values are needed."""

from collections.abc import Sequence
from functools import partial

import dask.array
import numpy as np
import xarray as xr
from dask.delayed import delayed

from atmossl.data.segment import Segment
from atmossl.schema import EvaluateConfig
from atmossl.value_faults import listed

IN_MEMORY_BYTES = 512 * 2**20
_BLOCK_BYTES = 32 * 2**20


def chosen_segments(segments: Sequence[Segment], config: EvaluateConfig) -> list[Segment]:
    """The segments that the configuration scores: all of the split, or the named one.

    Raises:
        ValueError: there is none of that name.
    """
    chosen = [segment for segment in segments if segment.is_called(config.segment)]
    if not chosen:
        have = sorted({segment.name for segment in segments})
        raise ValueError(
            f"segment={config.segment} is not in split={config.split}; valid: {listed(have)}"
        )
    return chosen


def is_small(segment: Segment) -> bool:
    """Whether the record may be held in memory as a whole."""
    return len(segment.times) * _step_bytes(segment) <= IN_MEMORY_BYTES


def _step_bytes(segment: Segment) -> int:
    fields = sum(len(segment.levels_of(name)) for name in segment.variables)
    return 4 * fields * int(np.prod(segment.grid.shape))


def record_of(segment: Segment) -> xr.Dataset:
    """The record in canonical form, dims (time, level, latitude, longitude). A large record
    consists of blocks of times that are read and checked on demand; nothing is kept."""
    if is_small(segment):
        return segment.to_dataset()
    step = max(1, _BLOCK_BYTES // _step_bytes(segment))
    starts = range(0, len(segment.times), step)
    fields = {
        name: dask.array.concatenate([_block(segment, name, start, step) for start in starts], 1)
        for name in segment.variables
    }
    return segment.dataset_of(fields, segment.times)


def _block(segment: Segment, name: str, start: int, step: int) -> dask.array.Array:
    """Some times of one variable, [level time lat lon]."""
    count = min(step, len(segment.times) - start)
    # bound beforehand, or dask would look for collections in the segment, and hash its store
    values = delayed(partial(_read, segment, name, start, count), traverse=False)()
    shape = (len(segment.levels_of(name)), count, *segment.grid.shape)
    return dask.array.from_delayed(values, shape, np.float32)


def _read(segment: Segment, name: str, start: int, count: int) -> np.ndarray:
    levels = segment.levels_of(name)
    return segment.read(name, levels, start, count, segment.whole(), within_limits=True)
