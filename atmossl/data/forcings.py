"""Forcings: variables that are computed from time and place instead of being stored, such as the
solar radiation at the top of the atmosphere."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from atmossl.data.axes import STANDARD, Calendar
from atmossl.data.chunks import Region

SOLAR_CONSTANT = 1361.0  # W m-2 at one astronomical unit (Kopp and Lean 2011)
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(8)
_J2000 = np.datetime64("2000-01-01T12:00:00", "ns")
_DAY = np.timedelta64(86_400_000_000_000, "ns")
_TIMES_PER_READ = 8

Field = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def toa_flux(days: np.ndarray, latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """The solar radiation on a horizontal surface at the top of the atmosphere, W m-2 [time lat
    lon]. days: since 2000-01-01T12. latitude, longitude: degrees.

    Position of the sun after the low-precision formulas of the Astronomical Almanac (as in
    Michalsky 1988): 0.01 degrees between 1950 and 2050.
    """
    anomaly = np.deg2rad(357.528 + 0.9856003 * days)
    mean_longitude = 280.460 + 0.9856474 * days
    ecliptic = np.deg2rad(mean_longitude + 1.915 * np.sin(anomaly) + 0.020 * np.sin(2 * anomaly))
    obliquity = np.deg2rad(23.439 - 4e-7 * days)
    distance = 1.00014 - 0.01671 * np.cos(anomaly) - 0.00014 * np.cos(2 * anomaly)
    declination = np.arcsin(np.sin(obliquity) * np.sin(ecliptic))
    ascension = np.arctan2(np.cos(obliquity) * np.sin(ecliptic), np.cos(ecliptic))
    sidereal = np.deg2rad(280.46062 + 360.98564737 * days)  # at Greenwich
    hour_angle = (sidereal - ascension)[:, None, None] + np.deg2rad(longitude)
    lat, sun = np.deg2rad(latitude)[:, None], declination[:, None, None]
    height = np.sin(lat) * np.sin(sun) + np.cos(lat) * np.cos(sun) * np.cos(hour_angle)
    return SOLAR_CONSTANT / distance[:, None, None] ** 2 * np.maximum(height, 0.0)


def toa_incident_solar_radiation(
    times: np.ndarray, latitude: np.ndarray, longitude: np.ndarray
) -> np.ndarray:
    """The solar radiation at the top of the atmosphere that was received in the hour before each
    time, J m-2, as in ERA5. It is `toa_flux`, integrated by Gauss-Legendre quadrature."""
    total = np.zeros((len(times), len(latitude), len(longitude)))
    for node, weight in zip(_NODES, _NODE_WEIGHTS, strict=True):
        days = _days(times) + (node - 1) / 2 / 24
        total += weight / 2 * toa_flux(days, latitude, longitude)
    return 3600.0 * total


def _days(times: np.ndarray) -> np.ndarray:
    return (times - _J2000) / _DAY


def _everywhere(
    times: np.ndarray, latitude: np.ndarray, longitude: np.ndarray, values: np.ndarray
) -> np.ndarray:
    return np.broadcast_to(values, (len(times), len(latitude), len(longitude)))


def _of_latitude(function: Callable[[np.ndarray], np.ndarray]) -> Field:
    return lambda times, lat, lon: _everywhere(times, lat, lon, function(np.deg2rad(lat))[:, None])


def _of_longitude(function: Callable[[np.ndarray], np.ndarray]) -> Field:
    return lambda times, lat, lon: _everywhere(times, lat, lon, function(np.deg2rad(lon)))


def _of_year(function: Callable[[np.ndarray], np.ndarray]) -> Field:
    def field(times: np.ndarray, latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
        share = STANDARD.year_share(times)
        return _everywhere(times, latitude, longitude, function(2 * np.pi * share)[:, None, None])

    return field


def _of_local_day(function: Callable[[np.ndarray], np.ndarray]) -> Field:
    def field(times: np.ndarray, latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
        share = ((_days(times) + 0.5) % 1.0)[:, None, None] + longitude / 360.0
        return _everywhere(times, latitude, longitude, function(2 * np.pi * share))

    return field


# Every function maps times, latitudes and longitudes (degrees) to values [time lat lon].
FORCINGS: dict[str, Field] = {
    "toa_incident_solar_radiation": toa_incident_solar_radiation,
    "sin_latitude": _of_latitude(np.sin),
    "cos_latitude": _of_latitude(np.cos),
    "sin_longitude": _of_longitude(np.sin),
    "cos_longitude": _of_longitude(np.cos),
    "sin_year": _of_year(np.sin),
    "cos_year": _of_year(np.cos),
    "sin_local_day": _of_local_day(np.sin),
    "cos_local_day": _of_local_day(np.cos),
}


_OF_YEAR = ("sin_year", "cos_year")


@dataclass(frozen=True)
class ComputedChunks:
    """A forcing at the times and on the grid of a store, computed when it is read."""

    name: str
    times: np.ndarray
    latitude: np.ndarray
    longitude: np.ndarray
    calendar: Calendar = STANDARD

    @property
    def chunks(self) -> tuple[int, ...]:
        return _TIMES_PER_READ, len(self.latitude), len(self.longitude)

    def read(self, region: Region) -> np.ndarray:
        times, latitude, longitude = region
        earthly = self.calendar.on_earth(self.times[times], by_hour=self.name not in _OF_YEAR)
        return FORCINGS[self.name](earthly, self.latitude[latitude], self.longitude[longitude])
