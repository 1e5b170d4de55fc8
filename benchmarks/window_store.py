"""The store that the data loader's benchmark reads, and the floors that it is held against.

python -m benchmarks.window_store OUTPUT.zarr --days 30     # writes the store
"""

import argparse
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorstore
import xarray as xr
import zarr
from zarr.codecs import BloscCodec, BloscShuffle

from atmossl.batch import PRIMARY, StreamSpec, TokenSize
from atmossl.data.backends import open_store
from atmossl.data.catalog import SegmentEntry
from atmossl.data.chunks import Access
from atmossl.data.segment import Segment
from atmossl.data.store import open_segment
from atmossl.data.windows import Normaliser, Statistics, WindowSize
from atmossl.geometry import Box, random_box

NAMES = ("temperature", "u_component_of_wind", "v_component_of_wind")
LEVELS = (300, 500, 700, 850, 1000)
CHUNK = (24, 1, 180, 360)
CHUNK_BYTES = 4 * int(np.prod(CHUNK))
WINDOW = WindowSize(36, 54, 108)
SPECS = tuple(StreamSpec(name, (name,), LEVELS, TokenSize(3, 18, 18)) for name in NAMES)
WINDOW_BYTES = 4 * len(NAMES) * len(LEVELS) * WINDOW.time * WINDOW.lat * WINDOW.lon
Places = list[tuple[int, Box]]
Chunks = list[tuple[str, int, int]]  # variable, number along time, level


def make_store(path: Path, days: int, source: Path | None = None) -> None:
    """Travelling waves with noise; or the chunks of a shorter store again and again."""
    latitude, longitude = np.arange(CHUNK[2]) - 89.5, np.arange(float(CHUNK[3]))
    times = np.datetime64("2000-01-01", "ns") + np.arange(24 * days) * np.timedelta64(1, "h")
    coords = {"time": times, "level": list(LEVELS), "latitude": latitude, "longitude": longitude}
    xr.Dataset(coords=coords).to_zarr(path, consolidated=False)
    group = zarr.open_group(path, mode="r+")
    for name in NAMES:
        array = group.create_array(
            name,
            shape=(len(times), len(LEVELS), *CHUNK[2:]),
            chunks=CHUNK,
            dtype="float32",
            fill_value=np.nan,
            compressors=BloscCodec(cname="zstd", clevel=3, shuffle=BloscShuffle.shuffle),
            dimension_names=["time", "level", "latitude", "longitude"],
        )
        mean = np.float32(250.0 if name == "temperature" else 0.0)
        for number in range(days):
            if source is None:
                array[24 * number : 24 * (number + 1)] = _day(number, latitude, longitude) + mean
            else:
                _link_chunks(source / name / "c", path / name / "c", number)
    zarr.consolidate_metadata(path)


def _day(number: int, latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(number)
    wave = 20 * np.cos(np.deg2rad(latitude))[:, None]
    phase = 3 * np.deg2rad(longitude) - 0.1 * (24 * number + np.arange(24))[:, None]
    values = (wave * np.sin(phase)[:, None])[:, None].astype(np.float32)
    return values + 4 * rng.random((24, len(LEVELS), *CHUNK[2:]), np.float32)


def _link_chunks(source: Path, target: Path, number: int) -> None:
    days = len(list(source.iterdir()))
    for level in range(len(LEVELS)):
        link = target / str(number) / str(level) / "0" / "0"
        link.parent.mkdir(parents=True)
        os.link(source / str(number % days) / str(level) / "0" / "0", link)


def opened(location: str, access: Access) -> Segment:
    store = open_store(SegmentEntry(location=location))
    return open_segment("benchmark", store, location, variables=NAMES, levels=LEVELS, access=access)


def normaliser() -> Normaliser:
    ones = np.ones((len(NAMES), len(LEVELS)))
    statistics = Statistics(NAMES, LEVELS, 0 * ones, 10 * ones, ones, "none", "none")
    return Normaliser({PRIMARY: statistics})


def draws(segment: Segment, count: int, per_time: int, seed: int) -> list[Places]:
    """Start times and boxes of `count` reads of `per_time` windows each."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(segment.times) - WINDOW.time + 1, count)
    return [
        [(int(s), random_box(segment.grid, WINDOW.lat, WINDOW.lon, rng)) for _ in range(per_time)]
        for s in starts
    ]


def touched(places: Places) -> Chunks:
    """Chunks that hold some of the windows' points, counted step by step."""
    numbers = {
        step // CHUNK[0] for start, _ in places for step in range(start, start + WINDOW.time)
    }
    return [(n, t, level) for n in NAMES for t in sorted(numbers) for level in range(len(LEVELS))]


class Floors:
    """Reading and decoding whole chunks, and nothing else; the values are thrown away."""

    def __init__(self, path: Path) -> None:
        self.zarr: dict[str, zarr.Array] = {}
        self.tensorstore = {}
        group = zarr.open_group(path, mode="r")
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
        for name in NAMES:
            array = group[name]
            assert isinstance(array, zarr.Array)
            self.zarr[name] = array
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path / name}/"}}
            self.tensorstore[name] = tensorstore.open(spec, context=context, read=True).result()
        self._pool = ThreadPoolExecutor(os.cpu_count())

    def all(self) -> dict[str, Callable[[Chunks], None]]:
        """By the name of their figure."""
        return {
            "zarr": self.by_zarr,
            "zarr_in_threads": self.by_zarr_in_threads,
            "tensorstore": self.by_tensorstore,
        }

    def by_zarr(self, chunks: Chunks) -> None:
        for chunk in chunks:
            self._zarr_chunk(chunk)

    def by_zarr_in_threads(self, chunks: Chunks) -> None:
        for _ in self._pool.map(self._zarr_chunk, chunks):
            pass

    def _zarr_chunk(self, chunk: tuple[str, int, int]) -> None:
        name, number, level = chunk
        self.zarr[name][CHUNK[0] * number : CHUNK[0] * (number + 1), level]

    def by_tensorstore(self, chunks: Chunks) -> None:
        """All at once; tensorstore decodes on all cores."""
        reads = [
            self.tensorstore[name][CHUNK[0] * n : CHUNK[0] * (n + 1), level].read()
            for name, n, level in chunks
        ]
        while reads:
            reads.pop(0).result()  # and the values are freed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--days", type=int, default=30)
    arguments = parser.parse_args()
    make_store(arguments.output, arguments.days)


if __name__ == "__main__":
    main()
