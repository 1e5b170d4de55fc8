"""The contract of objectives. An objective is a module that owns everything that its loss needs.

The training step gives an objective the network and a batch. The objective returns the terms of its
loss, each a mean over this batch alone, and says what the batch counts in each term. How the terms
of several batches make one optimiser step (over ranks, over accumulated batches) is the training
step's matter, `atmossl.training.module`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args

from torch import Tensor, nn

from atmossl.batch import Batch
from atmossl.losses import Losses
from atmossl.masking.views import ViewSpec
from atmossl.value_faults import as_written, listed

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
        return cls.views

    @classmethod
    def provided_by(cls, arguments: Mapping[str, Any]) -> frozenset[Ability]:
        """What a checkpoint of an objective with these keywords can be asked for."""
        return cls.provides

    @classmethod
    def compares_by(cls, arguments: Mapping[str, Any]) -> bool:
        """Whether the loss of an objective with these keywords compares the samples of a batch."""
        return cls.compares_samples

    @classmethod
    def faults_of(cls, arguments: Mapping[str, Any], batch_size: int) -> list[str]:
        """What is wrong with these keywords of the constructor together, one line each."""
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
        return None

    def after_step(self, network: Any, step: int) -> None:
        """Update teacher and buffers after optimiser step number `step`, from 1 on, as a function
        of that number and of the weights alone."""

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile the parts of the objective that gain by it."""


def check_class(kind: Any) -> None:
    """Raise ValueError if a class of objective, which may be a plugin's, lacks what a run asks for
    before it is built."""
    if not isinstance(kind, type) or not issubclass(kind, Objective):
        return  # a function of the package that makes one
    name = kind.__qualname__
    if kind.forward is Objective.forward:
        raise ValueError(
            f"the objective {name} has no method forward(network, batch), which returns Losses"
        )
    if (
        "provided_by" in vars(kind)
        or kind.provided_by.__func__ is not Objective.provided_by.__func__
    ):
        return
    provides = getattr(kind, "provides", None)
    if not isinstance(provides, frozenset) or not provides <= set(get_args(Ability)):
        raise ValueError(
            f"the objective {name} has provides={as_written(provides)}; valid: a frozenset of some "
            f"of {listed(get_args(Ability))}, such as provides = frozenset({{'embed'}})"
        )


def check_built(objective: Any) -> None:
    """Raise ValueError if an objective that was built lacks what training asks for."""
    name = type(objective).__qualname__
    if "_parameters" not in vars(objective):
        raise ValueError(f"the constructor of the objective {name} must call super().__init__()")
    monitor = getattr(objective, "monitor", None)
    if not isinstance(monitor, Monitor):
        raise ValueError(
            f"the objective {name} has monitor={as_written(monitor)}; valid: an "
            "atmossl.objectives.base.Monitor, such as Monitor('rmse_ratio/mean')"
        )


def check_losses(losses: Any, objective: Objective, *, trains: bool) -> None:
    """Raise ValueError if an objective returned something else than it must. trains: the loss is to
    have a gradient."""
    name = type(objective).__qualname__
    if not isinstance(losses, Losses):
        raise ValueError(
            f"the method forward of the objective {name} returned an object of the class "
            f"{type(losses).__qualname__}; it must return atmossl.losses.Losses"
        )
    for term, value in losses.terms:
        if not isinstance(value, Tensor) or value.ndim:
            actual = list(value.shape) if isinstance(value, Tensor) else type(value).__qualname__
            raise ValueError(
                f"the term {term} of the loss of the objective {name} is {as_written(actual)}; "
                "valid: a tensor of a single value, without axes"
            )
    if len(losses.factors) != len(losses.terms):
        raise ValueError(
            f"the loss of the objective {name} has {len(losses.terms)} terms and "
            f"{len(losses.factors)} factors; give one factor for each term"
        )
    if trains and losses.terms and not any(value.requires_grad for _, value in losses.terms):
        raise ValueError(
            f"the loss of the objective {name} has no gradient, so nothing would be trained; "
            "return terms that are not detached from the network"
        )
