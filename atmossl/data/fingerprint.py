"""Fingerprints of stores: results such as statistics carry the fingerprint of the data that they
were computed from, so that a change of the store is noticed."""

import asyncio
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.abc.store import Store
from zarr.core.sync import sync

from atmossl.checkpoint_files import values_digest
from atmossl.data.backends import REFERENCES
from atmossl.data.chunks import zarr_array_of
from atmossl.data.forcings import FORCINGS
from atmossl.data.segment import Segment
from atmossl.data.variables import Transform

_FORMAT = 2
_NUM_SIZES = 32  # chunks of every variable whose stored size is looked up
_GOLDEN = (5**0.5 - 1) / 2
Transforms = Mapping[str, Transform]
NO_TRANSFORMS: Transforms = MappingProxyType({})


def fingerprint(
    segments: Sequence[Segment], transforms: Transforms = NO_TRANSFORMS, steps: Sequence[int] = ()
) -> str:
    """A hash of the state of the data: period, grid, variables, levels, encoding, the first, middle
    and last fields of every segment, the checksums of `atmossl data ingest` where the store has
    them, and the transforms. Where the store lies does not matter. steps: further steps whose
    fields enter the hash.

    For zarr stores a second hash follows, of the stored sizes of chunks spread over the period: a
    compressed chunk of other values hardly has the same. Compare with `agree`: what was computed by
    versions that lack it still counts.
    """
    sizes = [
        [name, chunk_bytes]
        for segment in segments
        for name in segment.variables
        if (chunk_bytes := _stored_sizes(segment, name)) is not None
    ]
    content = _content(segments, transforms, steps)
    if not sizes:
        return content
    return f"{content}-{hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:8]}"


def agree(first: str, second: str) -> bool:
    """Whether two fingerprints are of the same state, as far as both say."""
    (content, _, sizes), (content_too, _, sizes_too) = first.partition("-"), second.partition("-")
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
    """The stored sizes in bytes of some chunks, -1 for a chunk that is not there; None if the
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
    """Positions of at most `_NUM_SIZES` chunks, spread evenly along one axis; along all other
    axes they step by the golden ratio, so that they do not repeat."""
    other_axes = [numbers_along for number, numbers_along in enumerate(bounds) if number != axis]
    along, beside = len(bounds[axis]), math.prod(map(len, other_axes))
    count = min(_NUM_SIZES, along * beside)
    if count == along * beside:
        places = list(np.ndindex(along, beside))
    else:
        numbers = np.arange(count)
        first = ((numbers + 0.5) / count * along).astype(int)
        places = list(zip(first, (numbers * _GOLDEN % 1.0 * beside).astype(int), strict=True))
    chunks = []
    for first, rest in places:
        index = np.unravel_index(rest, tuple(map(len, other_axes))) if other_axes else ()
        chunk = [int(numbers_along[n]) for numbers_along, n in zip(other_axes, index, strict=True)]
        chunks.append((*chunk[:axis], int(bounds[axis][first]), *chunk[axis:]))
    return chunks


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
    """What `atmossl data ingest` noted of each region of a store. Attributes hold it as JSON
    text, since NetCDF knows no mappings; older stores hold a mapping."""
    value = attributes.get(key, "{}")
    return dict(value) if isinstance(value, Mapping) else json.loads(value)


def identity(segments: Sequence[Segment], transforms: Transforms = NO_TRANSFORMS) -> str:
    """A hash of the request alone: locations, period, variables, levels and transforms, whatever
    the stores hold. For data inside the package their content counts instead of their location."""
    package = Path(str(resources.files("atmossl")))
    digest = hashlib.sha256()
    for segment in segments:
        embedded = Path(segment.location).is_relative_to(package)
        place = _content([segment], NO_TRANSFORMS) if embedded else str(_absolute(segment.location))
        request = [place, segment.period, segment.variables, segment.levels]
        digest.update(json.dumps(request).encode())
    for name, transform in sorted(transforms.items()):
        digest.update(f"{name} {transform}".encode())
    return digest.hexdigest()[:16]


def _absolute(location: str) -> str | Path:
    return location if "://" in location else Path(location).absolute()


def stale_message(path: Path, segments: Sequence[Segment], written: str, now: str) -> str:
    """The error, in one line, for a result that was computed from another state of its stores."""
    places = ", ".join(dict.fromkeys(segment.location for segment in segments))
    return (
        f"{path} was computed from another state of {places} (fingerprint {written}, now {now}); "
        "compute it anew with `atmossl data stats --force` and the keys of this run"
    )


# Checksums of what lies around the fields of an ingested store: coordinates, and metadata.
#
# `atmossl data ingest` notes a checksum of the values of every region of a variable. Where and
# when those values are valid, and in which units, stands in the coordinates and in the
# metadata, which this module adds. It hashes what they mean and not their bytes on the disk, so
# that a copy with other chunks keeps its checksums.

_WRITTEN = ("Conventions", "source", "inputs")  # attributes of the store, beside the notes
_STORE = "attributes of the store"


class UnequalError(ValueError):
    """A store differs from its checksums; the message says where, in one line."""


def checksums_around(store: Path, *, consolidated: bool) -> dict[str, str]:
    """The checksum of every array's metadata, and of every coordinate's values, by name.

    consolidated: read the copy of all metadata that lies in one file, if there is one.
    """
    group = zarr.open_group(store, mode="r", use_consolidated=None if consolidated else False)
    notes = {key: noted(group.attrs, key) for key in ("checksums", "missing")}
    written = {key: group.attrs[key] for key in _WRITTEN if key in group.attrs}
    checksums = {_STORE: values_digest([notes, written])}
    variables = {note.rpartition("-")[0] for note in notes["checksums"]}
    for name, array in group.arrays():
        checksums[name] = _array_checksum(array, with_values=name not in variables)
    return checksums


def check_around(store: Path, expected: Mapping[str, str]) -> None:
    """Compare a store with the checksums that `checksums_around` gave when it was finished. Arrays
    that were added since are ignored.

    Raises:
        UnequalError: the first coordinate or variable that differs.
    """
    for consolidated in (False, True):
        actual = checksums_around(store, consolidated=consolidated)
        for name, checksum in expected.items():
            if name not in actual:
                raise UnequalError(f"{store}: {name} is missing")
            if actual[name] != checksum:
                verb = "differ" if name == _STORE else "(metadata or coordinate values) differs"
                raise UnequalError(f"{store}: {name} {verb} from the checksum")


def _array_checksum(array: zarr.Array, *, with_values: bool) -> str:
    metadata: Any = array.metadata
    content: list[Any] = [
        list(array.shape),
        str(array.dtype),
        list(metadata.dimension_names or ()),
        str(np.asarray(array.fill_value).item()),
        dict(array.attrs),
    ]
    if with_values:
        values = np.ascontiguousarray(np.asarray(array[...]))
        content.append(hashlib.sha256(values.tobytes()).hexdigest())
    return values_digest(content)


# What the inputs of an ingest were, so that one that was stopped does not go on with others.
#
# Of a file: size, date of change, and a hash of samples of its bytes. Of a zarr folder: the
# same of every array, from the sizes and dates of all its files. Of what is no file here, such
# as a URL or references to other files: a hash of the first, middle and last fields of every
# variable.

State = dict[str, str]
_NUM_BLOCKS, _BLOCK_BYTES = 8, 16 * 1024


def input_state(files: Sequence[str], dataset: xr.Dataset) -> State:
    """The state of every input file by its name. dataset: what is read from all of them."""
    state = local_state(files)
    if any("://" in file or file.endswith(REFERENCES) for file in files):
        for name, array in dataset.data_vars.items():
            state[f"variable {name}"] = _fields_hash(array)
    return state


def local_state(files: Sequence[str]) -> State:
    """The state of those input files that lie on this machine."""
    state: State = {}
    for path in (Path(file) for file in files if "://" not in file):
        if path.is_dir():
            state |= _folder_state(path)
        else:
            state[str(path)] = _file_state(path)
    return state


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The differences between two states, in words; empty if there is none."""
    words = [f"{name} is gone" for name in before if name not in now]
    words += [f"{name} is new" for name in now if name not in before]
    words += [
        f"{name} has changed" for name in before if now.get(name, before[name]) != before[name]
    ]
    more = f" and {len(words) - 4} more" if len(words) > 4 else ""
    return ", ".join(words[:4]) + more


def _file_state(path: Path) -> str:
    about, digest = path.stat(), hashlib.sha256()
    starts = np.linspace(0, max(about.st_size - _BLOCK_BYTES, 0), _NUM_BLOCKS).astype(int)
    with path.open("rb") as file:
        for start in dict.fromkeys(starts.tolist()):
            file.seek(start)
            digest.update(file.read(_BLOCK_BYTES))
    return f"{about.st_size} {about.st_mtime_ns} {digest.hexdigest()[:16]}"


def _folder_state(folder: Path) -> State:
    """The state of the arrays and groups at the top of a zarr folder, and of the files there."""
    state: State = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            state[str(entry)] = _files_hash(entry)
        else:
            state[str(entry)] = _file_state(entry)
    return state


def _files_hash(folder: Path) -> str:
    """A hash of the names, sizes and dates of all files, and of samples of the content of some."""
    paths = sorted(_files_below(folder))
    digest = hashlib.sha256()
    for path in paths:
        about = path.stat()
        line = f"{path.relative_to(folder)} {about.st_size} {about.st_mtime_ns}\n"
        digest.update(line.encode())
    for path in paths[:: max(len(paths) // _NUM_BLOCKS, 1)]:
        digest.update(_file_state(path).encode())
    return digest.hexdigest()[:16]


def _files_below(folder: Path) -> Iterable[Path]:
    for place, _, names in os.walk(folder):
        yield from (Path(place) / name for name in names)


def _fields_hash(array: xr.DataArray) -> str:
    digest = hashlib.sha256(str(array.shape).encode())
    total = array.sizes.get("time", 0)
    for step in sorted({0, total // 2, total - 1}) if total else [None]:
        chosen = array if step is None else array.isel(time=step)
        digest.update(np.ascontiguousarray(chosen.values).tobytes())
    return digest.hexdigest()[:16]
