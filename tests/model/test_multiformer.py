"""The network obeys the mask, and does not care how samples are batched."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from atmossl.batch import Batch, collate_views, detokenise
from atmossl.masking.base import make_view
from atmossl.masking.random import RandomMasking
from atmossl.masking.tasks import Forecast
from atmossl.model.multiformer import Multiformer
from atmossl.objectives.masked import MaskedModelling
from tests.synthetic import spec, window

STREAMS = (
    spec("temperature", variables=("temperature",)),
    spec("wind", variables=("u_component_of_wind",), token=(2, 4, 4)),
    spec("humidity", variables=("specific_humidity",), role="input"),
)


VARIANTS = (
    {},
    {"attention": "factorised", "kernel_size": 3, "num_decoder_layers": 3},
    {"ensemble": "noise", "noise_lengths_km": (2000.0, 500.0)},
    {"attention": "windowed", "attention_window": (2, 2, 3), "dims": {"wind": 24}},
)


def network(**changes) -> Multiformer:
    torch.manual_seed(0)
    sizes = {"dim": 16, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2, "num_members": 3}
    sizes |= {"embedding_stencil": (1, 3, 3), "gradient_features": True}
    return Multiformer(streams=STREAMS, **(sizes | changes))


def view(sampler, seed: int = 0, **sizes):
    windows = tuple(window(s, seed=seed + n, **sizes) for n, s in enumerate(STREAMS))
    return (make_view(windows, sampler, np.random.default_rng(seed)),)


def batch(*views) -> Batch:
    return collate_views(list(views), list(range(len(views))))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant: dict) -> None:
    model = network(**variant)
    with torch.no_grad():  # away from the start, where coupling is still shut
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    objective = MaskedModelling(losses={"fair_crps": 1.0})
    sampler = RandomMasking((0.5, 0.5), {"mask": 0.4, "coarsen": 0.3, "noise": 0.3})
    objective(model, batch(view(sampler), view(sampler, 5))).total.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    idle = ("encoder.1.humidity",)  # the last layer of a context stream is read by nobody
    assert [name for name in without if not name.startswith(idle)] == []


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "sampler",
    [RandomMasking((0.6, 0.6)), RandomMasking((0.6, 0.6), {"drop": 1.0}), Forecast(12)],
)
def test_hidden_values_never_change_a_prediction(sampler, variant: dict) -> None:
    model = network(**variant).eval()
    windows = tuple(window(s, seed=n) for n, s in enumerate(STREAMS))
    (first,) = batch((make_view(windows, sampler, np.random.default_rng(0)),)).views
    changed = []
    for here, stream in zip(windows, first.streams, strict=True):
        hidden = detokenise(stream.hidden[0][..., None].expand_as(stream.target[0]), here.spec)
        changed.append(replace(here, fields=torch.where(hidden, 1e4, here.fields)))
    (second,) = batch((make_view(tuple(changed), sampler, np.random.default_rng(0)),)).views
    for one, two in zip(model(first).streams, model(second).streams, strict=True):
        assert torch.equal(one.members, two.members)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["mask", "drop"])
def test_padding_changes_nothing(kind: str, variant: dict) -> None:
    """Samples with few and many hidden tokens predict the same alone and together."""
    model = network(**variant).eval()
    few = view(RandomMasking((0.2, 0.2), {kind: 1.0}), 1)
    many = view(RandomMasking((0.8, 0.8), {kind: 1.0}), 2)
    together = model(batch(few, many).views[0])
    for row, alone in enumerate((few, many)):
        single = model(batch(alone).views[0])
        for one, both in zip(single.streams, together.streams, strict=True):
            valid = one.queries.valid[0]
            count = int(valid.sum())
            torch.testing.assert_close(
                both.members[row, :count], one.members[0, valid], rtol=1e-4, atol=1e-4
            )


def test_another_window_shape_can_be_fed() -> None:
    model = network().eval()
    prediction = model(batch(view(Forecast(12), time=6, lat=4, lon=32)).views[0])
    assert prediction.streams[0].members.shape == (1, 3 * 2 * 2 * 8, 3, 8)


def test_time_of_year_and_place_matter() -> None:
    model = network().eval()
    (here,) = batch(view(Forecast(12))).views
    moved = replace(
        here,
        streams=tuple(
            replace(s, grid=replace(s.grid, time_hours=s.grid.time_hours + 4380))
            for s in here.streams
        ),
    )
    one, two = (model(v).streams[0].members for v in (here, moved))
    assert not torch.allclose(one, two)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "num_heads"),
        ({"kernel_size": 2}, "kernel_size"),
        ({"embedding_stencil": (1, 2, 3)}, "embedding_stencil"),
        ({"dims": {"ozone": 16}}, "ozone"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(**changes)
