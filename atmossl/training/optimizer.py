"""Decides which parameters are trained, how fast from step to step, and by which optimiser."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from atmossl.model.network import Network
from atmossl.objectives.base import Objective
from atmossl.settings import NotNegative, NotNegativeFloat, Positive, PositiveFloat, Share
from atmossl.training.muon import Muon
from atmossl.value_faults import listed

Schedule = Literal["cosine", "exponential", "constant"]
Depth = Callable[[str], int | None]  # encoder layers above a parameter; None: not in the encoder


@dataclass(frozen=True, kw_only=True)
class OptimizerChoice:
    """The optimiser and its schedule, `optimizer` of a configuration.

    algorithm: Muon orthogonalises the steps of matrices, AdamW trains all else. learning_rate: the
    largest one, after the warm-up. weight_decay: of matrices, per unit of learning rate.
    betas: decay of AdamW's two moments. schedule: how the rate falls after the warm-up.
    warmup_steps: in which it rises from 0. final_fraction: share of the learning rate below which
    no schedule goes. decay_every: steps after which schedule=exponential divides the rate by 1.025.
    gradient_clip: largest norm of the gradient. ema_decay: of the averaged weights, which are
    evaluated.
    freeze: patterns of parameter names, such as `encoder.0.*`, that are not trained.
    factors: of the learning rate by such a pattern; the first that matches counts.
    layer_decay: factor of the learning rate from one encoder layer to the one below it (Clark et
        al. 2020, ELECTRA); the embeddings are below the first.
    """

    algorithm: Literal["adamw", "muon"]
    learning_rate: PositiveFloat
    weight_decay: NotNegativeFloat
    betas: tuple[Share, Share]
    schedule: Schedule
    warmup_steps: NotNegative
    final_fraction: Share
    decay_every: Positive
    gradient_clip: PositiveFloat = 1.0
    ema_decay: Share
    freeze: tuple[str, ...] = ()
    factors: Mapping[str, float] | None = None
    layer_decay: Annotated[PositiveFloat, Field(le=1.0)] = 1.0


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(OptimizerChoice):
    """The optimiser of one run. only: patterns of the only parameters that are trained; empty
    for all."""

    max_steps: int
    only: tuple[str, ...] = ()


def named_parameters(network: nn.Module, objective: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters that a run can train, by name: those of the network, then those of the
    objective, whose names begin with `objective.`."""
    names = dict(network.named_parameters())
    return names | {f"objective.{name}": p for name, p in objective.named_parameters()}


def freeze(
    parameters: Mapping[str, nn.Parameter], patterns: Iterable[str], *, only: Sequence[str] = ()
) -> list[str]:
    """Freeze the parameters whose names match a pattern, and, if `only` is given, those that match
    none of it; returns their names.

    Raises:
        ValueError: a pattern that matches nothing, or no parameter is left.
    """
    frozen = [name for name in parameters if only and not any(fnmatchcase(name, p) for p in only)]
    for pattern in patterns:
        matching = [name for name in parameters if fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(_no_match("optimizer.freeze", pattern, parameters))
        frozen += matching
    for name in frozen:
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError("optimizer.freeze leaves no parameter to train")
    return frozen


def _no_match(key: str, pattern: str, names_of: Iterable[str]) -> str:
    names = sorted({".".join(name.split(".")[:3]) + ".*" for name in names_of})
    return (
        f"{key}: {pattern!r} matches no parameter; valid: patterns of names such as {listed(names)}"
    )


def learning_rate_factors(
    parameters: Mapping[str, nn.Parameter], settings: OptimizerSettings, depth: Depth
) -> dict[str, float]:
    """The factor of the learning rate of every trained parameter.

    depth: as the network tells it; the uppermost layer that is trained has the whole rate.

    Raises:
        ValueError: a pattern of `factors` that matches nothing.
    """
    names = [name for name, parameter in parameters.items() if parameter.requires_grad]
    patterns = dict(settings.factors or {})
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(_no_match("optimizer.factors", pattern, parameters))
    depths = {name: level for name in names if (level := depth(name)) is not None}
    top = min(depths.values(), default=0)
    return {
        name: _of_pattern(name, patterns) * settings.layer_decay ** (depths.get(name, top) - top)
        for name in names
    }


def _of_pattern(name: str, patterns: Mapping[str, float]) -> float:
    return next((f for pattern, f in patterns.items() if fnmatchcase(name, pattern)), 1.0)


def make_optimizer(
    network: Network, objective: Objective, settings: OptimizerSettings, *, fused: bool
) -> torch.optim.Optimizer:
    """The optimiser of a run. Matrices get weight decay, and with Muon are orthogonalised,
    except for the ends of network and objective, which have no square geometry; vectors get
    neither. There is one group for each of these kinds and each factor."""
    parameters = named_parameters(network, objective)
    factors = learning_rate_factors(parameters, settings, network.depth)
    names = (*network.ends, *(f"objective.{end}" for end in objective.ends))
    ends = tuple(f"{end}." for end in names)
    is_muon = settings.algorithm == "muon"
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if name in factors:
            chosen = parameter.ndim > 1 and not (is_muon and name.startswith(ends))
            groups.setdefault((chosen, factors[name]), []).append(parameter)
    listed: list[dict[str, Any]] = []
    for (chosen, factor), members in sorted(groups.items(), key=lambda item: not item[0][0]):
        group: dict[str, Any] = {"params": members, "lr": settings.learning_rate * factor}
        group |= {} if chosen else {"weight_decay": 0.0}
        listed.append(group | ({"muon": chosen} if is_muon else {}))
    common: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    if is_muon:
        return Muon(listed, **common)
    return torch.optim.AdamW(listed, fused=fused, **common)


def learning_rate_factor(
    kind: Schedule, *, warmup_steps: int, max_steps: int, final_fraction: float, decay_every: int
) -> Callable[[int], float]:
    """The factor of the peak learning rate at a step: linear warm-up, then the schedule.

    `cosine` falls to `final_fraction` at max_steps. `exponential` is AtmoRep's: divided by 1.025
    every `decay_every` steps (an epoch there), not below `final_fraction`. `constant` stays.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        after = step - warmup_steps
        if kind == "constant":
            return 1.0
        if kind == "exponential":
            return max(final_fraction, 1.025 ** -(after // decay_every))
        share = min(1.0, after / max(1, max_steps - warmup_steps))
        return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * share))

    return factor
