"""Packages that only some commands need, and how to install them.

Prediction needs the core alone. Training, reports and foreign formats need packages of an extra,
such as `pip install 'atmossl[train]'`. Modules import them as usual, so that an error comes where a
package is missing; here the error becomes one line with the command that mends it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

# name of the imported package -> extra of pyproject.toml that brings it
EXTRAS = {
    "lightning": "train",
    "tensorboard": "train",
    "wandb": "train",
    "mlflow": "mlflow",
    "cartopy": "report",
    "ducc0": "report",
    "jinja2": "report",
    "matplotlib": "report",
    "scores": "report",
    "sklearn": "probe",
    "cfgrib": "grib",
    "eccodes": "grib",
    "dask_jobqueue": "ingest",
    "distributed": "ingest",
    "huggingface_hub": "hub",
    "icechunk": "stores",
    "kerchunk": "stores",
    "virtualizarr": "stores",
    "aiohttp": "cloud",
    "gcsfs": "cloud",
    "s3fs": "cloud",
}


def missing_extra(error: BaseException | None) -> str | None:
    """The package to install, if an error or one of its causes is a missing package of an extra.

    Some libraries only say in words what they lack, as fsspec does of the one for a store's URL.
    """
    while error is not None:
        if isinstance(error, ImportError):
            words = (error.name or str(error)).replace(".", " ").split()
            package = next((word for word in words if word in EXTRAS), None)
            if package is not None:
                return (
                    f"needs the package {package}, which is not installed; "
                    f"pip install 'atmossl[{EXTRAS[package]}]'"
                )
        error = error.__cause__ or error.__context__
    return None


# what Hydra calls the parts of a plugin that it does not find
_PLUGINS = ("hydra/launcher/submitit", "hydra/sweeper/optuna")


def missing_plugin(text: str) -> str | None:
    """The package to install, if Hydra says in words that it finds no launcher or sweeper."""
    if "Could not find" in text and any(part in text for part in _PLUGINS):
        return "needs plugins of Hydra that are not installed; pip install 'atmossl[sweep]'"
    return None


@contextmanager
def naming_extras() -> Iterator[None]:
    """A missing package of an extra is a ValueError in one line."""
    try:
        yield
    except ImportError as error:
        text = missing_extra(error)
        if text is None:
            raise
        raise ValueError(text) from error
