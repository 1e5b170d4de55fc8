"""The distance of states in a network's latents: a loss with gradients, and a score of datasets."""

import math

import numpy as np
import pytest
import torch

import atmossl
from atmossl.batch import View, collate_views
from atmossl.masking.base import hide_nothing, make_view
from atmossl.model.latent_distance import latent_distance
from atmossl.model.multiformer import Multiformer
from tests.synthetic import spec, window

STREAM = spec()


def network() -> Multiformer:
    torch.manual_seed(0)
    return Multiformer(
        streams=(STREAM,), dim=16, num_layers=1, num_decoder_layers=1, num_heads=2, num_members=2
    ).requires_grad_(False)


def state(*seeds: int) -> View:
    rng = np.random.default_rng(0)
    views = [(make_view((window(STREAM, seed=seed),), hide_nothing, rng),) for seed in seeds]
    return collate_views(views, list(seeds)).views[0]


def test_equal_states_have_no_distance_and_others_that_of_their_normalised_latents() -> None:
    """In float64, token by token, by area."""
    model, first, second = network(), state(0, 1, 2), state(0, 5, 1)
    found = atmossl.distance(model, first, second)
    one, two = (model.encode(view)["air"] for view in (first, second))
    weight = one.areas().double()
    normal = []
    for latents in (one, two):
        x = latents.last.double()
        deviation = (x.var(dim=-1, correction=0, keepdim=True) + 1e-5).sqrt()
        normal.append((x - x.mean(dim=-1, keepdim=True)) / deviation)
    square = ((normal[0] - normal[1]) ** 2).mean(dim=-1)
    expected = ((weight * square).sum(dim=1) / weight.sum(dim=1)).sqrt()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert found[0] == 0 < found[1] < 2
    assert torch.equal(latent_distance({"air": one}, {"air": two}), found)


def test_it_pulls_a_state_towards_another_and_is_still_where_they_are_equal() -> None:
    model, target = network(), state(0, 1)
    moving = state(0, 7)
    (stream,) = moving.streams
    source = stream.source.clone().requires_grad_()
    view = View((type(stream)(**{**vars(stream), "source": source}),))
    before = atmossl.distance(model, view, target)
    before.sum().backward()
    gradient = source.grad
    assert gradient is not None and torch.isfinite(gradient).all()
    assert gradient[0].abs().max() == 0 < gradient[1].abs().max()
    with torch.no_grad():
        step = 0.05 * gradient / gradient.norm() * math.sqrt(gradient.numel())
        closer = View((type(stream)(**{**vars(stream), "source": source - step}),))
        assert atmossl.distance(model, closer, target)[1] < before[1]


def test_a_score_of_two_datasets_over_time() -> None:
    from tests.inference.test_embed import ONE, STORE, model

    tested = model(ONE, 8, 0)
    times = STORE["time"].values[[5, 8]]
    with pytest.raises(ValueError, match="did not learn to distance|not learn to"):
        tested.distance(STORE, STORE, times)
    known = tested.trained.provides | {"distance"}
    object.__setattr__(tested.trained, "provides", frozenset(known))
    same = tested.distance(STORE, STORE, times)
    assert same.dims == ("init_time",) and same.name == "distance"
    np.testing.assert_array_equal(same["init_time"], times)
    np.testing.assert_allclose(same, 0.0)
    later = tested.distance(STORE, STORE, times, STORE["time"].values[[6, 9]])
    assert (later > 0).all() and later.sizes == {"init_time": 2}
    with pytest.raises(ValueError, match="needed: one grid, and as many times"):
        tested.distance(STORE, STORE, times, STORE["time"].values[[6]])
