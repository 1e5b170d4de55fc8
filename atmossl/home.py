"""A home folder and a user's name for processes that have neither, as in containers that run under
a number of which the system knows no user. Libraries ask for both when they are imported."""

import getpass
import os
import tempfile
from pathlib import Path


def ensure_home() -> None:
    """Set the home folder where the system knows none, to `ATMOSSL_CACHE` or a folder for
    temporary files; and the user's name where it knows none, to the user's number."""
    try:
        Path.home()
    except RuntimeError:
        temporary = Path(tempfile.gettempdir()) / f"atmossl-{os.getuid()}"
        os.environ["HOME"] = os.environ.get("ATMOSSL_CACHE") or str(temporary)
    try:
        getpass.getuser()
    except (KeyError, OSError):  # which of them depends on the version of Python
        os.environ["USER"] = str(os.getuid())
