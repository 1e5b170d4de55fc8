"""Spread inflation against an ensemble whose lack of spread is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from atmossl.inference.calibration import SpreadInflation, estimate_inflation, with_inflation
from atmossl.masking.tasks import Forecast, TemporalInterpolation
from tests.inference.known import Known, predictor


class Overconfident(nn.Module):
    """The truth plus noise, in members that are spread a third of what they err."""

    def forward(self, view):
        generator = torch.Generator().manual_seed(int(view.streams[0].grid.time_hours[0, 0]))

        def noisy(stream):
            shared = torch.randn(stream.target.shape, generator=generator)
            return stream.target + 0.3 * shared

        return Known(noisy, tuple(0.1 * np.linspace(-1.5, 1.5, 6))).forward(view)


def test_inflation_brings_spread_to_error() -> None:
    used = predictor(
        TemporalInterpolation(6), Overconfident(), window=(5, 8, 16), overlap=0.0, batch_size=1
    )
    times = used.possible_times()
    found = estimate_inflation(used, times)
    variance = np.var(0.1 * np.linspace(-1.5, 1.5, 6), ddof=1) * 7 / 6
    expected = 0.3 / np.sqrt(variance)
    for factors in found.factors.values():
        assert factors.shape == (1, 3)  # step level
        np.testing.assert_allclose(factors, expected, rtol=0.1)  # of 8 times 128 cells
    record = with_inflation({"kept": 1}, "TemporalInterpolation", found)
    assert record["kept"] == 1
    trained = replace(used.trained, record=record)
    again = estimate_inflation(replace(used, trained=trained), times)
    for factors in again.factors.values():
        np.testing.assert_allclose(factors, 1.0, atol=1e-4)
    free = estimate_inflation(replace(used, trained=trained, calibrated=False), times)
    np.testing.assert_allclose(free.factors["temperature"], found.factors["temperature"])
    assert SpreadInflation.of(record, "Forecast") is None


def test_factors_are_linear_between_lead_times_and_keep_the_mean() -> None:
    factors = {"temperature": np.array([[1.0, 2.0], [3.0, 2.0]])}
    inflation = SpreadInflation(np.array([6.0, 12.0]), factors)
    fields = np.random.default_rng(0).standard_normal((4, 5, 2, 3, 4)).astype(np.float32)
    hours = np.array([3.0, 6.0, 9.0, 24.0])
    found = inflation.apply({"temperature": fields}, hours)["temperature"]
    np.testing.assert_allclose(found.mean(axis=1), fields.mean(axis=1), atol=1e-6)
    ratio = found.std(axis=1) / fields.std(axis=1)  # [step level lat lon]
    expected = [[1, 2], [1, 2], [2, 2], [3, 2]]
    np.testing.assert_allclose(ratio.mean(axis=(2, 3)), expected, rtol=1e-5)


def test_one_member_has_no_spread() -> None:
    used = predictor(Forecast(6), Known(lambda stream: stream.guess, (0.0,)))
    with pytest.raises(ValueError, match="one member"):
        estimate_inflation(used, used.possible_times()[:1])
