"""Chunks that a store does not hold are missing values, whatever reads them, unless the store says
what they stand for; engines that cannot read a codec leave the store to zarr."""

from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import xarray as xr
import zarr
import zarr.codecs.numcodecs as numcodecs_v3
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec

from atmossl.batch import PRIMARY
from atmossl.data.backends import OpenedStore, open_store
from atmossl.data.catalog import SegmentEntry
from atmossl.data.chunks import Access, FileChunks, ZarrChunks
from atmossl.data.layouts import atmorep
from atmossl.data.segment import Segment, UnreadableChunk
from atmossl.data.statistics import compute_statistics
from atmossl.data.store import open_segment
from atmossl.data.windows import Normaliser, read_window
from tests.synthetic import dataset, spec

NAMES = ("temperature", "u_component_of_wind")
LEVELS = (300, 500, 850)
CHUNKS = (4, 3, 4, 16)
ENGINES = ("auto", "files", "zarr")
# zarr's version, the encoding, and what the absent chunk of steps 4 to 7, rows 4 to 7 reads as.
# zarr v2 has no fill value where it is null; v3 always has one, and xarray's is beside it
PACKED = {"dtype": "int16", "scale_factor": 0.01, "add_offset": 2.0}
STORES = {
    "v2 null": (2, {"_FillValue": None}, np.nan),
    "v2 zero": (2, {"_FillValue": 0.0}, np.nan),  # xarray masks it
    "v2 nan": (2, {"_FillValue": np.nan}, np.nan),
    "v2 number": (2, {"_FillValue": -9999.0}, np.nan),
    "v2 packed, number": (2, {**PACKED, "_FillValue": -32767}, np.nan),
    "v3 default": (3, {"_FillValue": None, "fill_value": 0.0}, np.nan),
    "v3 nan": (3, {"_FillValue": None, "fill_value": np.nan}, np.nan),
    "v3 number": (3, {"_FillValue": None, "fill_value": 7.0}, 7.0),
    "v3 attribute": (3, {"_FillValue": np.nan, "fill_value": 0.0}, 0.0),
    "v3 both": (3, {"_FillValue": -1.0, "fill_value": -1.0}, np.nan),
    "v3 packed, attribute": (3, {**PACKED, "_FillValue": -32767, "fill_value": 0}, 2.0),
}
UNDECLARED = STORES["v3 default"][1]


def written(folder: Path, version: int, encoding: dict, **more) -> Path:
    """A store without one chunk of the temperature."""
    path = folder / "waves.zarr"
    encoding = {"chunks": CHUNKS, **encoding, **more}
    dataset(steps=12).to_zarr(
        path, zarr_format=version, encoding=dict.fromkeys(NAMES, encoding), consolidated=False
    )
    array = zarr.open_array(path / "temperature", mode="r")
    size = array.shards or array.chunks
    number = tuple(n // length for n, length in zip((4, 0, 4, 0), size, strict=True))
    (path / "temperature" / array.metadata.encode_chunk_key(number)).unlink()
    return path


def opened(store: OpenedStore | str | Path, engine: str = "auto") -> Segment:
    store = (
        store if isinstance(store, OpenedStore) else open_store(SegmentEntry(location=str(store)))
    )
    segment = open_segment(
        "waves", store, "the store", variables=NAMES, levels=LEVELS, access=Access(engine=engine)
    )
    return replace(segment, may_miss=frozenset(NAMES))


def values(segment: Segment, name: str = "temperature") -> np.ndarray:
    return segment.read(name, LEVELS, 0, len(segment.times), segment.whole())


@pytest.mark.parametrize("kind", STORES)
def test_an_absent_chunk_is_missing_unless_the_store_tells_its_values(tmp_path, kind) -> None:
    version, encoding, absent = STORES[kind]
    path = written(tmp_path, version, encoding)
    with xr.open_zarr(path, consolidated=False) as stored:
        expected = stored["temperature"].transpose("level", "time", ...).values.astype(np.float32)
    expected[:, 4:8, 4:8] = absent
    for engine in ENGINES:
        np.testing.assert_array_equal(values(opened(path, engine)), expected, err_msg=engine)
        assert np.isfinite(values(opened(path, engine), NAMES[1])).all()


def test_a_shard_that_is_absent_is_missing_data(tmp_path) -> None:
    path = written(tmp_path, 3, UNDECLARED, shards=(4, 3, 8, 16))
    for engine in ("auto", "zarr"):
        missing = np.isnan(values(opened(path, engine)))
        assert missing[:, 4:8].all() and missing.sum() == 3 * 4 * 8 * 16, engine


@pytest.mark.parametrize("version", [2, 3])
def test_chunks_of_zeros_that_are_there_are_zeros(tmp_path, version: int) -> None:
    path = written(tmp_path, version, {"_FillValue": None}, compressors=None)
    array = zarr.open_array(path / "temperature", mode="r")
    absent = path / "temperature" / array.metadata.encode_chunk_key((1, 0, 1, 0))
    absent.write_bytes(bytes(4 * 4 * 3 * 4 * 16))
    for engine in ENGINES:
        assert (values(opened(path, engine))[:, 4:8, 4:8] == 0).all(), engine


def test_packed_values_without_a_fill_value_are_missing_where_their_chunk_is(tmp_path) -> None:
    path = written(tmp_path, 2, {**PACKED, "_FillValue": -1})
    settings = path / "temperature" / ".zarray"
    settings.write_text(settings.read_text().replace('"fill_value": -1', '"fill_value": null'))
    for engine in ENGINES:
        missing = np.isnan(values(opened(path, engine)))
        assert missing[:, 4:8, 4:8].all() and missing.sum() == 3 * 4 * 4 * 16, engine


def test_what_a_remote_store_does_not_hold_is_missing(tmp_path) -> None:
    path = written(tmp_path, 3, UNDECLARED)
    remote = fsspec.filesystem("memory")
    remote.put(str(path), "/absent/waves.zarr", recursive=True)
    found = values(opened("memory://absent/waves.zarr"))
    np.testing.assert_array_equal(found, values(opened(path)))


def test_windows_refuse_or_mark_absent_chunks(tmp_path) -> None:
    segment = opened(written(tmp_path, 3, UNDECLARED))
    normaliser = Normaliser({PRIMARY: compute_statistics([segment])})
    stream = spec()
    with pytest.raises(ValueError, match=r"missing values.*chunks that are not in the store"):
        read_window(segment, (stream,), normaliser, 2, 4, segment.whole())
    marked = replace(stream, missing="mask")
    (window,) = read_window(segment, (marked,), normaliser, 2, 4, segment.whole())
    assert window.valid is not None
    assert not window.valid[0, :, 2:, 4:].any() and window.valid[1].all()


def test_absent_chunks_of_other_layouts_are_missing(tmp_path) -> None:
    group = zarr.open_group(tmp_path / "atmorep.zarr", mode="w")
    group.attrs.update({"fields": ["temperature", "velocity_u"], "levels": [500]})
    group.create_array("data", shape=(8, 2, 1, 4, 8), chunks=(4, 1, 1, 4, 8), dtype="f4")
    group["data"][...] = 1.0
    group["time"] = np.datetime64("2001-01-01", "ns").astype("i8") + np.arange(8) * 3_600 * 10**9
    group["lats"], group["lons"] = np.linspace(-60, 60, 4), np.arange(8) * 45.0
    (tmp_path / "atmorep.zarr" / "data" / "c" / "1" / "0" / "0" / "0" / "0").unlink()
    dataset_, arrays = atmorep(group)
    store = OpenedStore(dataset_, None, arrays)
    segment = open_segment("a", store, "the store", variables=NAMES, levels=[500])
    segment = replace(segment, may_miss=frozenset(NAMES))
    read = {name: segment.read(name, (500,), 0, 8, segment.whole()) for name in NAMES}
    assert np.isnan(read["temperature"][:, 4:]).all() and (read["temperature"][:, :4] == 1).all()
    assert (read["u_component_of_wind"] == 1).all()


# Of zarr v3, made in the test: those of numcodecs warn that not every library knows them
CODECS = {
    "bitround": lambda: {"filters": (numcodecs_v3.BitRound(keepbits=9),)},
    "lz4": lambda: {"compressors": (numcodecs_v3.LZ4(),)},
    "delta": lambda: {"filters": (numcodecs_v3.Delta(dtype="float32"),), "compressors": None},
    "zlib": lambda: {"compressors": (numcodecs_v3.Zlib(level=1),)},
    "zstd": lambda: {"compressors": (ZstdCodec(),)},
    "blosc": lambda: {"compressors": (BloscCodec(),)},
    "gzip": lambda: {"compressors": (GzipCodec(),)},
}


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")
@pytest.mark.parametrize("codec", CODECS)
def test_auto_reads_what_zarr_reads(tmp_path, codec: str) -> None:
    path = tmp_path / "waves.zarr"
    encoding = {"chunks": CHUNKS, **CODECS[codec]()}
    dataset(steps=12).to_zarr(
        path, zarr_format=3, encoding=dict.fromkeys(NAMES, encoding), consolidated=False
    )
    automatic, by_zarr = (opened(path, engine) for engine in ("auto", "zarr"))
    np.testing.assert_array_equal(values(automatic), values(by_zarr))
    classes = {"zstd": FileChunks, "blosc": FileChunks}
    assert type(automatic.stored["temperature"].array) is classes.get(codec, ZarrChunks)
    if codec not in classes:
        with pytest.raises(ValueError, match=r"engine=files.*valid: auto, zarr"):
            opened(path, "files")


@pytest.mark.parametrize("compressor", [None, ZstdCodec(), BloscCodec(), GzipCodec()])
def test_a_chunk_is_corrupt_only_where_zarr_cannot_read_it(tmp_path, compressor) -> None:
    """An engine that fails leaves the chunk to zarr, unless zarr would not notice the damage."""
    path = tmp_path / "waves.zarr"
    encoding = {"chunks": CHUNKS, "compressors": compressor}
    dataset(steps=12).to_zarr(
        path, zarr_format=3, encoding=dict.fromkeys(NAMES, encoding), consolidated=False
    )
    segment = opened(path, "auto")
    array = segment.stored["temperature"].array
    region = (slice(4, 8), slice(0, 3), slice(4, 8), slice(0, 16))
    whole = np.array(array.read(region))

    class Failing(type(array)):
        def _decoded(self, region):
            raise NotImplementedError("an engine that does not know this")

    failing = Failing(**{name: getattr(array, name) for name in array.__dataclass_fields__})
    if not isinstance(compressor, BloscCodec):
        np.testing.assert_array_equal(failing.read(region), whole)
    chunk = path / "temperature" / "c" / "1" / "0" / "1" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-20])
    with pytest.raises(NotImplementedError if isinstance(compressor, BloscCodec) else Exception):
        failing.read(region)
    with pytest.raises(UnreadableChunk, match="is corrupt"):
        values(segment)
