"""Chunks of a local zarr folder, read and decoded into memory that is used again and again.

Libraries give every chunk fresh memory, for its file and for its values, and copy what is wanted
out of it; here a chunk's values are handed out where they were decoded. What is decoded is checked
to be the whole chunk of a whole file: memory holds the chunk before it otherwise.
"""

import math
import os
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numcodecs.blosc
import numcodecs.zstd
import numpy as np
import zarr
from zarr.codecs import BytesCodec
from zarr.storage import LocalStore

_LARGEST_SCRATCH = 1 << 26  # bytes that a thread keeps between reads
_BLOSC_HEADER = struct.Struct("<4x3I")  # bytes decoded, of a block, and of the whole file
_ZSTD_MAGIC = 0xFD2FB528


class Scratch(threading.local):
    """Memory of every reading thread that values are decoded to. Fresh memory for every chunk
    costs as much as half its decoding: the system clears it page by page."""

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
    """The chunks of one array, a file each. codec: a key of `_DECODERS`."""

    array: zarr.Array
    folder: Path
    codec: str

    @classmethod
    def of(cls, array: zarr.Array) -> "ChunkFiles | None":
        """None if its chunks are no files in a local folder, or encoded in another way."""
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
    """Whether the zarr library refuses every chunk that is cut short. Of blosc's it decodes what
    lies in memory behind the end of the file."""
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
    """Of a codec of zarr v3, or one of numcodecs in v2."""
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
    """Zstd itself refuses a file that is cut short or goes on."""
    decoded_size = _zstd_content_size(encoded)
    if decoded_size is not None:  # else the decoder itself demands an exact fit
        _check("decoded", decoded_size, len(out))
    numcodecs.zstd.decompress(encoded, out)


def _zstd_content_size(encoded: np.ndarray) -> int | None:
    """Bytes that a frame decodes to, if it tells (RFC 8878, section 3.1.1.1)."""
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


def _check(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"{found} {what} bytes in place of {expected}")


_DECODERS: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
    "blosc": _decode_blosc,
    "zstd": _decode_zstd,
    "none": _copy,
}
