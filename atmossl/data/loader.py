"""Samples, which are masked windows of stores, the order in which they are delivered, and worker
processes that load batches of them and hand them over in shared memory. Workers import this module,
so Lightning stays out of it."""

import logging
import math
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from typing import Annotated, Any, Generic, Literal, NamedTuple, Self, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from atmossl.at_work import leave_to_creator, start_worker_server
from atmossl.batch import Batch, Movable, StreamSpec, StreamWindow, View, collate_views
from atmossl.data.mirror import check_mirror, mirrored
from atmossl.data.segment import Segment, UnreadableChunk
from atmossl.data.variables import OneLineNotes
from atmossl.data.windows import Normaliser, WindowSize, lent, read_windows
from atmossl.geometry import Box, random_box
from atmossl.masking.base import FirstGuess, MaskingSampler
from atmossl.masking.views import ViewSpec, lag_steps, make_views, show_hours
from atmossl.process_lifetime import end_with_creator
from atmossl.settings import NotNegative, Positive

_LOGGER = logging.getLogger(__name__)
_NUM_TRIES = 20  # of samples in place of a batch of which none can be read


@dataclass(frozen=True)
class LoaderSettings:
    """How windows become batches, `data` of a configuration.

    batch_size: windows in a batch, per device. windows_per_time: windows at every start time, each
    at another place. windows_per_read: of these, how many follow one another in the order, so that
    one read serves them. num_workers: processes that read; 0: the training process itself.
    prefetch: batches that a worker holds ready. unreadable: whether a chunk that cannot be read
    ends the run or skips its samples. mirror: share of the training samples that are mirrored at
    the equator. first_guess: predict the residual from it; false: from the mean; surroundings:
    also fill what is never shown from the places around; other_model: from what a stream of role
    input with a store of its own says of the same variable and level.

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
    mirror: Annotated[float, Field(ge=0, le=1)] = 0.0

    def __post_init__(self) -> None:
        for key in ("windows_per_time", "batch_size"):
            if getattr(self, key) % self.windows_per_read:
                raise ValueError(
                    f"windows_per_read={self.windows_per_read} does not divide "
                    f"{key}={getattr(self, key)}"
                )


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
    mirror: share of the samples whose windows are mirrored at the equator.
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
        mirror: float = 0.0,
    ) -> None:
        if mirror:
            check_mirror(specs, normaliser)
        self.mirror = mirror
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
            if self.mirror and rng.random() < self.mirror:
                of_views = [mirrored(streams, self.normaliser) for streams in of_views]
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


# Batches out of worker processes in one piece of shared memory, which is used again.
#
# Torch sends every tensor of a batch on its own: an open file and a connection each, more work
# for the training process than making a small batch itself. And it gives every batch fresh
# memory, which the system clears page by page in the worker, and maps page by page in the
# training process.
#
# The first byte of a segment says that somebody uses it: the worker sets it, and whoever
# received the batch clears it when its last view dies.

T = TypeVar("T", bound=Movable)
_ALIGNMENT = 64  # bytes; values of any type may start there, the first of them after the flag
_FREE, _USED = 0, 1


class Segments:
    """Pieces of shared memory that belong to this process."""

    def __init__(self) -> None:
        self._owned: list[Tensor] = []

    def take(self, size: int) -> Tensor:
        """A free segment of at least `size` bytes. Smaller free ones are given up. A new one
        gets some room to spare, so that the next batch fits as well."""
        free = [segment for segment in self._owned if segment[0] == _FREE]
        fitting = [segment for segment in free if len(segment) >= size]
        if fitting:
            segment = min(fitting, key=len)
        else:
            given_up = {segment.data_ptr() for segment in free}
            self._owned = [s for s in self._owned if s.data_ptr() not in given_up]
            segment = torch.empty(0, dtype=torch.uint8)
            segment.set_(torch.UntypedStorage._new_shared(_aligned(size + size // 8)))
            self._owned.append(segment)
        segment[0] = _USED
        return segment


_segments = Segments()


class Arena:
    """Places for the tensors of one batch, in one segment."""

    def __init__(self, size: int) -> None:
        """Allocate a segment. size: bytes of the tensors, each rounded up to the alignment."""
        self.segment = _segments.take(_ALIGNMENT + size)
        self._used = _ALIGNMENT

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Self:
        return cls(sum(_aligned(tensor.nbytes) for tensor in tensors))

    @classmethod
    def of_samples(cls, samples: Sequence[Movable]) -> Self:
        """An arena for the stacked tensors of the samples, and for some more that come with a
        batch."""
        tensors: list[Tensor] = []
        for sample in samples:
            sample._map(lambda tensor: tensors.append(tensor) or tensor)
        size = sum(_aligned(tensor.nbytes) for tensor in tensors)
        return cls(size + size // 8)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor in the segment, or elsewhere if the segment is full."""
        start = self._used
        stop = start + math.prod(shape) * dtype.itemsize
        if stop > len(self.segment):
            return torch.empty(tuple(shape), dtype=dtype)
        self._used = _aligned(stop)
        return self.segment[start:stop].view(dtype).view(tuple(shape))

    def bytes(self, size: int) -> np.ndarray:
        """Memory for arrays that become tensors of the batch."""
        return self.empty((size,), torch.uint8).numpy()

    def start_of(self, tensor: Tensor) -> int:
        """The position of a tensor's first byte in the segment; negative if the tensor lies
        elsewhere."""
        if tensor.nbytes == 0:
            return _ALIGNMENT  # torch knows no place of what is empty
        start = tensor.data_ptr() - self.segment.data_ptr()
        inside = tensor.is_contiguous() and start + tensor.nbytes <= len(self.segment)
        return start if inside else -1

    def release(self) -> None:
        self.segment[0] = _FREE


@dataclass(frozen=True)
class Packed(Generic[T]):
    """A batch whose tensors lie in shared memory. form: the batch without its values. starts: the
    first byte of each of its tensors in `memory`.

    Whoever unpickles it has the memory on loan; see above.
    """

    form: T
    starts: tuple[int, ...]
    memory: Tensor
    segment: Tensor | None = None  # whole, mapped for as long as somebody holds it

    @classmethod
    def of(cls, batch: T, arena: Arena | None = None) -> Self:
        """A packed batch. Tensors that lie in the arena stay where they are; others are copied
        into it."""
        tensors: list[Tensor] = []
        form = batch._map(lambda tensor: tensors.append(tensor) or tensor.to("meta"))
        arena = arena or Arena.of(tensors)
        placed = [
            tensor
            if arena.start_of(tensor) > 0
            else arena.empty(tensor.shape, tensor.dtype).copy_(tensor)
            for tensor in tensors
        ]
        starts = tuple(map(arena.start_of, placed))
        if min(starts) < 0:  # no room for all of them
            packed = cls.of(batch, Arena.of(tensors))
            arena.release()
            return packed
        return cls(form, starts, arena.segment)

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (type(self), self.form, self.starts, self.memory)

    def unpack(self) -> T:
        """The batch, with tensors that are views of the shared memory."""
        starts = iter(self.starts)

        def place(form: Tensor) -> Tensor:
            start = next(starts)
            values = self.memory[start : start + form.nbytes]
            return values.view(form.dtype).view(form.shape)

        return self.form._map(place)

    def pin_memory(self) -> Self:
        return type(self)(self.form, self.starts, self.memory.pin_memory())


def _received(kind: type[Packed], form: Movable, starts: tuple[int, ...], segment: Tensor) -> Any:
    memory = segment.numpy()
    on_loan = lent(memory, partial(memory.__setitem__, 0, _FREE))
    return kind(form, starts, torch.from_numpy(on_loan), segment)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class Collate:
    """Stacks samples to a batch, which knows how many of `batch_size` were skipped. In a worker the
    batch is packed.

    Raises ValueError if none is left.
    """

    batch_size: int

    def __call__(self, samples: list) -> Batch | Packed[Batch]:
        if not samples:
            raise ValueError(
                f"none of {self.batch_size} samples of a batch could be read; the warnings before "
                "name the chunks. data.unreadable=raise stops at the first"
            )
        views, ids = zip(*samples, strict=True)
        skipped = self.batch_size - len(samples)
        if get_worker_info() is None:
            return replace(collate_views(list(views), list(ids)), num_skipped=skipped)
        arena = Arena.of_samples([view for views_of_sample in views for view in views_of_sample])
        batch = collate_views(list(views), list(ids), arena.empty)
        return Packed.of(replace(batch, num_skipped=skipped), arena)


class WorkerDied(ChildProcessError):
    """A worker process ended, by lack of memory for example."""


def worker_context() -> Any:
    """The way to start workers: they are forked from a server that has imported what they need
    and holds no threads. So they start fast, share memory, and inherit nothing of the training
    process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["atmossl.data.loader"])
    start_worker_server()
    return context


def _start_worker(number: int) -> None:
    """Set up a worker process, which ends with the process that created it. Torch's own watch
    looks at the server that forked the worker instead, every 5 seconds."""
    del number
    end_with_creator()
    OneLineNotes().__enter__()  # for as long as the process lives
    leave_to_creator()


LookAhead = Callable[[Sequence[Batch]], object]


class WindowLoader(DataLoader):
    """A loader that says which samples were being read when a worker died, and passes on what a
    worker refuses in its own words.

    describe: names of the samples of the n-th batch that is delivered.
    look_ahead: is shown every `accumulate` batches, before the first of them is delivered.
    """

    def __init__(
        self,
        *args: Any,
        describe: Callable[[int], str],
        accumulate: int = 1,
        look_ahead: LookAhead | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, worker_init_fn=_start_worker, **kwargs)
        self._describe = describe
        self._accumulate = accumulate
        self._look_ahead = look_ahead

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        batches = self._read()
        while group := list(islice(batches, self._accumulate)):
            if self._look_ahead is not None:
                self._look_ahead(group)
            yield from group

    def _read(self) -> Iterator[Batch]:
        batches = super().__iter__()
        mapped = deque(maxlen=self.num_workers * ((self.prefetch_factor or 0) + 2))
        for number in count():
            try:
                batch = next(batches)
            except StopIteration:
                return
            except ValueError as error:
                if not str(error).startswith("Caught "):
                    raise
                raise _in_own_words(error) from error
            except RuntimeError as error:
                if "exited unexpectedly" not in str(error):
                    raise
                raise WorkerDied(
                    f"{error}; the batch awaited was {self._describe(number)}. Workers need "
                    "memory: lower data.num_workers, data.batch_size or data.prefetch"
                ) from error
            if isinstance(batch, Packed):
                mapped.append(batch.segment)
                batch = batch.unpack()
            yield batch


def _in_own_words(error: ValueError) -> ValueError:
    """The error of a worker without the traceback that torch puts before its message."""
    return type(error)(str(error).strip().splitlines()[-1].partition(": ")[2])
