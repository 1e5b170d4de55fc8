"""Fields trained apart predict the same when coupled; a token that grows keeps what it knew."""

import numpy as np
import pytest
import torch

from atmossl.batch import StreamSpec, collate_views
from atmossl.masking.base import make_view
from atmossl.masking.tasks import Forecast
from atmossl.model.multiformer import Multiformer
from atmossl.training.warm_start import patch_index, renamed, warm_start
from tests.synthetic import spec, window

AIR = spec("air", variables=("temperature",))
WIND = spec("wind", variables=("u_component_of_wind",))
SIZES = {"dim": 16, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2, "num_members": 3}
SIZES |= {"embedding_stencil": (3, 1, 3), "gradient_features": True}


def network(*streams: StreamSpec, seed: int = 0) -> Multiformer:
    torch.manual_seed(seed)
    model = Multiformer(streams=streams, **SIZES).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "coupling" not in name:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


def members(model: Multiformer, windows: tuple) -> dict[str, torch.Tensor]:
    view = make_view(windows, Forecast(12), np.random.default_rng(0))
    (view,) = collate_views([(view,)], [0]).views
    with torch.no_grad():
        found = model(view).streams
    return {w.spec.name: one.members for w, one in zip(windows, found, strict=True)}


def test_fields_trained_apart_predict_the_same_when_coupled() -> None:
    apart = [network(AIR, seed=1), network(WIND, seed=2)]
    coupled = network(AIR, WIND, seed=3)
    sources = [
        renamed(s.name, [s], dict(model.named_parameters()), {})
        for s, model in zip((AIR, WIND), apart, strict=True)
    ]
    report = warm_start(coupled, (AIR, WIND), sources)
    assert report.initialised and all(".coupling." in name for name in report.initialised)
    assert not report.grown and not report.left
    windows = (window(AIR, seed=4), window(WIND, seed=5))
    together = members(coupled, windows)
    for model, here in zip(apart, windows, strict=True):
        alone = members(model, (here,))[here.spec.name]
        torch.testing.assert_close(together[here.spec.name], alone, rtol=1e-5, atol=1e-6)


def test_a_token_with_a_new_variable_predicts_the_old_ones_as_before() -> None:
    both = spec("air", variables=("u_component_of_wind", "temperature"))
    old, grown = network(AIR, seed=1), network(both, seed=2)
    report = warm_start(grown, (both,), [renamed("old", [AIR], dict(old.named_parameters()), {})])
    assert not report.initialised and not report.left
    assert {name.split(".")[0] for name in report.grown} == {"embedding", "query", "tail"}
    wide = window(both, seed=3)
    narrow = window(AIR)
    narrow = type(narrow)(**{**vars(narrow), "fields": wide.fields[1:]})
    expected, found = members(old, (narrow,))["air"], members(grown, (wide,))["air"]
    torch.testing.assert_close(found[..., AIR.patch :], expected, rtol=1e-5, atol=1e-6)


def test_levels_of_a_token_are_matched_by_pressure() -> None:
    old = StreamSpec("air", ("temperature",), (300, 850), type(AIR.token_size)(1, 1, 1, level=2))
    new = StreamSpec(
        "air", ("temperature",), (300, 500, 850), type(AIR.token_size)(1, 1, 1, level=3)
    )
    assert patch_index(old, new) == [0, None, 1]


def test_a_stream_of_another_name_is_renamed() -> None:
    old, new = network(AIR, seed=1), network(spec("t", variables=("temperature",)), seed=2)
    source = renamed("old", [AIR], dict(old.named_parameters()), {"air": "t"})
    assert not warm_start(new, (spec("t", variables=("temperature",)),), [source]).initialised
    with pytest.raises(ValueError, match=r"warm_start\.rename.*ozone.*air"):
        renamed("old", [AIR], dict(old.named_parameters()), {"ozone": "t"})


def test_a_model_without_a_common_stream_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no weight of old.*air.*wind"):
        source = renamed("old", [AIR], dict(network(AIR).named_parameters()), {})
        warm_start(network(WIND), (WIND,), [source])


def test_other_widths_are_initialised_and_named() -> None:
    torch.manual_seed(0)
    wider = Multiformer(streams=(AIR,), **(SIZES | {"num_members": 5}))
    source = renamed("old", [AIR], dict(network(AIR).named_parameters()), {})
    report = warm_start(wider, (AIR,), [source])
    assert report.initialised == ["tail.air.project.bias", "tail.air.project.weight"]
    assert report.left == ["old: tail.air.project.bias", "old: tail.air.project.weight"]


@pytest.mark.parametrize("variables", [AIR.variables, ("u_component_of_wind", "temperature")])
def test_a_network_of_noise_starts_as_the_mean_of_the_trained_members(variables) -> None:
    """Without noise's gains and shifts every draw is the ensemble mean of the trained tail."""
    target, old = spec("air", variables=variables), network(AIR, seed=1)
    torch.manual_seed(2)
    noise = Multiformer(streams=(target,), **SIZES, ensemble="noise", noise_lengths_km=(1000.0,))
    report = warm_start(noise, (target,), [renamed("old", [AIR], dict(old.named_parameters()), {})])
    assert all(".modulation." in name for name in report.initialised) and not report.left
    with torch.no_grad():
        for name, parameter in noise.named_parameters():
            if ".modulation." in name:
                parameter.zero_()
    wide, narrow = window(target, seed=3), window(AIR)
    narrow = type(narrow)(**{**vars(narrow), "fields": wide.fields[-1:]})
    expected = members(old, (narrow,))["air"].mean(dim=2, keepdim=True)
    found = members(noise, (wide,))["air"][..., -AIR.patch :]
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-5, atol=1e-6)
