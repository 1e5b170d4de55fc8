"""Forgetting activations changes what is kept, not what is learnt."""

import copy

import numpy as np
import pytest
import torch

from atmossl.batch import TokenIndex, collate_views
from atmossl.masking.base import make_view
from atmossl.masking.random import RandomMasking
from atmossl.model.blocks import rotation
from atmossl.model.multiformer import Multiformer
from atmossl.model.network import TokenPlace
from atmossl.objectives.masked import MaskedModelling
from atmossl.training.recompute import recompute
from tests.synthetic import spec, window

STREAMS = (spec("air", variables=("temperature",)), spec("wind", variables=("u",)))


def gradients(kind: str, kernel_size: int) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of one step, and the bytes that it kept for the backward pass."""
    torch.manual_seed(0)
    model = Multiformer(
        streams=STREAMS, dim=16, num_layers=3, num_decoder_layers=1, num_heads=2, num_members=3,
        kernel_size=kernel_size,
    )  # fmt: skip
    recompute(model, kind)
    windows = tuple(window(s, seed=n) for n, s in enumerate(STREAMS))
    sampler = RandomMasking((0.5, 0.5), {"mask": 1.0})
    view = make_view(windows, sampler, np.random.default_rng(0))
    batch = collate_views([(view,)], [0])
    kept = 0

    def note(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = MaskedModelling(losses={"fair_crps": 1.0})(model, batch).total
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_gradients_are_the_same_bit_for_bit_and_less_is_kept(kernel_size: int) -> None:
    expected, everything = gradients("none", kernel_size)
    sizes = [everything]
    for kind in ("selective", "full"):
        found, kept = gradients(kind, kernel_size)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        sizes.append(kept)
    assert sizes[0] > 1.2 * sizes[1] and sizes[1] > 1.2 * sizes[2]


def test_a_copy_of_the_model_calls_its_own_parts() -> None:
    """Whenever it is made: here after the parts were told to forget."""
    torch.manual_seed(0)
    model = Multiformer(
        streams=STREAMS, dim=16, num_layers=1, num_decoder_layers=1, num_heads=2, num_members=3
    )
    recompute(model, "full")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.encoder.parameters():
            parameter.zero_()
    x = {"air": torch.randn(1, 4, 16)}
    turns = rotation(torch.zeros(1, 4, 4))
    chosen = TokenIndex.of(torch.ones(1, 1, 1, 2, 2, dtype=torch.bool))
    places = {"air": TokenPlace({8: turns}, chosen, (1, 1, 2, 2), False)}
    assert torch.equal(copied.encoder[0](x, places)["air"], x["air"])
    assert not torch.equal(model.encoder[0](x, places)["air"], x["air"])
