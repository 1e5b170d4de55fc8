"""Streams computed as one batch are what they are one after the other."""

from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from atmossl.batch import TokenIndex
from atmossl.model import linear
from atmossl.model.attention import Attend, attend_factorised, attend_fully, attend_in_windows
from atmossl.model.blocks import BlockSizes
from atmossl.model.encoder import EncoderLayer, Plan
from atmossl.model.layout import Latent, TokenPlace
from atmossl.model.low_rank import add_low_rank
from atmossl.model.positions import rotation

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


def compare(blocks: EncoderLayer, streams: dict[str, Latent]) -> Plan:
    plan = Plan.of(streams, together=True)
    together = dict(plan.streams(blocks(plan.batches(streams), plan)))
    expected = one_by_one(blocks, streams)
    assert together.keys() == expected.keys()
    roots = [*blocks.parameters(), *(x.features for x in streams.values())]
    weights = {name: torch.randn_like(x) for name, x in expected.items()}
    gradients = []
    for found in ({n: x.features for n, x in together.items()}, expected):
        total = sum((found[n] * weights[n]).sum() for n in expected)
        gradients.append(torch.autograd.grad(total, roots, allow_unused=True))
    valid = {n: x.place.chosen.valid[..., None] for n, x in streams.items()}
    for name, x in together.items():
        torch.testing.assert_close(
            x.features * valid[name], expected[name] * valid[name], rtol=1e-11, atol=1e-11
        )
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    return plan


@pytest.mark.parametrize("counts", [(144, 144), (90, 60)])
@pytest.mark.parametrize("attend", KINDS)
@pytest.mark.parametrize("batched", [True, False])
def test_streams_as_one_batch_are_streams_one_by_one(
    attend: Attend, counts: tuple[int, int], batched: bool, monkeypatch
) -> None:
    monkeypatch.setattr(linear, "_batched", lambda *_: batched)
    plan = compare(layer(attend), latents(counts))
    assert [group.names for group in plan.groups] == [("air", "wind", "humidity"), ("sea",)]
    assert len(plan.pairs) == 3  # among the three, between them and the sea both ways


def test_convolutions_see_their_own_stream_alone(monkeypatch) -> None:
    monkeypatch.setattr(linear, "_batched", lambda *_: True)
    compare(layer(kernel_size=3), latents((90, 60)))


def test_a_stream_may_be_absent() -> None:
    plan = compare(layer(), latents((144, 144), ("wind", "sea")))
    assert [pairs.names for pairs in plan.pairs] == [(("wind", "sea"),), (("sea", "wind"),)]


def test_thin_matrices_of_one_stream_do_not_disturb_the_others() -> None:
    blocks = layer()
    add_low_rank(blocks, ["wind.attention.*", "air.coupling.wind.query"], 2)
    for name, parameter in blocks.named_parameters():
        if name.endswith(".up"):
            torch.nn.init.normal_(parameter)
    compare(blocks.double(), latents((144, 144)))


@pytest.mark.parametrize("counts", [(50, 30), (30, 50), (144, 144), (0, 3)])
def test_joined_indices_are_those_of_one_batch(counts: tuple[int, int]) -> None:
    parts = [x.place.chosen for x in latents(counts, ("air", "wind")).values()]
    found, expected = TokenIndex.joined(parts), TokenIndex.of(torch.cat([p.chosen for p in parts]))
    assert torch.equal(found.valid, expected.valid) and found.complete == expected.complete
    assert torch.equal(found.index * found.valid, expected.index * expected.valid)
    if all(counts):
        assert torch.equal(found.frames.kept, expected.frames.kept)
        assert torch.equal(found.frames.slot, expected.frames.slot)


def test_three_streams_take_no_more_products_than_two(monkeypatch) -> None:
    """Counted by operation, as a GPU would launch them: alike streams share them all."""
    monkeypatch.setattr(linear, "_batched", lambda *_: True)
    counts = []
    for names in (("air", "wind"), ("air", "wind", "humidity")):
        streams, blocks = latents((144, 144), names), layer()
        plan = Plan.of(streams, together=True)
        batches = plan.batches(streams)
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            blocks(batches, plan)
        calls = {event.key: event.count for event in recorded.key_averages()}
        fused = [n for name, n in calls.items() if name == "aten::scaled_dot_product_attention"]
        counts.append((calls["aten::baddbmm"], sum(fused), "aten::addmm" in calls))
    assert counts == [(7, 2, False)] * 2
