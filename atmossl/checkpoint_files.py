"""Files of checkpoints: written atomically, read as one file, as a folder of shards or as a folder
of a model hub (`atmossl.hub`), and brought into the present format.

Every read compares the checksums (`atmossl.sealed`) first, and says in one line what is wrong
with a file that is damaged, incomplete or not ours, whatever torch makes of it.

A checkpoint record says what a checkpoint is: streams, statistics, window, the network and the
objective it was trained by. Its `format` is a whole number. Whoever changes what a record means
adds one to `FORMAT`, a function to `_MIGRATIONS`, and a tiny file of the old format to
`tests/checkpoints/`.
"""

import os
import pickle
import re
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from atmossl.batch import PRIMARY
from atmossl.hub import CONFIG, WEIGHTS, read_folder
from atmossl.renamed_keys import renamed
from atmossl.sealed import MANIFEST, METADATA, UnsoundError, seal_file, verified_digest

_PARTIAL = ".partial-"
BEST = "best.ckpt"
_STEP = re.compile(r"step-(\d+)\.ckpt")
LEAVING = ".leaving-"  # and a step: checkpoints of later steps are being moved into this folder
# What training cannot go on without, beside the weights.
_TO_GO_ON = ("optimizer_states", "lr_schedulers", "loops", "global_step")
_IN_RECORD = ("step", "rng", "streams", "model", "statistics")


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


def write_output(contents: Any, path: Path, key: str = "output") -> None:
    """Write the checkpoint that a command's key names, atomically.

    Raises:
        OSError: names key and file beside the system's words.
    """
    try:
        write_atomically(path, lambda partial: save_contents(contents, partial))
    except OSError as error:
        words = error.strerror or str(error)
        raise OSError(f"{key}={path} could not be written: {words}") from error


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


def link_atomically(link: Path, target: str) -> None:
    """Point a symbolic link to a neighbour, by one rename."""
    partial = partial_path(link)
    remove(partial)
    partial.symlink_to(target)
    partial.replace(link)


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
            contents, digest = read_folder(path)
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
            contents, _ = read_folder(path)
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
    from atmossl.shards import read_shards  # takes seconds to import, which files do not need

    contents, tensors = read_shards(path)
    names = sorted(key for key in tensors if key.startswith("optimizer_"))
    states = [by_index(tensors.pop(name)) for name in names]
    return {**contents, **tensors, "optimizer_states": states}


def by_index(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimiser by the position of its parameters instead of their names, as
    `torch.optim.Optimizer.load_state_dict` wants it."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    index = {name: position for position, name in enumerate(names)}
    groups = [
        {**group, "params": [index[name] for name in group["params"]]}
        for group in state["param_groups"]
    ]
    return {"state": {index[k]: v for k, v in state["state"].items()}, "param_groups": groups}


def by_name(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The state of an optimiser by names of parameters; the inverse of `by_index`. names: in the
    optimiser's order."""
    groups = [
        {**group, "params": [names[index] for index in group["params"]]}
        for group in state["param_groups"]
    ]
    return {"state": {names[k]: v for k, v in state["state"].items()}, "param_groups": groups}


def step_of(name: str) -> int | None:
    """The number N of a file `step-N.ckpt`; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def steps_in(folder: Path) -> dict[int, Path]:
    """The checkpoints `step-N.ckpt` of a run by their step, without those that are just being
    moved aside."""
    limit = min((int(mark.name.removeprefix(LEAVING)) for mark in marks_in(folder)), default=None)
    steps = {path: step_of(path.name) for path in folder.glob("*.ckpt")}
    return {
        step: path
        for path, step in steps.items()
        if step is not None and (limit is None or step <= limit)
    }


def marks_in(folder: Path) -> list[Path]:
    """The folders `.leaving-N` of a killed run, which was moving later checkpoints there."""
    return sorted(folder.glob(f"{LEAVING}*"))


def checkpoints_in(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, the newest step first, then the best one."""
    steps, best = steps_in(folder), folder / BEST
    best_counts = best.exists() and not marks_in(folder)
    return [steps[step] for step in sorted(steps, reverse=True)] + [best] * best_counts


def is_hub_folder(path: Path) -> bool:
    """Whether a folder has the form that `export hub=FOLDER` writes."""
    return path.is_dir() and ((path / WEIGHTS).exists() or (path / CONFIG).exists())


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
