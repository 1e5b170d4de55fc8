"""Predictions to disk, part by part: what is written is readable, and an unfinished output goes on
where it stopped. It appears under its own name when it is complete."""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from atmossl.inference.blend import Part
from atmossl.inference.layout import Layout, LayoutName, encoding
from atmossl.inference.predict import Predictor

SUFFIXES = (".zarr", ".nc", ".grib2")


def check_output(output: Path, *, resume: bool = False) -> None:
    """Raise ValueError, before any work, if the output exists or its folder cannot be written."""
    if output.suffix not in SUFFIXES:
        raise ValueError(f"output={output} must end in {', '.join(SUFFIXES)}")
    if output.exists():
        raise ValueError(f"output={output} exists; choose another path or remove it")
    if partial_of(output).exists() and not resume:
        raise ValueError(
            f"output={output}: an unfinished {partial_of(output)} lies beside it; go on with "
            "resume=true, or remove it"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        probe = output.parent / f".{output.name}.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output={output} cannot be written: {error.strerror}") from error


def partial_of(output: Path) -> Path:
    """The zarr store that holds what is written so far."""
    return output.with_name(f".{output.name}.partial")


@dataclass
class _Progress:
    """What has been written, kept beside the partial store. squares: per variable, the sum over
    parts of rows times the mean square departure from the coarse cells."""

    path: Path
    request: dict[str, str]
    cases: int = 0
    rows: int = 0
    squares: dict[str, float] = field(default_factory=dict)

    def save(self) -> None:
        values = {k: v for k, v in vars(self).items() if k != "path"}
        partial = self.path.with_suffix(".tmp")
        partial.write_text(json.dumps(values))
        partial.replace(self.path)

    def add(self, part: Part) -> None:
        count = part.rows.stop - part.rows.start
        for name, mean_square in part.departure.items():
            self.squares[name] = self.squares.get(name, 0.0) + count * mean_square
            self.rows += count if name == next(iter(part.departure)) else 0


def write(
    predictor: Predictor,
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
    Layout(predictor, times, 1, names)  # refuses times before any work
    if output.suffix == ".grib2":
        from atmossl.inference.grib import check_grib

        check_grib(predictor)
    partial = partial_of(output)
    progress = _begun(partial, _request(predictor, times, names))
    advance(float(progress.cases))
    try:
        for part in _written(predictor, times, partial, names, progress):
            num_steps = next(iter(part.fields.values())).shape[0]
            rows = (part.rows.stop - part.rows.start) / predictor.grid.shape[0]
            advance(rows * num_steps / len(predictor.plan.offsets))
        _finish(partial, output, progress)
    except OSError as error:
        raise OSError(
            error.errno,
            f"output={output}: {error.strerror or error} after {progress.cases} of {len(times)} "
            f"times; they stay readable in {partial}, and resume=true goes on from there",
        ) from error
    progress.path.unlink()


def _request(predictor: Predictor, times: np.ndarray, names: str) -> dict[str, str]:
    """All that the content depends on."""
    return {
        "task": repr(predictor.task),
        "checkpoint": predictor.trained.digest,
        "data": ", ".join(segment.location for segment in predictor.segments),
        "init_time": f"{len(times)} from {times[0]} to {times[-1]}",
        "overlap": str(predictor.overlap),
        "tilings": str(predictor.tilings),
        "seed": str(predictor.seed),
        "layout": names,
    }


def _begun(partial: Path, request: dict[str, str]) -> _Progress:
    """Where an unfinished output stopped; the beginning if there is none.

    Raises:
        ValueError: it belongs to another request; names what differs.
    """
    path = partial.with_suffix(".json")
    if not path.exists() or not partial.exists():
        shutil.rmtree(partial, ignore_errors=True)
        return _Progress(path, request)
    values: dict[str, Any] = json.loads(path.read_text())
    before = values["request"]
    for key, now in request.items():
        if before.get(key) != now:
            raise ValueError(
                f"resume=true: {partial} was begun with {key}={before.get(key)}, now it is {now}; "
                "ask for the same, or remove it"
            )
    return _Progress(path, **values)


def _written(
    predictor: Predictor, times: np.ndarray, partial: Path, names: LayoutName, progress: _Progress
) -> Iterator[Part]:
    """Every part, once it is in the store."""
    done = progress.cases
    group, layout = None, None
    for part in predictor.parts(list(times[done:])):
        if group is None or layout is None:
            num_members = next(iter(part.fields.values())).shape[1]
            layout = Layout(predictor, times, num_members, names)
            if done == 0:
                shutil.rmtree(partial, ignore_errors=True)
                empty = layout.dataset()
                empty.to_zarr(partial, compute=False, encoding=encoding(empty), consolidated=False)
                progress.save()
            group = zarr.open_group(partial, mode="r+")
        _put(group, layout, part, done + part.case)
        progress.add(part)
        if part.completes:
            progress.cases = done + part.case + 1
            progress.save()
        yield part


def _put(group: zarr.Group, layout: Layout, part: Part, case: int) -> None:
    plan = layout.predictor.plan
    for name, values in part.fields.items():
        steps = slice(part.step, part.step + len(values))
        if plan.is_forecast:
            where: tuple[int | slice, ...] = (case, steps)
        else:
            first = case * len(plan.offsets)
            where = (slice(first + steps.start, first + steps.stop),)
        array = group[name]
        assert isinstance(array, zarr.Array)
        everything = (slice(None),) * (array.ndim - len(where) - 2)
        array[(*where, *everything, part.rows)] = layout.place(name, values)


def _finish(partial: Path, output: Path, progress: _Progress) -> None:
    """The complete store under its name, in the format that its ending asks for."""
    group = zarr.open_group(partial, mode="r+")
    for name, total in progress.squares.items():
        group[name].attrs["rms_departure_from_coarse_cells"] = (total / progress.rows) ** 0.5
    if output.suffix == ".zarr":
        with warnings.catch_warnings():  # that not every reader of format 3 knows of it
            warnings.simplefilter("ignore", UserWarning)
            zarr.consolidate_metadata(partial)
        partial.replace(output)
        return
    packed = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with xr.open_zarr(partial, consolidated=False, decode_timedelta=True) as store:
            store = store[sorted(map(str, store.data_vars))]  # folders are listed in any order
            if output.suffix == ".nc":
                plain = store.drop_encoding()
                plain.to_netcdf(packed, engine="netcdf4", encoding=encoding(plain))
            else:
                from atmossl.inference.grib import write_grib

                write_grib(store, packed)
        packed.replace(output)
    finally:
        packed.unlink(missing_ok=True)
    shutil.rmtree(partial)


def predictions(
    predictor: Predictor, times: np.ndarray, names: LayoutName = "cf"
) -> Iterator[xr.Dataset]:
    """One whole dataset after another, for every reference time, in memory."""
    for number, fields in enumerate(predictor.run(list(times))):
        num_members = next(iter(fields.values())).shape[1]
        yield Layout(predictor, times[number : number + 1], num_members, names).dataset(fields)
