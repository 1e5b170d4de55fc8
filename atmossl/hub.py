"""Checkpoints as folders for a model hub: what they hold, and how they come from there.

A folder holds three files. `model.safetensors` has the averaged weights, and any tensors of the
record. `config.json` has the version of this form, the size and the sha256 of the weights, the
checkpoint's record (`atmossl.checkpoint_files`) and a sha256 of itself. `README.md` is the model
card, which anyone may edit: nothing reads it. None of the three can hold code.

`hf://OWNER/NAME`, with `@REVISION` for a branch, tag or commit, names a folder on a hub.
`huggingface_hub` fetches and caches it, and follows its own settings (`HF_HUB_OFFLINE`, `HF_HOME`,
`HF_ENDPOINT`); it comes with `pip install 'atmossl[hub]'`. The checkpoints of the package are such
folders, too.
"""

import hashlib
import logging
import math
import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from atmossl.sealed import UnsoundError, in_one_line, read_sealed, write_sealed

SCHEME = "hf://"
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
HUB_FORMAT = 1
AVERAGED = "ema.module."  # begins the names of averaged weights in a checkpoint
_OF_RECORD = "record:"  # begins the names of tensors that belong to the record
_NAME = re.compile(r"hf://([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
_TUPLE, _ITEMS, _TENSOR, _FLOAT = "__tuple__", "__items__", "__tensor__", "__float__"
_KINDS = {_TUPLE, _ITEMS, _TENSOR, _FLOAT}


def downloaded(name: str) -> Path:
    """The folder of `hf://OWNER/NAME[@REVISION]` in the cache, fetched if it is not there. The last
    part of its path is the commit.

    Raises:
        ValueError: no such name, or neither a network nor a copy in the cache.
    """
    match = _NAME.fullmatch(name)
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


def write_folder(folder: Path, contents: dict[str, Any]) -> dict[str, str]:
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


def read_folder(folder: Path) -> tuple[dict[str, Any], str]:
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
    _check(folder, values)
    tensors = _tensors(folder / WEIGHTS)
    weights = {f"{AVERAGED}{k}": v for k, v in tensors.items() if not k.startswith(_OF_RECORD)}
    try:
        checkpoint_record = _from_json(values["record"], tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UnsoundError(f"has a {CONFIG} of another form ({in_one_line(error)})") from error
    return {"state_dict": weights, "atmossl": checkpoint_record}, _sha256(folder / CONFIG)[:16]


def _check(folder: Path, values: dict[str, Any]) -> None:
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


def _tensors(file: Path) -> dict[str, Tensor]:
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
