"""Small JSON files that notice when they are damaged: statistics, what a stopped command has done.

The file holds the values and a hash of them. It appears under its name when it is whole, also where
several processes write the same one: the last of them counts.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

_SEAL = "sha256_of_values"


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain values; the folder is made if it is not there."""
    text = json.dumps({**values, _SEAL: _digest(values)}, indent=1)
    partial = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        try:
            partial.write_text(text)
        except FileNotFoundError:  # not yet there, or just removed by who finished before
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def read_sealed(path: Path) -> dict[str, Any]:
    """The values of a file. One of a version that wrote no hash is taken as it is.

    Raises:
        ValueError: the file is damaged; names it.
    """
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is no JSON") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it holds no names and values")
    seal = values.pop(_SEAL, None)
    if seal is not None and seal != _digest(values):
        raise ValueError(f"{path} is damaged: its values are not those that were written")
    return values


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
