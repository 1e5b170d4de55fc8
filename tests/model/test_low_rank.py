"""Thin matrices beside frozen layers compute what one merged matrix does."""

import pytest
import torch
from torch import nn

from atmossl.model.network import Linear, LowRankLinear, add_low_rank, merged


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"one": nn.Sequential(Linear(6, 8), Linear(8, 5)), "two": Linear(6, 5)})


def test_a_network_starts_as_it_was_and_merges_into_what_it_became() -> None:
    model, x = network().double(), torch.randn(3, 6, dtype=torch.float64)
    before = model["one"](x)
    add_low_rank(model, ["one.*"], 2)
    assert torch.equal(model["one"](x), before)
    assert type(model["two"]) is Linear
    for layer in model["one"]:
        assert isinstance(layer, LowRankLinear)
        nn.init.normal_(layer.up)
    after = model["one"](x)
    assert not torch.allclose(after, before)
    plain = network().double()
    plain.load_state_dict(merged(model.state_dict()))
    torch.testing.assert_close(plain["one"](x), after)


@pytest.mark.parametrize(
    ("layers", "rank", "message"),
    [(["three.*"], 2, r"three.*one\.0"), (["one.*"], 5, r"rank=5 .* width 5 of one\.1")],
)
def test_what_does_not_fit_is_named(layers: list[str], rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_low_rank(network(), layers, rank)
