"""What was computed from a store is tied to the state of the store that it was computed from."""

import asyncio
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from zarr.abc.store import Store
from zarr.core.sync import sync

from atmossl.data.chunks import zarr_array_of
from atmossl.data.forcings import FORCINGS
from atmossl.data.segment import Segment
from atmossl.data.transforms import Transform

_FORMAT = 2
_NUM_SIZES = 32  # chunks of every variable whose stored size is looked up
_GOLDEN = (5**0.5 - 1) / 2
Transforms = Mapping[str, Transform]
NO_TRANSFORMS: Transforms = MappingProxyType({})


def fingerprint(
    segments: Sequence[Segment],
    transforms: Transforms = NO_TRANSFORMS,
    steps: Sequence[int] = (),
) -> str:
    """Hash of what statistics depend on: period, grid, variables, levels, encoding, the first,
    middle and last fields of every segment, the checksums of `atmossl data ingest` where the store
    has them, and the transforms. Where a store lies does not matter. steps: more of which the
    fields count.

    For zarr stores a second hash follows, of the stored sizes of chunks spread over the period: a
    compressed chunk of other values hardly has the same. Compare with `agree`: what was computed by
    versions that lack it still counts."""
    sizes = [
        [name, found]
        for segment in segments
        for name in segment.variables
        if (found := _stored_sizes(segment, name)) is not None
    ]
    content = _content(segments, transforms, steps)
    if not sizes:
        return content
    return f"{content}-{hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:8]}"


def agree(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same state, as far as both know."""
    (content, _, sizes), (content_too, _, sizes_too) = one.partition("-"), other.partition("-")
    return content == content_too and (not sizes or not sizes_too or sizes == sizes_too)


def _content(segments: Sequence[Segment], transforms: Transforms, steps: Sequence[int] = ()) -> str:
    digest = hashlib.sha256(f"format {_FORMAT}".encode())
    for segment in segments:
        for values in (segment.times, segment.grid.latitude, segment.grid.longitude):
            digest.update(np.ascontiguousarray(values).tobytes())
        digest.update(json.dumps([segment.variables, segment.levels]).encode())
        if not segment.calendar.plain:
            digest.update(segment.calendar.name.encode())
        for name in segment.variables:
            if name not in FORCINGS:  # those follow from times and grid
                _add_variable(digest, segment, name, steps)
    for name, transform in sorted(transforms.items()):
        digest.update(f"{name} {transform}".encode())
    return digest.hexdigest()[:16]


def _stored_sizes(segment: Segment, name: str) -> list[int] | None:
    """Bytes of some chunks as they are stored, -1 for those that are not there; None if the
    variable lies in no zarr array.

    Raises:
        ValueError: the store does not tell.
    """
    variable = segment.stored[name]
    array = zarr_array_of(variable.array)
    if array is None:
        return None
    lengths = array.shards or array.chunks
    axis = variable.dims.index("time") if "time" in variable.dims else 0
    bounds = [range(-(-size // length)) for size, length in zip(array.shape, lengths, strict=True)]
    if "time" in variable.dims:
        last = (segment.first_step + len(segment.times) - 1) // lengths[axis]
        bounds[axis] = range(segment.first_step // lengths[axis], last + 1)
    keys = [array.metadata.encode_chunk_key(chunk) for chunk in _spread_chunks(bounds, axis)]
    paths = [(array.store_path / key).path for key in keys]
    try:
        retries = segment.access.retries_of(segment.location)
        return retries.call(lambda: sync(_sizes(array.store, paths)))
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{segment.location}: cannot look up how large chunks of {name} are "
            f"({type(error).__name__}: {why})"
        ) from error


def _spread_chunks(bounds: Sequence[range], axis: int) -> list[tuple[int, ...]]:
    """At most so many numbers of chunks, evenly along one axis and at ever other places along the
    rest, by steps of the golden ratio."""
    others = [one for number, one in enumerate(bounds) if number != axis]
    along, beside = len(bounds[axis]), math.prod(map(len, others))
    count = min(_NUM_SIZES, along * beside)
    if count == along * beside:
        places = list(np.ndindex(along, beside))
    else:
        numbers = np.arange(count)
        first = ((numbers + 0.5) / count * along).astype(int)
        places = list(zip(first, (numbers * _GOLDEN % 1.0 * beside).astype(int), strict=True))
    found = []
    for first, rest in places:
        index = np.unravel_index(rest, tuple(map(len, others))) if others else ()
        chunk = [int(one[n]) for one, n in zip(others, index, strict=True)]
        found.append((*chunk[:axis], int(bounds[axis][first]), *chunk[axis:]))
    return found


async def _sizes(store: Store, keys: Sequence[str]) -> list[int]:
    return list(await asyncio.gather(*(_size(store, key) for key in keys)))


async def _size(store: Store, key: str) -> int:
    try:
        return int(await store.getsize(key))
    except FileNotFoundError:
        return -1


def _add_variable(
    digest: "hashlib._Hash", segment: Segment, name: str, steps: Sequence[int]
) -> None:
    array = segment.dataset[name]
    digest.update(f"{name} {array.shape} {array.dtype}".encode())
    if "time" not in array.dims:
        digest.update(array.values.tobytes())
        return
    total, retries = len(segment.times), segment.access.retries_of(segment.location)
    for step in sorted({0, total // 2, total - 1, *steps}):
        field = array.isel(time=step)
        digest.update(retries.call(lambda field=field: field.values).tobytes())
    for note, checksum in _checksums(segment, name):
        digest.update(f"{note} {checksum}".encode())


def _checksums(segment: Segment, name: str) -> list[tuple[int, str]]:
    """First step and checksum of the regions of one variable that the segment touches."""
    starts = {
        int(note.rpartition("-")[2]): checksum
        for note, checksum in noted(segment.dataset.attrs, "checksums").items()
        if note.rpartition("-")[0] == name  # `ingest` writes canonical names
    }
    ordered = sorted(starts)
    end = segment.first_step + len(segment.times)
    touched = [
        start
        for start, following in zip(ordered, [*ordered[1:], end], strict=False)
        if start < end and following > segment.first_step
    ]
    return [(start, starts[start]) for start in touched]


def noted(attributes: Mapping[Any, Any], key: str) -> dict[str, Any]:
    """What `atmossl data ingest` noted of each region of a store: JSON text, since NetCDF holds no
    mappings; in older stores a mapping."""
    value = attributes.get(key, "{}")
    return dict(value) if isinstance(value, Mapping) else json.loads(value)


def identity(segments: Sequence[Segment], transforms: Transforms = NO_TRANSFORMS) -> str:
    """Hash of what was asked for, whatever the stores hold: where they lie, period, variables,
    levels and transforms. Data inside the package change with the package alone, and are known by
    their fingerprint."""
    package = Path(str(resources.files("atmossl")))
    digest = hashlib.sha256()
    for segment in segments:
        embedded = Path(segment.location).is_relative_to(package)
        place = _content([segment], NO_TRANSFORMS) if embedded else str(_absolute(segment.location))
        asked = [place, segment.period, segment.variables, segment.levels]
        digest.update(json.dumps(asked).encode())
    for name, transform in sorted(transforms.items()):
        digest.update(f"{name} {transform}".encode())
    return digest.hexdigest()[:16]


def _absolute(location: str) -> str | Path:
    return location if "://" in location else Path(location).absolute()


def stale_message(path: Path, segments: Sequence[Segment], found: str, now: str) -> str:
    """One line for what was computed from another state of a store."""
    places = ", ".join(dict.fromkeys(segment.location for segment in segments))
    return (
        f"{path} was computed from another state of {places} (fingerprint {found}, now {now}); "
        "compute it anew with `atmossl data stats --force` and the keys of this run"
    )
