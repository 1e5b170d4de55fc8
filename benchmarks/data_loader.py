"""Windows per second from a chunked store, against the time to read the touched chunks alone.

python -m benchmarks.data_loader

Store: hourly, 1 degree, 3 fields x 5 levels, zarr v3, blosc/zstd; every chunk holds 24 steps of
one level of the globe. Windows are AtmoRep's, 36 h x 54 x 108 points: what is measured is the way
from the store to normalised float32 arrays [field, level, time, lat, lon] with coordinates, checked
for missing values. A floor reads and decodes exactly the chunks that the same windows touch, whole,
and throws the values away: with zarr chunk by chunk, with zarr in as many threads as there are
cores, and with tensorstore all at once; in each comparison the fastest of them counts. The loader
can be faster than that: it copies windows out of memory that it decodes into again and again, where
a plain read has the system clear fresh memory for every chunk. Masks and tokens are not part of
the comparison; `masked_samples_per_s` includes them.

One process: loader and floors take turns on the same reads, and fractions are medians over reads
of the fastest floor's time over the loader's. Two workers: whole passes through torch's loader with
two worker processes, windows handed over to the main process, against two processes that run a
floor, each on half of the reads. Where other programs share the machine, fractions of CPU seconds
say more than those by the clock.

The long store repeats the chunks of the short one as hard links, so that both lie in the page cache
alike, and is read at the same hours of other days. The HTTP server runs in a process of its own,
waits 20 ms before every answer, and sends no more than a set rate over all its connections.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from atmossl.batch import Movable, StreamWindow
from atmossl.commands.cost import resident_bytes
from atmossl.data.chunks import Access, ChunkedArray, Region
from atmossl.data.loader import (
    Arena,
    Collate,
    Packed,
    SampleKey,
    SampleOrder,
    WindowDataset,
    WindowLoader,
    worker_context,
)
from atmossl.data.segment import Segment
from atmossl.data.windows import read_windows
from atmossl.masking.random import RandomMasking
from benchmarks.http_server import limited_server
from benchmarks.report import finish
from benchmarks.window_store import (
    CHUNK,
    CHUNK_BYTES,
    SPECS,
    WINDOW,
    WINDOW_BYTES,
    Floors,
    Places,
    draws,
    make_store,
    normaliser,
    opened,
    touched,
)

_FLOORS = ("zarr", "zarr_in_threads", "tensorstore")
_PASSES = 3  # through the loader with workers, the first to warm up
Times = dict[str, list[float]]


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of all cores."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(path: Path, count: int, per_time: int, seed: int) -> Times:
    """Seconds per read of loader and floors, in turns, and peak memory of the loader alone."""
    segment, scale = opened(str(path), Access()), normaliser()
    by_zarr = opened(str(path), Access(engine="zarr"))
    reads = draws(segment, count, per_time, seed)
    for places in reads:
        read_windows(segment, SPECS, scale, WINDOW.time, places)
    times: Times = {"peak_mib": [resident_bytes() / 2**20]}
    floors = Floors(path).all()
    for number, places in enumerate(reads):
        chunks = touched(places)
        turns = {
            "loader": lambda p=places: read_windows(segment, SPECS, scale, WINDOW.time, p),
            "loader_by_zarr": lambda p=places: read_windows(by_zarr, SPECS, scale, WINDOW.time, p),
            **{name: lambda f=floor, c=chunks: f(c) for name, floor in floors.items()},
        }
        names = list(turns)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            wall, cpu = timed(turns[name])
            times.setdefault(name, []).append(wall)
            times.setdefault(f"{name}_cpu", []).append(cpu)
    return times


def fraction(times: Times, kind: str = "", loader: str = "loader") -> float:
    """Median over the reads of the fastest floor's time over the loader's; `_cpu`: of CPU seconds,
    which other programs on the machine hardly change."""
    floors = zip(*(times[f"{name}{kind}"] for name in _FLOORS), strict=True)
    return statistics.median(
        min(floor) / seconds
        for floor, seconds in zip(floors, times[f"{loader}{kind}"], strict=True)
    )


def in_fresh_process(function: Callable[..., Times], *arguments: Any) -> Times:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


@dataclass(frozen=True)
class Windows(Movable):
    """One read, and the resident memory of the process that did it in MiB."""

    windows: tuple[tuple[StreamWindow, ...], ...]
    resident_mib: Tensor


class Reads(Dataset[Packed[Windows]]):
    """Item n: the windows of the n-th read, read into the memory that they are handed over in."""

    def __init__(self, path: Path, reads: Sequence[Places]) -> None:
        self.segment, self.scale = opened(str(path), Access()), normaliser()
        self.reads = reads

    def __getitem__(self, number: int) -> Packed[Windows]:
        places = self.reads[number]
        arena = Arena(len(places) * WINDOW_BYTES + (1 << 20))  # and some room for coordinates
        read = read_windows(self.segment, SPECS, self.scale, WINDOW.time, places, arena.bytes)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident = torch.tensor(pages * resource.getpagesize() / 2**20)
        return Packed.of(Windows(tuple(read), resident), arena)


def only_item(items: list[Packed[Windows]]) -> Packed[Windows]:
    (item,) = items
    return item


@cache
def _floors(path: Path) -> Floors:
    return Floors(path)


def run_floor(path: Path, name: str, reads: Sequence[Places]) -> None:
    for places in reads:
        _floors(path).all()[name](touched(places))


def two_workers(path: Path, count: int, per_time: int) -> dict[str, float]:
    """Seconds of a pass of the loader with two workers and of the fastest floor in two processes,
    medians over passes; and by how much the workers grew over the passes after the first."""
    dataset = Reads(path, draws(opened(str(path), Access()), count, per_time, seed=4))
    loader = WindowLoader(
        dataset,
        batch_sampler=[[n] for n in range(count)],
        num_workers=2,
        prefetch_factor=1,
        persistent_workers=True,
        collate_fn=only_item,
        multiprocessing_context=worker_context(),
        describe=str,
    )
    seconds: dict[str, list[float]] = {}
    memory: list[float] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        for _ in range(_PASSES):
            resident: list[float] = []
            wall, _ = timed(lambda r=resident: r.extend(float(b.resident_mib) for b in loader))  # pyright: ignore[reportAttributeAccessIssue]
            seconds.setdefault("loader", []).append(wall)
            memory.append(max(resident))
            for name in _FLOORS:
                shares = [dataset.reads[n::2] for n in range(2)]
                wall, _ = timed(lambda f=name, s=shares: _together(pool, path, f, s))
                seconds.setdefault(name, []).append(wall)
    middle = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    floor = min(middle[name] for name in _FLOORS)
    return {"loader": middle["loader"], "floor": floor, "growth_mib": memory[-1] - memory[0]}


def _together(
    pool: ProcessPoolExecutor, path: Path, floor: str, shares: Sequence[Sequence[Places]]
) -> None:
    futures = [pool.submit(run_floor, path, floor, share) for share in shares]
    for future in futures:
        future.result()


def compare_lengths(short: Path, long: Path, count: int) -> tuple[float, float]:
    """Samples per second from the long store over those from the short one, read in turns; by the
    clock and by CPU seconds."""
    scale, rng = normaliser(), np.random.default_rng(5)
    segments = [opened(str(path), Access()) for path in (short, long)]
    lengths = [len(segment.times) for segment in segments]
    times = []
    for ((start, box),) in draws(segments[0], count + 1, 1, seed=3):
        later = lengths[0] * int(rng.integers(1, lengths[1] // lengths[0]))
        places = [[(start, box)], [(start + later, box)]]
        turns = list(zip(segments, places, strict=True))
        both = [
            timed(lambda s=s, p=p: read_windows(s, SPECS, scale, WINDOW.time, p))
            for s, p in (turns if len(times) % 2 else turns[::-1])
        ]
        times.append(both if len(times) % 2 else both[::-1])
    ratios = np.array(times[1:])[:, 0] / np.array(times[1:])[:, 1]  # [read, clock or CPU]
    wall, cpu = np.median(ratios, axis=0)
    return float(wall), float(cpu)


def masked(path: Path) -> WindowDataset:
    return WindowDataset(
        segments=[opened(str(path), Access())],
        specs=SPECS,
        normaliser=normaliser(),
        window=WINDOW,
        sampler=RandomMasking(),
        seed=0,
    )


def masked_seconds(path: Path, count: int) -> tuple[float, float]:
    """Median seconds of a sample with mask, tokens and first guess; by the clock and of all
    cores."""
    dataset, rng = masked(path), np.random.default_rng(0)
    keys = [SampleKey(0, int(n)) for n in rng.integers(0, len(dataset), count + 1)]
    times = [timed(lambda k=k: dataset[k]) for k in keys][1:]
    wall, cpu = np.median(times, axis=0)
    return float(wall), float(cpu)


def masked_rate_of_workers(path: Path, count: int) -> float:
    """Masked samples per second of batches of 4 through two workers, once they are at work."""
    dataset = masked(path)
    order = SampleOrder(num_samples=len(dataset), batch_size=4, num_batches=count + 4, seed=0)
    loader = WindowLoader(
        dataset,
        batch_sampler=order,  # pyright: ignore[reportArgumentType]
        num_workers=2,
        prefetch_factor=1,
        collate_fn=Collate(4),
        multiprocessing_context=worker_context(),
        describe=str,
    )
    arrivals = [time.perf_counter() for _ in loader]
    return 4 * count / (arrivals[-1] - arrivals[-1 - count])


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
        chunk_bytes += len(touched(places)) * CHUNK_BYTES
    return sum(total) / chunk_bytes, sum(total) / window_bytes


def http_fraction(folder: Path, name: str, bytes_per_s: float) -> float:
    """Share of the link's rate at which the compressed chunks arrive, from a cold start."""
    reads = draws(opened(str(folder / name), Access()), 4, 1, seed=2)
    size = sum(
        (folder / name / n / "c" / str(t) / str(level) / "0" / "0").stat().st_size
        for places in reads
        for n, t, level in touched(places)
    )
    with limited_server(folder, 0.02, bytes_per_s) as address:
        segment: Segment = opened(f"{address}/{name}", Access(threads=16))
        seconds, _ = timed(
            lambda: [read_windows(segment, SPECS, normaliser(), WINDOW.time, p) for p in reads]
        )
    return size / bytes_per_s / seconds


def one_process(short: Path, reads: int) -> Iterator[tuple[str, float]]:
    tell(f"one process, {reads} reads of one window and of 16")
    one_window = in_fresh_process(measure, short, reads, 1, 0)
    sixteen = in_fresh_process(measure, short, reads, 16, 0)
    for name, times in (("one_window", one_window), ("16_windows", sixteen)):
        yield f"floor_fraction_{name}_per_time", fraction(times)
        yield f"floor_cpu_fraction_{name}_per_time", fraction(times, "_cpu")
        yield f"floor_fraction_{name}_by_zarr", fraction(times, loader="loader_by_zarr")
    seconds = {name: statistics.median(values) for name, values in one_window.items()}
    yield "samples_per_s", 1 / seconds["loader"]
    yield "samples_per_s_16_windows_per_time", 16 / statistics.median(sixteen["loader"])
    yield "cpu_s_per_sample", seconds["loader_cpu"]
    yield "cpu_s_per_sample_16_windows_per_time", statistics.median(sixteen["loader_cpu"]) / 16
    for name in _FLOORS:
        yield f"floor_seconds_{name}", seconds[name]
        yield f"floor_cpu_seconds_{name}", seconds[f"{name}_cpu"]
    yield "peak_memory_mib", max(one_window["peak_mib"][0], sixteen["peak_mib"][0])


def with_workers(short: Path, reads: int) -> Iterator[tuple[str, float]]:
    growth = []
    for name, per_time, count in (("one_window", 1, 2 * reads), ("16_windows", 16, reads)):
        tell(f"two workers, {_PASSES} passes of {count} reads, {per_time} per time")
        times = two_workers(short, count, per_time)
        yield f"floor_fraction_{name}_per_time_2_workers", times["floor"] / times["loader"]
        rate = count * per_time / times["loader"]
        yield f"samples_per_s_{name}_per_time_2_workers", rate
        growth.append(times["growth_mib"])
    yield "worker_growth_mib", max(growth)


def figures(folder: Path, days: int, reads: int, rate: float) -> Iterator[tuple[str, float]]:
    short, long = folder / "short.zarr", folder / "long.zarr"
    tell(f"making a store of {days} days")
    make_store(short, days)
    make_store(long, 10 * days, source=short)
    yield from one_process(short, reads)
    yield from with_workers(short, reads)
    tell("long store, decoded bytes, masks")
    yield from zip(
        ("long_store_ratio", "long_store_cpu_ratio"),
        compare_lengths(short, long, 2 * reads),
        strict=True,
    )
    yield from zip(
        ("decoded_over_touched", "decoded_over_needed"), decoded_over(short, 1), strict=True
    )
    wall, cpu = masked_seconds(short, reads)
    yield from (("masked_samples_per_s", 1 / wall), ("masked_cpu_s_per_sample", cpu))
    yield "masked_samples_per_s_2_workers", masked_rate_of_workers(short, reads)
    tell(f"HTTP at {rate / 1e6:g} MB/s")
    yield "http_bandwidth_fraction", http_fraction(folder, "short.zarr", rate)


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--reads", type=int, default=12)
    parser.add_argument("--http-rate", type=float, default=50e6, help="bytes per second")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
    settings = {"days": arguments.days, "reads": arguments.reads, "chunk": CHUNK}
    with tempfile.TemporaryDirectory() as folder:
        all_figures = figures(Path(folder), arguments.days, arguments.reads, arguments.http_rate)
        rounded = {name: float(f"{value:.4g}") for name, value in all_figures}
    finish("data_loader", rounded | settings | {"http_bytes_per_s": arguments.http_rate})


if __name__ == "__main__":
    main()
