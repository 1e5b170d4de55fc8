"""atmossl: self-supervised learning on the atmosphere, where a mask decides what is predicted.

The way of one sample, from a store to a written field (`tests/test_one_sample.py` runs it):

    open_split -> read_window -> make_view (tokenise, mask, corrupt) -> collate_views
    -> objective(model, batch) -> detokenise -> Normaliser.inverse -> dataset

A prediction goes it tile by tile, in `inference/` (`Predictor` holds the steps together):

    Predictor.find -> WindowReader.read -> masked_view -> model -> detokenise
    -> Normaliser.inverse -> TileBlender (blends) -> Calibration (spread) -> write
"""

from atmossl.home import ensure_home
from atmossl.stops import answer_from_the_start

answer_from_the_start()
ensure_home()

# Before all other libraries: ecCodes, which xarray loads to open a NetCDF file wherever cfgrib is
# installed, shows the whole process a PROJ of its own. A pyproj that comes after it is bound to
# that one, finds no database and frees memory twice at exit; one that comes before keeps its own.
import pyproj  # noqa: E402, F401

__version__ = "0.2.0"


def load(checkpoint="default", *, device=None):
    """A checkpoint ready to predict: `atmossl.load().predict(task, dataset)`; see `api.load`."""
    return _api().load(checkpoint, device=device)


def open_data(name="sample", split="test", catalog=None, *, segment=None):
    """A split of a catalog entry as an xarray dataset; see `api.open_data`."""
    return _api().open_data(name, split, catalog, segment=segment)


def _api():
    # by name, so that the rooms that read `__version__` here do not come to import the API
    from importlib import import_module

    return import_module("atmossl.api")
