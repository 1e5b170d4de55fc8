"""Missing values: marked in the window, told to the model, never in the loss, missing again in the
output. Transforms, static and computed streams beside them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

from atmossl.batch import PRIMARY, StreamSpec, TokenSize, collate_views
from atmossl.data.chunks import Access
from atmossl.data.segment import Segment
from atmossl.data.statistics import compute_statistics
from atmossl.data.store import open_segment
from atmossl.data.variables import Transform
from atmossl.data.windows import Normaliser, Statistics, WindowSize, read_window
from atmossl.inference.cases import predict_fields
from atmossl.inference.checkpoint import TrainedModel, spec_from_dict, spec_to_dict
from atmossl.inference.plan import Options, plan_prediction
from atmossl.masking.base import interpolate_in_time, make_view
from atmossl.masking.random import RandomMasking
from atmossl.masking.tasks import Downscaling, TemporalInterpolation
from atmossl.model.multiformer import Multiformer
from atmossl.objectives.masked import MaskedModelling, hidden_values
from tests.synthetic import dataset

SEA = StreamSpec(
    "sea", ("temperature",), (), TokenSize(1, 2, 2), missing="mask"
)  # stands for a field at the sea surface
LAND = (slice(2, 5), slice(3, 9))  # cells without values, across tokens


def record() -> xr.Dataset:
    store = dataset(steps=12)
    surface = store["temperature"].isel(level=0, drop=True)
    surface[:, LAND[0], LAND[1]] = np.nan
    surface[4, 6, 12] = np.nan  # a gap in time
    return store.assign(temperature=surface)


def opened(store: xr.Dataset | None = None) -> Segment:
    return open_segment(
        "sea",
        record() if store is None else store,
        "memory",
        variables=["temperature"],
        levels=[],
        may_miss=["temperature"],
    )


def model(**changes) -> Multiformer:
    torch.manual_seed(0)
    sizes = {"dim": 16, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "num_members": 2}
    return Multiformer(streams=(replace(SEA, **changes),), **sizes)


def test_windows_mark_what_is_missing() -> None:
    segment = opened()
    statistics = compute_statistics([segment])
    (window,) = read_window(
        segment, (SEA,), Normaliser({PRIMARY: statistics}), 2, 5, segment.whole()
    )
    truth = record()["temperature"].values[2:7]
    assert window.valid is not None
    np.testing.assert_array_equal(window.valid[0, 0], np.isfinite(truth))
    assert torch.isfinite(window.fields).all() and (window.fields[~window.valid] == 0).all()
    with pytest.raises(ValueError, match="missing=mask"):
        strict = replace(SEA, missing="refuse")
        read_window(segment, (strict,), Normaliser({PRIMARY: statistics}), 2, 5, segment.whole())
    assert statistics.missing[0, 0] == pytest.approx(np.isnan(record()["temperature"]).mean())
    assert spec_from_dict(spec_to_dict(SEA)) == SEA


def test_statistics_are_those_of_the_observed_values() -> None:
    statistics = compute_statistics([opened()])
    values = record()["temperature"].values.astype(np.float64)
    weight = opened().grid.weights[:, None] * np.isfinite(values)
    mean = np.nansum(values * weight) / weight.sum()
    assert statistics.mean[0, 0] == pytest.approx(mean, rel=1e-12)
    variance = np.nansum((values - mean) ** 2 * weight) / weight.sum()
    assert statistics.std[0, 0] == pytest.approx(variance**0.5, rel=1e-12)


@pytest.mark.parametrize("sampler", [RandomMasking(rate=(1.0, 1.0)), Downscaling(2)])
def test_missing_values_have_no_weight_in_the_loss(sampler) -> None:
    """Whatever is put at missing places of the target changes neither loss nor gradient."""
    segment = opened()
    normaliser = Normaliser({PRIMARY: compute_statistics([segment])})
    (window,) = read_window(segment, (SEA,), normaliser, 2, 4, segment.whole())
    view = make_view((window,), sampler, np.random.default_rng(0))
    network, results = model(), []
    for value in (0.0, 1e3):
        (tokens,) = view.streams
        target = torch.where(tokens.valid, tokens.target, torch.tensor(value))
        batch = collate_views([(replace(view, streams=(replace(tokens, target=target),)),)], [0])
        _, weight, _ = hidden_values(batch.views[0].streams[0])
        assert (weight == 0).sum() == (~tokens.valid).sum()
        loss = MaskedModelling(losses={"mean_mse": 1.0})(network, batch).total
        network.zero_grad()
        loss.backward()
        results.append([loss, *(p.grad for p in network.parameters() if p.grad is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_encoder_is_told_what_is_missing() -> None:
    """Two windows whose values look the same but differ in what was observed."""
    segment = opened()
    normaliser = Normaliser({PRIMARY: compute_statistics([segment])})
    (window,) = read_window(segment, (SEA,), normaliser, 2, 4, segment.whole())
    nothing = RandomMasking(rate=(0.0, 0.0))
    latents = []
    for valid in (window.valid, torch.ones_like(window.valid)):
        view = make_view(
            (replace(window, valid=valid),), nothing, np.random.default_rng(0), first_guess=False
        )
        batch = collate_views([(view,)], [0])
        latents.append(model().encode(batch.views[0])["sea"].layers[0].features)
    assert not torch.allclose(latents[0], latents[1])
    assert "absent.sea.weight" in model().state_dict()
    assert "absent.sea.weight" not in model(missing="refuse").state_dict()


def test_first_guess_and_coarse_means_skip_missing_values() -> None:
    source = torch.tensor([1.0, 9.0, 3.0]).reshape(1, 1, 3, 1, 1)
    shown = torch.tensor([True, False, True]).reshape(1, 1, 3, 1, 1)
    assert interpolate_in_time(source, shown).flatten().tolist() == [1.0, 2.0, 3.0]
    segment = opened()
    normaliser = Normaliser({PRIMARY: compute_statistics([segment])})
    (window,) = read_window(segment, (SEA,), normaliser, 2, 4, segment.whole())
    (tokens,) = make_view((window,), Downscaling(2), np.random.default_rng(0)).streams
    # one coarse cell per token; the mean of its observed cells, by area
    weight = window.weight.reshape(4, 2, 1, 1)
    fields, valid = (x.reshape(4, 4, 2, 8, 2).float() for x in (window.fields, window.valid))
    area = valid * weight.permute(0, 1, 2, 3)[None]
    means = (fields * area).sum((2, 4)) / area.sum((2, 4))  # [time nlat nlon], NaN where none
    seen = tokens.source[0, ..., 0]
    known = torch.isfinite(means)
    torch.testing.assert_close(seen[known], means[known])
    assert not known.all() and torch.isfinite(seen).all()


@pytest.mark.parametrize("task", [TemporalInterpolation(6), Downscaling(2)])
@pytest.mark.parametrize("fill", [False, True])
def test_what_is_never_observed_is_missing_in_the_output(task, fill: bool) -> None:
    segment = opened()
    trained = TrainedModel(
        model=model(),
        specs=(SEA,),
        normaliser=Normaliser({PRIMARY: compute_statistics([segment])}),
        window=WindowSize(5, 4, 8),
        first_guess=True,
        data="sea",
        checkpoint_record={},
        digest="0",
    )
    options = Options(overlap=0.5, batch_size=4, device="cpu", fill_missing=fill)
    used = plan_prediction(trained, task, [segment], options)
    (fields,) = predict_fields(used, [segment.times[4]])
    missing = np.isnan(fields["temperature"]).all(axis=(0, 1, 2))
    land = np.zeros((8, 16), bool)
    land[LAND] = True
    np.testing.assert_array_equal(missing, np.zeros_like(land) if fill else land)


@pytest.mark.parametrize("kind", ["log", "sqrt"])
def test_transforms_are_inverted_and_enter_statistics(kind: str) -> None:
    transform = Transform(kind, 1e-3)
    store = record().fillna(0.0)
    store["temperature"].values[:] = np.random.default_rng(0).gamma(0.1, 1e-3, (12, 8, 16))
    segment = replace(opened(store), access=Access(input_limits="off"))  # a rain of so many K
    statistics = compute_statistics([segment], {"temperature": transform})
    assert Statistics.from_dict(statistics.to_dict()).transforms == {"temperature": transform}
    normaliser = Normaliser({PRIMARY: statistics})
    (window,) = read_window(segment, (SEA,), normaliser, 0, 12, segment.whole())
    weight = window.weight[:, None].double()
    fields = window.fields.double()
    assert (fields * weight).mean() == pytest.approx(0, abs=1e-6)
    assert (fields**2 * weight).mean() == pytest.approx(1, abs=1e-5)
    back = normaliser.inverse(window.fields, SEA)[0, 0]
    np.testing.assert_allclose(back, store["temperature"].values, rtol=2e-5, atol=1e-9)
    raw = torch.from_numpy(store["temperature"].values[None, None])
    torch.testing.assert_close(normaliser.forward(raw, SEA), window.fields, rtol=1e-6, atol=1e-6)


def test_static_and_computed_variables_are_streams() -> None:
    store = dataset(steps=12)
    height = store["temperature"].isel(time=0, level=0, drop=True)
    store = store.assign(u_component_of_wind=height.drop_attrs())  # a field without time
    names = ("u_component_of_wind", "sin_latitude", "toa_incident_solar_radiation")
    segment = open_segment("static", store, "memory", variables=names, levels=[])
    statistics = compute_statistics([segment])
    static = StreamSpec("static", names, (), TokenSize(1, 2, 2), role="static")
    assert torch.isfinite(statistics.residual_scale(static)).all()
    normaliser = Normaliser({PRIMARY: statistics})
    (window,) = read_window(segment, (static,), normaliser, 3, 4, segment.whole())
    values = normaliser.inverse(window.fields, static)
    np.testing.assert_allclose(values[0, 0], np.stack([height.values] * 4), atol=1e-5)
    expected = np.sin(np.deg2rad(store["latitude"].values))[:, None]
    np.testing.assert_allclose(values[1, 0, 0], np.broadcast_to(expected, (8, 16)), atol=1e-6)
    assert values[2].min() >= -1e3 and values[2].std(dim=1).max() > 0  # the sun moves
