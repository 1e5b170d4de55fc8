"""An encoder layer of several streams is what its formula says, whichever streams are there."""

from functools import partial

import pytest
import torch

from atmossl.batch import TokenIndex
from atmossl.model.blocks import (
    Attend,
    BlockSizes,
    EncoderLayer,
    attend_factorised,
    attend_fully,
    attend_in_windows,
    rotation,
)
from atmossl.model.network import Latent, TokenPlace, add_low_rank

SHAPE = (2, 3, 4, 6)  # level nt nlat nlon
WIDTHS = {"air": 16, "wind": 16, "sea": 24, "humidity": 16}  # the sea is unlike the others
KINDS = (attend_fully, attend_factorised, partial(attend_in_windows, size=(2, 2, 3)))


def layer(attend: Attend = attend_fully, kernel_size: int = 1) -> EncoderLayer:
    torch.manual_seed(0)
    made = EncoderLayer(WIDTHS, BlockSizes(2, 2.0, attend, kernel_size)).double()
    with torch.no_grad():  # away from the start, where coupling is shut
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def latents(counts: tuple[int, int], names: tuple[str, ...] = tuple(WIDTHS)) -> dict[str, Latent]:
    """Two samples, which hold so many tokens each, others in every stream."""
    generator = torch.Generator().manual_seed(1)
    made = {}
    for name in names:
        order = torch.rand(2, 144, generator=generator).argsort(dim=1).argsort(dim=1)
        chosen = TokenIndex.of((order < torch.tensor(counts)[:, None]).view(2, *SHAPE))
        size = (2, max(counts), WIDTHS[name])
        features = torch.randn(*size, generator=generator, dtype=torch.float64, requires_grad=True)
        phases = {w // 2: torch.randn(*size[:2], w // 4, generator=generator) for w in (16, 24)}
        turns = {width: rotation(phase.double()) for width, phase in phases.items()}
        made[name] = Latent(features, TokenPlace(turns, chosen, SHAPE, False))
    return made


def one_by_one(blocks: EncoderLayer, streams: dict[str, Latent]) -> dict[str, torch.Tensor]:
    normed = {n: Latent(blocks[n].norm(x.features), x.place) for n, x in streams.items()}
    after = {}
    for name, x in streams.items():
        block = blocks[name]
        features = x.features + block.attention(normed[name])
        for other in streams:
            if other != name:
                features = features + block.coupling[other](normed[name], normed[other])
        inner = block.feedforward_norm(features)
        after[name] = features + block.feedforward(Latent(inner, x.place))
    return after


def compare(blocks: EncoderLayer, streams: dict[str, Latent]) -> None:
    """The layer and its gradients against the formula written out."""
    features = {name: x.features for name, x in streams.items()}
    found = blocks(features, {name: x.place for name, x in streams.items()})
    expected = one_by_one(blocks, streams)
    assert found.keys() == expected.keys()
    roots = [*blocks.parameters(), *features.values()]
    weights = {name: torch.randn_like(x) for name, x in expected.items()}
    gradients = []
    for values in (found, expected):
        total = sum((values[n] * weights[n]).sum() for n in expected)
        gradients.append(torch.autograd.grad(total, roots, allow_unused=True))
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-11, atol=1e-11)
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("counts", [(144, 144), (90, 60)])
@pytest.mark.parametrize("attend", KINDS)
def test_every_stream_attends_couples_to_all_others_and_feeds_forward(
    attend: Attend, counts: tuple[int, int]
) -> None:
    compare(layer(attend), latents(counts))


def test_convolutions_see_their_own_stream_alone() -> None:
    compare(layer(kernel_size=3), latents((90, 60)))


def test_a_stream_may_be_absent() -> None:
    compare(layer(), latents((144, 144), ("wind", "sea")))


def test_thin_matrices_of_one_stream_do_not_disturb_the_others() -> None:
    blocks = layer()
    add_low_rank(blocks, ["wind.attention.*", "air.coupling.wind.query"], 2)
    for name, parameter in blocks.named_parameters():
        if name.endswith(".up"):
            torch.nn.init.normal_(parameter)
    compare(blocks.double(), latents((144, 144)))
