"""Training-period statistics: computed by dask, saved with a fingerprint, refused when stale."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from atmossl.batch import StreamSpec
from atmossl.data.segment import Segment
from atmossl.tokens import patch_values

_FORMAT = 1


def fingerprint(segments: Sequence[Segment]) -> str:
    """Hash of what the statistics depend on: period, grid, variables, levels, encoding, and the
    first and last fields of every segment."""
    digest = hashlib.sha256(f"format {_FORMAT}".encode())
    for segment in segments:
        for values in (segment.times, segment.grid.latitude, segment.grid.longitude):
            digest.update(np.ascontiguousarray(values).tobytes())
        digest.update(json.dumps([segment.variables, segment.levels]).encode())
        for name in segment.variables:
            array = segment.dataset[name]
            digest.update(f"{name} {array.shape} {array.dtype}".encode())
            for step in (0, len(segment.times) - 1):
                digest.update(array.isel(time=step).values.tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Statistics:
    """Area-weighted mean and standard deviation of every variable and level over the training
    period, and the standard deviation of its change over one time step, in the variable's units.

    Arrays are [variable level] with NaN where a variable lacks a level.
    """

    variables: tuple[str, ...]
    levels: tuple[int, ...]
    mean: np.ndarray
    std: np.ndarray
    step_std: np.ndarray
    period: str
    fingerprint: str

    @classmethod
    def compute(cls, segments: Sequence[Segment]) -> Self:
        """One streaming pass over the segments with dask, in float64.

        Raises:
            ValueError: missing values, or a constant field.
        """
        moments = [_segment_moments(segment) for segment in segments]
        total = {key: sum(m[key] for m in moments) for key in moments[0]}
        mean = np.asarray(total["sum"] / total["count"])
        std = np.sqrt(_pooled_variance(moments))
        step_std = np.sqrt(total["step_square"] / total["step_count"])
        first = segments[0]
        for row, name in enumerate(first.variables):
            for column, level in enumerate(first.levels or (0,)):
                if std[row, column] <= 1e-7 * abs(mean[row, column]):  # rounding of a sum
                    raise ValueError(f"{first.location}: {name} at {level} hPa never changes")
        period = "; ".join(f"{s.name} {s.times[0]} to {s.times[-1]}" for s in segments)
        return cls(
            variables=first.variables,
            levels=first.levels or (0,),
            mean=mean,
            std=std,
            step_std=step_std,
            period=period,
            fingerprint=fingerprint(segments),
        )

    def select(self, spec: StreamSpec, field: str) -> Float[Tensor, "variable level"]:
        """`mean`, `std` or `step_std` of one stream's variables and levels."""
        rows = [self.variables.index(name) for name in spec.variables]
        columns = [self.levels.index(level) if spec.levels else 0 for level in spec.level_values]
        return torch.from_numpy(getattr(self, field)[np.ix_(rows, columns)]).float()

    def departure_scale(self, spec: StreamSpec) -> Float[Tensor, "level patch"]:
        """Standard deviation of a one-step change in normalised units, for a stream's tokens."""
        return patch_values(self.select(spec, "step_std") / self.select(spec, "std"), spec)

    def to_dict(self) -> dict:
        """Plain numbers and strings, for a checkpoint."""
        arrays = {key: getattr(self, key).tolist() for key in ("mean", "std", "step_std")}
        return {
            "variables": list(self.variables),
            "levels": list(self.levels),
            "period": self.period,
            "fingerprint": self.fingerprint,
            **arrays,
        }

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        arrays = {key: np.array(values[key]) for key in ("mean", "std", "step_std")}
        return cls(
            variables=tuple(values["variables"]),
            levels=tuple(values["levels"]),
            period=values["period"],
            fingerprint=values["fingerprint"],
            **arrays,
        )


def _segment_moments(segment: Segment) -> dict[str, np.ndarray]:
    """Weighted sums over one segment, each [variable level]."""
    rows: dict[str, list[np.ndarray]] = {}
    for name in segment.variables:
        array = segment.dataset[name]
        if "level" in array.dims:
            array = array.sel(level=list(segment.levels))
        else:
            array = array.expand_dims("level")
        array = array.chunk({"time": 64}).astype(np.float64)
        weights = xr.zeros_like(array["latitude"], dtype=np.float64)
        weights[segment.latitude_order] = segment.grid.weights
        for key, values in _moments(array, weights).items():
            rows.setdefault(key, []).append(values)
        if not np.isfinite(rows["mean"][-1]).all():
            raise ValueError(
                f"{segment.location}: {name} has missing values in the training period"
            )
    return {key: np.stack(values) for key, values in rows.items()}


def _moments(array: xr.DataArray, weights: xr.DataArray) -> dict[str, np.ndarray]:
    axes = ["time", "latitude", "longitude"]
    count = weights.sum() * array.sizes["time"] * array.sizes["longitude"]
    steps = array.diff("time")
    step_count = count / array.sizes["time"] * steps.sizes["time"]
    mean = (array * weights).sum(axes, skipna=False) / count
    lazy = xr.Dataset(
        {
            "mean": mean,
            "variance": ((array - mean) ** 2 * weights).sum(axes, skipna=False) / count,
            "step_square": (steps**2 * weights).sum(axes, skipna=False),
        }
    ).compute()
    ones = np.ones(lazy["mean"].shape)
    return {
        "mean": lazy["mean"].values,
        "sum": lazy["mean"].values * float(count),
        "variance": lazy["variance"].values,
        "step_square": lazy["step_square"].values,
        "count": ones * float(count),
        "step_count": ones * float(step_count),
    }


def _pooled_variance(moments: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
    """Variance over all segments from their means and variances (Chan et al. 1983)."""
    count = sum(m["count"] for m in moments)
    mean = sum(m["sum"] for m in moments) / count
    within = sum(m["count"] * m["variance"] for m in moments)
    between = sum(m["count"] * (m["mean"] - mean) ** 2 for m in moments)
    return np.asarray((within + between) / count)


def cache_folder() -> Path:
    """Where statistics are kept: `ATMOSSL_CACHE`, or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "atmossl"
    return Path(os.environ.get("ATMOSSL_CACHE", default))


def load_or_compute(segments: Sequence[Segment], folder: Path | None = None) -> Statistics:
    """Statistics of these segments from the cache, or computed now and saved there atomically.

    The file's name is the fingerprint, so a changed store never meets old statistics.
    """
    folder = folder or cache_folder()
    path = folder / f"statistics-{fingerprint(segments)}.json"
    if path.exists():
        return Statistics.from_dict(json.loads(path.read_text()))
    statistics = Statistics.compute(segments)
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(statistics.to_dict(), indent=1))
    partial.replace(path)
    return statistics


class Normaliser:
    """Fields to zero mean and unit variance per variable and level, and exactly back."""

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics

    def forward(
        self, fields: Float[Tensor, "*batch variable level time lat lon"], spec: StreamSpec
    ) -> Float[Tensor, "*batch variable level time lat lon"]:
        return (fields - self.values(spec, "mean")) / self.values(spec, "std")

    def inverse(
        self, fields: Float[Tensor, "*batch variable level time lat lon"], spec: StreamSpec
    ) -> Float[Tensor, "*batch variable level time lat lon"]:
        return fields * self.values(spec, "std") + self.values(spec, "mean")

    def values(self, spec: StreamSpec, field: str) -> Float[Tensor, "variable level 1 1 1"]:
        return self.statistics.select(spec, field)[:, :, None, None, None]
