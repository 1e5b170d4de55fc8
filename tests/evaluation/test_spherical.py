"""Spherical spectra against closed forms of scipy's spherical harmonics."""

import numpy as np
import pytest
import xarray as xr
from scipy.special import sph_harm_y

from atmossl.evaluation.diagnostics import zonal_power
from atmossl.evaluation.regions import REGIONS, stacked_weights
from atmossl.evaluation.scores import Case
from atmossl.evaluation.spherical import SphericalSpectrum, geometry_of, spherical_power

NUM_LON = 32
NODES, AREAS = np.polynomial.legendre.leggauss(16)
LATITUDES = {
    "F1": -90 + 11.25 * (np.arange(16) + 0.5),
    "CC": np.linspace(-90, 90, 17),
    "GL": np.rad2deg(np.arcsin(NODES)),
}


def harmonic(degree: int, order: int, latitude: np.ndarray, west: float = 0.0) -> xr.DataArray:
    """A real harmonic of unit mean square, with the longitudes from `west` on."""
    longitude = west + np.arange(NUM_LON) * 360 / NUM_LON
    theta, phi = np.deg2rad(90 - latitude)[:, None], np.deg2rad(longitude)
    values = np.real(sph_harm_y(degree, order, theta, phi)) * np.sqrt(4 * np.pi)
    values = values * (np.sqrt(2) if order else 1.0)
    coords = {"latitude": latitude, "longitude": longitude}
    return xr.DataArray(values, coords, ("latitude", "longitude"))


@pytest.mark.parametrize("geometry", LATITUDES)
@pytest.mark.parametrize(("degree", "order"), [(0, 0), (1, 0), (5, 3), (9, 9), (13, 2)])
def test_a_single_harmonic_is_one_line(geometry, degree: int, order: int) -> None:
    field = harmonic(degree, order, LATITUDES[geometry], west=-180.0 + 5.0)
    assert geometry_of(field["latitude"].values, field["longitude"].values) == geometry
    power = spherical_power(field, geometry).to_numpy()
    np.testing.assert_allclose(power, np.eye(len(power))[degree], atol=1e-12)


@pytest.mark.parametrize("geometry", LATITUDES)
def test_power_sums_to_the_mean_square(geometry) -> None:
    """Parseval, by Gaussian quadrature, for a field of many waves; on any of the grids."""
    rng = np.random.default_rng(0)
    amplitudes = {(n, m): rng.standard_normal() for n in range(8) for m in range(n + 1)}

    def field(latitude: np.ndarray) -> xr.DataArray:
        return sum(a * harmonic(*key, latitude) for key, a in amplitudes.items())

    gaussian = field(LATITUDES["GL"]).to_numpy() ** 2
    expected = (gaussian.mean(axis=1) * AREAS).sum() / 2
    power = spherical_power(field(LATITUDES[geometry]), geometry)
    assert float(power.sum()) == pytest.approx(expected, rel=1e-12)
    by_degree = [sum(a**2 for (n, _), a in amplitudes.items() if n == k) for k in range(8)]
    np.testing.assert_allclose(power[:8], by_degree, atol=1e-12)
    zonal = zonal_power(harmonic(5, 3, LATITUDES["F1"]))
    assert float(zonal.isel(wavenumber=3).sum()) > 0.999 * float(zonal.sum())  # another direction


def test_a_case_has_the_spectra_of_members_mean_and_truth() -> None:
    truth = harmonic(4, 1, LATITUDES["F1"]).expand_dims(time=2, level=3)
    noise = harmonic(7, 0, LATITUDES["F1"])
    members = xr.concat([truth + noise, truth - noise], "member")
    case, weights = Case(members, truth), stacked_weights(truth, list(REGIONS.values()))
    spectrum = SphericalSpectrum()
    assert spectrum.applies(case)
    found = spectrum.value(spectrum.per_time(case, weights).mean("time")).isel(region=0, level=0)
    lines = np.eye(16)
    np.testing.assert_allclose(found["truth"], lines[4], atol=1e-12)
    np.testing.assert_allclose(found["ensemble_mean"], lines[4], atol=1e-12)
    np.testing.assert_allclose(found["members"], lines[4] + lines[7], atol=1e-12)


def test_regions_gaps_and_other_rows_have_none() -> None:
    truth = harmonic(4, 1, LATITUDES["F1"]).expand_dims(time=2)
    for part in (truth.isel(longitude=slice(0, 9)), truth.isel(latitude=slice(0, 9)),
                 truth.where(truth["latitude"] > 0)):  # fmt: skip
        assert not SphericalSpectrum().applies(Case(part, part))
