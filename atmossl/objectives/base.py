"""The contract of objectives. An objective is a module that owns everything that its loss needs.

The training step gives an objective the network and a batch. The objective returns the terms of its
loss, each a mean over this batch alone, and says what the batch counts in each term. How the terms
of several batches make one optimiser step (over ranks, over accumulated batches) is the training
step's matter, `atmossl.training.module`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from atmossl.batch import Batch
from atmossl.losses import Losses
from atmossl.masking.views import ViewSpec

Ability = Literal["reconstruct", "embed", "distance"]


@dataclass(frozen=True)
class Monitor:
    """The logged value that chooses the best checkpoint, and that a sweep optimises."""

    key: str
    direction: Literal["min", "max"] = "min"

    def cost(self, value: float) -> float:
        """The value as a cost: lower is better."""
        return value if self.direction == "min" else -value

    def is_better(self, value: float, best: float | None) -> bool:
        return best is None or self.cost(value) < self.cost(best)


class Metric(Protocol):
    """A quantity that is computed from sums, so that batches and ranks can be added up."""

    def sums(self, batch: Batch, losses: Losses) -> dict[str, Tensor]:
        """What one batch adds to the sums, by name."""
        ...

    def values(self, sums: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The logged values, by key, from the sums of every validation task (of `""` in
        training)."""
        ...


class ObjectivePart(Protocol):
    """An objective as it is configured, before there is a network; see `Objective`."""

    @property
    def views(self) -> tuple[ViewSpec, ...]: ...

    @property
    def provides(self) -> frozenset[Ability]: ...

    @property
    def compares_samples(self) -> bool: ...

    def faults(self, batch_size: int) -> list[str]: ...

    def build(self, **of_the_run: Any) -> "Objective": ...


class Objective(nn.Module):
    """What training optimises, with its heads, predictor, teacher and buffers as submodules.

    Its parameters are trained, frozen, averaged, sharded and saved as those of the network are;
    their names begin with `objective.`. A subclass whose constructor has a parameter `network` or
    `scales` is given the network, or [level, patch] typical residuals by stream.

    views: of every window, in the order in which a batch has them.
    monitor: chooses the best checkpoint. provides: what a checkpoint of this objective can be asked
        for: `reconstruct` fields, `embed` windows, tell the `distance` of two states.
    metrics: by stage, `train` or `validation`, what a callback logs beside the losses.
    ends: names of the submodules that are the last layers, which have no square geometry.
    compares_samples: whether its loss compares the samples of a batch, over all ranks.
    """

    views: ClassVar[tuple[ViewSpec, ...]] = (ViewSpec(),)
    monitor: ClassVar[Monitor]
    provides: ClassVar[frozenset[Ability]]
    ends: ClassVar[tuple[str, ...]] = ()
    compares_samples: ClassVar[bool] = False

    @classmethod
    def views_of(cls, arguments: Mapping[str, Any]) -> tuple[ViewSpec, ...]:
        """The views of an objective with these keywords of the constructor."""
        del arguments
        return cls.views

    @classmethod
    def provided_by(cls, arguments: Mapping[str, Any]) -> frozenset[Ability]:
        """What a checkpoint of an objective with these keywords can be asked for."""
        del arguments
        return cls.provides

    @classmethod
    def compares_by(cls, arguments: Mapping[str, Any]) -> bool:
        """Whether the loss of an objective with these keywords compares the samples of a batch."""
        del arguments
        return cls.compares_samples

    @classmethod
    def faults_of(cls, arguments: Mapping[str, Any], batch_size: int) -> list[str]:
        """What is wrong with these keywords of the constructor together, one line each."""
        del arguments, batch_size
        return []

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return {}

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The submodules that a sharded run gathers one at a time."""
        return ()

    def forward(self, network: Any, batch: Batch) -> Losses:
        raise NotImplementedError

    def weights(self, batch: Batch) -> Tensor | None:
        """What the batch counts in every term of the loss, [term]. None: all batches count the
        same; then the loss has a single term."""
        del batch
        return None

    def after_step(self, network: Any, step: int) -> None:
        """Update teacher and buffers after optimiser step number `step`, from 1 on, as a function
        of that number and of the weights alone."""

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile the parts of the objective that gain by it."""
