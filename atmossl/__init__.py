"""atmossl: self-supervised learning on the atmosphere, where a mask decides what is predicted.

The way of one sample, from a store to a written field (`tests/test_one_sample.py` runs it):

    open_split -> read_window -> make_view (tokenise, mask, corrupt) -> collate_views
    -> objective(model, batch) -> detokenise -> Normaliser.inverse -> dataset

A prediction goes it tile by tile, in `inference/`; a `Plan` says what, when, where, on which tiles:

    plan_prediction -> Plan.find -> WindowReader.read -> masked_view -> model
    -> detokenise -> Normaliser.inverse -> TileBlender (blends) -> Calibration (spread) -> write
"""

import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any


def _runs_as_command() -> bool:
    """Whether this process is the command `atmossl`, or `python -m atmossl`, which calls itself
    `-m` until the package is imported."""
    program, words = sys.argv[0] if sys.argv else "", sys.orig_argv
    as_module = program == "-m" and "atmossl" in words[words.index("-m") + 1 :][:1]
    return as_module or os.path.basename(program) == "atmossl"  # noqa: PTH119  # pathlib is slow


def _leave(number: int, frame: Any) -> None:
    """Answer Ctrl-C until `atmossl.at_work`, which takes some time to import, does."""
    del frame
    os.write(2, f"\natmossl: stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


_is_command = _runs_as_command()
if _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)

from atmossl.at_work import answer_signals  # noqa: E402
from atmossl.home import ensure_home  # noqa: E402

if _is_command:
    answer_signals()
ensure_home()

# Before all other libraries: ecCodes, which xarray loads to open a NetCDF file wherever cfgrib is
# installed, shows the whole process a PROJ of its own. A pyproj that comes after it is bound to
# that one, finds no database and frees memory twice at exit; one that comes before keeps its own.
with suppress(ModuleNotFoundError):  # comes with cartopy, for maps
    import pyproj  # noqa: F401

if TYPE_CHECKING:
    from atmossl.api import Model, distance, load, open_data

__all__ = ["Model", "__version__", "distance", "load", "open_data"]
__version__ = "0.9.0"


def __getattr__(name: str) -> Any:
    """The package's public functions, imported on first use. They need torch and xarray, and the
    command line should answer a typo before these are loaded."""
    if name in __all__:
        return getattr(import_module("atmossl.api"), name)
    raise AttributeError(f"module 'atmossl' has no attribute {name!r}")
