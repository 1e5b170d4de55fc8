"""Turns GRIB, NetCDF and zarr into one training store, region by region, so that it can be stopped
and continued, and is verified.

A region is a variable over some whole shards (or chunks) of time. Each is written, read back and
compared by checksum, and only then noted in the journal, so a run that was killed anywhere goes on
with the regions that are not noted.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Literal

import numpy as np
import xarray as xr
import zarr
from pydantic import AfterValidator, BeforeValidator, Field
from zarr.codecs import BloscCodec, BloscShuffle

from atmossl import __version__
from atmossl.at_work import check_is_free
from atmossl.data.axes import Calendar, integer_units
from atmossl.data.catalog import LevelKind, check_name
from atmossl.data.fingerprint import (
    UnequalError,
    changes,
    check_around,
    checksums_around,
    input_state,
    local_state,
    noted,
)
from atmossl.data.inputs import input_files, open_input
from atmossl.data.store import check_record
from atmossl.data.variables import VARIABLES
from atmossl.names import file_name
from atmossl.settings import NotNegative, Positive
from atmossl.value_faults import as_written, listed

Engine = Literal["threads", "local_cluster", "slurm"]
_LEVELS = {
    "pressure": {"standard_name": "air_pressure", "units": "hPa"},
    "model": {"standard_name": "model_level_number", "units": "1", "positive": "down"},
}
_OPENING = Lock()
_ROUNDING_DEG = 1e-4


def _storable(names: dict[str, str]) -> dict[str, str]:
    for name in names:
        check_name(name, "variables")
    return names


Names = Annotated[dict[str, str], AfterValidator(_storable)]
Axis = Literal["time", "level", "latitude", "longitude"]
# ISO dates, which YAML may have read as such; empty for null
Date = Annotated[str, BeforeValidator(lambda date: "" if date is None else str(date))]


@dataclass(frozen=True)
class IngestInput:
    """The input of an ingest; see `atmossl.data.inputs.open_input`. levels: all if empty, pressures
    in hPa or numbers of model levels (`levels_are`). start, end: ISO dates, open if empty. region:
    degrees (south, north, west, east), across the dateline if west is greater than east."""

    location: Annotated[str, Field(alias="input")]
    names: Annotated[Names, Field(alias="variables")] = field(default_factory=dict)
    select: dict[str, Any] = field(default_factory=dict)
    filters: dict[str, Any] = field(default_factory=dict)
    coordinates: dict[Axis, str] = field(default_factory=dict)
    levels: tuple[Positive, ...] = ()
    levels_are: LevelKind = "pressure"
    start: Date = ""
    end: Date = ""
    region: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class ChunkLayout:
    """The chunks of the store. time, level, lat, lon: points of a chunk; 0: the whole axis. shard:
    chunks of time in one; 0: no shards. compression: the zstd level."""

    time: NotNegative
    level: NotNegative
    lat: NotNegative
    lon: NotNegative
    shard: NotNegative
    compression: Annotated[int, Field(ge=0, le=9)]


@dataclass(frozen=True)
class WrittenRegion:
    """A region of the store that is written at once: one variable over a range of steps, without
    the end."""

    variable: str
    start: int
    stop: int

    @property
    def note(self) -> str:
        return f"{file_name(self.variable)}-{self.start}.json"


@dataclass(frozen=True)
class Job:
    """Everything that a worker in any process needs to write one region."""

    source: IngestInput
    store: str
    journal: str
    region: WrittenRegion


@dataclass(frozen=True)
class Workers:
    """Who writes the regions. engine: `threads` of this process, `local_cluster` of processes,
    `slurm` jobs. count: of threads, processes or jobs. slurm: arguments of
    dask_jobqueue.SLURMCluster: queue, cores, memory, walltime."""

    engine: Engine
    count: Positive
    slurm: dict[str, Any] = field(default_factory=dict)


def ingest(
    source: IngestInput,
    output: Path,
    layout: ChunkLayout,
    workers: Workers,
    progress: Callable[[int, int], object],
    tell: Callable[[str], object] = lambda _: None,
) -> None:
    """Write the store, or continue one that was stopped.

    progress: is called with (regions done, regions in all). tell: is called, before anything is
        written, with a line for each part of the input that is left out.

    Raises:
        ValueError: an input that cannot be read or does not fit, an output that exists, or a
            partial output that was begun with other settings or from inputs that have changed.
        OSError: what cannot be written, by file and key.
    """
    if output.suffix != ".zarr":
        raise ValueError(f"output={output} must end in .zarr")
    check_is_free(output)
    folder = output.with_name(f".{output.name}.partial")
    store, journal = folder / "store.zarr", folder / "journal"
    _opened.cache_clear()  # files of the same names may be others by now
    dataset, left_out = _entered(source)
    check_record(dataset, f"input={source.location}")
    for line in left_out:
        tell(f"{source.location}: {line}")
    with _writing(output, folder):
        _begin(dataset, source, layout, store, journal)
        regions = _regions(dataset, layout)
        pending = [region for region in regions if not (journal / region.note).exists()]
        done = len(regions) - len(pending)
        progress(done, len(regions))
        jobs = [Job(source, str(store), str(journal), region) for region in pending]
        with _runner(workers) as run:
            for _ in run(jobs):
                done += 1
                progress(done, len(regions))
        _finish(store, journal, source, regions)
        store.replace(output)
    shutil.rmtree(folder)


@contextmanager
def _writing(output: Path, folder: Path) -> Iterator[None]:
    """Turn an error of the system into one that names file and key, and says how to continue."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(
            error.errno,
            f"output={output}: cannot write {error.filename or folder} ({error.strerror}); what is "
            "written stays: make room, and the same command goes on with what is missing",
        ) from error


@lru_cache(maxsize=1)
def _opened(settings: str) -> tuple[xr.Dataset, tuple[str, ...]]:
    """The chosen part of the input, and lines on what is left out of it."""
    source, left_out = IngestInput(**json.loads(settings)), list[str]()
    where = f"input={source.location}"
    dataset = open_input(
        source.location,
        source.names,
        source.select,
        source.filters,
        left_out.append,
        {str(axis): name for axis, name in source.coordinates.items()},
        pressure_levels=source.levels_are == "pressure",
    )
    if "level" in dataset.dims and source.levels:
        have = [int(level) for level in dataset["level"].values]
        missing = sorted(set(source.levels) - set(have))
        if missing:
            raise ValueError(
                f"{where}: levels {listed(missing)} are missing; valid: {listed(have)}"
            )
        dataset = dataset.sel(level=list(source.levels))
    if source.start or source.end:
        _check_dates(dataset, source)
        dataset = dataset.sel(time=slice(source.start or None, source.end or None))
        if dataset.sizes["time"] == 0:
            raise ValueError(f"{where}: nothing from {source.start} to {source.end}")
    return _cut(dataset, source), tuple(left_out)


def _check_dates(dataset: xr.Dataset, source: IngestInput) -> None:
    calendar = Calendar.of(dataset["time"].values)
    for key, text in (("start", source.start), ("end", source.end)):
        if calendar is not None and text:
            try:
                calendar.parse(text)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error


def opened(source: IngestInput) -> xr.Dataset:
    """The chosen part of the input, opened once per process and by one thread at a time: neither
    cfgrib nor the NetCDF library may be entered by two. xarray's locks make reading serial."""
    return _entered(source)[0]


def _entered(source: IngestInput) -> tuple[xr.Dataset, tuple[str, ...]]:
    with _OPENING:
        return _opened(json.dumps(asdict(source)))


def _cut(dataset: xr.Dataset, source: IngestInput) -> xr.Dataset:
    if source.region is None:
        return dataset
    south, north, west, east = source.region
    longitude = dataset["longitude"].values
    span = (east - west) % 360.0 or 360.0
    east_of_west = (longitude - west + _ROUNDING_DEG) % 360.0
    inside = np.flatnonzero(east_of_west <= span + 2 * _ROUNDING_DEG)
    ordered = inside[np.argsort(east_of_west[inside])]
    rows = slice(south - _ROUNDING_DEG, north + _ROUNDING_DEG)
    dataset = dataset.sel(latitude=rows).isel(longitude=ordered)
    if 0 in dataset.sizes.values():
        raise ValueError(f"region={as_written(source.region)} holds no cell of {source.location}")
    return dataset


def _begin(
    dataset: xr.Dataset, source: IngestInput, layout: ChunkLayout, store: Path, journal: Path
) -> None:
    """Create the empty store, or check that the store that was begun fits this ingest."""
    settings = json.dumps([asdict(source), asdict(layout)], sort_keys=True)
    state = {
        "settings": hashlib.sha256(settings.encode()).hexdigest(),
        "inputs": input_state(input_files(source.location), dataset),
        "extent": _extent_of(dataset),
    }
    note = journal / "identity"
    if note.exists():
        _check_begun(note, state, source)
        return
    journal.mkdir(parents=True, exist_ok=True)
    coords = dataset.drop_vars(list(dataset.data_vars)).drop_encoding()
    if "time" in coords.coords:
        coords["time"].attrs = {"standard_name": "time"}
    coords["latitude"].attrs = {"standard_name": "latitude", "units": "degrees_north"}
    coords["longitude"].attrs = {"standard_name": "longitude", "units": "degrees_east"}
    if "level" in coords.coords:
        coords["level"].attrs = dict(_LEVELS[source.levels_are])
    encoding = {"time": {"units": integer_units(coords["time"].values), "dtype": "int64"}}
    coords.to_zarr(store, mode="w", encoding=encoding, consolidated=False)
    group = zarr.open_group(store, mode="r+")
    for name, array in dataset.data_vars.items():
        _make_array(group, str(name), array, layout)
    _write(note, json.dumps(state))


def _check_begun(note: Path, state: Mapping[str, Any], source: IngestInput) -> None:
    """Check that the store was begun with the same settings and from the same inputs."""
    folder = note.parents[1]
    try:
        before = json.loads(note.read_text())
    except ValueError:
        before = {}
    if before.get("settings") != state["settings"]:
        raise ValueError(f"{folder} was begun from another input or with other settings; remove it")
    changed = changes(before["inputs"], state["inputs"])
    if changed := changed or changes(before.get("extent", {}), state["extent"]):
        raise ValueError(
            f"input={source.location}: {changed} since {folder} was begun; remove that folder, and "
            "ingest starts anew"
        )


def _extent_of(dataset: xr.Dataset) -> dict[str, str]:
    """The sizes, variables and dates of an input as text, whatever the order of its dimensions."""
    dates = dataset["time"].values
    calendar = Calendar.of(dates)
    times = dates if calendar is None else calendar.encode(dates)
    return {
        "the extent": str(sorted((str(dim), size) for dim, size in dataset.sizes.items())),
        "the list of variables": str(sorted(map(str, dataset.data_vars))),
        "the time axis": hashlib.sha256(times.tobytes()).hexdigest()[:16],
    }


def _make_array(group: zarr.Group, name: str, array: xr.DataArray, layout: ChunkLayout) -> None:
    lengths = {
        "time": layout.time,
        "level": layout.level,
        "latitude": layout.lat,
        "longitude": layout.lon,
    }
    chunks = tuple(min(lengths[str(d)] or size, size) for d, size in array.sizes.items())
    shards = None
    if layout.shard and "time" in array.dims:
        shards = tuple(
            length * layout.shard if dim == "time" else -(-array.sizes[dim] // length) * length
            for dim, length in zip(array.dims, chunks, strict=True)
        )
    entry = VARIABLES.get(name)
    copied_keys = ("units", "cell_methods", "comment")
    attributes = {key: array.attrs[key] for key in copied_keys if array.attrs.get(key)}
    if entry is not None:
        said = {"standard_name": entry.standard_name, "long_name": entry.long_name}
        attributes = {"units": entry.units, **attributes, **said}
    group.create_array(
        name,
        shape=array.shape,
        chunks=chunks,
        shards=shards,
        dtype="float32",
        fill_value=np.nan,
        compressors=BloscCodec(
            cname="zstd", clevel=layout.compression, shuffle=BloscShuffle.shuffle
        ),
        dimension_names=[str(dim) for dim in array.dims],
        attributes=attributes,
    )


def _regions(dataset: xr.Dataset, layout: ChunkLayout) -> list[WrittenRegion]:
    """The regions of the store; no two of them share a chunk."""
    regions = []
    for name, array in dataset.data_vars.items():
        total = array.sizes.get("time", 1)
        length = min((layout.time or total) * max(layout.shard, 1), total)
        starts = range(0, total, length)
        regions += [WrittenRegion(str(name), s, min(s + length, total)) for s in starts]
    return regions


def write_region(job: Job) -> str:
    """Write one region, read it back, and note its checksum.

    Raises:
        ValueError: the input cannot be read there.
        OSError: what was read back differs.
    """
    region, store = job.region, Path(job.store)
    array = opened(job.source)[region.variable]
    steps = slice(region.start, region.stop)
    if "time" in array.dims:
        array = array.isel(time=steps)
    try:
        values = np.ascontiguousarray(array.compute().values, dtype=np.float32)
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(
            f"input={job.source.location}: cannot read {region.variable}, steps {region.start} to "
            f"{region.stop - 1} ({why})"
        ) from error
    target = zarr.open_array(store / region.variable, mode="r+")
    place: Any = steps if "time" in array.dims else Ellipsis
    try:
        target[place] = values
    except OSError as error:
        error.filename = error.filename or str(store / region.variable)
        raise
    checksum = hashlib.sha256(values.tobytes()).hexdigest()
    back = np.ascontiguousarray(np.asarray(target[place]))
    if hashlib.sha256(back.tobytes()).hexdigest() != checksum:
        raise OSError(f"{store}: {region} differs from what was written when it is read again")
    missing = int(np.isnan(values).sum())
    _write(Path(job.journal) / region.note, json.dumps({"sha256": checksum, "missing": missing}))
    return region.note


def _write(path: Path, text: str) -> None:
    written = path.with_name(f"{path.name}.{os.getpid()}")
    written.write_text(text)
    written.replace(path)


def _finish(
    store: Path, journal: Path, source: IngestInput, regions: Iterable[WrittenRegion]
) -> None:
    """Write provenance and checksums into the store's attributes."""
    begun = json.loads((journal / "identity").read_text())["inputs"]
    now = local_state(input_files(source.location))
    changed = changes({name: begun[name] for name in begun if name in now}, now)
    if changed:
        raise ValueError(
            f"input={source.location}: {changed} while ingest was reading; remove "
            f"{store.parent} and start anew"
        )
    notes = {r.note: json.loads((journal / r.note).read_text()) for r in regions}
    group = zarr.open_group(store, mode="r+")
    group.attrs.update(
        {
            "Conventions": "CF-1.11",
            "source": f"atmossl {__version__} data ingest",
            "inputs": [Path(file).name for file in input_files(source.location)],
            "checksums": _as_text(notes, "sha256"),
            "missing": _as_text(notes, "missing"),
        }
    )
    around = checksums_around(store, consolidated=False)
    group.attrs["checksums_around"] = json.dumps(around)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        zarr.consolidate_metadata(store)


def _as_text(notes: Mapping[str, Mapping[str, Any]], key: str) -> str:
    """One value of every region's note as JSON text, which NetCDF can hold as an attribute."""
    return json.dumps({note.removesuffix(".json"): values[key] for note, values in notes.items()})


def missing_shares(store: Path) -> dict[str, float]:
    """The share of missing values of every variable of a finished store that has some."""
    group = zarr.open_group(store, mode="r")
    counts: dict[str, int] = {}
    for note, count in noted(group.attrs, "missing").items():
        name = note.rpartition("-")[0]
        counts[name] = counts.get(name, 0) + count
    sizes = {name: array.size for name, array in group.arrays()}
    return {name: count / sizes[name] for name, count in counts.items() if count}


def verify(store: Path) -> int:
    """Read a finished store and compare it with its checksums; returns the number of regions.
    Coordinates and metadata are compared, too, if the store has checksums of them, which earlier
    versions did not write.

    Raises:
        ValueError: no checksums, a region, coordinate or variable that differs, by its name, or
            something that cannot be read.
    """
    try:
        return _verify(store)
    except UnequalError:
        raise
    except Exception as error:  # of many kinds: zarr and its codecs trust what they read
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UnequalError(f"{store} is damaged: it cannot be read ({why})") from error


def _verify(store: Path) -> int:
    group = zarr.open_group(store, mode="r", use_consolidated=False)
    checksums = noted(group.attrs, "checksums")
    if not checksums:
        raise UnequalError(f"{store} has no checksums: it was not made by atmossl data ingest")
    check_around(store, noted(group.attrs, "checksums_around"))
    starts: dict[str, list[int]] = {}
    for note in checksums:
        name, _, start = note.rpartition("-")
        starts.setdefault(name, []).append(int(start))
    for name, first_steps in starts.items():
        array = group[name]
        assert isinstance(array, zarr.Array)
        timed = "time" in (array.metadata.dimension_names or ())  # pyright: ignore
        ends = [*sorted(first_steps)[1:], array.shape[0]]
        for start, end in zip(sorted(first_steps), ends, strict=True):
            values = np.ascontiguousarray(np.asarray(array[start:end] if timed else array[:]))
            if hashlib.sha256(values.tobytes()).hexdigest() != checksums[f"{name}-{start}"]:
                raise UnequalError(f"{store}: {name} differs from its checksum from step {start}")
    return len(checksums)


@contextmanager
def _runner(workers: Workers) -> Iterator[Callable[[list[Job]], Iterator[str]]]:
    """A context that runs jobs and yields each when it is finished; the first error stops all."""
    if workers.engine == "threads":
        from dask.config import set as dask_settings  # late, as the others below

        with dask_settings(scheduler="synchronous"), ThreadPoolExecutor(workers.count) as pool:
            yield lambda jobs: _in_threads(pool, jobs)
        return
    from distributed import Client
    from distributed import as_completed as completed

    with _cluster(workers) as cluster, Client(cluster) as client:

        def run(jobs: list[Job]) -> Iterator[str]:
            futures = client.map(write_region, jobs, pure=False)
            for _, note in completed(futures, with_results=True):
                yield note

        yield run


def _in_threads(pool: ThreadPoolExecutor, jobs: list[Job]) -> Iterator[str]:
    futures = [pool.submit(write_region, job) for job in jobs]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def _cluster(workers: Workers) -> Any:
    if workers.engine == "local_cluster":
        from distributed import LocalCluster

        return LocalCluster(n_workers=workers.count, threads_per_worker=1, dashboard_address=":0")
    from dask_jobqueue.slurm import SLURMCluster

    cluster = SLURMCluster(**workers.slurm)
    cluster.scale(workers.count)
    return cluster
