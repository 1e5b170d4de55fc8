"""Compares what a file says of its variables and coordinates with what these are taken for.

A catalog, a mapping of names or a usual short name says that `z` is geopotential, that `level` is
pressure in hPa, that `lat` is a geographic latitude and that `time` is the date at which a field is
valid. The attributes and scalar coordinates of the file may say otherwise: geopotential *height*,
model levels, a rotated pole, the start of a forecast. `check_statements` compares all of them. It
is called for every variable by every way in: opening by catalog, datasets from Python,
`atmossl data ingest`, `atmossl data inspect`, and references of `atmossl evaluate`. A file that
says nothing is taken at its word.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from atmossl.data.variables import SHORT_NAMES, VARIABLES
from atmossl.geometry import TOLERANCE_DEG
from atmossl.value_faults import listed

HPA_PER_UNIT = {
    **dict.fromkeys(("hpa", "mbar", "mb", "millibar", "millibars", "hectopascal"), 1.0),
    **dict.fromkeys(("hectopascals", "hpascal"), 1.0),
    **dict.fromkeys(("pa", "pascal", "pascals", "n m-2"), 0.01),
    **dict.fromkeys(("kpa", "kilopascal"), 10.0),
    **dict.fromkeys(("bar", "bars"), 1000.0),
}
LEAD_NAMES = ("step", "lead_time", "leadtime", "lead", "forecast_period", "prediction_timedelta")
REGRID = (
    "Only geographic latitude-longitude grids are read; regrid it first, with cdo or earthkit for "
    "example"
)
FROM_HEIGHT = "geopotential height times 9.80665 m s-2"
_G = 9.80665  # m s-2, the standard value that defines geopotential height
_METRES = {"gpm": 1.0, "m": 1.0, "meter": 1.0, "meters": 1.0, "metre": 1.0, "metres": 1.0}
_METRES |= {"gpdm": 10.0, "dagpm": 10.0, "dam": 10.0, "gpkm": 1000.0, "km": 1000.0}
_NOTHING = ("", "unknown", "none", "-", "~", "n/a", "nan", "undefined")

_ALSO_CALLED: dict[str, tuple[str, ...]] = {
    "temperature": ("temperature",),
    "2m_temperature": ("temperature",),
    "geopotential_at_surface": ("geopotential",),
    "vertical_velocity": ("vertical_air_velocity_expressed_as_tendency_of_pressure",),
    "mean_sea_level_pressure": ("air_pressure_at_sea_level",),
    "sea_surface_temperature": (
        "sea_surface_foundation_temperature",
        "sea_surface_skin_temperature",
        "sea_surface_subskin_temperature",
    ),
    "total_precipitation": ("precipitation_amount",),
    "land_sea_mask": ("land_binary_mask",),
    "toa_incident_solar_radiation": ("toa_incoming_shortwave_flux",),
}
_U_LIKE = r"\bu\b|\bu[-_ ]?(wind|comp|vel)|zonal|eastward"
_V_LIKE = r"\bv\b|\bv[-_ ]?(wind|comp|vel)|meridional|northward"
_NO_COMPONENT = (
    r"|westward|southward|wind[-_ ]*(from )?direction|direction of wind|gust|stress|flux|transport|"
    r"tendency|^(?!.*(\bu\b|\bv\b|zonal|meridional|eastward|northward)).*\bspeed"
)
_NO_TEMPERATURE = (
    r"dew|potential|virtual|wet[- ]?bulb|brightness|skin|soil|sea[- ](surface|water)|equivalent|"
    r"apparent|tendency|advection|maximum|minimum|\bmax\b|\bmin\b"
)
_ANY_OTHER = (
    r"anomal|standard deviation|variance|\bspread\b|percentile|quantile|standard error|increment|"
    r"\bbias\b(?![- ]*(correct|adjust))"
)
# Along the lines of the grid: along latitudes only where a grid mapping says that it is geographic.
_ALONG_GRID = {"x_wind": "u_component_of_wind", "y_wind": "v_component_of_wind"}
# Words in a long name that say that a variable is another quantity.
_OTHER_QUANTITY: dict[str, str] = {
    "temperature": _NO_TEMPERATURE,
    "2m_temperature": _NO_TEMPERATURE,
    "u_component_of_wind": _V_LIKE + _NO_COMPONENT,
    "10m_u_component_of_wind": _V_LIKE + _NO_COMPONENT,
    "v_component_of_wind": _U_LIKE + _NO_COMPONENT,
    "10m_v_component_of_wind": _U_LIKE + _NO_COMPONENT,
    "geopotential": r"height|thickness|altitude|elevation",
    "geopotential_at_surface": r"geopotential[-_ ]?height|altitude|elevation",
    "specific_humidity": r"relative|mixing ratio|absolute|dew|saturation|vapou?r pressure",
    "vertical_velocity": r"geometric",
    "vorticity": r"absolute|potential|divergence",
    "divergence": r"vorticity|moisture|flux",
    "mean_sea_level_pressure": r"^(?!.*sea).*surface|tendency",
    "surface_pressure": r"sea[- ]level|\blog|\bln\b|tendency",
    "sea_ice_cover": r"thickness|volume|velocity|drift",
    "specific_cloud_liquid_water_content": r"\bice\b|rain|snow|column",
    "specific_cloud_ice_water_content": r"\bliquid\b|rain|snow|column",
    "total_precipitation": (
        r"\brate\b|flux|^(?!.*(total|convective.*large|large.*convective)).*"
        r"(convective|large[- ]scale|stratiform|snow)"
    ),
    "toa_incident_solar_radiation": r"\bnet\b|outgoing|upward|reflected",
}
_UPPER_AIR = (
    "temperature", "u_component_of_wind", "v_component_of_wind", "geopotential",
    "specific_humidity", "vertical_velocity", "vorticity", "divergence",
)  # fmt: skip
_SURFACES = (
    "height", "heightAboveGround", "height_above_ground", "heightAboveSea", "altitude", "depth",
    "surface", "hybrid", "theta", "potentialVorticity", "depthBelowLandLayer", "tropopause",
    "meanSea", "entireAtmosphere", "maxWind",
)  # fmt: skip
# Scalar coordinates in which the files of one record may differ.
_MAY_DIFFER = (*LEAD_NAMES, "time", "valid_time", "level", "isobaricInhPa", "isobaricInPa",
               "pressure_level", "plev", "expver", "spatial_ref", "latitude", "longitude", "lat",
               "lon")  # fmt: skip
_HEIGHTS_M = {"2m_": (1.25, 2.5), "10m_": (9.0, 11.0)}  # 1.5 m is the screen of some models
_SHORT_TOO = {("z", "geopotential_at_surface")}
_NAME_ADVICE = (
    "Name the variable for what it holds, or choose another; if the attribute is wrong, correct it "
    "in the file"
)
_HEIGHT_ADVICE = (
    "Geopotential is the height times 9.80665 m s-2: `atmossl data ingest` multiplies where the "
    "units are m or gpm"
)
_NO_METHODS = r"standard_deviation|variance|range|over years"
_EXTREMES = r"maximum|minimum"
_NO_PRESSURE = re.compile(
    r"hybrid|sigma|\beta\b|model[-_ ]?(level|layer)|height|altitude|depth|theta|isentropic|"
    r"potential[-_ ]temperature|elevation|soil|ocean|geometric|\blayer",
    re.I,
)
_HYBRID = re.compile(r"hybrid|sigma|\beta\b|model[-_ ]?(level|layer)", re.I)
_START = re.compile(
    r"\b(init(ial(i[sz]ation)?)?|reference|base|run|start)[-_ ]*(time|date)|start of .*forecast|"
    r"(time|date) of .*init",
    re.I,
)


def check_statements(
    variable: str,
    array: xr.DataArray,
    whole: xr.Dataset,
    where: str,
    *,
    pressure_levels: bool = True,
) -> None:
    """Check that a variable with canonical dimensions, and all its coordinates, are what they are
    taken for, as far as the file says.

    whole: all that the file holds, under its own names. pressure_levels: whether levels are taken
        for pressures, or for numbers of model levels.

    Raises:
        ValueError: names the file, what contradicts what, and what to do.
    """
    conflict = array.encoding.get("conflict")
    if conflict:
        raise ValueError(f"{where}: {conflict}")
    _check_grid_mapping(variable, array, whole, where)
    _check_quantity(variable, array, where)
    for axis, degrees in (("latitude", "north"), ("longitude", "east")):
        if axis in array.coords:
            _check_degrees(axis, degrees, array, where)
    if "level" in array.dims:
        if pressure_levels:
            _check_level(variable, array["level"], whole, where)
        else:
            _check_model_level(variable, array["level"], where)
    if "time" in array.dims:
        _check_valid_time(variable, array, where)


def says(attributes: Mapping[Any, Any], key: str) -> str:
    """An attribute as text, empty if there is none."""
    text = str(attributes.get(key, "")).strip()
    return "" if text.lower() in _NOTHING else text


def _check_quantity(variable: str, array: xr.DataArray, where: str) -> None:
    """Check standard name, long name, short name, cell methods and height of a known variable."""
    entry = VARIABLES.get(variable)
    if entry is None:
        return
    standard = says(array.attrs, "standard_name")
    valid = (entry.standard_name, *_ALSO_CALLED.get(variable, ()), variable)
    if "grid_mapping" in {**array.attrs, **array.encoding}:  # checked to be geographic
        valid += tuple(x for x, along in _ALONG_GRID.items() if variable.endswith(along))
    if standard and standard.lower().replace(" ", "_") not in valid:
        raise ValueError(
            f"{where}: {variable} has standard_name {standard!r}; valid: "
            f"{listed(sorted(set(valid)))}. "
            + (_HEIGHT_ADVICE if is_height(variable, array) else _NAME_ADVICE)
        )
    long_name = says(array.attrs, "long_name")
    other = f"{_OTHER_QUANTITY.get(variable, 'a^')}|{_ANY_OTHER}"
    if match := re.search(other, long_name, re.I):
        raise ValueError(
            f"{where}: {variable} has long_name {long_name!r}, of which {match.group(0)!r} says "
            "that it is another quantity. "
            + (_HEIGHT_ADVICE if is_height(variable, array) else _NAME_ADVICE)
        )
    short = says(array.attrs, "GRIB_shortName")
    if SHORT_NAMES.get(short, variable) != variable and (short, variable) not in _SHORT_TOO:
        raise ValueError(
            f"{where}: {variable} comes from GRIB messages of {short!r}, which are "
            f"{SHORT_NAMES[short]}. {_NAME_ADVICE}"
        )
    _check_methods(variable, array, where)
    _check_height(variable, array, where)


def is_height(variable: str, array: xr.DataArray) -> bool:
    """Whether the field of a geopotential is said to be a geopotential height."""
    names = [says(array.attrs, key) for key in ("standard_name", "long_name")]
    units = says(array.attrs, "units").lower()
    said = any(re.search(r"geopotential[-_ ]?height", name, re.I) for name in names)
    return variable.startswith("geopotential") and (said or "gp" in units)


def height_factor(variable: str, array: xr.DataArray) -> float | None:
    """The factor from a geopotential height to geopotential, m2 s-2; None if the variable is no
    height, or its units are not certain."""
    metres = _METRES.get(says(array.attrs, "units").lower())
    return metres * _G if metres is not None and is_height(variable, array) else None


def as_geopotential(variable: str, height: xr.DataArray, factor: float) -> xr.DataArray:
    """The geopotential of a geopotential height, with the attributes of a geopotential."""
    geopotential = VARIABLES[variable]
    attributes = height.attrs | {
        "standard_name": geopotential.standard_name,
        "long_name": geopotential.long_name,
        "units": geopotential.units,
        "comment": FROM_HEIGHT,
    }
    return (height.astype(np.float64) * factor).assign_attrs(attributes)


def _methods(array: xr.DataArray) -> str:
    """The cell methods of a variable, without comments in brackets."""
    return " ".join(re.sub(r"\(.*?\)", "", says(array.attrs, "cell_methods")).split())


def _check_methods(variable: str, array: xr.DataArray, where: str) -> None:
    methods = _methods(array)
    sums = "" if variable in ("total_precipitation", "toa_incident_solar_radiation") else r"|\bsum"
    match = re.search(f"{_NO_METHODS}|{_EXTREMES}{sums}", methods)
    if match:
        raise ValueError(
            f"{where}: {variable} has cell_methods {methods!r}, so its values are a "
            f"{match.group(0)}; needed: values at the dates, or means. {_NAME_ADVICE}"
        )


def is_mean(array: xr.DataArray) -> bool:
    """Whether the file says that values are means over time instead of values at their dates."""
    return bool(re.search(r"\btime\b[^:]*:\s*(\w+:\s*)*mean", _methods(array)))


def _check_height(variable: str, array: xr.DataArray, where: str) -> None:
    """Check the height in a variable's name against its scalar coordinate, and that upper-air
    fields do not lie on another kind of surface."""
    scalars = scalar_coordinates(array)
    for prefix, (low, high) in _HEIGHTS_M.items():
        for name in ("height", "heightAboveGround", "height_above_ground"):
            if variable.startswith(prefix) and name in scalars:
                height = scalars[name]
                if isinstance(height, int | float) and not low <= height <= high:
                    raise ValueError(
                        f"{where}: {variable} lies at {name}={height:g} m. {_NAME_ADVICE}"
                    )
    if "level" in array.dims or variable not in _UPPER_AIR:
        return
    other = sorted(set(scalars) & set(_SURFACES))
    if other:
        raise ValueError(
            f"{where}: {variable} lies on no pressure level but at {other[0]}="
            f"{scalars[other[0]]}. Name it so: 2m_temperature, 10m_u_component_of_wind, "
            "geopotential_at_surface or a name of your own"
        )


class FileStatements:
    """What the files of one record say of each variable, and where files contradict each other."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[str, dict[str, Any]]] = {}
        self._scalars: set[str] = set()
        self._conflicts: dict[str, str] = {}

    def add(self, variable: str, array: xr.DataArray, file: str) -> str | None:
        """Compare a file's variable with that of the first file; returns the conflict, if any."""
        said: dict[str, Any] = {
            "standard_name": says(array.attrs, "standard_name"),
            "cell_methods": _methods(array),
        }
        scalars = scalar_coordinates(array)
        said |= {name: value for name, value in scalars.items() if name not in _MAY_DIFFER}
        self._scalars |= scalars.keys()
        said |= _values_without_time(array)
        first_file, first = self._first.setdefault(variable, (file, said))
        for key in sorted(first.keys() & said.keys()):
            before, now = first[key], said[key]
            silent = "" in (before, now) or before != before  # says nothing, or is not a number
            if before != now and not silent and variable not in self._conflicts:
                self._conflicts[variable] = (
                    f"{variable} has {key} {now!r} in {file}, {before!r} in "
                    f"{first_file}; choose files that agree"
                )
        return self._conflicts.get(variable)

    def onto(self, dataset: xr.Dataset) -> xr.Dataset:
        """The joined dataset, each variable with the scalar coordinates of its files.
        `check_statements` refuses a variable whose files differ."""
        for name in dataset.data_vars:
            _, said = self._first.get(str(name), ("", {}))
            scalars = {key: value for key, value in said.items() if key in self._scalars}
            dataset[name].encoding["scalars"] = scalars
            dataset[name].encoding["conflict"] = self._conflicts.get(str(name))
        return dataset


def _values_without_time(array: xr.DataArray) -> dict[str, str]:
    """A hash of the values of a field without time, for each set of cells: files that are joined
    keep the values of the first one."""
    axes = [array[dim] for dim in array.dims]
    if len(axes) < 2 or "time" in array.dims or any(axis.dtype.kind in "MO" for axis in axes):
        return {}
    cells = hashlib.sha256(b"".join(np.ascontiguousarray(axis.values).data for axis in axes))
    values = hashlib.sha256(np.ascontiguousarray(array.values).data)
    return {f"values without time on cells {cells.hexdigest()[:6]}": values.hexdigest()[:6]}


def scalar_coordinates(array: xr.DataArray) -> dict[str, Any]:
    """The values of the coordinates without dimension, of each file where files were joined."""
    noted = array.encoding.get("scalars")
    if noted is not None:
        return noted
    scalars = {}
    for name, coordinate in array.coords.items():
        if coordinate.ndim == 0 and coordinate.dtype.kind not in "Mm":
            scalars[str(name)] = coordinate.values.item()
    return scalars


def _check_grid_mapping(variable: str, array: xr.DataArray, whole: xr.Dataset, where: str) -> None:
    """Check that the grid is one of geographic latitudes and longitudes."""
    grid_type = says(array.attrs, "GRIB_gridType")
    if grid_type not in ("", "regular_ll", "regular_gg"):
        raise ValueError(f"{where}: {variable} lies on a grid of type {grid_type}. {REGRID}")
    stated = array.attrs.get("grid_mapping", array.encoding.get("grid_mapping", ""))
    names = [name.rstrip(":") for name in str(stated).split()]
    mappings = [
        whole[name] for name in whole.variables
        if name in names or (not names and "grid_mapping_name" in whole[name].attrs)
    ]  # fmt: skip
    for mapping in mappings:
        kind = says(mapping.attrs, "grid_mapping_name")
        meridian = float(mapping.attrs.get("longitude_of_prime_meridian", 0.0))
        if kind not in ("", "latitude_longitude") or abs(meridian) > TOLERANCE_DEG:
            zero = f", longitudes from {meridian:g} degrees east" if meridian else ""
            raise ValueError(
                f"{where}: {variable} has the grid mapping {mapping.name} "
                f"({kind or 'unnamed'}{zero}), which is not geographic. {REGRID}"
            )


def _check_degrees(axis: str, towards: str, array: xr.DataArray, where: str) -> None:
    """Check that a horizontal coordinate is geographic latitude or longitude, in degrees."""
    coordinate = array[axis]
    standard, units = (says(coordinate.attrs, key) for key in ("standard_name", "units"))
    long_name = says(coordinate.attrs, "long_name")
    letter = towards[0]
    degrees = rf"deg(ree)?s?([-_ ]?{letter}({towards[1:]})?)?|°"
    for key, text, valid in (
        ("standard_name", standard, rf"(geodetic[_ ]|geographic[_ ])?{axis}s?"),
        ("units", units, degrees),
    ):
        if text and not re.fullmatch(valid, text, re.I):
            raise ValueError(
                f"{where}: its {axis} has {key} {text!r}; needed: geographic degrees {towards}. "
                f"{REGRID}"
            )
    if re.search(r"rotated|\bgrid[-_ ]?l|projection|\b[xy][-_ ]coord|metre|meter", long_name, re.I):
        raise ValueError(f"{where}: its {axis} has long_name {long_name!r}. {REGRID}")
    for name, other in array.coords.items():
        if {"latitude", "longitude"} <= set(other.dims) and _is_named(other, axis):
            beside = other.isel({d: 0 for d in other.dims if d not in ("latitude", "longitude")})
            apart = np.abs(beside - coordinate).values
            if axis == "longitude":
                apart = np.minimum(apart % 360.0, -apart % 360.0)
            if np.nanmax(apart) > TOLERANCE_DEG:
                raise ValueError(
                    f"{where}: {name} gives every cell a {axis} of its own, which differs from the "
                    f"values along the {axis} dimension. {REGRID}"
                )


def _is_named(coordinate: xr.DataArray, axis: str) -> bool:
    said = says(coordinate.attrs, "standard_name") or str(coordinate.name)
    return axis[:3] in said.lower() and "grid" not in said.lower()


def is_pressure(coordinate: xr.DataArray) -> bool:
    """Whether a coordinate says that it is pressure, by units or names."""
    standard, long_name = (says(coordinate.attrs, key) for key in ("standard_name", "long_name"))
    if _HYBRID.search(f"{standard} {long_name}"):
        return False
    in_units = hpa_per_unit(coordinate) is not None
    return in_units or "pressure" in standard.lower() or "pressure" in long_name.lower()


def hpa_per_unit(coordinate: xr.DataArray) -> float | None:
    """How many hPa one unit of a coordinate is; None if its units are none of pressure."""
    return HPA_PER_UNIT.get(says(coordinate.attrs, "units").lower())


def _check_level(variable: str, level: xr.DataArray, whole: xr.Dataset, where: str) -> None:
    """Check that levels are pressures."""
    units, standard = says(level.attrs, "units"), says(level.attrs, "standard_name")
    long_name, positive = says(level.attrs, "long_name"), says(level.attrs, "positive")
    in_pressure = hpa_per_unit(level) is not None
    doubtful = _HYBRID if in_pressure else _NO_PRESSURE
    faults = []
    if units and not in_pressure:
        faults.append(f"units {units!r}")
    if doubtful.search(standard) or (
        standard and not in_pressure and "press" not in standard.lower()
    ):
        faults.append(f"standard_name {standard!r}")
    if doubtful.search(long_name):
        faults.append(f"long_name {long_name!r}")
    if "formula_terms" in level.attrs:
        faults.append(f"formula_terms {level.attrs['formula_terms']!r}")
    if not in_pressure and positive.lower() == "up":
        faults.append("positive 'up'")
    if not is_pressure(level) and _counts_up(level.values):
        faults.append(f"the values {level.values.min():g} to {level.values.max():g} without gap")
    if beside := _pressure_field(variable, level, whole):
        faults.append(f"the variable {beside} beside them")
    if faults:
        raise ValueError(
            f"{where}: {variable} lies on levels with {', '.join(faults)}, which are not pressure. "
            "Levels must be pressure in hPa or Pa: interpolate to pressure levels first, or, if "
            "they are pressure, say so by units and standard_name air_pressure; numbers of model "
            "levels, which AtmoRep's models take, need `levels_are: model` in the catalog entry "
            "(levels_are=model of `data ingest`)"
        )


def _check_model_level(variable: str, level: xr.DataArray, where: str) -> None:
    """Check that levels do not claim to be pressures."""
    if is_pressure(level):
        raise ValueError(
            f"{where}: {variable} lies on levels of pressure, as their attributes say, where "
            "numbers of model levels are needed; leave `levels_are: model` out of the catalog "
            "entry, or choose another store"
        )


def _counts_up(levels: np.ndarray) -> bool:
    """Whether levels are 0, 1, 2, ... or 1, 2, 3, ..., in either order, as numbers of layers."""
    ordered = np.sort(np.asarray(levels, np.float64))
    return len(ordered) > 1 and ordered[0] in (0.0, 1.0) and bool((np.diff(ordered) == 1.0).all())


def _pressure_field(variable: str, level: xr.DataArray, whole: xr.Dataset) -> str | None:
    """The name of a variable which shows that levels are not pressures: coefficients of hybrid
    levels, or the pressure of every cell."""
    for name, other in whole.variables.items():
        if level.size not in other.shape:
            continue
        if str(name).lower() in ("hyam", "hybm"):
            return str(name)
        pressure = says(other.attrs, "standard_name") == "air_pressure" and other.ndim >= 3
        if pressure and hpa_per_unit(level) is None and name != variable:
            return str(name)
    return None


def is_start(time: xr.DataArray) -> bool:
    """Whether the file says that dates are those at which forecasts start."""
    standard = says(time.attrs, "standard_name").lower()
    if standard:
        return standard == "forecast_reference_time"
    return bool(_START.search(says(time.attrs, "long_name")))


def _said_of(time: xr.DataArray) -> str:
    """The attribute which says that dates are starts of forecasts."""
    key = "standard_name" if says(time.attrs, "standard_name") else "long_name"
    return f"{key} {says(time.attrs, key)}"


def lead_of(array: xr.DataArray) -> np.timedelta64 | None:
    """The single lead time of a field, if a coordinate states one.

    Raises:
        ValueError: its units are not known.
    """
    for name, coordinate in array.coords.items():
        named = str(name) in LEAD_NAMES or (
            says(coordinate.attrs, "standard_name") == "forecast_period"
        )
        if named and coordinate.ndim == 0:
            elapsed = durations(coordinate, f"coordinate {name}").astype(np.int64)
            return np.timedelta64(int(elapsed), "ns")
    return None


_SECONDS = {"hours": 3600, "hour": 3600, "h": 3600, "days": 86400, "day": 86400, "minutes": 60}
_SECONDS |= {"minute": 60, "seconds": 1, "second": 1, "s": 1}


def durations(lead: xr.DataArray, where: str) -> np.ndarray:
    """Lead times as durations; numbers without units are hours.

    Raises:
        ValueError: other units.
    """
    values = lead.to_numpy()
    if np.issubdtype(values.dtype, np.timedelta64):
        return values.astype("timedelta64[ns]")
    units = says(lead.attrs, "units") or "hours"
    if units not in _SECONDS:
        raise ValueError(f"{where}: {lead.name} in units {units!r}; valid: {listed(_SECONDS)}")
    seconds = np.round(values * _SECONDS[units]).astype(np.int64)
    return seconds.astype("timedelta64[s]").astype("timedelta64[ns]")


def valid_time_of(array: xr.DataArray) -> xr.DataArray | None:
    """A further coordinate along time that holds the dates at which fields are valid."""
    for name, coordinate in array.coords.items():
        named = name == "valid_time" or says(coordinate.attrs, "standard_name") == "time"
        if name != "time" and coordinate.dims == ("time",) and named:
            return coordinate
    return None


def _check_valid_time(variable: str, array: xr.DataArray, where: str) -> None:
    """Check that dates are those at which fields are valid."""
    time = array["time"]
    valid = valid_time_of(array)
    if valid is not None:
        if not np.array_equal(valid.values, time.values):
            raise ValueError(
                f"{where}: {variable} has dates at which forecasts start along time, and those at "
                f"which they are valid in {valid.name}. {_VALID_ADVICE}"
            )
        return
    lead = lead_of(array)
    if is_start(time) and lead is None:
        raise ValueError(
            f"{where}: the dates of {variable} are the starts of forecasts ({_said_of(time)}), and "
            "no coordinate says how far ahead its fields are. Make valid dates of them: "
            "dataset.assign_coords(time=dataset.time + LEAD)"
        )
    if not lead:  # none is stated, or it is zero
        return
    if is_start(time) or not says(time.attrs, "standard_name"):
        raise ValueError(
            f"{where}: {variable} is forecast {lead / np.timedelta64(1, 'h'):g} h ahead of the "
            f"dates along time. {_VALID_ADVICE}"
        )


_VALID_ADVICE = "`atmossl data ingest` makes a store of them that is dated by valid time"
