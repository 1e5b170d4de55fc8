"""One encoder layer of all streams; those that are alike are computed as one batch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from atmossl.model.blocks import BlockSizes, EncoderBlock
from atmossl.model.layout import Latent, TokenPlace, alike, joined

Features = Float[Tensor, "batch token feature"]


@dataclass(frozen=True)
class Group:
    """Streams that are one batch, in the order of `names`."""

    names: tuple[str, ...]
    place: TokenPlace


@dataclass(frozen=True)
class Pairs:
    """Which streams of the group number `group` look at which others, as one batch: every stream
    of the group at as many others, (stream, other) in the order of `names`."""

    group: int
    names: tuple[tuple[str, str], ...]
    place: TokenPlace
    context: TokenPlace


@dataclass(frozen=True)
class Plan:
    """How the streams of a view are computed together, layer by layer."""

    groups: tuple[Group, ...]
    pairs: tuple[Pairs, ...]

    @classmethod
    def of(cls, latents: Mapping[str, Latent], *, together: bool) -> "Plan":
        """`together`: streams that are alike are one batch. A stream that is absent is left out of
        the coupling."""
        places = {name: latent.place for name, latent in latents.items()}
        sorted_names = alike(latents) if together else tuple((name,) for name in latents)
        groups = tuple(
            Group(names, TokenPlace.joined([places[name] for name in names]))
            for names in sorted_names
        )
        pairs = []
        for number, group in enumerate(groups):
            for other in groups:
                names = tuple((a, b) for a in group.names for b in other.names if a != b)
                if names:
                    own, seen = ([places[pair[n]] for pair in names] for n in (0, 1))
                    pairs.append(
                        Pairs(number, names, TokenPlace.joined(own), TokenPlace.joined(seen))
                    )
        return cls(groups, tuple(pairs))

    def batches(self, latents: Mapping[str, Latent]) -> tuple[Features, ...]:
        """Features of every group."""
        return tuple(joined([latents[n].features for n in group.names]) for group in self.groups)

    def streams(self, batches: Sequence[Features]) -> Iterator[tuple[str, Latent]]:
        """Undoes `batches`."""
        for group, features in zip(self.groups, batches, strict=True):
            yield from zip(group.names, Latent(features, group.place).split(), strict=True)


class EncoderLayer(nn.ModuleDict):
    """A block for every stream, by its name, which looks at all others: self-attention and
    coupling, then feedforward."""

    def __init__(self, widths: Mapping[str, int], sizes: BlockSizes) -> None:
        blocks = {}
        for name, width in widths.items():
            others = {other: size for other, size in widths.items() if other != name}
            blocks[name] = EncoderBlock(dim=width, sizes=sizes, coupled_dims=others)
        super().__init__(blocks)

    def forward(self, batches: tuple[Features, ...], plan: Plan) -> tuple[Features, ...]:
        """Features of every group of the plan."""
        normed, attended = [], []
        for group, x in zip(plan.groups, batches, strict=True):
            blocks = self._blocks(group.names)
            normed.append(normed_each(x, [block.norm for block in blocks]))
            first, *others = (block.attention for block in blocks)
            attended.append(x + first(Latent(normed[-1], group.place), *others))
        streams = {name: latent.features for name, latent in plan.streams(normed)}
        for pairs in plan.pairs:
            attended[pairs.group] = attended[pairs.group] + self._couple(pairs, streams, plan)
        return tuple(
            x + self._feed(group, x) for group, x in zip(plan.groups, attended, strict=True)
        )

    def _couple(self, pairs: Pairs, streams: Mapping[str, Tensor], plan: Plan) -> Features:
        """What the streams of a group take from all others of the pairs, summed."""
        first, *others = (self._blocks((a,))[0].coupling[b] for a, b in pairs.names)
        own, seen = (joined([streams[pair[n]] for pair in pairs.names]) for n in (0, 1))
        found = first(Latent(own, pairs.place), Latent(seen, pairs.context), *others)
        size = len(plan.groups[pairs.group].names)
        if size == len(pairs.names):
            return found
        apart = found.unflatten(0, (size, len(pairs.names) // size, -1))
        return apart.sum(dim=1, dtype=streams[pairs.names[0][0]].dtype).flatten(0, 1)

    def _feed(self, group: Group, x: Features) -> Features:
        blocks = self._blocks(group.names)
        inner = normed_each(x, [block.feedforward_norm for block in blocks])
        first, *others = (block.feedforward for block in blocks)
        return first(Latent(inner, group.place), *others)

    def _blocks(self, names: Sequence[str]) -> list[EncoderBlock]:
        blocks = [self[name] for name in names]
        return [block for block in blocks if isinstance(block, EncoderBlock)]


def normed_each(x: Features, norms: Sequence[nn.LayerNorm]) -> Features:
    """Every norm on its share of the batch."""
    first, *others = norms
    if not others:
        return first(x)
    weight, bias = (torch.stack([getattr(n, name) for n in norms]) for name in ("weight", "bias"))
    apart = functional.layer_norm(x, first.normalized_shape, eps=first.eps)
    apart = apart.unflatten(0, (len(norms), -1))
    return torch.addcmul(bias[:, None, None], apart, weight[:, None, None]).flatten(0, 1)
