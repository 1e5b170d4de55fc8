"""Losses against closed forms, torch.distributions and properscoring."""

import numpy as np
import properscoring
import pytest
import torch

from atmossl.losses import (
    LOSSES,
    Ensemble,
    ensemble_mse,
    fair_crps,
    gaussian_nll,
    mean_mse,
    statistical,
    weighted_mean,
)


@pytest.fixture
def ensemble() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    members = torch.randn(5, 6, 7, generator=generator, dtype=torch.float64)
    return members, torch.randn(5, 7, generator=generator, dtype=torch.float64)


def test_fair_crps_is_properscoring_with_the_fair_spread(ensemble) -> None:
    members, target = ensemble
    count = members.shape[1]
    biased = properscoring.crps_ensemble(target.numpy(), members.swapaxes(1, 2).numpy())
    pairs = (members[:, :, None] - members[:, None]).abs().sum((1, 2)).numpy()
    fair = biased + pairs / (2 * count**2) - pairs / (2 * count * (count - 1))
    np.testing.assert_allclose(fair_crps(Ensemble(members), target).numpy(), fair, atol=1e-12)


def test_fair_crps_is_unbiased_in_the_ensemble_size() -> None:
    """Normal ensembles of any size give the Gaussian CRPS, 0.2337 at z = 0."""
    exact = (np.sqrt(2) - 1) / np.sqrt(np.pi)
    for count in (2, 5):
        members = torch.randn(400_000 // count, count, 1, generator=torch.manual_seed(0))
        mean = float(fair_crps(Ensemble(members), torch.zeros(len(members), 1)).mean())
        assert mean == pytest.approx(exact, abs=0.006)


def test_gaussian_nll_is_the_normal_density(ensemble) -> None:
    members, target = ensemble
    normal = torch.distributions.Normal(members.mean(1), members.std(1))
    torch.testing.assert_close(
        gaussian_nll(Ensemble(members), target), -normal.log_prob(target), rtol=1e-4, atol=1e-4
    )


def test_statistical_loss_at_the_mean_and_far_away() -> None:
    members = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)[None]
    std = 2**0.5
    at_mean = float(statistical(Ensemble(members), torch.zeros(1, 1, dtype=torch.float64)))
    far = float(statistical(Ensemble(members), torch.full((1, 1), 1e3, dtype=torch.float64)))
    at_one_std = float(statistical(Ensemble(members), torch.full((1, 1), std, dtype=torch.float64)))
    assert at_mean == pytest.approx(std**0.5, abs=1e-5)
    assert far == pytest.approx(1 + std**0.5, abs=1e-5)
    assert at_one_std == pytest.approx((1 - np.exp(-0.5)) ** 2 + std**0.5, abs=1e-5)


def test_mean_squares_differ_by_the_variance(ensemble) -> None:
    members, target = ensemble
    difference = ensemble_mse(Ensemble(members), target) - mean_mse(Ensemble(members), target)
    torch.testing.assert_close(difference, members.var(1, unbiased=False))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients_are_exact_in_float64(name: str, ensemble) -> None:
    members, target = ensemble
    members = members[:2, :, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](Ensemble(x), target[:2, :2]), members)


@pytest.mark.parametrize("name", ["fair_crps", "statistical", "gaussian_nll"])
def test_the_spread_gets_a_gradient(name: str) -> None:
    members = torch.tensor([[[-0.1], [0.0], [0.1]]], requires_grad=True)
    LOSSES[name](Ensemble(members), torch.full((1, 1), 2.0)).sum().backward()
    assert members.grad is not None
    assert members.grad[0, 0, 0] != members.grad[0, 2, 0]


@pytest.mark.parametrize("name", ["fair_crps", "statistical", "gaussian_nll"])
def test_one_member_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="num_members"):
        LOSSES[name](Ensemble(torch.zeros(1, 1, 1)), torch.zeros(1, 1))


def test_weighted_mean() -> None:
    values, weight = torch.tensor([1.0, 5.0, 9.0]), torch.tensor([1.0, 3.0, 0.0])
    assert float(weighted_mean(values, weight)) == 4.0
    assert float(weighted_mean(values, torch.zeros(3))) == 0.0


def test_crps_is_properscoring() -> None:
    generator = torch.Generator().manual_seed(0)
    members = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    truth = torch.randn(40, generator=generator, dtype=torch.float64)
    expected = properscoring.crps_ensemble(truth.numpy(), members.T.numpy())
    np.testing.assert_allclose(
        LOSSES["crps"](Ensemble(members), truth).numpy(), expected, rtol=1e-10
    )


def test_fixed_members_settle_on_the_quantiles_of_the_truth_under_crps() -> None:
    """Against truths at evenly spaced quantiles of a normal distribution, the gradient is zero
    with the members on its quantiles (i - 1/2) / m, by its inverse distribution function."""
    normal = torch.distributions.Normal(0.0, 1.0)
    truth = normal.icdf((torch.arange(8000, dtype=torch.float64) + 0.5) / 8000)
    members = normal.icdf((torch.arange(8, dtype=torch.float64) + 0.5) / 8).requires_grad_()
    spread_out = members[:, None].expand(8, len(truth))
    LOSSES["crps"](Ensemble(spread_out), truth).mean().backward()
    assert members.grad is not None
    np.testing.assert_allclose(members.grad.numpy(), 0.0, atol=1e-4)
    assert float(members.detach().std()) == pytest.approx(0.986, abs=1e-3)
