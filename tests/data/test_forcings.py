"""Computed fields against a published position of the sun and closed forms."""

import numpy as np
import pandas as pd
import pvlib
import pytest

from atmossl.data.forcings import FORCINGS, SOLAR_CONSTANT, toa_flux, toa_incident_solar_radiation

TIMES = np.array(
    [
        np.datetime64(text, "ns")
        for text in ("1979-03-21T06", "2000-06-21T15", "2012-02-29T00", "2020-12-21T21")
    ]
)
LATITUDE, LONGITUDE = np.array([-89.0, -30.0, 0.0, 52.5, 80.0]), np.array([0.0, 13.4, 180.0, 271.0])


def reference_flux(times: np.ndarray, latitude: float, longitude: float) -> np.ndarray:
    """W m-2 by pvlib: the solar position algorithm of NREL (Reda and Andreas 2004)."""
    index = pd.DatetimeIndex(times, tz="UTC")
    position = pvlib.solarposition.get_solarposition(index, latitude, longitude)
    normal = pvlib.irradiance.get_extra_radiation(
        index, solar_constant=SOLAR_CONSTANT, method="nrel"
    )
    return np.maximum(np.cos(np.deg2rad(position["zenith"])), 0).values * np.asarray(normal)


def test_flux_is_that_of_nrels_algorithm() -> None:
    days = (TIMES - np.datetime64("2000-01-01T12", "ns")) / np.timedelta64(1, "D")
    found = toa_flux(days, LATITUDE, LONGITUDE)
    for row, latitude in enumerate(LATITUDE):
        for column, longitude in enumerate(LONGITUDE):
            expected = reference_flux(TIMES, latitude, longitude)
            np.testing.assert_allclose(found[:, row, column], expected, atol=0.5)


def test_accumulation_is_the_integral_over_the_hour_before() -> None:
    found = toa_incident_solar_radiation(TIMES[1:2], LATITUDE, LONGITUDE)[0]
    fine = TIMES[1] - (np.arange(720) + 0.5) * np.timedelta64(5, "s")
    for row, latitude in enumerate(LATITUDE):
        for column, longitude in enumerate(LONGITUDE):
            expected = 3600 * reference_flux(fine, latitude, longitude).mean()
            assert found[row, column] == pytest.approx(expected, rel=2e-3, abs=3600 * 0.5)


def test_mean_over_a_year_and_the_globe_is_a_quarter_of_the_solar_constant() -> None:
    days = np.arange(0, 365.2422)
    latitude = np.arange(-88.0, 90, 4)
    flux = toa_flux(days, latitude, np.arange(0.0, 360, 5))
    mean = np.average(flux.mean(axis=(0, 2)), weights=np.cos(np.deg2rad(latitude)))
    eccentricity = 0.0167
    assert mean == pytest.approx(SOLAR_CONSTANT / 4 / (1 - eccentricity**2) ** 0.5, rel=2e-3)


@pytest.mark.parametrize("name", sorted(FORCINGS))
def test_forcings_have_all_axes_and_are_finite(name: str) -> None:
    values = FORCINGS[name](TIMES, LATITUDE, LONGITUDE)
    assert values.shape == (4, 5, 4) and np.isfinite(values).all()


def test_time_encodings_close_the_circle() -> None:
    ends = np.array([np.datetime64("2019-12-31T23:59:59", "ns"), np.datetime64("2020-01-01", "ns")])
    for name in ("sin_year", "cos_year", "sin_local_day", "cos_local_day"):
        values = FORCINGS[name](ends, LATITUDE, LONGITUDE)
        np.testing.assert_allclose(values[0], values[1], atol=1e-4)
    noon = FORCINGS["cos_local_day"](TIMES[:1], np.array([0.0]), np.array([90.0]))
    assert noon[0, 0, 0] == pytest.approx(-1)  # 06 UTC at 90 degrees east is local noon
