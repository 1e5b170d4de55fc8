"""One encoder layer of all streams, which look at each other."""

from collections.abc import Mapping
from itertools import permutations
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from atmossl.model.blocks import BlockSizes, EncoderBlock
from atmossl.model.layout import Latent, TokenPlace

Features = dict[str, Float[Tensor, "batch token feature"]]  # by the name of a stream


class EncoderLayer(nn.ModuleDict):
    """A block for every stream, by its name, which looks at all others: self-attention and
    coupling, then feedforward."""

    def __init__(self, widths: Mapping[str, int], sizes: BlockSizes) -> None:
        blocks = {}
        for name, width in widths.items():
            others = {other: size for other, size in widths.items() if other != name}
            blocks[name] = EncoderBlock(dim=width, sizes=sizes, coupled_dims=others)
        super().__init__(blocks)

    def forward(self, features: Features, places: Mapping[str, TokenPlace]) -> Features:
        """Features of every stream that is there; coupling leaves out one that is absent."""
        blocks = {name: cast(EncoderBlock, self[name]) for name in features}
        normed: dict[str, Latent] = {}
        after: Features = {}
        for name, block in blocks.items():
            normed[name] = Latent(block.norm(features[name]), places[name])
            after[name] = features[name] + block.attention(normed[name])
        for name, other in permutations(blocks, 2):
            after[name] = after[name] + blocks[name].coupling[other](normed[name], normed[other])
        for name, block in blocks.items():
            inner = Latent(block.feedforward_norm(after[name]), places[name])
            after[name] = after[name] + block.feedforward(inner)
        return after
