"""Batches out of worker processes in one piece of shared memory.

Torch sends every tensor of a batch on its own: an open file and a connection each, more work for
the training process than making a small batch itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from atmossl.batch import Movable

T = TypeVar("T", bound=Movable)
_ALIGNMENT = 64  # bytes; values of any type may start there


@dataclass(frozen=True)
class Packed(Generic[T]):
    """form: a batch without its values. memory: these, one tensor after the other, as bytes."""

    form: T
    memory: Tensor

    @classmethod
    def of(cls, batch: T) -> Self:
        tensors: list[Tensor] = []
        form = batch._map(lambda tensor: tensors.append(tensor) or tensor.to("meta"))
        size = sum(map(_aligned_bytes, tensors))
        memory = torch.empty(0, dtype=torch.uint8)
        memory.set_(torch.UntypedStorage._new_shared(size))
        for place, tensor in zip(_places(memory, tensors), tensors, strict=True):
            place.copy_(tensor)
        return cls(form, memory)

    def unpack(self) -> T:
        """The batch, whose tensors are views of the memory."""
        forms: list[Tensor] = []
        self.form._map(lambda form: forms.append(form) or form)
        places = _places(self.memory, forms)
        return self.form._map(lambda _: next(places))

    def pin_memory(self) -> Self:
        return type(self)(self.form, self.memory.pin_memory())


def _aligned_bytes(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _places(memory: Tensor, tensors: list[Tensor]) -> Iterator[Tensor]:
    """Views of the memory with the types and shapes of the tensors."""
    start = 0
    for tensor in tensors:
        values = memory[start : start + tensor.nbytes]
        yield values.view(tensor.dtype).view(tensor.shape)
        start += _aligned_bytes(tensor)
