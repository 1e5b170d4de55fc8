"""Confidence intervals from a circular block bootstrap over times.

Neighbouring times are correlated, so blocks of consecutive cases are drawn, not single cases
(Kunsch 1989, Annals of Statistics 17), and blocks may run over the end of the record back to its
start, so that each case is drawn equally often (Politis and Romano 1992, in Exploring the Limits
of Bootstrap). Scores are recombined from means: root and ratio are taken after the draw.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float

Combine = Callable[[xr.Dataset], xr.DataArray]


@dataclass(frozen=True)
class BlockBootstrap:
    """The settings of the bootstrap: length of a block in cases, number of draws, two-sided
    confidence.

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

    def draw(
        self, lengths: Sequence[int], rng: np.random.Generator
    ) -> Float[np.ndarray, "resample time"]:
        """How often each case is drawn in each resample; rows sum to the number of cases.

        lengths: of the series that the cases form, one after another. Each series is a circle of
        its own, so that no block runs from one into the next.
        """
        num_times = sum(lengths)
        num_blocks = -(-num_times // self.block_length)
        starts = rng.integers(0, num_times, size=(self.num_resamples, num_blocks, 1))
        length = np.repeat(lengths, lengths)
        first = np.repeat(np.cumsum(lengths) - lengths, lengths)
        within = starts - first[starts] + np.arange(self.block_length)
        cases = first[starts] + within % length[starts]
        cases = cases.reshape(self.num_resamples, -1)[:, :num_times]
        rows = np.arange(self.num_resamples)[:, None] * num_times
        counts = np.bincount((rows + cases).ravel(), minlength=self.num_resamples * num_times)
        return counts.reshape(self.num_resamples, num_times).astype(np.float64)

    def is_possible(self, num_times: int) -> bool:
        return num_times >= 2 * self.block_length

    def limits(self, samples: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
        """The percentile interval (low, high) over the dimension `resample`."""
        tail = (1.0 - self.confidence) / 2.0
        samples = samples.transpose("resample", ...)
        low, high = np.quantile(samples.to_numpy(), [tail, 1.0 - tail], axis=0)
        shape = samples.isel(resample=0, drop=True)
        return shape.copy(data=low), shape.copy(data=high)

    def p_value(self, samples: xr.DataArray, *, null: float) -> xr.DataArray:
        """The two-sided p-value of the hypothesis that the true value is `null`.

        Twice the smaller share of resamples on one side of it, counting one more than there are
        (Davison and Hinkley 1997, Bootstrap Methods, section 4.2), so that it is never zero.
        """
        below, above = (samples <= null).sum("resample"), (samples >= null).sum("resample")
        rarer = xr.where(below < above, below, above) + 1
        p_value = (2.0 * rarer / (samples.sizes["resample"] + 1)).clip(max=1.0)
        return p_value.where(samples.notnull().all("resample"))


def resampled_means(
    per_time: xr.Dataset, dim: str, counts: Float[np.ndarray, "resample time"]
) -> xr.Dataset:
    """The mean over `dim` in every resample. A missing case counts for nothing."""

    def mean(statistic: xr.DataArray) -> xr.DataArray:
        statistic = statistic.transpose(dim, ...)
        values = statistic.to_numpy().astype(np.float64)
        valid = np.isfinite(values)
        total = np.tensordot(counts, np.where(valid, values, 0.0), 1)
        drawn = np.tensordot(counts, valid.astype(np.float64), 1)
        means = np.divide(total, drawn, out=np.full_like(total, np.nan), where=drawn > 0)
        coords = {name: c for name, c in statistic.coords.items() if dim not in c.dims}
        return xr.DataArray(means, coords, ("resample", *statistic.dims[1:]))

    return xr.Dataset({name: mean(statistic) for name, statistic in per_time.items()})


def ratio_samples(
    per_time: xr.Dataset,
    baseline_per_time: xr.Dataset,
    combine: Combine,
    dim: str,
    counts: Float[np.ndarray, "resample time"],
) -> xr.DataArray:
    """The score over the baseline's score in every resample. Both use the same draws, so the
    samples are paired."""
    score = combine(resampled_means(per_time, dim, counts))
    baseline = combine(resampled_means(baseline_per_time, dim, counts))
    return score / baseline.where(baseline != 0)
