"""Files of checkpoints: read as one file, as a folder of shards or as a folder of a model hub, and
brought into the present format. They notice when they are damaged, as do small JSON files of
statistics and of what a stopped command has done.

A checkpoint file is a zip archive that `torch.save` writes. Its comment, which torch does not look
at, holds the sha256 of all bytes before it, so that the checksum survives a copy of the file alone.
A folder of shards holds `manifest.json`, which lists the size and the sha256 of every other file.
Checkpoints of earlier versions have neither: of their files the archive's own CRC-32 are compared.
Every read compares the checksums first, and says in one line what is wrong with a file that is
damaged, incomplete or not ours, whatever torch makes of it.

A JSON file holds the values and a hash of them (`write_sealed`). It appears under its name when it
is whole, also where several processes write the same one: the last of them counts.

A checkpoint record says what a checkpoint is: streams, statistics, window, the network and the
objective it was trained by. Its `format` is a whole number. Whoever changes what a record means
adds one to `FORMAT`, a function to `_MIGRATIONS`, and a tiny file of the old format to
`tests/checkpoints/`.

A folder of a model hub holds three files. `model.safetensors` has the averaged weights, and any
tensors of the record. `config.json` has the version of this form, the size and the sha256 of the
weights, the record and a sha256 of itself. `README.md` is the model card, which anyone may edit:
nothing reads it. None of the three can hold code. The checkpoints of the package are such folders.

`hf://OWNER/NAME`, with `@REVISION` for a branch, tag or commit, names a folder on a hub.
`huggingface_hub` fetches and caches it, and follows its own settings (`HF_HUB_OFFLINE`, `HF_HOME`,
`HF_ENDPOINT`); it comes with `pip install 'atmossl[hub]'`.
"""

import hashlib
import json
import logging
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atmossl.atomic_files import write_atomically
from atmossl.batch import PRIMARY
from atmossl.plain_values import check_checkpoint
from atmossl.renamed_keys import renamed

MANIFEST = "manifest.json"
METADATA = "meta.pt"  # Lightning's name for what is no tensor of model or optimiser
_LABEL = b"atmossl sha256 "
_SEAL_BYTES = len(_LABEL) + 2 * hashlib.sha256().digest_size
_END_BYTES = 22  # of an archive's last record, if the archive has no comment
_READ_BYTES = 2**20
_THREADS = 4
_SHOWN_DIGITS = 16
_SEAL = "sha256_of_values"
# What training cannot go on without, beside the weights.
_TO_GO_ON = ("optimizer_states", "lr_schedulers", "loops", "global_step")
_IN_RECORD = ("step", "rng", "streams", "model", "statistics")
SCHEME = "hf://"
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
HUB_FORMAT = 1
AVERAGED = "ema.module."  # begins the names of averaged weights in a checkpoint
_OF_RECORD = "record:"  # begins the names of tensors that belong to the record
_HUB_NAME = re.compile(r"hf://([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
_TUPLE, _ITEMS, _TENSOR, _FLOAT = "__tuple__", "__items__", "__tensor__", "__float__"
_KINDS = {_TUPLE, _ITEMS, _TENSOR, _FLOAT}


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
    return _sha256(path / MANIFEST)[:_SHOWN_DIGITS]


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
        actual_sums = pool.map(lambda name: _sha256(folder / name), expected)
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
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


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


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain values; the folder is made if it is not there."""
    text = json.dumps({**values, _SEAL: values_digest(values)}, indent=1)
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
    if seal is not None and seal != values_digest(values):
        raise ValueError(f"{path} is damaged: its values are not those that were written")
    return values


def values_digest(values: Any) -> str:
    """The sha256 of plain values, whatever the order of their names."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def save_contents(contents: Any, path: Path) -> None:
    """Write tensors and plain values as one file that carries its checksum.

    Raises:
        ValueError: something else is among them.
        OSError: in the system's words; torch says of a full disk only that a position is off.
    """
    check_checkpoint(contents)
    try:
        torch.save(contents, path)
    except RuntimeError as error:
        with path.open("ab", buffering=0) as file:  # asks once more
            file.write(bytes(2**20))
        raise OSError(f"{path} could not be written: {error}") from error
    seal_file(path)


def write_output(contents: Any, path: Path) -> None:
    """Write the checkpoint that a command's key `output` names, atomically.

    Raises:
        OSError: names key and file beside the system's words.
    """
    try:
        write_atomically(path, lambda partial: save_contents(contents, partial))
    except OSError as error:
        words = error.strerror or str(error)
        raise OSError(f"output={path} could not be written: {words}") from error


def read_contents(path: Path) -> dict[str, Any]:
    """A checkpoint as plain values and tensors on the CPU, whoever wrote it on how many devices.

    Raises:
        ValueError: damaged, truncated, no torch file, or not one of ours.
    """
    return read_with_digest(path)[0]


def read_with_digest(path: Path) -> tuple[dict[str, Any], str]:
    """The contents of `read_contents`, and the digits that identify them."""
    contents: Any
    with _naming(path):
        if is_hub_folder(path):
            contents, digest = read_hub_folder(path)
        else:
            digest = verified_digest(path)
            contents = _read_shards(path) if path.is_dir() else _load(path)
    return _checked(path, contents), digest


def read_record_to_go_on(path: Path) -> dict[str, Any]:
    """The record of a checkpoint from which training can continue. All checksums are compared; the
    tensors stay on the disk.

    Raises:
        ValueError: damaged, incomplete, no torch file, not one of ours, or weights alone.
    """
    contents: Any
    with _naming(path):
        if is_hub_folder(path):
            contents, _ = read_hub_folder(path)
        elif verified_digest(path) and not path.is_dir():
            contents = _load(path, mmap=True)
        elif (path / MANIFEST).exists():
            shards: Any = dict.fromkeys(("state_dict", "optimizer_states"))
            contents = {**_load(path / METADATA, mmap=True), **shards}
        else:  # an earlier version wrote it: a look at all of it is the only check
            contents = _read_shards(path)
    contents = _checked(path, contents)
    if missing := [key for key in _TO_GO_ON if key not in contents]:
        raise ValueError(f"{path} holds weights alone: it has no {', '.join(missing)}")
    checkpoint_record = contents["atmossl"]
    if missing := [key for key in _IN_RECORD if key not in checkpoint_record]:
        raise ValueError(f"checkpoint={path} is incomplete: its record has no {', '.join(missing)}")
    return checkpoint_record


@contextmanager
def _naming(path: Path) -> Generator[None]:
    """Turn whatever torch raises at a file that it cannot read into one line that names it."""
    try:
        yield
    except (KeyboardInterrupt, MemoryError):
        raise
    except UnsoundError as error:
        raise ValueError(f"checkpoint={path} {error}") from error
    except OSError as error:
        words = error.strerror or str(error)
        raise ValueError(f"checkpoint={path} cannot be read: {words}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint={path} was not written by atmossl, or by a version that is newer than "
            "this one: it holds objects other than tensors and plain values"
        ) from error
    except Exception as error:
        raise ValueError(
            f"checkpoint={path} is truncated or no torch file ({type(error).__name__})"
        ) from error


def _load(path: Path, *, mmap: bool = False) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _checked(path: Path, contents: Any) -> dict[str, Any]:
    if not isinstance(contents, dict) or not isinstance(contents.get("atmossl"), dict):
        raise ValueError(f"checkpoint={path} was not written by atmossl: it has no atmossl record")
    if "state_dict" not in contents:
        raise ValueError(f"checkpoint={path} is incomplete: it has no weights (state_dict)")
    try:
        return {**contents, "atmossl": migrated(contents["atmossl"])}
    except ValueError as error:
        raise ValueError(f"checkpoint={path} cannot be read: {error}") from error
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"checkpoint={path} is damaged: its record has an unknown form") from error


def _read_shards(path: Path) -> dict[str, Any]:
    # takes seconds to import, which files do not need
    from atmossl.shards import by_index, read_shards

    contents, tensors = read_shards(path)
    names = sorted(key for key in tensors if key.startswith("optimizer_"))
    states = [by_index(tensors.pop(name)) for name in names]
    return {**contents, **tensors, "optimizer_states": states}


def is_hub_folder(path: Path) -> bool:
    """Whether a folder has the form that `export hub=FOLDER` writes."""
    return path.is_dir() and ((path / WEIGHTS).exists() or (path / CONFIG).exists())


def downloaded(name: str) -> Path:
    """The folder of `hf://OWNER/NAME[@REVISION]` in the cache, fetched if it is not there. The last
    part of its path is the commit.

    Raises:
        ValueError: no such name, or neither a network nor a copy in the cache.
    """
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"checkpoint={name}: valid: hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"checkpoint={name} needs huggingface_hub, which is not installed; pip install "
            "'atmossl[hub]'"
        ) from error
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its attempts; we tell the end
    files = [WEIGHTS, CONFIG, CARD]
    try:
        return Path(snapshot_download(match[1], revision=match[2], allow_patterns=files))
    except Exception as error:  # of many kinds: the network's, the hub's and the disk's
        raise ValueError(
            f"checkpoint={name} could not be fetched, and the cache has no copy of it "
            f"({type(error).__name__}: {in_one_line(error)})"
        ) from error


def commit_of(folder: Path) -> str:
    """`@` and the commit of a folder in the hub's cache, else nothing."""
    return f"@{folder.name}" if folder.parent.name == "snapshots" else ""


def write_hub_folder(folder: Path, contents: dict[str, Any]) -> dict[str, str]:
    """Write weights and config of an exported checkpoint; returns the sha256 of both files."""
    folder.mkdir(parents=True)
    tensors: dict[str, Tensor] = {
        key.removeprefix(AVERAGED): value.contiguous()
        for key, value in contents["state_dict"].items()
        if key.startswith(AVERAGED)
    }
    checkpoint_record = _to_json(contents["atmossl"], tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    weights = _entry(folder / WEIGHTS)
    values = {
        "library": "atmossl",
        "format": HUB_FORMAT,
        "weights": weights,
        "record": checkpoint_record,
    }
    write_sealed(folder / CONFIG, values)
    # safetensors hides its file from others
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)
    return {WEIGHTS: weights["sha256"], CONFIG: _sha256(folder / CONFIG)}


def read_hub_folder(folder: Path) -> tuple[dict[str, Any], str]:
    """The contents of a checkpoint in a folder, and the digits that identify it: the first digits
    of the sha256 of `config.json`, which holds that of the weights.

    Raises:
        UnsoundError: a file is missing, damaged or of another version.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UnsoundError(f"is incomplete: its file {name} is missing")
    try:
        values = read_sealed(folder / CONFIG)
    except (ValueError, RecursionError) as error:
        raise UnsoundError(f"is damaged: {CONFIG} does not match its checksum") from error
    _check_hub_folder(folder, values)
    tensors = _hub_tensors(folder / WEIGHTS)
    weights = {f"{AVERAGED}{k}": v for k, v in tensors.items() if not k.startswith(_OF_RECORD)}
    try:
        checkpoint_record = _from_json(values["record"], tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UnsoundError(f"has a {CONFIG} of another form ({in_one_line(error)})") from error
    return {"state_dict": weights, "atmossl": checkpoint_record}, _sha256(folder / CONFIG)[:16]


def _check_hub_folder(folder: Path, values: dict[str, Any]) -> None:
    """Check the version of the form, and the size and checksum of the weights."""
    if values.get("library") != "atmossl" or "record" not in values:
        raise UnsoundError(f"was not written by atmossl: its {CONFIG} is another library's")
    if values.get("format") != HUB_FORMAT:
        raise UnsoundError(
            f"has form {values.get('format')}, which a newer atmossl wrote; this one reads "
            f"{HUB_FORMAT}"
        )
    file, about = folder / WEIGHTS, values.get("weights")
    expected = (about.get("bytes"), about.get("sha256")) if isinstance(about, dict) else ()
    if (file.stat().st_size, _sha256(file)) != expected:
        raise UnsoundError(f"is damaged: {WEIGHTS} does not match its checksum in {CONFIG}")


def _hub_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except Exception as error:  # its own kind, and those of what it trusts
        raise UnsoundError(
            f"is damaged: {WEIGHTS} is no such file ({in_one_line(error)})"
        ) from error


def _to_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Plain values as JSON, from which `_from_json` makes the same values again; tensors go into
    `tensors`."""
    if isinstance(value, Tensor):
        name = f"{_OF_RECORD}{sum(key.startswith(_OF_RECORD) for key in tensors)}"
        tensors[name] = value.contiguous()
        return {_TENSOR: name}
    if isinstance(value, tuple):
        return {_TUPLE: [_to_json(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_to_json(item, tensors) for item in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value) and not _KINDS & set(value):
            return {key: _to_json(item, tensors) for key, item in value.items()}
        pairs = [[_to_json(key, tensors), _to_json(item, tensors)] for key, item in value.items()]
        return {_ITEMS: pairs}
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: str(value)}  # JSON has no such numbers
    return value


def _from_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_from_json(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"__tensor__": name}:
            return tensors[name]
        case {"__tuple__": items}:
            return tuple(_from_json(item, tensors) for item in items)
        case {"__items__": pairs}:
            return {_from_json(k, tensors): _from_json(item, tensors) for k, item in pairs}
        case {"__float__": text}:
            return float(text)
    return {key: _from_json(item, tensors) for key, item in value.items()}


FORMAT = 4


def _with_kinds(checkpoint_record: dict[str, Any]) -> dict[str, Any]:
    """A record of format 1 in format 2. Format 1 knew one network and one objective, and did not
    name them."""
    objective = {
        "kind": "atmossl.objectives.masked.MaskedModelling",
        "provides": ["embed", "reconstruct"],
    }
    return {**checkpoint_record, "network": "multiformer", "objective": objective}


def _with_present_names(checkpoint_record: dict[str, Any]) -> dict[str, Any]:
    """A record of format 2 in format 3. Format 2 had other names for some keys of the
    configuration."""
    model = {key: checkpoint_record[key] for key in ("model",) if key in checkpoint_record}
    config = checkpoint_record.get("config", {})
    return {**checkpoint_record, **renamed(model), "config": renamed(config)}


def _with_named_sources(checkpoint_record: dict[str, Any]) -> dict[str, Any]:
    """A record of format 3 in format 4. Format 3 named no primary source: its streams had no
    `data`, or '', and its statistics held those of the other sources."""
    named = dict(checkpoint_record)  # a record may lack keys, which whoever needs them says
    if "streams" in checkpoint_record:
        streams = checkpoint_record["streams"]
        named["streams"] = [{**spec, "data": spec.get("data") or PRIMARY} for spec in streams]
    if "seen" in checkpoint_record:
        named["seen"] = {
            data or PRIMARY: values for data, values in checkpoint_record["seen"].items()
        }
    if "statistics" in checkpoint_record:
        statistics = checkpoint_record["statistics"]
        primary = {key: value for key, value in statistics.items() if key != "others"}
        named["statistics"] = {PRIMARY: primary, **statistics.get("others", {})}
    return named


_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: _with_kinds,
    2: _with_present_names,
    3: _with_named_sources,
}


def migrated(checkpoint_record: dict[str, Any]) -> dict[str, Any]:
    """The record in the present format.

    Raises:
        ValueError: a format of a later version than this.
    """
    version = checkpoint_record.get("format", 1)  # the first format did not say so
    if version not in (*_MIGRATIONS, FORMAT):
        raise ValueError(
            f"its format {version} is newer than this atmossl reads (up to {FORMAT}), or none; it "
            f"was written by atmossl {checkpoint_record.get('atmossl', 'of an unknown version')}"
        )
    for number in range(version, FORMAT):
        checkpoint_record = _MIGRATIONS[number](checkpoint_record)
    return {**checkpoint_record, "format": FORMAT}
