"""Windows per second from a chunked store, against the time to read the touched chunks alone.

python -m benchmarks.data_loader

Store: hourly, 1 degree, 3 fields x 5 levels, zarr v3, blosc/zstd; every chunk holds 24 steps of
one level of the globe. Windows are AtmoRep's, 36 h x 54 x 108 points, normalised. A floor reads
and decodes exactly the chunks that the same windows touch, and keeps nothing: once with zarr, once
with tensorstore; the faster one counts. Loader and floors take turns on the same windows, and
figures are medians over these turns. Where other programs share the machine, the fractions of CPU
seconds say more than those by the clock. The long store repeats the chunks of the short one as hard
links, so that both lie in the page cache alike. The HTTP server runs in a process of its own,
waits 20 ms before every answer, and sends no more than a set rate over all its connections.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
import xarray as xr
import zarr
from zarr.codecs import BloscCodec, BloscShuffle

from atmossl.batch import StreamSpec, TokenSize
from atmossl.data.backends import open_store
from atmossl.data.catalog import SegmentEntry
from atmossl.data.chunks import Access, ChunkedArray, Region
from atmossl.data.segment import Segment
from atmossl.data.statistics import Normaliser, Statistics
from atmossl.data.store import open_segment
from atmossl.data.windows import SampleKey, WindowDataset, WindowSize, read_windows
from atmossl.geometry import Box, random_box
from atmossl.masking.random import RandomMasking
from benchmarks.http_server import limited_server
from benchmarks.report import finish

NAMES = ("temperature", "u_component_of_wind", "v_component_of_wind")
LEVELS = (300, 500, 700, 850, 1000)
CHUNK = (24, 1, 180, 360)
WINDOW = WindowSize(36, 54, 108)
SPECS = tuple(StreamSpec(name, (name,), LEVELS, TokenSize(3, 18, 18)) for name in NAMES)
Places = list[tuple[int, Box]]
Chunks = list[tuple[str, int, int]]  # variable, number along time, level


def make_store(path: Path, days: int, source: Path | None = None) -> None:
    """Travelling waves with noise; or the chunks of a shorter store again and again."""
    rng = np.random.default_rng(0)
    latitude, longitude = np.arange(CHUNK[2]) - 89.5, np.arange(float(CHUNK[3]))
    times = np.datetime64("2000-01-01", "ns") + np.arange(24 * days) * np.timedelta64(1, "h")
    coords = {"time": times, "level": list(LEVELS), "latitude": latitude, "longitude": longitude}
    xr.Dataset(coords=coords).to_zarr(path, consolidated=False)
    group = zarr.open_group(path, mode="r+")
    wave = 20 * np.cos(np.deg2rad(latitude))[:, None]
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
        for number in range(days):
            if source is not None:
                _link_chunks(source / name / "c", path / name / "c", number)
                continue
            phase = 3 * np.deg2rad(longitude) - 0.1 * (24 * number + np.arange(24))[:, None]
            values = (wave * np.sin(phase)[:, None])[:, None]
            noise = 4 * rng.random((24, len(LEVELS), *CHUNK[2:]), np.float32)
            array[24 * number : 24 * (number + 1)] = (values + noise).astype(np.float32)
    zarr.consolidate_metadata(path)


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
    return Normaliser(Statistics(NAMES, LEVELS, 0 * ones, 10 * ones, ones, "none", "none"))


def draws(segment: Segment, count: int, per_time: int, seed: int) -> list[Places]:
    """Start times and boxes of `count` reads of `per_time` windows each."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(segment.times) - WINDOW.time + 1, count)
    return [
        [(int(s), random_box(segment.grid, WINDOW.lat, WINDOW.lon, rng)) for _ in range(per_time)]
        for s in starts
    ]


def touched(places: Places) -> Chunks:
    """Chunks that hold some of the windows' points, counted point by point."""
    numbers = {
        step // CHUNK[0] for start, _ in places for step in range(start, start + WINDOW.time)
    }
    return [(n, t, level) for n in NAMES for t in sorted(numbers) for level in range(len(LEVELS))]


class Floors:
    """Reading and decoding whole chunks, and nothing else."""

    def __init__(self, path: Path) -> None:
        group = zarr.open_group(path, mode="r")
        self.zarr = {name: group[name] for name in NAMES}
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
        kvstores = {n: {"driver": "file", "path": f"{path / n}/"} for n in NAMES}
        self.tensorstore = {
            name: tensorstore.open(
                {"driver": "zarr3", "kvstore": kvstores[name]}, context=context, read=True
            ).result()
            for name in NAMES
        }

    def by_zarr(self, chunks: Chunks) -> None:
        for name, number, level in chunks:
            array = self.zarr[name]
            assert isinstance(array, zarr.Array)
            array[CHUNK[0] * number : CHUNK[0] * (number + 1), level]

    def by_tensorstore(self, chunks: Chunks) -> None:
        reads = [
            self.tensorstore[name][CHUNK[0] * n : CHUNK[0] * (n + 1), level].read()
            for name, n, level in chunks
        ]
        while reads:
            reads.pop(0).result()  # and the values are freed


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of all cores."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(path: Path, count: int, per_time: int, seed: int) -> dict[str, list[float]]:
    """Seconds per read of loader and floors, in turns, and peak memory of the loader alone."""
    segment, scale = opened(str(path), Access()), normaliser()
    reads = draws(segment, count, per_time, seed)
    read_windows(segment, SPECS, scale, WINDOW.time, reads[0])  # starts threads, opens files
    for places in reads:
        read_windows(segment, SPECS, scale, WINDOW.time, places)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    floors = Floors(path)
    found: dict[str, list[float]] = {"peak_mib": [peak]}
    for places in reads:
        chunks = touched(places)
        turns = {
            "loader": lambda p=places: read_windows(segment, SPECS, scale, WINDOW.time, p),
            "zarr": lambda c=chunks: floors.by_zarr(c),
            "tensorstore": lambda c=chunks: floors.by_tensorstore(c),
        }
        for name, turn in turns.items():
            wall, cpu = timed(turn)
            found.setdefault(name, []).append(wall)
            found.setdefault(f"{name}_cpu", []).append(cpu)
    return found


def compare_lengths(short: Path, long: Path, count: int) -> tuple[float, float]:
    """Samples per second from the long store over those from the short one, read in turns; by the
    clock and by CPU seconds."""
    scale, times = normaliser(), []
    segments = [opened(str(path), Access()) for path in (short, long)]
    reads = [draws(segment, count + 1, 1, seed=3) for segment in segments]
    for both in zip(*reads, strict=True):
        turns = [
            timed(lambda s=s, p=p: read_windows(s, SPECS, scale, WINDOW.time, p))
            for s, p in zip(segments, both, strict=True)
        ]
        times.append(turns)
    seconds = np.median(np.array(times[1:]), axis=0)  # [store, clock or CPU]
    return float(seconds[0, 0] / seconds[1, 0]), float(seconds[0, 1] / seconds[1, 1])


def masked_seconds(path: Path, count: int) -> float:
    """Median seconds of a sample with mask, tokens and first guess."""
    dataset = WindowDataset(
        segments=[opened(str(path), Access())],
        specs=SPECS,
        normaliser=normaliser(),
        window=WINDOW,
        sampler=RandomMasking(),
        seed=0,
    )
    rng = np.random.default_rng(0)
    keys = [SampleKey(0, int(n)) for n in rng.integers(0, len(dataset), count)]
    return statistics.median(timed(lambda k=k: dataset[k])[0] for k in keys)


class _Counting:
    """A chunked array that adds up the bytes of the chunks that it decodes."""

    def __init__(self, array: ChunkedArray, total: list[int]) -> None:
        self.array, self.total, self.chunks = array, total, array.chunks

    def read(self, region: Region) -> np.ndarray:
        ranges = zip(region, self.chunks, strict=True)
        chunks = np.prod([(s.stop - 1) // length - s.start // length + 1 for s, length in ranges])
        self.total.append(4 * int(chunks) * int(np.prod(self.chunks)))
        return self.array.read(region)


def decoded_over(path: Path, per_time: int) -> tuple[float, float]:
    """Bytes decoded over those of the touched chunks, and over those of the windows."""
    segment, total = opened(str(path), Access()), []
    stored = {n: replace(v, array=_Counting(v.array, total)) for n, v in segment.stored.items()}
    segment = replace(segment, stored=stored)
    chunk_bytes, window_bytes = 0, 0
    for places in draws(segment, 6, per_time, seed=1):
        for window in read_windows(segment, SPECS, normaliser(), WINDOW.time, places):
            window_bytes += sum(stream.fields.nbytes for stream in window)
        chunk_bytes += len(touched(places)) * 4 * int(np.prod(CHUNK))
    return sum(total) / chunk_bytes, sum(total) / window_bytes


def http_seconds(url: str, reads: Sequence[Places]) -> float:
    segment = opened(url, Access(threads=16))
    (wall, _) = timed(
        lambda: [read_windows(segment, SPECS, normaliser(), WINDOW.time, p) for p in reads]
    )
    return wall


def http_fraction(folder: Path, name: str, bytes_per_s: float) -> float:
    """Share of the link's rate at which the compressed chunks arrive, from a cold start."""
    reads = draws(opened(str(folder / name), Access()), 4, 1, seed=2)
    size = sum(
        (folder / name / n / "c" / str(t) / str(level) / "0" / "0").stat().st_size
        for places in reads
        for n, t, level in touched(places)
    )
    with limited_server(folder, 0.02, bytes_per_s) as address:
        return size / bytes_per_s / http_seconds(f"{address}/{name}", reads)


def fraction(found: dict[str, list[float]], kind: str = "") -> float:
    """Median over the reads of the best floor's time over the loader's; `_cpu`: of CPU seconds,
    which other programs on the machine hardly change."""
    names = ("zarr", "tensorstore", "loader")
    floors = zip(*(found[f"{name}{kind}"] for name in names), strict=True)
    return statistics.median(min(a, b) / loader for a, b, loader in floors)


def in_processes(
    number: int, path: Path, count: int, per_time: int
) -> list[dict[str, list[float]]]:
    """`measure` in fresh processes at the same time."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(number, mp_context=context) as pool:
        found = [pool.submit(measure, path, count, per_time, seed) for seed in range(number)]
        return [future.result() for future in found]


def figures(folder: Path, days: int, reads: int, rate: float) -> dict[str, Any]:
    short, long = folder / "short.zarr", folder / "long.zarr"
    make_store(short, days)
    make_store(long, 10 * days, source=short)
    (one,) = in_processes(1, short, reads, 1)
    (sixteen,) = in_processes(1, short, reads, 16)
    both = in_processes(2, short, reads, 1)
    seconds = statistics.median(one["loader"])
    long_ratio, long_cpu_ratio = compare_lengths(short, long, reads)
    over_touched, over_needed = decoded_over(short, 1)
    return {
        "floor_fraction_one_window_per_time": round(fraction(one), 3),
        "floor_fraction_16_windows_per_time": round(fraction(sixteen), 3),
        "floor_fraction_2_processes": round(statistics.mean(map(fraction, both)), 3),
        "floor_cpu_fraction_one_window_per_time": round(fraction(one, "_cpu"), 3),
        "floor_cpu_fraction_16_windows_per_time": round(fraction(sixteen, "_cpu"), 3),
        "decoded_over_touched": round(over_touched, 3),
        "decoded_over_needed": round(over_needed, 2),
        "samples_per_s": round(1 / seconds, 2),
        "samples_per_s_16_windows_per_time": round(16 / statistics.median(sixteen["loader"]), 2),
        "samples_per_s_2_processes": round(
            sum(1 / statistics.median(found["loader"]) for found in both), 2
        ),
        "masked_samples_per_s": round(1 / masked_seconds(short, reads), 2),
        "cpu_s_per_sample": round(statistics.median(one["loader_cpu"]), 4),
        "floor_cpu_s_per_sample": round(
            min(statistics.median(one[f"{n}_cpu"]) for n in ("zarr", "tensorstore")), 4
        ),
        "floor_seconds_zarr": round(statistics.median(one["zarr"]), 4),
        "floor_seconds_tensorstore": round(statistics.median(one["tensorstore"]), 4),
        "peak_memory_mib": round(max(one["peak_mib"][0], sixteen["peak_mib"][0])),
        "long_store_ratio": round(long_ratio, 3),
        "long_store_cpu_ratio": round(long_cpu_ratio, 3),
        "http_bandwidth_fraction": round(http_fraction(folder, "short.zarr", rate), 3),
        "http_bytes_per_s": rate,
        "days": days,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--reads", type=int, default=24)
    parser.add_argument("--http-rate", type=float, default=50e6, help="bytes per second")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
    with tempfile.TemporaryDirectory() as folder:
        finish(
            "data_loader",
            figures(Path(folder), arguments.days, arguments.reads, arguments.http_rate),
        )


if __name__ == "__main__":
    main()
