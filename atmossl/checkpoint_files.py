"""Files of checkpoints: written atomically, read as one file or as a folder of shards."""

import os
import pickle
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

METADATA = "meta.pt"  # Lightning's name for what is no tensor of model or optimiser
_PARTIAL = ".partial-"
_STEP = re.compile(r"step-(\d+)\.ckpt")


def partial_path(path: Path) -> Path:
    """Where a file or folder is written before it gets its name."""
    return path.with_name(f"{_PARTIAL}{path.name}")


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file or folder beside `path`, then give it its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    remove(partial)
    try:
        write(partial)
        publish(partial, path)
    except BaseException:
        with suppress(OSError):  # half a file would keep a full disk full
            remove(partial)
        raise


def save_contents(contents: Any, path: Path) -> None:
    """Write tensors and plain values as one file.

    Raises:
        OSError: in the system's words; torch says of a full disk only that a position is off.
    """
    try:
        torch.save(contents, path)
    except RuntimeError as error:
        with path.open("ab", buffering=0) as file:  # asks once more
            file.write(bytes(2**20))
        raise OSError(f"{path} could not be written: {error}") from error


def publish(partial: Path, path: Path) -> None:
    """Bring what was written to the disk, then rename it: `path` is old or new, never torn."""
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
        ValueError: truncated, no torch file, or not one of ours.
    """
    try:
        if path.is_dir():
            contents: Any = _read_shards(path)
        else:
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError, ValueError) as error:
        raise ValueError(
            f"checkpoint={path} is truncated or no torch file ({type(error).__name__})"
        ) from error
    if not isinstance(contents, dict) or "atmossl" not in contents:
        raise ValueError(f"checkpoint={path} was not written by atmossl: it has no atmossl record")
    return contents


def read_record(path: Path) -> dict[str, Any]:
    """The record alone of a checkpoint that can be read; its tensors stay on the disk."""
    file = path / METADATA if path.is_dir() else path
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)["atmossl"]


def _read_shards(path: Path) -> dict[str, Any]:
    from atmossl.shards import read_shards  # takes seconds to import, which files do not need

    contents, tensors = read_shards(path)
    names = sorted(key for key in tensors if key.startswith("optimizer_"))
    states = [by_index(tensors.pop(name)) for name in names]
    return {**contents, **tensors, "optimizer_states": states}


def by_index(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state by position of its parameters instead of by their names, as
    `torch.optim.Optimizer.load_state_dict` wants it."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    index = {name: position for position, name in enumerate(names)}
    groups = [
        {**group, "params": [index[name] for name in group["params"]]}
        for group in state["param_groups"]
    ]
    return {"state": {index[k]: v for k, v in state["state"].items()}, "param_groups": groups}


def by_name(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The inverse of `by_index`; `names`: of the parameters in the optimiser's order."""
    groups = [
        {**group, "params": [names[index] for index in group["params"]]}
        for group in state["param_groups"]
    ]
    return {"state": {names[k]: v for k, v in state["state"].items()}, "param_groups": groups}


def checkpoints_in(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, the newest step first, then the best one."""
    found = {int(match[1]): p for p in folder.glob("*.ckpt") if (match := _STEP.fullmatch(p.name))}
    best = folder / "best.ckpt"
    return [found[step] for step in sorted(found, reverse=True)] + [best] * best.exists()


def newest_readable(folder: Path) -> Path | None:
    """The newest checkpoint of a run that is neither torn nor foreign."""
    for path in checkpoints_in(folder):
        try:
            read_contents(path)
        except ValueError:
            continue
        return path
    return None
