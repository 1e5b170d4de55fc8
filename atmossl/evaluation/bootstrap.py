"""Confidence intervals from a circular block bootstrap over times.

Neighbouring times are correlated, so blocks of consecutive cases are drawn, not single cases
(Kunsch 1989, Annals of Statistics 17), and blocks may run over the end of the record back to its
start, so that each case is drawn equally often (Politis and Romano 1992, in Exploring the Limits
of Bootstrap). Scores are recombined from means: root and ratio are taken after the draw.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float

Combine = Callable[[xr.Dataset], xr.DataArray]


@dataclass(frozen=True)
class BlockBootstrap:
    """How to draw: length of a block in cases, number of draws, two-sided confidence.

    Four cases of six hours are one day. With fewer than two blocks of cases no interval can be
    told from the record, and its ends are NaN.

    Raises:
        ValueError: a value outside its range.
    """

    block_length: int = 4
    num_resamples: int = 1000
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.block_length < 1:
            raise ValueError(f"block_length must be 1 or more, got {self.block_length}")
        if self.num_resamples < 1:
            raise ValueError(f"num_resamples must be 1 or more, got {self.num_resamples}")
        if not 0.0 < self.confidence < 1.0:
            raise ValueError(f"confidence must be in (0, 1), got {self.confidence}")

    def draw(self, num_times: int, rng: np.random.Generator) -> Float[np.ndarray, "resample time"]:
        """How often each case is drawn in each resample; rows sum to num_times."""
        num_blocks = -(-num_times // self.block_length)
        starts = rng.integers(0, num_times, size=(self.num_resamples, num_blocks))
        cases = (starts[:, :, None] + np.arange(self.block_length)) % num_times
        cases = cases.reshape(self.num_resamples, -1)[:, :num_times]
        rows = np.arange(self.num_resamples)[:, None] * num_times
        counts = np.bincount((rows + cases).ravel(), minlength=self.num_resamples * num_times)
        return counts.reshape(self.num_resamples, num_times).astype(np.float64)

    def is_possible(self, num_times: int) -> bool:
        return num_times >= 2 * self.block_length

    def limits(self, samples: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
        """Percentile interval (low, high) over the dimension `resample`."""
        tail = (1.0 - self.confidence) / 2.0
        both = samples.quantile([tail, 1.0 - tail], "resample", skipna=False)
        return both.isel(quantile=0, drop=True), both.isel(quantile=1, drop=True)


def resampled_means(
    per_time: xr.Dataset, dim: str, counts: Float[np.ndarray, "resample time"]
) -> xr.Dataset:
    """Mean over `dim` in every resample; a missing case counts for nothing."""
    weights = xr.DataArray(counts, dims=("resample", dim))

    def mean(statistic: xr.DataArray) -> xr.DataArray:
        valid = statistic.notnull()
        drawn = xr.dot(weights, valid.astype(np.float64), dim=dim)
        total = xr.dot(weights, statistic.fillna(0.0), dim=dim)
        return total / drawn.where(drawn > 0)

    return per_time.drop_vars(dim, errors="ignore").map(mean)


def score_interval(
    per_time: xr.Dataset,
    combine: Combine,
    dim: str,
    counts: Float[np.ndarray, "resample time"],
    bootstrap: BlockBootstrap,
) -> tuple[xr.DataArray, xr.DataArray]:
    """Confidence limits of `combine(mean of per_time over dim)`."""
    return bootstrap.limits(combine(resampled_means(per_time, dim, counts)))


def ratio_interval(
    per_time: xr.Dataset,
    baseline_per_time: xr.Dataset,
    combine: Combine,
    dim: str,
    counts: Float[np.ndarray, "resample time"],
    bootstrap: BlockBootstrap,
) -> tuple[xr.DataArray, xr.DataArray]:
    """Confidence limits of score over baseline's score, paired: both use the same draws."""
    score = combine(resampled_means(per_time, dim, counts))
    baseline = combine(resampled_means(baseline_per_time, dim, counts))
    return bootstrap.limits(score / baseline.where(baseline != 0))
