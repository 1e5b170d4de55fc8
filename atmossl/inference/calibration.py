"""Calibrates ensembles after training: factors of their spread and of the waves of their mean, per
task, variable, level, lead time, band of zonal waves and zone of latitude.

The factors are kept in the checkpoint's record and applied around the ensemble mean. How they are
fitted is in `atmossl.inference.calibration_fit`.

In a rollout the first pass of each init time is calibrated as any other prediction. A later pass
starts from members, and runs member by member. If later passes were fitted, too, the members that
have gone through one are calibrated together by its own factors, and go on from there. For a tail,
the ensemble that the network makes of one member's state is inflated by the factors of the first
pass before.

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from atmossl.geometry import EARTH_RADIUS_KM, closes_circle
from atmossl.inference.plan import Fields
from atmossl.masking.tasks import Task
from atmossl.progress import counted

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
    edges_in_km: whether edges are lengths in km, as up to version 0.7. later: the factors of the
    later passes of a rollout, whose hours count from the start of the pass. num_dates: on how many
    dates they were fitted; None of versions up to 0.8, which did not keep it. along_lat: whether
    rows that are predicted in part are split along latitude as well (`zonal_bands`).
    """

    hours: np.ndarray
    spread: Mapping[str, np.ndarray]
    mean: Mapping[str, np.ndarray] = field(default_factory=dict)
    edges: tuple[float, ...] = ()
    zones: tuple[float, ...] = ()
    edges_in_km: bool = False
    later: tuple["CalibrationFactors", ...] = ()
    num_dates: int | None = None
    along_lat: bool = False

    @classmethod
    def of(cls, checkpoint_record: Mapping[str, Any], kind: str) -> "CalibrationFactors | None":
        """The factors in a checkpoint's record; None if it was not calibrated for this kind of
        task."""
        stored = checkpoint_record.get("spread", {}).get(kind)
        return None if stored is None else cls.read(stored)

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> "CalibrationFactors":
        """Factors as a checkpoint's record keeps them."""
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
            tuple(map(cls.read, stored.get("later_passes", ()))),
            stored.get("num_dates"),
            stored.get("along_lat", False),
        )

    def of_pass(self, number: int) -> "CalibrationFactors | None":
        """The factors of a pass of a rollout, 0 being the first. A pass beyond the last fitted one
        has the factors of that one; None if the first pass alone was fitted."""
        if number == 0:
            return self
        return self.later[min(number, len(self.later)) - 1] if self.later else None

    def stored(self) -> dict[str, Any]:
        """Factors that were estimated now, as a checkpoint's record keeps them."""
        kept = {"factors": self.spread, "mean_factors": self.mean}
        later = [of_pass.stored() for of_pass in self.later]
        return {
            "hours": self.hours.tolist(),
            "edges_deg": [*self.edges],
            "zones": [*self.zones],
            **{
                key: {name: values.tolist() for name, values in by_variable.items()}
                for key, by_variable in kept.items()
            },
            **({"along_lat": True} if self.along_lat else {}),
            **({"later_passes": later} if later else {}),
            **({} if self.num_dates is None else {"num_dates": self.num_dates}),
        }

    def described(self) -> str:
        """At which hours and in how many passes there are factors, and from how many dates, in
        words."""
        num_passes = 1 + len(self.later)
        hours = ", ".join(f"{hour:g}" for hour in self.hours)
        words = [
            *([f"at {hours} h"] if self.hours.any() else []),  # one step has no lead time
            *([f"of each of {num_passes} passes"] if num_passes > 1 else []),
            *([] if self.num_dates is None else [f"from {counted(self.num_dates, 'date')}"]),
        ]
        return " ".join(words)

    def bands(self) -> list[str]:
        """The bands in words."""
        return [
            f"waves {self.waves(band, band)} {self.unit}" if self.edges else "all scales"
            for band in range(len(self.edges) + 1)
        ]

    @property
    def unit(self) -> str:
        """Of the lengths of waves."""
        return "km" if self.edges_in_km else "degrees"

    def waves(self, first: int, last: int) -> str:
        """The lengths of the waves from one band to another, in words, without their unit."""
        has_longer, has_shorter = first > 0, last < len(self.edges)
        if has_longer and has_shorter:
            return f"of {self.edges[last]:g} to {self.edges[first - 1]:g}"
        if has_longer:
            return f"under {self.edges[first - 1]:g}"
        return f"over {self.edges[last]:g}" if has_shorter else "all"

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
        rows = lat if self.along_lat else None
        bands = zonal_bands(departures, predicted[:, None], lon, self._edges(lat), lat=rows)
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
    *,
    lat: np.ndarray | None = None,
) -> Iterator[Float[np.ndarray, "*axes lat lon"]]:
    """Fields split by zonal scale into bands whose sum they are, the largest scales first.

    The filter goes along circles of latitude and keeps half the amplitude of a wave that is as long
    as the edge: the share 2^-(edge / length)^n of any wave. It needs no neighbouring rows, so the
    bands do not depend on the tiles in which a prediction was computed. On a row that closes the
    circle and counts everywhere, n is 8, since power falls so steeply with wavenumber that a soft
    filter would leave most of a short band to longer waves. On other rows n is 2, a Gaussian, and
    only cells of `where` count (normalised convolution, Knutsson and Westin 1993); elsewhere all
    bands are 0.

    With `lat` these other rows are split along latitude, too, by the same Gaussian. Then the rows
    must be all there are. In a hidden box the mean of all its cells errs otherwise than the means
    of its rows do; only a filter along both axes tells them apart.

    fields: [... lat lon]. where: the same, or with axes of size 1. lon, lat: centres, degrees.
    edges: lengths in degrees, falling, of all rows or one for each.
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

    def softly(spectrum: np.ndarray, edge: float | np.ndarray) -> np.ndarray:
        smoothed = smooth(spectrum, edge, _SOFT)
        return smoothed if lat is None else _along_lat(lat, edge) @ smoothed

    def longer(edge: float | np.ndarray) -> np.ndarray:
        if is_whole.all():
            return smooth(waves, edge, _SHARP)
        soft = softly(waves, edge) / softly(waves_of_share, edge).clip(1e-6)
        if is_whole.any():
            soft = np.where(is_whole, smooth(waves, edge, _SHARP), soft)
        return np.where(where, soft, 0.0)

    less: Any = 0.0
    for more in chain(map(longer, edges), [inside]):
        yield (more - less).astype(fields.dtype)  # one after another, since each is a whole field
        less = more


def _along_lat(lat: np.ndarray, edge: float | np.ndarray) -> Float[np.ndarray, "lat lat"]:
    """Weights of all rows in the smoothed values of each: the Gaussian whose Fourier transform is
    2^-(edge / length)^2, which is exp(-(pi x / edge)^2 / ln 2) at a distance x."""
    apart = np.pi * (lat[:, None] - lat[None, :]) / np.asarray(edge)[..., None]
    return np.exp(-(apart**2) / np.log(2.0))


@dataclass(frozen=True)
class Calibration:
    """The calibrated spread and mean of one task, from a checkpoint's record.

    A union of tasks takes the factors of its parts for the spread; its mean has factors of its own
    alone. Where several parts hide the same cell, the part that gives the largest spread counts. If
    the union is calibrated itself, its own factors come on top.

    number: which pass of a rollout is calibrated, 0 being the first.
    """

    checkpoint_record: Mapping[str, Any]
    task: Task
    number: int = 0

    @property
    def needs_all_rows(self) -> bool:
        """Whether rows can be calibrated only when all of them are there."""
        return any(factors.along_lat for factors in self.factors.values())

    @cached_property
    def factors(self) -> dict[str, CalibrationFactors]:
        """The factors of the task and of its parts, by their kinds, as far as there are any."""
        of_kinds = {
            kind: CalibrationFactors.of(self.checkpoint_record, kind) for kind in _kinds(self.task)
        }
        of_pass = {
            kind: factors.of_pass(self.number)
            for kind, factors in of_kinds.items()
            if factors is not None
        }
        return {kind: factors for kind, factors in of_pass.items() if factors is not None}

    def apply(
        self,
        fields: Fields,
        hours: np.ndarray,
        lat: np.ndarray,
        lon: np.ndarray,
        *,
        centre: int | None = None,
    ) -> Fields:
        """Calibrate fields [step member level lat lon] at the given hours from the reference time,
        in a rollout from the start of the pass, and the given cell centres, degrees. centre:
        around the mean of so many first members, so that no further member changes them; None: of
        all."""
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
