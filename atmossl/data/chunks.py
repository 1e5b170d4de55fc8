"""Stored arrays, read chunk by chunk: through zarr, tensorstore, or whatever xarray opened."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import xarray as xr
import zarr
from xarray.conventions import decode_cf_variable
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import LocalStore

from atmossl.data.absent_chunks import declares_fill_value, without_absent
from atmossl.data.chunk_files import ChunkFiles, Scratch, notices_damage
from atmossl.data.limits import InputLimits, Notices
from atmossl.data.retries import Retries
from atmossl.setting_types import NotNegative, NotNegativeFloat, Positive

Engine = Literal["auto", "files", "tensorstore", "zarr"]
Region = tuple[slice, ...]
_PACKING = ("_FillValue", "missing_value", "scale_factor", "add_offset", "dtype", "_Unsigned")
_FASTEST_FIRST: tuple[Engine, ...] = ("files", "tensorstore", "zarr")
_NEEDS = {
    "files": "reads local zarr folders with blosc, zstd or no compression and without shards only",
    "tensorstore": "reads local zarr folders with codecs that tensorstore knows, where it is "
    "installed",
}
_UNCHUNKED_STEPS = 32  # time steps read at once where a file has no chunks


@dataclass(frozen=True)
class ReadSettings:
    """How stores are read, `data.read` of a configuration.

    engine: `files` decodes chunks where they are wanted, `tensorstore` those of any codec, both
        from local zarr folders only; `auto` takes the first of files, tensorstore and zarr that can
        read the store. threads: chunks of one process in flight at once.
    retries: further tries of whatever a remote store fails at, its opening, metadata or chunks;
        the first after `retry_wait_s` seconds, then twice as long each time.
    """

    engine: Engine = "auto"
    threads: Positive = 4
    retries: NotNegative = 3
    retry_wait_s: NotNegativeFloat = 0.5


@dataclass(frozen=True)
class Access(ReadSettings):
    """How stores are read, and what is done with values that are no atmosphere's.

    input_limits: whether windows with values that no atmosphere has are refused, or taken with a
        warning, or not looked for; see `atmossl.data.limits`. notices: what was warned of.
    """

    input_limits: InputLimits = "refuse"
    notices: Notices = field(default_factory=Notices, compare=False, repr=False)

    def retries_of(self, location: str) -> Retries:
        return Retries.of(location, self.retries, self.retry_wait_s)


class ChunkedArray(Protocol):
    """A stored array. `chunks`: the lengths of what is decoded as a whole, along every axis."""

    @property
    def chunks(self) -> tuple[int, ...]: ...

    def read(self, region: Region) -> np.ndarray:
        """Values of a region inside one chunk, unpacked, NaN where they are missing. They may lie
        in memory that the next read of the same thread writes over."""
        ...


class SharedChunks(ABC):
    """A chunked array that is a part of a stored one, whose chunks hold other variables, too."""

    @property
    @abstractmethod
    def decoded_with(self) -> Hashable:
        """The same for all that lie in the same chunks; their regions have the same bounds."""

    @property
    @abstractmethod
    def chunks(self) -> tuple[int, ...]: ...

    @abstractmethod
    def read_all(self, arrays: Sequence[Any], regions: Sequence[Region]) -> list[np.ndarray]:
        """Regions of several such arrays inside one chunk, which is decoded once."""

    def read(self, region: Region) -> np.ndarray:
        return self.read_all([self], [region])[0]


_scratch = Scratch()


def _lengths(region: Region) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in region)


@dataclass(frozen=True)
class Packing:
    """CF packing of a stored array: fill values, scale and offset, undone by xarray."""

    attributes: Mapping[str, Any]

    @classmethod
    def of(cls, array: xr.DataArray) -> "Packing | None":
        """The packing of an opened variable, or None if its values are stored as they are."""
        found = {key: array.encoding[key] for key in _PACKING if key in array.encoding}
        stored = np.dtype(found.pop("dtype", array.dtype))
        fills = [found[key] for key in ("_FillValue", "missing_value") if key in found]
        plain = stored.kind == "f" and all(np.all(np.isnan(fill)) for fill in fills)
        if plain and "scale_factor" not in found and "add_offset" not in found:
            return None
        return cls(found)

    def undo(self, values: np.ndarray) -> np.ndarray:
        dims = [f"axis_{n}" for n in range(values.ndim)]
        variable = xr.Variable(dims, values, dict(self.attributes))
        decoded = decode_cf_variable("packed", variable, decode_times=False)
        return np.asarray(decoded.values)


@dataclass(frozen=True)
class ZarrChunks:
    """Read through the zarr library: any store and codec that it knows."""

    array: zarr.Array
    packing: Packing | None

    @property
    def chunks(self) -> tuple[int, ...]:
        return self.array.chunks

    def read(self, region: Region) -> np.ndarray:
        try:
            values = self._decoded(region)
        except Exception as error:
            values = self._decoded_by_zarr(region, error)
        if not self._fill_is_declared:
            values, absent = without_absent(self.array, region, values)
            if absent:
                return values
        return self.packing.undo(values) if self.packing else values

    @cached_property
    def _fill_is_declared(self) -> bool:
        return declares_fill_value(self.array)

    def _decoded(self, region: Region) -> np.ndarray:
        """Values as they are stored."""
        values = _scratch.array(_lengths(region), np.dtype(self.array.dtype))
        out = default_buffer_prototype().nd_buffer.from_numpy_array(values)
        self.array.get_basic_selection(region, out=out)
        return values

    def _decoded_by_zarr(self, region: Region, error: Exception) -> np.ndarray:
        """What zarr makes of a chunk that this engine cannot decode.

        Raises:
            Exception: zarr's own, or `error` where zarr would not notice that a chunk is damaged.
        """
        if type(self) is ZarrChunks or not notices_damage(self.array):
            raise error
        return ZarrChunks._decoded(self, region)


@dataclass(frozen=True)
class FileChunks(ZarrChunks):
    """Read and decoded here, from local zarr folders with blosc, zstd or no compression."""

    files: ChunkFiles

    def _decoded(self, region: Region) -> np.ndarray:
        number = tuple(part.start // size for part, size in zip(region, self.chunks, strict=True))
        values = _scratch.array(self.chunks, np.dtype(self.array.dtype))
        self.files.read(number, values)
        origin = (n * size for n, size in zip(number, self.chunks, strict=True))
        inside = (slice(p.start - n, p.stop - n) for p, n in zip(region, origin, strict=True))
        return values[tuple(inside)]


@dataclass(frozen=True)
class TensorstoreChunks(ZarrChunks):
    """Read through tensorstore: decoding and cutting out in C++, for local zarr folders.

    The handle is opened on first use, and again in every process.
    """

    threads: int

    @cached_property
    def handle(self) -> Any:
        """The array as tensorstore opens it; ValueError if it does not know its codec or type."""
        import tensorstore

        assert isinstance(self.array.store, LocalStore)
        folder = Path(self.array.store.root) / self.array.path
        driver = "zarr" if self.array.metadata.zarr_format == 2 else "zarr3"
        spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{folder}/"}}
        context = tensorstore.Context(
            {
                "data_copy_concurrency": {"limit": self.threads},
                "cache_pool": {"total_bytes_limit": 0},
            }
        )
        return tensorstore.open(spec, context=context, open=True, read=True).result()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "handle"}

    def _decoded(self, region: Region) -> np.ndarray:
        import tensorstore

        source = self.handle[region]
        values = _scratch.array(source.shape, source.dtype.numpy_dtype)
        target = tensorstore.array(values, copy=False)[tensorstore.d[:].translate_to[source.origin]]
        target.write(source).result()
        return values


@dataclass(frozen=True)
class XarrayChunks:
    """Read through xarray: NetCDF, GRIB, references, and arrays in memory."""

    array: xr.DataArray

    @property
    def chunks(self) -> tuple[int, ...]:
        known = self.array.encoding.get("preferred_chunks", {})
        known = known | {dim: lengths[0] for dim, lengths in self.array.chunksizes.items()}
        return tuple(
            int(known.get(dim, min(size, _UNCHUNKED_STEPS) if dim == "time" else size))
            for dim, size in self.array.sizes.items()
        )

    def read(self, region: Region) -> np.ndarray:
        return self.array[region].values


@dataclass(frozen=True)
class MemoryChunks:
    """An array in memory: one chunk, of which regions are views."""

    array: np.ndarray

    @property
    def chunks(self) -> tuple[int, ...]:
        return self.array.shape

    def read(self, region: Region) -> np.ndarray:
        return self.array[region]


def chunked_array(
    array: xr.DataArray, stored: zarr.Array | None, access: Access, location: str
) -> ChunkedArray:
    """The fastest reader for an opened variable; `stored` is its zarr array if it has one.

    Raises:
        ValueError: the engine that is asked for cannot read this store.
    """
    if stored is None:
        return XarrayChunks(array)
    packing = Packing.of(array)
    for engine in _FASTEST_FIRST if access.engine == "auto" else (access.engine,):
        reader = _reader(engine, stored, packing, access.threads)
        if reader is not None:
            return reader
    readable = [e for e in _FASTEST_FIRST if _reader(e, stored, packing, access.threads)]
    raise ValueError(
        f"data.read.engine={access.engine} {_NEEDS[access.engine]}, and the store is {location}; "
        f"valid: {', '.join(['auto', *readable])}"
    )


def _reader(
    engine: Engine, stored: zarr.Array, packing: Packing | None, threads: int
) -> ZarrChunks | None:
    """The reader of an engine; None if the engine cannot read such an array."""
    if engine == "zarr":
        return ZarrChunks(stored, packing)
    if engine == "files":
        files = ChunkFiles.of(stored)
        return None if files is None else FileChunks(stored, packing, files)
    reader = TensorstoreChunks(stored, packing, threads)
    return reader if isinstance(stored.store, LocalStore) and _opens(reader) else None


def _opens(reader: TensorstoreChunks) -> bool:
    """Whether tensorstore is installed and knows the codec, the type and the format."""
    try:
        return reader.handle is not None
    except Exception:  # of many types, none of them documented; another engine reads the array
        return False


def zarr_array_of(array: ChunkedArray) -> zarr.Array | None:
    """The zarr array that values are read from; None if they come from anything else."""
    stored = getattr(array, "array", None)
    return stored if isinstance(stored, zarr.Array) else None
