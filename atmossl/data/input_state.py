"""What the inputs of an ingest were, so that one that was stopped does not go on with others.

Of a file: size, date of change, and a hash of samples of its bytes. Of a zarr folder: the same of
every array, from the sizes and dates of all its files. Of what is no file here, such as a URL or
references to other files: a hash of the first, middle and last fields of every variable.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from atmossl.data.backends import REFERENCES

State = dict[str, str]
_NUM_BLOCKS, _BLOCK_BYTES = 8, 16 * 1024


def input_state(files: Sequence[str], dataset: xr.Dataset) -> State:
    """State of every input by its name. dataset: what is read from them all."""
    state = local_state(files)
    if any("://" in file or file.endswith(REFERENCES) for file in files):
        for name, array in dataset.data_vars.items():
            state[f"variable {name}"] = _fields_hash(array)
    return state


def local_state(files: Sequence[str]) -> State:
    """State of the inputs that lie on this machine."""
    state: State = {}
    for path in (Path(file) for file in files if "://" not in file):
        if path.is_dir():
            state |= _folder_state(path)
        else:
            state[str(path)] = _file_state(path)
    return state


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What differs between two states, in words; empty if nothing."""
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
    """State of the arrays and groups at the top of a zarr folder, and of the files there."""
    state: State = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            state[str(entry)] = _files_hash(entry)
        else:
            state[str(entry)] = _file_state(entry)
    return state


def _files_hash(folder: Path) -> str:
    """Hash of the names, sizes and dates of all files, and of samples of some."""
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
