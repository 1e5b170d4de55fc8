"""Loads batches through worker processes, which hand them over in shared memory. Workers import
this module, so Lightning stays out of it."""

import math
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from atmossl.at_work import leave_to_creator, start_worker_server
from atmossl.batch import Batch, Movable, collate_views
from atmossl.data.variables import OneLineNotes
from atmossl.data.windows import lent
from atmossl.process_lifetime import end_with_creator

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
