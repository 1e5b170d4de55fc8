"""The noise of members is a Gaussian field of known covariance, the same however it is cut."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from einops import reduce
from scipy import stats

from atmossl.batch import Batch, TokenGrid, collate_views, detokenise
from atmossl.losses import FIELD_LOSSES, Ensemble, almost_fair_crps
from atmossl.masking.base import make_view
from atmossl.masking.tasks import Forecast
from atmossl.model.multiformer import Multiformer
from atmossl.model.network import EVALUATED_MEMBERS
from atmossl.model.noise import CHANNELS_PER_LENGTH, mixed, noise_field, uniform_of
from atmossl.objectives.masked import MaskedModelling
from tests.synthetic import spec, window

RADIUS_KM = 6371.0
SEEDS = torch.tensor([3, 4])


def grid(lat, lon, hours=(0.0, 6.0), levels=(500.0,)) -> TokenGrid:
    """Two samples at the same places; the second one a day later."""
    rows = {
        "time_hours": torch.tensor([hours, [h + 24 for h in hours]], dtype=torch.float64),
        "level_hpa": torch.tensor([levels, levels]),
        "lat": torch.tensor([list(lat)] * 2),
        "lon": torch.tensor([list(lon)] * 2),
    }
    extent = torch.ones(2)
    return TokenGrid(**rows, time_extent=extent, lat_extent=extent, lon_extent=extent)


def test_hashes_are_those_of_splitmix64() -> None:
    """First outputs of the generator's reference implementation by Vigna, prng.di.unimi.it."""
    outputs = mixed(torch.tensor([1234567, 0])).tolist()
    assert [x % 2**64 for x in outputs] == [6457827717110365317, 16294208416658607535]
    uniform = uniform_of(mixed(torch.arange(20_000))).numpy()
    assert stats.kstest(uniform, "uniform").pvalue > 0.01


def test_covariance_is_the_stated_one() -> None:
    """Of two places, over members and channels, beside exp(-d^2 / 2 l^2) of their distance."""
    here = grid((0.0,), (0.0, 10.0, 40.0), hours=(0.0, 24.0), levels=(500.0, 850.0))
    fields = torch.stack([noise_field(here, SEEDS, m, (3000.0, 800.0)) for m in range(150)])
    fields = fields.unflatten(2, (2, 2, 3)).unflatten(-1, (2, CHANNELS_PER_LENGTH))
    assert float(fields.var()) == pytest.approx(1.0, abs=0.03)
    for number, length in enumerate((3000.0, 800.0)):
        field = fields[..., number, :]
        origin = field[:, :, 0, 0, 0]
        for lon, degrees in ((1, 10.0), (2, 40.0)):
            chord = 2 * RADIUS_KM * np.sin(np.radians(degrees) / 2)
            expected = np.exp(-((chord / length) ** 2) / 2)
            assert float((origin * field[:, :, 0, 0, lon]).mean()) == pytest.approx(
                expected, abs=0.07
            )
        in_time = np.exp(-((24 * 36 / length) ** 2) / 2)
        assert float((origin * field[:, :, 0, 1, 0]).mean()) == pytest.approx(in_time, abs=0.07)
        height = np.exp(-(np.log(850 / 500) ** 2) / 2)
        assert float((origin * field[:, :, 1, 0, 0]).mean()) == pytest.approx(height, abs=0.07)


def test_members_and_seeds_are_independent() -> None:
    here = grid(np.linspace(-80, 80, 9), np.arange(0, 360, 30.0))
    first, second = (noise_field(here, SEEDS, m, (300.0,)) for m in (0, 1))
    assert abs(float((first * second).mean())) < 0.05
    assert abs(float((first[0] * first[1]).mean())) < 0.05


def test_a_tile_has_the_noise_of_the_globe() -> None:
    """The same values at the same places and times, also in another batch and on coarser tokens."""
    lat, lon = np.linspace(-75, 75, 11), np.arange(0, 360, 15.0)
    globe = noise_field(grid(lat, lon), SEEDS, 5, (3000.0, 300.0)).unflatten(1, (2, 11, 24))
    tile = noise_field(grid(lat[3:6], lon[20:], hours=(6.0,)), SEEDS, 5, (3000.0, 300.0))
    torch.testing.assert_close(tile.unflatten(1, (3, 4)), globe[:, 1, 3:6, 20:], atol=1e-4, rtol=0)
    turned = noise_field(grid(lat, lon - 360), SEEDS, 5, (3000.0, 300.0))
    torch.testing.assert_close(turned, globe.flatten(1, 3), atol=1e-4, rtol=0)


STREAM = spec("temperature", variables=("temperature",))


def small_network(*, num_decoder_layers: int, num_members: int) -> Multiformer:
    torch.manual_seed(0)
    return Multiformer(
        streams=(STREAM,), dim=16, num_layers=1, num_decoder_layers=num_decoder_layers,
        num_heads=2, num_members=num_members, ensemble="noise", noise_lengths_km=(2000.0,),
    )  # fmt: skip


def forecast_batch() -> Batch:
    view = make_view((window(STREAM, seed=1),), Forecast(12), np.random.default_rng(0))
    return collate_views([(view,)], [0])


def test_a_member_is_the_same_field_whichever_others_are_drawn() -> None:
    model = small_network(num_decoder_layers=2, num_members=2)
    (view,) = forecast_batch().views
    all_of_them = model(view, members=range(4)).streams[0].members
    torch.testing.assert_close(
        model(view, members=[2]).streams[0].members[:, :, 0], all_of_them[:, :, 2]
    )
    assert not torch.allclose(all_of_them[:, :, 0], all_of_them[:, :, 1])
    assert model(view).streams[0].members.shape[2] == 2
    assert model.eval()(view).streams[0].members.shape[2] == EVALUATED_MEMBERS
    other = replace(view, noise_seed=view.noise_seed + 1)
    assert not torch.allclose(
        model(other, members=[2]).streams[0].members[:, :, 0], all_of_them[:, :, 2]
    )


def areas(field: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted means over 2 x 2 cells [batch value]."""
    pattern = "... (y a) (x b) -> ... y x"
    total = reduce(field * weight, pattern, "sum", a=2, b=2)
    return (total / reduce(weight, pattern, "sum", a=2, b=2)).flatten(1)


@pytest.mark.parametrize("name", sorted(FIELD_LOSSES))
def test_losses_of_fields_train_the_network(name: str) -> None:
    """Finite gradients; and a forecast, which hides whole steps, has the fields that are scored."""
    model = small_network(num_decoder_layers=1, num_members=3)
    windows, batch = (window(STREAM, seed=1),), forecast_batch()
    objective = MaskedModelling(losses={name: 1.0}, latitude_weighted=False)
    losses = objective(model, batch)
    losses.total.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)
    if name == "area_crps_2":  # by hand, on the window that a reader sees
        predicted, (stream,) = losses.prediction.streams[0], batch.views[0].streams
        tokens = stream.target.flatten(1, 4)
        index = predicted.queries.index[..., None].expand(-1, -1, tokens.shape[-1])
        members = [
            detokenise(tokens.scatter(1, index, m).view(stream.target.shape), STREAM)
            for m in predicted.members.unbind(2)
        ]
        hidden = detokenise(stream.hidden[..., None].expand_as(stream.target), STREAM)
        area = windows[0].weight[:, None].expand(windows[0].fields.shape[-2:])
        truth = areas(windows[0].fields[None], area)
        ensemble = Ensemble(torch.stack([areas(m, area) for m in members], dim=1))
        share = areas(hidden.float(), torch.ones_like(area))
        expected = (almost_fair_crps(ensemble, truth) * share).sum() / share.sum()
        torch.testing.assert_close(losses.total, expected, rtol=1e-4, atol=1e-5)
