"""Opens what lies at a location, lazily and read-only, by its format: zarr (folder, zip, URL),
icechunk, kerchunk references, NetCDF files, and the layouts of AtmoRep and anemoi-datasets.

Names, units and axes are still those of the file; `atmossl.data.store` brings them into one form.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import xarray as xr
import zarr
import zarr.errors
from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore, ZipStore

from atmossl.data.axes import SharedLabels
from atmossl.data.catalog import SegmentEntry, resolve_location
from atmossl.data.chunks import Access, ChunkedArray
from atmossl.data.metadata import FileStatements
from atmossl.data.netcdf import SharedNetcdf, open_netcdf_file
from atmossl.extras import missing_extra

# What a file holds, by its first bytes: names tell too little (`gfs.t00z.pgrb2.0p25.f006`).

GRIB, NETCDF, ZIP = "GRIB", "NetCDF", "a zip archive"
_ENDINGS = (".grib", ".grib1", ".grib2", ".grb", ".grb1", ".grb2", ".nc", ".nc4", ".cdf")
ZARR_METADATA = ("zarr.json", ".zgroup", ".zmetadata")
_BEGINNINGS = {
    b"CDF\x01": NETCDF,
    b"CDF\x02": NETCDF,
    b"CDF\x05": NETCDF,
    b"\x89HDF\r\n\x1a\n": NETCDF,
    b"PK\x03\x04": ZIP,
    b"PK\x05\x06": ZIP,
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"BZh": "compressed by bzip2: unpack it first",
    b"\xfd7zXZ\x00": "compressed by xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it first",
    b"\x1f\x9d": "compressed: unpack it first",
    b"\x0e\x03\x13\x01": "HDF 4: convert it to NetCDF first",
}
_HEAD = 4096  # bulletin headers may precede the first GRIB message


@dataclass(frozen=True)
class DataFiles:
    """The GRIB and NetCDF files of a folder or pattern, and the other files there with the
    reason why they are passed over."""

    files: tuple[Path, ...]
    passed_over: tuple[str, ...]


def kind_of(path: Path) -> str:
    """What a file is by its first bytes: `GRIB`, `NetCDF`, `a zip archive`, or in words why it
    is none of them."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return "empty"
    for beginning, kind in _BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    at = head.find(b"GRIB")
    while at >= 0:
        if head[at + 7 : at + 8] in (b"\x01", b"\x02"):  # the edition
            return GRIB
        at = head.find(b"GRIB", at + 1)
    if any(head[n : n + 8] == b"\x89HDF\r\n\x1a\n" for n in (512, 1024, 2048)):
        return NETCDF
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    return "neither GRIB nor NetCDF by its first bytes"


def is_zarr(path: Path) -> bool:
    """Whether a folder is a zarr store, of format 2 or 3."""
    return path.is_dir() and any((path / name).exists() for name in ZARR_METADATA)


def zarr_stores_at(location: str) -> list[str]:
    """The zarr stores that a location names: itself, or those of a folder or pattern."""
    path = Path(location)
    if "://" in location or is_zarr(path):
        return [location]
    folder, pattern = (path.parent, path.name) if "*" in path.name else (path, "*")
    return [str(store) for store in sorted(folder.glob(pattern)) if is_zarr(store)]


def data_files(location: str) -> DataFiles:
    """The data files of a folder or of a pattern; hidden files do not count.

    Raises:
        ValueError: a file whose ending promises data that are not there.
    """
    path = Path(location)
    paths: Iterable[Path] = path.iterdir() if path.is_dir() else path.parent.glob(path.name)
    files, passed_over = [], []
    for entry in sorted(entry for entry in paths if not entry.name.startswith(".")):
        kind = "a folder" if entry.is_dir() else kind_of(entry)
        if kind in (GRIB, NETCDF):
            files.append(entry)
        elif entry.suffix in _ENDINGS and not entry.is_dir():
            raise ValueError(f"input {entry}: the file is {kind}; remove it or fetch it again")
        else:
            passed_over.append(f"{entry.name} ({kind})")
    return DataFiles(tuple(files), tuple(passed_over))


def holds_grib(location: str) -> bool:
    """Whether a location is a GRIB file, or a folder or pattern with one. GRIB is read through
    `atmossl data ingest` alone."""
    path = Path(location)
    if "://" in location or is_zarr(path) or not (path.exists() or "*" in location):
        return False
    files = [path] if path.is_file() else data_files(location).files
    return any(kind_of(file) == GRIB for file in files)


_DEFAULT_ACCESS = Access()
_LOGGER = logging.getLogger(__name__)
_NETCDF_ENDINGS = (".nc", ".nc4")
REFERENCES = (".json", ".parq", ".parquet")


@dataclass(frozen=True)
class OpenedStore:
    """A dataset as xarray sees it, and the zarr group behind it if there is one.

    arrays: readers by the name in the dataset, for layouts that only an adapter understands.
    pressure_levels: whether its levels are pressures in hPa; AtmoRep's may be numbers of a model.
    model_levels: whether they surely are such numbers.
    """

    dataset: xr.Dataset
    group: zarr.Group | None = None
    arrays: Mapping[str, ChunkedArray] = field(default_factory=dict)
    pressure_levels: bool = True
    model_levels: bool = False

    def array(self, name: str) -> zarr.Array | None:
        """The zarr array of a variable by its name in the store."""
        member = self.group.get(name) if self.group is not None else None
        return member if isinstance(member, zarr.Array) else None


def is_missing(entry: SegmentEntry) -> bool:
    """Whether nothing lies at the path of a store; unknown of URLs and patterns."""
    location = resolve_location(entry.location)
    return "://" not in location and "*" not in location and not Path(location).exists()


def open_store(entry: SegmentEntry, access: Access = _DEFAULT_ACCESS) -> OpenedStore:
    """Open a store; a remote one that fails is tried again.

    Raises:
        ValueError: there is no such store, it cannot be opened, or a package is missing.
    """
    location = resolve_location(entry.location)
    if is_missing(entry):
        raise ValueError(
            f"store {location} does not exist; valid: a zarr store, a NetCDF file, a folder or a "
            "pattern of such files, or a URL"
        )
    if entry.format == "auto":
        _check_folder(Path(location))
    kind = _format_of(location) if entry.format == "auto" else entry.format
    try:
        retries = access.retries_of(location)
        return retries.call(lambda: _OPENERS[kind](location, entry.storage_options))
    except ImportError as error:
        text = missing_extra(error) or f"needs a package that is not installed ({error})"
        raise ValueError(f"store {location} of format {kind} {text}") from error
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(
            f"store {location} cannot be opened as {kind} ({type(error).__name__}: {why})"
        ) from error


def _check_folder(path: Path) -> None:
    """Raise ValueError for a folder that is neither a store nor holds files of data."""
    if not path.is_dir():
        return
    names = sorted(entry.name for entry in path.iterdir())
    holds_files = any(kind in (NETCDF, GRIB) for kind in _kinds_in(path))
    if not is_zarr(path) and not holds_files:
        shown = ", ".join(names[:3]) or "nothing"
        raise ValueError(
            f"store {path}: the folder holds {shown}, and neither zarr nor files of NetCDF; valid: "
            "the folder of a zarr store, or one with .nc files"
        )


def _format_of(location: str) -> str:
    """The format of a store: by the first bytes of a local file, else by the name.

    Raises:
        ValueError: a file of another format.
    """
    path = Path(location)
    if location.endswith(REFERENCES):
        return "kerchunk"
    if "*" in location or ("://" in location and location.endswith(_NETCDF_ENDINGS)):
        return "netcdf"
    if path.is_file():
        kind = kind_of(path)
        if kind not in (NETCDF, ZIP):
            raise ValueError(
                f"store {location}: the file is {kind}; valid: NetCDF, zarr. `atmossl data ingest` "
                "reads GRIB and makes a zarr store of it"
            )
        if kind == ZIP:
            _check_zip(path)
        return "netcdf" if kind == NETCDF else "zarr"
    if path.is_dir() and not is_zarr(path) and NETCDF in _kinds_in(path):
        return "netcdf"
    return "zarr"


def _kinds_in(folder: Path) -> Iterator[str]:
    files = (path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
    return map(kind_of, files)


def _check_zip(path: Path) -> None:
    """Raise ValueError if a zip archive holds no zarr store. The CDS, for example, sends
    archives of NetCDF files."""
    try:
        with ZipFile(path) as archive:
            names = archive.namelist()
    except BadZipFile as error:
        raise ValueError(f"store {path}: the zip archive is truncated or damaged") from error
    if not any(name in ZARR_METADATA for name in names):
        raise ValueError(
            f"store {path}: a zip archive without a zarr store at its top, of "
            f"{', '.join(names[:3]) or 'nothing'}; unpack it, and give the folder"
        )


def _open_zarr(location: str, options: dict[str, Any]) -> OpenedStore:
    """A zarr store as a dataset, also one of a layout that needs an adapter."""
    plain = {key: value for key, value in options.items() if key != "number"}
    store = zarr_store(location, plain)
    group = zarr.open_group(store, mode="r")
    kind = _layout_of(group)
    return _as_dataset(store, group) if kind == "zarr" else _OPENERS[kind](location, options)


def _layout_of(group: zarr.Group) -> str:
    """The layout of a zarr group: `anemoi`, `atmorep`, or `zarr` for a plain dataset. Attributes
    decide, as far as they can: each further look into a remote store takes time."""
    for layout, attribute, arrays in (
        ("anemoi", "variables", ("data", "dates", "latitudes", "longitudes")),
        ("atmorep", "fields", ("data", "time", "lats", "lons")),
    ):
        if attribute in group.attrs and all(name in group for name in arrays):
            return layout
    return "zarr"


def zarr_store(location: str, options: dict[str, Any]) -> Store:
    """The zarr store at a path or URL, read-only."""
    if "://" not in location and Path(location).is_file():
        return ZipStore(location, mode="r")
    if "://" in location:
        return FsspecStore.from_url(location, storage_options=options, read_only=True)
    return LocalStore(location, read_only=True)


def _with_group(store: Store) -> OpenedStore:
    return _as_dataset(store, zarr.open_group(store, mode="r"))


def _as_dataset(store: Store, group: zarr.Group) -> OpenedStore:
    consolidated = group.metadata.consolidated_metadata is not None
    if consolidated and isinstance(store, LocalStore):
        current = zarr.open_group(store, mode="r", use_consolidated=False)
        if _shapes(current) != _shapes(group):  # arrays that were added or grew since
            group, consolidated = current, False
    dataset = xr.open_dataset(store, engine="zarr", consolidated=consolidated)  # pyright: ignore
    return OpenedStore(dataset, group)


def _shapes(group: zarr.Group) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in group.arrays()}


def _open_netcdf(location: str, options: dict[str, Any]) -> OpenedStore:
    """NetCDF as one dataset: a file, or all files of a folder or pattern, joined along time."""
    del options
    path = Path(location)
    if path.is_file():
        _check_whole(path)
        return OpenedStore(open_netcdf_file(path))
    there = data_files(location)
    files = [str(file) for file in there.files if kind_of(file) == NETCDF]
    if not files:
        raise FileNotFoundError("no NetCDF file matches")
    if passed_over := [*there.passed_over, *(f.name for f in there.files if str(f) not in files)]:
        _LOGGER.warning("%s: files passed over: %s", location, ", ".join(passed_over[:8]))
    for file in files:
        _check_whole(Path(file))
    units: dict[str, set[str]] = {}
    labels, statements = SharedLabels(), FileStatements()

    def noted(dataset: xr.Dataset) -> xr.Dataset:
        for name, array in dataset.data_vars.items():
            units.setdefault(str(name), set()).add(str(array.attrs.get("units", "")))
            statements.add(str(name), array, Path(dataset.encoding.get("source", "")).name)
        return labels.applied(dataset)

    with joining():
        dataset = xr.open_mfdataset(
            files,
            engine=SharedNetcdf,
            combine="by_coords",
            data_vars="minimal",
            coords="minimal",  # pyright: ignore[reportArgumentType]
            compat="override",
            join="outer",
            chunks={"time": 32},
            preprocess=noted,
        )
    dataset = statements.onto(dataset)
    for name, stated in units.items():
        if len(stated) > 1:  # joined as they are, and refused where the variable is wanted
            dataset[name].attrs["units"] = sorted(stated)
    return OpenedStore(dataset)


def _check_whole(path: Path) -> None:
    """Raise ValueError if a NetCDF 3 file ends early: the library would read zeros beyond."""
    with path.open("rb") as file:
        if file.read(4) not in (b"CDF\x01", b"CDF\x02"):
            return
    from scipy.io import netcdf_file  # late: validating a configuration needs no SciPy

    try:
        with netcdf_file(path, "r", mmap=True):
            pass
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is truncated: it is shorter than its header says") from error


@contextmanager
def joining() -> Iterator[None]:
    """Explain xarray's error where it cannot join files by their coordinates."""
    try:
        yield
    except ValueError as error:
        if "monotonic" not in str(error):
            raise
        raise ValueError(
            "files overlap or alternate along an axis, or their coordinates differ in order or in "
            f"the last digits: {error}"
        ) from error


def _open_icechunk(location: str, options: dict[str, Any]) -> OpenedStore:
    """An icechunk repository as a dataset.

    options: `branch` (default main), `tag` or `snapshot_id`; `virtual_chunks`, prefixes of the
        files outside of the repository that it may read (on s3 anonymously); for s3 the arguments
        of `icechunk.s3_storage` besides bucket and prefix.
    """
    import icechunk

    if "://" not in location and not Path(location).is_dir():
        raise NotADirectoryError("an icechunk repository is a folder")
    version = {k: options[k] for k in ("branch", "tag", "snapshot_id") if k in options}
    elsewhere = {
        prefix: icechunk.s3_credentials(anonymous=True) if prefix.startswith("s3://") else None
        for prefix in options.get("virtual_chunks", ())
    }
    s3_options = {k: v for k, v in options.items() if k not in (*version, "virtual_chunks")}
    if location.startswith("s3://"):
        bucket, _, prefix = location.removeprefix("s3://").partition("/")
        storage = icechunk.s3_storage(bucket=bucket, prefix=prefix, **s3_options)
    else:
        storage = icechunk.local_filesystem_storage(location)
    repository = icechunk.Repository.open(
        storage, authorize_virtual_chunk_access=icechunk.containers_credentials(elsewhere) or None
    )
    session = repository.readonly_session(**version or {"branch": "main"})
    return _with_group(session.store)


def _open_kerchunk(location: str, options: dict[str, Any]) -> OpenedStore:
    """References to chunks of other files, as kerchunk and virtualizarr write them, as a dataset.

    options: those of fsspec's reference file system, `remote_protocol` for example.
    """
    import fsspec

    files = fsspec.filesystem("reference", fo=location, asynchronous=True, **options)
    return _with_group(FsspecStore(files, read_only=True, path=""))


def _open_atmorep(location: str, options: dict[str, Any]) -> OpenedStore:
    from atmossl.data.layouts import atmorep

    dataset, arrays = atmorep(zarr.open_group(zarr_store(location, options), mode="r"))
    return OpenedStore(dataset, None, arrays, pressure_levels=False)


def _open_anemoi(location: str, options: dict[str, Any]) -> OpenedStore:
    """A store of anemoi-datasets as a dataset. options: `number`, the member of an ensemble; all
    other options go to fsspec."""
    from atmossl.data.layouts import anemoi

    plain = {key: value for key, value in options.items() if key != "number"}
    group = zarr.open_group(zarr_store(location, plain), mode="r")
    dataset, arrays = anemoi(group, options.get("number"))
    return OpenedStore(dataset, None, arrays)


_OPENERS: dict[str, Callable[[str, dict[str, Any]], OpenedStore]] = {
    "zarr": _open_zarr,
    "netcdf": _open_netcdf,
    "icechunk": _open_icechunk,
    "kerchunk": _open_kerchunk,
    "atmorep": _open_atmorep,
    "anemoi": _open_anemoi,
}
