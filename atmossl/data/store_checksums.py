"""Checksums of what lies around the fields of an ingested store: coordinates, and metadata.

`atmossl data ingest` notes a checksum of the values of every region of a variable. Where and when
those values are valid, and in which units, stands in the coordinates and in the metadata, which
this module adds. It hashes what they mean and not their bytes on the disk, so that a copy with
other chunks keeps its checksums.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from atmossl.data.fingerprint import noted

_WRITTEN = ("Conventions", "source", "inputs")  # attributes of the store, beside the notes
_STORE = "attributes of the store"


class UnequalError(ValueError):
    """What of a store differs from its checksums, in one line."""


def checksums_around(store: Path, *, consolidated: bool) -> dict[str, str]:
    """Checksum of every array's metadata, and of every coordinate's values, by its name.

    consolidated: read the copy of all metadata that lies in one file, if there is one.
    """
    group = zarr.open_group(store, mode="r", use_consolidated=None if consolidated else False)
    notes = {key: noted(group.attrs, key) for key in ("checksums", "missing")}
    written = {key: group.attrs[key] for key in _WRITTEN if key in group.attrs}
    checksums = {_STORE: _hash([notes, written])}
    variables = {note.rpartition("-")[0] for note in notes["checksums"]}
    for name, array in group.arrays():
        checksums[name] = _array_checksum(array, with_values=name not in variables)
    return checksums


def check_around(store: Path, expected: Mapping[str, str]) -> None:
    """Compare a store with what `checksums_around` gave when it was finished. Arrays that were
    added since do not count.

    Raises:
        UnequalError: the first coordinate or variable that differs.
    """
    for consolidated in (False, True):
        actual = checksums_around(store, consolidated=consolidated)
        for name, checksum in expected.items():
            if name not in actual:
                raise UnequalError(f"{store}: {name} is missing")
            if actual[name] != checksum:
                what = "differ" if name == _STORE else "(metadata or coordinate values) differs"
                raise UnequalError(f"{store}: {name} {what} from the checksum")


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
    return _hash(content)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
