"""Batches out of worker processes in one piece of shared memory, which is used again.

Torch sends every tensor of a batch on its own: an open file and a connection each, more work for
the training process than making a small batch itself. And it gives every batch fresh memory, which
the system clears page by page in the worker, and maps page by page in the training process.

The first byte of a segment says that somebody uses it: the worker sets it, and whoever received the
batch clears it when its last view dies.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from atmossl.batch import Movable
from atmossl.data.memory import lent

T = TypeVar("T", bound=Movable)
_ALIGNMENT = 64  # bytes; values of any type may start there, the first of them after the flag
_FREE, _USED = 0, 1


class Segments:
    """Pieces of shared memory that belong to this process."""

    def __init__(self) -> None:
        self._owned: list[Tensor] = []

    def take(self, size: int) -> Tensor:
        """One that nobody uses, of at least so many bytes. Smaller ones that are free are given
        up, and a new one has some room to spare, so that its like is not needed again."""
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
        """size: bytes of the tensors, each rounded up to the alignment."""
        self.segment = _segments.take(_ALIGNMENT + size)
        self._used = _ALIGNMENT

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Self:
        return cls(sum(_aligned(tensor.nbytes) for tensor in tensors))

    @classmethod
    def of_samples(cls, samples: Sequence[Movable]) -> Self:
        """For the stacks of the samples' tensors, and some more that come with a batch."""
        tensors: list[Tensor] = []
        for sample in samples:
            sample._map(lambda tensor: tensors.append(tensor) or tensor)
        size = sum(_aligned(tensor.nbytes) for tensor in tensors)
        return cls(size + size // 8)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A place in the segment; memory elsewhere if there is no room left."""
        start = self._used
        stop = start + math.prod(shape) * dtype.itemsize
        if stop > len(self.segment):
            return torch.empty(tuple(shape), dtype=dtype)
        self._used = _aligned(stop)
        return self.segment[start:stop].view(dtype).view(tuple(shape))

    def bytes(self, size: int) -> np.ndarray:
        """Memory for arrays that are to become tensors of the batch."""
        return self.empty((size,), torch.uint8).numpy()

    def start_of(self, tensor: Tensor) -> int:
        """Its first byte in the segment; negative if it lies elsewhere."""
        if tensor.nbytes == 0:
            return _ALIGNMENT  # torch knows no place of what is empty
        start = tensor.data_ptr() - self.segment.data_ptr()
        inside = tensor.is_contiguous() and start + tensor.nbytes <= len(self.segment)
        return start if inside else -1

    def release(self) -> None:
        self.segment[0] = _FREE


@dataclass(frozen=True)
class Packed(Generic[T]):
    """form: a batch without its values. starts: the first byte of each of its tensors in `memory`.

    Whoever unpickles it has the memory on loan; see above.
    """

    form: T
    starts: tuple[int, ...]
    memory: Tensor
    segment: Tensor | None = None  # whole, mapped for as long as somebody holds it

    @classmethod
    def of(cls, batch: T, arena: Arena | None = None) -> Self:
        """Tensors that lie in the arena stay where they are, others are copied into it."""
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
        """The batch, whose tensors are views of the memory."""
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
