"""Joint-embedding prediction: a second objective behind the same contract."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from atmossl.batch import Batch, TokenIndex, collate_views
from atmossl.latent_losses import batch_anomalies, sigreg
from atmossl.masking.base import hide_nothing, make_view
from atmossl.masking.random import RandomMasking
from atmossl.model.multiformer import Multiformer
from atmossl.objectives.jepa import Distance, JointEmbedding, LatentRatios
from atmossl.objectives.position_means import position_bins, position_ratio, position_sums
from atmossl.objectives.teacher import momentum_at
from tests.synthetic import spec, window

STREAMS = (spec("air"), spec("wind", variables=("u_component_of_wind",), token=(2, 4, 4)))


SMOOTH_L1 = stats.norm.expect(lambda x: min(x**2 / 2, 0.5) + max(abs(x) - 1, 0))  # 0.4247


def network(seed: int = 0) -> Multiformer:
    torch.manual_seed(seed)
    return Multiformer(
        streams=STREAMS, dim=16, num_layers=2, num_decoder_layers=1, num_heads=2, num_members=2
    )


def objective(model: Multiformer) -> Any:
    return JointEmbedding(network=model, momentum=(0.9, 1.0), momentum_steps=10)


def batch() -> Batch:
    """Two samples, of which the first hides little and the second much."""
    samples = []
    for seed, share in ((0, 0.2), (1, 0.7)):
        windows = tuple(window(s, seed=10 * seed + n) for n, s in enumerate(STREAMS))
        rng = np.random.default_rng(seed)
        sampler = RandomMasking((share, share), {"mask": 0.5, "drop": 0.5})
        samples.append((make_view(windows, sampler, rng), make_view(windows, hide_nothing, rng)))
    return collate_views(samples, [0, 1])


def test_the_loss_is_the_distance_to_normalised_latents_of_the_teacher() -> None:
    """In float64 from the latents themselves, hidden token by hidden token."""
    model = network()
    tested, given = objective(model), batch()
    with torch.no_grad():
        losses = tested(model, given)
        view, whole = given.views
        predicted = model.predict(model.encode(view), view)
        teacher = tested.teacher.encode(whole)
    for number, stream in enumerate(view.streams):
        sums = [0.0, 0.0]
        truth = teacher[stream.spec.name].last.double()
        found = predicted[stream.spec.name].last.double()
        num_lon, num_lat = stream.grid.shape[3], stream.grid.shape[2]
        for sample in range(2):
            chosen = stream.queries.index[sample][stream.queries.valid[sample]]
            for place, token in enumerate(chosen.tolist()):
                target = truth[sample, token]
                target = (target - target.mean()) / (target.var(correction=0) + 1e-5).sqrt()
                gap = (found[sample, place] - target).abs()
                distance = torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
                lat = math.radians(float(stream.grid.lat[sample, token // num_lon % num_lat]))
                half = math.radians(float(stream.grid.lat_extent[sample])) / 2
                area = math.sin(lat + half) - math.sin(lat - half)
                sums[0] += float(distance) * area
                sums[1] += area
        assert losses.terms[number][1].item() == pytest.approx(sums[0] / sums[1], rel=1e-5)
        weight = tested.weights(given)[number].item()
        width = math.radians(float(stream.grid.lon_extent[0]))
        assert weight == pytest.approx(sums[1] * width, rel=1e-5)


def test_the_teacher_follows_by_the_momentum_of_the_step_alone() -> None:
    model = network()
    tested = objective(model)
    expected = [p.detach().clone().double() for p in model.parameters()]
    assert not any(p.requires_grad for p in tested.parameters())
    with torch.no_grad():
        for step in (1, 5, 10, 12):
            for parameter in model.parameters():
                parameter += 0.1
            tested.after_step(model, step)
            share = min(step, 10) / 10
            momentum = 1.0 - 0.1 * (1 + math.cos(math.pi * share)) / 2
            expected = [
                momentum * old + (1 - momentum) * new
                for old, new in zip(expected, model.parameters(), strict=True)
            ]
    for found, old in zip(tested.teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(found.double(), old, rtol=1e-5, atol=1e-6)
    assert momentum_at(0, 10, (0.9, 1.0)) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("distance", "expected"), [("smooth_l1", SMOOTH_L1), ("l1", math.sqrt(2 / math.pi))]
)
def test_a_prediction_of_zero_of_normal_latents_costs_what_it_should(
    distance: Distance, expected: float
) -> None:
    """The mean of |x| over a standard normal x, and of x^2 / 2 below 1 and |x| - 1/2 above."""
    tested = JointEmbedding(
        network=network(), momentum=(0.9, 1.0), momentum_steps=10, distance=distance
    )
    target = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    found = tested._distances(torch.zeros_like(target), target).mean().item()
    assert found == pytest.approx(expected, abs=3e-3)


def test_without_a_teacher_both_sides_learn_and_anomalies_are_made_normal() -> None:
    """The regulariser in float64 from the latents; directions by the step alone."""
    model, given = network(), batch()

    def without_teacher() -> Any:
        return JointEmbedding(
            network=model, momentum=(0.9, 1.0), momentum_steps=10, anti_collapse="sigreg",
            sigreg_tokens=5, sigreg_share=0.2,
        )  # fmt: skip

    tested = without_teacher()
    assert not list(tested.parameters())
    tested.after_step(model, 3)
    losses = tested(model, given)
    losses.total.backward()
    assert all(p.grad is not None for p in model.encoder.parameters())
    with torch.no_grad():
        targets = model.encode(given.views[1])
    values = []
    for name, latents in targets.items():
        count = latents.last.shape[1]
        tokens = [(n * (count // 5) + 3) % count for n in range(5)]
        chosen = latents.last[:, tokens].double()
        anomalies = (chosen - chosen.mean(dim=0)) * math.sqrt(2)  # of two samples
        directions = getattr(tested, f"directions_{name}").double()
        values.append(float(sigreg(anomalies.flatten(0, 1), directions)))
    assert dict(losses.terms)["sigreg"].item() == pytest.approx(np.mean(values), rel=1e-4)
    assert losses.factors[-1] / sum(losses.factors) == pytest.approx(0.2)
    other = without_teacher()
    assert not torch.equal(other.directions_air, tested.directions_air)
    other.after_step(model, 3)
    assert torch.equal(other.directions_air, tested.directions_air)


def test_latents_of_positions_alone_cost_the_regulariser_as_much_as_a_constant() -> None:
    model, whole = network(), batch().views[1]
    with torch.no_grad():
        latents = model.encode(whole)["air"].last
    by_position = latents[:1].expand_as(latents)
    assert batch_anomalies(by_position).abs().max() < 1e-6
    torch.testing.assert_close(
        batch_anomalies(latents).var(dim=0, correction=0), latents.var(dim=0)
    )


def test_the_mean_of_a_position_has_a_ratio_of_one() -> None:
    """Of targets that differ from position to position by much more than from state to state, a
    prediction of the others' mean at the position is the unit, whatever the bin."""
    generator = torch.Generator().manual_seed(0)
    states, tokens, features = 400, 6, 3
    means = 100 * torch.randn(1, tokens, features, generator=generator)
    target = means + torch.randn(states, tokens, features, generator=generator)
    bins = torch.arange(tokens).expand(states, tokens) * 7
    weight = torch.linspace(0.5, 1, tokens).expand(states, tokens)
    sums = position_sums(means.expand_as(target), target, weight, bins)
    assert float(position_ratio(sums)) == pytest.approx(1.0, abs=0.05)
    half = means + (target - means) / 2
    assert float(position_ratio(position_sums(half, target, weight, bins))) == pytest.approx(
        0.5, abs=0.03
    )
    for stream in batch().views[1].streams:
        numbers = position_bins(stream.grid, TokenIndex.of(torch.ones_like(stream.hidden)))
        places = numbers.view(2, *stream.grid.shape)
        assert len(places[0, :, 0].unique()) == places[0, :, 0].numel()
        assert torch.equal(places[:, :, 0], places[:, :, 1]) and torch.equal(places[0], places[1])


def test_gradients_reach_encoder_and_predictor_but_neither_ends_nor_teacher() -> None:
    model = network()
    tested = objective(model)
    tested(model, batch()).total.backward()
    with_gradient = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"embedding", "encoder", "query", "decoder"}
    assert all(p.grad is None for p in tested.parameters())


def test_the_first_guess_takes_no_part_in_a_predicted_latent() -> None:
    model, (view, _) = network(), batch().views
    changed = replace(view, streams=tuple(replace(s, guess=s.guess + 1e3) for s in view.streams))
    with torch.no_grad():
        one, two = (model.predict(model.encode(view), v) for v in (view, changed))
    for name in one:
        assert torch.equal(one[name].last, two[name].last)


def test_a_constant_has_a_ratio_of_one() -> None:
    model, given = network(), batch()
    with torch.no_grad():
        losses = objective(model)(model, given)
    weight = losses.latents[0].weight[..., None]
    target = losses.latents[0].target
    mean = (weight * target).sum(dim=(0, 1)) / weight.sum()
    constant = replace(losses.latents[0], predicted=mean.expand_as(target))
    sums = LatentRatios().sums(given, replace(losses, latents=(constant,)))
    values = LatentRatios().values({"task": sums})
    assert values["latent_ratio/mean"].item() == pytest.approx(1.0, rel=1e-4)
