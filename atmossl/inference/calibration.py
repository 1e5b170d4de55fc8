"""Calibrates ensembles after training: factors of their spread and of the waves of their mean, per
task, variable, level, lead time and band of zonal scales.

A factor of the spread makes the mean variance of the members, times (M + 1) / M, equal to the mean
square error of their mean (Fortin et al. 2014), on dates that the model was not trained on. The
factors are kept in the checkpoint's record and applied around the ensemble mean. In a rollout every
pass of a tail is inflated, so that members go on from calibrated states; of draws of noise the
first pass is, since later ones run member by member.

With one factor for all scales, members may have the right spread in every cell and the wrong one in
area means and in differences of neighbours. With bands, each has the spread that its errors have.

The ensemble mean stays as it is, but for waves shorter than the first band on rows that close the
circle and are wholly predicted. There each band is multiplied by the slope of the regression of the
truth on it, as in model output statistics (Glahn and Lowry 1972), here by scale. A network that
keeps too little of short waves gets back their amplitude, so that members have the truth's power.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from atmossl.batch import PRIMARY
from atmossl.data.segment import HOUR
from atmossl.geometry import EARTH_RADIUS_KM, Grid
from atmossl.inference.plan import BlendedPart, Fields, Plan
from atmossl.masking.tasks import Task

# Edges of bands for members that are draws of noise, beside those near the shortest waves of a grid
# (`scales_of`). Members of a tail get one factor for all scales: with bands the CRPS of the
# checkpoint `default` is a tenth larger.
SCALES_KM = (8000.0, 3000.0, 1700.0, 1260.0, 600.0, 300.0, 150.0)
_PER_OCTAVE, _OCTAVES = 4, 2  # so many edges in an octave, and octaves from the shortest wave on
_POLEMOST = 60.0  # degrees; closer to the poles cells are narrower than what a model resolves
_SOFT, _SHARP = 2, 8  # exponents of the filter
_CIRCUMFERENCE_KM = 2.0 * math.pi * EARTH_RADIUS_KM


@dataclass(frozen=True)
class SpreadInflation:
    """The factors of one kind of task.

    hours: [step] from the reference time. factors: [band step level] of every variable, of the
    spread, the band of the largest scales first. edges_km: wavelengths that part the bands,
    falling; without any, one factor goes for all scales. of_mean: as `factors`, of the waves of the
    ensemble mean; of no variable if it stays as it is.
    """

    hours: np.ndarray
    factors: Mapping[str, np.ndarray]
    edges_km: tuple[float, ...] = ()
    of_mean: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint_record: Mapping[str, Any], kind: str) -> "SpreadInflation | None":
        """The factors in a checkpoint's record; None if it was not calibrated for this kind of
        task."""
        stored = checkpoint_record.get("spread", {}).get(kind)
        if stored is None:
            return None
        factors = {name: np.array(values) for name, values in stored["factors"].items()}
        if "edges_km" not in stored:  # as up to version 0.5: one band, without its axis
            factors = {name: values[None] for name, values in factors.items()}
        of_mean = {name: np.array(values) for name, values in stored.get("of_mean", {}).items()}
        return cls(np.array(stored["hours"]), factors, tuple(stored.get("edges_km", ())), of_mean)

    def stored(self) -> dict[str, Any]:
        """The factors as a checkpoint's record keeps them."""
        factors, of_mean = (
            {name: values.tolist() for name, values in of.items()}
            for of in (self.factors, self.of_mean)
        )
        stored = {"hours": self.hours.tolist(), "edges_km": [*self.edges_km], "factors": factors}
        return stored | ({"of_mean": of_mean} if of_mean else {})

    def bands(self) -> list[str]:
        """The bands in words."""
        if not self.edges_km:
            return ["all scales"]
        return [
            f"waves over {self.edges_km[0]:g} km",
            *(f"waves of {short:g} to {long:g} km" for long, short in pairwise(self.edges_km)),
            f"waves under {self.edges_km[-1]:g} km",
        ]

    def applied(
        self, name: str, departures: np.ndarray, hours: np.ndarray, lat: np.ndarray, lon: np.ndarray
    ) -> np.ndarray:
        """The departures [step member level lat lon] of one variable from the ensemble mean at the
        given hours, times the factors: linear between the calibrated lead times and constant
        beyond."""
        factors = self._at(hours, self.factors[name])[:, :, None]
        if not self.edges_km:
            return factors[0] * departures
        predicted = np.ptp(departures, axis=1) > 0  # False of NaN; given values: equal members
        if not predicted.any():
            return departures
        bands = zonal_bands(departures, predicted[:, None], lat, lon, self.edges_km)
        scaled = sum(factor * band for factor, band in zip(factors, bands, strict=True))
        return np.where(predicted[:, None], scaled, departures)

    def applied_to_mean(
        self,
        name: str,
        mean: Float[np.ndarray, "step level lat lon"],
        predicted: Bool[np.ndarray, "step level lat lon"],
        hours: np.ndarray,
        lat: np.ndarray,
        lon: np.ndarray,
    ) -> Float[np.ndarray, "step level lat lon"]:
        """The ensemble mean of one variable with the waves of every band times their factor, on the
        rows that close the circle and are wholly predicted."""
        whole = whole_rows(predicted, lat, lon)
        if name not in self.of_mean or not whole.any():
            return mean
        bands = zonal_bands(mean, whole, lat, lon, self.edges_km)
        added = self._at(hours, self.of_mean[name]) - 1.0
        moved = sum(factor * band for factor, band in zip(added, bands, strict=True))
        return mean + np.where(whole, moved, 0.0).astype(mean.dtype)

    def _at(
        self, hours: np.ndarray, factors: Float[np.ndarray, "band step level"]
    ) -> Float[np.ndarray, "band step level 1 1"]:
        """Factors at some hours."""
        at_hours = [
            [np.interp(hours, self.hours, by_step) for by_step in band.T] for band in factors
        ]
        return np.array(at_hours, np.float32).swapaxes(1, 2)[..., None, None]


def whole_rows(
    predicted: Bool[np.ndarray, "*axes lat lon"], lat: np.ndarray, lon: np.ndarray
) -> Bool[np.ndarray, "*axes lat lon"]:
    """Where a row closes the circle and all its cells are predicted."""
    whole = predicted.all(axis=-1, keepdims=True) & Grid(lat, lon).periodic
    return np.broadcast_to(whole, predicted.shape)


def zonal_bands(
    fields: Float[np.ndarray, "*axes lat lon"],
    where: Bool[np.ndarray, "*axes lat lon"],
    lat: np.ndarray,
    lon: np.ndarray,
    edges_km: tuple[float, ...],
) -> list[Float[np.ndarray, "*axes lat lon"]]:
    """Fields split by zonal scale into bands whose sum they are, the largest scales first.

    The filter goes along circles of latitude and keeps half the amplitude of a wave that is as long
    as the edge: the share 2^-(edge / length)^n of any wave. It needs no neighbouring rows, so the
    bands do not depend on the tiles in which a prediction was computed. On a row that closes the
    circle and counts everywhere, n is 8, since power falls so steeply with wavenumber that a soft
    filter would leave most of a short band to longer waves. On other rows n is 2, a Gaussian, and
    only cells of `where` count (normalised convolution, Knutsson and Westin 1993); elsewhere all
    bands are 0.

    fields: [... lat lon]. where: the same, or with axes of size 1. lat, lon: centres, degrees.
    edges_km: falling.
    """
    grid = Grid(lat, lon)
    size = len(lon) if grid.periodic else 2 * len(lon)  # zeros beyond the ends do not count
    circle_km = grid.longitude_spacing * size / 360.0 * _CIRCUMFERENCE_KM
    circle_km = circle_km * np.cos(np.deg2rad(lat)).clip(1e-6)
    per_km = np.arange(size // 2 + 1) / circle_km[:, None]  # of every wave: 1 / its length

    inside = np.where(where, fields, 0.0)
    is_whole = grid.periodic & where.all(axis=-1, keepdims=True)
    waves, waves_of_share = np.fft.rfft(inside, size), np.fft.rfft(where.astype(float), size)

    def smooth(spectrum: np.ndarray, edge: float, exponent: int) -> np.ndarray:
        lengths = (edge * per_km).clip(max=100.0)  # of the edge in waves; of more, nothing is kept
        return np.fft.irfft(spectrum * np.exp2(-(lengths**exponent)), size)[..., : len(lon)]

    def longer(edge: float) -> np.ndarray:
        if is_whole.all():
            return smooth(waves, edge, _SHARP)
        soft = smooth(waves, edge, _SOFT) / smooth(waves_of_share, edge, _SOFT).clip(1e-6)
        if is_whole.any():
            soft = np.where(is_whole, smooth(waves, edge, _SHARP), soft)
        return np.where(where, soft, 0.0)

    kept = [*map(longer, edges_km), inside]
    bands = [kept[0], *(more - less for less, more in pairwise(kept))]
    return [band.astype(fields.dtype) for band in bands]


@dataclass(frozen=True)
class Calibration:
    """The calibrated spread of one task, from a checkpoint's record.

    A union of tasks takes the factors of its parts. Where several parts hide the same cell, the
    part that gives the largest spread counts. If the union is calibrated itself, its own factors
    come on top.
    """

    checkpoint_record: Mapping[str, Any]
    task: Task

    def apply(
        self,
        fields: Fields,
        hours: np.ndarray,
        lat: np.ndarray,
        lon: np.ndarray,
        *,
        centre: int | None = None,
    ) -> Fields:
        """Inflate fields [step member level lat lon] at the given hours from the reference time
        and the given cell centres, degrees. centre: around the mean of so many first members,
        so that no further member changes them; None: of all."""
        inflated, own = {}, SpreadInflation.of(self.checkpoint_record, self.task.kind)
        for name, values in fields.items():
            mean = values[:, :centre].mean(axis=1, keepdims=True)
            departures = values - mean
            moved = _moved(
                self.checkpoint_record, self.task, name, departures, hours, lat, lon, centre
            )
            if own is not None:
                predicted = np.ptp(values, axis=1) > 0
                mean = own.applied_to_mean(name, mean[:, 0], predicted, hours, lat, lon)[:, None]
            inflated[name] = values if moved is None else mean + moved
        return inflated

    def without_own(self) -> dict[str, Any]:
        """The record as if the task's kind had not been calibrated."""
        spread = self.checkpoint_record.get("spread", {})
        other_kinds = {kind: factors for kind, factors in spread.items() if kind != self.task.kind}
        return {**self.checkpoint_record, "spread": other_kinds}

    def replaced(self, inflation: SpreadInflation) -> dict[str, Any]:
        """The record with these factors for the task's kind; factors of other kinds stay."""
        spread = self.checkpoint_record.get("spread", {})
        return {
            **self.checkpoint_record,
            "spread": {**spread, self.task.kind: inflation.stored()},
        }


def _moved(
    checkpoint_record: Mapping[str, Any],
    task: Task,
    name: str,
    departures: Float[np.ndarray, "step member level lat lon"],
    hours: np.ndarray,
    lat: np.ndarray,
    lon: np.ndarray,
    centre: int | None,
) -> Float[np.ndarray, "step member level lat lon"] | None:
    """The departures of one variable from the ensemble mean as the task's factors make them; None
    if it has none."""
    moved, largest = None, np.full(1, -np.inf)
    for part in task.components:
        of_part = _moved(checkpoint_record, part, name, departures, hours, lat, lon, centre)
        if of_part is None:
            continue
        variance = of_part[:, :centre].var(axis=1, keepdims=True)
        variance = np.where(part.cells(lat, lon), variance, -np.inf)
        moved = np.where(variance > largest, of_part, departures if moved is None else moved)
        largest = np.maximum(variance, largest)
    inflation = SpreadInflation.of(checkpoint_record, task.kind)
    if inflation is None:
        return moved
    return inflation.applied(name, departures if moved is None else moved, hours, lat, lon)


@dataclass
class _Sums:
    """Sums over dates and predicted cells that have a truth, [step level band band]: products of
    the errors of the ensemble mean in two bands, and the covariances that should equal them. Of
    rows that are wholly predicted also products of the mean itself in two bands, of the mean and
    its error, and the part of the former that further members would take away (`sampling`)."""

    error: np.ndarray
    variance: np.ndarray
    mean: np.ndarray
    mean_error: np.ndarray
    sampling: np.ndarray

    @classmethod
    def zeros(cls, num_steps: int, num_levels: int, num_bands: int) -> "_Sums":
        shape = (num_steps, num_levels, num_bands, num_bands)
        return cls(*(np.zeros(shape) for _ in range(5)))

    def add(
        self,
        row: int,
        members: np.ndarray,
        truth: np.ndarray,
        weight: np.ndarray,
        lat: np.ndarray,
        lon: np.ndarray,
        edges_km: tuple[float, ...],
    ) -> None:
        """Add one step: members [member level lat lon], truth [level lat lon] and weight
        [lat 1]."""

        def split(fields: np.ndarray, where: np.ndarray) -> np.ndarray:
            values = np.nan_to_num(fields).astype(np.float64)
            return np.stack(zonal_bands(values, where, lat, lon, edges_km))

        counted = (np.ptp(members, axis=0) > 0) & np.isfinite(truth)  # given values: equal members
        mean, num_members = members.mean(axis=0), len(members)
        departure = split(members - mean, counted[None])
        share = np.where(counted, weight, 0.0)
        products = partial(np.einsum, "amxyz,bmxyz,xyz->xab", optimize=True)
        error = split(mean - truth, counted)[:, None]
        self.error[row] += products(error, error, share)
        finite_size = (num_members + 1) / num_members / (num_members - 1)
        self.variance[row] += finite_size * products(departure, departure, share)
        whole = whole_rows(counted, lat, lon)
        if edges_km and whole.any():
            bands, share = split(mean, whole)[:, None], np.where(whole, weight, 0.0)
            self.mean[row] += products(bands, bands, share)
            self.mean_error[row] += products(bands, error, share)
            of_one = products(departure, departure, share) / (num_members - 1)
            self.sampling[row] += of_one / num_members

    def slopes(self) -> Float[np.ndarray, "step level band"]:
        """Slopes of the regression of the truth on every band of the mean that very many members
        would have; 1 for the first band, which holds the mean state, and where no row is wholly
        predicted. The mean of a few members holds a part of their departures, which says nothing
        about the truth: it is taken off, of the product of mean and error as of the mean's own
        variance, of which a quarter at least stays."""
        mean, sampling = _diagonal(self.mean), _diagonal(self.sampling)
        lacking = sampling - _diagonal(self.mean_error)
        of_many = np.maximum(mean - sampling, mean / 4)
        slopes = 1.0 + np.divide(lacking, of_many, out=np.zeros_like(mean), where=of_many > 0)
        slopes[..., 0] = 1.0
        return slopes

    def factors(
        self, slopes: Float[np.ndarray, "step level band"]
    ) -> Float[np.ndarray, "band step level"]:
        """The factors of the spread around the mean with its slopes; 1 where nothing was predicted.
        Those of the bands are in the ratio of error to spread in each, and such that the variance
        of single cells is right, too."""
        added = slopes - 1.0
        crossed = added[..., :, None] * self.mean_error
        of_mean = added[..., :, None] * self.mean * added[..., None, :]
        error = self.error + crossed + crossed.swapaxes(-2, -1) + of_mean
        by_band = _root_of_ratio(_diagonal(error), _diagonal(self.variance))
        scaled = by_band[..., :, None] * by_band[..., None, :] * self.variance
        common = _root_of_ratio(error.sum(axis=(-2, -1)), scaled.sum(axis=(-2, -1)))
        return np.moveaxis(by_band * common[..., None], -1, 0)


def _diagonal(sums: np.ndarray) -> np.ndarray:
    return np.diagonal(sums, axis1=-2, axis2=-1)


def _root_of_ratio(error: np.ndarray, variance: np.ndarray) -> np.ndarray:
    ratio = np.divide(error, variance, out=np.ones_like(error), where=variance > 0)
    return np.sqrt(ratio)


def estimate_inflation(
    plan: Plan,
    times: np.ndarray,
    parts: Iterable[BlendedPart],
    edges_km: tuple[float, ...] = (),
) -> SpreadInflation:
    """Estimate the factors from all given times. parts: the plan's predictions at these times.
    edges_km: wavelengths that part the bands, falling.

    Raises:
        ValueError: a single member, or a task of whose prediction the store holds no truth.
    """
    check_calibrated(plan.task)
    check_scales(edges_km, plan.grid)
    if plan.trained.checkpoint_record.get("model", {}).get("num_members") == 1:
        raise ValueError("calibrate: the checkpoint has one member, so no spread")
    leads = plan.leads
    hours = leads / HOUR
    levels = plan.trained.level_values
    sums: dict[str, _Sums] = {}
    for part in parts:
        if part.data != PRIMARY:
            continue  # streams of other sources keep the spread that they have
        segment = plan.find(times[part.case]).segment
        weight = plan.grid.weights[part.rows][:, None]
        place = plan.grid.latitude[part.rows], plan.grid.longitude
        for name, values in part.fields.items():
            num_members, num_levels = values.shape[1:3]
            if num_members < 2:
                raise ValueError("calibrate: the checkpoint has one member, so no spread")
            zeros = _Sums.zeros(len(leads), num_levels, len(edges_km) + 1)
            of_variable = sums.setdefault(name, zeros)
            for step, lead in enumerate(part.leads):
                row = int(np.flatnonzero(leads == lead)[0])
                valid = segment.find_time(times[part.case] + lead)
                truth = segment.read(
                    name, levels[name], valid, 1, segment.whole(), within_limits=True
                )[:, 0, part.rows]
                of_variable.add(row, values[step], truth, weight, *place, edges_km)
    if not any(of_variable.variance.any() for of_variable in sums.values()):
        raise ValueError("calibrate: the store has no truth where the task predicts")
    order = np.argsort(hours)
    slopes = {name: of_variable.slopes()[order] for name, of_variable in sums.items()}
    factors = {name: sums[name].factors(sums[name].slopes())[:, order] for name in sums}
    of_mean = {name: np.moveaxis(values, -1, 0) for name, values in slopes.items()}
    is_moved = any((values != 1.0).any() for values in of_mean.values())
    return SpreadInflation(hours[order], factors, edges_km, of_mean if is_moved else {})


def scales_of(grid: Grid) -> tuple[float, ...]:
    """The edges of bands for members that are fields: a few for the long waves, and a quarter of an
    octave apart over two octaves from the shortest waves of the grid on, where power falls by
    orders of magnitude within an octave and a network keeps less of every shorter wave."""
    shortest = _shortest_wave_km(grid)
    near = [shortest * 2.0 ** (n / _PER_OCTAVE) for n in range(_OCTAVES * _PER_OCTAVE, 0, -1)]
    return (*(edge for edge in SCALES_KM if edge > near[0]), *(float(round(edge)) for edge in near))


def check_scales(edges_km: tuple[float, ...], grid: Grid) -> None:
    """Raise ValueError for a wave that is longer than the equator, or shorter than any of a grid up
    to 60 degrees."""
    shortest = _shortest_wave_km(grid)
    wrong = [edge for edge in edges_km if not shortest <= edge <= _CIRCUMFERENCE_KM]
    if wrong:
        raise ValueError(
            f"scales_km={wrong[0]:g}: valid: from {math.ceil(shortest)}, the shortest wave of this "
            f"grid up to {_POLEMOST:g} degrees, to {_CIRCUMFERENCE_KM:.0f} km"
        )


def _shortest_wave_km(grid: Grid) -> float:
    latitude = min(float(np.abs(grid.latitude).max()), _POLEMOST)
    on_equator = 2.0 * _CIRCUMFERENCE_KM * grid.longitude_spacing / 360.0
    return on_equator * math.cos(math.radians(latitude))


def check_calibrated(task: Task) -> None:
    """Raise ValueError for a task of whose prediction no store holds the truth."""
    why = None
    if task.true_task is not task:
        why = "a counterfactual has no truth; calibrate its task, whose factors it takes"
    elif task.coarse_factor > 1:
        why = "task.coarse_input=true has no truth; calibrate the task on a fine store"
    if why is not None:
        raise ValueError(f"calibrate: {why}")
