"""Fits the factors of a calibration (`atmossl.inference.calibration`) to dates that the model was
not trained on.

A factor of the spread makes the variance of the members equal to the mean square error of their
mean. That error holds a part that more members would take away (Fortin et al. 2014, section 3); it
is taken off for draws of noise. A factor of the mean is the slope of a regression of the truth on
one of its bands.

The passes of a rollout are fitted one after another. The first pass is fitted, its members are
calibrated, the second pass starts from them and is fitted, and so on. The mean is scaled in the
first pass alone: later on, short waves of a mean of few members are mostly noise, and slopes of the
truth on them came out between 0 and 4. All dates go from pass to pass together, so that the states
of all dates and members are in memory at once.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from atmossl.batch import PRIMARY
from atmossl.data.segment import HOUR
from atmossl.geometry import Grid
from atmossl.inference.calibration import (
    Calibration,
    CalibrationFactors,
    whole_rows,
    zonal_bands,
    zone_weights,
)
from atmossl.inference.plan import BlendedPart, Plan
from atmossl.inference.rollout import Joined, OnePass, calibrated, followed, passed, start
from atmossl.masking.tasks import Task
from atmossl.progress import Advance

# Bands of members that are draws of noise (`scales_of`), and the latitudes between which their
# factors are linear. Members of a tail get one factor for all scales and latitudes: with bands the
# CRPS of the checkpoint `default` is a tenth larger.
_LONGEST, _PER_OCTAVE, _OCTAVES = 120.0, 6, 2
_ZONES = (-45.0, 0.0, 45.0)


@dataclass(frozen=True)
class Split:
    """How fields are split by scale, so that each part has factors of its own.

    edges: lengths of waves that part the bands, degrees of longitude, falling; without any, one
    factor goes for all scales. zones: latitudes between which factors are linear. along_lat:
    whether rows that are predicted in part are split along latitude, too.
    """

    edges: tuple[float, ...] = ()
    zones: tuple[float, ...] = ()
    along_lat: bool = False

    @classmethod
    def of(cls, plan: Plan, edges: tuple[float, ...]) -> "Split":
        """What suits a task. Where places are hidden, few rows are predicted, so that zones would
        have few data, and none of them whole."""
        if not edges:
            return cls()
        if plan.task.hidden_cells(plan.grid) is not None:
            return cls(edges, (), along_lat=True)
        return cls(edges, _ZONES)


@dataclass
class _Sums:
    """Sums over dates and predicted cells that have a truth, [zone step level band band]: products
    of the errors of the ensemble mean in two bands, and the covariances of the members. Of rows
    that are wholly predicted also products of the mean itself in two bands, of the mean and its
    error, and the covariances there. are_draws: members are draws, whose mean errs by a part of
    their variance."""

    lat: np.ndarray
    lon: np.ndarray
    split: Split
    num_steps: int
    num_levels: int
    num_members: int
    are_draws: bool = True

    def __post_init__(self) -> None:
        num_zones, num_bands = max(1, len(self.split.zones)), len(self.split.edges) + 1
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
        edges, lat = self.split.edges, self.lat[rows] if self.split.along_lat else None
        zones = zone_weights(self.lat[rows], self.split.zones) * weight
        assert lat is None or len(lat) == len(self.lat), f"{len(lat)} of {len(self.lat)} rows"

        def split(fields: np.ndarray, where: np.ndarray) -> np.ndarray:
            values = np.nan_to_num(fields).astype(np.float64)
            return np.stack([*zonal_bands(values, where, self.lon, edges, lat=lat)])

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
        if edges and whole.any():
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
    """Estimate the factors of one pass from all given times. parts: the plan's predictions at these
    times. edges: lengths of waves that part the bands, degrees of longitude, falling; with them
    every zone of latitude has factors of its own.

    Raises:
        ValueError: a single member, or a task of whose prediction the store holds no truth.
    """
    _check(plan, edges)
    return _estimated(plan, times, parts, edges, plan.leads)


def estimate_rollout(
    plan: Plan, times: np.ndarray, one_pass: OnePass, edges: tuple[float, ...], advance: Advance
) -> CalibrationFactors:
    """Estimate the factors of every pass of a rollout from all given init times; the members of a
    pass are calibrated before the next one starts from them. one_pass:
    `atmossl.inference.tiles.blended`. advance: is called after every pass of every init time.

    Raises:
        ValueError: a single member.
    """
    _check(plan, edges)
    standings = [start(plan, plan.find(time)) for time in times]
    fitted: list[CalibrationFactors] = []
    for number in range(plan.steps.num_passes):
        predicted = []
        for standing in standings:
            predicted.append(passed(plan, standing, one_pass))
            advance(1)
        fitted.append(_estimated_pass(plan, times, standings[0].begin(plan), predicted, edges))
        factors = replace(fitted[0], later=tuple(fitted[1:]))
        record = Calibration(plan.trained.checkpoint_record, plan.task).replaced(factors)
        plan = replace(plan, trained=replace(plan.trained, checkpoint_record=record))
        if number + 1 == plan.steps.num_passes:
            break
        standings = [
            followed(plan, standing, calibrated(plan, number, joined))
            for standing, joined in zip(standings, predicted, strict=True)
        ]
    return replace(fitted[0], later=tuple(fitted[1:]))


def _estimated_pass(
    plan: Plan,
    times: np.ndarray,
    begin: np.timedelta64,
    predicted: list[dict[str, Joined]],
    edges: tuple[float, ...],
) -> CalibrationFactors:
    """The factors of the pass that begins at a lead time, at hours from its start; of a last pass
    that reaches beyond the last lead time, those up to it."""
    rows = slice(0, plan.grid.shape[0])
    leads = begin + np.array(plan.steps.pass_offsets) * plan.step
    leads = leads[leads <= plan.leads.max()]
    parts = (
        BlendedPart(case, begin + joined[PRIMARY].leads, rows, joined[PRIMARY].fields, True)
        for case, joined in enumerate(predicted)
    )
    is_first = begin == np.timedelta64(0)
    factors = _estimated(plan, times, parts, edges, leads, scales_mean=is_first)
    return replace(factors, hours=factors.hours - begin / HOUR)


def _check(plan: Plan, edges: tuple[float, ...]) -> None:
    """Raise ValueError for what cannot be calibrated."""
    check_calibrated(plan.task)
    check_scales(edges, plan.grid)
    if plan.trained.checkpoint_record.get("model", {}).get("num_members") == 1:
        raise ValueError("calibrate: the checkpoint has one member, so no spread")


def _estimated(
    plan: Plan,
    times: np.ndarray,
    parts: Iterable[BlendedPart],
    edges: tuple[float, ...],
    leads: np.ndarray,
    *,
    scales_mean: bool = True,
) -> CalibrationFactors:
    """The factors of predictions at some leads from the reference times."""
    split = Split.of(plan, edges)
    sums = _summed(plan, times, parts, split, leads)
    if not any(of_variable.variance.any() for of_variable in sums.values()):
        raise ValueError("calibrate: the store has no truth where the task predicts")
    hours = leads / HOUR
    order = np.argsort(hours)
    spread, mean = {}, {}
    for name, of_variable in sums.items():
        slopes = of_variable.slopes()
        if not scales_mean:
            slopes = np.ones_like(slopes)
        spread[name] = of_variable.factors(slopes)[:, :, order]
        if (slopes != 1.0).any():
            mean[name] = np.moveaxis(slopes, -1, 1)[:, :, order]
    return CalibrationFactors(
        hours[order],
        spread,
        mean,
        edges,
        split.zones,
        num_dates=len(times),
        along_lat=split.along_lat,
    )


def _summed(
    plan: Plan,
    times: np.ndarray,
    parts: Iterable[BlendedPart],
    split: Split,
    leads: np.ndarray,
) -> dict[str, _Sums]:
    """The sums of every variable over all parts at the given leads; ValueError for a single
    member."""
    levels, sums = plan.trained.level_values, {}
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
                sums[name] = _Sums(*place, split, *size, plan.trained.model.any_member)
            for step, lead in enumerate(part.leads):
                if lead not in leads:
                    continue  # a last pass may reach beyond the last lead time
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
