"""What the first layer reads: principal components of the filters that embed a token's values.

Every feature of a latent begins as a linear filter over the values of a token (and of its
neighbours, where the embedding has a stencil). The right singular vectors of all filters are the
patterns that the embedding reads most strongly (as of Dosovitskiy et al. 2021, figure 7).
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Float

from atmossl.batch import StreamSpec
from atmossl.data.variables import VARIABLES
from atmossl.inference.checkpoint import TrainedModel
from atmossl.model.atmorep_network import AtmoRepNetwork
from atmossl.model.embedding import Embedding
from atmossl.model.multiformer import Multiformer

Pattern = Float[torch.Tensor, "feature variable level time lat lon"]


@dataclass(frozen=True)
class Filters:
    """Patterns of a stream's values that its embedding reads, the strongest first.

    reads: `values`, `tendencies` or `gradients`, the last two as `gradient_features` makes them.
    patterns: brought to the variables' `units`, of unit length as the network reads them: values in
        standard deviations, tendencies and gradients in typical residuals; latitudes ascend.
    steps: time steps of the data from the token's first one. share: of the squared weights.
    """

    stream: str
    reads: str
    variables: tuple[str, ...]
    units: tuple[str, ...]
    steps: tuple[int, ...]
    patterns: Float[np.ndarray, "filter variable level time lat lon"]
    share: Float[np.ndarray, "filter"]


def first_layer(trained: TrainedModel, count: int = 3) -> list[Filters]:
    """Filters of every stream.

    Raises:
        ValueError: a network whose embedding is not known here.
    """
    groups = []
    for spec in trained.own_specs:
        for reads, (weight, unit) in _weights(trained, spec).items():
            groups.append(_filters(trained, spec, reads, weight, unit, count))
    return groups


def _weights(trained: TrainedModel, spec: StreamSpec) -> dict[str, tuple[Pattern, Pattern]]:
    """The embedding's weights by what they read, and what is one in normalised units there."""
    network, size = trained.model, spec.token_size
    patch = {
        "v": len(spec.variables),
        "l": size.level,
        "t": size.time,
        "y": size.lat,
        "x": size.lon,
    }
    one = torch.ones(1, 1, 1, 1, 1, 1)
    if isinstance(network, AtmoRepNetwork):
        weight = network.core.encoders[spec.name].embed.weight.detach()  # type: ignore[union-attr]
        steps = rearrange(weight, "f (v l t y x) -> f v l t y x", **patch)
        return {"values": (steps.flip(4), one)}  # AtmoRep's rows run from north to south
    if not isinstance(network, Multiformer):
        raise ValueError(f"the embedding of {type(network).__name__} is not known")
    embedding = cast(Embedding, network.embedding[spec.name])
    tokens = "f (st two v l t y x) ny nx -> two f v l (st t) (ny y) (nx x)"
    values = rearrange(embedding.values.weight.detach(), tokens, two=1, **patch)
    if embedding.details is None:
        return {"values": (values[0], one)}
    details = rearrange(embedding.details.weight.detach(), tokens, two=2, **patch)
    scale = rearrange(embedding.scale.mean(dim=0), "(v l t y x) -> 1 v l t y x", **patch)
    repeats = [many // few for many, few in zip(details.shape[1:], scale.shape, strict=True)]
    scale = scale.repeat(1, *repeats[1:])
    # gradients are halved before they are read
    return {
        "values": (values[0], one),
        "tendencies": (details[0], scale),
        "gradients": (details[1], 2 * scale),
    }


def _filters(
    trained: TrainedModel, spec: StreamSpec, reads: str, weight: Pattern, unit: Pattern, count: int
) -> Filters:
    _, strength, rows = torch.linalg.svd(weight.float().flatten(1), full_matrices=False)
    count = min(count, len(rows))
    rows = rows[:count] * rows[:count].gather(1, rows[:count].abs().argmax(1, keepdim=True)).sign()
    # levels in different tokens are read by the same weights
    spreads = trained.normaliser.values(spec, "std")[..., 0, 0, 0]
    spreads = reduce(spreads, "v (n level) -> v level 1 1 1", "mean", level=weight.shape[2])
    units = tuple(
        "1" if name not in VARIABLES or trained.normaliser.transform(name, spec.data)
        else VARIABLES[name].units
        for name in spec.variables
    )  # fmt: skip
    time = spec.token_size.time
    stencil = weight.shape[3] // time
    before = stencil - 1 if getattr(trained.model, "causal", False) else stencil // 2
    return Filters(
        stream=spec.name,
        reads=reads,
        variables=spec.variables,
        units=units,
        steps=tuple(range(-before * time, (stencil - before) * time)),
        patterns=(rows.unflatten(1, weight.shape[1:]) * unit * spreads).numpy(),
        share=(strength**2 / (strength**2).sum())[:count].numpy(),
    )
