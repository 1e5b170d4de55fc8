"""Files of checkpoints: written atomically, read as one file, as a folder of shards or as a folder
of a model hub, and brought into the present format.

Every read compares the checksums (`atmossl.sealed`) first, and says in one line what is wrong
with a file that is damaged, incomplete or not ours, whatever torch makes of it.

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
import logging
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atmossl.batch import PRIMARY
from atmossl.renamed_keys import renamed
from atmossl.sealed import (
    MANIFEST,
    METADATA,
    UnsoundError,
    in_one_line,
    read_sealed,
    seal_file,
    verified_digest,
    write_sealed,
)

_PARTIAL = ".partial-"
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


def partial_path(path: Path) -> Path:
    """The path under which a file or folder is written before it gets its name."""
    return path.with_name(f"{_PARTIAL}{path.name}")


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file or folder beside `path`, then give it its name.

    Raises:
        OSError: names `path`, also where the system does not, as of a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    remove(partial)
    try:
        write(partial)
        publish(partial, path)
    except BaseException as error:
        with suppress(OSError):  # half a file would keep a full disk full
            remove(partial)
        if isinstance(error, OSError) and error.strerror and error.filename is None:
            error.filename = str(path)
        raise


def save_contents(contents: Any, path: Path) -> None:
    """Write tensors and plain values as one file that carries its checksum.

    Raises:
        OSError: in the system's words; torch says of a full disk only that a position is off.
    """
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


def check_room(path: Path, num_bytes: int, key: str = "output") -> None:
    """Check that a file of `num_bytes` bytes can be written, before the work that fills it.

    Raises:
        ValueError: names key and file beside the system's words.
    """
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(b"0")
            if hasattr(os, "posix_fallocate"):  # not everywhere
                os.posix_fallocate(file.fileno(), 0, max(1, num_bytes))
    except OSError as error:
        words = error.strerror or str(error)
        raise ValueError(f"{key}={path} cannot be written: {words}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def size_on_disk(path: Path) -> int:
    """The bytes of a file, or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def publish(partial: Path, path: Path) -> None:
    """Flush what was written to the disk, then rename it: `path` is old or new, never torn."""
    inside = [file for file in partial.rglob("*") if file.is_file()] if partial.is_dir() else []
    for written in (*inside, partial):
        _sync_to_disk(written)
    if path.is_dir() and not path.is_symlink():  # a rename replaces no full folder
        remove(path)
    partial.replace(path)
    _sync_to_disk(path.parent)


def _sync_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
    about = {"bytes": (folder / WEIGHTS).stat().st_size, "sha256": _sha256(folder / WEIGHTS)}
    values = {
        "library": "atmossl",
        "format": HUB_FORMAT,
        "weights": about,
        "record": checkpoint_record,
    }
    write_sealed(folder / CONFIG, values)
    # safetensors hides its file from others
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)
    return {WEIGHTS: about["sha256"], CONFIG: _sha256(folder / CONFIG)}


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


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


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
        primary = {
            key: value for key, value in checkpoint_record["statistics"].items() if key != "others"
        }
        named["statistics"] = {
            PRIMARY: primary,
            **checkpoint_record["statistics"].get("others", {}),
        }
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
