"""Calibrates ensembles after training: factors of their spread and of the waves of their mean, per
task, variable, level, lead time, band of zonal waves and zone of latitude.

A factor of the spread makes the variance of the members equal to the mean square error of their
mean on dates that the model was not trained on. That error holds a part that more members would
take away (Fortin et al. 2014, section 3); it is taken off for draws of noise. The factors are kept
in the checkpoint's record and applied around the ensemble mean. In a rollout every pass of a tail
is inflated, so that members go on from calibrated states; of draws of noise the first pass is,
since later ones run member by member.

With one factor for all scales, members may have the right spread in every cell and the wrong one in
area means and in differences of neighbours. With bands, each has the spread that its errors have.
Bands are parted by the length of waves in degrees of longitude, not in km: what a network does not
resolve are waves of a few of its cells, whatever their length.

With bands the ensemble mean is scaled, too: each of its bands but the first is multiplied by the
slope of the regression of the truth on it, on rows that close the circle and are wholly predicted.
This is model output statistics (Glahn and Lowry 1972) by scale. The slope is below 1 where the mean
has waves that the truth has not, such as those of the edges of coarse cells, and above 1 where its
waves are too weak. Members then have the truth's power.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from atmossl.batch import PRIMARY
from atmossl.data.segment import HOUR
from atmossl.geometry import EARTH_RADIUS_KM, Grid, closes_circle
from atmossl.inference.plan import BlendedPart, Fields, Plan
from atmossl.masking.tasks import Task

# Bands of members that are draws of noise (`scales_of`), and the latitudes between which their
# factors are linear. Members of a tail get one factor for all scales and latitudes: with bands the
# CRPS of the checkpoint `default` is a tenth larger.
_LONGEST, _PER_OCTAVE, _OCTAVES = 120.0, 6, 2
_ZONES = (-45.0, 0.0, 45.0)
_SOFT, _SHARP = 2, 8  # exponents of the filter
_KM_PER_DEGREE = math.pi * EARTH_RADIUS_KM / 180.0


@dataclass(frozen=True)
class CalibrationFactors:
    """The factors of one kind of task.

    hours: [step] from the reference time. spread: [zone band step level] of every variable, the
    band of the longest waves first. mean: the same, of the waves of the ensemble mean; of no
    variable if it stays as it is. edges: lengths of waves that part the bands, degrees of
    longitude, falling; without any, one factor goes for all scales. zones: latitudes between which
    factors are linear, beyond which they are constant; without any, one factor goes for all.
    edges_in_km: whether edges are lengths in km, as up to version 0.7.
    """

    hours: np.ndarray
    spread: Mapping[str, np.ndarray]
    mean: Mapping[str, np.ndarray] = field(default_factory=dict)
    edges: tuple[float, ...] = ()
    zones: tuple[float, ...] = ()
    edges_in_km: bool = False

    @classmethod
    def of(cls, checkpoint_record: Mapping[str, Any], kind: str) -> "CalibrationFactors | None":
        """The factors in a checkpoint's record; None if it was not calibrated for this kind of
        task."""
        stored = checkpoint_record.get("spread", {}).get(kind)
        if stored is None:
            return None
        spread, mean = (
            {name: np.array(values) for name, values in stored.get(key, {}).items()}
            for key in ("factors", "mean_factors")
        )
        # up to version 0.7 all latitudes had one factor, up to 0.5 all scales, without these axes
        spread = {n: values[(None,) * (4 - values.ndim)] for n, values in spread.items()}
        return cls(
            np.array(stored["hours"]),
            spread,
            mean,
            tuple(stored.get("edges_deg", stored.get("edges_km", ()))),
            tuple(stored.get("zones", ())),
            "edges_km" in stored,
        )

    def stored(self) -> dict[str, Any]:
        """Factors that were estimated now, as a checkpoint's record keeps them."""
        kept = {"factors": self.spread, "mean_factors": self.mean}
        return {
            "hours": self.hours.tolist(),
            "edges_deg": [*self.edges],
            "zones": [*self.zones],
            **{
                key: {name: values.tolist() for name, values in by_variable.items()}
                for key, by_variable in kept.items()
            },
        }

    def bands(self) -> list[str]:
        """The bands in words."""
        if not self.edges:
            return ["all scales"]
        unit = "km" if self.edges_in_km else "degrees"
        return [
            f"waves over {self.edges[0]:g} {unit}",
            *(f"waves of {short:g} to {long:g} {unit}" for long, short in pairwise(self.edges)),
            f"waves under {self.edges[-1]:g} {unit}",
        ]

    def applied(
        self, name: str, departures: np.ndarray, hours: np.ndarray, lat: np.ndarray, lon: np.ndarray
    ) -> np.ndarray:
        """The departures [step member level lat lon] of one variable from the ensemble mean at the
        given hours, times the factors: linear between the calibrated lead times and constant
        beyond."""
        factors = self._at(hours, lat, self.spread[name])[:, :, None]
        if not self.edges:
            return factors[0] * departures
        predicted = np.ptp(departures, axis=1) > 0  # False of NaN; given values: equal members
        if not predicted.any():
            return departures
        bands = zonal_bands(departures, predicted[:, None], lon, self._edges(lat))
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
        whole = whole_rows(predicted, lon)
        if name not in self.mean or not whole.any():
            return mean
        bands = zonal_bands(mean, whole, lon, self._edges(lat))
        added = self._at(hours, lat, self.mean[name]) - 1.0
        moved = sum(factor * band for factor, band in zip(added, bands, strict=True))
        return mean + np.where(whole, moved, 0.0).astype(mean.dtype)

    def _at(
        self, hours: np.ndarray, lat: np.ndarray, factors: Float[np.ndarray, "zone band step level"]
    ) -> Float[np.ndarray, "band step level lat 1"]:
        """Factors at some hours and latitudes."""
        at_hours = np.apply_along_axis(lambda f: np.interp(hours, self.hours, f), 2, factors)
        at_rows = np.einsum("zbsk,zy->bsky", at_hours, zone_weights(lat, self.zones))
        return at_rows[..., None].astype(np.float32)

    def _edges(self, lat: np.ndarray) -> Sequence[Any]:
        """The edges in degrees of longitude, of every row if they are lengths in km."""
        if not self.edges_in_km:
            return self.edges
        km_per_degree = _KM_PER_DEGREE * np.cos(np.deg2rad(lat)).clip(1e-6)
        return [edge / km_per_degree for edge in self.edges]


def zone_weights(lat: np.ndarray, zones: tuple[float, ...]) -> Float[np.ndarray, "zone lat"]:
    """How much the factor of every zone counts on every row: linear between the latitudes of two
    zones, and constant beyond the outermost; their sum is 1. Without zones, one for all rows."""
    if not zones:
        return np.ones((1, len(lat)))
    return np.stack([np.interp(lat, zones, of_zone) for of_zone in np.eye(len(zones))])


def whole_rows(
    predicted: Bool[np.ndarray, "*axes lat lon"], lon: np.ndarray
) -> Bool[np.ndarray, "*axes lat lon"]:
    """Where a row closes the circle and all its cells are predicted."""
    whole = predicted.all(axis=-1, keepdims=True) & closes_circle(lon)
    return np.broadcast_to(whole, predicted.shape)


def zonal_bands(
    fields: Float[np.ndarray, "*axes lat lon"],
    where: Bool[np.ndarray, "*axes lat lon"],
    lon: np.ndarray,
    edges: Sequence[float | Float[np.ndarray, "lat"]],
) -> Iterator[Float[np.ndarray, "*axes lat lon"]]:
    """Fields split by zonal scale into bands whose sum they are, the largest scales first.

    The filter goes along circles of latitude and keeps half the amplitude of a wave that is as long
    as the edge: the share 2^-(edge / length)^n of any wave. It needs no neighbouring rows, so the
    bands do not depend on the tiles in which a prediction was computed. On a row that closes the
    circle and counts everywhere, n is 8, since power falls so steeply with wavenumber that a soft
    filter would leave most of a short band to longer waves. On other rows n is 2, a Gaussian, and
    only cells of `where` count (normalised convolution, Knutsson and Westin 1993); elsewhere all
    bands are 0.

    fields: [... lat lon]. where: the same, or with axes of size 1. lon: centres, degrees. edges:
    lengths in degrees of longitude, falling, of all rows or one for each.
    """
    spacing, is_circle = lon[1] - lon[0], closes_circle(lon)
    size = len(lon) if is_circle else 2 * len(lon)  # zeros beyond the ends do not count
    per_degree = np.arange(size // 2 + 1) / (spacing * size)  # of every wave: 1 / its length
    inside = np.where(where, fields, 0.0)
    is_whole = is_circle & where.all(axis=-1, keepdims=True)
    waves, waves_of_share = np.fft.rfft(inside, size), np.fft.rfft(where.astype(float), size)

    def smooth(spectrum: np.ndarray, edge: float | np.ndarray, exponent: int) -> np.ndarray:
        in_waves = np.asarray(edge)[..., None] * per_degree
        kept = np.exp2(-(in_waves.clip(max=100.0) ** exponent))  # nothing of shorter waves
        return np.fft.irfft(spectrum * kept, size)[..., : len(lon)]

    def longer(edge: float | np.ndarray) -> np.ndarray:
        if is_whole.all():
            return smooth(waves, edge, _SHARP)
        soft = smooth(waves, edge, _SOFT) / smooth(waves_of_share, edge, _SOFT).clip(1e-6)
        if is_whole.any():
            soft = np.where(is_whole, smooth(waves, edge, _SHARP), soft)
        return np.where(where, soft, 0.0)

    less: Any = 0.0
    for more in chain(map(longer, edges), [inside]):
        yield (more - less).astype(fields.dtype)  # one after another, since each is a whole field
        less = more


@dataclass(frozen=True)
class Calibration:
    """The calibrated spread and mean of one task, from a checkpoint's record.

    A union of tasks takes the factors of its parts for the spread; its mean has factors of its own
    alone. Where several parts hide the same cell, the part that gives the largest spread counts. If
    the union is calibrated itself, its own factors come on top.
    """

    checkpoint_record: Mapping[str, Any]
    task: Task

    @cached_property
    def factors(self) -> dict[str, CalibrationFactors]:
        """The factors of the task and of its parts, by their kinds, as far as there are any."""
        found = {
            kind: CalibrationFactors.of(self.checkpoint_record, kind) for kind in _kinds(self.task)
        }
        return {kind: factors for kind, factors in found.items() if factors is not None}

    def apply(
        self,
        fields: Fields,
        hours: np.ndarray,
        lat: np.ndarray,
        lon: np.ndarray,
        *,
        centre: int | None = None,
    ) -> Fields:
        """Calibrate fields [step member level lat lon] at the given hours from the reference time
        and the given cell centres, degrees. centre: around the mean of so many first members,
        so that no further member changes them; None: of all."""
        if not self.factors:
            return fields
        calibrated, own = {}, self.factors.get(self.task.kind)
        for name, values in fields.items():
            mean = values[:, :centre].mean(axis=1, keepdims=True)
            moved = self._moved(self.task, name, values - mean, hours, lat, lon, centre)
            if own is not None and name in own.mean:
                predicted = np.ptp(values, axis=1) > 0
                mean = own.applied_to_mean(name, mean[:, 0], predicted, hours, lat, lon)[:, None]
            calibrated[name] = values if moved is None else mean + moved
        return calibrated

    def _moved(
        self,
        task: Task,
        name: str,
        departures: Float[np.ndarray, "step member level lat lon"],
        hours: np.ndarray,
        lat: np.ndarray,
        lon: np.ndarray,
        centre: int | None,
    ) -> Float[np.ndarray, "step member level lat lon"] | None:
        """The departures of one variable from the ensemble mean as the factors of a task make them;
        None if it has none."""
        moved, largest = None, np.full(1, -np.inf)
        for part in task.components:
            of_part = self._moved(part, name, departures, hours, lat, lon, centre)
            if of_part is None:
                continue
            variance = of_part[:, :centre].var(axis=1, keepdims=True)
            variance = np.where(part.cells(lat, lon), variance, -np.inf)
            moved = np.where(variance > largest, of_part, departures if moved is None else moved)
            largest = np.maximum(variance, largest)
        own = self.factors.get(task.kind)
        if own is None:
            return moved
        return own.applied(name, departures if moved is None else moved, hours, lat, lon)

    def without_own(self) -> dict[str, Any]:
        """The record as if the task's kind had not been calibrated."""
        spread = self.checkpoint_record.get("spread", {})
        other_kinds = {kind: factors for kind, factors in spread.items() if kind != self.task.kind}
        return {**self.checkpoint_record, "spread": other_kinds}

    def replaced(self, factors: CalibrationFactors) -> dict[str, Any]:
        """The record with these factors for the task's kind; factors of other kinds stay."""
        spread = self.checkpoint_record.get("spread", {})
        return {
            **self.checkpoint_record,
            "spread": {**spread, self.task.kind: factors.stored()},
        }


def _kinds(task: Task) -> Iterator[str]:
    """The kinds of a task and of its parts."""
    yield task.kind
    for part in task.components:
        yield from _kinds(part)


@dataclass
class _Sums:
    """Sums over dates and predicted cells that have a truth, [zone step level band band]: products
    of the errors of the ensemble mean in two bands, and the covariances of the members. Of rows
    that are wholly predicted also products of the mean itself in two bands, of the mean and its
    error, and the covariances there. are_draws: members are draws, whose mean errs by a part of
    their variance."""

    lat: np.ndarray
    lon: np.ndarray
    edges: tuple[float, ...]
    zones: tuple[float, ...]
    num_steps: int
    num_levels: int
    num_members: int
    are_draws: bool = True

    def __post_init__(self) -> None:
        num_zones, num_bands = max(1, len(self.zones)), len(self.edges) + 1
        shape = (num_zones, self.num_steps, self.num_levels, num_bands, num_bands)
        self.error, self.variance = np.zeros(shape), np.zeros(shape)
        self.mean, self.mean_error, self.whole_variance = (np.zeros(shape) for _ in range(3))

    @property
    def sampled(self) -> float:
        """The part of the variance of one draw by which the mean of all varies."""
        return 1.0 / self.num_members if self.are_draws else 0.0

    def add(
        self, row: int, rows: slice, members: np.ndarray, truth: np.ndarray, weight: np.ndarray
    ) -> None:
        """Add some rows of one step: members [member level lat lon], truth [level lat lon] and the
        weight of every row [lat]."""
        zones = zone_weights(self.lat[rows], self.zones) * weight

        def split(fields: np.ndarray, where: np.ndarray) -> np.ndarray:
            values = np.nan_to_num(fields).astype(np.float64)
            return np.stack([*zonal_bands(values, where, self.lon, self.edges)])

        def by_row(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
            return np.einsum("amkyx,bmkyx->kyab", ours, theirs, optimize=True)

        def by_zone(products: np.ndarray) -> np.ndarray:
            return np.einsum("zy,kyab->zkab", zones, products)

        counted = (np.ptp(members, axis=0) > 0) & np.isfinite(truth)  # given values: equal members
        mean = members.mean(axis=0)
        departures = split(members - mean, counted[None])  # bands are 0 where nothing counts
        error = split(mean - truth, counted)[:, None]
        covariance = by_row(departures, departures) / (self.num_members - 1)
        self.error[:, row] += by_zone(by_row(error, error))
        self.variance[:, row] += by_zone(covariance)
        whole = whole_rows(counted, self.lon)
        if self.edges and whole.any():
            bands = split(mean, whole)[:, None]
            self.mean[:, row] += by_zone(by_row(bands, bands))
            self.mean_error[:, row] += by_zone(by_row(bands, error))
            self.whole_variance[:, row] += by_zone(covariance * whole[..., :1, None])

    def slopes(self) -> Float[np.ndarray, "zone step level band"]:
        """Slopes of the regression of the truth on every band of the mean that very many members
        would have; 1 for the first band, which holds the mean state, and where no row is wholly
        predicted. The mean of a few draws holds a part of their departures, which says nothing
        about the truth: it is taken off, of the product of mean and error as of the mean's own
        variance, of which a quarter at least stays. A slope that is estimated from few dates may be
        far off, so all are kept between 0 and 4."""
        mean, sampling = _diagonal(self.mean), self.sampled * _diagonal(self.whole_variance)
        lacking = sampling - _diagonal(self.mean_error)
        of_many = np.maximum(mean - sampling, mean / 4)
        slopes = 1.0 + np.divide(lacking, of_many, out=np.zeros_like(mean), where=of_many > 0)
        slopes[..., 0] = 1.0
        return slopes.clip(0.0, 4.0)

    def factors(
        self, slopes: Float[np.ndarray, "zone step level band"]
    ) -> Float[np.ndarray, "zone band step level"]:
        """The factors of the spread around the mean with its slopes; 1 where nothing was predicted.
        Those of the bands are in the ratio of error to spread in each, and such that the variance
        of single cells is right, too."""
        added = slopes - 1.0
        crossed = added[..., :, None] * self.mean_error
        of_mean = added[..., :, None] * self.mean * added[..., None, :]
        error = self.error + crossed + crossed.swapaxes(-2, -1) + of_mean
        error = error - slopes[..., :, None] * self.sampled * self.variance * slopes[..., None, :]
        finite_size = 1.0 if self.are_draws else (self.num_members + 1) / self.num_members
        variance = finite_size * self.variance
        by_band = _root_of_ratio(_diagonal(error), _diagonal(variance))
        scaled = by_band[..., :, None] * by_band[..., None, :] * variance
        common = _root_of_ratio(error.sum(axis=(-2, -1)), scaled.sum(axis=(-2, -1)))
        return np.moveaxis(by_band * common[..., None], -1, 1)


def _diagonal(sums: np.ndarray) -> np.ndarray:
    return np.diagonal(sums, axis1=-2, axis2=-1)


def _root_of_ratio(error: np.ndarray, variance: np.ndarray) -> np.ndarray:
    ratio = np.divide(error, variance, out=np.ones_like(error), where=variance > 0)
    return np.sqrt(ratio.clip(min=0.0))


def estimate_factors(
    plan: Plan, times: np.ndarray, parts: Iterable[BlendedPart], edges: tuple[float, ...] = ()
) -> CalibrationFactors:
    """Estimate the factors from all given times. parts: the plan's predictions at these times.
    edges: lengths of waves that part the bands, degrees of longitude, falling; with them every zone
    of latitude has factors of its own.

    Raises:
        ValueError: a single member, or a task of whose prediction the store holds no truth.
    """
    check_calibrated(plan.task)
    check_scales(edges, plan.grid)
    if plan.trained.checkpoint_record.get("model", {}).get("num_members") == 1:
        raise ValueError("calibrate: the checkpoint has one member, so no spread")
    zones = _ZONES if edges else ()
    sums = _summed(plan, times, parts, edges, zones)
    if not any(of_variable.variance.any() for of_variable in sums.values()):
        raise ValueError("calibrate: the store has no truth where the task predicts")
    hours = plan.leads / HOUR
    order = np.argsort(hours)
    spread, mean = {}, {}
    for name, of_variable in sums.items():
        slopes = of_variable.slopes()
        spread[name] = of_variable.factors(slopes)[:, :, order]
        if (slopes != 1.0).any():
            mean[name] = np.moveaxis(slopes, -1, 1)[:, :, order]
    return CalibrationFactors(hours[order], spread, mean, edges, zones)


def _summed(
    plan: Plan,
    times: np.ndarray,
    parts: Iterable[BlendedPart],
    edges: tuple[float, ...],
    zones: tuple[float, ...],
) -> dict[str, _Sums]:
    """The sums of every variable over all parts; ValueError for a single member."""
    leads, levels, sums = plan.leads, plan.trained.level_values, {}
    for part in parts:
        if part.data != PRIMARY:
            continue  # streams of other sources keep the spread that they have
        segment = plan.find(times[part.case]).segment
        for name, values in part.fields.items():
            num_members, num_levels = values.shape[1:3]
            if num_members < 2:
                raise ValueError("calibrate: the checkpoint has one member, so no spread")
            if name not in sums:
                place = plan.grid.latitude, plan.grid.longitude
                size = len(leads), num_levels, num_members
                sums[name] = _Sums(*place, edges, zones, *size, plan.trained.model.any_member)
            for step, lead in enumerate(part.leads):
                row = int(np.flatnonzero(leads == lead)[0])
                valid = segment.find_time(times[part.case] + lead)
                truth = segment.read(
                    name, levels[name], valid, 1, segment.whole(), within_limits=True
                )[:, 0, part.rows]
                weight = plan.grid.weights[part.rows]
                sums[name].add(row, part.rows, values[step], truth, weight)
    return sums


def scales_of(grid: Grid) -> tuple[float, ...]:
    """The edges of bands for members that are fields, degrees of longitude: halved from 120 on, and
    a sixth of an octave apart over two octaves from the shortest waves of the grid on, where power
    falls by orders of magnitude within an octave and a network keeps less of every shorter wave."""
    shortest = 2.0 * grid.longitude_spacing
    near = [shortest * 2.0 ** (n / _PER_OCTAVE) for n in range(_OCTAVES * _PER_OCTAVE, 0, -1)]
    halvings = max(0, math.ceil(math.log2(_LONGEST / near[0])))
    far = [_LONGEST / 2.0**n for n in range(halvings)]
    return tuple(float(f"{edge:.3g}") for edge in (*far, *near))


def check_scales(edges: tuple[float, ...], grid: Grid) -> None:
    """Raise ValueError for a wave that is longer than the circle, or shorter than any of a grid."""
    shortest = 2.0 * grid.longitude_spacing
    wrong = [edge for edge in edges if not shortest <= edge <= 360.0]
    if wrong:
        raise ValueError(
            f"scales_deg={wrong[0]:g}: valid: from {shortest:g}, the shortest wave of this grid, "
            "to 360 degrees of longitude"
        )


def check_calibrated(task: Task) -> None:
    """Raise ValueError for a task of whose prediction no store holds the truth."""
    why = None
    if task.true_task is not task:
        why = "a counterfactual has no truth; calibrate its task, whose factors it takes"
    elif task.coarse_factor > 1:
        why = "task.coarse_input=true has no truth; calibrate the task on a fine store"
    if why is not None:
        raise ValueError(f"calibrate: {why}")
