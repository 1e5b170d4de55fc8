"""Writes predictions to disk, part by part. What is written is readable at once, and an
unfinished output can be continued. It gets its own name when it is complete."""

import errno
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import dask.array
import numpy as np
import xarray as xr
import zarr

from atmossl import __version__
from atmossl.at_work import Stopped, check_is_free
from atmossl.batch import PRIMARY, StreamSpec
from atmossl.checkpoint_files import read_sealed, write_sealed
from atmossl.data.fingerprint import fingerprint
from atmossl.data.variables import VARIABLES
from atmossl.geometry import Grid
from atmossl.inference.plan import BlendedPart, Fields, Plan
from atmossl.inference.tiles import predict_parts
from atmossl.names import ENSEMBLE
from atmossl.value_faults import as_written

# How predictions are named, dimensioned and described: CF, and the names of WeatherBench 2.

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
    """The CF attributes of a coordinate of predictions and latents."""
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

    plan: Plan
    times: np.ndarray
    num_members: int
    names: LayoutName = "cf"
    data: str = PRIMARY

    def __post_init__(self) -> None:
        if not self.plan.steps.is_forecast and (np.diff(self.valid_times) <= 0).any():
            apart = self.plan.steps.extent * self.plan.step / _HOUR
            raise ValueError(
                f"init_time: every case writes {len(self.steps)} steps, so that some valid times "
                f"come twice or out of order; choose times {apart:g} h apart or more, or "
                "init_time=all"
            )

    @cached_property
    def _written(self) -> list[np.ndarray]:
        """For every case, the times from the reference time to its steps."""
        used = self.plan
        return [used.leads_of(self.data, time, used.leads) for time in self.times]

    @cached_property
    def steps(self) -> np.ndarray:
        """The times from the reference time to the steps that any case has."""
        return self.plan.leads[np.isin(self.plan.leads, np.concatenate(self._written))]

    @cached_property
    def valid_times(self) -> np.ndarray:
        leads = self._written
        return np.concatenate([time + lags for time, lags in zip(self.times, leads, strict=True)])

    @property
    def is_empty(self) -> bool:
        return len(self.steps) == 0

    @property
    def specs(self) -> list[StreamSpec]:
        return [spec for spec in self.plan.trained.specs if spec.data == self.data]

    @property
    def levels(self) -> list[int]:
        return sorted({level for spec in self.specs for level in spec.levels})

    def levels_of(self, variable: str) -> tuple[int, ...]:
        """Levels of a variable in hPa; (0,) at the surface."""
        return self.plan.trained.predicted_levels(self.data)[variable]

    @property
    def variables(self) -> list[str]:
        """All predicted variables."""
        return list(self.plan.trained.predicted_levels(self.data))

    @property
    def grid(self) -> Grid:
        return self.plan.grid_of(self.data)

    def where(self, case: int, leads: np.ndarray) -> tuple[int | slice | np.ndarray, ...]:
        """The position of some steps of a case along the first dimensions."""
        if self.plan.steps.is_forecast:
            return case, _numbers(np.isin(self.steps, leads))
        return (_numbers(np.isin(self.valid_times, self.times[case] + leads)),)

    def dims(self, variable: str) -> tuple[str, ...]:
        times = ("init_time", "lead_time") if self.plan.steps.is_forecast else ("time",)
        levels = () if self.levels_of(variable) == (0,) else ("level",)
        return (*times, "member", *levels, "latitude", "longitude")

    def coordinates(self) -> dict[str, np.ndarray]:
        grid = self.grid
        dates = self.plan.segment.calendar.dates
        coordinates = {
            "init_time": dates(self.times),
            "lead_time": self.steps.astype("timedelta64[ns]"),
            "time": dates(self.valid_times),
            "member": np.array(self.plan.members or range(self.num_members)),
            "level": np.array(self.levels, np.int64),
            "latitude": grid.latitude,
            "longitude": grid.longitude,
        }
        unused = {"time"} if self.plan.steps.is_forecast else {"init_time", "lead_time"}
        unused |= set() if self.levels else {"level"}
        return {name: values for name, values in coordinates.items() if name not in unused}

    def place(self, variable: str, values: np.ndarray) -> np.ndarray:
        """Values [step member level lat lon] on all levels of the prediction, NaN at levels that
        the variable lacks; without level axis at the surface."""
        levels = self.levels_of(variable)
        if levels == (0,):
            return values[:, :, 0]
        if list(levels) == self.levels:
            return values
        shape = (*values.shape[:2], len(self.levels), *values.shape[3:])
        whole = np.full(shape, np.nan, np.float32)
        whole[:, :, [self.levels.index(level) for level in levels]] = values
        return whole

    def dataset(self, fields: Fields | None = None) -> xr.Dataset:
        """A dataset with CF attributes: with the fields of a single case, or empty and lazy."""
        coordinates, trained, arrays = self.coordinates(), self.plan.trained, {}
        for name in self.variables:
            dims = self.dims(name)
            if fields is None:
                shape, chunks = tuple(len(coordinates[dim]) for dim in dims), self.chunks(name)
                lazy = {"dtype": np.float32, "name": f"missing-{name}"}  # else dask hashes for long
                values = dask.array.full(shape, np.nan, chunks=chunks, **lazy)
            else:
                values = self.place(name, fields[name])
                values = values[None] if self.plan.steps.is_forecast else values
            arrays[name] = (dims, values, _description(name))
        described = {
            name: (name, values, attributes_of(name, pressure_levels=trained.pressure_levels))
            for name, values in coordinates.items()
        }
        described["member"][-1][ENSEMBLE] = "noise" if trained.model.any_member else "tail"
        return self.renamed(xr.Dataset(arrays, described, self._attributes()))

    def renamed(self, dataset: xr.Dataset) -> xr.Dataset:
        if self.names == "cf":
            return dataset
        present = {old: new for old, new in _WEATHERBENCH2.items() if old in dataset.dims}
        return dataset.rename(present)

    def chunks(self, variable: str) -> tuple[int, ...]:
        """The chunks of a variable: as much as is written at once, one pass of one case, some
        rows."""
        steps, rows = self.plan.steps, self.plan.row_chunk
        num_steps = min(steps.steps_per_pass, len(steps.offsets))
        sizes = {name: len(values) for name, values in self.coordinates().items()}
        sizes |= {"init_time": 1, "lead_time": num_steps, "time": len(steps.offsets)}
        if self.data != PRIMARY:  # which of its steps a pass has differs from case to case
            sizes |= {"lead_time": 1, "time": 1}
            rows = self.plan.coverage[self.data].row(rows)
        sizes["latitude"] = min(rows, sizes["latitude"])
        return tuple(sizes[dim] for dim in self.dims(variable))

    def _attributes(self) -> dict[str, str]:
        plan, trained = self.plan, self.plan.trained
        noun = "segments" if len(plan.segments) > 1 else "segment"
        names = ", ".join(segment.name for segment in plan.segments)
        return {
            "Conventions": "CF-1.11",
            "title": f"atmossl {type(plan.task).__name__} prediction",
            "institution": "not stated",
            "source": f"atmossl {__version__}, checkpoint {trained.digest}",
            "history": f"predicted from {noun} {names}",
            "references": "Lessig et al. (2023), arXiv:2308.13280",
            "comment": json.dumps(
                {
                    "task": repr(plan.task),
                    "overlap": plan.options.overlap,
                    "tilings": plan.options.tilings,
                    "seed": plan.options.seed,
                    "trained_on": trained.data,
                    "torch": trained.checkpoint_record.get("torch", "unknown"),
                }
            ),
        }


def _numbers(chosen: np.ndarray) -> slice | np.ndarray:
    """The positions that are chosen, as a slice if they follow one another."""
    numbers = np.flatnonzero(chosen)
    first, end = int(numbers[0]), int(numbers[-1]) + 1
    return slice(first, end) if len(numbers) == end - first else numbers


def _description(name: str) -> dict[str, str]:
    entry = VARIABLES.get(name)
    if entry is None:
        return {"long_name": name.replace("_", " ")}
    attributes = {
        "units": entry.units,
        "standard_name": entry.standard_name,
        "long_name": entry.long_name,
    }
    if "temperature" in entry.standard_name:
        attributes["units_metadata"] = "temperature: on_scale"
    return attributes


def encoding(dataset: xr.Dataset) -> dict[str, dict[str, object]]:
    """The types on disk: whole hours where steps allow, no fill value where no value can be
    missing."""
    encodings: dict[str, dict[str, object]] = {}
    for name, values in dataset.coords.items():
        key, kind = str(name), values.dtype.kind
        if kind == "M":
            whole = bool((values.values.astype("datetime64[h]") == values.values).all())
            unit = "hours" if whole else "seconds"
            encodings[key] = {"units": f"{unit} since 1900-01-01T00:00:00", "dtype": "int64"}
        elif kind == "O":
            encodings[key] = {
                "units": "seconds since 1900-01-01T00:00:00",
                "calendar": values.values.flat[0].calendar,  # valid times of latents have two axes
                "dtype": "int64",
            }
        elif kind == "m":
            whole = bool((values.values % _HOUR == np.timedelta64(0)).all())
            encodings[key] = {"units": "hours" if whole else "seconds", "dtype": "int64"}
        else:
            encodings[key] = {"_FillValue": None}
    return encodings


_NUM_SAMPLED = 8  # times at which the fields of a store are compared when an output goes on
SUFFIXES = (".zarr", ".nc", ".grib2")


def check_output(output: Path, *, resume: bool = False) -> None:
    """Raise ValueError, before any work, if the output exists. That its folder can be written
    was shown when the output was locked (`atmossl.at_work`)."""
    if output.suffix not in SUFFIXES:
        raise ValueError(f"output={output} must end in {', '.join(SUFFIXES)}")
    check_is_free(output, is_folder=output.suffix == ".zarr")
    if partial_of(output).exists() and not resume:
        raise ValueError(
            f"output={output}: an unfinished {partial_of(output)} lies beside it; go on with "
            "resume=true, or remove it"
        )
    if output.suffix == ".grib2":
        from atmossl.inference.grib import eccodes_module

        eccodes_module()


def partial_of(output: Path) -> Path:
    """The unfinished zarr store of an output."""
    return output.with_name(f".{output.name}.partial")


@dataclass
class _Progress:
    """The progress of writing, kept beside the partial store. squares: per variable, the sum
    over parts of rows times the mean square departure from the coarse cells."""

    path: Path
    request: dict[str, str]
    cases: int = 0
    rows: int = 0
    squares: dict[str, float] = field(default_factory=dict)

    def save(self) -> None:
        values = {k: v for k, v in vars(self).items() if k != "path"}
        write_sealed(self.path, values)

    def add(self, part: BlendedPart, case: int) -> None:
        """Count a part of a case that is in the store."""
        count = part.rows.stop - part.rows.start
        for name, mean_square in part.departure.items():
            self.squares[name] = self.squares.get(name, 0.0) + count * mean_square
            self.rows += count if name == next(iter(part.departure)) else 0
        if part.completes:
            self.cases = case + 1
            self.save()


def write(
    plan: Plan,
    times: np.ndarray,
    output: Path,
    *,
    names: LayoutName = "cf",
    resume: bool = False,
    advance: Callable[[float], object] = float,  # of no consequence
) -> None:
    """Predict all times and write them. `advance` is told the share of a case that each part is.

    Raises:
        ValueError: the output exists, or was begun by another request.
        OSError: the disk is full or gone; what is written stays, and `resume` goes on from it.
    """
    check_output(output, resume=resume)
    check_request(plan, times, output, names)
    partial = partial_of(output)
    progress = _begun(partial, _request(plan, times, names))
    done, layouts, groups = progress.cases, {}, {}
    advance(float(done))
    try:
        for part in predict_parts(plan, list(times[done:])):
            if not layouts:  # the first part tells the number of members
                num_members = next(iter(part.fields.values())).shape[1]
                layouts = _layouts(plan, times, num_members, names)
                if done == 0:
                    _make_empty(partial, layouts)
                    progress.save()
                groups = {data: _opened_group(partial, data) for data in layouts}
            _put(groups[part.data], layouts[part.data], part, done + part.case)
            progress.add(part, done + part.case)
            advance(_share_of_case(plan, part))
        _finish(partial, output, progress)
    except OSError as error:
        words, remains = error.strerror or error, _kept(progress, times, partial)
        raise OSError(error.errno, f"output={output}: {words} after {remains}") from error
    except Stopped as stop:
        stop.remains = f"output={output}: after {_kept(progress, times, partial)}"
        raise
    progress.path.unlink()


def _opened_group(partial: Path, data: str) -> zarr.Group:
    """The group of the unfinished store that holds the streams of a source."""
    return zarr.open_group(partial, path=group_of(data), mode="r+")


def _share_of_case(plan: Plan, part: BlendedPart) -> float:
    """The share of a case's work that a part is; 0 for streams that are written beside others."""
    if part.data != PRIMARY:
        return 0.0
    rows = (part.rows.stop - part.rows.start) / plan.grid.shape[0]
    return rows * len(part.leads) / len(plan.leads)


def check_request(plan: Plan, times: np.ndarray, output: Path, names: LayoutName = "cf") -> int:
    """The number of bytes that will be written, before compression. Raises ValueError, before
    anything is read, for a task that fits neither store nor model, or a prediction that the
    output cannot hold."""
    grids = _layouts(plan, times, 1, names)
    if output.suffix == ".grib2":
        from atmossl.inference.grib import check_grib

        check_grib(plan)
        if len(grids) > 1:
            raise ValueError(
                f"output: .grib2 of streams with data={as_written(sorted(grids)[1:])} beside the "
                "others: one file holds one grid here; write .zarr or .nc"
            )
    return sum(layout.dataset().nbytes for layout in grids.values())


def _kept(progress: _Progress, times: np.ndarray, partial: Path) -> str:
    count = f"{progress.cases} of {len(times)} times"
    return f"{count}; they stay readable in {partial}, and resume=true goes on from there"


def _request(plan: Plan, times: np.ndarray, names: str) -> dict[str, str]:
    """All settings on which the content of the output depends."""
    return {
        "task": repr(plan.task),
        "checkpoint": plan.trained.digest,
        "data": ", ".join(segment.location for segment in plan.segments),
        "init_time": f"{len(times)} from {times[0]} to {times[-1]}, sha256 {_digest(times)}",
        "overlap": str(plan.options.overlap),
        "tilings": str(plan.options.tilings),
        "seed": str(plan.options.seed),
        "members": str(plan.options.members),
        "missing": "fill" if plan.options.fill_missing else "keep",
        "layout": names,
        **_content_of_stores(plan, times),
    }


def _content_of_stores(plan: Plan, times: np.ndarray) -> dict[str, str]:
    """A hash of the state of each store: of the whole, and of the fields at some of the times.
    Empty for a single time, since nothing of it would be kept."""
    if len(times) == 1:
        return {}
    chosen = times[np.unique(np.linspace(0, len(times) - 1, _NUM_SAMPLED).astype(int))]
    steps: dict[int, list[int]] = {}
    for time in chosen:
        try:
            source = plan.find(time).segment
        except ValueError:  # prediction refuses it; what was begun with other dates says so first
            continue
        number = next(n for n, segment in enumerate(plan.segments) if segment is source)
        steps.setdefault(number, []).append(source.find_time(time))
    states = {}
    for number, segment in enumerate(plan.segments):
        key = f"content of {segment.location} ({segment.name})"
        states[key] = fingerprint([segment], steps=steps.get(number, ()))
        for data, read in segment.auxiliaries.items():
            states[f"{key}, data={data}"] = fingerprint([read.segment])
    return states


def _digest(times: np.ndarray) -> str:
    """A hash that tells lists of dates apart that have the same ends."""
    return hashlib.sha256(np.ascontiguousarray(times).tobytes()).hexdigest()[:8]


def _begun(partial: Path, request: dict[str, str]) -> _Progress:
    """The progress of an unfinished output; that of an empty one if there is none.

    Raises:
        ValueError: it belongs to another request; names what differs.
    """
    path = partial.with_suffix(".json")
    if not path.exists() or not partial.exists():
        shutil.rmtree(partial, ignore_errors=True)
        return _Progress(path, request)
    try:
        values = read_sealed(path)
        begun = _Progress(path, **values)
        before = dict(begun.request)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"resume=true: {path} is damaged, so what {partial} holds is not known; remove both"
        ) from error
    for key, now in request.items():
        if before.get(key) != now:
            raise ValueError(
                f"resume=true: {partial} was begun with {key}={before.get(key)}, now it is {now}; "
                "use the same settings, or remove it"
            )
    return begun


def _layouts(
    plan: Plan, times: np.ndarray, num_members: int, names: LayoutName
) -> dict[str, OutputLayout]:
    """The output layout of every source of which anything is written, by the streams' `data`.

    Raises:
        ValueError: times that do not fit, or a group that would have the name of a variable.
    """
    layouts = {
        data: OutputLayout(plan, times, num_members, names, data)
        for data in sorted(plan.coverage, key=group_of)
    }
    root = layouts[PRIMARY]
    clashes = {*root.variables, *root.coordinates()} & set(map(group_of, layouts))
    if clashes:
        raise ValueError(
            f"output: the group of streams with data={as_written(sorted(clashes))} would have the "
            "name of a variable or coordinate; name the catalog entry otherwise"
        )
    return {data: layout for data, layout in layouts.items() if not layout.is_empty}


def _make_empty(partial: Path, layouts: dict[str, OutputLayout]) -> None:
    """Create a store of missing values."""
    shutil.rmtree(partial, ignore_errors=True)
    for data, layout in layouts.items():
        empty = layout.dataset()
        empty.to_zarr(
            partial,
            group=group_of(data) or None,
            mode="a" if group_of(data) else "w",
            compute=False,
            encoding=encoding(empty),
            consolidated=False,
        )


def _put(group: zarr.Group, layout: OutputLayout, part: BlendedPart, case: int) -> None:
    where = layout.where(case, part.leads)
    for name, values in part.fields.items():
        array = group[name]
        assert isinstance(array, zarr.Array)
        other_axes = (slice(None),) * (array.ndim - len(where) - 2)
        place = (*where, *other_axes, part.rows, slice(None))
        array[place] = layout.place(name, values)


def _finish(partial: Path, output: Path, progress: _Progress) -> None:
    """Give the complete store its name, in the format that its ending asks for."""
    group = zarr.open_group(partial, mode="r+")
    grids = sorted(group.group_keys())
    for name, total in progress.squares.items():
        group[name].attrs["rms_departure_from_coarse_cells"] = (total / progress.rows) ** 0.5
    if output.suffix == ".zarr":
        with warnings.catch_warnings():  # that not every reader of format 3 knows of it
            warnings.simplefilter("ignore", UserWarning)
            for name in (*grids, group_of(PRIMARY)):
                zarr.consolidate_metadata(partial, path=name)
        partial.replace(output)
        return
    packed = output.with_name(f".{output.name}.packed")
    packed.unlink(missing_ok=True)  # of a process that was killed
    try:
        for name in (group_of(PRIMARY), *grids):
            _pack(partial, name, packed, output.suffix)
        packed.replace(output)
    finally:
        packed.unlink(missing_ok=True)
    shutil.rmtree(partial)


def _pack(partial: Path, group: str, packed: Path, suffix: str) -> None:
    """Write one group of the store as a group of a NetCDF file, or as GRIB2."""
    with xr.open_zarr(partial, group=group, consolidated=False, decode_timedelta=True) as store:
        store = store[sorted(map(str, store.data_vars))]  # folders are listed in any order
        if suffix == ".nc":
            plain = store.drop_encoding()
            form, mode = encoding(plain), "a" if group else "w"
            try:
                plain.to_netcdf(packed, mode, group=group or None, engine="netcdf4", encoding=form)
            except RuntimeError as error:  # all that HDF5 says of a full disk
                why = f"{error}, as on a full disk"
                raise OSError(errno.EIO, why) from error
        else:
            from atmossl.inference.grib import write_grib

            write_grib(store, packed)
