"""Windows of stores as samples, and the order in which samples are delivered."""

import itertools
import logging
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from atmossl.batch import StreamSpec, StreamWindow, View
from atmossl.data.segment import Index, Segment, Target, UnreadableChunk, WindowPlace
from atmossl.data.sources import check_window
from atmossl.data.statistics import Normaliser
from atmossl.data.variables import Limits, Transform
from atmossl.geometry import Box, check_window_fits, random_box
from atmossl.masking.base import MaskingSampler
from atmossl.masking.views import FirstGuess, ViewSpec, lag_steps, make_views, show_hours
from atmossl.model_levels import standard_pressure
from atmossl.settings import NotNegative, Positive

# Memory that is used again once nobody views it. Fresh memory costs as much as a copy of what
# is put into it: the system clears it page by page.

_MOST_KEPT = 2  # pieces of memory that wait to be used again


def lent(memory: np.ndarray, give_back: Callable[[], object]) -> np.ndarray:
    """Memory as an array that calls `give_back` when no array or tensor views it any longer.

    Views of an array keep its outermost owner alive, which must not be the memory itself here:
    through a buffer, numpy takes what is handed out for the owner.
    """
    handed_out = np.frombuffer(memory.data, np.uint8)
    weakref.finalize(handed_out, give_back).atexit = False
    return handed_out


class Pool:
    """Pieces of memory for one process. It may be used by several threads: pieces come back
    whenever their last view dies, so there is no lock to wait for then."""

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=_MOST_KEPT)

    def take(self, size: int) -> np.ndarray:
        """An array of `size` bytes from a free piece, of which at most half stays unused. Its
        content is not defined."""
        memory = self._reused(size)
        if memory is None:
            memory = np.empty(size, np.uint8)
        return lent(memory, lambda: self._free.append(memory))[:size]

    def _reused(self, size: int) -> np.ndarray | None:
        for _ in range(_MOST_KEPT):
            try:
                memory = self._free.popleft()
            except IndexError:
                return None
            if size <= len(memory) <= 2 * size:
                return memory
            self._free.append(memory)
        return None


_LOGGER = logging.getLogger(__name__)
_POOL = Pool()
_NUM_TRIES = 20  # of samples in place of a batch of which none can be read
_SURELY_FINITE = 1e25  # float32 of that size can be divided by any standard deviation
Memory = Callable[[int], np.ndarray]


@dataclass(frozen=True)
class WindowSize:
    """Points of a window along each axis; lat or lon of 0 take the whole grid."""

    time: Positive
    lat: NotNegative
    lon: NotNegative

    def on(self, segment: Segment) -> "WindowSize":
        """The window size on a segment, with the whole grid put in for 0; ValueError if the
        window does not fit."""
        num_lat, num_lon = segment.grid.shape
        lat, lon = self.lat or num_lat, self.lon or num_lon
        check_window_fits(segment.grid, lat, lon)
        if self.time > len(segment.times) and not segment.partial:
            raise ValueError(
                f"data.window.time={self.time} steps is longer than segment {segment.name} with "
                f"{len(segment.times)} steps"
            )
        check_window(segment, self.time, lat, lon)
        return WindowSize(self.time, lat, lon)

    def points(self, segment: Segment, spec: StreamSpec) -> tuple[int, int, int]:
        """The points (time, lat, lon) of a stream in a window of this size."""
        box = Box(0, segment.alignment.lon_shift, self.lat, self.lon)
        place = segment.place(spec.data, 0, self.time, box)
        return place.count, place.box.lat_size, place.box.lon_size


@dataclass(frozen=True)
class LoaderSettings:
    """How windows become batches, `data` of a configuration.

    batch_size: windows in a batch, per device. windows_per_time: windows at every start time, each
    at another place. windows_per_read: of these, how many follow one another in the order, so that
    one read serves them. num_workers: processes that read; 0: the training process itself.
    prefetch: batches that a worker holds ready. unreadable: whether a chunk that cannot be read
    ends the run or skips its samples. first_guess: predict the residual from it; false: from the
    mean; surroundings: also fill what is never shown from the places around; other_model: from what
    a stream of role input with a store of its own says of the same variable and level.

    Raises:
        ValueError: windows_per_read divides neither of what it groups.
    """

    windows_per_time: Positive
    windows_per_read: Positive
    batch_size: Positive
    num_workers: NotNegative
    prefetch: Positive
    unreadable: Literal["raise", "skip"]
    first_guess: FirstGuess

    def __post_init__(self) -> None:
        for key in ("windows_per_time", "batch_size"):
            if getattr(self, key) % self.windows_per_read:
                raise ValueError(
                    f"windows_per_read={self.windows_per_read} does not divide "
                    f"{key}={getattr(self, key)}"
                )


@dataclass(frozen=True)
class _FieldWriter:
    """Normalises what is read of one variable straight into its place in a window.

    out: [level time lat lon]. mean, std: [level 1 1 1]. limits: what the values may be. valid: like
    `out`, where missing values are marked; without it they are refused.
    """

    out: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    transform: Transform | None
    limits: Limits | None
    refusal: Callable[[], str]
    valid: np.ndarray | None = None

    def __call__(self, values: np.ndarray, index: Index) -> None:
        levels, place = index[0], self.out[index]
        with np.errstate(over="ignore", invalid="ignore"):  # to infinity, which is missing
            values = values.astype(np.float32, copy=False)
            lowest, highest = values.min(), values.max()  # NaN if one is missing
        if self.limits is not None and not self.limits.hold(lowest, highest):
            self.limits.check(values, levels)
        if self.transform is not None:
            values = self.transform.forward(values)
        with np.errstate(invalid="ignore", over="ignore"):
            np.subtract(values, self.mean[levels], out=place)
            np.divide(place, self.std[levels], out=place)
        finite = lowest > -_SURELY_FINITE and highest < _SURELY_FINITE
        if not finite or self.transform is not None:
            self._mark_missing(place, index)

    def _mark_missing(self, place: np.ndarray, index: Index) -> None:
        observed = np.isfinite(place)
        if observed.all():
            return
        if self.valid is None:
            raise ValueError(self.refusal())
        self.valid[index] = observed
        place[~observed] = 0.0


def read_windows(
    segment: Segment,
    specs: Sequence[StreamSpec],
    normaliser: Normaliser,
    count: int,
    places: Sequence[tuple[int, Box]],
    memory: Memory = _POOL.take,
) -> list[tuple[StreamWindow, ...]]:
    """Read windows of `count` steps, each at (first step, box), for all streams: normalised
    fields with the coordinates of their points. Chunks that several windows touch are read once.
    memory: returns as many bytes as it is asked for, in which the fields of all windows lie."""
    laid = [
        [segment.place(spec.data, start, count, box) for spec in specs] for start, box in places
    ]
    windows = _empty_windows(laid, specs, memory)
    targets_of_data: dict[str, dict[str, list[Target]]] = {}  # by the streams' data and variable
    for places_of_sample, streams in zip(laid, windows, strict=True):
        for place, window in zip(places_of_sample, streams, strict=True):
            if place.count == 0:  # none of the stream's steps lies in so short a window
                continue
            targets = targets_of_data.setdefault(window.spec.data, {})
            for name, target in _targets(place, window, normaliser):
                targets.setdefault(name, []).append(target)
    for data, targets in targets_of_data.items():
        segment.sources[data].segment.read_into(targets)
    for window in itertools.chain.from_iterable(windows):
        _into_local_units(window, normaliser)
    return windows


def _into_local_units(window: StreamWindow, normaliser: Normaliser) -> None:
    """Change normalised fields in place, if the network takes them in units of month and place."""
    local = normaliser.local_of(window)
    if local is not None:
        window.fields.copy_(local.into(window.fields))
        if window.valid is not None:
            window.fields.masked_fill_(~window.valid, 0.0)


def _targets(
    place: WindowPlace, window: StreamWindow, normaliser: Normaliser
) -> Iterator[tuple[str, Target]]:
    """The read requests for every variable of a stream."""
    record, start, count, box = place
    names, levels = window.spec.variables, window.spec.level_values
    refusals = [partial(record.missing_message, name, start, count) for name in names]
    limits = [record.limits(name, levels, start, count) for name in names]
    writers = _field_writers(window, normaliser, limits, refusals)
    for name, write in zip(names, writers, strict=True):
        yield name, record.target(name, levels, start, count, box, write)


def _field_writers(
    window: StreamWindow,
    normaliser: Normaliser,
    limits: Sequence[Limits | None],
    refusals: Sequence[Callable[[], str]],
) -> list[_FieldWriter]:
    """Writers, one per variable, which put normalised values into the window's memory."""
    spec = window.spec
    mean, std = (normaliser.values(spec, field).numpy() for field in ("mean", "std"))
    fields = window.fields.numpy()
    valid = None if window.valid is None else window.valid.numpy()
    return [
        _FieldWriter(
            out=fields[row],
            mean=mean[row],
            std=std[row],
            transform=normaliser.transform(name, spec.data),
            limits=limits[row],
            refusal=refusals[row],
            valid=None if valid is None else valid[row],
        )
        for row, name in enumerate(spec.variables)
    ]


def _empty_windows(
    laid: Sequence[Sequence[WindowPlace]], specs: Sequence[StreamSpec], memory: Memory
) -> list[tuple[StreamWindow, ...]]:
    """Windows with their coordinates and empty fields, in one piece of memory. numpy asks for
    large pages where the piece is large, which the system clears much faster."""
    shapes = [
        (len(spec.variables), spec.num_levels, place.count, place.box.lat_size, place.box.lon_size)
        for places in laid
        for place, spec in zip(places, specs, strict=True)
    ]
    sizes = [math.prod(shape) for shape in shapes]
    pieces = np.split(memory(4 * sum(sizes)).view(np.float32), np.cumsum(sizes)[:-1])
    fields = iter(piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True))
    return [
        tuple(_empty_window(*pair, next(fields)) for pair in zip(places, specs, strict=True))
        for places in laid
    ]


def _empty_window(place: WindowPlace, spec: StreamSpec, fields: np.ndarray) -> StreamWindow:
    segment, start, count, box = place
    grid = segment.grid
    lat, lon = box.lat_index(), box.lon_index(grid.shape[1])
    return StreamWindow(
        spec=spec,
        fields=torch.from_numpy(fields),
        valid=torch.ones(fields.shape, dtype=torch.bool) if spec.missing == "mask" else None,
        time_hours=torch.from_numpy(segment.time_hours(start, count)),
        level_hpa=torch.tensor(_told_levels(segment, spec), dtype=torch.float32),
        lat=torch.from_numpy(grid.latitude[lat]).float(),
        lon=torch.from_numpy(grid.longitude[lon]).float(),
        weight=torch.from_numpy(grid.weights[lat]).float(),
        year_hours=segment.calendar.year_hours,
    )


def _told_levels(segment: Segment, spec: StreamSpec) -> list[float]:
    """hPa of every level, 0 at the surface: in the standard atmosphere where the store's are
    numbers of model levels."""
    if not (segment.model_levels and spec.levels):
        return [float(level) for level in spec.level_values]
    return [standard_pressure(level) for level in spec.level_values]


def read_window(
    segment: Segment,
    specs: Sequence[StreamSpec],
    normaliser: Normaliser,
    start: int,
    count: int,
    box: Box,
) -> tuple[StreamWindow, ...]:
    """One window of all streams; see `read_windows`."""
    (window,) = read_windows(segment, specs, normaliser, count, [(start, box)])
    return window


class SampleKey(NamedTuple):
    """The name of one sample of one epoch. With the seed it determines all randomness of the
    sample."""

    epoch: int
    sample_id: int


def sample_rng(seed: int, epoch: int, sample_id: int) -> np.random.Generator:
    """The generator of one sample, a function of (seed, epoch, sample id) alone."""
    return np.random.default_rng(np.random.SeedSequence([seed, epoch, sample_id]))


class WindowDataset(Dataset[tuple[tuple[View, ...], int]]):
    """Masked windows of all segments. Sample ids number every start time `windows_per_time`
    times; the place of the window and its masks are drawn from the sample's generator.

    sampler: of the masks of views that have none of their own. views: those of every sample. Where
    they start later than the sample, samples end so much earlier that all views are in the record.
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
        first_guess: FirstGuess = True,
        skip_unreadable: bool = False,
        views: Sequence[ViewSpec] = (ViewSpec(),),
    ) -> None:
        self.segments = tuple(segments)
        self.specs = tuple(specs)
        self.normaliser = normaliser
        self.window = window.on(self.segments[0])
        self.seed = seed
        self.windows_per_time = windows_per_time
        self.first_guess: FirstGuess = first_guess
        self.skip_unreadable = skip_unreadable
        self.sampler = sampler
        self.views = tuple(views)
        self._lags = [  # of every view in time steps, by segment
            [lag_steps(view, segment.step_hours, segment.location) for view in self.views]
            for segment in self.segments
        ]
        for spec in self.specs:
            spec.token_shape(*self.window.points(self.segments[0], spec))
        self._starts = [
            (index, start)
            for index, segment in enumerate(self.segments)
            for start in range(len(segment.times) - self._reach(index) + 1)
        ]
        if not self._starts:
            longest = max(len(segment.times) for segment in self.segments)
            raise ValueError(
                f"{self._asked()} {'are' if self._lag_hours else 'is'} longer than the longest "
                f"unbroken part of {self.segments[0].location} with {longest} steps"
            )

    @property
    def _lag_hours(self) -> list[float]:
        return sorted({lag for view in self.views for lag in view.lag_hours})

    def _reach(self, index: int) -> int:
        """Time steps from the start of a sample to the end of the last of its windows."""
        return self.window.on(self.segments[index]).time + max(map(max, self._lags[index]))

    def _asked(self) -> str:
        """How many steps a sample needs, for messages."""
        window_words = f"data.window.time={self.window.time} steps"
        if not self._lag_hours:
            return window_words
        lags, reach = show_hours(self._lag_hours), self._reach(0)
        return f"{window_words} and objective.lag_time={lags}, together {reach} steps,"

    def tell_short_segments(self) -> None:
        """Say how many parts of a record are too short for a sample."""
        lengths = [len(segment.times) for segment in self.segments]
        short = sum(length < self._reach(index) for index, length in enumerate(lengths))
        if short:
            _LOGGER.warning(
                "%d of %d unbroken parts of the record are shorter than %s and give no window",
                short, len(lengths), self._asked(),
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self._starts) * self.windows_per_time

    def __getitem__(self, key: SampleKey) -> tuple[tuple[View, ...], int]:
        (sample,) = self.__getitems__([key])
        return sample

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[tuple[tuple[View, ...], int]]:
        """The samples of one batch, which torch's loader asks for; chunks are shared among them.

        Where unreadable samples are skipped the batch is smaller, but never empty if another sample
        can be read: batches go on at one pace in all processes.

        Raises:
            UnreadableChunk: unless such samples are skipped.
        """
        try:
            return self._samples(keys)
        except UnreadableChunk:
            if not self.skip_unreadable:
                raise
        samples = [sample for key in keys for sample in self._readable(key)]
        return samples or self._in_place_of(keys[0])

    def _readable(self, key: SampleKey) -> list[tuple[tuple[View, ...], int]]:
        """One sample in a list, which is empty if its data cannot be read."""
        try:
            return self._samples([key])
        except UnreadableChunk as error:
            _LOGGER.warning("sample %s is skipped: %s", self.identity(key.sample_id), error)
            return []

    def _in_place_of(self, key: SampleKey) -> list[tuple[tuple[View, ...], int]]:
        """A replacement for an unreadable sample: the first readable one among later samples, a
        window's length apart; empty after some tries."""
        stride = self.windows_per_time * self.window.time
        for number in range(1, _NUM_TRIES + 1):
            later = SampleKey(key.epoch, (key.sample_id + number * stride) % len(self))
            if samples := self._readable(later):
                return samples
        return []

    def _samples(self, keys: Sequence[SampleKey]) -> list[tuple[tuple[View, ...], int]]:
        rngs = [sample_rng(self.seed, key.epoch, key.sample_id) for key in keys]
        lags: list[tuple[int, ...]] = []  # of every sample's views in time steps
        # by segment, position in the batch and lag; views of equal lag share a window
        places: dict[int, dict[tuple[int, int], tuple[int, Box]]] = {}
        for position, (key, rng) in enumerate(zip(keys, rngs, strict=True)):
            index, start = self._starts[key.sample_id // self.windows_per_time]
            segment, size = self.segments[index], self.window
            box = random_box(segment.grid, size.lat, size.lon, rng, segment.alignment)
            lags.append(self._draw_lags(index, rng))
            for lag in lags[-1]:
                places.setdefault(index, {})[position, lag] = (start + lag, box)
        windows: dict[tuple[int, int], tuple[StreamWindow, ...]] = {}
        for index, places_of_segment in places.items():
            read = read_windows(
                self.segments[index],
                self.specs,
                self.normaliser,
                self.window.time,
                list(places_of_segment.values()),
            )
            windows.update(zip(places_of_segment, read, strict=True))
        samples = []
        for position, (key, rng) in enumerate(zip(keys, rngs, strict=True)):
            of_views = [windows[position, lag] for lag in lags[position]]
            views = make_views(
                of_views, self.views, self.sampler, rng, first_guess=self.first_guess
            )
            samples.append((views, key.sample_id))
        return samples

    def _draw_lags(self, index: int, rng: np.random.Generator) -> tuple[int, ...]:
        """The lag of every view in time steps; nothing is drawn for a view without lags."""
        return tuple(
            int(rng.choice(steps)) if view.lag_hours else 0
            for view, steps in zip(self.views, self._lags[index], strict=True)
        )

    def identity(self, sample_id: int) -> str:
        """The segment and start time of a sample."""
        index, start = self._starts[sample_id // self.windows_per_time]
        segment = self.segments[index]
        return f"{segment.name} {segment.calendar.show(segment.times[start])}"


class SampleOrder(Sampler[list[SampleKey]]):
    """The batches of one rank in order, from any point of the run on.

    The run is one endless sequence of samples: epoch after epoch, each a permutation by
    (seed, epoch). Iteration starts at sample `first_sample`, and the n-th batch that rank r
    delivers takes samples first_sample + (n * ranks + r) * batch_size onwards. So ranks are
    disjoint, nothing is dropped at the end of an epoch, and neither the number of workers nor a
    restart with another batch size or number of ranks changes what is delivered.

    first_batch: batches that the run has behind it, of `num_batches` in all.
    first_sample: samples that it has behind it; None: all its batches had the present size.

    group: so many consecutive sample ids, which share a start time, stay together in the
    permutation, so that a chunk is read once for all of them.
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
        first_sample: int | None = None,
        shuffle: bool = True,
        group: int = 1,
    ) -> None:
        assert num_samples % group == 0, f"groups of {group} do not divide {num_samples} samples"
        self.group = group
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks
        self.first_batch = first_batch
        if first_sample is None:
            first_sample = first_batch * num_ranks * batch_size
        self.first_sample = first_sample
        self.shuffle = shuffle

    def __len__(self) -> int:
        """Batches of the whole run, also when iteration starts later: the trainer's own count of
        batches goes on from the restored one."""
        return self.num_batches

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, order = -1, np.arange(0)
        for number in range(self.num_batches - self.first_batch):
            keys = []
            offset = (number * self.num_ranks + self.rank) * self.batch_size
            first = self.first_sample + offset
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
        groups = rng.permutation(self.num_samples // self.group)
        return (groups[:, None] * self.group + np.arange(self.group)).reshape(-1)
