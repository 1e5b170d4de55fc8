"""How predictions are named, dimensioned and described: CF, and the names of WeatherBench 2."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import dask.array
import numpy as np
import xarray as xr

from atmossl import __version__
from atmossl.batch import PRIMARY, StreamSpec
from atmossl.data.variables import VARIABLES
from atmossl.geometry import Grid
from atmossl.inference.blend import Fields
from atmossl.inference.predict import Predictor

LayoutName = Literal["cf", "weatherbench2"]

# github.com/google-research/weatherbench2, docs/source/data-guide.md (Rasp et al. 2024)
_WEATHERBENCH2 = {"init_time": "time", "lead_time": "prediction_timedelta", "member": "number"}
_HOUR = np.timedelta64(1, "h")

COORDINATES = {
    "latitude": {"standard_name": "latitude", "units": "degrees_north", "axis": "Y"},
    "longitude": {"standard_name": "longitude", "units": "degrees_east", "axis": "X"},
    "level": {
        "standard_name": "air_pressure",
        "long_name": "pressure level",
        "units": "hPa",
        "positive": "down",
        "axis": "Z",
    },
    "model_level": {
        "standard_name": "model_level_number",
        "long_name": "model level",
        "units": "1",
        "positive": "down",
        "axis": "Z",
    },
    "member": {"standard_name": "realization", "long_name": "ensemble member", "units": "1"},
    "time": {
        "standard_name": "time",
        "long_name": "valid time",
        "units_metadata": "leap_seconds: none",
        "axis": "T",
    },
    "init_time": {
        "standard_name": "forecast_reference_time",
        "long_name": "initial time of forecast",
        "axis": "T",
    },
    "lead_time": {"standard_name": "forecast_period", "long_name": "lead time"},
}


def attributes_of(coordinate: str, *, pressure_levels: bool) -> dict[str, str]:
    """Attributes of a coordinate of predictions and latents, as CF names them."""
    is_number = coordinate == "level" and not pressure_levels
    return dict(COORDINATES["model_level" if is_number else coordinate])


def group_of(data: str) -> str:
    """The group of an output that holds the streams of a source: the root for the primary one, and
    a group named after every other."""
    return "" if data == PRIMARY else data


@dataclass(frozen=True)
class OutputLayout:
    """The dimensions and coordinates of one prediction.

    Forecasts and hindcasts are (init_time, lead_time, member, level, latitude, longitude), all
    others (time, member, level, latitude, longitude); surface variables lack the level. Raises
    ValueError if a valid time would be written twice or out of order.

    data: of the streams that are written, on the cells and at the steps of their own store: lead
    times are those of any case, NaN in the others; there may be none.
    """

    predictor: Predictor
    times: np.ndarray
    num_members: int
    names: LayoutName = "cf"
    data: str = PRIMARY

    def __post_init__(self) -> None:
        if not self.predictor.plan.is_forecast and (np.diff(self.valid_times) <= 0).any():
            raise ValueError(
                f"init_time: every case writes {len(self.steps)} steps, so that some valid times "
                "come twice or out of order; choose times further apart, or every="
                f"{len(self.steps)}"
            )

    @cached_property
    def _written(self) -> list[np.ndarray]:
        """Of every case, the times from the reference time to its steps."""
        used = self.predictor
        return [used.leads_of(self.data, time, used.leads) for time in self.times]

    @cached_property
    def steps(self) -> np.ndarray:
        """Times from the reference time to the steps that any case has."""
        return self.predictor.leads[np.isin(self.predictor.leads, np.concatenate(self._written))]

    @cached_property
    def valid_times(self) -> np.ndarray:
        leads = self._written
        return np.concatenate([time + own for time, own in zip(self.times, leads, strict=True)])

    @property
    def is_empty(self) -> bool:
        return len(self.steps) == 0

    @property
    def specs(self) -> list[StreamSpec]:
        return [spec for spec in self.predictor.trained.specs if spec.data == self.data]

    @property
    def levels(self) -> list[int]:
        return sorted({level for spec in self.specs for level in spec.levels})

    def levels_of(self, variable: str) -> tuple[int, ...]:
        """Levels of a variable in hPa; (0,) at the surface."""
        return self.predictor.trained.predicted_levels(self.data)[variable]

    @property
    def variables(self) -> list[str]:
        """All that is predicted."""
        return list(self.predictor.trained.predicted_levels(self.data))

    @property
    def grid(self) -> Grid:
        return self.predictor.grid_of(self.data)

    def where(self, case: int, leads: np.ndarray) -> tuple[int | slice | np.ndarray, ...]:
        """Place of some steps of a case along the first dimensions."""
        if self.predictor.plan.is_forecast:
            return case, _numbers(np.isin(self.steps, leads))
        return (_numbers(np.isin(self.valid_times, self.times[case] + leads)),)

    def dims(self, variable: str) -> tuple[str, ...]:
        times = ("init_time", "lead_time") if self.predictor.plan.is_forecast else ("time",)
        levels = () if self.levels_of(variable) == (0,) else ("level",)
        return (*times, "member", *levels, "latitude", "longitude")

    def coordinates(self) -> dict[str, np.ndarray]:
        grid = self.grid
        dates = self.predictor.segment.calendar.dates
        found = {
            "init_time": dates(self.times),
            "lead_time": self.steps.astype("timedelta64[ns]"),
            "time": dates(self.valid_times),
            "member": np.arange(self.num_members),
            "level": np.array(self.levels, np.int64),
            "latitude": grid.latitude,
            "longitude": grid.longitude,
        }
        unused = {"time"} if self.predictor.plan.is_forecast else {"init_time", "lead_time"}
        unused |= set() if self.levels else {"level"}
        return {name: values for name, values in found.items() if name not in unused}

    def place(self, variable: str, values: np.ndarray) -> np.ndarray:
        """[step member level lat lon] over all levels of the prediction, NaN at those that the
        variable lacks; without level axis at the surface."""
        own = self.levels_of(variable)
        if own == (0,):
            return values[:, :, 0]
        if list(own) == self.levels:
            return values
        shape = (*values.shape[:2], len(self.levels), *values.shape[3:])
        whole = np.full(shape, np.nan, np.float32)
        whole[:, :, [self.levels.index(level) for level in own]] = values
        return whole

    def dataset(self, fields: Fields | None = None) -> xr.Dataset:
        """Described as CF asks: with the fields of a single case, or empty and lazy."""
        coordinates = self.coordinates()
        arrays = {}
        for name in self.variables:
            dims = self.dims(name)
            if fields is None:
                shape = tuple(len(coordinates[dim]) for dim in dims)
                values = dask.array.full(shape, np.nan, dtype=np.float32, chunks=self.chunks(name))
            else:
                values = self.place(name, fields[name])
                values = values[None] if self.predictor.plan.is_forecast else values
            arrays[name] = (dims, values, _description(name))
        dataset = xr.Dataset(arrays, coordinates, self._attributes())
        for name in coordinates:
            pressure_levels = self.predictor.trained.pressure_levels
            dataset[name].attrs = attributes_of(name, pressure_levels=pressure_levels)
        return self.renamed(dataset)

    def renamed(self, dataset: xr.Dataset) -> xr.Dataset:
        if self.names == "cf":
            return dataset
        present = {old: new for old, new in _WEATHERBENCH2.items() if old in dataset.dims}
        return dataset.rename(present)

    def chunks(self, variable: str) -> tuple[int, ...]:
        """What is written at once: one pass of one case, some rows."""
        plan, rows = self.predictor.plan, self.predictor.row_chunk
        num_steps = min(plan.steps_per_pass, len(plan.offsets))
        sizes = {name: len(values) for name, values in self.coordinates().items()}
        sizes |= {"init_time": 1, "lead_time": num_steps, "time": len(plan.offsets)}
        if self.data != PRIMARY:  # which of its steps a pass has differs from case to case
            sizes |= {"lead_time": 1, "time": 1}
            rows = self.predictor.coverage[self.data].row(rows)
        sizes["latitude"] = min(rows, sizes["latitude"])
        return tuple(sizes[dim] for dim in self.dims(variable))

    def _attributes(self) -> dict[str, str]:
        predictor = self.predictor
        trained = predictor.trained
        return {
            "Conventions": "CF-1.11",
            "title": f"atmossl {type(predictor.task).__name__} prediction",
            "institution": "not stated",
            "source": f"atmossl {__version__}, checkpoint {trained.digest}",
            "history": f"predicted from {_named([one.name for one in predictor.segments])}",
            "references": "Lessig et al. (2023), arXiv:2308.13280",
            "comment": json.dumps(
                {
                    "task": repr(predictor.task),
                    "overlap": predictor.overlap,
                    "tilings": predictor.tilings,
                    "seed": predictor.seed,
                    "trained_on": trained.data,
                    "torch": trained.record.get("torch", "unknown"),
                }
            ),
        }


def _numbers(chosen: np.ndarray) -> slice | np.ndarray:
    """Numbers of what is chosen, as a slice if they follow one another."""
    numbers = np.flatnonzero(chosen)
    first, end = int(numbers[0]), int(numbers[-1]) + 1
    return slice(first, end) if len(numbers) == end - first else numbers


def _named(segments: list[str]) -> str:
    return f"segment{'s' if len(segments) > 1 else ''} {', '.join(segments)}"


def _description(name: str) -> dict[str, str]:
    known = VARIABLES.get(name)
    if known is None:
        return {"long_name": name.replace("_", " ")}
    found = {
        "units": known.units,
        "standard_name": known.standard_name,
        "long_name": known.long_name,
    }
    if "temperature" in known.standard_name:
        found["units_metadata"] = "temperature: on_scale"
    return found


def encoding(dataset: xr.Dataset) -> dict[str, dict[str, object]]:
    """Types on disk: whole hours where the steps allow, no fill value where nothing can lack."""
    found: dict[str, dict[str, object]] = {}
    for name, values in dataset.coords.items():
        key, kind = str(name), values.dtype.kind
        if kind == "M":
            whole = bool((values.values.astype("datetime64[h]") == values.values).all())
            unit = "hours" if whole else "seconds"
            found[key] = {"units": f"{unit} since 1900-01-01T00:00:00", "dtype": "int64"}
        elif kind == "O":
            found[key] = {
                "units": "seconds since 1900-01-01T00:00:00",
                "calendar": values.values[0].calendar,
                "dtype": "int64",
            }
        elif kind == "m":
            whole = bool((values.values % _HOUR == np.timedelta64(0)).all())
            found[key] = {"units": "hours" if whole else "seconds", "dtype": "int64"}
        else:
            found[key] = {"_FillValue": None}
    return found
