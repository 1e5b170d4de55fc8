"""Objectives together: every part sees its own views, and counts by its weight."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from atmossl.objectives.jepa import JointEmbedding
from atmossl.objectives.masked import MaskedModelling
from atmossl.objectives.weighted_sum import WeightedSum
from tests.training.test_jepa import batch, network


def part(kind: Any, **keywords: Any) -> Any:
    """An objective as a configuration holds it."""

    def build(*, network: Any, scales: Any) -> Any:
        del scales
        return kind(**keywords, **({"network": network} if kind is JointEmbedding else {}))

    return SimpleNamespace(
        views=kind.views_of(keywords), provides=kind.provides, compares_samples=False,
        faults=lambda _: ["objective.losses is wrong"], build=build,
    )  # fmt: skip


PARTS = {
    "fields": part(MaskedModelling, losses={"crps": 1.0}),
    "latents": part(JointEmbedding, momentum=(0.9, 1.0), momentum_steps=10),
}


def test_the_loss_is_the_weighted_mean_of_those_of_its_parts() -> None:
    model, given = network(), batch()
    tested = WeightedSum(network=model, parts=PARTS, weights={"latents": 0.25})
    (view, whole) = given.views
    together = replace(given, views=(view, view, whole))
    assert len(WeightedSum.views_of({"parts": PARTS})) == 3
    with torch.no_grad():
        losses = tested(model, together)
        first = tested.parts["fields"](model, replace(given, views=(view,)))
        second = tested.parts["latents"](model, given)
    expected = (first.total + 0.25 * second.total) / 1.25
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert losses.names == ("fields_air", "fields_wind", "latents_air", "latents_wind")
    weights = tested.weights(together)
    assert weights is not None and len(weights) == 4
    assert torch.equal(weights[2:], tested.parts["latents"].weights(given))  # type: ignore[operator]
    assert tested.provides == {"reconstruct", "embed"}
    assert tested.monitor.key == "rmse_ratio/mean"
    metric = tested.metrics["validation"]
    logged = metric.values({"task": metric.sums(together, losses)})
    alone = MaskedModelling(losses={"crps": 1.0}).metrics["validation"]
    one = alone.values({"task": alone.sums(replace(given, views=(view,)), first)})
    assert one.items() <= {k: v for k, v in logged.items()}.items()
    assert "latent_ratio/mean" in logged and "latents_position_ratio/mean" in logged


def test_the_teacher_of_a_part_follows_and_faults_name_the_part() -> None:
    model = network()
    tested: Any = WeightedSum(network=model, parts=PARTS, weights=None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    before = [p.clone() for p in tested.parts["latents"].teacher.parameters()]
    tested.after_step(model, 0)
    for old, new in zip(before, tested.parts["latents"].teacher.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.1)
    faults = WeightedSum.faults_of({"parts": PARTS, "weights": {"other": 1.0}}, 2)
    assert faults[0] == "objective.parts.fields.losses is wrong"
    assert "objective.weights names unknown other;" in faults[-1]
    (fault,) = WeightedSum.faults_of({"parts": {"values": PARTS["fields"]}, "weights": None}, 2)[1:]
    assert fault.startswith("objective.parts.values: ") and "word" in fault
