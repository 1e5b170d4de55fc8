"""Which parameters are trained, how fast, by which optimiser."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from atmossl.training.muon import Muon
from atmossl.training.schedule import Schedule

_LAYER = re.compile(r"(?:^|\.)encoder\.(\d+)\.")
_BEFORE_ENCODER = re.compile(r"(?:^|\.)embedding\.")


@dataclass(frozen=True)
class OptimizerSettings:
    """freeze: patterns of parameter names, such as `encoder.0.*`, that are not trained.

    only: patterns of the only parameters that are trained; all of them if empty.
    factors: of the learning rate by such a pattern; the first that matches counts.
    layer_decay: factor of the learning rate from one encoder layer to the one below it (Clark et
        al. 2020, ELECTRA); the embeddings are below the first.
    """

    algorithm: Literal["adamw", "muon"]
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    schedule: Schedule
    warmup_steps: int
    final_fraction: float
    decay_every: int
    ema_decay: float
    max_steps: int
    freeze: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    factors: Mapping[str, float] | None = None
    layer_decay: float = 1.0


def freeze(model: nn.Module, patterns: Iterable[str], *, only: Sequence[str] = ()) -> list[str]:
    """Take the parameters whose names match out of the training, and those that match none of
    `only`, if there is any; returns their names.

    Raises:
        ValueError: a pattern that matches nothing, or no parameter is left.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen = [name for name in names if only and not any(fnmatchcase(name, p) for p in only)]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    for pattern in patterns:
        matching = {n: p for n, p in model.named_parameters() if fnmatchcase(n, pattern)}
        if not matching:
            raise ValueError(_no_match("optimizer.freeze", pattern, model))
        for name, parameter in matching.items():
            parameter.requires_grad_(False)
            frozen.append(name)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("optimizer.freeze leaves no parameter to train")
    return frozen


def _no_match(key: str, pattern: str, model: nn.Module) -> str:
    names = sorted({".".join(name.split(".")[:3]) + ".*" for name, _ in model.named_parameters()})
    return f"{key}: {pattern!r} matches no parameter; valid: patterns of names such as {names}"


def learning_rate_factors(model: nn.Module, settings: OptimizerSettings) -> dict[str, float]:
    """Factor of the learning rate of every trained parameter.

    Raises:
        ValueError: a pattern of `factors` that matches nothing.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    patterns = dict(settings.factors or {})
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(_no_match("optimizer.factors", pattern, model))
    layers = [int(match[1]) for name in names if (match := _LAYER.search(name))]
    depth = 1 + max(layers, default=-1)
    return {name: _factor(name, patterns, settings.layer_decay, depth) for name in names}


def _factor(name: str, patterns: Mapping[str, float], decay: float, depth: int) -> float:
    chosen = next((f for pattern, f in patterns.items() if fnmatchcase(name, pattern)), 1.0)
    layer = _LAYER.search(name)
    if layer is not None:
        return chosen * decay ** (depth - 1 - int(layer[1]))
    return chosen * decay**depth if _BEFORE_ENCODER.search(name) else chosen


def make_optimizer(
    model: nn.Module, settings: OptimizerSettings, *, fused: bool
) -> torch.optim.Optimizer:
    """Matrices decay, and with Muon are orthogonalised, except for the last layer, which has no
    square geometry; vectors do neither. One group for each of these kinds and each factor."""
    factors = learning_rate_factors(model, settings)
    is_muon = settings.algorithm == "muon"
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name in factors:
            chosen = parameter.ndim > 1 and not (is_muon and name.startswith("tail."))
            groups.setdefault((chosen, factors[name]), []).append(parameter)
    listed: list[dict[str, Any]] = []
    for (chosen, factor), parameters in sorted(groups.items(), key=lambda item: not item[0][0]):
        group: dict[str, Any] = {"params": parameters, "lr": settings.learning_rate * factor}
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
