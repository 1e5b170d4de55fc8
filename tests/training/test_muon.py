"""Muon against the singular value decomposition, its AdamW half against torch's."""

import pytest
import torch
from torch import nn

from atmossl.training.muon import Muon, orthogonalise

COMMON = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_the_iteration_keeps_the_singular_vectors_and_levels_the_values(shape) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    matrix = u @ torch.diag(s + 0.1 * s.max()) @ vh  # small values take more steps
    values = u.mT @ orthogonalise(matrix) @ vh.mT
    diagonal = values.diagonal()
    assert ((diagonal > 0.6) & (diagonal < 1.3)).all()
    torch.testing.assert_close(values, torch.diag(diagonal), atol=1e-9, rtol=0)


def test_half_precision_steps_stay_near_the_exact_ones() -> None:
    matrix = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    exact = orthogonalise(matrix.double())
    rough = orthogonalise(matrix)
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() < 0.05 * exact.norm()


def test_the_rest_takes_the_steps_of_adamw() -> None:
    one, two = (nn.Parameter(torch.ones(3, 4, dtype=torch.float64)) for _ in range(2))
    reference = torch.optim.AdamW([one], **COMMON)
    tested = Muon([{"params": [two]}], **COMMON)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        gradient = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        one.grad, two.grad = gradient.clone(), gradient.clone()
        reference.step()
        tested.step()
    torch.testing.assert_close(one, two)


def test_a_step_has_the_size_that_one_learning_rate_for_both_needs() -> None:
    """RMS of a step 0.2 times the learning rate, as AdamW's usually is (Liu et al. 2025)."""
    parameter = nn.Parameter(torch.zeros(16, 64))
    optimizer = Muon([{"params": [parameter], "muon": True}], **(COMMON | {"weight_decay": 0.0}))
    parameter.grad = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    optimizer.step()
    rms = float(parameter.detach().square().mean().sqrt())
    assert 0.7 < rms / (0.2 * 0.01) < 1.3


@pytest.mark.parametrize("kind", [True, False])
def test_a_restored_state_goes_on_the_same(kind: bool) -> None:
    def start(values: torch.Tensor) -> tuple[nn.Parameter, Muon]:
        parameter = nn.Parameter(values.clone())
        return parameter, Muon([{"params": [parameter], "muon": kind}], **COMMON)

    def steps(parameter: nn.Parameter, optimizer: Muon, seeds) -> None:
        for seed in seeds:
            parameter.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
            optimizer.step()

    whole, optimizer = start(torch.ones(4, 6))
    steps(whole, optimizer, range(4))
    first, before = start(torch.ones(4, 6))
    steps(first, before, range(2))
    second, after = start(first.detach())
    after.load_state_dict(before.state_dict())
    steps(second, after, range(2, 4))
    assert torch.equal(whole, second)


@pytest.mark.parametrize("most_values", [1, 50, 2**27])
def test_matrices_of_one_shape_take_the_steps_that_each_takes_alone(
    monkeypatch: pytest.MonkeyPatch, most_values: int
) -> None:
    """The second has no gradient in the second step."""
    monkeypatch.setattr("atmossl.training.muon._MOST_VALUES", most_values)
    generator = torch.Generator().manual_seed(3)
    starts = torch.randn(4, 4, 6, generator=generator)
    gradients = torch.randn(3, 4, 4, 6, generator=generator)

    def trained(chosen: list[int]) -> list[torch.Tensor]:
        parameters = [nn.Parameter(starts[n].clone()) for n in chosen]
        optimizer = Muon([{"params": parameters, "muon": True}], **COMMON)
        for number, step in enumerate(gradients):
            for n, parameter in zip(chosen, parameters, strict=True):
                parameter.grad = None if (number, n) == (1, 1) else step[n].clone()
            optimizer.step()
        return [parameter.detach() for parameter in parameters]

    for n, together in enumerate(trained([0, 1, 2, 3])):
        torch.testing.assert_close(together, *trained([n]))
