"""Teachers of objectives: a teacher is a copy of the network that follows it as a moving
average, makes targets, and gets no gradient."""

import math
from collections.abc import Iterable
from copy import deepcopy
from typing import Annotated, Any, TypeVar

import torch
from pydantic import AfterValidator, Field
from torch import nn

Module = TypeVar("Module", bound=nn.Module)
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def _does_not_fall(momentum: tuple[float, float]) -> tuple[float, float]:
    if momentum[0] > momentum[1]:
        raise ValueError("valid: two numbers, the second not below the first, such as [0.996, 1.0]")
    return momentum


Momentum = Annotated[tuple[Share, Share], AfterValidator(_does_not_fall)]


def teacher_of(student: Module) -> Module:
    """A copy of the network without gradients, in evaluation mode."""
    copies: dict[int, Any] = {}  # deepcopy would lose tensors that have shapes but no values
    for parameter in student.parameters():
        copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    for buffer in student.buffers():
        copies[id(buffer)] = buffer.detach().clone()
    return deepcopy(student, copies).eval()


def momentum_at(step: int, num_steps: int, limits: Momentum) -> float:
    """The momentum at a step: from the first limit to the second along half a cosine, and the
    second after the last step."""
    first, last = limits
    share = min(step, num_steps) / num_steps
    return last - (last - first) * (1 + math.cos(math.pi * share)) / 2


@torch.no_grad()
def follow(
    teacher: Iterable[nn.Parameter], student: Iterable[nn.Parameter], momentum: float
) -> None:
    """Update the teacher: teacher <- momentum * teacher + (1 - momentum) * student."""
    for averaged, current in zip(teacher, student, strict=True):
        averaged.lerp_(current, 1.0 - momentum)
