"""Files that appear under their name when they are whole, and the room that they need on a disk."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_PARTIAL = ".partial-"


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
