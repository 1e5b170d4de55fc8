"""The dates that probes are fitted and scored on, with the fields around them.

Dates of the splits `train`, `validation` and `test` stand one after another in one list of cases.
Everything that is fitted (climatologies, thresholds, scalings, principal components, probes) uses
the cases of `train`; those of `validation` choose strengths and layers; those of `test` are scored.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from einops import reduce
from jaxtyping import Float, Int

from atmossl.data.segment import HOUR, Segment

SPLITS = ("train", "validation", "test")
FEWEST = {"train": 8, "validation": 3, "test": 3}
_DAY_HOURS = 24
_MOST_TOKENS = 512  # that an attentive probe and a page of features see
_MOST_SECTORS = 8  # of longitude, each of which has a label of its own


@dataclass(frozen=True)
class Run:
    """One record, or one unbroken part of it, and the steps of it that are cases."""

    split: str
    segment: Segment
    steps: np.ndarray

    @property
    def times(self) -> np.ndarray:
        return self.segment.times[self.steps]


def chosen_runs(
    records: Mapping[str, Sequence[Segment]], *, window_steps: int, every: int
) -> list[Run]:
    """The cases of every record: each n-th date that has a window, and one day of fields on both
    sides.

    records: by split. window_steps: of which a date is the last.
    Raises:
        ValueError: a time step that does not divide a day, or too few dates in a split.
    """
    runs = []
    for split in SPLITS:
        for segment in records[split]:
            day = _DAY_HOURS / segment.step_hours
            if day % 1:
                raise ValueError(
                    f"{segment.location}: its step of {segment.step_hours:g} h does not divide a "
                    "day; probes compare states a day apart"
                )
            first = max(int(day), window_steps - 1)
            steps = np.arange(first, len(segment.times) - int(day), every)
            if len(steps):  # a part of a record with gaps may be too short
                runs.append(Run(split, segment, steps))
        count = sum(len(run.steps) for run in runs if run.split == split)
        if count < FEWEST[split]:
            raise ValueError(
                f"every={every} leaves {count} dates of split {split} with a whole window and a "
                f"day on both sides; needed: {FEWEST[split]} or more, by a smaller every or longer "
                "data"
            )
    return runs


@dataclass(frozen=True)
class TokenPlaces:
    """The tokens' centres in degrees, and the places of every case that local labels are asked at.

    rows, columns: of the tokens, drawn by their area, without repetition. first_column: cell at
    which the first token begins.
    """

    latitude: Float[np.ndarray, "row"]
    longitude: Float[np.ndarray, "column"]
    rows: Int[np.ndarray, "case place"]
    columns: Int[np.ndarray, "case place"]
    first_column: int = 0

    @property
    def every(self) -> int:
        """Each n-th row and column of tokens are `spread_out`, so that there are 512 at most."""
        return int(np.ceil(np.sqrt(len(self.latitude) * len(self.longitude) / _MOST_TOKENS)))

    @property
    def sectors(self) -> int:
        """Into how many sectors of longitude with as many columns of tokens each a date is cut: 8,
        or 4, 2 or 1 where 8 do not divide the columns."""
        columns = len(self.longitude)
        return math.gcd(_MOST_SECTORS, columns, len(range(0, columns, self.every)))

    def cells_of_sectors(self, cells: int) -> Int[np.ndarray, "sector cell"]:
        """Numbers of the columns of cells of every sector. cells: how many there are."""
        columns = np.roll(np.arange(cells), -self.first_column)
        return columns.reshape(self.sectors, cells // self.sectors)

    def spread_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Latitude and longitude of all tokens, or of each n-th row and column."""
        every = self.every
        grid = np.meshgrid(self.latitude[::every], self.longitude[::every], indexing="ij")
        return grid[0].ravel(), grid[1].ravel()

    def token_means(self, cells: Float[np.ndarray, "case lat lon"]) -> np.ndarray:
        """Mean of the cells of every token, [case row column]."""
        blocks = self.blocks(cells)
        return reduce(blocks, "case row y column x -> case row column", "mean")

    def blocks(self, cells: Float[np.ndarray, "case lat lon"]) -> np.ndarray:
        """The cells of every token, [case row y column x]."""
        rows, columns = len(self.latitude), len(self.longitude)
        cells = np.roll(cells, -self.first_column, axis=2)
        count, lat, lon = cells.shape
        return cells.reshape(count, rows, lat // rows, columns, lon // columns)

    def at_places(self, grid: np.ndarray) -> np.ndarray:
        """[case row column ...] at the places of every case, [case place ...]."""
        return grid[np.arange(len(grid))[:, None], self.rows, self.columns]


def draw_places(
    latitude: np.ndarray,
    longitude: np.ndarray,
    num_cases: int,
    num_places: int,
    rng: np.random.Generator,
    first_column: int = 0,
) -> TokenPlaces:
    """Places at random for every case, as many as there are tokens at most."""
    weight = np.repeat(np.cos(np.deg2rad(latitude)).clip(1e-6), len(longitude))
    count = min(num_places, len(weight))
    # of exponential waiting times with these rates, the earliest are a draw without replacement
    waiting = rng.exponential(size=(num_cases, len(weight))) / weight
    chosen = np.argsort(waiting, axis=1)[:, :count]
    rows, columns = np.divmod(chosen, len(longitude))
    return TokenPlaces(latitude, longitude, rows, columns, first_column)


@dataclass(frozen=True)
class Cases:
    """All cases of all runs, and the fields at their dates and a day before and after.

    run: number of the run; all parts of a record with gaps are one. split: of the run. states: by
    hours from the date, dims (case, level, latitude, longitude).
    """

    times: np.ndarray
    run: Int[np.ndarray, "case"]
    split: np.ndarray
    states: Mapping[int, xr.Dataset]

    def of(self, split: str) -> np.ndarray:
        """True for the cases of a split."""
        return self.split == split


def read_cases(runs: Sequence[Run], levels: Mapping[str, Sequence[int]]) -> Cases:
    """Read the fields around all dates. levels: of every variable to read, hPa; (0,) at the
    surface."""
    states = {}
    for hours in (-_DAY_HOURS, 0, _DAY_HOURS):
        parts = [state_of(run, hours, levels) for run in runs]
        states[hours] = xr.concat(parts, "case", combine_attrs="override")
    counts = [len(run.steps) for run in runs]
    records = [(run.split, run.segment.record_name) for run in runs]
    numbers = {record: number for number, record in enumerate(dict.fromkeys(records))}
    return Cases(
        times=np.concatenate([run.times for run in runs]),
        run=np.repeat([numbers[record] for record in records], counts),
        split=np.repeat([run.split for run in runs], counts),
        states=states,
    )


def state_of(run: Run, hours: int, levels: Mapping[str, Sequence[int]]) -> xr.Dataset:
    """The fields at some hours from every date of a run, dims (case, level, latitude,
    longitude)."""
    segment = run.segment
    steps = run.steps + round(hours / segment.step_hours)
    dataset = xr.Dataset(
        coords={
            "time": ("case", segment.times[steps].astype("datetime64[ns]")),
            "latitude": segment.grid.latitude,
            "longitude": segment.grid.longitude,
        }
    )
    for name, chosen in levels.items():
        read = [segment.read(name, chosen, int(s), 1, segment.whole())[:, 0] for s in steps]
        values = xr.DataArray(
            np.stack(read), dims=("case", "level", "latitude", "longitude"),
            coords={"level": list(chosen)},
        )  # fmt: skip
        dataset = xr.merge([dataset, values.rename(name)], join="outer")
    return dataset


def hours_of_day_and_year(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the day and of the year that have passed, from 0 to 1."""
    day, year = times.astype("datetime64[D]"), times.astype("datetime64[Y]")
    return (times - day) / HOUR / 24.0, (times - year) / HOUR / (365.25 * 24.0)
