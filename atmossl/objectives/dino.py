"""Self-distillation (DINO, Caron et al. 2021, arXiv 2104.14294): a student assigns parts of a state
to prototypes as a teacher assigns larger parts of the same state.

A student sees large and small crops of a window, in space, time and resolution; the teacher, a
moving average of the student, sees the large ones alone. Optional terms: the same for single hidden
tokens (iBOT, Zhou et al. 2022, arXiv 2111.07832), and latents that are spread over all directions
(KoLeo, as in DINOv2, Oquab et al. 2023, arXiv 2304.07193).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from atmossl.batch import Batch, View
from atmossl.latent_losses import distillation, is_distributed, koleo, sinkhorn
from atmossl.losses import Losses, weighted_mean
from atmossl.masking.base import hide_nothing
from atmossl.masking.random import RandomMasking
from atmossl.masking.views import Crop, ViewSpec
from atmossl.model.network import Latents, Network, device_memory, gather
from atmossl.objectives.base import Ability, Metric, Monitor, Objective
from atmossl.objectives.masked import hidden_areas, predicted_streams
from atmossl.objectives.pairs import PairMeasures, by_task_and_mean
from atmossl.objectives.teacher import Momentum, follow, momentum_at, teacher_of
from atmossl.value_faults import as_written

Positive = Annotated[int, Field(gt=0)]
Temperature = Annotated[float, Field(gt=0.0)]
Weight = Annotated[float, Field(ge=0.0)]
PartShare = Annotated[float, Field(gt=0.0, le=1.0)]
Centring = Literal["centre", "sinkhorn"]
_BYTES = 4
_COPIES = 6  # of a head: weights, gradient, two moments of the optimiser, average, teacher's


class PrototypeHead(nn.Module):
    """Maps latents to their cosines with learned prototypes, in a space of `bottleneck`
    features."""

    def __init__(self, num_in: int, hidden: int, bottleneck: int, num_prototypes: int) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.Linear(num_in, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )  # fmt: skip
        self.prototypes = nn.Linear(bottleneck, num_prototypes, bias=False)

    def forward(self, latents: Float[Tensor, "*row feature"]) -> Float[Tensor, "*row prototype"]:
        place = functional.normalize(self.project(latents).float(), dim=-1)
        with torch.autocast(place.device.type, enabled=False):
            return functional.linear(place, functional.normalize(self.prototypes.weight, dim=-1))


class Centre(nn.Module):
    """The moving average of the teacher's logits over the batches of all ranks. The teacher
    subtracts it, so that no prototype takes all states: after n batches of mean b it is (1 -
    momentum^n) b."""

    value: Tensor

    def __init__(self, num_prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(num_prototypes))
        self.seen: Tensor | None = None  # sums over logits, and their number, since the last step

    @torch.no_grad()
    def note(self, logits: Tensor, weight: Tensor) -> None:
        """Note the logits [row prototype] of one batch, each as often as its weight says."""
        sums = torch.cat([(weight[:, None] * logits).sum(dim=0), weight.sum()[None]])
        self.seen = sums if self.seen is None else self.seen + sums

    def update(self) -> None:
        """Update the average. Every rank calls this once per optimiser step, also without a
        batch."""
        sums, self.seen = self.seen, None
        if sums is None:
            sums = torch.cat([torch.zeros_like(self.value), self.value.new_zeros(1)])
        if is_distributed():
            dist.all_reduce(sums)
        mean = torch.where(sums[-1] > 0, sums[:-1] / sums[-1].clamp_min(1e-12), self.value)
        self.value.lerp_(mean, 1.0 - self.momentum)


class SelfDistillation(Objective):
    """Cross entropy of the student's prototypes with the teacher's, over all pairs of a large crop
    of the teacher and another crop of the student.

    num_global, num_local: large and small crops. global_share, local_share: of the window's rows
        and columns each; local_time_share: of its steps. global_coarsen: cells along an axis that
        are one cell of the last of the large crops, the others keep the window's resolution.
    num_prototypes: K. student_temperature; teacher_temperature: from the first to the second over
        `temperature_steps` optimiser steps.
    momentum, momentum_steps: of the teacher, see `atmossl.objectives.jepa.JointEmbedding`.
    centring: how the teacher uses all prototypes: a moving `centre` with centre_momentum, or
        `sinkhorn` over the batch of all devices.
    patch_weight: of the same loss over the hidden tokens of large crops (iBOT), of which each crop
        hides a share within patch_rate; always centred. koleo_weight: of KoLeo of large crops.
    hidden, bottleneck: widths of the head.
    """

    teacher_temperature: Tensor
    monitor = Monitor("shared_information/mean", "max")
    provides: ClassVar[frozenset[Ability]] = frozenset({"embed"})
    compares_samples = True

    def __init__(
        self,
        *,
        network: Network,
        momentum: Momentum,
        momentum_steps: Positive,
        num_global: Annotated[int, Field(ge=2)] = 2,
        num_local: Annotated[int, Field(ge=0)] = 4,
        global_share: PartShare = 0.75,
        local_share: PartShare = 0.35,
        local_time_share: PartShare = 0.5,
        global_coarsen: Positive = 1,
        num_prototypes: Annotated[int, Field(ge=2)] = 1024,
        student_temperature: Temperature = 0.1,
        teacher_temperature: tuple[Temperature, Temperature] = (0.04, 0.07),
        temperature_steps: Positive = 1000,
        centring: Centring = "centre",
        centre_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9,
        patch_weight: Weight = 0.0,
        patch_rate: tuple[PartShare, PartShare] = (0.1, 0.5),
        koleo_weight: Weight = 0.0,
        hidden: Positive = 256,
        bottleneck: Positive = 64,
    ) -> None:
        super().__init__()
        del global_share, local_share, local_time_share, global_coarsen, patch_rate  # of the views
        self.num_global, self.num_local = num_global, num_local
        self.momentum, self.momentum_steps = momentum, momentum_steps
        self.student_temperature = student_temperature
        self.temperatures, self.temperature_steps = teacher_temperature, temperature_steps
        self.centring: Centring = centring
        self.patch_weight, self.koleo_weight = patch_weight, koleo_weight
        widths = {"pooled": network.num_pooled}
        if patch_weight:
            widths |= {f"token_{name}": width for name, width in network.widths.items()}
        self.heads = nn.ModuleDict(
            {
                name: PrototypeHead(width, hidden, bottleneck, num_prototypes)
                for name, width in widths.items()
            }
        )
        self.teacher, self.teacher_heads = teacher_of(network), teacher_of(self.heads)
        self.centres = nn.ModuleDict(
            {name: Centre(num_prototypes, centre_momentum) for name in widths}
        )
        self.register_buffer("teacher_temperature", torch.tensor(teacher_temperature[0]))

    @classmethod
    def views_of(cls, arguments: Mapping[str, Any]) -> tuple[ViewSpec, ...]:
        """The large crops as the student sees them and the small ones. If tokens of the large
        crops are hidden, the same large crops follow once more without hidden tokens."""
        num_global = arguments["num_global"]
        coarsen = [1] * (num_global - 1) + [arguments["global_coarsen"]]
        large = [Crop(n, 1.0, arguments["global_share"], coarsen[n]) for n in range(num_global)]
        small = [
            Crop(num_global + n, arguments["local_time_share"], arguments["local_share"])
            for n in range(arguments["num_local"])
        ]
        hides = RandomMasking(arguments["patch_rate"]) if arguments["patch_weight"] else None
        student = [ViewSpec(hides or hide_nothing, crop=crop) for crop in large]
        student += [ViewSpec(hide_nothing, crop=crop) for crop in small]
        teacher = [ViewSpec(hide_nothing, crop=crop) for crop in large] if hides else []
        return (*student, *teacher)

    @classmethod
    def faults_of(cls, arguments: Mapping[str, Any], batch_size: int) -> list[str]:
        faults = []
        student, teacher = arguments["student_temperature"], arguments["teacher_temperature"]
        if max(teacher) >= student:
            faults.append(
                f"objective.teacher_temperature={as_written(teacher)} must be below "
                f"objective.student_temperature={student:g}: the teacher is to be the surer one"
            )
        small, large = arguments["local_share"], arguments["global_share"]
        if arguments["num_local"] and small > large:
            faults.append(
                f"objective.local_share={small:g} makes the small crops larger than the large "
                f"ones, objective.global_share={large:g}; give a smaller share"
            )
        if list(arguments["patch_rate"]) != sorted(arguments["patch_rate"]):
            faults.append(
                f"objective.patch_rate={as_written(arguments['patch_rate'])}; needed: low, high"
            )
        prototypes, num_views = arguments["num_prototypes"], _num_views(arguments)
        needed = (
            _BYTES * prototypes * (arguments["bottleneck"] * _COPIES + 3 * batch_size * num_views)
        )
        memory = device_memory()
        if needed > memory:
            faults.append(
                f"objective.num_prototypes={prototypes} needs {needed / 2**30:.1f} GiB of the "
                f"{memory / 2**30:.1f} GiB of this device for the heads alone; choose fewer"
            )
        return faults

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return {"validation": PrototypeMeasures()}

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return self.teacher.blocks

    def train(self, mode: bool = True) -> "SelfDistillation":
        """The teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        self.teacher_heads.eval()
        return self

    def forward(self, network: Network, batch: Batch) -> Losses:
        large = range(self.num_global)
        students = batch.views[: self.num_global + self.num_local]
        shown = batch.views[len(students) :] or students[: self.num_global]
        with torch.no_grad():
            teacher_latents = [self.teacher.encode(view) for view in shown]
            targets = self._targets([self.teacher.pool(latents) for latents in teacher_latents])
        latents = [network.encode(view) for view in students]
        pooled = [network.pool(each).float() for each in latents]
        logits = [self.heads["pooled"](each) for each in pooled]
        terms = [("distillation", multi_crop(logits, targets, self.student_temperature))]
        factors = [1.0]
        if self.patch_weight:
            parts = [self._patches(latents[n], teacher_latents[n], students[n]) for n in large]
            losses, weight = (torch.cat(kind) for kind in zip(*parts, strict=True))
            terms.append(("patch", weighted_mean(losses, weight)))
            factors.append(self.patch_weight)
        if self.koleo_weight:
            with torch.autocast(pooled[0].device.type, enabled=False):
                values = [koleo(pooled[n]) for n in large]
            terms.append(("koleo", torch.stack(values).mean()))
            factors.append(self.koleo_weight)
        return Losses(
            tuple(terms), tuple(factors), pooled=(pooled[0], pooled[1]), scores=targets[0]
        )

    def _targets(self, pooled: Sequence[Tensor]) -> list[Float[Tensor, "batch prototype"]]:
        """The teacher's probabilities for every large crop."""
        logits = [self.teacher_heads["pooled"](each) for each in pooled]
        if self.centring == "sinkhorn":
            temperature = self.teacher_temperature
            return [sinkhorn(each, temperature=temperature) for each in logits]
        weight = logits[0].new_ones(len(logits) * len(logits[0]))
        return list(self._centred("pooled", torch.cat(logits), weight).chunk(len(logits)))

    def _centred(self, head: str, logits: Tensor, weight: Tensor) -> Tensor:
        """The teacher's probabilities, centred by the batches before this one."""
        centre = self.centres[head]
        assert isinstance(centre, Centre)
        if self.training:
            centre.note(logits, weight)
        return ((logits - centre.value) / self.teacher_temperature).softmax(dim=-1)

    def weights(self, batch: Batch) -> Tensor:
        """The hidden area for the loss of tokens; in the other terms all batches count the same."""
        views = batch.views[: self.num_global]
        streams = [stream for view in views for stream in predicted_streams(view)]
        area = torch.stack([hidden_areas(stream).sum() for stream in streams]).sum()
        weights = [torch.ones_like(area)]
        weights += [area] if self.patch_weight else []
        weights += [torch.ones_like(area)] if self.koleo_weight else []
        return torch.stack(weights)

    def _patches(self, latents: Latents, of_teacher: Latents, view: View) -> tuple[Tensor, Tensor]:
        """The cross entropies of the hidden tokens of a crop, and the areas of these tokens."""
        values, weights = [], []
        for stream in predicted_streams(view):
            name, queries = stream.spec.name, stream.queries
            assert queries is not None, "collate the view first: token indices are missing"
            weight = hidden_areas(stream).flatten()
            student = gather(latents[name].last, queries).flatten(0, 1)
            with torch.no_grad():
                teacher = gather(of_teacher[name].last, queries).flatten(0, 1)
                logits = self.teacher_heads[f"token_{name}"](teacher)
                target = self._centred(f"token_{name}", logits, weight)
            scores = self.heads[f"token_{name}"](student) / self.student_temperature
            values.append(-(target * scores.log_softmax(dim=-1)).sum(dim=-1))
            weights.append(weight)
        return torch.cat(values), torch.cat(weights)

    def after_step(self, network: Network, step: int) -> None:
        momentum = momentum_at(step, self.momentum_steps, self.momentum)
        follow(self.teacher.parameters(), network.parameters(), momentum)
        follow(self.teacher_heads.parameters(), self.heads.parameters(), momentum)
        for centre in self.centres.values():
            centre.update()  # type: ignore[operator]
        self.teacher_temperature.fill_(self.temperature_at(step))

    def temperature_at(self, step: int) -> float:
        """The teacher's temperature at a step, linear from the first to the second."""
        first, last = self.temperatures
        return first + (last - first) * min(step, self.temperature_steps) / self.temperature_steps


def multi_crop(
    logits: Sequence[Float[Tensor, "batch prototype"]],
    targets: Sequence[Float[Tensor, "batch prototype"]],
    temperature: float,
) -> Float[Tensor, ""]:
    """The mean over all pairs of a teacher's crop and another crop of the student: 2 (n + 1)
    pairs with 2 large and n small crops."""
    values = [
        distillation(student, target, temperature=temperature)
        for number, target in enumerate(targets)
        for other, student in enumerate(logits)
        if other != number
    ]
    return torch.stack(values).mean()


def _num_views(arguments: Mapping[str, Any]) -> int:
    return 2 * arguments["num_global"] + arguments["num_local"]


class PrototypeMeasures:
    """How the teacher assigns states to prototypes, beside the measures that all objectives on
    pairs log."""

    def sums(self, batch: Batch, losses: Losses) -> dict[str, Tensor]:
        assert losses.scores is not None
        chances = losses.scores.double()
        count = chances.new_tensor(len(chances))
        used = torch.zeros_like(chances[0]).scatter_(0, chances.argmax(dim=1), 1.0)
        return PairMeasures().sums(batch, losses) | {
            "chances": chances.sum(dim=0),
            "used": used,
            "entropy": torch.special.entr(chances).sum(),
            "distillation": losses.terms[0][1].double() * count,
            "count": count,
        }

    def values(self, sums: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The measures by task, and their mean over tasks, in nats.

        teacher_entropy: of a state's assignment by the teacher. teacher_kl: divergence of the
        student's assignment from it. shared_information: entropy of the mean assignment less the
        cross entropy, a lower bound of what a crop tells of another one; 0 if all states are
        assigned alike, or none is. prototypes_used: share of those that are the first choice for
        some state, of the most that as many states can use.
        """
        by_task = {task: self._measures(of_task) for task, of_task in sums.items()}
        return PairMeasures().values(sums) | by_task_and_mean(by_task)

    @staticmethod
    def _measures(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        count = sums["count"]
        entropy, cross = sums["entropy"] / count, sums["distillation"] / count
        marginal = torch.special.entr(sums["chances"] / count).sum()
        most = count.clamp_max(len(sums["used"]))
        measures = {
            "teacher_entropy": entropy,
            "teacher_kl": cross - entropy,
            "shared_information": marginal - cross,
            "prototypes_used": (sums["used"] > 0).sum() / most,
        }
        return {name: value.float() for name, value in measures.items()}
