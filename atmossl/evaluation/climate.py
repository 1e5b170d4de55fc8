"""The climate that scores refer to: means, quantiles and rain of the training record.

Training segments only, read in blocks of times, so that a score never sees the target's own date
and memory does not grow with the length of the record.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from atmossl.evaluation.baselines import Prepare, climatology, time_blocks
from atmossl.value_faults import listed

_QUANTILE_TIMES = 1500
_DRY_MM = 0.2
_MONTHS_OF_YEAR = 12
_TO_MM = {"m": 1000.0, "mm": 1.0, "kg m-2": 1.0, "kg m**-2": 1.0}


@dataclass(frozen=True)
class RainClimate:
    """How often each cell is dry, and what separates light from heavy rain there, for SEEPS.

    Attributes:
        dry: probability of at most 0.2 mm.
        heavy_mm: two thirds of the wet times have less, in mm.
        to_mm: factor from the variable's units.
    """

    dry: xr.DataArray
    heavy_mm: xr.DataArray
    to_mm: float


@dataclass(frozen=True)
class Climate:
    """Climatology of the training record.

    Attributes:
        mean: by calendar month (`baselines.climatology`).
        quantiles: at every cell, [quantile, ...]; from at most some 1500 evenly spaced times.
        rain: for each variable that is precipitation.
    """

    mean: xr.Dataset
    quantiles: xr.Dataset
    rain: dict[str, RainClimate]

    @classmethod
    def of(
        cls,
        segments: Sequence[xr.Dataset],
        *,
        quantiles: Sequence[float],
        prepare: Prepare = lambda block: block,
        mean: xr.Dataset | None = None,
    ) -> "Climate":
        """The climate of the training record. A mean that is not given is worked out, by month if
        the record covers every month, else over all times.

        What is read goes through `prepare` (such as regridding) before anything is worked out.
        """
        if mean is None:
            months = {int(m) for segment in segments for m in np.unique(segment["time"].dt.month)}
            mean = climatology(segments, monthly=len(months) == _MONTHS_OF_YEAR, prepare=prepare)
        names = [str(name) for name in mean.data_vars]
        limits, rain = {}, {}
        for name in names:  # one variable in memory at a time
            record = _record(segments, name, prepare)
            limits[name] = _quantiles(record, quantiles)
            if is_precipitation(name):
                rain[name] = _rain(record)
        return cls(mean=mean, quantiles=xr.Dataset(limits), rain=rain)


NO_CLIMATE = Climate(xr.Dataset(), xr.Dataset(), {})  # of no variable


def is_precipitation(variable: str) -> bool:
    """True for ERA5's and WeatherBench's names of accumulated precipitation."""
    return variable.startswith("total_precipitation")


def rain_factor(variable: str, units: object) -> float:
    """The factor from the units of precipitation to mm.

    Raises:
        ValueError: units that are not known.
    """
    factor = _TO_MM.get(str(units))
    if factor is None:
        raise ValueError(f"{variable}: units {units!r} of precipitation; valid: {listed(_TO_MM)}")
    return factor


def _record(segments: Sequence[xr.Dataset], name: str, prepare: Prepare) -> xr.DataArray:
    """Evenly spaced times of one variable, in memory."""
    total = sum(segment.sizes["time"] for segment in segments)
    every = -(-total // _QUANTILE_TIMES)
    chosen = [segment[[name]].isel(time=slice(None, None, every)) for segment in segments]
    parts = [prepare(block)[name] for record in chosen for block in time_blocks(record)]
    return xr.concat(parts, "time")


def _quantiles(record: xr.DataArray, quantiles: Sequence[float]) -> xr.DataArray:
    with warnings.catch_warnings():
        # cells that are never observed, land in a field of the sea, have no quantiles
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        return record.quantile(list(quantiles), "time", skipna=True).astype(np.float32)


def _rain(record: xr.DataArray) -> RainClimate:
    """The rain climate of a record. Sources: Rodwell et al. (2010), QJRMS 136, 1344-1363; dry as
    in the library `scores`."""
    to_mm = rain_factor(str(record.name), record.attrs.get("units"))
    millimetres = record * to_mm
    wet = millimetres.where(millimetres > _DRY_MM)
    dry = (millimetres <= _DRY_MM).where(millimetres.notnull()).mean("time")
    heavy = _quantiles(wet, [2.0 / 3.0]).isel(quantile=0, drop=True)  # none where it is always dry
    return RainClimate(dry, heavy.fillna(np.inf), to_mm)
