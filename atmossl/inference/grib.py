"""Writes predictions as GRIB2, through ecCodes: one message per time, lead time, member and
level."""

from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import xarray as xr

from atmossl.inference.plan import Plan
from atmossl.value_faults import listed

_SHORT_NAMES = {
    "temperature": "t",
    "u_component_of_wind": "u",
    "v_component_of_wind": "v",
    "geopotential": "z",
    "specific_humidity": "q",
    "vertical_velocity": "w",
    "vorticity": "vo",
    "divergence": "d",
    "2m_temperature": "2t",
    "mean_sea_level_pressure": "msl",
    "10m_u_component_of_wind": "10u",
    "10m_v_component_of_wind": "10v",
}
_BITS = 24  # of every value: the range over 2**24, about what float32 resolves
_MISSING = 1e20  # stands for missing values, of which a bitmap tells
_NO_CENTRE, _NO_PROCESS = 65535, 255  # missing: ecCodes' samples would name ECMWF and its models
_MINUTE = np.timedelta64(1, "m")


def eccodes_module() -> ModuleType:
    """The Python package of ecCodes; ValueError if it is not installed."""
    try:
        import eccodes
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"output: .grib2 needs ecCodes ({error}); pip install 'atmossl[grib]', "
            "or write .zarr or .nc"
        ) from error
    return eccodes


def check_grib(plan: Plan) -> None:
    """Raise ValueError, before any work, for a prediction that GRIB2 cannot hold or ecCodes does
    not know."""
    if not plan.segment.calendar.plain:
        name = plan.segment.calendar.name
        raise ValueError(f"output: .grib2 has no calendar {name}; write .zarr or .nc")
    specs = [spec for spec in plan.trained.own_specs if spec.role == "predict"]
    unknown = sorted({n for spec in specs for n in spec.variables} - set(_SHORT_NAMES))
    if unknown:
        raise ValueError(
            f"output: no GRIB2 name for {listed(unknown)}; known: {listed(sorted(_SHORT_NAMES))}"
        )
    if np.ptp(np.diff(plan.grid.latitude)) > 1e-3:
        raise ValueError("output: .grib2 of latitudes that are not evenly spaced; write .zarr")
    if min(plan.steps.offsets) < 0:
        raise ValueError("output: .grib2 has no lead times below 0; write .zarr or .nc")


def write_grib(store: xr.Dataset, path: Path) -> None:
    """Write all fields of a prediction, of either layout, one after another."""
    eccodes = eccodes_module()
    names = {"number": "member", "prediction_timedelta": "lead_time"}
    store = store.rename({old: new for old, new in names.items() if old in store.dims})
    if "lead_time" in store.dims and "time" in store.dims:
        store = store.rename(time="init_time")
    reference = "init_time" if "init_time" in store.dims else "time"
    message = _sample(eccodes, store)
    try:
        with path.open("wb") as file:
            for case in range(store.sizes[reference]):
                for name in map(str, store.data_vars):
                    array = store[name].isel({reference: case}).load()
                    _write_case(eccodes, message, file, array)
    finally:
        eccodes.codes_release(message)


def _sample(eccodes: ModuleType, store: xr.Dataset) -> Any:
    """A message with the headers that all messages have in common; rows run from north to south."""
    lat, lon = store["latitude"].values, store["longitude"].values % 360.0
    keys = {
        "centre": _NO_CENTRE,
        "generatingProcessIdentifier": _NO_PROCESS,
        "Ni": len(lon),
        "Nj": len(lat),
        "latitudeOfFirstGridPointInDegrees": lat.max(),
        "latitudeOfLastGridPointInDegrees": lat.min(),
        "longitudeOfFirstGridPointInDegrees": lon[0],
        "longitudeOfLastGridPointInDegrees": lon[-1],
        "iDirectionIncrementInDegrees": abs(np.diff(store["longitude"].values).mean()),
        "jDirectionIncrementInDegrees": abs(np.diff(lat).mean()),
        "bitsPerValue": _BITS,
        "missingValue": _MISSING,
        "productDefinitionTemplateNumber": 1,  # a member of an ensemble at a point in time
        "numberOfForecastsInEnsemble": store.sizes["member"],
        "typeOfGeneratingProcess": 4,  # ensemble forecast
        "indicatorOfUnitOfTimeRange": 0,  # minutes
    }
    message = eccodes.codes_grib_new_from_samples("regular_ll_pl_grib2")
    for key, value in keys.items():
        eccodes.codes_set(message, key, int(value) if isinstance(value, int) else float(value))
    return message


def _write_case(eccodes: ModuleType, message: Any, file: BinaryIO, array: xr.DataArray) -> None:
    """Write all lead times, levels and members of one variable at one reference time."""
    if "lead_time" not in array.dims:
        array = array.expand_dims(lead_time=[np.timedelta64(0, "ns")])
    surface = "level" not in array.dims
    array = array.expand_dims(level=[0]) if surface else array
    reference = array["init_time" if "init_time" in array.coords else "time"].values
    stamp = str(np.datetime_as_string(reference, unit="m"))
    eccodes.codes_set(message, "dataDate", int(stamp[:10].replace("-", "")))
    eccodes.codes_set(message, "dataTime", int(stamp[11:13] + stamp[14:16]))
    for lead in array["lead_time"].values:
        for level in array["level"].values:
            if not surface:
                is_number = array["level"].attrs["standard_name"] == "model_level_number"
                kind = "hybrid" if is_number else "isobaricInhPa"
                eccodes.codes_set(message, "typeOfLevel", kind)
                eccodes.codes_set(message, "level", int(level))
            eccodes.codes_set(message, "shortName", _SHORT_NAMES[str(array.name)])
            eccodes.codes_set(message, "forecastTime", int(lead / _MINUTE))
            for member in array["member"].values:
                field = array.sel(lead_time=lead, level=level, member=member)
                field = field.transpose("latitude", "longitude").sortby("latitude", ascending=False)
                values = field.values.astype(np.float64).ravel()
                lacks = np.isnan(values)
                if lacks.all():  # a level that only other variables have, or no value at all
                    continue
                eccodes.codes_set(message, "perturbationNumber", int(member))
                eccodes.codes_set(message, "bitmapPresent", int(lacks.any()))
                eccodes.codes_set_values(message, np.where(lacks, _MISSING, values))
                eccodes.codes_write(message, file)
