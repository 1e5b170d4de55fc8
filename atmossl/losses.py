"""Losses of an ensemble against the truth, elementwise, and their weighted mean.

Every loss maps an ensemble of members [..., member, value] and a target [..., value] to
[..., value].
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Members = Float[Tensor, "*batch member value"]
Values = Float[Tensor, "*batch value"]

_SMALLEST_STD = 1e-3


class Ensemble:
    """Members, and what several losses of them share, taken once and only if it is needed."""

    # not cached properties, whose lock no compiler follows
    _moments: tuple[Values, Values] | None = None
    _gap: Values | None = None

    def __init__(self, members: Members) -> None:
        self.members = members
        self.count = members.shape[-2]

    @property
    def moments(self) -> tuple[Values, Values]:
        """Mean, and mean square of the departures from it."""
        if self._moments is None:
            self._moments = _Moments.apply(self.members)  # type: ignore[assignment]
        return self._moments  # type: ignore[return-value]

    @property
    def mean(self) -> Values:
        return self.moments[0]

    @property
    def std(self) -> Values:
        """Standard deviation (n - 1), bounded from below."""
        self._needs_two()
        variance = self.moments[1] * (self.count / (self.count - 1))
        return (variance + _SMALLEST_STD**2).sqrt()

    @property
    def gap(self) -> Values:
        """Sum of |x_i - x_j| over all pairs i < j, from the sorted members in O(m log m)."""
        self._needs_two()
        if self._gap is None:
            ordered = self.members.sort(dim=-2).values
            rank = torch.arange(self.count, device=ordered.device, dtype=ordered.dtype)
            self._gap = torch.einsum("...mv,m->...v", ordered, 2 * rank - (self.count - 1))
        return self._gap

    def distance(self, target: Values) -> Values:
        """Mean of |x_i - target| over members."""
        return (self.members - target.unsqueeze(-2)).abs().mean(dim=-2)

    def _needs_two(self) -> None:
        if self.count < 2:
            raise ValueError("this loss needs an ensemble: set model.num_members to at least 2")


class _Moments(torch.autograd.Function):
    """Mean and mean square departure over members, with few passes over them and none of their
    size kept: x_i's gradient is g_mean / m + g_square 2 (x_i - mean) / m, for the departures sum
    to 0. On CPUs torch.var is ten times as slow."""

    @staticmethod
    def forward(ctx: Any, members: Tensor) -> tuple[Tensor, Tensor]:
        mean = members.mean(dim=-2)
        ctx.save_for_backward(members, mean)
        return mean, (members - mean.unsqueeze(-2)).square_().mean(dim=-2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        members, mean = ctx.saved_tensors
        of_mean, of_square = (g.unsqueeze(-2) / members.shape[-2] for g in gradients)
        return torch.addcmul(of_mean, members - mean.unsqueeze(-2), 2 * of_square)


Loss = Callable[[Ensemble, Values], Values]


def ensemble_mse(ensemble: Ensemble, target: Values) -> Values:
    """Squared error of every member, averaged over members (the ensemble term of AtmoRep): that of
    the mean plus the mean square departure from it."""
    return mean_mse(ensemble, target) + ensemble.moments[1]


def mean_mse(ensemble: Ensemble, target: Values) -> Values:
    """Squared error of the ensemble mean."""
    return (ensemble.mean - target) ** 2


def statistical(ensemble: Ensemble, target: Values) -> Values:
    """AtmoRep's statistical loss (Lessig et al. 2023, arXiv 2308.13280, section on the loss):

        (1 - exp(-(y - mean)^2 / (2 std^2)))^2 + sqrt(std)

    with the mean and standard deviation of the ensemble: the unnormalised Gaussian is 1 when the
    truth is the mean; the second term keeps the spread from growing without bound.
    """
    std = ensemble.std
    likelihood = torch.exp(-0.5 * ((target - ensemble.mean) / std) ** 2)
    return (1.0 - likelihood) ** 2 + std.sqrt()


def gaussian_nll(ensemble: Ensemble, target: Values) -> Values:
    """Negative log-likelihood of the truth under the ensemble's normal distribution."""
    std = ensemble.std
    score = (target - ensemble.mean) / std
    return 0.5 * score**2 + std.log() + 0.5 * math.log(2 * math.pi)


def fair_crps(ensemble: Ensemble, target: Values) -> Values:
    """Fair kernel CRPS (Ferro 2014, eq. for m members; unbiased in the ensemble size):

        mean_i |x_i - y| - sum_{i<j} |x_i - x_j| / (m (m - 1))

    Both terms carry gradients.
    """
    gap, count = ensemble.gap, ensemble.count
    return ensemble.distance(target) - gap / (count * (count - 1))


def crps(ensemble: Ensemble, target: Values) -> Values:
    """CRPS of the ensemble taken as a distribution (Hersbach 2000; Gneiting and Raftery 2007):

        mean_i |x_i - y| - sum_{i<j} |x_i - x_j| / m^2

    The one for a tail whose members are fixed functions of the input: they settle on the quantiles
    (i - 1/2) / m, and a normal distribution's eight have 0.99 of its spread. Under `fair_crps`,
    meant for random draws, they settle on (i - 1) / (m - 1), and the outermost two run away.
    """
    return ensemble.distance(target) - ensemble.gap / ensemble.count**2


LossName = Literal["ensemble_mse", "mean_mse", "statistical", "gaussian_nll", "fair_crps", "crps"]
LOSSES: dict[LossName, Loss] = {
    "ensemble_mse": ensemble_mse,
    "mean_mse": mean_mse,
    "statistical": statistical,
    "gaussian_nll": gaussian_nll,
    "fair_crps": fair_crps,
    "crps": crps,
}


def weighted_mean(
    values: Float[Tensor, "*batch"],
    weight: Float[Tensor, "*batch"],
    total: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """Sum of weight * value over the sum of weights, or over `total`; 0 where no weight is left."""
    total = weight.sum() if total is None else total
    return (values * weight).sum() / total.clamp_min(torch.finfo(total.dtype).tiny)
