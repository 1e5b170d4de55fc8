"""Predictions to disk, part by part: what is written is readable, and an unfinished output goes on
where it stopped. It appears under its own name when it is complete."""

import errno
import hashlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xarray as xr
import zarr

from atmossl.batch import PRIMARY
from atmossl.data.fingerprint import fingerprint
from atmossl.inference.blend import BlendedPart
from atmossl.inference.layout import LayoutName, OutputLayout, encoding, group_of
from atmossl.inference.predict import Predictor
from atmossl.sealed import read_sealed, write_sealed
from atmossl.stops import Stopped

_NUM_SAMPLED = 8  # times at which the fields of a store are compared when an output goes on
SUFFIXES = (".zarr", ".nc", ".grib2")


def check_output(output: Path, *, resume: bool = False) -> None:
    """Raise ValueError, before any work, if the output exists. Whoever owns it (`atmossl.locks`)
    has shown that its folder can be written."""
    if output.suffix not in SUFFIXES:
        raise ValueError(f"output={output} must end in {', '.join(SUFFIXES)}")
    if output.exists():
        raise ValueError(f"output={output} exists; choose another path or remove it")
    if partial_of(output).exists() and not resume:
        raise ValueError(
            f"output={output}: an unfinished {partial_of(output)} lies beside it; go on with "
            "resume=true, or remove it"
        )
    if output.suffix == ".grib2":
        from atmossl.inference.grib import eccodes_module

        eccodes_module()


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
        write_sealed(self.path, values)

    def add(self, part: BlendedPart) -> None:
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
    check_request(predictor, times, output, names)
    partial = partial_of(output)
    progress = _begun(partial, _request(predictor, times, names))
    advance(float(progress.cases))
    try:
        for part in _written(predictor, times, partial, names, progress):
            rows = (part.rows.stop - part.rows.start) / predictor.grid.shape[0]
            share = rows * len(part.leads) / len(predictor.leads)
            advance(share if part.data == PRIMARY else 0.0)
        _finish(partial, output, progress)
    except OSError as error:
        words, kept = error.strerror or error, _kept(progress, times, partial)
        raise OSError(error.errno, f"output={output}: {words} after {kept}") from error
    except Stopped as stop:
        stop.kept = f"output={output}: after {_kept(progress, times, partial)}"
        raise
    progress.path.unlink()


def check_request(
    predictor: Predictor, times: np.ndarray, output: Path, names: LayoutName = "cf"
) -> None:
    """Raise ValueError, before anything is read, for a task that fits neither store nor model, or
    a prediction that the output cannot hold."""
    predictor.check()
    grids = _layouts(predictor, times, 1, names)
    if output.suffix == ".grib2":
        from atmossl.inference.grib import check_grib

        check_grib(predictor)
        if len(grids) > 1:
            raise ValueError(
                f"output: .grib2 of streams with data={sorted(grids)[1:]} beside the others: one "
                "file holds one grid here; write .zarr or .nc"
            )


def _kept(progress: _Progress, times: np.ndarray, partial: Path) -> str:
    count = f"{progress.cases} of {len(times)} times"
    return f"{count}; they stay readable in {partial}, and resume=true goes on from there"


def _request(predictor: Predictor, times: np.ndarray, names: str) -> dict[str, str]:
    """All that the content depends on."""
    return {
        "task": repr(predictor.task),
        "checkpoint": predictor.trained.digest,
        "data": ", ".join(segment.location for segment in predictor.segments),
        "init_time": f"{len(times)} from {times[0]} to {times[-1]}, sha256 {_digest(times)}",
        "overlap": str(predictor.overlap),
        "tilings": str(predictor.tilings),
        "seed": str(predictor.seed),
        "missing": "fill" if predictor.fill_missing else "keep",
        "layout": names,
        **_content_of_stores(predictor, times),
    }


def _content_of_stores(predictor: Predictor, times: np.ndarray) -> dict[str, str]:
    """By store, a hash of its state: of the whole, and of the fields at some of the times. For one
    time there is none, since nothing of it would be kept."""
    if len(times) == 1:
        return {}
    chosen = times[np.unique(np.linspace(0, len(times) - 1, _NUM_SAMPLED).astype(int))]
    steps: dict[int, list[int]] = {}
    for time in chosen:
        try:
            source = predictor.find(time).segment
        except ValueError:  # prediction refuses it; what was begun with other dates says so first
            continue
        number = next(n for n, one in enumerate(predictor.segments) if one is source)
        steps.setdefault(number, []).append(source.find_time(time))
    states = {}
    for number, segment in enumerate(predictor.segments):
        key = f"content of {segment.location} ({segment.name})"
        states[key] = fingerprint([segment], steps=steps.get(number, ()))
        for data, read in segment.auxiliaries.items():
            states[f"{key}, data={data}"] = fingerprint([read.segment])
    return states


def _digest(times: np.ndarray) -> str:
    """Tells lists of dates apart that have the same ends."""
    return hashlib.sha256(np.ascontiguousarray(times).tobytes()).hexdigest()[:8]


def _begun(partial: Path, request: dict[str, str]) -> _Progress:
    """Where an unfinished output stopped; the beginning if there is none.

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
                "ask for the same, or remove it"
            )
    return begun


def _written(
    predictor: Predictor, times: np.ndarray, partial: Path, names: LayoutName, progress: _Progress
) -> Iterator[BlendedPart]:
    """Every part, once it is in the store."""
    done = progress.cases
    layouts: dict[str, OutputLayout] = {}
    groups: dict[str, zarr.Group] = {}
    for part in predictor.parts(list(times[done:])):
        if not layouts:
            num_members = next(iter(part.fields.values())).shape[1]
            layouts = _layouts(predictor, times, num_members, names)
            if done == 0:
                _make_empty(partial, layouts)
                progress.save()
            groups = {
                data: zarr.open_group(partial, path=group_of(data), mode="r+") for data in layouts
            }
        _put(groups[part.data], layouts[part.data], part, done + part.case)
        progress.add(part)
        if part.completes:
            progress.cases = done + part.case + 1
            progress.save()
        yield part


def _layouts(
    predictor: Predictor, times: np.ndarray, num_members: int, names: LayoutName
) -> dict[str, OutputLayout]:
    """By the streams' `data`, for every source of which anything is written.

    Raises:
        ValueError: times that do not fit, or a group that would have the name of a variable.
    """
    layouts = {
        data: OutputLayout(predictor, times, num_members, names, data)
        for data in sorted(predictor.coverage, key=group_of)
    }
    root = layouts[PRIMARY]
    taken = {*root.variables, *root.coordinates()} & set(map(group_of, layouts))
    if taken:
        raise ValueError(
            f"output: the group of streams with data={sorted(taken)} would have the name of a "
            "variable or coordinate; name the catalog entry otherwise"
        )
    return {data: layout for data, layout in layouts.items() if not layout.is_empty}


def _make_empty(partial: Path, layouts: dict[str, OutputLayout]) -> None:
    """A store of missing values."""
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
        everything = (slice(None),) * (array.ndim - len(where) - 2)
        place = (*where, *everything, part.rows, slice(None))
        array[place] = layout.place(name, values)


def _finish(partial: Path, output: Path, progress: _Progress) -> None:
    """The complete store under its name, in the format that its ending asks for."""
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
    """One group of the store as a group of a NetCDF file, or as GRIB2."""
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


def predictions(
    predictor: Predictor, times: np.ndarray, names: LayoutName = "cf", data: str = PRIMARY
) -> Iterator[xr.Dataset]:
    """One whole dataset after another, in memory, for every reference time at which the streams
    with that `data` have steps to write."""
    for number, fields in enumerate(predictor.run(list(times), data)):
        if fields:
            num_members = next(iter(fields.values())).shape[1]
            case = times[number : number + 1]
            yield OutputLayout(predictor, case, num_members, names, data).dataset(fields)
