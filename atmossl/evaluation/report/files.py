"""Files that are either whole or absent, and never replaced by accident."""

import os
import tempfile
from pathlib import Path


def write_atomically(content: bytes, path: Path, *, overwrite: bool = False) -> Path:
    """Write to a neighbour and rename it, so that no reader sees half a file.

    Raises:
        FileExistsError: the path exists and `overwrite` is False.
    """
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)  # mkstemp hides its files from others
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
