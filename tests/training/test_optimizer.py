"""What is frozen stays, what is slowed takes shorter steps, and the default changes nothing."""

import dataclasses

import pytest
import torch
from torch import nn

from atmossl.training.optimizer import freeze, learning_rate_factors, make_optimizer
from tests.training.test_module import SETTINGS


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.ModuleDict({"air": nn.Linear(3, 3)}) for _ in range(3))
    return nn.ModuleDict({"embedding": nn.Linear(2, 3), "encoder": layers, "tail": nn.Linear(3, 2)})


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def test_layers_below_learn_more_slowly() -> None:
    settings = dataclasses.replace(SETTINGS, layer_decay=0.5, factors={"tail.bias": 3.0})
    found = learning_rate_factors(named(network()), settings)
    expected = {"embedding": 0.125, "encoder.0": 0.25, "encoder.1": 0.5, "encoder.2": 1.0}
    expected |= {"tail.weight": 1.0, "tail.bias": 3.0}
    for prefix, factor in expected.items():
        assert {f for name, f in found.items() if name.startswith(prefix)} == {factor}


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_frozen_parameters_stay_and_others_move_by_their_factor(algorithm: str) -> None:
    settings = dataclasses.replace(
        SETTINGS, algorithm=algorithm, factors={"encoder.1.*.weight": 0.1}
    )
    model = network()
    assert len(freeze(named(model), ["encoder.0.*", "embedding.weight"])) == 3
    optimizer = make_optimizer(named(model), settings, fused=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    after = {name: p.detach() for name, p in model.named_parameters()}
    moved = {name: float((after[name] - before[name]).abs().max()) for name in after}
    still = ("encoder.0", "embedding.weight")
    assert {name for name, size in moved.items() if size == 0} == {
        name for name in moved if name.startswith(still)
    }
    ratio = moved["encoder.1.air.weight"] / moved["encoder.2.air.weight"]
    assert ratio == pytest.approx(0.1, rel=1e-2)


def test_without_choices_there_are_two_groups_as_ever() -> None:
    """So that optimiser states of earlier runs fit."""
    model = network()
    groups = make_optimizer(named(model), SETTINGS, fused=False).param_groups
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    assert [list(map(id, group["params"])) for group in groups] == [
        list(map(id, matrices)),
        list(map(id, vectors)),
    ]


@pytest.mark.parametrize("key", ["freeze", "factors"])
def test_a_pattern_that_matches_nothing_is_named(key: str) -> None:
    with pytest.raises(ValueError, match=rf"optimizer\.{key}.*decodr.*encoder\.0"):
        if key == "freeze":
            freeze(named(network()), ["decodr.*"])
        else:
            settings = dataclasses.replace(SETTINGS, factors={"decodr.*": 0.1})
            make_optimizer(named(network()), settings, fused=False)
