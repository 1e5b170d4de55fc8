"""Windows of stores as samples, and the order in which samples are delivered."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from atmossl.batch import StreamSpec, StreamWindow, View
from atmossl.data.statistics import Normaliser
from atmossl.data.store import Segment
from atmossl.geometry import Box, check_window_fits, random_box
from atmossl.masking.base import MaskingSampler, make_view


@dataclass(frozen=True)
class WindowSize:
    """Points of a window along each axis; lat or lon of 0 take the whole grid."""

    time: int
    lat: int
    lon: int

    def on(self, segment: Segment) -> "WindowSize":
        """With the whole grid put in for 0; ValueError if the window does not fit."""
        num_lat, num_lon = segment.grid.shape
        lat, lon = self.lat or num_lat, self.lon or num_lon
        check_window_fits(segment.grid, lat, lon)
        if self.time > len(segment.times):
            raise ValueError(
                f"data.window.time={self.time} steps is longer than segment {segment.name} with "
                f"{len(segment.times)} steps"
            )
        return WindowSize(self.time, lat, lon)


def read_window(
    segment: Segment,
    specs: Sequence[StreamSpec],
    normaliser: Normaliser,
    start: int,
    count: int,
    box: Box,
) -> tuple[StreamWindow, ...]:
    """Normalised fields of all streams in one window, with the coordinates of its points."""
    grid = segment.grid
    lat, lon = box.lat_index(), box.lon_index(grid.shape[1])
    windows = []
    for spec in specs:
        fields = np.stack(
            [segment.read(name, spec.level_values, start, count, box) for name in spec.variables]
        )
        windows.append(
            StreamWindow(
                spec=spec,
                fields=normaliser.forward(torch.from_numpy(fields), spec),
                time_hours=torch.from_numpy(segment.time_hours(start, count)),
                level_hpa=torch.tensor(spec.level_values, dtype=torch.float32),
                lat=torch.from_numpy(grid.latitude[lat]).float(),
                lon=torch.from_numpy(grid.longitude[lon]).float(),
                weight=torch.from_numpy(grid.weights[lat]).float(),
            )
        )
    return tuple(windows)


class SampleKey(NamedTuple):
    epoch: int
    sample_id: int


def sample_rng(seed: int, epoch: int, sample_id: int) -> np.random.Generator:
    """All randomness of one sample: a function of (seed, epoch, sample id) alone."""
    return np.random.default_rng(np.random.SeedSequence([seed, epoch, sample_id]))


class WindowDataset(Dataset[tuple[tuple[View, ...], int]]):
    """Masked windows of all segments. Sample ids number every start time `windows_per_time`
    times; the place of the window and its mask are drawn from the sample's generator.
    """

    def __init__(
        self,
        *,
        segments: Sequence[Segment],
        specs: Sequence[StreamSpec],
        normaliser: Normaliser,
        window: WindowSize,
        sampler: MaskingSampler,
        seed: int,
        windows_per_time: int = 1,
        first_guess: bool = True,
    ) -> None:
        self.segments = tuple(segments)
        self.specs = tuple(specs)
        self.normaliser = normaliser
        self.window = window.on(self.segments[0])
        self.sampler = sampler
        self.seed = seed
        self.windows_per_time = windows_per_time
        self.first_guess = first_guess
        for spec in self.specs:
            spec.token_shape(self.window.time, self.window.lat, self.window.lon)
        self._starts = [
            (index, start)
            for index, segment in enumerate(self.segments)
            for start in range(len(segment.times) - self.window.on(segment).time + 1)
        ]

    def __len__(self) -> int:
        return len(self._starts) * self.windows_per_time

    def __getitem__(self, key: SampleKey) -> tuple[tuple[View, ...], int]:
        rng = sample_rng(self.seed, key.epoch, key.sample_id)
        index, start = self._starts[key.sample_id // self.windows_per_time]
        segment = self.segments[index]
        box = random_box(segment.grid, self.window.lat, self.window.lon, rng)
        windows = read_window(segment, self.specs, self.normaliser, start, self.window.time, box)
        view = make_view(windows, self.sampler, rng, first_guess=self.first_guess)
        return (view,), key.sample_id

    def identity(self, sample_id: int) -> str:
        """Segment and start time of a sample."""
        index, start = self._starts[sample_id // self.windows_per_time]
        segment = self.segments[index]
        return f"{segment.name} {np.datetime_as_string(segment.times[start], 'h')}"


class SampleOrder(Sampler[list[SampleKey]]):
    """Batches of one rank, from any point of the run on.

    The run is one endless sequence of samples: epoch after epoch, each a permutation by
    (seed, epoch). Batch n of rank r takes samples (n * ranks + r) * batch_size onwards, so ranks
    are disjoint, nothing is dropped at the end of an epoch, and neither the number of workers nor
    a restart changes what is delivered.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        batch_size: int,
        num_batches: int,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
        first_batch: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks
        self.first_batch = first_batch
        self.shuffle = shuffle

    def __len__(self) -> int:
        """Batches of the whole run, also when iteration starts later: the trainer's own count of
        batches goes on from the restored one."""
        return self.num_batches

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, order = -1, np.arange(0)
        for batch in range(self.first_batch, self.num_batches):
            keys = []
            first = (batch * self.num_ranks + self.rank) * self.batch_size
            for position in range(first, first + self.batch_size):
                if position // self.num_samples != epoch:
                    epoch = position // self.num_samples
                    order = self._order(epoch)
                keys.append(SampleKey(epoch, int(order[position % self.num_samples])))
            yield keys

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_samples)
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch]))
        return rng.permutation(self.num_samples)
