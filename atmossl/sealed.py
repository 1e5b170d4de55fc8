"""Files that notice when they are damaged: checkpoints, whose checksums every read compares, and
small JSON files of statistics and of what a stopped command has done.

A checkpoint file is a zip archive that `torch.save` writes. Its comment, which torch does not look
at, holds the sha256 of all bytes before it, so that the checksum survives a copy of the file alone.
A folder of shards holds `manifest.json`, which lists the size and the sha256 of every other file.
Checkpoints of earlier versions have neither: of their files the archive's own CRC-32 are compared.

A JSON file holds the values and a hash of them. It appears under its name when it is whole, also
where several processes write the same one: the last of them counts.
"""

import hashlib
import json
import struct
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

MANIFEST = "manifest.json"
METADATA = "meta.pt"  # Lightning's name for what is no tensor of model or optimiser
_LABEL = b"atmossl sha256 "
_SEAL_BYTES = len(_LABEL) + 2 * hashlib.sha256().digest_size
_END_BYTES = 22  # of an archive's last record, if the archive has no comment
_READ_BYTES = 2**20
_THREADS = 4
_SHOWN_DIGITS = 16


class UnsoundError(ValueError):
    """A checkpoint is damaged, incomplete or foreign. The message is the end of a sentence that
    begins with its name."""


def seal_file(path: Path) -> None:
    """Write the checksum of a file of `torch.save` into it, once its bytes are compared with the
    CRC-32 that torch computed in memory.

    Raises:
        OSError: they differ.
    """
    try:
        _check_archive(path)
    except UnsoundError as error:
        raise OSError(f"{path} {error} just after it was written; is the disk sound?") from error
    with path.open("r+b") as file:
        file.seek(-2, 2)  # the last field of an archive without a comment: the comment's length
        file.write(struct.pack("<H", _SEAL_BYTES))
        size = file.tell()
        file.seek(0)
        checksum = _hash(file, size).hexdigest()
        file.write(_LABEL + checksum.encode())


def write_manifest(folder: Path) -> None:
    """List size and sha256 of every file of a folder in its `manifest.json`."""
    names = sorted(str(file.relative_to(folder)) for file in _files(folder))
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = dict(zip(names, pool.map(lambda name: _entry(folder / name), names), strict=True))
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=1))


def verified_digest(path: Path) -> str:
    """Compare all checksums of a file or folder; returns digits that identify its contents. Of a
    file they are the first ones that `sha256sum` prints.

    Raises:
        UnsoundError: a checksum differs, a part is missing, or it is no torch file.
        OSError: it cannot be read.
    """
    if not path.is_dir():
        return _verified_file(path)
    if not (path / MANIFEST).exists():
        return _digest_of_all(path)
    _check_manifest(path)
    return _entry(path / MANIFEST)["sha256"][:_SHOWN_DIGITS]


def _verified_file(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        body = _hash(file, max(0, size - _SEAL_BYTES))
        seal = file.read()
    is_sealed = seal.startswith(_LABEL)
    if is_sealed and seal != _LABEL + body.hexdigest().encode():
        raise UnsoundError("is damaged: its bytes do not match its checksum")
    if not is_sealed:
        _check_archive(path)
    body.update(seal)
    return body.hexdigest()[:_SHOWN_DIGITS]


def _check_archive(path: Path) -> None:
    """Compare the CRC-32 of every member of an archive that has no seal."""
    try:
        with zipfile.ZipFile(path) as archive:
            plain = all(
                member.compress_type == zipfile.ZIP_STORED
                and member.compress_size == member.file_size
                for member in archive.infolist()
            )
            damaged = archive.testzip()
    except OSError:
        raise
    except Exception as error:  # of many kinds: zipfile trusts what it reads
        raise UnsoundError(f"is truncated or no torch file ({in_one_line(error)})") from error
    if damaged is not None:
        raise UnsoundError(f"is damaged: the checksum of its part {damaged!r} differs")
    with path.open("rb") as file:
        file.seek(-_END_BYTES, 2)
        end = file.read()
    if not plain or not end.startswith(b"PK\5\6") or not end.endswith(b"\0\0"):
        raise UnsoundError("is damaged: its archive is not as torch writes it")


def _check_manifest(folder: Path) -> None:
    try:
        entries = json.loads((folder / MANIFEST).read_text())["files"]
        expected = {str(name): (int(e["bytes"]), str(e["sha256"])) for name, e in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsoundError(f"is damaged: its {MANIFEST} cannot be read") from error
    for name, (size, _) in expected.items():
        file = folder / name
        if not file.is_file():
            raise UnsoundError(f"is incomplete: its file {name} is missing")
        if file.stat().st_size != size:
            raise UnsoundError(f"is damaged: {name} has not the {size} bytes of its {MANIFEST}")
    with ThreadPoolExecutor(_THREADS) as pool:
        actual_sums = pool.map(lambda name: _entry(folder / name)["sha256"], expected)
        for (name, (_, checksum)), actual in zip(expected.items(), actual_sums, strict=True):
            if actual != checksum:
                raise UnsoundError(f"is damaged: {name} does not match its checksum")


def _digest_of_all(folder: Path) -> str:
    """The digest of a folder without a manifest: of the bytes of all files in the order of their
    names."""
    digest = hashlib.sha256()
    for file in _files(folder):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:_SHOWN_DIGITS]


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)


def _entry(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        return {"bytes": size, "sha256": _hash(opened, size).hexdigest()}


def _hash(file: Any, size: int) -> Any:
    """The sha256 of the next `size` bytes of an open file."""
    digest = hashlib.sha256()
    while size > 0 and (block := file.read(min(size, _READ_BYTES))):
        digest.update(block)
        size -= len(block)
    return digest


def in_one_line(error: BaseException) -> str:
    """The beginning of what an exception of a library says, or its kind where it says nothing."""
    words = " ".join(str(error).split())[:120]
    return "".join(filter(str.isprintable, words)) or type(error).__name__


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
