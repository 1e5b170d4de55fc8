"""Losses of latents against closed forms, and against the libraries that define them."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate

from atmossl import latent_losses as L


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [2, 5, 16])
def test_nt_xent_of_equal_latents_is_that_of_guessing(n):
    same = torch.ones(n, 8)
    assert float(L.nt_xent(same, same)) == pytest.approx(math.log(2 * n - 1), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_nt_xent_of_matched_pairs_that_are_otherwise_orthogonal(temperature):
    n = 6
    pairs = torch.eye(n) * 3.0
    expected = math.log(1 + (2 * n - 2) * math.exp(-1 / temperature))
    loss = L.nt_xent(pairs, pairs, temperature=temperature)
    assert float(loss) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_nt_xent_leaves_out_what_is_no_negative():
    first, second = normal(3, 4), normal(3, 4, seed=1)
    related = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    loss = L.nt_xent(first, second, temperature=0.7, no_negatives=related)
    z = torch.nn.functional.normalize(torch.cat([first, second]), dim=-1).double()
    terms = []
    for i in range(6):
        partner = (i + 3) % 6
        others = [j for j in range(6) if j != i and (j == partner or not related[i % 3, j % 3])]
        scores = torch.stack([z[i] @ z[j] / 0.7 for j in others])
        terms.append(scores.logsumexp(0) - z[i] @ z[partner] / 0.7)
    assert float(loss) == pytest.approx(float(torch.stack(terms).mean()), rel=1e-5)


def test_vicreg_of_a_constant_costs_the_variance_alone():
    same = torch.full((8, 5), 3.0)
    assert float(L.vicreg(same, same)) == pytest.approx(25 * (1 - math.sqrt(1e-4)), rel=1e-6)


def test_vicreg_is_its_definition():
    first, second = normal(32, 6).double(), normal(32, 6, seed=1).double()
    expected = 25 * float(((first - second) ** 2).mean())
    for view in (first.numpy(), second.numpy()):
        cov = np.cov(view.T)
        deviation = np.sqrt(np.diag(cov) + 1e-4)
        expected += 25 * np.maximum(0, 1 - deviation).mean() / 2
        expected += (cov**2).sum() / 6 - (np.diag(cov) ** 2).sum() / 6
    assert float(L.vicreg(first, second)) == pytest.approx(expected, rel=1e-9)


def test_barlow_twins_of_rank_one_costs_all_correlations():
    column = normal(16, 1)
    rank_one = column.repeat(1, 7)
    assert float(L.barlow_twins(rank_one, rank_one)) == pytest.approx(5e-3 * 7 * 6, rel=1e-4)


def test_barlow_twins_is_its_definition():
    first, second = normal(64, 5).double(), normal(64, 5, seed=3).double()
    correlation = np.corrcoef(first.numpy().T, second.numpy().T)[:5, 5:]
    off = (correlation**2).sum() - (np.diag(correlation) ** 2).sum()
    expected = ((1 - np.diag(correlation)) ** 2).sum() + 5e-3 * off
    assert float(L.barlow_twins(first, second)) == pytest.approx(expected, rel=1e-8)


def test_simsiam_is_minus_the_cosine_and_its_target_gets_no_gradient():
    predicted, target = normal(4, 8).requires_grad_(), normal(4, 8, seed=1).requires_grad_()
    same = target.detach()
    assert float(L.simsiam(2 * same, same)) == pytest.approx(-1, abs=1e-6)
    assert float(L.simsiam(torch.eye(4)[:2], torch.eye(4)[2:])) == pytest.approx(0, abs=1e-7)
    L.simsiam(predicted, target).backward()
    assert target.grad is None and predicted.grad is not None


def test_distillation_of_equal_logits_and_of_equal_distributions():
    k = 12
    teacher = torch.softmax(normal(5, k), dim=-1)
    assert float(L.distillation(torch.zeros(5, k), teacher)) == pytest.approx(math.log(k), rel=1e-6)
    entropy = float(-(teacher * teacher.log()).sum(dim=-1).mean())
    logits = teacher.log() * 0.1  # the temperature takes it back
    assert float(L.distillation(logits, teacher)) == pytest.approx(entropy, rel=1e-5)


def test_sinkhorn_uses_prototypes_equally_and_never_overflows():
    logits = normal(64, 4, seed=2)
    probabilities = L.sinkhorn(0.1 * logits, iterations=200)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(64))
    torch.testing.assert_close(probabilities.sum(dim=0), torch.full((4,), 16.0), atol=1e-3, rtol=0)
    assert torch.isfinite(L.sinkhorn(1e4 * logits)).all()


def test_koleo_of_orthonormal_latents():
    assert float(L.koleo(torch.eye(6) * 4)) == pytest.approx(-math.log(2) / 2, rel=1e-6)


def test_sigreg_is_the_integral_of_the_squared_distance_of_characteristic_functions():
    x = normal(40, 1).double()
    values = x[:, 0].numpy()

    def integrand(t):
        empirical = np.exp(1j * t * values).mean()
        return abs(empirical - math.exp(-(t**2) / 2)) ** 2 * math.exp(-(t**2) / 2)

    exact, _ = integrate.quad(integrand, -np.inf, np.inf)
    direction = torch.tensor([[3.0]]).double()
    assert float(L.sigreg(x, direction)) == pytest.approx(40 * exact, rel=1e-5)


def test_sigreg_grows_where_latents_collapse():
    directions = normal(8, 64, seed=5)
    spread = float(L.sigreg(normal(512, 8), directions))
    assert float(L.sigreg(normal(512, 1).expand(512, 8) * 1.0, directions)) > 10 * spread
    assert float(L.sigreg(torch.zeros(512, 8), directions)) > 10 * spread


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rankme_counts_equal_singular_values(rank):
    basis = torch.linalg.qr(normal(20, 8))[0]
    latents = basis[:, :rank] @ torch.linalg.qr(normal(8, 8, seed=4))[0][:rank]
    assert float(L.rankme(latents)) == pytest.approx(rank, rel=1e-4)


def test_lidar_ignores_what_differs_between_views_of_one_sample():
    samples, views, size = 200, 8, 6
    signal = torch.zeros(samples, 1, size)
    signal[..., :2] = normal(samples, 1, 2)  # two features tell samples apart
    noise = normal(samples, views, size, seed=1)  # all others only views
    rank = float(L.lidar(100 * signal + noise))
    assert rank == pytest.approx(2, abs=0.1)


def test_alignment_and_uniformity_of_known_latents():
    assert float(L.alignment(torch.eye(4), 2 * torch.eye(4))) == pytest.approx(0, abs=1e-7)
    swapped = torch.eye(4)[[1, 0, 3, 2]]
    assert float(L.alignment(torch.eye(4), swapped)) == pytest.approx(2, rel=1e-6)
    assert float(L.uniformity(torch.ones(5, 3))) == pytest.approx(0, abs=1e-6)
    assert float(L.uniformity(torch.eye(5))) == pytest.approx(-4, rel=1e-6)
