"""Windows per second from a chunked store, against the time to read the touched chunks alone.

python -m benchmarks.data_loader

Store: hourly, 1 degree, 3 fields x 5 levels, zarr v3, blosc/zstd; every chunk holds 24 steps of
one level of the globe. Windows are AtmoRep's, 36 h x 54 x 108 points, normalised. A floor reads
and decodes exactly the chunks that the same windows touch, and keeps nothing: once with zarr, once
with tensorstore; the faster one counts. Loader and floors take turns on the same windows, and
every figure is a median over them. The long store repeats the chunks of the short one as hard
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
import xarray as xr
import zarr
from torch.utils.data import DataLoader, Dataset
from zarr.codecs import BloscCodec, BloscShuffle

from atmossl.batch import StreamSpec, TokenSize
from atmossl.data.backends import open_store
from atmossl.data.catalog import SegmentEntry
from atmossl.data.chunks import Access
from atmossl.data.reader import by_chunk
from atmossl.data.segment import Segment
from atmossl.data.statistics import Normaliser, Statistics
from atmossl.data.store import open_segment
from atmossl.data.windows import WindowDataset, WindowSize, SampleKey, read_windows, sample_rng
from atmossl.geometry import Box, random_box
from atmossl.masking.random import RandomMasking
from benchmarks.http_server import limited_server
from benchmarks.report import finish

NAMES = ("temperature", "u_component_of_wind", "v_component_of_wind")
LEVELS = (300, 500, 700, 850, 1000)
NUM_LAT, NUM_LON, CHUNK_STEPS = 180, 360, 24
WINDOW = WindowSize(36, 54, 108)
Places = list[tuple[int, Box]]


def make_store(path: Path, days: int) -> None:
    """Travelling waves with noise, in float32."""
    rng = np.random.default_rng(0)
    latitude, longitude = np.arange(NUM_LAT) - 89.5, np.arange(float(NUM_LON))
    times = np.datetime64("2000-01-01", "ns") + np.arange(24 * days) * np.timedelta64(1, "h")
    coords = {"time": times, "level": list(LEVELS), "latitude": latitude, "longitude": longitude}
    xr.Dataset(coords=coords).to_zarr(path, consolidated=False)
    group = zarr.open_group(path, mode="r+")
    shape = (CHUNK_STEPS, len(LEVELS), NUM_LAT, NUM_LON)
    wave = 20 * np.cos(np.deg2rad(latitude))[:, None]
    for name in NAMES:
        array = group.create_array(
            name,
            shape=(len(times), *shape[1:]),
            chunks=(CHUNK_STEPS, 1, NUM_LAT, NUM_LON),
            dtype="float32",
            fill_value=np.nan,
            compressors=BloscCodec(cname="zstd", clevel=3, shuffle=BloscShuffle.shuffle),
            dimension_names=["time", "level", "latitude", "longitude"],
        )
        for start in range(0, len(times), CHUNK_STEPS):
            phase = 3 * np.deg2rad(longitude) - 0.1 * np.arange(start, start + CHUNK_STEPS)[:, None]
            values = wave * np.sin(phase)[:, None, None] + rng.standard_normal(shape, np.float32)
            array[start : start + CHUNK_STEPS] = values.astype(np.float32)
    zarr.consolidate_metadata(path)


def repeat_store(source: Path, target: Path, days: int, repeats: int) -> None:
    """The store's chunks again and again, as hard links."""
    steps = 24 * days * repeats
    make_store(target, 0) if False else None
    times = np.datetime64("2000-01-01", "ns") + np.arange(steps) * np.timedelta64(1, "h")
    with xr.open_zarr(source) as short:
        coords = {"time": times, **{k: short[k] for k in ("level", "latitude", "longitude")}}
        xr.Dataset(coords=coords).to_zarr(target, consolidated=False)
    group, chunks = zarr.open_group(target, mode="r+"), days
    for name in NAMES:
        like = zarr.open_array(source / name, mode="r")
        group.create_array(
            name,
            shape=(steps, *like.shape[1:]),
            chunks=like.chunks,
            dtype=like.dtype,
            fill_value=np.nan,
            compressors=like.compressors,
            dimension_names=["time", "level", "latitude", "longitude"],
        )
        for number in range(chunks * repeats):
            for file in (source / name / "c" / str(number % chunks)).rglob("0"):
                if file.is_file():
                    link = target / name / "c" / str(number) / file.relative_to(
                        source / name / "c" / str(number % chunks)
                    )
                    link.parent.mkdir(parents=True, exist_ok=True)
                    os.link(file, link)
    zarr.consolidate_metadata(target)
