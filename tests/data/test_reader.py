"""Windows read chunk by chunk hold what the store holds, and no chunk is read twice."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, BloscShuffle, GzipCodec, ZstdCodec

from atmossl.batch import PRIMARY
from atmossl.data.backends import OpenedStore, open_store
from atmossl.data.catalog import SegmentEntry
from atmossl.data.chunks import Access, ChunkFiles, FileChunks, MemoryChunks
from atmossl.data.loader import SampleKey, WindowDataset
from atmossl.data.segment import Segment, StoredVariable, UnreadableChunk
from atmossl.data.statistics import compute_statistics
from atmossl.data.store import open_segment
from atmossl.data.windows import Normaliser, WindowSize, read_windows
from atmossl.geometry import Box
from atmossl.masking.random import RandomMasking
from tests.synthetic import dataset, spec

NAMES = ("temperature", "u_component_of_wind")
LEVELS = (300, 500, 850)
COMPRESSORS = {  # of zarr v2 and v3
    "blosc": (numcodecs.Blosc("lz4"), BloscCodec(cname="lz4", shuffle=BloscShuffle.shuffle)),
    "zstd": (numcodecs.Zstd(), ZstdCodec()),
    "gzip": (numcodecs.GZip(), GzipCodec()),
    "none": (None, None),
}
NO_WAIT = Access(retry_wait_s=0.0)


def opened(path: Path, levels=LEVELS, access: Access = NO_WAIT) -> Segment:
    store = open_store(SegmentEntry(location=str(path)))
    return open_segment(
        "waves", store, str(path), variables=NAMES, levels=sorted(levels), access=access
    )


def expected(store: xr.Dataset, name: str, levels, start: int, count: int, box: Box) -> np.ndarray:
    """The same window by xarray's own indexing, from a dataset in canonical order."""
    chosen = store[name].isel(
        time=slice(start, start + count),
        latitude=box.lat_index(),
        longitude=box.lon_index(store.sizes["longitude"]),
    )
    return chosen.sel(level=list(levels)).transpose("level", "time", ...).values


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_layout_reads_as_xarray_does(tmp_path_factory, data: st.DataObject) -> None:
    record = dataset(steps=9)
    dims = data.draw(st.permutations(["time", "level", "latitude", "longitude"]))
    stored = record.transpose(*dims)
    if data.draw(st.booleans()):
        stored = stored.isel(latitude=slice(None, None, -1))
    stored = stored.roll(longitude=data.draw(st.integers(0, 15)), roll_coords=True)
    chunks = tuple(
        data.draw(st.integers(-(-stored.sizes[dim] // 4), stored.sizes[dim])) for dim in dims
    )
    version, compressor = (data.draw(st.sampled_from(of)) for of in ([2, 3], list(COMPRESSORS)))
    encoding = {"chunks": chunks, "compressors": COMPRESSORS[compressor][version - 2]}
    if version == 3 and data.draw(st.booleans()):
        factors = [data.draw(st.integers(1, 3)) for _ in dims]
        encoding["shards"] = tuple(c * f for c, f in zip(chunks, factors, strict=True))
    path = tmp_path_factory.mktemp("store") / "waves.zarr"
    stored.to_zarr(
        path, zarr_format=version, encoding=dict.fromkeys(NAMES, encoding), consolidated=False
    )
    engine = data.draw(st.sampled_from(["auto", "zarr"]))
    segment = opened(path, access=Access(engine=engine, threads=data.draw(st.integers(1, 3))))
    read_here = isinstance(segment.stored[NAMES[0]].array, FileChunks)
    own = "shards" not in encoding and compressor in ("blosc", "zstd", "none")
    assert read_here == (engine == "auto" and own)
    levels = data.draw(st.lists(st.sampled_from(LEVELS), min_size=1, unique=True))
    box = Box(
        data.draw(st.integers(0, 3)),
        data.draw(st.integers(0, 15)),
        data.draw(st.integers(1, 5)),
        data.draw(st.integers(1, 16)),
    )
    start = data.draw(st.integers(0, 5))
    for name in NAMES:
        np.testing.assert_array_equal(
            segment.read(name, levels, start, 4, box), expected(record, name, levels, start, 4, box)
        )


@dataclass(frozen=True)
class Counting(MemoryChunks):
    """Chunks in memory that note every read, and fail as often as told."""

    chunk_lengths: tuple[int, ...] = ()
    regions: list = field(default_factory=list)
    failures: list = field(default_factory=list)

    @property
    def chunks(self) -> tuple[int, ...]:
        return self.chunk_lengths

    def read(self, region) -> np.ndarray:
        if self.failures:
            raise self.failures.pop()
        for part, length in zip(region, self.chunk_lengths, strict=True):
            assert part.start // length == (part.stop - 1) // length, f"{region} leaves its chunk"
        self.regions.append(region)
        return super().read(region)


def counting(segment: Segment, chunks, location: str = "memory", failures=()) -> Segment:
    stored = {
        name: StoredVariable(
            name,
            location,
            Counting(segment.dataset[name].values, chunks, [], list(failures)),
            ("time", "level", "latitude", "longitude"),
            segment.times,
        )
        for name in segment.variables
    }
    return replace(segment, stored=stored)


def memory(**changes) -> Segment:
    return open_segment(
        "waves", dataset(**changes), "memory", variables=NAMES, levels=LEVELS, access=NO_WAIT
    )


def test_every_touched_chunk_is_read_once_for_all_windows() -> None:
    segment = memory()
    normaliser = Normaliser({PRIMARY: compute_statistics([segment])})
    counted = counting(segment, (5, 1, 3, 4))
    streams = (
        spec("one", variables=NAMES[:1], levels=(300, 850)),
        spec("two", levels=(850,)),
    )
    places = [(0, Box(0, 14, 4, 4)), (2, Box(1, 13, 4, 4)), (12, Box(0, 0, 4, 4))]
    windows = read_windows(counted, streams, normaliser, 6, places)
    for name, levels in ((NAMES[0], (0, 2)), (NAMES[1], (2,))):
        touched = {
            (t // 5, level, lat // 3, lon // 4)
            for start, box in places
            for t in range(start, start + 6)
            for level in levels
            for lat in box.lat_index()
            for lon in box.lon_index(16)
        }
        assert len(counted.stored[name].array.regions) == len(touched)
    for (one, two), (start, box) in zip(windows, places, strict=True):
        for window in (one, two):
            raw = [
                expected(segment.dataset, n, window.spec.levels, start, 6, box)
                for n in window.spec.variables
            ]
            normal = normaliser.forward(torch.from_numpy(np.stack(raw)), window.spec)
            torch.testing.assert_close(window.fields, normal, rtol=0, atol=0)


@pytest.mark.parametrize("version", [2, 3])
def test_packed_values_are_unpacked_and_fills_are_missing(tmp_path, version: int) -> None:
    record = dataset(steps=6)
    record["temperature"][2, 1, 3, 4] = np.nan
    packing = {"dtype": "int16", "scale_factor": 0.01, "add_offset": 2.0, "_FillValue": -9999}
    path = tmp_path / "packed.zarr"
    record.to_zarr(
        path, zarr_format=version, encoding=dict.fromkeys(NAMES, packing), consolidated=False
    )
    segment = replace(opened(path), may_miss=frozenset(NAMES))
    reference = xr.open_zarr(path, consolidated=False)
    found = segment.read("temperature", LEVELS, 0, 6, segment.whole())
    np.testing.assert_array_equal(
        found, expected(reference, "temperature", LEVELS, 0, 6, segment.whole()).astype(np.float32)
    )
    assert np.isnan(found).sum() == 1


def damaged(tmp_path: Path) -> Path:
    """A store with the chunk of steps 4 to 7 of the temperature cut short."""
    path = tmp_path / "waves.zarr"
    encoding = dict.fromkeys(NAMES, {"chunks": (4, 3, 8, 16)})
    dataset(steps=24).to_zarr(path, encoding=encoding, consolidated=False)
    chunk = path / "temperature" / "c" / "1" / "0" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:100])
    return path


@pytest.mark.parametrize("engine", ["files", "zarr"])
def test_an_unreadable_chunk_is_named(tmp_path, engine: str) -> None:
    path = damaged(tmp_path)
    segment = opened(path, access=Access(engine=engine))
    with pytest.raises(
        UnreadableChunk,
        match=rf"{path}.*temperature between 2001-01-02T00.*2001-01-02T18.*time 1",
    ):
        segment.read("temperature", LEVELS, 2, 4, segment.whole())
    segment.read("temperature", LEVELS, 8, 4, segment.whole())


@pytest.mark.parametrize("compressor", ["blosc", "zstd", "none"])
def test_a_chunk_file_that_is_not_one_whole_chunk_is_refused(tmp_path, compressor: str) -> None:
    """Never values of the chunk that was read before into the same memory."""
    path, codec = tmp_path / "one.zarr", COMPRESSORS[compressor][1]
    array = zarr.create_array(path, shape=(3, 4), chunks=(1, 4), dtype="f4", compressors=codec)
    array[:2] = np.arange(8.0).reshape(2, 4)
    files, out = ChunkFiles.of(array), np.empty((1, 4), np.float32)
    assert files is not None
    good = (path / "c" / "0" / "0").read_bytes()
    short = zarr.create_array(tmp_path / "short", shape=2, chunks=2, dtype="f4", compressors=codec)
    short[:] = 1.0
    other = (tmp_path / "short" / "c" / "0").read_bytes()
    for bad in (good[:-1], good + b"\0", other, b"", good[:3]):
        (path / "c" / "0" / "0").write_bytes(bad)
        files.read((1, 0), out)
        with pytest.raises((ValueError, RuntimeError)):
            files.read((0, 0), out)
    files.read((2, 0), out)  # never written
    assert (out == 0).all()


def test_unreadable_samples_are_skipped_on_request(tmp_path, caplog) -> None:
    segment = opened(damaged(tmp_path))
    normaliser = Normaliser({PRIMARY: compute_statistics([memory()])})
    arguments = {
        "segments": [segment],
        "specs": [spec()],
        "normaliser": normaliser,
        "window": WindowSize(4, 8, 16),
        "sampler": RandomMasking(),
        "seed": 0,
    }
    keys = [SampleKey(0, start) for start in (0, 3, 6, 8, 12)]
    with pytest.raises(UnreadableChunk):
        WindowDataset(**arguments).__getitems__(keys)
    left = WindowDataset(**arguments, skip_unreadable=True).__getitems__(keys)
    assert [sample_id for _, sample_id in left] == [0, 8, 12]
    assert sum("is skipped" in record.message for record in caplog.records) == 2
    for keys in ([SampleKey(0, 3)], [SampleKey(0, 6), SampleKey(0, 4)]):  # none can be read
        (other,) = WindowDataset(**arguments, skip_unreadable=True).__getitems__(keys)
        assert other[1] in (0, *range(8, 21)), "another sample, later"


def test_remote_chunks_are_tried_again() -> None:
    chunks, error = (24, 3, 8, 16), OSError("503")
    segment = counting(memory(), chunks, "http://store", [error] * 3)
    values = segment.read("temperature", LEVELS, 0, 4, segment.whole())
    np.testing.assert_array_equal(
        values, memory().read("temperature", LEVELS, 0, 4, segment.whole())
    )
    with pytest.raises(UnreadableChunk, match="503"):
        counting(memory(), chunks, "http://store", [error] * 4).read(
            "temperature", LEVELS, 0, 4, segment.whole()
        )
    with pytest.raises(UnreadableChunk, match="503"):
        counting(memory(), chunks, "/local", [error]).read(
            "temperature", LEVELS, 0, 4, segment.whole()
        )


def test_levels_must_suit_the_variable() -> None:
    record = dataset()
    record["temperature"] = record["temperature"].isel(level=0, drop=True)
    segment = open_segment("waves", record, "memory", variables=NAMES, levels=LEVELS)
    assert segment.read("temperature", (0,), 0, 2, segment.whole()).shape == (1, 2, 8, 16)
    with pytest.raises(ValueError, match="no levels"):
        segment.read("temperature", (300,), 0, 2, segment.whole())
    with pytest.raises(ValueError, match="has levels"):
        segment.read("u_component_of_wind", (0,), 0, 2, segment.whole())


def test_files_are_refused_where_there_are_none() -> None:
    group = zarr.open_group(zarr.storage.MemoryStore(), mode="w")
    dataset().to_zarr(group.store, mode="w", consolidated=False)
    store = OpenedStore(xr.open_zarr(group.store, consolidated=False), group)
    with pytest.raises(ValueError, match="data.read.engine=files .* valid: auto, zarr"):
        open_segment(
            "waves",
            store,
            "memory",
            variables=NAMES,
            levels=LEVELS,
            access=Access(engine="files"),
        )
