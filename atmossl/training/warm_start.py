"""Starts a new model with the weights of trained ones, which may differ in streams, variables,
levels, resolution or window."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atmossl.batch import StreamSpec
from atmossl.model.network import Network
from atmossl.value_faults import listed


@dataclass(frozen=True)
class PretrainedStreams:
    """A trained model: its streams, under their names in the new model, and its parameters. Its
    buffers are left out, since they belong to the data that it was trained on."""

    name: str
    specs: Mapping[str, StreamSpec]
    weights: Mapping[str, Tensor]


@dataclass
class Report:
    """What happened to each weight, by name. `loaded`: taken as it is. `grown`: taken in part,
    where tokens have other values than before. `averaged`: the mean of the weights of several
    members. `initialised`: new. `left`: weights of the trained model that have no place."""

    loaded: list[str] = field(default_factory=list)
    grown: list[str] = field(default_factory=list)
    averaged: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, list[str]]:
        return dict(sorted(vars(self).items()))


def renamed(
    name: str, specs: Sequence[StreamSpec], weights: Mapping[str, Tensor], names: Mapping[str, str]
) -> PretrainedStreams:
    """A trained model whose streams have other names in the new model.

    Raises:
        ValueError: a stream to be renamed that is not there.
    """
    streams = [spec.name for spec in specs]
    unknown = sorted(set(names) - set(streams))
    if unknown:
        raise ValueError(
            f"warm_start.rename: {name} has no streams {listed(unknown)}; valid: {listed(streams)}"
        )

    def rename(key: str) -> str:
        return ".".join(names.get(part, part) for part in key.split("."))

    return PretrainedStreams(
        name,
        {names.get(spec.name, spec.name): spec for spec in specs},
        {rename(key): value for key, value in weights.items()},
    )


@torch.no_grad()
def warm_start(
    model: Network, specs: Sequence[StreamSpec], sources: Sequence[PretrainedStreams]
) -> Report:
    """Fill a model with the weights of one or several trained models; a later one wins.

    Coupling between streams that were trained apart starts shut (its last layer is 0), so every
    stream predicts what it did alone. A new variable or level is not looked at at first (its
    embedding is 0), and its tail is new. A tail of one member, such as that of a network whose
    members are draws of noise, starts as the mean of the trained members. Other widths that differ
    are initialised.
    Raises:
        ValueError: no weight of a source has a place in the model.
    """
    report = Report()
    targets = dict(model.named_parameters())
    new_specs = {spec.name: spec for spec in specs}
    placed: dict[str, str] = {}
    for source in sources:
        used = [
            key for key, value in source.weights.items()
            if key in targets and _place(model, targets[key], value, key, source, new_specs, placed)
        ]  # fmt: skip
        if not used:
            raise ValueError(
                f"warm_start.checkpoints: no weight of {source.name} has the name and size of one "
                f"of the model; its streams are {listed(sorted(source.specs))}, those of the model "
                f"{listed(sorted(new_specs))}; give `model` its sizes, or set "
                "warm_start.network=true, which takes over its network, streams and window"
            )
        missed = set(source.weights) - set(used)
        report.left += [f"{source.name}: {key}" for key in sorted(missed)]
    for key in sorted(targets):
        getattr(report, placed.get(key, "initialised")).append(key)
    return report


def _place(
    model: Network, target: Tensor, value: Tensor, key: str, source: PretrainedStreams,
    specs: Mapping[str, StreamSpec], placed: dict[str, str],
) -> bool:  # fmt: skip
    """Copy one weight where it fits; returns whether it did."""
    stream = next((part for part in key.split(".")[1:] if part in source.specs), None)
    axis, kind = model.patch_axis(key), "loaded"
    if axis is not None and stream in specs and stream is not None:
        index = patch_index(source.specs[stream], specs[stream])
        old_patch, is_end = source.specs[stream].patch, key.split(".")[0] in model.ends
        if is_end and value.shape[axis] > old_patch and target.shape[axis] == len(index):
            value, kind = value.unflatten(axis, (-1, old_patch)).mean(dim=axis), "averaged"
        if index != list(range(old_patch)):
            return _grow(target, value, key, axis, index, old_patch, placed, blank=not is_end)
    if target.shape != value.shape:
        return False
    target.copy_(value)
    placed[key] = kind
    return True


def patch_index(old: StreamSpec, new: StreamSpec) -> list[int | None]:
    """The position of every value of a new token in an old token; None for a value that the old
    one lacks."""
    place = {key: number for number, key in enumerate(_patch_keys(old))}
    return [place.get(key) for key in _patch_keys(new)]


def _patch_keys(spec: StreamSpec) -> Iterator[tuple[Any, ...]]:
    """A key for each value of a token: by pressure where a token spans all levels, else by the
    level's order within the token."""
    size = spec.token_size
    whole = size.level == spec.num_levels
    levels = spec.level_values if whole else tuple(range(size.level))
    shape = (size.time, size.lat, size.lon)
    for variable in spec.variables:
        for level in levels:
            for number in range(size.time * size.lat * size.lon):
                yield variable, whole, level, shape, number


def _grow(
    target: Tensor, value: Tensor, key: str, axis: int, index: list[int | None], old_patch: int,
    placed: dict[str, str], *, blank: bool,
) -> bool:  # fmt: skip
    """Copy the values that both tokens have. blank: weights of all other values become 0;
    otherwise they stay as they were initialised."""
    repeats = value.shape[axis] // old_patch
    same = [
        a == b for n, (a, b) in enumerate(zip(target.shape, value.shape, strict=True)) if n != axis
    ]
    if not all(same) or target.shape[axis] != repeats * len(index):
        return False
    into = target.movedim(axis, 0).unflatten(0, (repeats, len(index)))
    out_of = value.to(target).movedim(axis, 0).unflatten(0, (repeats, old_patch))
    for new, old in enumerate(index):
        if old is not None:
            into[:, new] = out_of[:, old]
        elif blank:
            into[:, new] = 0.0
    placed[key] = "grown"
    return True
