"""Scores of the joint distribution: they tell whether members are right together, not only cell by
cell.

An ensemble can be well calibrated in every cell while its members are no weather at all: cells that
should vary together vary on their own, or the other way round. What shows it are quantities made of
several cells. `Derived` turns a prediction and its truth into such quantities (means and maxima of
boxes, differences between neighbours, levels or times), and every score of single values can be
taken of them. `EnergyScore` and `VariogramScore` look at whole fields.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import xarray as xr

from atmossl.evaluation.diagnostics import RankHistogram
from atmossl.evaluation.events import Brier
from atmossl.evaluation.regions import weighted_mean
from atmossl.evaluation.scores import Case, Crps, Score, SpreadSkill, unlabelled
from atmossl.geometry import area_weights

Axis = Literal["longitude", "latitude", "level", "lead_time"]
_CELL = ("latitude", "longitude")


@dataclass(frozen=True)
class AreaMeans:
    """Area-weighted means over boxes of `size` x `size` cells. Boxes that do not fit whole are
    left out; a box with a missing cell is missing.

    shift: rows and columns before the first box. With half the side of the blocks whose means a
    downscaling is given, no box is made of whole blocks, of which nothing had to be predicted.
    """

    size: int
    shift: int = 0

    @property
    def name(self) -> str:
        return f"mean_{self.size}x{self.size}"

    def applies(self, case: Case) -> bool:
        return self.fit(case.truth)

    def fit(self, field: xr.DataArray) -> bool:
        """Whether a field has room for a box."""
        return min(field.sizes[dim] for dim in _CELL) >= self.size + self.shift

    def derive(self, values: xr.DataArray) -> xr.DataArray:
        rows = area_weights(values["latitude"].to_numpy().astype(np.float64))
        area = xr.Variable("latitude", rows)
        cells = area * xr.Variable("longitude", np.ones(values.sizes["longitude"]))
        means = self._blocks(values.variable * area, np.sum) / self._blocks(cells, np.sum)
        return _with_quantiles(means, values)

    def weights(self, weights: xr.DataArray) -> xr.DataArray:
        return unlabelled(self._blocks(weights.variable, np.sum))

    def _blocks(self, values: xr.Variable, function: Callable[..., Any]) -> xr.Variable:
        shifted = values.isel(dict.fromkeys(_CELL, slice(self.shift, None)))
        return shifted.coarsen(dict.fromkeys(_CELL, self.size), function, boundary="trim")


@dataclass(frozen=True)
class AreaMaxima(AreaMeans):
    """The largest values of boxes of `size` x `size` cells. Of quantiles, too, the largest is
    taken, so that the event "above the quantile" of a box is the exceedance of its largest
    threshold."""

    @property
    def name(self) -> str:
        return f"max_{self.size}x{self.size}"

    def derive(self, values: xr.DataArray) -> xr.DataArray:
        return _with_quantiles(self._blocks(values.variable, np.max), values)


@dataclass(frozen=True)
class Differences:
    """Differences between neighbours along one axis, of which fronts, shear, stability and
    tendencies are made. Longitude closes where the grid does."""

    axis: Axis

    @property
    def name(self) -> str:
        words = {"longitude": "zonal", "latitude": "meridional", "level": "vertical"}
        return f"{words.get(self.axis, 'temporal')}_difference"

    def applies(self, case: Case) -> bool:
        return case.truth.sizes.get(self.axis, 1) > 1

    def derive(self, values: xr.DataArray) -> xr.DataArray:
        field = values.variable
        if self._closes(values):
            return _with_quantiles(field.roll({self.axis: -1}) - field, values)
        first, second = slice(None, -1), slice(1, None)
        differences = field.isel({self.axis: second}) - field.isel({self.axis: first})
        return _with_quantiles(differences, values)

    def weights(self, weights: xr.DataArray) -> xr.DataArray:
        """The weights of the first of the two cells; 0 unless both are in the region."""
        if self.axis not in _CELL:
            return weights
        first = after = weights.variable
        if self._closes(weights):
            after = after.roll({self.axis: -1})
        else:
            first = first.isel({self.axis: slice(None, -1)})
            after = after.isel({self.axis: slice(1, None)})
        nowhere: Any = 0.0  # a number is what there is elsewhere, but not to the type checker
        return unlabelled(first.where(after > 0, nowhere))

    def _closes(self, values: xr.DataArray) -> bool:
        if self.axis != "longitude":
            return False
        lon = values["longitude"].to_numpy().astype(np.float64)
        return len(lon) > 2 and abs(len(lon) * (lon[1] - lon[0]) - 360.0) < 1e-2


Derived = AreaMeans | Differences


def of_quantity(case: Case, quantity: Derived) -> Case:
    """The prediction and truth of a derived quantity, which all scores of a case share."""

    def derive(case: Case) -> Case:
        quantiles = case.quantiles
        if quantiles is not None and isinstance(quantity, AreaMeans):
            quantiles = quantity.derive(quantiles)
        truth = quantity.derive(case.on_cells(case.observed))
        members = quantity.derive(case.on_cells(case.members))
        return Case(members, truth, quantiles=quantiles, are_draws=case.are_draws)

    return case.derived(quantity, derive)


def _with_quantiles(derived: xr.Variable, values: xr.DataArray) -> xr.DataArray:
    """A derived quantity; one of quantiles has their levels, by which they are found."""
    levels = {"quantile": values["quantile"]} if "quantile" in values.dims else {}
    return xr.DataArray(derived.data, levels, derived.dims)


def _by_cell(weights: xr.DataArray, case: Case) -> xr.DataArray:
    """Weights with a value for every cell, and the longitudes, of which some quantities ask whether
    they close the circle."""
    if "longitude" in weights.dims:
        return weights
    longitude = case.truth["longitude"]
    cells = weights.variable * xr.Variable("longitude", np.ones(longitude.size))
    return xr.DataArray(cells.data, {"longitude": longitude}, cells.dims)


@dataclass(frozen=True)
class OfDerived:
    """A score or diagnostic of single values, applied to a derived quantity."""

    score: Score | RankHistogram
    derived: Derived

    @property
    def name(self) -> str:
        return f"{self.score.name}_{self.derived.name}"

    def applies(self, case: Case) -> bool:
        return self.score.applies(case) and self.derived.applies(case)

    def per_time(self, case: Case, weights: xr.DataArray) -> xr.Dataset:
        weights = self.derived.weights(_by_cell(weights, case))
        return self.score.per_time(of_quantity(case, self.derived), weights)

    def value(self, means: xr.Dataset) -> Any:
        return self.score.value(means)


@dataclass(frozen=True)
class EnergyScore:
    """Energy score of a variable's whole field on every level, in the variable's units.

    mean_i |x_i - y| - sum_{i<j} |x_i - x_j| / (M (M - 1)), where the length of a field is the root
    of its area-weighted mean square; M^2 instead of M (M - 1) if members are no draws (see `Case`).
    Source: Gneiting and Raftery (2007), JASA 102, equation 22.
    """

    name: str = "energy_score"

    def applies(self, case: Case) -> bool:
        return case.num_members > 1

    def per_time(self, case: Case, weights: xr.DataArray) -> xr.Dataset:
        """All distances come from products of departures from the truth, which are small, so that
        nothing is lost in |a - b|^2 = |a|^2 + |b|^2 - 2 ab, and M^2 fields are never written."""
        count = case.num_members
        num_pairs = count * (count - 1 if case.is_fair else count)
        rest = [dim for dim in case.truth.dims if dim not in _CELL]
        departures = case.members - case.observed
        departures = departures.transpose(*rest, "member", *_CELL).to_numpy()
        there = np.asarray(np.isfinite(departures).all(axis=-3))
        flat = np.where(there[..., None, :, :], departures, 0.0).reshape(*departures.shape[:-2], -1)
        cells = _by_cell(weights, case).variable.transpose("region", *_CELL)
        weight = cells.to_numpy().reshape(cells.sizes["region"], -1)
        covered = there.reshape(*there.shape[:-2], -1) @ weight.T
        scores = np.full(covered.shape, np.nan)
        for region, of_region in enumerate(weight):
            area = np.where(covered[..., region] > 0, covered[..., region], np.nan)[..., None, None]
            products = (flat * of_region) @ flat.swapaxes(-1, -2) / area
            squares = np.diagonal(products, axis1=-2, axis2=-1)
            apart = squares[..., :, None] + squares[..., None, :] - 2.0 * products
            spread = np.sqrt(np.maximum(apart, 0.0)).sum((-2, -1)) / 2.0
            scores[..., region] = np.sqrt(squares).mean(-1) - spread / num_pairs
        return xr.Dataset({"energy": ((*rest, "region"), scores)})

    def value(self, means: xr.Dataset) -> xr.DataArray:
        return means["energy"]


@dataclass(frozen=True)
class VariogramScore:
    """Variogram score of order 1/2 of neighbours along longitude and latitude, in the variable's
    units: mean of (mean_i |x_i(a) - x_i(b)|^(1/2) - |y(a) - y(b)|^(1/2))^2.

    Source: Scheuerer and Hamill (2015), Monthly Weather Review 143, equation 8.
    """

    name: str = "variogram_score"
    axes: tuple[Differences, ...] = field(
        default=(Differences("longitude"), Differences("latitude")), repr=False
    )

    def applies(self, case: Case) -> bool:
        return case.num_members > 1 and all(axis.applies(case) for axis in self.axes)

    def per_time(self, case: Case, weights: xr.DataArray) -> xr.Dataset:
        weights = _by_cell(weights, case)
        parts = []
        for axis in self.axes:
            differences = of_quantity(case, axis)
            predicted = (abs(differences.members) ** 0.5).mean("member")
            observed = abs(differences.observed) ** 0.5
            of_axis = axis.weights(weights).variable
            parts.append(weighted_mean((predicted - observed) ** 2, of_axis))
        return xr.Dataset({"variogram": sum(parts[1:], start=parts[0]) / len(parts)})

    def value(self, means: xr.Dataset) -> xr.DataArray:
        return means["variogram"]


def quantities_of(statistic: object) -> list[Derived]:
    """The derived quantities that a score or diagnostic looks at, by name; none for most scores."""
    match statistic:
        case OfDerived(derived=quantity):
            return [quantity]
        case VariogramScore(axes=axes):
            return sorted(axes, key=lambda axis: axis.name)
    return []


BOX_SIZES = (4, 8)
DIFFERENCES = tuple(Differences(axis) for axis in ("longitude", "latitude", "level", "lead_time"))


def joint_scores(shift: int = 0) -> tuple[Score, ...]:
    """Scores of whole fields, of box means and of differences. shift: see `AreaMeans`."""
    boxes = [AreaMeans(size, shift) for size in BOX_SIZES]
    return (
        EnergyScore(),
        VariogramScore(),
        *(OfDerived(SpreadSkill(), derived) for derived in (*boxes, *DIFFERENCES)),
        *(OfDerived(Crps(), derived) for derived in boxes),
    )


def area_event_scores(level: float, shift: int = 0) -> tuple[Score, ...]:
    """Brier scores of events over areas: a box's mean or its maximum is above the record's
    quantile (for means: above the mean of its cells' quantiles). shift: see `AreaMeans`."""
    return tuple(OfDerived(Brier(level), kind(4, shift)) for kind in (AreaMeans, AreaMaxima))


def joint_rank_histograms(shift: int = 0) -> tuple[OfDerived, ...]:
    """Rank histograms of box means and of differences between neighbours. shift: see
    `AreaMeans`."""
    quantities = (AreaMeans(BOX_SIZES[0], shift), *DIFFERENCES[:2])
    return tuple(OfDerived(RankHistogram(), derived) for derived in quantities)
