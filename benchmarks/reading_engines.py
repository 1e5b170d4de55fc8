"""CPU seconds of a read of windows by each reading engine, over stores of several codecs.

    python -m benchmarks.reading_engines

Stores: eight days of the loader's benchmark, with blosc, zstd and gzip, and with blosc in shards,
which `files` cannot read, nor gzip. Engines take turns on the same reads of 1 and of 16 windows;
figures are medians over the reads, of CPU seconds, which other programs on the machine hardly
change.

`results/reading_engines.json` also has the figures of a third engine, through tensorstore, by which
it was decided to leave it out: it took more than `files`, and less than `zarr` on shards and gzip.
"""

import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.codecs import BloscCodec, BloscShuffle, GzipCodec, ZstdCodec

from atmossl.data.chunks import Access, Engine
from atmossl.data.segment import Segment
from atmossl.data.windows import read_windows
from benchmarks.data_loader import timed
from benchmarks.report import finish, take_no_options
from benchmarks.window_store import (
    CHUNK,
    NAMES,
    SPECS,
    WINDOW,
    draws,
    make_store,
    normaliser,
    opened,
)

_DAYS, _READS = 8, 8
_ENGINES: tuple[Engine, ...] = ("files", "zarr")
_BLOSC = BloscCodec(cname="zstd", clevel=3, shuffle=BloscShuffle.shuffle)
_STORES: dict[str, dict[str, Any]] = {
    "blosc": {"compressors": _BLOSC},
    "zstd": {"compressors": ZstdCodec(level=3)},
    "blosc_in_shards": {"compressors": _BLOSC, "shards": (CHUNK[0], 5, *CHUNK[2:])},
    "gzip": {"compressors": GzipCodec(level=3)},
}


def encoded(source: Path, target: Path, **encoding: Any) -> None:
    """A copy of a store in another encoding."""
    group = zarr.open_group(source, mode="r")
    xr.Dataset(coords=xr.open_zarr(source).coords).to_zarr(target, consolidated=False)
    copied = zarr.open_group(target, mode="r+")
    for name in NAMES:
        array = group[name]
        assert isinstance(array, zarr.Array)
        dims = ["time", "level", "latitude", "longitude"]
        made = copied.create_array(
            name, shape=array.shape, chunks=CHUNK, dtype="float32", fill_value=np.nan,
            dimension_names=dims, **encoding,
        )  # fmt: skip
        made[:] = array[:]
    zarr.consolidate_metadata(target)


def readers(store: Path) -> dict[str, Segment]:
    """The store by every engine that can read it."""
    segments = {}
    for engine in _ENGINES:
        try:
            segments[engine] = opened(str(store), Access(engine=engine))
        except ValueError:  # not of this codec
            continue
    return segments


def cpu_seconds(by_engine: dict[str, Segment], per_time: int) -> dict[str, float]:
    """Median CPU seconds of a read of so many windows; the first read warms up."""
    scale, seconds = normaliser(), {engine: [] for engine in by_engine}
    names = list(by_engine)
    for number, places in enumerate(draws(by_engine["zarr"], _READS, per_time, seed=0)):
        first = number % len(names)
        for engine in names[first:] + names[:first]:
            segment = by_engine[engine]
            _, cpu = timed(
                lambda s=segment, p=places: read_windows(s, SPECS, scale, WINDOW.time, p)
            )
            seconds[engine] += [cpu] if number else []
    return {engine: statistics.median(values) for engine, values in seconds.items()}


def main() -> None:
    take_no_options(__doc__)
    warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_store(source := Path(folder) / "source", _DAYS)
        for kind, encoding in _STORES.items():
            encoded(source, store := Path(folder) / kind, **encoding)
            for per_time in (1, 16):
                for engine, seconds in cpu_seconds(readers(store), per_time).items():
                    windows = "window" if per_time == 1 else "windows"
                    figures[f"cpu_s_{kind}_{engine}_{per_time}_{windows}"] = round(seconds, 4)
    finish("reading_engines", figures)


if __name__ == "__main__":
    main()
