"""A home folder and a user's name for processes that have neither, as in containers that run under
a number of which the system knows no user. Libraries ask for both when they are imported."""

import getpass
import os
import tempfile
from pathlib import Path


def ensure_home() -> None:
    """Where the system knows no home, it is `ATMOSSL_CACHE`, or else a folder for temporary files;
    where it knows no name, that is the number of the user."""
    try:
        Path.home()
    except RuntimeError:
        temporary = Path(tempfile.gettempdir()) / f"atmossl-{os.getuid()}"
        os.environ["HOME"] = os.environ.get("ATMOSSL_CACHE") or str(temporary)
    try:
        getpass.getuser()
    except (KeyError, OSError):  # which of them depends on the version of Python
        os.environ["USER"] = str(os.getuid())
