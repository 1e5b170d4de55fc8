"""Several objectives at once: the weighted mean of their losses, each on its own views."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from atmossl.batch import Batch
from atmossl.losses import Losses
from atmossl.masking.views import ViewSpec
from atmossl.model.network import Network
from atmossl.objectives.base import Ability, Metric, Monitor, Objective, ObjectivePart
from atmossl.value_faults import listed

Positive = Annotated[float, Field(gt=0.0)]


class WeightedSum(Objective):
    """The weighted mean of the losses of several objectives, `parts` by name. A part without an
    entry in `weights` has weight 1.

    The first part chooses the best checkpoint, and if it reconstructs, pictures are of its views.
    """

    provides: ClassVar[frozenset[Ability]] = frozenset({"embed"})  # at least

    def __init__(
        self,
        *,
        network: Network,
        scales: Mapping[str, Tensor] | None = None,
        parts: Annotated[Mapping[str, ObjectivePart], Field(min_length=1)],
        weights: Mapping[str, Positive] | None = None,
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(
            {name: part.build(scales=scales, network=network) for name, part in parts.items()}
        )
        self.shares = tuple((weights or {}).get(name, 1.0) for name in parts)
        self.num_views = tuple(len(part.views) for part in parts.values())
        objectives = self._objectives()
        self.monitor: Monitor = next(iter(objectives.values())).monitor  # type: ignore[misc]
        self.ends = tuple(  # type: ignore[misc]
            f"parts.{name}.{end}" for name, part in objectives.items() for end in part.ends
        )
        self.provides = self.provided_by({"parts": parts})  # type: ignore[misc]

    @classmethod
    def views_of(cls, arguments: Mapping[str, Any]) -> tuple[ViewSpec, ...]:
        return tuple(view for part in arguments["parts"].values() for view in part.views)

    @classmethod
    def provided_by(cls, arguments: Mapping[str, Any]) -> frozenset[Ability]:
        return frozenset().union(*(part.provides for part in arguments["parts"].values()))

    @classmethod
    def compares_by(cls, arguments: Mapping[str, Any]) -> bool:
        return any(part.compares_samples for part in arguments["parts"].values())

    @classmethod
    def faults_of(cls, arguments: Mapping[str, Any], batch_size: int) -> list[str]:
        parts, unknown = arguments["parts"], set(arguments["weights"] or {})
        faults = [
            fault.replace("objective.", f"objective.parts.{name}.")
            for name, part in parts.items()
            for fault in part.faults(batch_size)
        ]
        if unknown := sorted(unknown - set(parts)):
            faults.append(
                f"objective.weights names unknown {listed(unknown)}; valid: {listed(sorted(parts))}"
            )
        faults += [
            f"objective.parts.{name}: a part cannot have that name; valid: letters, digits and _, "
            "but no word of torch"
            for name in parts
            if "." in name or hasattr(nn.ModuleDict, name)
        ]
        return faults

    def _objectives(self) -> dict[str, Objective]:
        return dict(self.parts.items())  # type: ignore[arg-type]

    @property
    def metrics(self) -> Mapping[str, Metric]:
        stages = {stage for part in self._objectives().values() for stage in part.metrics}
        return {stage: _PartMetrics(self, stage) for stage in stages}

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return tuple(block for part in self._objectives().values() for block in part.blocks)

    def batches(self, batch: Batch) -> dict[str, Batch]:
        """The batch that every part sees: its own views."""
        views = iter(batch.views)
        groups = [tuple(next(views) for _ in range(count)) for count in self.num_views]
        return {
            name: replace(batch, views=group)
            for name, group in zip(self.parts, groups, strict=True)
        }

    def forward(self, network: Any, batch: Batch) -> Losses:
        batches, objectives = self.batches(batch), self._objectives()
        parts = tuple(part(network, batches[name]) for name, part in objectives.items())
        terms, factors = [], []
        for name, share, losses in zip(objectives, self.shares, parts, strict=True):
            terms += [(f"{name}_{term}", value) for term, value in losses.terms]
            factors += [share * factor / sum(losses.factors) for factor in losses.factors]
        return Losses(tuple(terms), tuple(factors), parts[0].prediction, parts=parts)

    def weights(self, batch: Batch) -> Tensor | None:
        """What the batch counts in every term of all parts. A part without weights has one term,
        in which all batches count the same."""
        batches = self.batches(batch)
        weights = [part.weights(batches[name]) for name, part in self._objectives().items()]
        actual_weights = [weight for weight in weights if weight is not None]
        if not actual_weights:
            return None
        equal_weight = actual_weights[0].new_ones(1)
        return torch.cat([equal_weight if weight is None else weight for weight in weights])

    def after_step(self, network: Any, step: int) -> None:
        for part in self._objectives().values():
            part.after_step(network, step)

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        for part in self._objectives().values():
            part.compile_blocks(backend)


class _PartMetrics:
    """The metrics of all parts. Where two parts log the same key, that of the later one begins
    with the part's name."""

    def __init__(self, objective: WeightedSum, stage: str) -> None:
        self.objective = objective
        metrics = {name: part.metrics for name, part in objective._objectives().items()}
        self.metrics = {name: stages[stage] for name, stages in metrics.items() if stage in stages}

    def sums(self, batch: Batch, losses: Losses) -> dict[str, Tensor]:
        batches = self.objective.batches(batch)
        of_part = dict(zip(self.objective.parts, losses.parts, strict=True))
        return {
            f"{name}:{key}": value
            for name, metric in self.metrics.items()
            for key, value in metric.sums(batches[name], of_part[name]).items()
        }

    def values(self, sums: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, metric in self.metrics.items():
            start = f"{name}:"
            part_sums = {
                task: {k.removeprefix(start): v for k, v in of_task.items() if k.startswith(start)}
                for task, of_task in sums.items()
            }
            for key, value in metric.values(part_sums).items():
                values[f"{name}_{key}" if key in values else key] = value
        return values
