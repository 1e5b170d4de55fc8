"""Reads stored arrays chunk by chunk, through one of several engines: our own decoder of chunk
files, zarr, or whatever xarray opened.

`chunked_array` chooses the engine. Where to cut windows, and what values mean, is not known here.
"""

import itertools
import math
import os
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import numcodecs.blosc
import numcodecs.zstd
import numpy as np
import xarray as xr
import zarr
from pydantic import Field
from xarray.conventions import decode_cf_variable
from zarr.codecs import BytesCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from atmossl.data.variables import InputLimits, Notices
from atmossl.settings import NotNegative, Positive, Seconds

# One way to try again what a remote store failed at: opening it, its metadata, its chunks.

T = TypeVar("T")
_FINAL = (FileNotFoundError, NotADirectoryError, PermissionError, ImportError)


@dataclass(frozen=True)
class Retries:
    """How often a failed read is repeated. count: further tries, the first after `wait_s`
    seconds, each next one after twice the wait."""

    count: int
    wait_s: float

    @classmethod
    def of(cls, location: str, count: int, wait_s: float) -> "Retries":
        """The retries of a store. A local store is not tried again, nor is a remote one for data
        that do not exist or are forbidden."""
        return cls(count if "://" in location else 0, wait_s)

    def call(self, action: Callable[[], T]) -> T:
        """The result of the action at the first try that does not fail."""
        wait = self.wait_s
        for _ in range(self.count):
            try:
                return action()
            except _FINAL:
                raise
            except Exception:
                time.sleep(wait)
                wait *= 2
        return action()


# Chunks that a zarr store does not hold.
#
# Zarr reads such a chunk as the array's fill value. An array that declares none has zeros
# there: a temperature of 0 K, a wind of 0 m/s. Here they are missing values, NaN, so that they
# are refused or masked as all missing values are. An array that declares its fill value keeps
# its meaning, as xarray writes them: it leaves out chunks that are nothing but zeros, of
# precipitation say.


def without_absent(
    array: zarr.Array, region: tuple[slice, ...], values: np.ndarray
) -> tuple[np.ndarray, bool]:
    """Values of a region, with NaN in chunks that the store lacks if the array declares no fill
    value; and whether there are such chunks.

    The store is asked only for chunks that read as nothing but zeros, so this costs nothing.
    """
    if values.size == 0 or declares_fill_value(array):
        return values, False
    absent = [
        inside
        for number, inside in _stored_chunks(array, region)
        if not _any(values[inside]) and not _is_stored(array, number)
    ]
    if not absent:
        return values, False
    values = values.astype(np.result_type(values.dtype, np.float32))
    for inside in absent:
        values[inside] = np.nan
    return values, True


def declares_fill_value(array: zarr.Array) -> bool:
    """Whether an array says what its unwritten values mean: by an attribute `_FillValue`, or by
    a fill value other than none or zarr's default, 0."""
    if "_FillValue" in array.attrs:
        return True
    return array.fill_value is not None and bool(array.fill_value != 0)


def _any(values: np.ndarray) -> bool:
    """Whether any value is not 0. The first value is looked at alone first, as it mostly
    decides."""
    return bool(values[(0,) * values.ndim] != 0) or bool(values.any())


def _stored_chunks(
    array: zarr.Array, region: tuple[slice, ...]
) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """The positions of the stored chunks, or shards, that a region touches, and the share of the
    region in each."""
    axes = []
    for part, length in zip(region, array.shards or array.chunks, strict=True):
        numbers = range(part.start // length, (part.stop - 1) // length + 1)
        bounds = [
            slice(max(n * length, part.start) - part.start,
                  min((n + 1) * length, part.stop) - part.start)
            for n in numbers
        ]  # fmt: skip
        axes.append(list(zip(numbers, bounds, strict=True)))
    touched = []
    for combination in itertools.product(*axes):
        number, inside = zip(*combination, strict=True)
        touched.append((number, inside))
    return touched


def _is_stored(array: zarr.Array, number: tuple[int, ...]) -> bool:
    path = array.store_path / array.metadata.encode_chunk_key(number)
    return bool(sync(path.exists()))


# Chunks of a local zarr folder, read and decoded into memory that is used again and again.
#
# Libraries give every chunk fresh memory, for its file and for its values, and copy what is
# wanted out of it; here a chunk's values are handed out where they were decoded. What is
# decoded is checked to be the whole chunk of a whole file: memory holds the chunk before it
# otherwise.

_LARGEST_SCRATCH = 1 << 26  # bytes that a thread keeps between reads
_BLOSC_HEADER = struct.Struct("<4x3I")  # bytes decoded, of a block, and of the whole file
_ZSTD_MAGIC = 0xFD2FB528


class Scratch(threading.local):
    """Memory for decoded values, one piece for every reading thread. Fresh memory for every
    chunk would cost half as much as the decoding: the system clears it page by page."""

    memory = np.empty(0, np.uint8)

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = math.prod(shape) * dtype.itemsize
        if size > _LARGEST_SCRATCH:
            return np.empty(shape, dtype)
        if size > len(self.memory):
            self.memory = np.empty(size, np.uint8)
        return self.memory[:size].view(dtype).reshape(shape)


_encoded = Scratch()


@dataclass(frozen=True)
class ChunkFiles:
    """The chunks of one array, each in a file. codec: a key of `_DECODERS`."""

    array: zarr.Array
    folder: Path
    codec: str

    @classmethod
    def of(cls, array: zarr.Array) -> "ChunkFiles | None":
        """The chunk files of an array; None if its chunks are no files in a local folder, or
        have another codec."""
        codec = _codec(array)
        if codec is None or not isinstance(array.store, LocalStore):
            return None
        return cls(array, Path(array.store.root) / array.path, codec)

    def read(self, number: tuple[int, ...], out: np.ndarray) -> None:
        """Values of a chunk, which has the same shape everywhere; fill values if it is absent.

        Raises:
            OSError: the file cannot be read.
            ValueError, RuntimeError: it does not hold one whole chunk.
        """
        try:
            encoded = _read_file(self.folder / self.array.metadata.encode_chunk_key(number))
        except FileNotFoundError:
            fill = self.array.fill_value
            out[...] = 0 if fill is None else fill
            return
        _DECODERS[self.codec](encoded, out.reshape(-1).view(np.uint8))


def notices_damage(array: zarr.Array) -> bool:
    """Whether the zarr library refuses every chunk that is cut short. For blosc it does not: it
    decodes what lies in memory behind the end of the file."""
    return not any("blosc" in _name(compressor) for compressor in array.compressors)


def _codec(array: zarr.Array) -> str | None:
    if array.shards is not None or array.filters or array.order != "C":
        return None
    if array.metadata.zarr_format == 3:
        serializer = array.serializer
        if not isinstance(serializer, BytesCodec) or serializer != BytesCodec():
            return None  # of another byte order than this machine's
    if np.dtype(array.dtype).kind not in "fiu" or len(array.compressors) > 1:
        return None
    names = [_name(compressor) for compressor in array.compressors] or ["none"]
    return names[0] if names[0] in _DECODERS else None


def _name(compressor) -> str:
    """The name of a codec, of zarr v3 or of numcodecs in zarr v2."""
    if hasattr(compressor, "codec_id"):
        return compressor.codec_id
    return str(compressor.to_dict()["name"])


def _read_file(path: Path) -> np.ndarray:
    with path.open("rb", buffering=0) as file:
        encoded = _encoded.array((os.fstat(file.fileno()).st_size,), np.dtype(np.uint8))
        filled = 0
        while filled < len(encoded):
            count = file.readinto(encoded.data[filled:])
            if not count:
                raise OSError(f"{path} ends after {filled} of {len(encoded)} bytes")
            filled += count
    return encoded


def _decode_blosc(encoded: np.ndarray, out: np.ndarray) -> None:
    if len(encoded) < 16:
        raise ValueError(f"{len(encoded)} bytes are no blosc header")
    decoded_size, _, size = _BLOSC_HEADER.unpack_from(encoded.data)
    _check("encoded", len(encoded), size)
    _check("decoded", decoded_size, len(out))
    numcodecs.blosc.decompress(encoded, out)


def _decode_zstd(encoded: np.ndarray, out: np.ndarray) -> None:
    """Decode a chunk of zstd, which refuses by itself a file that is cut short or too long."""
    decoded_size = _zstd_content_size(encoded)
    if decoded_size is not None:  # else the decoder itself demands an exact fit
        _check("decoded", decoded_size, len(out))
    numcodecs.zstd.decompress(encoded, out)


def _zstd_content_size(encoded: np.ndarray) -> int | None:
    """The number of bytes that a zstd frame decodes to, if the frame says so (RFC 8878, section
    3.1.1.1)."""
    head = encoded[:18].tobytes().ljust(18, b"\0")
    if int.from_bytes(head[:4], "little") != _ZSTD_MAGIC:
        raise ValueError("no zstd frame")
    flags = head[4]
    single_segment, dictionary = bool(flags & 0x20), (0, 1, 2, 4)[flags & 3]
    length = (int(single_segment), 2, 4, 8)[flags >> 6]
    if length == 0:
        return None
    start = 5 + (not single_segment) + dictionary
    size = int.from_bytes(head[start : start + length], "little")
    return size + 256 if length == 2 else size


def _copy(encoded: np.ndarray, out: np.ndarray) -> None:
    _check("stored", len(encoded), len(out))
    out[...] = encoded


def _check(kind: str, actual: int, expected: int) -> None:
    if actual != expected:
        raise ValueError(f"{actual} {kind} bytes in place of {expected}")


_DECODERS: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
    "blosc": _decode_blosc,
    "zstd": _decode_zstd,
    "none": _copy,
}


Engine = Literal["auto", "files", "zarr"]
Region = tuple[slice, ...]
_PACKING = ("_FillValue", "missing_value", "scale_factor", "add_offset", "dtype", "_Unsigned")
_UNCHUNKED_STEPS = 32  # time steps read at once where a file has no chunks


@dataclass(frozen=True)
class ReadSettings:
    """How stores are read, `data.read` of a configuration.

    engine: `files` decodes chunks where they are wanted, from local zarr folders of usual codecs;
        `auto` takes it where it can read the store, and else `zarr`.
    threads: chunks of one process in flight at once.
    retries: further tries of whatever a remote store fails at, its opening, metadata or chunks;
        the first after `retry_wait`, then twice as long each time.
    """

    engine: Engine = "auto"
    threads: Positive = 4
    retries: NotNegative = 3
    retry_wait_s: Annotated[Seconds, Field(alias="retry_wait")] = 0.5


@dataclass(frozen=True)
class Access(ReadSettings):
    """How stores are read, and what happens to values that no atmosphere has.

    input_limits: whether windows with values that no atmosphere has are refused, or taken with a
        warning, or not looked for; see `atmossl.data.variables`. notices: what was warned of.
    """

    input_limits: InputLimits = "refuse"
    notices: Notices = field(default_factory=Notices, compare=False, repr=False)

    def retries_of(self, location: str) -> Retries:
        return Retries.of(location, self.retries, self.retry_wait_s)


class ChunkedArray(Protocol):
    """A stored array that is read chunk by chunk. `chunks`: the length of a chunk along every
    axis."""

    @property
    def chunks(self) -> tuple[int, ...]: ...

    def read(self, region: Region) -> np.ndarray:
        """Values of a region inside one chunk, unpacked, NaN where they are missing. They may lie
        in memory that the next read of the same thread writes over."""
        ...


class SharedChunks(ABC):
    """A chunked array that is a part of a stored array whose chunks hold other variables, too."""

    @property
    @abstractmethod
    def decoded_with(self) -> Hashable:
        """A key that is equal for all arrays in the same chunks; regions of these arrays have
        the same bounds."""

    @property
    @abstractmethod
    def chunks(self) -> tuple[int, ...]: ...

    @abstractmethod
    def read_all(self, arrays: Sequence[Any], regions: Sequence[Region]) -> list[np.ndarray]:
        """Regions of several such arrays inside one chunk, which is decoded once for all of
        them."""

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
        encoding = {key: array.encoding[key] for key in _PACKING if key in array.encoding}
        stored = np.dtype(encoding.pop("dtype", array.dtype))
        fills = [encoding[key] for key in ("_FillValue", "missing_value") if key in encoding]
        plain = stored.kind == "f" and all(np.all(np.isnan(fill)) for fill in fills)
        if plain and "scale_factor" not in encoding and "add_offset" not in encoding:
            return None
        return cls(encoding)

    def undo(self, values: np.ndarray) -> np.ndarray:
        dims = [f"axis_{n}" for n in range(values.ndim)]
        variable = xr.Variable(dims, values, dict(self.attributes))
        decoded = decode_cf_variable("packed", variable, decode_times=False)
        return np.asarray(decoded.values)


@dataclass(frozen=True)
class ZarrChunks:
    """Reads through the zarr library, which knows every kind of store and codec."""

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
        """The values of a region as they are stored, packed or not."""
        values = _scratch.array(_lengths(region), np.dtype(self.array.dtype))
        out = default_buffer_prototype().nd_buffer.from_numpy_array(values)
        self.array.get_basic_selection(region, out=out)
        return values

    def _decoded_by_zarr(self, region: Region, error: Exception) -> np.ndarray:
        """The values of a region by the zarr library, for a chunk that this engine cannot decode.

        Raises:
            Exception: zarr's own, or `error` where zarr would not notice that a chunk is damaged.
        """
        if type(self) is ZarrChunks or not notices_damage(self.array):
            raise error
        return ZarrChunks._decoded(self, region)


@dataclass(frozen=True)
class FileChunks(ZarrChunks):
    """Reads and decodes chunk files directly: local zarr folders with blosc, zstd or no
    compression."""

    files: ChunkFiles

    def _decoded(self, region: Region) -> np.ndarray:
        number = tuple(part.start // size for part, size in zip(region, self.chunks, strict=True))
        values = _scratch.array(self.chunks, np.dtype(self.array.dtype))
        self.files.read(number, values)
        origin = (n * size for n, size in zip(number, self.chunks, strict=True))
        inside = (slice(p.start - n, p.stop - n) for p, n in zip(region, origin, strict=True))
        return values[tuple(inside)]


@dataclass(frozen=True)
class XarrayChunks:
    """Reads through xarray: NetCDF, GRIB, kerchunk references, and arrays in memory."""

    array: xr.DataArray

    @property
    def chunks(self) -> tuple[int, ...]:
        lengths_by_dim = self.array.encoding.get("preferred_chunks", {})
        lengths_by_dim = lengths_by_dim | {
            dim: lengths[0] for dim, lengths in self.array.chunksizes.items()
        }
        return tuple(
            int(lengths_by_dim.get(dim, min(size, _UNCHUNKED_STEPS) if dim == "time" else size))
            for dim, size in self.array.sizes.items()
        )

    def read(self, region: Region) -> np.ndarray:
        return self.array[region].values


@dataclass(frozen=True)
class MemoryChunks:
    """An array in memory, as one chunk; regions are views of it."""

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
    files = None if access.engine == "zarr" else ChunkFiles.of(stored)
    if files is not None:
        return FileChunks(stored, packing, files)
    if access.engine == "files":
        raise ValueError(
            "data.read.engine=files reads local zarr folders with blosc, zstd or no compression "
            f"and without shards only, and the store is {location}; valid: auto, zarr"
        )
    return ZarrChunks(stored, packing)


def zarr_array_of(array: ChunkedArray) -> zarr.Array | None:
    """The zarr array behind an array of xarray; None if its values come from anything else."""
    stored = getattr(array, "array", None)
    return stored if isinstance(stored, zarr.Array) else None
