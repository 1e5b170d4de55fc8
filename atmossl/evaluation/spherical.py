"""Variance by total wavenumber of spherical harmonics, where the grid has an exact transform.

Transforms are those of ducc0 (Reinecke et al. 2023, Astronomy & Astrophysics 678, A165): exact for
fields without waves shorter than the grid resolves, on equiangular and on Gaussian latitudes.
"""

from dataclasses import dataclass
from typing import Literal

import ducc0
import numpy as np
import xarray as xr
from jaxtyping import Float

from atmossl.evaluation.scores import Case
from atmossl.geometry import gaussian_latitudes

Geometry = Literal["F1", "CC", "GL"]  # ducc0's names of the latitudes
_TOLERANCE_DEG = 1e-2


def geometry_of(latitude: np.ndarray, longitude: np.ndarray) -> Geometry | None:
    """The kind of grid that latitudes (degrees, ascending) form: rows of equal height (F1), the
    same with rows on the poles (CC), or Gaussian (GL). None: another grid, or longitudes that do
    not close the circle."""
    count, spacing = len(latitude), 360.0 / len(longitude)
    if np.abs(np.diff(longitude) - spacing).max() > _TOLERANCE_DEG:
        return None
    candidates: dict[Geometry, np.ndarray] = {
        "F1": -90.0 + 180.0 / count * (np.arange(count) + 0.5),
        "CC": np.linspace(-90.0, 90.0, count),
        "GL": gaussian_latitudes(count)[0],
    }
    for name, rows in candidates.items():
        if np.abs(rows - latitude).max() < _TOLERANCE_DEG:
            return name
    return None


def spherical_power(field: xr.Variable, geometry: Geometry) -> xr.Variable:
    """Power [.., wavenumber] by total wavenumber, in squared units; summed from wavenumber 1 on it
    is the variance over the globe (Parseval)."""
    values = field.transpose(..., "latitude", "longitude")
    rows = values.to_numpy().astype(np.float64)[..., ::-1, :]  # from north to south
    num_lat, num_lon = rows.shape[-2:]
    largest = min(num_lat - (2 if geometry == "CC" else 1), (num_lon - 1) // 2)
    flat = rows.reshape(-1, num_lat, num_lon)
    power = np.stack([_power(rows_of_field, geometry, largest) for rows_of_field in flat])
    dims = (*values.dims[:-2], "wavenumber")
    return xr.Variable(dims, power.reshape(*rows.shape[:-2], -1))


def _power(
    field: Float[np.ndarray, "lat lon"], geometry: Geometry, largest: int
) -> Float[np.ndarray, "wavenumber"]:
    coefficients = ducc0.sht.analysis_2d(
        map=np.ascontiguousarray(field[None]), spin=0, lmax=largest, geometry=geometry
    )[0]
    # order by order, each from its own degree up; those of negative order are the conjugates
    degrees = np.concatenate([np.arange(order, largest + 1) for order in range(largest + 1)])
    twice = np.where(np.arange(len(degrees)) <= largest, 1.0, 2.0)
    squares = twice * np.abs(coefficients) ** 2 / (4.0 * np.pi)
    return np.bincount(degrees, weights=squares, minlength=largest + 1)


@dataclass(frozen=True)
class SphericalSpectrum:
    """Variance by total wavenumber on the globe, in squared units: of members (mean of their
    spectra), of the ensemble mean, and of the truth."""

    name: str = "spherical_spectrum"

    def applies(self, case: Case) -> bool:
        return self._geometry(case) is not None and bool(case.whole.any())

    def _geometry(self, case: Case) -> Geometry | None:
        places = (case.truth[name].to_numpy() for name in ("latitude", "longitude"))
        return geometry_of(*places)

    def per_time(self, case: Case, weights: xr.DataArray) -> xr.Dataset:
        del weights
        geometry = self._geometry(case)
        assert geometry is not None, "the grid has no exact transform"
        power = {
            "members": spherical_power(case.members, geometry).mean("member"),
            "ensemble_mean": spherical_power(case.ensemble_mean, geometry),
            "truth": spherical_power(case.observed, geometry),
        }
        spectra = {name: x.where(case.whole).expand_dims("region") for name, x in power.items()}
        wavenumber = np.arange(power["truth"].sizes["wavenumber"])
        return xr.Dataset(spectra, {"region": ["global"], "wavenumber": wavenumber})

    def value(self, means: xr.Dataset) -> xr.Dataset:
        return means
