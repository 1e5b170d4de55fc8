"""No prediction depends on what is hidden from it, the first guess included: gradients are 0."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from atmossl.batch import Prediction, StreamSpec, StreamWindow, View, collate_views
from atmossl.masking.base import FirstGuess, MaskingSampler, make_view
from atmossl.masking.random import Autoregression, RandomMasking, SplitBrain, TimeBlockMasking
from atmossl.masking.tasks import Forecast
from atmossl.model.blocks import Attention
from atmossl.model.multiformer import Multiformer
from tests.synthetic import spec, window

STREAMS = (spec("air", token=(1, 4, 4)), spec("wind", variables=("u_component_of_wind",)))


def network(
    streams: Sequence[StreamSpec] = STREAMS,
    *,
    attention: Attention = "factorised",
    causal: bool = False,
) -> Multiformer:
    """Every part that mixes tokens; couplings that begin as nothing are drawn at random."""
    torch.manual_seed(0)
    model = Multiformer(
        streams=tuple(streams), dim=32, num_layers=2, num_decoder_layers=2, num_heads=2,
        num_members=2, feedforward_ratio=1.0, attention=attention, kernel_size=3,
        embedding_stencil=(3, 3, 3), gradient_features=True, causal=causal,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() == 0:
                parameter.normal_(std=0.1)
    return model.eval()


def seen(
    windows: Sequence[StreamWindow], sampler: MaskingSampler, first_guess: FirstGuess, seed: int = 0
) -> View:
    rng = np.random.default_rng(seed)
    view = make_view(tuple(windows), sampler, rng, first_guess=first_guess)
    return collate_views([(view,)], [0]).views[0]


def windows_with_gradient(num_times: int = 4, seed: int = 0) -> list[StreamWindow]:
    made = [window(s, time=num_times, seed=seed + n) for n, s in enumerate(STREAMS)]
    return [replace(w, fields=w.fields.clone().requires_grad_()) for w in made]


def gradients(chosen: Tensor, windows: Sequence[StreamWindow]) -> list[Tensor]:
    """Of a sum of predicted values to all fields, 0 where they take no part."""
    found = torch.autograd.grad(
        chosen.sum(), [w.fields for w in windows], retain_graph=True, allow_unused=True
    )
    return [
        torch.zeros_like(w.fields) if g is None else g for g, w in zip(found, windows, strict=True)
    ]


def members_at(prediction: Prediction, view: View, stream: int, steps: Sequence[int]) -> Tensor:
    """Predicted values of the hidden tokens at these steps."""
    members, queries = prediction.streams[stream].members, prediction.streams[stream].queries
    _, num_times, num_lat, num_lon = view.streams[stream].grid.shape
    step = queries.index // (num_lat * num_lon) % num_times
    chosen = torch.isin(step, torch.tensor(steps)) & queries.valid
    assert chosen.any()
    return members[chosen]


GUESSES: list[FirstGuess] = [True, False]


@pytest.mark.parametrize("first_guess", GUESSES)
def test_a_half_of_the_streams_is_predicted_from_the_other_alone(first_guess: FirstGuess) -> None:
    model, hidden = network(), set()
    for seed in range(8):
        windows = windows_with_gradient()
        view = seen(windows, SplitBrain(), first_guess, seed)
        half = [int(s.hidden.any()) for s in view.streams].index(1)
        assert view.streams[half].hidden.all() and not view.streams[1 - half].hidden.any()
        if half in hidden:
            continue
        hidden.add(half)
        found = gradients(members_at(model(view), view, half, range(4)), windows)
        assert found[half].abs().max() == 0 and found[1 - half].abs().max() > 0
    assert hidden == {0, 1}
    with pytest.raises(ValueError, match="masking.first=\\[air,wind\\] must name some"):
        seen(windows_with_gradient(), SplitBrain(("air", "wind")), True)


def test_a_guess_from_the_surroundings_shows_nothing_of_the_hidden_half() -> None:
    model, windows = network(), [window(s, seed=n) for n, s in enumerate(STREAMS)]
    view = seen(windows, SplitBrain(), "surroundings")
    half = [int(s.hidden.any()) for s in view.streams].index(1)
    others = [replace(w, fields=w.fields + 1e3 * (n == half)) for n, w in enumerate(windows)]
    with torch.no_grad():
        one, two = (model(seen(w, SplitBrain(), "surroundings")) for w in (windows, others))
    assert torch.equal(one.streams[half].members, two.streams[half].members)


@pytest.mark.parametrize("first_guess", GUESSES)
def test_hidden_last_steps_are_predicted_from_the_steps_before_alone(
    first_guess: FirstGuess,
) -> None:
    model, windows = network(), windows_with_gradient()
    view = seen(windows, TimeBlockMasking((2, 2), causal=True), first_guess)
    for stream in (0, 1):
        found = gradients(members_at(model(view), view, stream, (2, 3)), windows)
        assert all(g[..., 2:, :, :].abs().max() == 0 for g in found)
        assert all(g[..., :2, :, :].abs().max() > 0 for g in found)


def test_an_encoder_of_visible_tokens_is_blind_to_the_others_bit_by_bit() -> None:
    """Latents, and predictions too where the first guess tells nothing."""
    model, sampler = network(), RandomMasking((0.75, 0.75), {"drop": 1.0})
    windows = [window(s, seed=n) for n, s in enumerate(STREAMS)]
    hidden = [s.hidden for s in seen(windows, sampler, True).streams]
    others = []
    for made, tokens in zip(windows, hidden, strict=True):
        size, points = made.spec.token_size, tokens[0]
        for axis, count in enumerate((size.level, size.time, size.lat, size.lon)):
            points = points.repeat_interleave(count, dim=axis)
        others.append(replace(made, fields=torch.where(points, 1e3, made.fields)))
    with torch.no_grad():
        one, two = (seen(w, sampler, True) for w in (windows, others))
        for name, latents in model.encode(one).items():
            changed = model.encode(two)[name]
            assert latents.chosen.index.shape[1] == round(0.25 * hidden[0][0].numel()) or (
                name != "air"
            )
            assert all(
                torch.equal(a.features, b.features)
                for a, b in zip(latents.layers, changed.layers, strict=True)
            )
        for a, b in zip(model(one).streams, model(two).streams, strict=True):
            assert torch.equal(a.members, b.members)


@pytest.mark.parametrize("attention", ["full", "factorised", "temporal"])
def test_every_step_is_predicted_from_those_before_it_in_one_pass(attention: Attention) -> None:
    model, windows = network(attention=attention, causal=True), windows_with_gradient()
    view = seen(windows, Autoregression(), True)
    prediction = model(view)
    for step in (1, 2, 3):
        for stream in (0, 1):
            found = gradients(members_at(prediction, view, stream, [step]), windows)
            assert all(g[..., step:, :, :].abs().max() == 0 for g in found)
            for earlier in range(step):
                assert all(g[..., earlier, :, :].abs().max() > 0 for g in found)


@pytest.mark.parametrize("attention", ["full", "factorised", "temporal"])
def test_one_pass_is_step_by_step(attention: Attention) -> None:
    """Each step as the forecast of a window that ends with it."""
    model = network(attention=attention, causal=True)
    windows = [window(s, seed=n) for n, s in enumerate(STREAMS)]
    with torch.no_grad():
        view = seen(windows, Autoregression(), True)
        together = model(view)
        for step in (1, 2, 3):
            cut = [
                replace(w, fields=w.fields[..., : step + 1, :, :],
                        time_hours=w.time_hours[: step + 1])
                for w in windows
            ]  # fmt: skip
            shorter = seen(cut, Forecast(lead_hours=6.0), True)
            alone = model(shorter)
            for stream in (0, 1):
                torch.testing.assert_close(
                    members_at(together, view, stream, [step]),
                    members_at(alone, shorter, stream, [step]),
                    rtol=1e-4,
                    atol=1e-5,
                )


def test_a_causal_network_refuses_what_it_cannot_order() -> None:
    with pytest.raises(ValueError, match="model.attention=windowed, which sees later steps"):
        network(attention="windowed", causal=True)
    unequal = (STREAMS[0], spec("wind", variables=("u_component_of_wind",), token=(2, 4, 4)))
    with pytest.raises(ValueError, match="token_size.time is {air: 1, wind: 2}"):
        network(unequal, causal=True)


def test_an_encoder_is_told_what_it_is_to_be_told() -> None:
    """The same air at another place and date has the same latents, if neither is told."""
    torch.manual_seed(0)
    single = spec("air", token=(1, 4, 4))
    model = Multiformer(
        streams=(single,), dim=16, num_layers=1, num_decoder_layers=1, num_heads=2, num_members=2,
        told=[],
    ).eval()  # fmt: skip
    here = window(single, lat=4)
    there = replace(here, lat=here.lat + 20.0, lon=here.lon + 90.0, time_hours=here.time_hours + 99)
    nothing = RandomMasking((0.0, 0.0))
    with torch.no_grad():
        one, two = (model.encode(seen([w], nothing, True))["air"].last for w in (here, there))
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
        model.told[:] = 1.0
        one, two = (model.encode(seen([w], nothing, True))["air"].last for w in (here, there))
        assert (one - two).abs().max() > 0.1
        blind = model.without_position()
        first, second = (blind.encode(seen([w], nothing, True))["air"].last for w in (here, there))
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)
        again = model.encode(seen([here], nothing, True))["air"].last  # which is told as before
        torch.testing.assert_close(again, one, rtol=0, atol=0)
