"""Reports what is in a store before anything is trained on it: extent, gaps, values, and the
cost of reading windows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.storage import LocalStore

from atmossl.data.axes import (
    DROP_DUPLICATES,
    Calendar,
    read_times,
    regular_times,
    unlike_gaps,
    usual_step,
    why_uneven,
)
from atmossl.data.backends import OpenedStore
from atmossl.data.catalog import CatalogEntry, Gaps, resolve_location
from atmossl.data.chunks import Access, chunked_array
from atmossl.data.metadata import check_statements, is_mean
from atmossl.data.store import check_dims, open_entry, rename_coordinates
from atmossl.data.variables import VARIABLES, check_units
from atmossl.data.windows import WindowSize
from atmossl.value_faults import listed

_SMALL_CHUNK_BYTES = 256 * 2**10
_MUCH = 2.0  # times what a window needs


@dataclass(frozen=True)
class TimeAxis:
    """The times of a record.

    gaps: (last time before, number of steps missing). step_hours: the most frequent step. longest:
        steps of the longest part without a gap. Times are those of the calendar. refused: why
        training does not take the steps, None if it does. step_range_hours: shortest and longest
        step where they differ by more than gaps.
    """

    start: np.datetime64
    end: np.datetime64
    num_steps: int
    step_hours: float
    gaps: tuple[tuple[np.datetime64, int], ...]
    duplicates: tuple[np.datetime64, ...]
    ascending: bool
    longest: int
    calendar: Calendar
    refused: str | None
    step_range_hours: tuple[float, float] | None


@dataclass(frozen=True)
class VariableReport:
    """What `atmossl data inspect` tells of one variable.

    minimum, maximum, missing: over the sampled steps. decoded_over_needed: values decoded for a
    window over its own, by axis; reads: chunks that a window touches, all levels together. absent:
    chunks that are not in a local zarr folder, and what they read as. contradiction: what the file
    says against what the variable is taken for.
    """

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    levels: tuple[float, ...]
    gibibytes: float
    minimum: float
    maximum: float
    missing: float
    limits: tuple[float, float]
    decoded_over_needed: dict[str, float]
    reads: float
    picture: xr.DataArray
    absent: tuple[int, Any] = (0, None)
    contradiction: str = ""

    @property
    def units(self) -> str:
        return str(self.picture.attrs.get("units", ""))

    @property
    def has_values(self) -> bool:
        return self.missing < 1.0

    @property
    def within_limits(self) -> bool:
        return self.limits[0] <= self.minimum and self.maximum <= self.limits[1]


@dataclass(frozen=True)
class SegmentReport:
    """What `atmossl data inspect` tells of one segment."""

    name: str
    location: str
    time: TimeAxis
    variables: tuple[VariableReport, ...]


def time_axis(dates: np.ndarray, location: str = "the record") -> TimeAxis:
    """A description of the times of a record, which need not be in order.

    Raises:
        ValueError: they are no dates.
    """
    stored, calendar = read_times(dates, location)
    times, counts = np.unique(stored, return_counts=True)
    times = regular_times(times)
    step, breaks = np.timedelta64(0, "ns"), np.empty(0, np.int64)
    if len(times) > 1:
        step, breaks = usual_step(times)
    steps = np.diff(times)
    bounds = [0, *(breaks + 1), len(times)]
    uneven = len(times) > 1 and unlike_gaps(times)
    return TimeAxis(
        start=times[0],
        end=times[-1],
        num_steps=len(stored),
        step_hours=_hours(step),
        gaps=tuple(
            (times[n], round(float(steps[n] / step)) - 1) for n in breaks if steps[n] > 1.5 * step
        ),
        duplicates=tuple(times[counts > 1]),
        ascending=bool((np.diff(stored) > np.timedelta64(0)).all()),
        longest=int(max(end - start for start, end in pairwise(bounds))),
        calendar=calendar,
        refused=why_uneven(times, calendar) if len(breaks) else None,
        step_range_hours=(_hours(steps.min()), _hours(steps.max())) if uneven else None,
    )


def _hours(duration: np.timedelta64) -> float:
    return float(duration / np.timedelta64(1, "h"))


def time_advice(time: TimeAxis, gaps: Gaps = "error") -> list[str]:
    """What to do about times that training refuses with this choice for gaps."""
    lines = []
    if time.refused is not None and time.step_range_hours is not None:
        lines.append(f"training refuses these times: {time.refused}")
    elif time.gaps and gaps == "error":
        lines.append(
            f"`gaps: split` in the catalog entry trains on the {len(time.gaps) + 1} unbroken "
            f"parts, of which the longest has {time.longest} steps; missing times are an error "
            "otherwise"
        )
    if time.duplicates:
        lines.append(f"duplicate times are refused; {DROP_DUPLICATES}")
    if not time.ascending and not time.duplicates:
        lines.append(
            "times that do not ascend are refused; `atmossl data ingest` sorts them, and so does "
            "xarray: dataset.sortby('time')"
        )
    return lines


def inspect(entry: CatalogEntry, window: WindowSize, samples: int) -> list[SegmentReport]:
    """Reports on all segments of a catalog entry, from `samples` steps of every variable.

    Raises:
        ValueError: a store that cannot be opened, or lacks a variable of the entry.
    """
    reports = []
    for name, source in entry.segments.items():
        opened, location = open_entry(entry, name), resolve_location(source.location)
        dataset = rename_coordinates(opened.dataset, entry.coordinates, location)
        if dataset.sizes["time"] == 0:
            raise ValueError(f"{location}: its time axis is empty")
        missing = sorted(set(entry.variables.values()) - set(map(str, dataset.data_vars)))
        if missing:
            have = sorted(map(str, dataset.data_vars))
            raise ValueError(
                f"{location}: variables {listed(missing)} are missing; the store has {listed(have)}"
            )
        variables = tuple(
            replace(
                _variable(canonical, stored, dataset[stored], opened, window, samples),
                contradiction=_contradiction(canonical, dataset[stored], opened, location),
            )
            for canonical, stored in entry.variables.items()
        )
        time = time_axis(dataset["time"].values, location)
        reports.append(SegmentReport(name, location, time, variables))
    return reports


def _contradiction(variable: str, array: xr.DataArray, opened: OpenedStore, location: str) -> str:
    try:
        check_statements(
            variable, array, opened.dataset, location, pressure_levels=opened.pressure_levels
        )
    except ValueError as error:
        return str(error)
    return ""


def _variable(
    canonical: str,
    stored: str,
    array: xr.DataArray,
    opened: OpenedStore,
    window: WindowSize,
    samples: int,
) -> VariableReport:
    chunked = opened.arrays.get(stored)
    if chunked is None:
        chunked = chunked_array(array, opened.array(stored), Access(engine="zarr"), stored)
    chunks = dict(zip(map(str, array.dims), chunked.chunks, strict=True))
    steps = array
    if "time" in array.dims:
        count = min(samples, array.sizes["time"])
        steps = array.isel(time=np.linspace(0, array.sizes["time"] - 1, count).astype(int))
    steps = steps.load()
    finite = steps.values[np.isfinite(steps.values)]
    picture = steps.isel({dim: 0 for dim in steps.dims if dim not in ("latitude", "longitude")})
    entry = VARIABLES.get(canonical)
    ratios, reads = _cost(array, chunks, window)
    return VariableReport(
        name=canonical,
        dims=tuple(map(str, array.dims)),
        shape=array.shape,
        chunks=chunked.chunks,
        dtype=str(array.encoding.get("dtype", array.dtype)),
        levels=tuple(array["level"].values.tolist()) if "level" in array.dims else (),
        gibibytes=4 * math.prod(array.shape) / 2**30,
        minimum=float(finite.min()) if len(finite) else float("nan"),
        maximum=float(finite.max()) if len(finite) else float("nan"),
        missing=1 - finite.size / steps.size,
        limits=entry.physical_range if entry else (float("-inf"), float("inf")),
        decoded_over_needed=ratios,
        reads=reads,
        picture=picture.transpose("latitude", "longitude"),
        absent=_absent(opened.array(stored)),
    )


def _absent(array: zarr.Array | None) -> tuple[int, Any]:
    """The number of chunks of a local store that have no file, and the value that they read as.
    They were lost, or never written since they hold the fill value alone. For remote stores the
    answer would need a listing of all files."""
    if array is None or not isinstance(array.store, LocalStore):
        return 0, None
    return array.nchunks - array.nchunks_initialized, array.fill_value


def _cost(
    array: xr.DataArray, chunks: dict[str, int], window: WindowSize
) -> tuple[dict[str, float], float]:
    """What a window at a random place costs: values decoded over values needed along every axis,
    and the number of chunks read."""
    lengths = {"time": window.time, "latitude": window.lat, "longitude": window.lon}
    ratios, reads = {}, 1.0
    for dim, length in chunks.items():
        size = array.sizes[dim]
        points = min(lengths.get(dim, size) or size, size)
        touched = min(1 + (points - 1) / length, math.ceil(size / length))
        reads *= touched
        ratios[dim] = min(touched * length, size) / points
    return ratios, reads


def advice(variable: VariableReport, window: WindowSize) -> list[str]:
    """Advice on a variable: chunks that are not there, and what rechunking would save, if it
    would save much."""
    lines = []
    if is_mean(variable.picture):
        lines.append(
            f"{variable.name}: its values are means over time (cell_methods "
            f"{variable.picture.attrs['cell_methods']!r}), not those at its dates; compare them "
            "with such means alone"
        )
    if variable.absent[0]:
        lines.append(
            f"{variable.name}: {variable.absent[0]} chunks are not there and read as "
            f"{variable.absent[1]}; see whether they were lost"
        )
    lengths = {"time": window.time, "latitude": window.lat, "longitude": window.lon}
    for dim, ratio in variable.decoded_over_needed.items():
        if ratio > _MUCH and lengths.get(dim):
            length = dict(zip(variable.dims, variable.chunks, strict=True))[dim]
            lines.append(
                f"{variable.name}: chunks of {length} along {dim} decode {ratio:.1f} times what a "
                f"window of {lengths[dim]} needs; {max(1, lengths[dim] // 2)} would be "
                f"{_ratio_of(lengths[dim]):.1f}"
            )
    size = 4 * math.prod(variable.chunks)
    if size < _SMALL_CHUNK_BYTES and variable.reads > 8:
        lines.append(
            f"{variable.name}: a window touches {variable.reads:.0f} chunks of {size / 1024:.0f} "
            "KiB; larger ones need fewer requests"
        )
    return lines


def _ratio_of(points: int) -> float:
    length = max(1, points // 2)
    return (1 + (points - 1) / length) * length / points


def refusals(variable: VariableReport, location: str) -> list[str]:
    """The reasons why training refuses a variable as it is."""
    checks = (
        lambda: check_units(variable.name, variable.picture.attrs.get("units"), location),
        lambda: check_dims(variable.name, variable.dims, location),
    )
    lines = [f"training refuses {variable.contradiction}"] if variable.contradiction else []
    for check in checks:
        try:
            check()
        except ValueError as error:
            lines.append(f"training refuses {error}")
    return lines


def names_of(reports: Sequence[SegmentReport]) -> list[str]:
    """Names of pictures: the variable, after the segment's name where there are several
    segments."""
    several = len(reports) > 1
    return [f"{r.name}_{v.name}" if several else v.name for r in reports for v in r.variables]
