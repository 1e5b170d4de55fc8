"""The variables that the package knows: ERA5 names, CF standard names, units, physical limits
and transforms."""

import math
import sys
import warnings
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, Self, get_args

import numpy as np

from atmossl.settings import PositiveFloat
from atmossl.value_faults import listed


@dataclass(frozen=True)
class Variable:
    """A physical quantity under its ERA5 name.

    physical_range: wider than anything that was ever observed or that a model of the Earth's
        atmosphere makes, rounding included. A value outside is in other units, or is no value.
    """

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
        "m s-1", "eastward_wind", "10 metre U wind component", ("m s**-1", "m/s"), (-150.0, 150.0)
    ),
    "10m_v_component_of_wind": Variable(
        "m s-1", "northward_wind", "10 metre V wind component", ("m s**-1", "m/s"), (-150.0, 150.0)
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


# variables that cannot be negative
AMOUNTS = frozenset(
    {
        "specific_humidity",
        "sea_ice_cover",
        "specific_cloud_liquid_water_content",
        "specific_cloud_ice_water_content",
        "total_precipitation",
    }
)

_GAS_CONSTANT = 287.0  # of dry air, J kg-1 K-1
_SURFACE_PASCALS = (8.6e4, 1.1e5)  # lowest and highest at sea level
_LAYER_KELVIN = (185.0, 315.0)  # mean temperature between sea level and any level
_PASCAL_PER_HPA = 100.0


def physical_range(variable: str, level_hpa: int = 0) -> tuple[float, float]:
    """The lowest and highest value that an atmosphere has; infinite for an unknown variable.

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
    """Factor and offset from some units to those of the variable; None if there is nothing to
    convert, or no conversion is known."""
    entry = VARIABLES.get(variable)
    if entry is None or units is None or units in (entry.units, *entry.unit_aliases):
        return None
    return _CONVERSIONS.get(entry.units, {}).get(units.strip())


def check_units(variable: str, units: str | Sequence[str] | None, location: str) -> None:
    """Raise ValueError if a store states units other than those of the variable, or a variable
    that is not known here has several in several files.

    A store that states none is taken at its word: the name says what it holds.
    """
    entry = VARIABLES.get(variable)
    if units is None or (entry is None and isinstance(units, str)):
        return
    stated = [units] if isinstance(units, str) else units
    if entry is None:
        raise ValueError(
            f"{location}: the files give variable {variable} in units {listed(stated)}"
        )
    if not {entry.units, *entry.unit_aliases}.issuperset(stated):
        raise ValueError(
            f"{location}: variable {variable} has units {listed(stated)}; valid: "
            f"{listed([entry.units, *entry.unit_aliases])}. `atmossl data ingest` converts usual "
            "ones"
        )


# Values that cannot be where they are: other units, fill values that are not marked as missing,
# differences of which the units stayed, chunks that were never written.
#
# `Limits` are what one variable of a record may be at each of its levels. Whatever reads values
# for training, prediction or scores shows them to these, which refuse, warn, or do not look.

InputLimits = Literal["refuse", "warn", "off"]


class InputWarning(UserWarning):
    """Values are passed to a model that should not get them."""


@dataclass
class Notices:
    """Warns of each variable once."""

    reported: set[str] = field(default_factory=set)

    def tell(self, variable: str, text: str) -> None:
        if variable not in self.reported:
            self.reported.add(variable)
            warnings.warn(text, InputWarning, stacklevel=2)


@dataclass(frozen=True)
class Limits:
    """Limits of one variable on levels in hPa, (0,) at the surface. low, high: [level], in its
    units.

    everywhere: what can be at each of the levels; the first is the larger where nothing can.
    place: where and when the values are, for messages.
    """

    variable: str
    levels: tuple[int, ...]
    low: np.ndarray
    high: np.ndarray
    everywhere: tuple[float, float]
    mode: InputLimits
    notices: Notices
    place: Callable[[], str]

    @classmethod
    def physical(
        cls,
        variable: str,
        levels: tuple[int, ...],
        *,
        pressure_levels: bool,
        mode: InputLimits,
        notices: Notices,
        place: Callable[[], str],
    ) -> "Limits | None":
        """The limits that any atmosphere keeps; None if they are not known, or values are not to
        be checked."""
        if mode == "off" or variable not in VARIABLES:
            return None
        pressures = [level if pressure_levels else 0 for level in levels]
        low, high, everywhere = _ranges(variable, tuple(pressures))
        return cls(variable, levels, low, high, everywhere, mode, notices, place)

    def hold(self, lowest: float, highest: float) -> bool:
        """Whether all values between the lowest and the highest are possible at every level. NaN
        is not."""
        return self.everywhere[0] <= lowest and highest <= self.everywhere[1]

    def check(self, values: np.ndarray, levels: slice = slice(None)) -> None:
        """Check values [level time lat lon] of some levels; missing values are ignored.

        Raises:
            ValueError: values outside of the limits, which are to be refused.
        """
        by_level = zip(values, self.low[levels], self.high[levels], strict=True)
        if all(field.min() >= low and field.max() <= high for field, low, high in by_level):
            return
        observed = np.isfinite(values)
        lowest = values.min(axis=(1, 2, 3), where=observed, initial=np.inf)
        highest = values.max(axis=(1, 2, 3), where=observed, initial=-np.inf)
        low, high = self.low[levels], self.high[levels]
        outside = (lowest < low) | (highest > high)
        if outside.any():
            row = int(np.argmax(outside))
            extremes = (float(lowest[row]), float(highest[row]))
            self._tell(self.levels[levels][row], extremes, (float(low[row]), float(high[row])))

    def _tell(self, level: int, extremes: tuple[float, float], limits: tuple[float, float]) -> None:
        units = VARIABLES[self.variable].units
        text = (
            f"{self.place()}: {self.variable}{f' at {level} hPa' if level else ''} goes from "
            f"{extremes[0]:.4g} to {extremes[1]:.4g} {units}, an atmosphere's "
            f"from {limits[0]:.4g} to {limits[1]:.4g}: other units, a fill value that is not "
            "marked, differences, or a chunk that was never written?"
        )
        if self.mode == "refuse":
            raise ValueError(f"{text} input_limits=warn takes the values as they are")
        self.notices.tell(self.variable, text)


@cache
def _ranges(
    variable: str, levels: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    low, high = np.array([physical_range(variable, level) for level in levels]).T
    return low, high, (float(low.max()), float(high.min()))


class OneLineNotes:
    """While it is entered, the warnings of this module are printed as a note of one line, without a
    place in the source; all others as before."""

    def __enter__(self) -> Self:
        self._usual = warnings.showwarning
        warnings.showwarning = self._show
        return self

    def __exit__(self, *error: object) -> None:
        warnings.showwarning = self._usual

    def _show(self, message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, InputWarning):
            sys.stderr.write(f"note: {message}\n")
        else:
            self._usual(message, category, *place, **more)


# Invertible transforms of skewed variables, before normalisation.

Kind = Literal["log", "sqrt"]


@dataclass(frozen=True)
class Transform:
    """A transform of a variable before normalisation. `log`: sign(x) log(1 + |x| / scale), as Rasp
    and Thuerey (2021) for precipitation; `sqrt`: sign(x) sqrt(|x| / scale). scale: in the
    variable's units; far below it `log` is linear.

    Raises:
        ValueError: an unknown kind, or a scale that is not positive.
    """

    kind: Kind
    scale: PositiveFloat

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"transform {self.kind!r} does not exist; valid: {listed(get_args(Kind))}"
            )
        if not self.scale > 0:
            raise ValueError(f"scale={self.scale} of a transform must be positive")

    def forward(self, values: np.ndarray) -> np.ndarray:
        size = np.abs(values) / np.asarray(self.scale, values.dtype)
        return np.sign(values) * (np.log1p(size) if self.kind == "log" else np.sqrt(size))

    def inverse(self, values: np.ndarray) -> np.ndarray:
        size = np.abs(values)
        size = np.expm1(size) if self.kind == "log" else size**2
        return np.sign(values) * size * np.asarray(self.scale, values.dtype)


def renaming_advice(stored: Iterable[Hashable], names: Collection[str]) -> str:
    """How to rename variables that are there under short names, for the end of a message; empty
    where none of the wanted `names` is."""
    have = sorted(map(str, stored))
    renamed = {name: SHORT_NAMES.get(name) for name in have}
    pairs = [f'{name}="{n}"' for name, n in renamed.items() if n in names and n not in have]
    if not pairs:
        return ""
    return (
        f". If these are they: dataset.rename({', '.join(pairs)}); or open the file by "
        "atmossl.open_data(PATH), or `atmossl data add PATH`, which know these names"
    )
