"""What the package knows of variables: ERA5 names, CF standard names, units and limits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """physical_range: wider than anything that was ever observed or that a model of the Earth's
    atmosphere makes, rounding included: a value outside of it is in other units, or no value."""

    units: str
    standard_name: str
    long_name: str
    unit_aliases: tuple[str, ...] = ()
    physical_range: tuple[float, float] = (float("-inf"), float("inf"))
    static: bool = False  # the same at all times


_KELVIN = ("kelvin", "Kelvin", "degK", "deg K", "degree_K", "degrees K", "degrees_kelvin")

VARIABLES: dict[str, Variable] = {
    "temperature": Variable("K", "air_temperature", "Temperature", _KELVIN, (130.0, 350.0)),
    "u_component_of_wind": Variable(
        "m s-1", "eastward_wind", "U component of wind", ("m s**-1", "m/s"), (-300.0, 300.0)
    ),
    "v_component_of_wind": Variable(
        "m s-1", "northward_wind", "V component of wind", ("m s**-1", "m/s"), (-300.0, 300.0)
    ),
    "geopotential": Variable(
        "m2 s-2", "geopotential", "Geopotential", ("m**2 s**-2", "m2/s2"), (-2e4, 1e6)
    ),
    "specific_humidity": Variable(
        "kg kg-1",
        "specific_humidity",
        "Specific humidity",
        ("kg kg**-1", "kg/kg", "1"),
        (-1e-2, 0.1),
    ),
    "vertical_velocity": Variable(
        "Pa s-1",
        "lagrangian_tendency_of_air_pressure",
        "Vertical velocity",
        ("Pa s**-1", "Pa/s"),
        (-300.0, 300.0),
    ),
    "vorticity": Variable(
        "s-1", "atmosphere_relative_vorticity", "Relative vorticity", ("s**-1", "1/s"), (-0.5, 0.5)
    ),
    "divergence": Variable(
        "s-1", "divergence_of_wind", "Divergence", ("s**-1", "1/s"), (-0.5, 0.5)
    ),
    "2m_temperature": Variable(
        "K", "air_temperature", "2 metre temperature", _KELVIN, (170.0, 340.0)
    ),
    "mean_sea_level_pressure": Variable(
        "Pa",
        "air_pressure_at_mean_sea_level",
        "Mean sea level pressure",
        ("pascal",),
        (8e4, 1.15e5),
    ),
    "10m_u_component_of_wind": Variable(
        "m s-1",
        "eastward_wind",
        "10 metre U wind component",
        ("m s**-1", "m/s"),
        (-150.0, 150.0),
    ),
    "10m_v_component_of_wind": Variable(
        "m s-1",
        "northward_wind",
        "10 metre V wind component",
        ("m s**-1", "m/s"),
        (-150.0, 150.0),
    ),
}

VARIABLES |= {
    "surface_pressure": Variable(
        "Pa", "surface_air_pressure", "Surface pressure", ("pascal",), (3e4, 1.2e5)
    ),
    "sea_surface_temperature": Variable(
        "K", "sea_surface_temperature", "Sea surface temperature", _KELVIN, (260.0, 320.0)
    ),
    "sea_ice_cover": Variable(
        "1", "sea_ice_area_fraction", "Sea ice area fraction", ("(0 - 1)", "0 - 1"), (-0.01, 1.01)
    ),
    "specific_cloud_liquid_water_content": Variable(
        "kg kg-1",
        "mass_fraction_of_cloud_liquid_water_in_air",
        "Specific cloud liquid water content",
        ("kg kg**-1", "kg/kg", "1"),
        (-1e-3, 0.05),
    ),
    "specific_cloud_ice_water_content": Variable(
        "kg kg-1",
        "mass_fraction_of_cloud_ice_in_air",
        "Specific cloud ice water content",
        ("kg kg**-1", "kg/kg", "1"),
        (-1e-3, 0.05),
    ),
    "total_precipitation": Variable(
        "m", "lwe_thickness_of_precipitation_amount", "Total precipitation", (), (-1e-3, 2.0)
    ),
    "geopotential_at_surface": Variable(
        "m2 s-2", "surface_geopotential", "Orography", ("m**2 s**-2", "m2/s2"), (-2e4, 1e5), True
    ),
    "land_sea_mask": Variable(
        "1", "land_area_fraction", "Land-sea mask", ("(0 - 1)", "0 - 1"), (-0.01, 1.01), True
    ),
    "toa_incident_solar_radiation": Variable(
        "J m-2",
        "integral_wrt_time_of_toa_incoming_shortwave_flux",
        "Solar radiation at the top of the atmosphere over an hour",
        ("J m**-2",),
        (-1.0, 6e6),
    ),
}

# Short names of ECMWF, and the names that cfgrib and the CDS give variables.
SHORT_NAMES: dict[str, str] = {
    "t": "temperature",
    "u": "u_component_of_wind",
    "v": "v_component_of_wind",
    "z": "geopotential",
    "q": "specific_humidity",
    "w": "vertical_velocity",
    "vo": "vorticity",
    "d": "divergence",
    "t2m": "2m_temperature",
    "2t": "2m_temperature",
    "msl": "mean_sea_level_pressure",
    "u10": "10m_u_component_of_wind",
    "10u": "10m_u_component_of_wind",
    "v10": "10m_v_component_of_wind",
    "10v": "10m_v_component_of_wind",
    "sp": "surface_pressure",
    "sst": "sea_surface_temperature",
    "tp": "total_precipitation",
    "lsm": "land_sea_mask",
    "siconc": "sea_ice_cover",
    "ci": "sea_ice_cover",
    "clwc": "specific_cloud_liquid_water_content",
    "ciwc": "specific_cloud_ice_water_content",
    "tisr": "toa_incident_solar_radiation",
} | {name: name for name in VARIABLES}


# Factor and offset from other units to those of a variable.
_CELSIUS, _FAHRENHEIT = (1.0, 273.15), (5.0 / 9.0, 273.15 - 32.0 * 5.0 / 9.0)
_CONVERSIONS: dict[str, dict[str, tuple[float, float]]] = {
    "K": {
        **dict.fromkeys(("degC", "deg C", "C", "celsius", "Celsius", "degrees_C"), _CELSIUS),
        **dict.fromkeys(("degree_Celsius", "degrees_Celsius", "degrees C", "°C"), _CELSIUS),
        **dict.fromkeys(("degF", "deg F", "F", "fahrenheit", "Fahrenheit", "°F"), _FAHRENHEIT),
    },
    "Pa": dict.fromkeys(("hPa", "mbar", "mb", "millibar", "millibars"), (100.0, 0.0)),
    "m": dict.fromkeys(("mm", "kg m-2", "kg m**-2", "kg/m2"), (1e-3, 0.0)),
    "kg kg-1": dict.fromkeys(("g kg-1", "g kg**-1", "g/kg"), (1e-3, 0.0)),
    "1": dict.fromkeys(("%", "percent"), (1e-2, 0.0)),
}


_GAS_CONSTANT = 287.0  # of dry air, J kg-1 K-1
_SURFACE_PASCALS = (8.6e4, 1.1e5)  # lowest and highest at sea level
_LAYER_KELVIN = (185.0, 315.0)  # mean temperature between sea level and any level
_PASCAL_PER_HPA = 100.0


def physical_range(variable: str, level_hpa: int = 0) -> tuple[float, float]:
    """Lowest and highest value that an atmosphere has, infinite for a variable that is not known.

    level_hpa: pressure, which the range of the geopotential depends on by the hypsometric equation
    (Phi = R T ln(p_0 / p)); 0 at the surface, or where the level is no pressure.
    """
    if variable not in VARIABLES:
        return float("-inf"), float("inf")
    if variable != "geopotential" or level_hpa == 0:
        return VARIABLES[variable].physical_range
    depths = [math.log(surface / (_PASCAL_PER_HPA * level_hpa)) for surface in _SURFACE_PASCALS]
    bounds = [_GAS_CONSTANT * warmth * depth for warmth in _LAYER_KELVIN for depth in depths]
    return min(bounds), max(bounds)


def conversion(variable: str, units: str | None) -> tuple[float, float] | None:
    """Factor and offset from these units to those of the variable; None if there is no need, or no
    way that is known here."""
    known = VARIABLES.get(variable)
    if known is None or units is None or units in (known.units, *known.unit_aliases):
        return None
    return _CONVERSIONS.get(known.units, {}).get(units.strip())


def check_units(variable: str, units: str | Sequence[str] | None, location: str) -> None:
    """Raise ValueError if a store states units other than those of the variable, or a variable
    that is not known here has several in several files.

    A store that states none is taken at its word: the name says what it holds.
    """
    known = VARIABLES.get(variable)
    if units is None or (known is None and isinstance(units, str)):
        return
    stated = [units] if isinstance(units, str) else units
    if known is None:
        raise ValueError(f"{location}: the files give variable {variable} in units {stated}")
    if not {known.units, *known.unit_aliases}.issuperset(stated):
        raise ValueError(
            f"{location}: variable {variable} has units {units!r}; valid: "
            f"{[known.units, *known.unit_aliases]}. `atmossl data ingest` converts usual ones"
        )
