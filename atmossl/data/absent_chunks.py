"""Chunks that a zarr store does not hold.

Zarr reads such a chunk as the array's fill value. An array that declares none has zeros there: a
temperature of 0 K, a wind of 0 m/s. Here they are missing values, NaN, so that they are refused or
masked as all missing values are. An array that declares its fill value keeps its meaning, as
xarray writes them: it leaves out chunks that are nothing but zeros, of precipitation say.
"""

import itertools

import numpy as np
import zarr
from zarr.core.sync import sync


def without_absent(
    array: zarr.Array, region: tuple[slice, ...], values: np.ndarray
) -> tuple[np.ndarray, bool]:
    """Values of a region as they are stored, NaN in the chunks that are not in the store and have
    no declared fill value; and whether there are such chunks.

    The store is asked only for chunks that read as nothing but zeros, so this costs nothing.
    """
    if values.size == 0 or declares_fill_value(array):
        return values, False
    absent = [
        inside
        for number, inside in _stored_chunks(array, region)
        if not _any(values[inside]) and not _is_stored(array, number)
    ]
    if not absent:
        return values, False
    values = values.astype(np.result_type(values.dtype, np.float32))
    for inside in absent:
        values[inside] = np.nan
    return values, True


def declares_fill_value(array: zarr.Array) -> bool:
    """Whether the array says what values are that were never written: by an attribute
    `_FillValue`, or by a fill value other than none or zarr's default, 0."""
    if "_FillValue" in array.attrs:
        return True
    return array.fill_value is not None and bool(array.fill_value != 0)


def _any(values: np.ndarray) -> bool:
    """Whether any value is not 0; mostly the first is not."""
    return bool(values[(0,) * values.ndim] != 0) or bool(values.any())


def _stored_chunks(
    array: zarr.Array, region: tuple[slice, ...]
) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Numbers of the stored chunks, or shards, that a region touches, and their share of it."""
    axes = []
    for part, length in zip(region, array.shards or array.chunks, strict=True):
        numbers = range(part.start // length, (part.stop - 1) // length + 1)
        bounds = [
            slice(max(n * length, part.start) - part.start,
                  min((n + 1) * length, part.stop) - part.start)
            for n in numbers
        ]  # fmt: skip
        axes.append(list(zip(numbers, bounds, strict=True)))
    touched = []
    for combination in itertools.product(*axes):
        number, inside = zip(*combination, strict=True)
        touched.append((number, inside))
    return touched


def _is_stored(array: zarr.Array, number: tuple[int, ...]) -> bool:
    path = array.store_path / array.metadata.encode_chunk_key(number)
    return bool(sync(path.exists()))
