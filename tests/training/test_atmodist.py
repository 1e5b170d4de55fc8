"""AtmoDist: the lag between two states, from the grid and not from their dates."""

import math
from dataclasses import replace

import pytest
import torch

from atmossl.batch import Batch
from atmossl.losses import Losses
from atmossl.objectives.atmodist import AtmoDist, LagMeasures, lag_class
from tests.training.test_contrastive import LAG_HOURS, network, pairs


def objective(model, lag_hours: tuple[float, ...] = LAG_HOURS) -> AtmoDist:
    torch.manual_seed(1)
    return AtmoDist(network=model, lag_hours=lag_hours, compare_dim=16)


def trained(batch: Batch, steps: int = 25) -> tuple[AtmoDist, torch.nn.Module]:
    model = network()
    tested = objective(model)
    optimizer = torch.optim.Adam([*model.parameters(), *tested.parameters()], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        tested(model, batch).total.backward()
        optimizer.step()
    return tested, model


@pytest.mark.parametrize("lags", [LAG_HOURS, (6.0, 12.0, 18.0, 24.0, 48.0)])
def test_a_run_begins_with_equal_chances(lags: tuple[float, ...]) -> None:
    model, batch = network(), pairs(range(4))
    losses = objective(model, lags)(model, batch)
    assert losses.total.item() == pytest.approx(math.log(len(lags)), rel=1e-6)
    assert lag_class(batch, lags).tolist() == [lags.index(LAG_HOURS[n % 2]) for n in range(4)]


def test_lags_can_be_learned_and_the_order_of_the_states_matters() -> None:
    batch = pairs(range(4))
    tested, model = trained(batch)
    first, second = batch.views
    swapped = replace(
        batch,
        views=(
            replace(second, start_hours=first.start_hours),
            replace(first, start_hours=second.start_hours),
        ),
    )
    with torch.no_grad():
        losses, others = tested(model, batch), tested(model, swapped)
    assert losses.total.item() < 0.1
    assert losses.scores is not None
    assert not torch.allclose(losses.scores, others.scores, atol=1e-2)


def test_gradients_reach_the_encoder_alone() -> None:
    tested, model = trained(pairs(range(2)), steps=1)
    with_gradient = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"embedding", "encoder"}
    assert all(p.grad is not None for p in tested.parameters())


def test_measures_count_lags_and_their_neighbours() -> None:
    """Two samples with lags of 6 and 24 h, of which the second is taken for another."""
    lags, batch = (6.0, 12.0, 24.0), pairs(range(2))
    pooled = (torch.randn(2, 3), torch.randn(2, 3))

    def values(told: tuple[int, int]) -> dict[str, float]:
        scores = torch.nn.functional.one_hot(torch.tensor(told), 3).float()
        losses = Losses((("lag", torch.tensor(1.0)),), (1.0,), pooled=pooled, scores=scores)
        measures = LagMeasures(lags)
        found = measures.values({"task": measures.sums(batch, losses)})
        return {k: float(v) for k, v in found.items() if k.startswith("lag") and "mean" in k}

    cases = (((0, 2), 1, 1, 0), ((0, 1), 0.5, 1, 6), ((0, 0), 0.5, 0.5, 9))
    for told, accuracy, near, error in cases:
        assert values(told) == {
            "lag_accuracy/mean": accuracy, "lag_within_one/mean": near,
            "lag_error_hours/mean": error,
        }  # fmt: skip
