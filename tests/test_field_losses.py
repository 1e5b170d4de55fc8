"""Losses of fields against properscoring and numpy on the values that they are made of."""

import numpy as np
import properscoring
import pytest
import torch
from einops import reduce

from atmossl.losses import (
    FIELD_LOSSES,
    FieldEnsemble,
    area_crps,
    difference_crps,
    energy,
    relative_spectral_crps,
    spectral_crps,
    variogram,
)


@pytest.fixture
def fields() -> FieldEnsemble:
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    area = torch.rand(2, 1, 1, 8, 1, generator=generator, dtype=torch.float64).expand(
        2, 3, 2, 8, 12
    )
    hidden = torch.rand(2, 3, 2, 8, 12, generator=generator) < 0.6
    return FieldEnsemble(
        normal(2, 5, 3, 2, 8, 12), normal(2, 3, 2, 8, 12), area * hidden, area, True
    )


def crps_of(members: np.ndarray, target: np.ndarray) -> np.ndarray:
    """95 % fair and 5 % usual CRPS with members along axis 1, by properscoring."""
    usual = properscoring.crps_ensemble(target, np.moveaxis(members, 1, -1))
    pairs = np.abs(members[:, :, None] - members[:, None]).sum((1, 2))
    count = members.shape[1]
    fair = usual + pairs / (2 * count**2) - pairs / (2 * count * (count - 1))
    return 0.95 * fair + 0.05 * usual


def test_area_crps_is_the_crps_of_area_weighted_means(fields: FieldEnsemble) -> None:
    members, target, area = (x.numpy() for x in (fields.members, fields.target, fields.area))
    pattern = "... (y a) (x b) -> ... y x"

    def mean(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
        total = reduce(values * weight, pattern, "sum", a=4, b=4)
        return total / reduce(weight, pattern, "sum", a=4, b=4)

    expected = crps_of(mean(members, area[:, None]), mean(target, area))
    values, weight = area_crps(fields, 4)
    np.testing.assert_allclose(values.numpy(), expected, atol=1e-12)
    assert float(weight.sum()) == pytest.approx(float(fields.weight.sum()))


def test_difference_crps_sees_neighbours_across_the_circle(fields: FieldEnsemble) -> None:
    members, target = fields.members.numpy(), fields.target.numpy()
    along_lon = crps_of(np.roll(members, -1, -1) - members, np.roll(target, -1, -1) - target)
    along_lat = crps_of(np.diff(members, axis=-2), np.diff(target, axis=-2))
    values, weight = difference_crps(fields)
    expected = np.concatenate([along_lon.ravel(), along_lat.ravel()])
    np.testing.assert_allclose(values.numpy(), expected, atol=1e-12)
    zonal = weight[: along_lon.size].sum()
    assert float(zonal) == pytest.approx(float(fields.weight.sum()))  # every cell is in two of them


def test_spectral_crps_is_that_of_the_waves_of_numpy(fields: FieldEnsemble) -> None:
    waves, truth = (np.fft.rfft(x.numpy(), norm="ortho") for x in (fields.members, fields.target))
    values, weight = spectral_crps(fields)
    expected = np.stack([crps_of(waves.real, truth.real), crps_of(waves.imag, truth.imag)], axis=-1)
    np.testing.assert_allclose(values.numpy(), expected.reshape(values.shape), atol=1e-6)
    assert float(weight.sum()) == pytest.approx(float(fields.weight.sum()))


def test_relative_spectral_crps_counts_every_wave_alike(fields: FieldEnsemble) -> None:
    """The truth's waves are scaled to one size by hand; then it is the CRPS of such waves. A wave
    of any other size, in members and in truth, gives the same."""
    waves, truth = (np.fft.rfft(x.numpy(), norm="ortho") for x in (fields.members, fields.target))
    size = np.sqrt((np.abs(truth) ** 2).mean(axis=(0, 2, 3), keepdims=True))
    waves, truth = waves / size[:, None], truth / size
    expected = np.stack([crps_of(waves.real, truth.real), crps_of(waves.imag, truth.imag)], axis=-1)
    for factor in (np.ones(waves.shape[-1]), np.logspace(0, -3, waves.shape[-1])):
        back = (
            np.fft.irfft(x * factor, fields.target.shape[-1], norm="ortho") for x in (waves, truth)
        )
        members, target = (torch.from_numpy(x) for x in back)
        field = FieldEnsemble(members, target, fields.weight, fields.area, periodic=True)
        values, weight = relative_spectral_crps(field)
        np.testing.assert_allclose(values.numpy(), expected.reshape(values.shape), atol=2e-3)
        assert float(weight.sum()) == pytest.approx(float(fields.weight.sum()))


def test_energy_of_one_value_is_the_fair_crps() -> None:
    """One level and 4 x 4 cells of which all but one are the truth: |x - y| and |x_i - x_j|."""
    target = torch.zeros(1, 1, 1, 4, 4, dtype=torch.float64)
    members = target[:, None].repeat(1, 3, 1, 1, 1, 1)
    members[:, :, 0, 0, 1, 2] = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    one = torch.ones_like(target)
    values, _ = energy(FieldEnsemble(members, target, one, one, False))
    fair = 7 / 3 - (1 + 3 + 2) / (3 * 2)
    assert float(values) * 4 == pytest.approx(fair, abs=5e-3)  # lengths are rounded near 0


def test_energy_is_least_for_the_distribution_of_the_truth() -> None:
    """Cells that are all equal in truth: right members score a normal's mean CRPS, 1 / sqrt(pi);
    members whose cells are independent, each of the right distribution, score more."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(20_000, 3, 1, 1, 1, 1, generator=generator)
    own = torch.randn(20_000, 3, 1, 1, 4, 4, generator=generator)
    related = common.expand_as(own)
    one = torch.ones(20_000, 1, 1, 4, 4)
    scores = [
        float(energy(FieldEnsemble(members[:, :2], related[:, 2], one, one, False))[0].mean())
        for members in (related, own)
    ]
    assert scores[0] == pytest.approx(np.pi**-0.5, abs=0.01)
    assert scores[1] > scores[0] + 0.05


def test_variogram_is_that_of_numpy(fields: FieldEnsemble) -> None:
    values, _ = variogram(fields)
    members, target = fields.members.numpy(), fields.target.numpy()
    roots = np.sqrt(np.abs(np.roll(members, -1, -1) - members)).mean(1)
    expected = (roots - np.sqrt(np.abs(np.roll(target, -1, -1) - target))) ** 2
    np.testing.assert_allclose(values[: expected.size].numpy(), expected.ravel(), atol=0.05)
    assert float(values.mean()) == pytest.approx(expected.mean(), rel=0.05)


@pytest.mark.parametrize("name", sorted(FIELD_LOSSES))
def test_members_that_are_the_truth_lose_nothing(name: str, fields: FieldEnsemble) -> None:
    sure = FieldEnsemble(
        fields.target[:, None].expand_as(fields.members), fields.target, fields.weight, fields.area,
        fields.periodic,
    )  # fmt: skip
    values, _ = FIELD_LOSSES[name](sure)
    assert float(values.abs().max()) < 1e-6


@pytest.mark.parametrize(
    "name", sorted(set(FIELD_LOSSES) - {"spectral_crps", "relative_spectral_crps"})
)
def test_cells_never_observed_change_nothing(name: str, fields: FieldEnsemble) -> None:
    """Values of cells with area 0 have no part in sums of areas, differences and columns; a row
    that has such cells has no waves."""
    absent = torch.zeros_like(fields.area, dtype=torch.bool)
    absent[:, :, :, 3, 5] = True
    known = [torch.where(absent, 0.0, x) for x in (fields.weight, fields.area)]
    losses = []
    for value in (0.0, 7.0):
        members = torch.where(absent[:, None], value, fields.members)
        values, weight = FIELD_LOSSES[name](FieldEnsemble(members, fields.target, *known, True))
        losses.append(float((values * weight).sum()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)
