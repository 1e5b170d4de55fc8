"""atmossl: self-supervised learning on the atmosphere, where a mask decides what is predicted.

The way of one sample, from a store to a written field (`tests/test_one_sample.py` runs it):

    open_split -> read_window -> make_view (tokenise, mask, corrupt) -> collate_views
    -> objective(model, batch) -> detokenise -> Normaliser.inverse -> dataset

A prediction goes it tile by tile, in `inference/`; a `Plan` says what, when, where, on which tiles:

    plan_prediction -> Plan.find -> WindowReader.read -> masked_view -> model
    -> detokenise -> Normaliser.inverse -> TileBlender (blends) -> Calibration (spread) -> write
"""

from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from atmossl.at_work import answer_from_the_start
from atmossl.home import ensure_home

answer_from_the_start()
ensure_home()

# Before all other libraries: ecCodes, which xarray loads to open a NetCDF file wherever cfgrib is
# installed, shows the whole process a PROJ of its own. A pyproj that comes after it is bound to
# that one, finds no database and frees memory twice at exit; one that comes before keeps its own.
with suppress(ModuleNotFoundError):  # comes with cartopy, for maps
    import pyproj  # noqa: F401

if TYPE_CHECKING:
    from atmossl.api import Model, distance, load, open_data

__all__ = ["Model", "__version__", "distance", "load", "open_data"]
__version__ = "0.8.0"


def __getattr__(name: str) -> Any:
    """The package's public functions, imported on first use. They need torch and xarray, and the
    command line should answer a typo before these are loaded."""
    if name in __all__:
        return getattr(import_module("atmossl.api"), name)
    raise AttributeError(f"module 'atmossl' has no attribute {name!r}")
