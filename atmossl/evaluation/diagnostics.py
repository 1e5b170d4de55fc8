"""Diagnostics, which are looked at rather than ranked: rank histograms, reliability and spectra.

Like a score, a diagnostic gives area means for each case that can be recombined; its value has
dimensions of its own (`rank`, `bin`, `wavenumber`).
"""

from dataclasses import dataclass

import numpy as np
import xarray as xr

from atmossl.evaluation.regions import weighted_mean
from atmossl.evaluation.scores import Case, PointwiseMean, unlabelled
from atmossl.geometry import closes_circle

_NUM_BINS = 10


@dataclass(frozen=True)
class RankHistogram:
    """Share of cases in which the truth has each rank among the members; flat if calibrated.

    Ties with members share the case among the ranks that they leave open.
    Source: Hamill (2001), Monthly Weather Review 129, 550-560.
    """

    name: str = "rank_histogram"

    def applies(self, case: Case) -> bool:
        return case.num_members > 1

    def per_time(self, case: Case, weights: xr.DataArray) -> xr.Dataset:
        below = (case.members < case.observed).sum("member")
        ties = (case.members == case.observed).sum("member")
        rank = _axis("rank", case.num_members + 1)
        is_open = (rank >= below) & (rank <= below + ties)
        share = (is_open / (ties + 1.0)).where(case.valid)
        frequency = weighted_mean(share, weights.variable)
        return xr.Dataset({"frequency": frequency}, {"rank": rank})

    def value(self, means: xr.Dataset) -> xr.Dataset:
        return means


@dataclass(frozen=True)
class Outliers(PointwiseMean):
    """How often the truth lies outside all members, over how often it should; 1 if calibrated.

    Of M members exchangeable with the truth, 2 / (M + 1) of the truths lie outside.
    """

    name: str = "outlier_ratio"

    def applies(self, case: Case) -> bool:
        return case.num_members > 1

    def pointwise(self, case: Case) -> xr.Variable:
        below = case.observed < case.members.min("member")
        above = case.observed > case.members.max("member")
        expected = 2.0 / (case.num_members + 1)
        return ((below | above) / expected).where(case.valid)


@dataclass(frozen=True)
class Reliability:
    """How often an event happens that was forecast with each probability (Murphy 1973).

    The event is the exceedance of a quantile of the training record. Up to ten members every
    possible probability has its own bin, with more there are eleven.
    """

    level: float

    @property
    def name(self) -> str:
        return f"reliability_above_p{100 * self.level:g}"

    def applies(self, case: Case) -> bool:
        return case.num_members > 1 and case.quantiles is not None

    def per_time(self, case: Case, weights: xr.DataArray) -> xr.Dataset:
        threshold = case.quantile(self.level)
        probability = (case.members > threshold).mean("member")
        happens = (case.observed > threshold).astype(np.float64)
        last = min(case.num_members, _NUM_BINS)
        nearest = (probability * last).round()
        number = _axis("bin", last + 1)
        chosen = (nearest == number).where(case.valid)
        fields = {"share": chosen, "forecast": chosen * probability, "observed": chosen * happens}
        means = {name: weighted_mean(x, weights.variable) for name, x in fields.items()}
        return xr.Dataset(means, {"bin": number})

    def value(self, means: xr.Dataset) -> xr.Dataset:
        share = means["share"].where(means["share"] > 0)
        return xr.Dataset(
            {
                "share": means["share"],
                "forecast_probability": means["forecast"] / share,
                "observed_frequency": means["observed"] / share,
            }
        )


@dataclass(frozen=True)
class ZonalSpectrum:
    """Variance by zonal wavenumber, in squared units: of members (mean of their spectra), of the
    ensemble mean, and of the truth.

    Mean over latitude circles by area; summed over wavenumbers from one up, it is the mean zonal
    variance (Parseval). Belts only: a box has no zonal wavenumbers, and a field with missing
    values none that can be told.
    """

    name: str = "zonal_spectrum"

    def applies(self, case: Case) -> bool:
        return closes_circle(case.truth["longitude"].to_numpy()) and bool(case.whole.any())

    def per_time(self, case: Case, weights: xr.DataArray) -> xr.Dataset:
        area = weights.variable
        if "longitude" in area.dims:
            closed = (area > 0).any("latitude").all("longitude")
            area = area.mean("longitude").where(closed)  # a box: missing

        def power(field: xr.Variable) -> xr.Variable:
            summed = xr.dot(unlabelled(zonal_power(field)), unlabelled(area), dim="latitude")
            return summed.variable / area.sum("latitude")

        power_of = {
            "members": power(case.members).mean("member"),
            "ensemble_mean": power(case.ensemble_mean),
            "truth": power(case.observed),
        }
        wavenumber = _axis("wavenumber", power_of["truth"].sizes["wavenumber"])
        spectra = {name: power.where(case.whole) for name, power in power_of.items()}
        return xr.Dataset(spectra, {"wavenumber": wavenumber})

    def value(self, means: xr.Dataset) -> xr.Dataset:
        return means


def zonal_power(field: xr.Variable) -> xr.Variable:
    """Power [.., wavenumber] on every latitude circle; over k >= 1 it sums to the variance."""
    values = field.transpose(..., "longitude")
    num_lon = field.sizes["longitude"]
    power = np.abs(np.fft.rfft(values.to_numpy().astype(np.float64), axis=-1) / num_lon) ** 2
    power[..., 1:] *= 2.0
    if num_lon % 2 == 0:
        power[..., -1] /= 2.0  # the wave of two cells has no partner
    return xr.Variable((*values.dims[:-1], "wavenumber"), power)


def _axis(name: str, size: int) -> xr.Variable:
    return xr.Variable((name,), np.arange(size))
