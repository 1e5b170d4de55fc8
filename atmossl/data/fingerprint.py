"""What was computed from a store is tied to the state of the store that it was computed from."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType

import numpy as np

from atmossl.data.forcings import FORCINGS
from atmossl.data.segment import Segment
from atmossl.data.transforms import Transform

_FORMAT = 2
Transforms = Mapping[str, Transform]
NO_TRANSFORMS: Transforms = MappingProxyType({})


def fingerprint(segments: Sequence[Segment], transforms: Transforms = NO_TRANSFORMS) -> str:
    """Hash of what statistics depend on: period, grid, variables, levels, encoding, the first,
    middle and last fields of every segment, the checksums of `atmossl data ingest` where the store
    has them, and the transforms. Where a store lies does not matter."""
    digest = hashlib.sha256(f"format {_FORMAT}".encode())
    for segment in segments:
        for values in (segment.times, segment.grid.latitude, segment.grid.longitude):
            digest.update(np.ascontiguousarray(values).tobytes())
        digest.update(json.dumps([segment.variables, segment.levels]).encode())
        if not segment.calendar.plain:
            digest.update(segment.calendar.name.encode())
        for name in segment.variables:
            if name not in FORCINGS:  # those follow from times and grid
                _add_variable(digest, segment, name)
    for name, transform in sorted(transforms.items()):
        digest.update(f"{name} {transform}".encode())
    return digest.hexdigest()[:16]


def _add_variable(digest: "hashlib._Hash", segment: Segment, name: str) -> None:
    array = segment.dataset[name]
    digest.update(f"{name} {array.shape} {array.dtype}".encode())
    if "time" not in array.dims:
        digest.update(array.values.tobytes())
        return
    total = len(segment.times)
    for step in sorted({0, total // 2, total - 1}):
        digest.update(array.isel(time=step).values.tobytes())
    for note, checksum in _checksums(segment, name):
        digest.update(f"{note} {checksum}".encode())


def _checksums(segment: Segment, name: str) -> list[tuple[int, str]]:
    """First step and checksum of the regions of one variable that the segment touches."""
    noted = segment.dataset.attrs.get("checksums", {})
    starts = {
        int(note.rpartition("-")[2]): checksum
        for note, checksum in noted.items()
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


def identity(segments: Sequence[Segment], transforms: Transforms = NO_TRANSFORMS) -> str:
    """Hash of what was asked for, whatever the stores hold: where they lie, period, variables,
    levels and transforms. Data inside the package change with the package alone, and are known by
    their fingerprint."""
    package = Path(str(resources.files("atmossl")))
    digest = hashlib.sha256()
    for segment in segments:
        embedded = Path(segment.location).is_relative_to(package)
        place = fingerprint([segment]) if embedded else str(_absolute(segment.location))
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
