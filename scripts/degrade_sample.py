"""Make stores of a deliberately poor "other model" from the embedded sample, to be corrected.

    python scripts/degrade_sample.py                                    # -> ./degraded_sample
    python scripts/degrade_sample.py --lead 72 --seed 1 --output FOLDER

What the other model says for a date is its forecast of one fixed lead time, dated by valid time, as
`atmossl data ingest select.step=24h` makes of forecasts. Its errors, in this order:

- waves too slow: the weather arrives `delay` hours late for each day of lead time (linear in time
  between two steps of the sample);
- smoothed: the filter (1, 2, 1) / 4 along both axes, `smoothings` times;
- too little variance: departures from the climate of the place are multiplied by `amplitude`;
- a bias that depends on the place: a smooth random pattern for each variable and level, the same at
  all dates, of `bias` standard deviations (root mean square over the globe);
- a forecast error that grows: a smooth random pattern that changes in time (autoregressive, with a
  memory of 24 h), of `error` standard deviations for each day of lead time.

A standard deviation is that of the departures from the climate along a circle of latitude, in the
variable's units. Climate and standard deviations are those of the training runs 0 to 3 alone. The
patterns follow from the seed; bias patterns are common to all runs, growing errors are not.

Two stores for each run, with the names of the sample's runs and so its splits: `same` on the
sample's grid of 32 x 64 cells (catalog entry `degraded_sample`) and `coarse`, area means over 2 x 2
of its cells (`degraded_sample_coarse`). A run loses its first step, which has no step before it.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import xarray as xr

from atmossl.data.catalog import catalog_entry
from atmossl.data.store import open_split
from atmossl.evaluation.alignment import grid_of
from atmossl.evaluation.spatial import coarsen
from atmossl.evaluation.sphere import Halo, polar_sign

SPLITS = ("train", "validation", "test")
COARSE_FACTOR = 2
MEMORY_HOURS = 24.0
PATTERN_SMOOTHINGS = 6  # of white noise: its length is then some 3 cells


@dataclass(frozen=True)
class Errors:
    """How poor the other model is; see the top of this file for each kind of error.

    lead: of its forecasts, in hours. delay: hours for each day of lead time. amplitude: a factor.
    bias, error: in standard deviations, the latter for each day of lead time.
    """

    lead: float = 24.0
    delay: float = 2.0
    smoothings: int = 1
    amplitude: float = 0.9
    bias: float = 0.5
    error: float = 0.2

    def late(self, step_hours: float) -> float:
        """The share of the step before in what arrives late.

        Raises:
            ValueError: later than one step of the sample.
        """
        hours = self.delay * self.lead / 24.0
        if not 0.0 <= hours <= step_hours:
            raise ValueError(
                f"--delay {self.delay:g} h for each day of --lead {self.lead:g} h is {hours:g} h; "
                f"valid: 0 to {step_hours:g} h, one step of the sample"
            )
        return hours / step_hours


@dataclass(frozen=True)
class Climate:
    """What the errors are measured against: mean [level, latitude, longitude] and standard
    deviation [level, latitude] of every variable."""

    mean: xr.Dataset
    deviation: xr.Dataset

    @classmethod
    def of(cls, records: Sequence[xr.Dataset]) -> "Climate":
        count = sum(record.sizes["time"] for record in records)
        mean = reduce(add, [record.sum("time", dtype=np.float64) for record in records]) / count
        squares = [((r - mean) ** 2).sum("time").mean("longitude") for r in records]
        return cls(mean, np.sqrt(reduce(add, squares) / count))


def smoothed(field: xr.DataArray, times: int) -> xr.DataArray:
    """The field [..., latitude, longitude] after the filter (1, 2, 1) / 4 along both axes. Rows go
    on across the poles, where components of a vector change their sign."""
    halo, sign = Halo(grid_of(field.to_dataset(name="x")), 1, 1), polar_sign(str(field.name))
    values = field.to_numpy().astype(np.float64)
    for _ in range(times):
        wide = halo.extend(values, sign)
        tall = (wide[..., :-2] + 2 * wide[..., 1:-1] + wide[..., 2:]) / 4
        values = (tall[..., :-2, :] + 2 * tall[..., 1:-1, :] + tall[..., 2:, :]) / 4
    return field.copy(data=values)


def pattern(like: xr.DataArray, rng: np.random.Generator) -> xr.DataArray:
    """Smooth random fields in the shape of others, of root mean square 1 over the globe."""
    rough = like.copy(data=rng.standard_normal(like.shape))
    fields = smoothed(rough, PATTERN_SMOOTHINGS)
    area = like["latitude"].copy(data=grid_of(like.to_dataset(name="x")).weights)
    return fields / np.sqrt((fields**2).weighted(area).mean(("latitude", "longitude")))


def growing_errors(record: xr.DataArray, rng: np.random.Generator) -> xr.DataArray:
    """A pattern of root mean square 1 for every time, with a memory of `MEMORY_HOURS`."""
    fields = pattern(record, rng)
    keeps = float(np.exp(-_step_hours(record) / MEMORY_HOURS))
    values = fields.transpose("time", ...).to_numpy().copy()
    for step in range(1, len(values)):
        values[step] = keeps * values[step - 1] + np.sqrt(1 - keeps**2) * values[step]
    return fields.transpose("time", ...).copy(data=values).transpose(*record.dims)


def _step_hours(record: xr.DataArray | xr.Dataset) -> float:
    return float((record["time"][1] - record["time"][0]) / np.timedelta64(1, "h"))


def forecasts(
    record: xr.Dataset, climate: Climate, errors: Errors, seed: int, run: int
) -> xr.Dataset:
    """What the other model says for the dates of a run, but for the first one."""
    fields, days = {}, errors.lead / 24.0
    late = errors.late(_step_hours(record))
    for number, name in enumerate(map(str, record.data_vars)):
        mean, deviation = climate.mean[name], climate.deviation[name]
        field = record[name].astype(np.float64)
        now, before = field.isel(time=slice(1, None)), field.isel(time=slice(None, -1))
        arrived = (1 - late) * now + late * before.assign_coords(time=now["time"])
        weather = smoothed(arrived.rename(name), errors.smoothings) - mean
        of_place = np.random.default_rng([seed, number])
        of_run = np.random.default_rng([seed, number, 1 + run])
        bias = errors.bias * deviation * pattern(mean.rename(name), of_place)
        growing = errors.error * days * deviation * growing_errors(now.rename(name), of_run)
        answer = mean + errors.amplitude * weather + bias + growing
        fields[name] = answer.transpose(*record[name].dims).astype(np.float32)
        fields[name].attrs = record[name].attrs
    about = {**asdict(errors), "seed": seed}
    title = f"Forecasts of {errors.lead:g} h of a model that was made poor on purpose: {about}"
    return xr.Dataset(fields, attrs={"title": title})


def records() -> dict[str, dict[str, xr.Dataset]]:
    """The runs of the sample by split and name, in memory."""
    entry = catalog_entry("sample")
    return {
        split: {
            segment.name: segment.to_dataset()
            for segment in open_split(
                entry, split, variables=list(entry.variables), levels=entry.levels
            )
        }
        for split in SPLITS
    }


def write_stores(output: Path, errors: Errors, seed: int) -> None:
    """Write both stores of every run.

    Raises:
        ValueError: the folder is there already, or errors that are not possible.
    """
    if output.exists():
        raise ValueError(f"--output {output} exists; choose another folder or remove it")
    runs = records()
    climate = Climate.of(list(runs["train"].values()))
    for run, (name, record) in enumerate(sorted(pair for r in runs.values() for pair in r.items())):
        answer = forecasts(record, climate, errors, seed, run)
        for kind, dataset in (("same", answer), ("coarse", coarsen(answer, COARSE_FACTOR))):
            dataset.to_zarr(output / kind / f"{name}.zarr", mode="w", consolidated=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = asdict(Errors())
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("degraded_sample"))
    arguments = parser.parse_args()
    errors = Errors(**{name: getattr(arguments, name) for name in defaults})
    try:
        write_stores(arguments.output, errors, arguments.seed)
    except ValueError as error:
        parser.error(str(error))
    print(f"stores: {arguments.output}/same and {arguments.output}/coarse")


if __name__ == "__main__":
    main()
