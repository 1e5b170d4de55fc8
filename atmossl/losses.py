"""Losses of an ensemble against the truth, elementwise, and their weighted mean.

Every loss maps members [..., member, value] and target [..., value] to [..., value].
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Members = Float[Tensor, "*batch member value"]
Values = Float[Tensor, "*batch value"]
Loss = Callable[[Members, Values], Values]

_SMALLEST_STD = 1e-3


def _spread(members: Members) -> tuple[Values, Values]:
    """Ensemble mean and standard deviation (n - 1), bounded from below."""
    if members.shape[-2] < 2:
        raise ValueError("this loss needs an ensemble: set model.num_members to at least 2")
    mean = members.mean(dim=-2)
    departures = members - mean.unsqueeze(-2)  # written out: ten times as fast as torch.var on CPUs
    variance = departures.square().sum(dim=-2) / (members.shape[-2] - 1)
    return mean, (variance + _SMALLEST_STD**2).sqrt()


def ensemble_mse(members: Members, target: Values) -> Values:
    """Squared error of every member, averaged over members (the ensemble term of AtmoRep)."""
    return ((members - target.unsqueeze(-2)) ** 2).mean(dim=-2)


def mean_mse(members: Members, target: Values) -> Values:
    """Squared error of the ensemble mean."""
    return (members.mean(dim=-2) - target) ** 2


def statistical(members: Members, target: Values) -> Values:
    """AtmoRep's statistical loss (Lessig et al. 2023, arXiv 2308.13280, section on the loss):

        (1 - exp(-(y - mean)^2 / (2 std^2)))^2 + sqrt(std)

    with the mean and standard deviation of the ensemble: the unnormalised Gaussian is 1 when the
    truth is the mean; the second term keeps the spread from growing without bound.
    """
    mean, std = _spread(members)
    likelihood = torch.exp(-0.5 * ((target - mean) / std) ** 2)
    return (1.0 - likelihood) ** 2 + std.sqrt()


def gaussian_nll(members: Members, target: Values) -> Values:
    """Negative log-likelihood of the truth under the ensemble's normal distribution."""
    mean, std = _spread(members)
    return 0.5 * ((target - mean) / std) ** 2 + std.log() + 0.5 * math.log(2 * math.pi)


def fair_crps(members: Members, target: Values) -> Values:
    """Fair kernel CRPS (Ferro 2014, eq. for m members; unbiased in the ensemble size):

        mean_i |x_i - y| - sum_{i<j} |x_i - x_j| / (m (m - 1))

    The pair sum is taken from the sorted members in O(m log m); both terms carry gradients.
    """
    count = members.shape[-2]
    if count < 2:
        raise ValueError("the fair CRPS needs model.num_members of at least 2")
    skill = (members - target.unsqueeze(-2)).abs().mean(dim=-2)
    ordered = members.sort(dim=-2).values
    rank = torch.arange(count, device=members.device, dtype=members.dtype)
    coefficient = (2 * rank - (count - 1)) / (count * (count - 1))
    return skill - torch.einsum("...mv,m->...v", ordered, coefficient)


def crps(members: Members, target: Values) -> Values:
    """CRPS of the ensemble taken as a distribution (Hersbach 2000; Gneiting and Raftery 2007):

        mean_i |x_i - y| - sum_{i<j} |x_i - x_j| / m^2

    The one for a tail whose members are fixed functions of the input: they settle on the quantiles
    (i - 1/2) / m, and a normal distribution's eight have 0.99 of its spread. Under `fair_crps`,
    meant for random draws, they settle on (i - 1) / (m - 1), and the outermost two run away.
    """
    skill = (members - target.unsqueeze(-2)).abs().mean(dim=-2)
    share = 1 / members.shape[-2]
    return share * skill + (1 - share) * fair_crps(members, target)


LOSSES: dict[str, Loss] = {
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
