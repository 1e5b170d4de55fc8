"""What is frozen stays, what is slowed takes shorter steps, and the default changes nothing."""

import dataclasses

import pytest
import torch
from torch import nn

from atmossl.model.multiformer import Multiformer
from atmossl.model.network import Network
from atmossl.objectives.base import Objective
from atmossl.training.optimizer import (
    freeze,
    learning_rate_factors,
    make_optimizer,
    named_parameters,
)
from tests.training.test_module import SETTINGS


class Layers(Network):
    """Three encoder layers between an embedding and a tail."""

    ends = ("tail",)
    depth = Multiformer.depth
    num_layers = 3

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.ModuleDict({"air": nn.Linear(2, 3)})
        layers = (nn.ModuleDict({"air": nn.Linear(3, 3)}) for _ in range(self.num_layers))
        self.encoder = nn.ModuleList(layers)
        self.tail = nn.Linear(3, 2)


def network() -> Layers:
    torch.manual_seed(0)
    return Layers()


class Headed(Objective):
    """An objective with a head of its own, whose last layer is an end."""

    ends = ("last",)

    def __init__(self) -> None:
        super().__init__()
        self.head, self.last = nn.Linear(3, 3), nn.Linear(3, 2)


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def test_layers_below_learn_more_slowly() -> None:
    settings = dataclasses.replace(SETTINGS, layer_decay=0.5, factors={"tail.bias": 3.0})
    found = learning_rate_factors(named(network()), settings, network().depth)
    expected = {"embedding": 0.125, "encoder.0": 0.25, "encoder.1": 0.5, "encoder.2": 1.0}
    expected |= {"tail.weight": 1.0, "tail.bias": 3.0}
    for prefix, factor in expected.items():
        assert {f for name, f in found.items() if name.startswith(prefix)} == {factor}


def test_what_an_objective_owns_is_trained_and_frozen_as_the_network_is() -> None:
    model, objective = network(), Headed()
    parameters = named_parameters(model, objective)
    assert list(parameters)[-4:] == [
        "objective.head.weight", "objective.head.bias", "objective.last.weight",
        "objective.last.bias",
    ]  # fmt: skip
    settings = dataclasses.replace(
        SETTINGS, algorithm="muon", layer_decay=0.5, factors={"objective.head.*": 0.1}
    )
    freeze(parameters, ["objective.last.bias", "encoder.2.*"])
    groups = make_optimizer(model, objective, settings, fused=False).param_groups
    is_muon = {id(p): group["muon"] for group in groups for p in group["params"]}
    assert is_muon[id(objective.head.weight)] and not is_muon[id(objective.last.weight)]
    assert not {id(objective.last.bias), id(model.encoder[2]["air"].weight)} & set(is_muon)
    rates = learning_rate_factors(parameters, settings, model.depth)
    assert rates["objective.head.weight"] == 0.1 and rates["objective.last.weight"] == 1.0
    # the uppermost layer that is trained has the whole rate
    assert (rates["encoder.1.air.bias"], rates["embedding.air.bias"]) == (1.0, 0.25)


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_frozen_parameters_stay_and_others_move_by_their_factor(algorithm: str) -> None:
    settings = dataclasses.replace(
        SETTINGS, algorithm=algorithm, factors={"encoder.1.*.weight": 0.1}
    )
    model = network()
    assert len(freeze(named(model), ["encoder.0.*", "embedding.air.weight"])) == 3
    optimizer = make_optimizer(model, Objective(), settings, fused=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    after = {name: p.detach() for name, p in model.named_parameters()}
    moved = {name: float((after[name] - before[name]).abs().max()) for name in after}
    still = ("encoder.0", "embedding.air.weight")
    assert {name for name, size in moved.items() if size == 0} == {
        name for name in moved if name.startswith(still)
    }
    ratio = moved["encoder.1.air.weight"] / moved["encoder.2.air.weight"]
    assert ratio == pytest.approx(0.1, rel=1e-2)


def test_without_choices_there_are_two_groups_as_ever() -> None:
    """So that optimiser states of earlier runs fit."""
    model = network()
    groups = make_optimizer(model, Objective(), SETTINGS, fused=False).param_groups
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
            make_optimizer(network(), Objective(), settings, fused=False)
